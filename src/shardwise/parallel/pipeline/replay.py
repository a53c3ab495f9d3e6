"""Running one stage: the user's forward functions from the beginning, with stand-ins for what other stages compute.

The pass goes through the same calls as its trace did. Calls of earlier stages are answered at once, with the values that
arrived or with stand-ins; the stage's own calls run; after the last of them the pass is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, resolve_name
from torch.utils import _pytree as pytree

from shardwise.dist.split import is_stand_in
from shardwise.errors import RunFailed
from shardwise.parallel.pipeline.again import without_reentrance
from shardwise.parallel.pipeline.gate import Session
from shardwise.parallel.pipeline.program import Cutting, Forward
from shardwise.parallel.pipeline.trace import Own


@final
@dataclass
class StageResult:
    """What a stage makes of one micro-batch.

    Attributes:
        leaves: the values that arrived, by number, as autograd sees them: their `grad` is what goes back.
        carried: the values for the next stage, by number, with their autograd graph.
        output: the model's output, on the last stage only.
    """

    leaves: dict[int, Tensor]
    carried: dict[int, Tensor]
    output: Any = None


class _StageDone(BaseException):
    """Leaves the pass; not an Exception, so that no handler in a forward function stops it."""


def run_stage(
    forward: Forward,
    model: nn.Module,
    session: Session,
    cutting: Cutting,
    stage: int,
    inputs: Any,
    arrived: dict[int, Tensor],
    plain: Callable[[Any], Any],
) -> StageResult:
    """Run one stage on one micro-batch.

    Args:
        forward: as it was traced.
        model: the user's module; what this stage does not hold may be stand-ins.
        session: of the gates on the model's units.
        cutting: of a pass with inputs of these shapes, in the model's present modes.
        inputs: those of the model; every stage has them.
        arrived: tensor of every value in `cutting.carried[stage]`; the stage may overwrite them.
        plain: makes a value of this stage one that can be sent.

    Raises:
        RunFailed: the pass took another way than its trace.
    """
    leaves: dict[int, Tensor] = {}
    with_gradient = set(cutting.with_gradient[stage]) if torch.is_grad_enabled() else set()
    values: dict[int, Tensor] = {}
    for number, tensor in arrived.items():
        leaf = tensor.detach().requires_grad_(number in with_gradient)
        leaves[number] = leaf
        # autograd refuses to change a leaf in place
        values[number] = leaf.clone() if number in cutting.copied[stage] else leaf
    if cutting.trace.copy_inputs:
        inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)
    replay = _Replay(model, cutting, stage, values)
    session.forget()
    output = None
    try:
        with without_reentrance(), replay:
            session.handler = replay
            output = forward(model, inputs)
        replay.check_end()
        output = replay.fill(output)
    except _StageDone:
        pass
    finally:
        session.handler = None
        session.forget()
    following = cutting.carried[stage + 1] if stage + 1 < cutting.stages else ()
    return StageResult(leaves, {number: plain(replay.values[number]) for number in following}, output)


@final
class _Replay(TorchFunctionMode):
    def __init__(self, model: nn.Module, cutting: Cutting, stage: int, values: dict[int, Tensor]) -> None:
        super().__init__()
        self._model = model
        self._cutting = cutting
        self._calls = cutting.trace.calls
        self._numbers = cutting.trace.numbers
        self._stage = stage
        self._next = 0
        self._inside = False
        self.values = values
        self._kept = frozenset(cutting.carried[stage + 1]) if stage + 1 < cutting.stages else frozenset()

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        name = resolve_name(func) or getattr(func, "__name__", repr(func))
        if self._next < len(self._calls) and self._calls[self._next].name == name:
            return self._step(name, func, args, kwargs)
        answer = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(answer)):
            self._lost(name)
        return answer  # a question, which has no place in the trace

    def module_call(self, name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A unit was called."""
        if self._inside:
            return run(*args, **kwargs)
        return self._step(name, self._undisturbed(run), args, kwargs)

    def _undisturbed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` without this mode, which would cost a Python call for every operation inside a unit."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside = True
            top = _get_current_function_mode() is self
            if top:
                self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            try:
                return run(*args, **kwargs)
            finally:
                if top:
                    self.__enter__()  # type: ignore[no-untyped-call]
                self._inside = False

        return call

    def _step(self, name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = self._next
        if number >= len(self._calls) or self._calls[number].name != name:
            self._lost(name)
        # Left before the next call and not after the last one, which may be inside an autograd function that is not done.
        if number > self._cutting.last[self._stage] and self._stage + 1 < self._cutting.stages:
            raise _StageDone
        self._next += 1
        call = self._calls[number]
        if call.everywhere:
            return run(*args, **kwargs)
        stage = self._cutting.stage_of[number]
        if stage < self._stage:
            return pytree.tree_map_only((Own, Tensor), self._stand_in, call.stand_in())
        if number in self._cutting.given:
            args, kwargs = self.fill((args, kwargs))
        answer = run(*args, **kwargs)
        self._keep(call.defines, call.answer[0], answer)
        return answer

    def _stand_in(self, leaf: Own | Tensor) -> Any:
        if isinstance(leaf, Own):
            path, _, last = leaf.name.rpartition(".")
            return getattr(self._model.get_submodule(path), last)
        number = self._numbers.get(id(leaf), -1)
        # The value itself where it arrived. But a late one is still inside of its autograd function, which would take
        # the value for its own result; it is put in when it is used.
        if number in self.values and not self._cutting.trace.values[number].late:
            return self.values[number]
        return leaf

    def _keep(self, defines: tuple[int, ...], ghosts: tuple[Any, ...], answer: Any) -> None:
        if not self._kept.intersection(defines):
            return
        for ghost, leaf in zip(ghosts, pytree.tree_leaves(answer), strict=True):
            number = self._numbers.get(id(ghost), -1)
            if number in self._kept:
                self.values[number] = leaf

    def fill(self, tree: Any) -> Any:
        """The tree with the values that arrived in place of their stand-ins."""
        return pytree.tree_map_only(Tensor, self._filled, tree)

    def _filled(self, tensor: Tensor) -> Tensor:
        return self.values[self._numbers[id(tensor)]] if is_stand_in(tensor) and id(tensor) in self._numbers else tensor

    def check_end(self) -> None:
        """The pass must have made all calls of its trace."""
        if self._next != len(self._calls):
            self._lost("the end")

    def _lost(self, name: str) -> NoReturn:
        expected = self._calls[self._next].name if self._next < len(self._calls) else "the end"
        raise RunFailed(
            f"stage {self._stage} of the pipeline: the forward pass came to {name} where it came to {expected} before, with "
            "inputs of the same shapes. All stages must take the same way through the model: a random branch (layers "
            "dropped at random), a step counter or a branch on other state than the shapes and values of the inputs is "
            "not possible with a pipeline; use a plan without"
        )
