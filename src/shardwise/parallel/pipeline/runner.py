"""Running the table of a schedule: one rank's part of a step, action by action."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from torch import Tensor

from shardwise.dist.collectives import Group
from shardwise.dist.p2p import Transfer, start_receive, start_send
from shardwise.errors import RunFailed
from shardwise.parallel.pipeline.message import Form, pack, unpack
from shardwise.parallel.pipeline.part import PipelinePart
from shardwise.parallel.pipeline.program import Cutting
from shardwise.parallel.pipeline.replay import StageResult, run_stage
from shardwise.spec.schedule import Action, ScheduleTable, forward_table, halved_passes, schedule_table

if TYPE_CHECKING:
    from shardwise.parallel.pipeline.halves import Halves

Objective: TypeAlias = Callable[[Any, int], Tensor]
"""`(output, micro-batch)` -> the scalar to back-propagate: that micro-batch's share of the global mean."""

_BEFORE = {"RECV_F": -1, "RECV_B": 1}
_WHAT = {"F": "activations", "B": "gradients"}


def _nothing(*_: Any) -> None:
    pass


@final
@dataclass
class _Pass:
    """One walk through a table; `ahead` holds the receives that were not begun yet, by the rank they are from."""

    halved: frozenset[tuple[int, int]]
    micro_batches: Sequence[Any]
    cuttings: list[Cutting]
    on_output: Callable[[Any, int], Tensor | None]
    on_last_backward: Callable[[], None]
    on_micro_batch: Callable[[int], None]
    received: dict[tuple[str, int, int], Transfer] = field(default_factory=dict)
    sent: dict[tuple[str, int, int], Transfer] = field(default_factory=dict)
    here: dict[tuple[str, int, int], dict[int, Tensor | None]] = field(default_factory=dict)
    results: dict[tuple[int, int], StageResult] = field(default_factory=dict)
    objectives: dict[int, Tensor | None] = field(default_factory=dict)
    weights: dict[tuple[int, int], Callable[[], None]] = field(default_factory=dict)
    backward_left: int = 0
    ahead: dict[int, deque[Action]] = field(default_factory=dict)


