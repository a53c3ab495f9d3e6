"""Several optimizers, seen as one over all their parameters, by what looks at a training from outside.

Checkpoints, reports and checks go over parameter groups and over the state of parameters; whose group or state it is makes
no difference to them, because each parameter has one optimizer. Which of them step together is told by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer

from shardwise.errors import JobError

ALL = ""
"""Name of optimizers that were given without one: they step together."""


@final
class Several(Optimizer):
    """Optimizers of different parameters. Their groups and state are the optimizers' own, not copies.

    Attributes:
        named: name -> the optimizers that step together; one may go by several names.
        each: every optimizer once.
    """

    def __init__(self, named: Mapping[str, tuple[Optimizer, ...]]) -> None:
        # Not torch's own constructor, which would make other groups of the same parameters.
        self.named = dict(named)
        self.each = tuple(dict.fromkeys(one for together in named.values() for one in together))
        self.defaults: dict[str, Any] = {}
        self.param_groups = [group for one in self.each for group in one.param_groups]
        self.state = _States(self.each)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step all of them."""
        if closure is not None:
            raise JobError("several optimizers step once in a step, without a closure")
        for one in self.each:
            one.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all their parameters."""
        for one in self.each:
            one.zero_grad(set_to_none)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"several optimizers seen as one have no {name}: ask each of them, in optimizer.each")

    def __repr__(self) -> str:
        named = (f"{name}: {', '.join(type(one).__name__ for one in each)}" for name, each in self.named.items())
        return f"Several({'; '.join(named)})"


@final
class _States(MutableMapping[Any, Any]):
    """Parameter -> what its optimizer keeps for it."""

    def __init__(self, each: Sequence[Optimizer]) -> None:
        self._each = each

    def __getitem__(self, key: Any) -> Any:
        for one in self._each:
            if key in one.state:
                return one.state[key]
        raise KeyError(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        for one in self._each:
            if any(parameter is key for group in one.param_groups for parameter in group["params"]):
                one.state[key] = value
                return
        raise KeyError(key)

    def __delitem__(self, key: Any) -> None:
        for one in self._each:
            if key in one.state:
                del one.state[key]
                return
        raise KeyError(key)

    def __iter__(self) -> Iterator[Any]:
        for one in self._each:
            yield from one.state

    def __len__(self) -> int:
        return sum(len(one.state) for one in self._each)


def optimizers_in(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizers that the user made: the one itself, or each of several."""
    return optimizer.each if isinstance(optimizer, Several) else (optimizer,)


def as_one(given: Any) -> Optimizer | None:
    """What a job's function returned, as one optimizer; None where it is no optimizer, nor a sequence or dict of them.

    Raises:
        JobError: a parameter has two optimizers.
    """
    if isinstance(given, Optimizer):
        return given
    named = given if isinstance(given, Mapping) else {ALL: given}
    together: dict[str, tuple[Optimizer, ...]] = {}
    for name, value in named.items():
        together[name] = (value,) if isinstance(value, Optimizer) else _sequence(value)
        if not together[name] or not isinstance(name, str):
            return None
    if not together:
        return None
    several = Several(together)
    _check_apart(several)
    return several


def _sequence(value: Any) -> tuple[Optimizer, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, Optimizer) for one in value):
        return ()
    return tuple(value)


def _check_apart(several: Several) -> None:
    first: dict[int, Optimizer] = {}
    for one in several.each:
        for group in one.param_groups:
            for parameter in group["params"]:
                if first.setdefault(id(parameter), one) is not one:
                    names = [
                        name for name, each in several.named.items() if one in each or first[id(parameter)] in each
                    ]
                    raise JobError(
                        f"Job.optimizer returned two optimizers ({', '.join(filter(None, names)) or 'of a list'}) with the same "
                        f"parameter of shape {_shape(parameter)}: each parameter has one optimizer, which may go by several "
                        'names ({"one": [a, b], "other": a})'
                    )


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape)
