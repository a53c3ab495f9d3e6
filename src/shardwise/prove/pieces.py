"""What each part of the first global batch contributes to loss and gradient, in float64 and one after the other.

A wrong gradient is often a wrong sum of the right parts: one left out, one taken twice, all scaled. And where the parts do
not add up to the whole, no plan is to blame: the job itself couples samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from shardwise.data.batch import Batch
from shardwise.prove.quiet import Quiet
from shardwise.prove.runs import Task, altered, open_job, prepare, walk_batches
from shardwise.run.assemble import Assembly
from shardwise.run.coupled import coupling, loss_sum_of, rows_of, state_kept, weight_of
from shardwise.run.names import named_tensors, own_model
from shardwise.run.step import seed_step
from shardwise.spec.rank import Rank
from shardwise.spec.shares import share_bounds

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


def write_pieces(
    rank: Rank, task: Task, replicas: int, micro_batch: int | None, shares: tuple[float, ...] | None = None
) -> None:
    """Compute the pieces in this process and leave them in the task's folder. `task` is a serial run in float64."""
    job, splits = open_job(task)
    a = prepare(task, job, splits, torch.device(task.device), [])
    batch = altered(next(walk_batches(a, splits, task.steps)).to(a.device), task)
    bounds = share_bounds(batch.count, replicas, shares)
    with Quiet(double=True):
        seed_step(job.seed, 0, 0)
        coupled = _coupling(a, batch, bounds)
        total = sum(weight_of(job, rows_of(batch, start, stop)) for start, stop in bounds if start < stop)
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
    part = rows_of(batch, start, stop)
    a.model.train()
    a.optimizer.zero_grad(set_to_none=True)
    with state_kept(a.model):
        loss_sum, _ = loss_sum_of(a.job, a.model, part)
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
    # A BatchNorm layer couples samples in training on purpose; the question here is about the loss.
    a.model.train()
    for module in a.model.modules():
        if isinstance(module, _BatchNorm) and a.job.objective is not None:
            module.eval()
    found = coupling(a.job, a.model, batch, bounds, tolerance=1e-9)
    return None if found is None else (found.whole, found.mean)
