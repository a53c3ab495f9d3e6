"""This rank's part of a pipelined model: the user's module, holding what its stages use and stand-ins for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from shardwise.dist.split import is_stand_in
from shardwise.errors import PlanError
from shardwise.parallel.pipeline.cuts import StageTable
from shardwise.parallel.pipeline.gate import Gate, Session, install, units
from shardwise.parallel.pipeline.program import Cutting, Forward, Program, describe, find_cuts
from shardwise.spec.schedule import placement_of


def call_model(model: nn.Module, inputs: Any) -> Any:
    """`model(x)`, with a tuple of inputs as positional and a dict as keyword arguments."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


@final
@dataclass(frozen=True)
class Split:
    """A model and where it is cut; nothing is given away yet.

    Attributes:
        table: what every stage does, for people.
        holders: name of every parameter and buffer -> the stages that use it, in order; the first is its owner.
    """

    program: Program
    table: StageTable
    holders: dict[str, tuple[int, ...]]

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.table.stages)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _itself(value: Any) -> Any:
    return value


@final
@dataclass
class PipelinePart:
    """What one rank of the pipeline keeps of the model.

    Attributes:
        model: the user's module itself, with every module and name in place. Parameters and buffers of other ranks are
            stand-ins with shape, dtype and device and without memory; they never get a gradient.
        placement: the rank of every stage.
        holders: name of every parameter and buffer -> the ranks that hold it; the first is its owner.
        around: `around(function, *args)` runs a stage.
        tracing: the same walks through the model without values.
        plain: makes a value of a stage one that can be sent.
    """

    model: nn.Module
    program: Program
    table: StageTable
    rank: int
    placement: tuple[int, ...]
    holders: dict[str, tuple[int, ...]]
    around: Callable[..., Any] = _call
    tracing: Callable[..., Any] = _call
    plain: Callable[[Any], Any] = _itself
    session: Session = field(default_factory=Session)
    _gates: dict[str, Gate] = field(default_factory=dict)
    _accepted: set[int] = field(default_factory=set)

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages this rank runs."""
        return tuple(stage for stage, rank in enumerate(self.placement) if rank == self.rank)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of what this rank holds, tied ones once, with the user's names."""
        return ((name, value) for name, value in self.model.named_parameters() if not is_stand_in(value))

    def units(self) -> list[tuple[str, nn.Module]]:
        """(name, module) of every unit whose parameters this rank holds and no other rank does: what runs here as a whole
        and may be sharded, compiled or recomputed as a whole."""
        found = []
        shared = {name for names in self.shared().values() for name in names}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for name, module in units(self.model, self.program.opened):
            parameters = list(module.parameters())
            if parameters and not any(is_stand_in(p) or names[id(p)] in shared for p in parameters):
                found.append((name, module))
        return found

    def compile(self, **options: Any) -> None:
        """Run every unit that this rank holds through `torch.compile(**options)`; their hooks stay outside.

        Call it last: compilation sees what the other kinds of parallelism made of the units.
        """
        for _, gate in self.gates():
            gate.run = torch.compile(gate.run, **options)

    def gates(self) -> Iterator[tuple[str, Gate]]:
        """(name, gate) of every unit whose parameters this rank holds: behind it lies the unit's own code."""
        for name, unit in units(self.model, self.program.opened):
            gate = self._gates.get(name)
            parameters = list(unit.parameters())
            if gate is not None and parameters and not any(is_stand_in(parameter) for parameter in parameters):
                yield name, gate

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """(name, buffer) of what this rank holds."""
        return ((name, value) for name, value in self.model.named_buffers() if not is_stand_in(value))

    def owns(self, name: str) -> bool:
        """Whether this rank is the one that counts or saves a parameter or buffer that several may hold."""
        return self.holders[name][0] == self.rank

    def state_dict(self) -> dict[str, Tensor]:
        """Of the model's state, what this rank owns; the parts of all ranks together are the whole, each tensor once.

        A tied parameter appears under all of its names, as in the model's own state.
        """
        canonical = {id(value): name for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]}
        owned = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor) and not is_stand_in(value) and self.owns(canonical[id(value)]):
                owned[name] = value.detach()
        return owned

    def shared(self) -> dict[tuple[int, ...], list[str]]:
        """Trained parameters that several ranks hold, by those ranks."""
        found: dict[tuple[int, ...], list[str]] = {}
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        for name in trained:
            if len(self.holders[name]) > 1:
                found.setdefault(self.holders[name], []).append(name)
        return dict(sorted(found.items()))

    def cutting(self, inputs: Any) -> Cutting:
        """How inputs of these shapes go through the stages.

        Raises:
            PlanError: they need a parameter or buffer on a stage whose rank does not hold it.
        """
        if not self._accepted:  # other kinds of parallelism may have replaced modules until now
            self.program.follow(self.model)
        cutting: Cutting = self.tracing(self.program.cutting, inputs)
        if cutting.trace.asks_values or id(cutting) not in self._accepted:
            for name, stages in cutting.holders().items():
                missing = sorted({self.placement[stage] for stage in stages} - set(self.holders[name]))
                if missing:
                    raise PlanError(
                        f"with inputs of these shapes (or in this mode) pipeline rank {missing[0]} needs {name!r}, which it "
                        "did not need for the example inputs; cut the model elsewhere with plan.cuts, so that one stage "
                        "holds all modules of such a branch"
                    )
            self._accepted.add(id(cutting))
        return cutting


