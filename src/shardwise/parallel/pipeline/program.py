"""A forward pass cut into stages, for every shape of input it meets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, final

from torch import nn

from shardwise.errors import PlanError
from shardwise.nn.experts import declared_experts
from shardwise.parallel.pipeline.cuts import StageShare, StageTable, check_named, choose, forbidden
from shardwise.parallel.pipeline.gate import Session, install, units
from shardwise.parallel.pipeline.message import Form
from shardwise.parallel.pipeline.skeleton import Fakes, skeleton_of
from shardwise.parallel.pipeline.trace import Trace, signature
from shardwise.parallel.pipeline.tracer import CannotOpenError, take_trace

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""`(model, inputs)` -> output. It may compute the loss as well."""


@final
@dataclass(frozen=True)
class Cutting:
    """A trace with its cuts.

    Attributes:
        starts: number of the first call of every stage; 0 for the first.
        carried: numbers of the values that arrive at every stage; none at the first.
        stage_of: the stage of every call.
        last: number of the last call that every stage makes.
        given: numbers of the calls that are given late values of an earlier stage.
        copied: numbers of the arriving values that every stage changes in place.
    """

    trace: Trace
    starts: tuple[int, ...]
    carried: tuple[tuple[int, ...], ...]
    stage_of: tuple[int, ...]
    last: tuple[int, ...]
    given: frozenset[int]
    copied: tuple[frozenset[int], ...]

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.starts)

    @cached_property
    def with_gradient(self) -> tuple[tuple[int, ...], ...]:
        """Of the values that arrive at every stage, those whose gradient goes back."""
        values = self.trace.values
        return tuple(
            tuple(number for number in carried if stage and values[number].needs_gradient(self.starts[stage]))
            for stage, carried in enumerate(self.carried)
        )

    @cached_property
    def activations(self) -> tuple[Form, ...]:
        """The message that every stage gets from the one before; an empty one at the first."""
        ghosts = [value.ghost for value in self.trace.values]
        return tuple(Form.of(ghosts, carried, optional=False) for carried in self.carried)

    @cached_property
    def gradients(self) -> tuple[Form, ...]:
        """The message that every stage gets from the one behind; an empty one at the last."""
        ghosts = [value.ghost for value in self.trace.values]
        return tuple(Form.of(ghosts, numbers, optional=True) for numbers in (*self.with_gradient[1:], ()))

    def holders(self) -> dict[str, set[int]]:
        """Name of a parameter or buffer -> the stages that use it."""
        found: dict[str, set[int]] = {}
        for call, stage in zip(self.trace.calls, self.stage_of, strict=True):
            for name in call.tensors:
                found.setdefault(name, set()).update(range(self.stages) if call.everywhere else {stage})
        return found


@final
class Program:
    """The forward pass of one model, cut at fixed modules.

    Inputs of another shape are traced when they are first met, over a skeleton without memory and without computing.
    """

    def __init__(self, model: nn.Module, forward: Forward, cuts: Sequence[str]) -> None:
        """Prepare tracing with the given cuts.

        Args:
            model: the user's module as it was built, before any other kind of parallelism changed it.
            forward: calls the model.
            cuts: names of the modules that start stages 1, 2, ...
        """
        self.forward = forward
        self.cuts = tuple(cuts)
        self.fakes = Fakes()
        self._skeleton = skeleton_of(model, self.fakes)
        self.opened = frozenset(parent for cut in cuts for parent in _parents(cut))
        self._session = Session()
        self._modules = dict(self._skeleton.named_modules())
        # Opened modules too, so that a trace says where they start: one cut may be at a module, another one inside it.
        opened = [(name, self._modules[name]) for name in sorted(self.opened)]
        opened = [(name, module) for name, module in opened if not isinstance(module, nn.ModuleList | nn.ModuleDict)]
        for name, module in [*units(self._skeleton, self.opened), *opened]:
            install(module, name, self._session)
        self._followed: list[tuple[nn.Module, nn.Module]] = []
        self._known: dict[tuple[Any, ...], Cutting] = {}
        self._forced: set[int] = set()

    def follow(self, model: nn.Module) -> None:
        """From now on trace in the modes (training or not) that the modules of `model` are in."""
        named = model.named_modules()
        self._followed = [(module, self._modules[name]) for name, module in named if name in self._modules]

    def cutting(self, inputs: Any) -> Cutting:
        """The forward pass for inputs of these shapes, in the modes that the model and torch are in now.

        Raises:
            PlanError: the forward pass cannot be cut there.
        """
        modes = tuple(module.training for module, _ in self._followed)
        key = signature(inputs, modes)
        if key not in self._known or self._known[key].trace.asks_values:
            for module, copied in self._followed:
                copied.training = module.training
            trace = take_trace(
                self.forward,
                self._skeleton,
                self._session,
                inputs,
                fakes=self.fakes,
                opened=self.opened,
                forced=self._forced,
            )
            self._known[key] = _cut(trace, self.cuts)
        return self._known[key]


def find_cuts(
    model: nn.Module, forward: Forward, inputs: Any, stages: int, cuts: Sequence[str] = ()
) -> tuple[str, ...]:
    """The modules that start stages 1, 2, ...: `cuts` if given, otherwise balanced ones.

    Raises:
        PlanError: the cuts cannot be, or the model cannot be cut so often.
    """
    if cuts:
        check_named(cuts, [name for name, _ in model.named_modules() if name], stages)
        _check_outside_experts(model, cuts)
        return tuple(cuts)
    return choose(search_trace(model, forward, inputs), stages)


