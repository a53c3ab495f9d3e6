"""Recomputation (activation checkpointing): what a module's forward pass leaves for the backward pass is thrown away, and
computed again when the backward pass comes to it.

Chen et al. (2016), "Training deep nets with sublinear memory cost". Built on `torch.utils.checkpoint` without reentrance.
The modules, their names and hooks stay what they are; only their forward function is replaced.

What torch's function leaves to its user is taken care of here:
- a forward pass that changes buffers (BatchNorm's running statistics, averages of its own) would change them twice, and be
  computed from other values the second time: then it gets copies of what it began with;
- a forward pass whose inputs were changed in place since would be computed from other values, without an error: that is
  found out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from shardwise.errors import PlanError
from shardwise.parallel.blocks import CONTAINERS, repeated_blocks
from shardwise.spec.plan import Plan

if TYPE_CHECKING:
    from shardwise.parallel.pipeline.part import PipelinePart

KEPT = frozenset([
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "_grouped_mm", "mkldnn_linear_pointwise"),
    *("convolution", "_convolution", "mkldnn_convolution", "mkldnn_rnn_layer"),
    *(f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")),
    "_scaled_dot_product_flash_attention_for_cpu",
])  # fmt: skip
"""Operations whose results `selective` keeps: they take nearly all of the time, and what comes between them is cheap."""

SMALL = 1 << 16
"""Elements of a buffer up to which it is copied in any case: torch's batch_norm writes running statistics without leaving a
mark on them, by which larger buffers (tables of positions, masks) are told to have changed."""

_MUTATED = "cached during selective activation checkpoint has been mutated"

Run = Callable[..., Any]


@final
@dataclass
class Recomputed:
    """What is recomputed.

    Attributes:
        names: of the modules on this rank.
        calls: forward passes that were computed again so far.
    """

    names: list[str] = field(default_factory=list)
    calls: int = 0


def recomputed_modules(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Name -> module of what the plan recomputes; empty where it recomputes nothing.

    Raises:
        PlanError: there is nothing to recompute, or a name of the plan fits no module.
    """
    if plan.recompute == "none":
        return {}
    modules = dict(model.named_modules())
    if not plan.recompute_modules:
        names = repeated_blocks(model)
        if not names:
            raise PlanError(
                f"plan recompute={plan.recompute!r}: {type(model).__name__} has no repeated blocks (looked at "
                f"{', '.join(name for name, _ in model.named_children()) or 'a model without children'}); name the modules to "
                "recompute with recompute_modules in a plan file, or leave recompute out"
            )
        return {name: modules[name] for name in names}
    found: dict[str, nn.Module] = {}
    for pattern in plan.recompute_modules:
        fitting = {name: module for name, module in modules.items() if name and _fits(name, pattern)}
        if not fitting:
            raise PlanError(
                f"plan recompute_modules: no module is called {pattern!r}; names are those of model.named_modules(), with * "
                "for any one part"
            )
        found |= fitting
    for name, module in found.items():
        if isinstance(module, CONTAINERS):
            raise PlanError(
                f"plan recompute_modules: {name!r} is a {type(module).__name__}, which is never called; name what is in it, "
                f"as {name + '.*'!r}"
            )
        outside = next((other for other in found if name.startswith(f"{other}.")), None)
        if outside is not None:
            raise PlanError(
                f"plan recompute_modules: {name!r} lies inside {outside!r}, and would be computed three times; name one "
                "of the two"
            )
    return found


def recompute(model: nn.Module, plan: Plan, *, early_stop: bool = True) -> Recomputed:
    """Let the chosen modules be recomputed, in place. To be called when their forward functions are final.

    Args:
        model: whose modules.
        plan: accepted by `recomputed_modules`.
        early_stop: end a recomputation when all that the backward pass needs is there. Not where that moment may differ from
            rank to rank and the rest of the module talks to other ranks.
    """
    kept = Recomputed()
    wrapped: set[int] = set()
    for name, module in recomputed_modules(model, plan).items():
        if id(module) not in wrapped:  # one module under two names
            wrapped.add(id(module))
            module.forward = wrap(name, module, module.forward, plan, kept, early_stop=early_stop)
    return kept


def check_cut(model: nn.Module, plan: Plan, opened: Collection[str]) -> None:
    """Refuse to recompute modules that a pipeline cuts.

    Args:
        model: whose modules.
        plan: with a pipeline.
        opened: names of the modules whose own forward function runs on several stages.

    Raises:
        PlanError: names the module.
    """
    for name in recomputed_modules(model, plan):
        if name in opened:
            raise PlanError(
                f"plan recompute={plan.recompute!r}: module {name!r} is cut by the pipeline's stages, so that it never runs as a "
                "whole; name modules inside of it with recompute_modules, or cut elsewhere with cuts"
            )


