"""The contenders of `overhead.py`: one training step by hand, by Accelerate, by Lightning Fabric and by shardwise."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from models import Case
from shardwise.data.batch import Batch

TURN_SECONDS = 0.15
"""Of one contender's turn; the others wait meanwhile."""

EPOCH_BYTES = 64 * 2**20
Step = Callable[[], None]


def _samples(case: Case) -> int:
    """Of an epoch: as many steps as people have, where memory allows it."""
    row = sum(part.numel() * part.element_size() for part in case.data(1))
    return case.batch * max(8, min(128, EPOCH_BYTES // (row * case.batch)))


def _batches(case: Case, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What an expert writes: shuffle once per epoch, gather this rank's part of each batch from memory."""
    inputs, targets = case.data(_samples(case))
    share = case.batch // ranks
    while True:
        order = torch.randperm(len(inputs))
        for start in range(rank * share, len(inputs), case.batch):
            rows = order[start : start + share]
            yield inputs[rows], targets[rows]


@dataclass
class _Loop:
    """A training loop as it is written by hand.

    Attributes:
        alone: around backward passes whose gradients are not to be sent yet.
        precision: around forward passes.
    """

    case: Case
    stream: Iterator[tuple[Tensor, Tensor]]
    model: Any
    optimizer: Any
    backward: Callable[[Tensor], Any] = Tensor.backward
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    clip: Callable[[float], Any] | None = None

    def step(self) -> None:
        inputs, targets = next(self.stream)
        self.optimizer.zero_grad()
        size = self.case.settings.get("micro_batch", len(inputs))
        pieces = list(zip(inputs.split(size), targets.split(size), strict=True))
        for piece in pieces[:-1]:
            with self.alone():
                self._pass(piece, len(pieces))
        self._pass(pieces[-1], len(pieces))
        bound = self.case.settings.get("clip_norm")
        if bound is not None and self.clip is not None:
            self.clip(bound)
        self.optimizer.step()

    def _pass(self, piece: tuple[Tensor, Tensor], pieces: int) -> None:
        with self.precision():
            loss = self.case.loss(self.model(piece[0]), piece[1])
        self.backward(loss / pieces if pieces > 1 else loss)


def _plain_model(case: Case) -> Any:
    torch.manual_seed(0)
    model = case.model()
    if case.settings.get("compile"):
        model.compile()
    return model


def _ddp(case: Case, rank: int, ranks: int) -> Step:
    model = inner = _plain_model(case)
    once = "micro_batch" not in case.settings and not case.settings.get("compile")
    if ranks > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view="sparse" not in case.name, static_graph=once)
    loop = _Loop(case, _batches(case, rank, ranks), model, case.optimizer(inner.parameters()))
    if ranks > 1:
        loop.alone = model.no_sync
    if case.settings.get("precision") == "bf16":
        loop.precision = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    loop.clip = lambda bound: clip_grad_norm_(inner.parameters(), bound)
    return loop.step


def _accelerate(case: Case, rank: int, ranks: int) -> Step:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision=case.settings.get("precision"))
    model = _plain_model(case)
    model, optimizer = accelerator.prepare(model, case.optimizer(model.parameters()))
    loop = _Loop(case, _batches(case, rank, ranks), model, optimizer, backward=accelerator.backward)
    loop.alone = lambda: accelerator.no_sync(model)
    loop.clip = lambda bound: accelerator.clip_grad_norm_(model.parameters(), bound)
    return loop.step


def _fabric(case: Case, rank: int, ranks: int) -> Step:
    from lightning_fabric import Fabric

    precision: Any = "bf16-mixed" if case.settings.get("precision") == "bf16" else None
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", precision=precision)
    if ranks > 1:
        fabric.launch()
    model = _plain_model(case)
    model, optimizer = fabric.setup(model, case.optimizer(model.parameters()))
    loop = _Loop(case, _batches(case, rank, ranks), model, optimizer, backward=fabric.backward)
    if ranks > 1:
        loop.alone = lambda: fabric.no_backward_sync(model)
    loop.clip = lambda bound: fabric.clip_gradients(model, optimizer, max_norm=bound)
    return loop.step


def _shardwise(case: Case, rank: int, ranks: int) -> Step:
    """Everything that `shardwise train` does in a step; the time between turns is no step's."""
    from shardwise.run.alike import next_batch
    from shardwise.run.loop import open_epoch
    from shardwise.run.start import start
    from shardwise.run.step import take_step

    run = start(case.job(_samples(case)), out=os.environ["OVERHEAD_OUT"], checkpoint_every="never")
    a, keeper = run.assembly, run._keeper
    assert keeper is not None

    def batches() -> Iterator[Batch]:
        for epoch in itertools.count():
            stream = open_epoch(a, run.splits, epoch=epoch, start=0)
            a.clock.begin_step(a.step)
            while (batch := next_batch(stream, a.samples, a.device)) is not None:
                a.clock.mark("data")
                yield batch
                a.clock.begin_step(a.step)
            keeper.end_epoch()

    ended, stream = 0.0, batches()

    def step() -> None:
        nonlocal ended
        if time.perf_counter() - ended > TURN_SECONDS / 2:
            keeper._ledger.skip_time()
            a.clock.restart()
        batch = next(stream)
        keeper.stepped(batch, take_step(a, batch))
        ended = time.perf_counter()

    return step


MAKERS: dict[str, Callable[[Case, int, int], Step]] = {
    "shardwise": _shardwise,
    "ddp": _ddp,
    "accelerate": _accelerate,
    "fabric": _fabric,
}
