"""Rank: who this worker is among the workers of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Launcher = Literal["inline", "local", "torchrun"]


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One worker of a run.

    Attributes:
        rank: number of this worker over all nodes, 0 .. workers - 1.
        local_rank: number of this worker on its node, 0 .. local_workers - 1; also the number of its device.
        workers: workers over all nodes (the world size).
        local_workers: workers on this node.
        node: number of this node, 0 .. nodes - 1.
        nodes: machines in the run.
        restarts: how many times the whole group was restarted before this worker was started.
        launcher: who started it: "inline" (the calling process itself, no child), "local" (shardwise's own launcher)
            or "torchrun" (torchrun, or anything else that sets the same environment).
        endpoint: the store through which the workers find each other: HOST:PORT, or the path of a file (one node); None
            where the environment names it (torchrun) or where there is nobody to find (one worker).
    """

    rank: int
    local_rank: int
    workers: int
    local_workers: int
    node: int = 0
    nodes: int = 1
    restarts: int = 0
    launcher: Launcher = "inline"
    endpoint: str | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.workers
        assert 0 <= self.local_rank < self.local_workers <= self.workers
        assert 0 <= self.node < self.nodes
        assert self.restarts >= 0

    def __str__(self) -> str:
        text = f"rank {self.rank} of {self.workers}"
        if self.nodes > 1:
            text += f" (node {self.node} of {self.nodes})"
        return text


SERIAL = Rank(rank=0, local_rank=0, workers=1, local_workers=1)
"""The rank of a run that has one worker: the calling process."""
