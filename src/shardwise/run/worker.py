"""What every rank does in a training: join the group, open a session, train, sum up."""

from __future__ import annotations

from typing import Any

import torch

from shardwise.dist.group import process_group
from shardwise.run.loop import run_loop
from shardwise.run.session import Work, open_session
from shardwise.run.signals import StopRequest
from shardwise.spec.rank import Rank


def train_rank(rank: Rank, work: Work) -> dict[str, Any]:
    """Train as one rank and return the summary, which is equal on all ranks. Collective."""
    work = work.built()
    if work.device != "cpu":
        torch.accelerator.set_device_index(rank.local_rank)
    with (
        StopRequest() as stop,
        process_group(rank, work.device, work.timeout_seconds),
        open_session(rank, work, stop) as session,
    ):
        run_loop(session.assembly, session.course)
        return session.finish(weights=not session.course.stopped and not session.course.paused)