def search_trace(model: nn.Module, forward: Forward, inputs: Any) -> Trace:
    """The trace of a forward pass in which every module that can be walked through is. Nothing is computed.

    Raises:
        PlanError: the forward pass cannot be traced.
    """
    fakes = Fakes()
    skeleton = skeleton_of(model, fakes)
    session = Session()
    modules = [(name, module) for name, module in skeleton.named_modules() if name]
    opened = {
        name for name, module in modules if next(module.children(), None) is not None and not declared_experts(module)
    }
    for name, module in modules:
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            install(module, name, session)
    while True:
        try:
            return take_trace(
                forward, skeleton, session, inputs, fakes=fakes, opened=frozenset(opened), forced=set(), searching=True
            )
        except CannotOpenError as error:
            if error.module not in opened:
                raise
            opened.remove(error.module)


def _check_outside_experts(model: nn.Module, cuts: Sequence[str]) -> None:
    for cut in cuts:
        for parent in _parents(cut):
            if declared_experts(model.get_submodule(parent)):
                raise PlanError(
                    f"plan cuts: {cut!r} lies inside {parent!r}, whose experts run as a whole on one stage; cut at "
                    f"{parent!r} or elsewhere"
                )


def describe(cutting: Cutting, model: nn.Module, cuts: Sequence[str]) -> StageTable:
    """The table of stages."""
    trace, holders = cutting.trace, cutting.holders()
    parameters = dict(model.named_parameters())
    makers = {value: call.name for call in trace.calls for value in call.defines}
    total = sum(call.cost for call in trace.calls if not call.everywhere) or 1.0
    shares = []
    for stage in range(cutting.stages):
        own = [
            call for call, at in zip(trace.calls, cutting.stage_of, strict=True) if at == stage and not call.everywhere
        ]
        held = {name for name in parameters if stage in holders.get(name, {0})}
        carried = cutting.carried[stage]
        shares.append(
            StageShare(
                stage=stage,
                first=cuts[stage - 1] if stage else "",
                cost_share=sum(call.cost for call in own) / total,
                parameters=sum(parameters[name].numel() for name in held),
                shared=tuple(name for name in parameters if name in held and len(holders.get(name, {0})) > 1),
                carried=tuple((str(trace.values[value]), makers[value]) for value in carried),
                carried_bytes=sum(trace.values[value].bytes for value in carried),
            )
        )
    return StageTable(tuple(shares))


def _cut(trace: Trace, cuts: Sequence[str]) -> Cutting:
    try:
        starts = (0, *trace.starts(cuts))
    except KeyError as error:
        called = ", ".join(name for name, _ in trace.entries)
        raise PlanError(
            f"plan cuts: module {error.args[0]!r} is never called by the forward pass, so no stage can start there; modules "
            f"called on its level are {called}"
        ) from error
    reasons = forbidden(trace)
    for name, start, before in zip(cuts, starts[1:], starts, strict=False):
        if start in reasons:
            raise PlanError(
                f"plan cuts: no stage can start at {name!r}, because {reasons[start]}; cut at another module"
            )
        if all(call.everywhere for call in trace.calls[before:start]):
            raise PlanError(
                f"plan cuts={list(cuts)}: the stage before {name!r} has nothing to do; name the modules in the order in "
                "which they are called, each with work before it"
            )
    stage_of = tuple(sum(start <= number for start in starts[1:]) for number in range(len(trace.calls)))
    carried = tuple(trace.live(start) if start else () for start in starts)
    bound = [number for number, call in enumerate(trace.calls) if not call.everywhere]
    last = tuple(
        max((number for number in bound if stage_of[number] == stage), default=-1) for stage in range(len(starts))
    )
    if last[-1] < 0:
        raise PlanError(f"plan cuts={list(cuts)}: nothing is left for the last stage, which starts at {cuts[-1]!r}")
    cutting = Cutting(
        trace=trace,
        starts=starts,
        carried=carried,
        stage_of=stage_of,
        last=last,
        given=_given(trace, stage_of),
        copied=tuple(_changed(trace, stage_of, stage) & set(carried[stage]) for stage in range(len(starts))),
    )
    _check_writes(cutting)
    return cutting


def _given(trace: Trace, stage_of: tuple[int, ...]) -> frozenset[int]:
    made = {value: stage_of[number] for number, call in enumerate(trace.calls) for value in call.defines}
    calls = enumerate(trace.calls)
    late = {number for number, value in enumerate(trace.values) if value.late}
    return frozenset(n for n, call in calls if any(made[value] < stage_of[n] for value in late.intersection(call.uses)))


def _changed(trace: Trace, stage_of: tuple[int, ...], stage: int) -> frozenset[int]:
    calls = enumerate(trace.calls)
    return frozenset(value for number, call in calls if stage_of[number] == stage for value in call.changes)


def _check_writes(cutting: Cutting) -> None:
    """A buffer that one stage changes must not be seen by another, which has a copy of its own."""
    holders = cutting.holders()
    for call, stage in zip(cutting.trace.calls, cutting.stage_of, strict=True):
        for name in sorted(call.writes):
            others = sorted(holders[name] - {stage})
            if others and not call.everywhere:
                raise PlanError(
                    f"{call.name} changes {name!r} in the forward pass on stage {stage}, but stage {others[0]} uses it too; "
                    "cut the model so that one stage holds all its uses"
                )


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]
