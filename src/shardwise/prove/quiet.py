"""A run that can be compared: no random masks, and in the reference no float32 in between.

What draws random numbers draws others in every dtype and on every rank, so dropout and its like are switched off; what
cannot be switched off is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from shardwise.data.randomness import generator_states
from shardwise.parallel.grouped import GROUPED, in_parts
from shardwise.prove.draws import EXTREMES, MOST, extreme

_DROPOUTS = frozenset(
    {
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        torch.dropout,
        torch.feature_dropout,
        torch.alpha_dropout,
        torch.feature_alpha_dropout,
    }
)
"""Functions `(input, p, training, ...)`."""

_RANDOM = frozenset(
    {
        *(
            torch.rand,
            torch.randn,
            torch.randint,
            torch.randperm,
            torch.rand_like,
            torch.randn_like,
            torch.randint_like,
        ),
        *(torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.native_dropout, F.gumbel_softmax),
        *(Tensor.bernoulli, Tensor.bernoulli_, Tensor.multinomial, Tensor.normal_, Tensor.uniform_, Tensor.random_),
        *(Tensor.exponential_, Tensor.geometric_, Tensor.log_normal_, Tensor.cauchy_),
    }
)

_WEIGHTED = frozenset(
    {F.cross_entropy, F.nll_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.multi_margin_loss}
)
"""Functions `(input, target, weight, ...)`; `multi_margin_loss` has it by name alone, after numbers."""

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
_NARROW_CALLS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})


def silence(model: nn.Module) -> list[str]:
    """Switch off the random layers of a model, in place.

    Returns:
        Names of the modules that were changed.
    """
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.p:
            module.p = 0.0
        elif isinstance(module, nn.RReLU) and module.lower != module.upper:
            module.lower = module.upper = (module.lower + module.upper) / 2
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout:
            module.dropout = 0.0
        else:
            continue
        changed.append(name or type(module).__name__)
    return changed


@final
class Quiet(TorchFunctionMode):
    """While it is active, dropout functions pass their input on; other random functions are noted.

    Attributes:
        silenced: names of the dropout functions that were called.
        random: names of the other random functions that were called.
    """

    def __init__(self, *, double: bool, greatest: bool | None = None) -> None:
        """With `double`, casts to float32 and shorter become casts to float64.

        With `greatest`, the first draws of torch's random functions are the greatest that they can give, or the least.
        """
        super().__init__()
        self._double = double
        self._greatest = greatest
        self._draws = 0
        self.silenced: set[str] = set()
        self.random: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named: dict[str, Any] = dict(kwargs or {})
        if func in (Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            with self._in_engine():
                return func(*args, **named)
        if func in _DROPOUTS:
            args, named = self._without_dropout(func, args, named)
        elif func is F.scaled_dot_product_attention:
            args, named = self._without(func, args, named, "dropout_p", 4)
        elif func is F.multi_head_attention_forward:
            args, named = self._without(func, args, named, "dropout_p", 10)
        elif func is F.rrelu or func is torch.rrelu:
            args, named = self._without(func, args, named, "training", 3)
        elif func in _RANDOM:
            self.random.add(func.__name__)
            self._draws += 1
            if self._greatest is not None and func in EXTREMES and self._draws <= MOST:
                return extreme(func, args, named, greatest=self._greatest)
        if self._double:
            if func in _NARROW_CALLS:
                return Tensor.double(*args, **named)
            if func is GROUPED:
                return in_parts(*args, **named)
            args = tuple(_widened(item) for item in args)
            named = {key: _widened(item) for key, item in named.items()}
            if func in _WEIGHTED:
                args, named = _with_wide_weights(args, named)
        return func(*args, **named)

    @contextmanager
    def _in_engine(self) -> Iterator[None]:
        """Activations that are computed again in a backward pass (`torch.utils.checkpoint`) are computed as they were.

        Torch takes a mode away while the mode answers a call, and a backward pass is one; so it comes back where the
        autograd engine is entered.
        """
        torch_autograd: Any = torch.autograd
        engine = torch_autograd._engine_run_backward

        def enter(*args: Any, **kwargs: Any) -> Any:
            with self:
                return engine(*args, **kwargs)

        torch_autograd._engine_run_backward = enter
        try:
            yield
        finally:
            torch_autograd._engine_run_backward = engine

    def _without_dropout(
        self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        probability = named.get("p", args[1] if len(args) > 1 else 0.5)
        training = named.get("training", named.get("train", args[2] if len(args) > 2 else True))
        if training and probability:
            self.silenced.add(func.__name__)
        if "p" in named:
            return args, {**named, "p": 0.0}
        if len(args) > 1:
            return (args[0], 0.0, *args[2:]), named
        return args, {**named, "p": 0.0}

    def _without(
        self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any], key: str, place: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        value = named.get(key, args[place] if len(args) > place else 0)
        if not value:
            return args, named
        self.silenced.add(func.__name__)
        off = False if isinstance(value, bool) else 0.0
        if key in named:
            return args, {**named, key: off}
        return (*args[:place], off, *args[place + 1 :]), named


@contextmanager
def noted_draws(names: set[str]) -> Iterator[None]:
    """Add the global generators of Python and NumPy to the names if the block draws from them."""
    python, numpy, _ = generator_states()
    try:
        yield
    finally:
        python_after, numpy_after, _ = generator_states()
        if python_after != python:
            names.add("Python's random")
        if numpy_after[2] != numpy[2] or (numpy_after[1] != numpy[1]).any():
            names.add("numpy.random")


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _with_wide_weights(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Weights of classes, which may belong to no module of the model, in float64: torch's losses take no mixture."""
    wide = {key: in_double(item) if key in ("weight", "pos_weight") else item for key, item in named.items()}
    return (*args[:2], *in_double(args[2:])), wide


def in_double(tree: Any) -> Any:
    """A tree of tensors with every floating one in float64; complex ones in complex128."""
    if isinstance(tree, Mapping):
        return {key: in_double(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        make = getattr(type(tree), "_make", tuple)
        return make(in_double(value) for value in tree)
    if isinstance(tree, Tensor) and tree.is_floating_point():
        return tree.double()
    if isinstance(tree, Tensor) and tree.is_complex():
        return tree.to(torch.complex128)
    return cast(Any, tree)
