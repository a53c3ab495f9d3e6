"""Software: what a user's own measured runs say about the software that runs on a machine, beside what its devices can do."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from shardwise.errors import UserError

WIDEST = 16.0
"""No factor is further from 1: beyond it something else was measured than was described."""


@dataclass(frozen=True, kw_only=True)
class KnownRun:
    """One measured run: what it was, and what it says about runs like it.

    Attributes:
        tokens: of one micro-batch on one rank.
        weight: how much of its deviation it hands on (the solution of the regression; see planner/software.py).
        noise: variance of its logarithm that is its own; larger where the other runs do not believe it.
    """

    hardware: str
    precision: str
    recompute: str
    zero_stage: int
    experts: int
    gpus: int
    tensor: int
    pipeline: int
    context: int
    layers: int
    hidden: int
    tokens: int
    micro_batches: int
    weight: float = 0.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            kind = (str,) if item.type in ("str", str) else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(
                    f"software: {item.name}={value!r} of a run: `shardwise plan --save-machine` writes such files"
                )
        counts = (self.gpus, self.tensor, self.pipeline, self.context, self.layers, self.hidden, self.tokens)
        if min(*counts, self.micro_batches) < 1 or not math.isfinite(self.weight) or not 0 < self.noise < math.inf:
            raise UserError(
                "software: a run needs counts of at least 1, a finite weight and a noise above 0; "
                "`shardwise plan --save-machine` writes such files"
            )


@dataclass(frozen=True, kw_only=True)
class Software:
    """How software on a machine differs from what is assumed: factors on seconds and bytes, 1 where nothing was learned.

    Attributes:
        compute: seconds of all that is not communication, over the planner's.
        network: seconds of communication, before any of it hides, over the planner's.
        memory: bytes of a rank, over the planner's.
        runs: measured steps; what the factors leave of their deviation is handed on to runs like them.
        source: where the measured runs come from.
    """

    compute: float = 1.0
    network: float = 1.0
    memory: float = 1.0
    runs: tuple[KnownRun, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("compute", "network", "memory"):
            value = getattr(self, name)
            sound = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not sound or not 1.0 / WIDEST <= value <= WIDEST:
                raise UserError(f"software: {name}={value!r}: it must be a factor between 1/{WIDEST:g} and {WIDEST:g}")

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Software":
        """Build from plain data, as machine files hold it.

        Raises:
            UserError: a part is missing, unknown or of the wrong kind.
        """
        try:
            return cls(**{**record, "runs": tuple(KnownRun(**run) for run in record.get("runs", ()))})
        except TypeError as error:
            raise UserError(
                f"software: {error}; `shardwise plan --save-machine` writes files of the right form"
            ) from error
