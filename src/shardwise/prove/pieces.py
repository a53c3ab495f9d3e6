"""What each part of the first global batch contributes to loss and gradient, in float64 and one after the other.

A wrong gradient is often a wrong sum of the right parts: one left out, one taken twice, all scaled. And where the parts do
not add up to the whole, no plan is to blame: the job itself couples samples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shardwise.data.batch import Batch, Tree, tree_map
from shardwise.data.order import share_bounds
from shardwise.prove.quiet import Quiet
from shardwise.prove.runs import Task, altered, open_job, prepare, walk_batches
from shardwise.run.assemble import Assembly
from shardwise.run.names import named_tensors, own_model
from shardwise.run.step import seed_step
from shardwise.run.tryout import call_model
from shardwise.spec.job import Job
from shardwise.spec.rank import Rank

MOST_PIECES = 64
"""More parts than this are taken together, a rank's share at a time."""


@final
@dataclass(frozen=True)
class Piece:
    """One micro-batch of one worker.

    Attributes:
        share: which worker along the axes that split samples.
        index: which of its micro-batches.
        start, stop: its samples within the global batch.
        loss: its contribution to the mean loss of the global batch.
        gradient: name -> its contribution to the gradient; parameters without one are left out.
    """

    share: int
    index: int
    start: int
    stop: int
    loss: float
    gradient: dict[str, Tensor]


@final
@dataclass(frozen=True)
class Pieces:
    """All parts of the first global batch.

    Attributes:
        coupled: the loss of the global batch, and the weighted mean of the losses of its shares computed from the very same
            outputs of the model, where the two differ; else None.
        has_batch_norm: parts of the batch see their own statistics, so that they do not add up to the whole.
    """

    parts: list[Piece]
    coupled: tuple[float, float] | None
    has_batch_norm: bool


def write_pieces(rank: Rank, task: Task, replicas: int, micro_batch: int | None) -> None:
    """Compute the pieces in this process and leave them in the task's folder. `task` is a serial run in float64."""
    job, splits = open_job(task)
    a = prepare(task, job, splits, torch.device(task.device), [])
    batch = altered(next(walk_batches(a, splits, task.steps)).to(a.device), task)
    bounds = share_bounds(batch.count, replicas)
    with Quiet(double=True):
        seed_step(job.seed, 0, 0)
        coupled = _coupling(a, batch, bounds)
        total = sum(_weight(job, _rows(batch, start, stop)) for start, stop in bounds if start < stop)
        parts = [_piece(a, batch, place, total) for place in _places(bounds, micro_batch)]
    torch.save(
        {
            "parts": [vars(part) for part in parts],
            "coupled": coupled,
            "has_batch_norm": any(isinstance(module, _BatchNorm) for module in a.model.modules()),
        },
        Path(task.folder) / "pieces.pt",
    )


def read_pieces(folder: Path) -> Pieces:
    """What `write_pieces` left in a folder."""
    content = torch.load(folder / "pieces.pt", weights_only=True)
    return Pieces([Piece(**part) for part in content["parts"]], content["coupled"], content["has_batch_norm"])


def _places(bounds: list[tuple[int, int]], micro_batch: int | None) -> list[tuple[int, int, int, int]]:
    """(share, index, start, stop) of every part that has samples."""
    places = []
    for share, (start, stop) in enumerate(bounds):
        step = micro_batch or max(1, stop - start)
        places += [(share, index, at, min(stop, at + step)) for index, at in enumerate(range(start, stop, step))]
    if len(places) > MOST_PIECES and micro_batch is not None:
        return _places(bounds, None)
    return places


def _piece(a: Assembly, batch: Batch, place: tuple[int, int, int, int], total: float) -> Piece:
    share, index, start, stop = place
    part = _rows(batch, start, stop)
    a.model.train()
    a.optimizer.zero_grad(set_to_none=True)
    with _state_kept(a.model):
        loss_sum, _ = _loss_sum(a.job, a.model, part)
        loss = loss_sum / total
        loss.backward()
    tensors, _, buffers = named_tensors(own_model(a.model))
    gradient = {
        name: (tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad).detach().cpu().clone()
        for name, tensor in tensors.items()
        if name not in buffers and tensor.grad is not None
    }
    return Piece(share, index, start, stop, float(loss.detach()), gradient)


def _coupling(a: Assembly, batch: Batch, bounds: list[tuple[int, int]]) -> tuple[float, float] | None:
    """Loss of the whole and weighted mean over the shares; None where they agree."""
    job = a.job
    with torch.no_grad(), _state_kept(a.model):
        if job.objective is None:
            a.model.train()
            output = call_model(a.model, batch.inputs)
            assert job.loss is not None
            whole, weight = float(job.loss(output, batch.targets)), _weight(job, batch)
            loss_sum = 0.0
            for start, stop in bounds:
                part = _rows(batch, start, stop)
                own = _weight(job, part) if start < stop else 0.0
                if own:
                    loss_sum += float(job.loss(_tree_rows(output, start, stop, batch.count), part.targets)) * own
        else:
            # A BatchNorm layer couples samples in training on purpose; the question here is about the loss.
            for module in a.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
            value, weight = _loss_sum(job, a.model, batch)
            whole = float(value) / weight
            loss_sum = weight = 0.0
            for start, stop in bounds:
                if start < stop:
                    value, own = _loss_sum(job, a.model, _rows(batch, start, stop))
                    loss_sum, weight = loss_sum + float(value), weight + own
    mean = loss_sum / weight if weight else float("nan")
    return None if abs(mean - whole) <= 1e-9 * max(abs(whole), abs(mean)) else (whole, mean)


def _loss_sum(job: Job, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    """Sum of the losses of a part, and what it is a mean over."""
    if job.objective is None:
        assert job.loss is not None
        weight = _weight(job, batch)
        if not weight:
            return torch.stack([parameter.sum() * 0 for parameter in model.parameters()]).sum(), 0.0
        return job.loss(call_model(model, batch.inputs), batch.targets) * weight, weight
    value: Any = job.objective(model, (batch.inputs, batch.targets))
    if isinstance(value, tuple):
        return value[0], float(value[1])
    return value * batch.count, float(batch.count)


def _weight(job: Job, batch: Batch) -> float:
    return float(batch.count) if job.weight is None else float(job.weight(batch.targets))


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    targets = None if batch.targets is None else _tree_rows(batch.targets, start, stop, batch.count)
    inputs = _tree_rows(batch.inputs, start, stop, batch.count)
    return replace(batch, inputs=inputs, targets=targets, count=stop - start, indices=None)


def _tree_rows(tree: Any, start: int, stop: int, count: int) -> Tree:
    """The rows of some samples of every tensor that has as many rows for each sample: (N, ...), or (N * tokens, ...)."""

    def rows(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] % count:
            return leaf
        each = leaf.shape[0] // count
        return leaf[start * each : stop * each]

    result: Tree = tree_map(rows, tree)
    return result


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Buffers are after the block what they were before it."""
    before = {name: copy.deepcopy(buffer) for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