def recompute_stages(part: PipelinePart, plan: Plan, *, early_stop: bool = True) -> Recomputed:
    """As `recompute`, of what this rank's pipeline stages hold.

    Args:
        part: of a model that `check_cut` accepted.
        plan: accepted by `recomputed_modules`.
        early_stop: as for `recompute`.
    """
    kept, gates = Recomputed(), dict(part.gates())
    for name, module in recomputed_modules(part.model, plan).items():
        if name in gates:
            gates[name].run = wrap(name, module, gates[name].run, plan, kept, early_stop=early_stop)
        elif any(name.startswith(f"{unit}.") for unit in gates):
            module.forward = wrap(name, module, module.forward, plan, kept, early_stop=early_stop)
    return kept


def wrap(name: str, module: nn.Module, run: Run, plan: Plan, kept: Recomputed, *, early_stop: bool = True) -> Run:
    """The forward function `run` of a module, recomputed; `kept` is told of it."""
    kept.names.append(name)
    return _Recomputation(name, module, run, plan.recompute == "selective", early_stop, kept)


@final
@dataclass
class _Recomputation:
    """Stands for a module's forward function."""

    name: str
    module: nn.Module
    run: Run
    selective: bool
    early_stop: bool
    kept: Recomputed
    changing: set[tuple[nn.Module, str]] | None = None
    """Large buffers that its forward pass changes, as its first call has shown."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        call = _Call(self, [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
        # The arguments are given as they are, because torch looks at their devices.
        return checkpoint(
            self._plainly, args, kwargs, use_reentrant=False, context_fn=call.contexts, early_stop=self.early_stop
        )

    def _plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.run(*args, **kwargs)


@final
class _Call:
    """One call of a module, from its forward pass to its recomputation."""

    def __init__(self, what: _Recomputation, inputs: list[Tensor]) -> None:
        self._what = what
        self._inputs = [(tensor, _version(tensor)) for tensor in inputs]
        self._changed: list[tuple[nn.Module, str, Tensor | None]] = []
        """Buffers that the forward pass changes, and what was in them before; None where there was none."""

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around the forward pass, and around its recomputation."""
        first: AbstractContextManager[Any] = nullcontext()
        again: AbstractContextManager[Any] = nullcontext()
        if self._what.selective:
            first, again = create_selective_checkpoint_contexts(_policy)
        return self._first(first), self._again(again)

    @contextmanager
    def _first(self, inner: AbstractContextManager[Any]) -> Iterator[None]:
        """See which buffers the forward pass changes, and keep what was in them."""
        changing = self._what.changing
        before = {}
        for module, key, tensor in _buffers(self._what.module):
            kept = changing is None or (module, key) in changing or tensor.numel() <= SMALL
            before[module, key] = tensor, tensor._version, tensor.detach().clone() if kept else None
        with inner:
            yield
        self._what.changing = set() if changing is None else changing
        for module, key, tensor in _buffers(self._what.module):
            known, version, values = before.get((module, key), (None, 0, None))
            changed = known is not tensor or version != tensor._version
            if changed and known is not None and values is None:
                raise PlanError(
                    f"plan recompute: module {self._what.name!r} changes its buffer {key!r} in this call, and did not in the "
                    "first, so that computing it again would begin with other values; leave it out with recompute_modules"
                )
            if changed and tensor.numel() > SMALL:
                self._what.changing.add((module, key))
            if changed or tensor.numel() <= SMALL:
                self._changed.append((module, key, values))

    @contextmanager
    def _again(self, inner: AbstractContextManager[Any]) -> Iterator[None]:
        """Begin with what was in those buffers, and leave them as they are."""
        for given, version in self._inputs:
            if _version(given) != version:
                raise PlanError(
                    f"plan recompute: an input of module {self._what.name!r} was changed in place after the module had "
                    "started, so that computing it again would give something else; write x = x + y for x += y there, or "
                    "leave the module out with recompute_modules"
                )
        self._what.kept.calls += 1
        buffers = [(module, key, module._buffers[key]) for module, key, _ in self._changed]
        for module, key, values in self._changed:
            module._buffers[key] = None if values is None else values.clone()
        try:
            with inner:
                yield
        except RuntimeError as error:
            if _MUTATED not in str(error):
                raise
            raise PlanError(
                f"plan recompute='selective': module {self._what.name!r} changes the result of a product or convolution in "
                "place (as ReLU(inplace=True) does), so that it cannot be kept; use recompute='full'"
            ) from error
        finally:
            for module, key, tensor in buffers:
                module._buffers[key] = tensor


def _fits(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for part in module.modules():
        for key, tensor in part._buffers.items():
            if tensor is not None:
                yield part, key, tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(op) else CheckpointPolicy.PREFER_RECOMPUTE


@lru_cache(maxsize=4096)
def _is_kept(op: Any) -> bool:
    # What writes into a tensor that was there before leaves nothing of its own to keep.
    return str(op.name()).removeprefix("aten::").split(".")[0] in KEPT and not op._schema.is_mutable
