"""A job with planted trouble, for the tests of `watch`: the real command trains it, and what is wrong must be named.

`trouble` is one of: sleep_backward, busy_backward, sleep_samples, skip, hang, stop, die, full, starved, calm.
Rank 1 is the one in trouble, or rank 0 where it is alone; with sleep_samples rank 1 sleeps three times as long as the others
for each sample.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor, nn
from torch.utils.data import Dataset

import shardwise

CALLS_BEFORE = 8
CALLS_WITH_ROOM = 90
"""From here on the disk has room again, with the trouble `full`."""


class _SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trouble: str, seconds: float) -> Tensor:
        ctx.trouble, ctx.seconds = trouble, seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.trouble == "sleep_backward":
            time.sleep(ctx.seconds)
        if ctx.trouble == "sleep_samples":
            time.sleep(ctx.seconds * len(gradient))
        end = time.perf_counter() + ctx.seconds
        while ctx.trouble == "busy_backward" and time.perf_counter() < end:
            pass
        return gradient, None, None


class Net(nn.Module):
    def __init__(self, trouble: str, seconds: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(20, 30), nn.Linear(30, 2)
        self.trouble, self.seconds, self.calls = trouble, seconds, 0

    def forward(self, x: Tensor) -> Tensor:
        workers = c10d.get_world_size() if c10d.is_initialized() else 1
        rank = c10d.get_rank() if workers > 1 else 0
        here = rank == min(1, workers - 1)
        self.calls += self.training
        hidden = torch.relu(self.first(x))
        if self.trouble == "sleep_samples" and workers > 1:
            hidden = _SlowBackward.apply(hidden, self.trouble, self.seconds * (3 if here else 1))  # type: ignore[no-untyped-call]
        elif here:
            hidden = _SlowBackward.apply(hidden, self.trouble, self.seconds)  # type: ignore[no-untyped-call]
        if self.calls == CALLS_BEFORE:
            self.calls += 1
            if self.trouble == "skip" and not here:
                c10d.all_reduce(torch.ones(3))  # planted: rank 1 skips it
            if self.trouble == "hang" and here:
                time.sleep(self.seconds)  # planted: hangs here
            if self.trouble == "die" and here:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "full":
                resource.setrlimit(
                    resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY)
                )  # as a full disk, for this process
            if self.trouble == "stop" and here:
                os.kill(os.getpid(), signal.SIGSTOP)
        if self.trouble == "full" and self.calls == CALLS_WITH_ROOM:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        answer: Tensor = self.last(hidden)
        return answer


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Each batch takes its time to be read."""

    def __init__(self, trouble: str, seconds: float, samples: int) -> None:
        self.trouble, self.seconds, self.samples = trouble, seconds, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.trouble == "starved":
            time.sleep(self.seconds)
        x = torch.randn(20, generator=torch.Generator().manual_seed(index))
        return x, (x[0] > 0).long()


def job(trouble: str = "calm", seconds: float = 0.02, steps: int = 100, samples: int = 64) -> shardwise.Job:
    return shardwise.Job(
        model=lambda: Net(trouble, seconds),
        data={"train": shardwise.data.Samples(Rows(trouble, seconds, samples))},
        loss=nn.functional.cross_entropy,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
        steps=steps,
    )