def split(
    model: nn.Module, inputs: Any, stages: int, cuts: Sequence[str] = (), *, forward: Forward = call_model
) -> Split:
    """Find where to cut the model. Nothing is computed and the model is not changed.

    All ranks come to the same cuts without talking to each other.

    Args:
        model: the user's module on its device, before any other kind of parallelism changed it.
        inputs: an example of one micro-batch, on the same device.
        stages: how many to cut it into.
        cuts: names of the modules that start stages 1, 2, ...; empty balances the stages by estimated work.
        forward: `(model, inputs)` -> output; what it computes after the model (a loss) belongs to the last stage.

    Raises:
        PlanError: the model cannot be cut so, with the reason and what to do.
    """
    if stages < 2:
        raise PlanError(f"a pipeline of {stages} stage: give at least 2, or leave the pipeline out of the plan")
    names = find_cuts(model, forward, inputs, stages, cuts)
    program = Program(model, forward, names)
    program.follow(model)
    cutting = program.cutting(inputs)
    used = cutting.holders()
    every = tuple(range(stages))
    holders = {name: tuple(sorted(used.get(name, {0}))) for name, _ in model.named_parameters()}
    # A buffer that nothing used yet costs little and may be asked for by any stage.
    holders |= {name: tuple(sorted(used[name])) if name in used else every for name, _ in model.named_buffers()}
    _refuse_sparse(model, holders)
    return Split(program, describe(cutting, model, names), holders)


def take_part(
    split: Split, model: nn.Module, rank: int, ranks: int, placement: tuple[int, ...] | None = None
) -> PipelinePart:
    """Keep this rank's part of the model: in place, everything else gives its memory back.

    Args:
        split: of this very model.
        rank: this rank's index in its pipeline.
        ranks: number of ranks in the pipeline.
        placement: the rank of every stage; round robin if left out.
    """
    placed = placement_of("1f1b", ranks, split.stages) if placement is None else placement
    holders = {
        name: tuple(sorted({placed[stage] for stage in found}, key=lambda r: (placed[min(found)] != r, r)))
        for name, found in split.holders.items()
    }
    held = {name for name, found in holders.items() if rank in found}
    names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    originals = [*model.parameters(), *model.buffers()]  # alive until all names of each are replaced
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and not is_stand_in(tensor) and names[id(tensor)] not in held:
                setattr(module, name, split.program.fakes.like(tensor))
    split.program.fakes.forget()
    del originals
    part = PipelinePart(model, split.program, split.table, rank, placed, holders)
    for name, module in list(units(model, split.program.opened)):
        part._gates[name] = install(module, name, part.session)
    return part


def _refuse_sparse(model: nn.Module, holders: dict[str, tuple[int, ...]]) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            name = names[id(module.weight)]
            if len(holders[name]) > 1:
                raise PlanError(
                    f"embedding {path!r} was built with sparse=True and its weight is used on stages "
                    f"{', '.join(map(str, holders[name]))}: gradients of a weight on several stages are summed as dense "
                    "tensors; build it with sparse=False"
                )