@final
class PipelineRunner:
    """Takes this rank's part in the steps of one pipeline."""

    def __init__(
        self,
        part: PipelinePart,
        group: Group,
        *,
        schedule: str,
        device: torch.device,
        timeout_seconds: float | None = None,
    ) -> None:
        """Prepare the runner.

        Args:
            part: what this rank keeps of the model.
            group: the ranks of this pipeline, in the order of their stages.
            schedule: one of `shardwise.spec.plan.SCHEDULES`.
            device: where activations live.
            timeout_seconds: how long to wait for a neighbour; None as long as the process group allows.
        """
        self._part = part
        self._group = group
        self._schedule = schedule
        self._device = device
        self._timeout = timeout_seconds
        self._tables: dict[tuple[str, int], ScheduleTable] = {}
        self._halves: Halves | None = None

    @property
    def has_output(self) -> bool:
        """Whether this rank runs the last stage."""
        return self._stages - 1 in self._part.stages

    @property
    def _stages(self) -> int:
        return len(self._part.table.stages)

    def table(self, micro_batches: int, *, forward_only: bool = False) -> ScheduleTable:
        """The table of a step with that many micro-batches."""
        name = "forward" if forward_only else self._schedule
        key = (name, micro_batches)
        if key not in self._tables:
            ranks = self._group.size
            self._tables[key] = (
                forward_table(self._part.placement, ranks, micro_batches)
                if forward_only
                else schedule_table(name, ranks, self._stages, micro_batches)
            )
            assert self._tables[key].placement == self._part.placement
        return self._tables[key]

    def step(
        self,
        micro_batches: Sequence[Any],
        objective: Objective,
        *,
        on_last_backward: Callable[[], None] = _nothing,
        on_micro_batch: Callable[[int], None] = _nothing,
    ) -> None:
        """All forward and backward passes of one global step; gradients are added to what `parameter.grad` holds.

        Collective over the group: all ranks give the same micro-batches.

        Args:
            micro_batches: inputs of the model, of any sizes, on the device.
            objective: called on the rank of the last stage, once for every micro-batch, in order.
            on_last_backward: called before this rank's last backward pass; its gradients are complete after it.
            on_micro_batch: called with the index of the micro-batch before every forward and backward pass of a stage.

        Raises:
            PlanError: a micro-batch cannot go through the stages.
            RunFailed: a neighbour did not answer, or the forward pass took another way than when it was traced.
        """
        table = self.table(len(micro_batches))
        self._walk(table, micro_batches, objective, on_last_backward, on_micro_batch)

    @torch.no_grad()
    def evaluate(
        self,
        micro_batches: Sequence[Any],
        on_output: Callable[[Any, int], None],
        *,
        on_micro_batch: Callable[[int], None] = _nothing,
    ) -> None:
        """Forward passes only. Collective over the group.

        Args:
            micro_batches: as for `step`.
            on_output: called with the output of every micro-batch, in order, on the rank of the last stage.
            on_micro_batch: as for `step`.
        """
        table = self.table(len(micro_batches), forward_only=True)
        self._walk(table, micro_batches, on_output, _nothing, on_micro_batch)

    def _walk(
        self,
        table: ScheduleTable,
        micro_batches: Sequence[Any],
        on_output: Callable[[Any, int], Tensor | None],
        on_last_backward: Callable[[], None],
        on_micro_batch: Callable[[int], None],
    ) -> None:
        row = table.rows[self._part.rank]
        cuttings = [self._part.cutting(inputs) for inputs in micro_batches]
        walk = _Pass(halved_passes(row), micro_batches, cuttings, on_output, on_last_backward, on_micro_batch)
        if self._device.type == "cpu":  # gloo sends nothing before it is asked for it; NCCL needs the table's order
            for action in row:
                if action.kind in _BEFORE:
                    walk.ahead.setdefault(self._source(action), deque()).append(action)
            for source in walk.ahead:
                self._ask(walk, source)
        walk.backward_left = sum(action.kind in ("B", "W") for action in row)
        if not walk.backward_left:
            on_last_backward()
        for action in row:
            if action.kind == "F":
                self._forward(walk, action)
            elif action.kind == "B":
                self._backward(walk, action)
            elif action.kind == "W":
                self._count_backward(walk)
                walk.weights.pop((action.stage, action.micro_batch), lambda: None)()
            elif action.kind in _BEFORE:
                self._receive(walk, action)
            else:
                self._send(walk, action)
        for key, transfer in walk.sent.items():
            self._wait(transfer, key)

    def _forward(self, walk: _Pass, action: Action) -> None:
        stage, index = action.stage, action.micro_batch
        walk.on_micro_batch(index)
        cutting = walk.cuttings[index]
        arrived = {number: value for number, value in self._take(walk, "F", stage, index).items() if value is not None}
        part = self._part
        inputs = walk.micro_batches[index]
        result = part.around(
            run_stage, part.program.forward, part.model, part.session, cutting, stage, inputs, arrived, part.plain
        )
        if stage == cutting.stages - 1:
            walk.objectives[index] = walk.on_output(result.output, index)
            result.output = None
        else:
            self._hand_on(walk, "F", stage + 1, index, dict(result.carried))
        if torch.is_grad_enabled():
            walk.results[(stage, index)] = result

    def _backward(self, walk: _Pass, action: Action) -> None:
        stage, index = action.stage, action.micro_batch
        walk.on_micro_batch(index)
        result = walk.results.pop((stage, index))
        self._count_backward(walk)
        if stage == walk.cuttings[index].stages - 1:
            objective = walk.objectives.pop(index)
            if objective is not None and objective.requires_grad:
                self._propagate(walk, action, result, [objective], None)
        else:
            # The gradients are the answer to these activations: the message has arrived, its memory can go.
            sent = walk.sent.pop(("F", stage + 1, index), None)
            if sent is not None:
                self._wait(sent, ("F", stage + 1, index))
            gradients = self._take(walk, "B", stage, index)
            pairs = [
                (result.carried[number], gradient) for number, gradient in gradients.items() if gradient is not None
            ]
            pairs = [(value, gradient) for value, gradient in pairs if value.requires_grad]
            if pairs:
                values, gradients_of = [value for value, _ in pairs], [gradient for _, gradient in pairs]
                self._propagate(walk, action, result, values, gradients_of)
        if stage:
            returned = {number: leaf.grad for number, leaf in result.leaves.items() if leaf.requires_grad}
            self._hand_on(walk, "B", stage - 1, index, returned)

    def _count_backward(self, walk: _Pass) -> None:
        if walk.backward_left == 1:
            walk.on_last_backward()
        walk.backward_left -= 1

    def _propagate(
        self, walk: _Pass, action: Action, result: StageResult, outputs: list[Tensor], gradients: list[Tensor] | None
    ) -> None:
        """The backward pass of a stage, or its first half where the schedule has a W for it."""
        key = (action.stage, action.micro_batch)
        leaves = [leaf for leaf in result.leaves.values() if leaf.requires_grad]
        if key not in walk.halved:
            torch.autograd.backward(outputs, gradients)
            return
        if not leaves:  # nobody waits for the first stage: all of it comes later
            walk.weights[key] = functools.partial(torch.autograd.backward, outputs, gradients)
            return
        if self._halves is None:
            from shardwise.parallel.pipeline.halves import Halves

            self._halves = Halves([parameter for _, parameter in self._part.named_parameters()])
        later = self._halves.inputs(action.stage, outputs, gradients, leaves)
        if later is not None:
            walk.weights[key] = later

    # Messages

    def _form(self, walk: _Pass, kind: str, stage: int, index: int) -> Form:
        """Form of what stage `stage` gets: activations from the stage before (F) or gradients from the one after (B)."""
        cutting = walk.cuttings[index]
        return cutting.activations[stage] if kind == "F" else cutting.gradients[stage]

    def _hand_on(self, walk: _Pass, kind: str, target: int, index: int, tensors: dict[int, Tensor | None]) -> None:
        """Keep what the target stage gets until it is sent or, if that stage is here, taken."""
        if self._part.placement[target] != self._part.rank:
            form = self._form(walk, kind, target, index)
            tensors = {0: pack(form, tensors, self._device)} if form.numbers else {}
        else:
            tensors = {number: tensor.detach() if tensor is not None else None for number, tensor in tensors.items()}
        walk.here[(kind, target, index)] = tensors

    def _take(self, walk: _Pass, kind: str, stage: int, index: int) -> dict[int, Tensor | None]:
        """What a stage gets, by the numbers of the values."""
        key = (kind, stage, index)
        first = stage == 0 if kind == "F" else stage == self._stages - 1
        if first:
            return {}
        if key in walk.here:
            return walk.here.pop(key)
        if key not in walk.received:
            return {}
        message = self._wait(walk.received.pop(key), key)
        self._ask(walk, self._part.placement[stage - 1 if kind == "F" else stage + 1])
        return unpack(self._form(walk, *key), message)

    def _send(self, walk: _Pass, action: Action) -> None:
        kind, target = ("F", action.stage + 1) if action.kind == "SEND_F" else ("B", action.stage - 1)
        key = (kind, target, action.micro_batch)
        message = walk.here.pop(key).get(0)
        if message is not None:
            walk.sent[key] = start_send(message, self._group, self._part.placement[target])
        # Gradients sent as many micro-batches ago as there are stages have long been received: give their memory back.
        old = ("B", target, action.micro_batch - self._stages)
        if kind == "B" and old in walk.sent:
            self._wait(walk.sent.pop(old), old)

    def _source(self, action: Action) -> int:
        """The rank that a receive gets its message from."""
        return self._part.placement[action.stage + _BEFORE[action.kind]]

    def _ask(self, walk: _Pass, source: int) -> None:
        """Begin to receive the next message from a rank ahead of its time, so that it travels while this rank computes."""
        waiting = walk.ahead.get(source)
        if waiting:
            self._start_receive(walk, waiting.popleft())

    def _receive(self, walk: _Pass, action: Action) -> None:
        """Begin to receive, unless that was done ahead; messages from one rank keep their order."""
        waiting = walk.ahead.get(self._source(action))
        if waiting is None:
            self._start_receive(walk, action)
        while waiting and action in waiting:
            self._start_receive(walk, waiting.popleft())

    def _start_receive(self, walk: _Pass, action: Action) -> None:
        key = ("F" if action.kind == "RECV_F" else "B", action.stage, action.micro_batch)
        form = self._form(walk, *key)
        if form.numbers:
            walk.received[key] = start_receive(form.empty(self._device), self._group, self._source(action))

    def _wait(self, transfer: Transfer, key: tuple[str, int, int]) -> Tensor:
        try:
            return transfer.wait(self._timeout)
        except RuntimeError as error:
            kind, stage, index = key
            source = stage - 1 if kind == "F" else stage + 1
            raise RunFailed(
                f"pipeline rank {self._part.rank}: the {_WHAT[kind]} of micro-batch {index} did not get from stage {source} "
                f"(rank {self._part.placement[source]}) to stage {stage} (rank {self._part.placement[stage]}): "
                f"{error}. Usually the other rank has failed or is still busy; its own message says more"
            ) from error
