"""What one rank sends, and how long it stands still for the others: counted where it happens.

A run that is measured gives its groups a meter; any other run has none and pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, final

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "message", "barrier"]

TRAFFIC = "bytes a rank sends by the bandwidth-optimal algorithm (NCCL tests, PERFORMANCE.md), from counted payloads"


@final
@dataclass(frozen=True)
class Flight:
    """One communication of this rank.

    Attributes:
        kind: which collective, or `message` for one rank to another.
        began: when this rank started it, on `time.perf_counter`, in seconds.
        waited: when this rank began to wait for its end.
        ended: when it was over for this rank.
    """

    kind: str
    began: float
    waited: float
    ended: float


@final
@dataclass
class Meter:
    """Sums since the run began. Seconds are of wall time, in which this rank did nothing else.

    Attributes:
        waited_seconds: in collectives, and for messages of single ranks (between pipeline stages).
        payload_bytes: size of the tensors that were handed over to be sent, summed or gathered.
        traffic_bytes: what this rank sends for them, see `TRAFFIC`.
        calls: communications that were started.
        first_arrival: when the first one since `begin_step` was started; None before it.
        flights: the communications one by one, where they are kept; None where they are not.
    """

    waited_seconds: dict[str, float] = field(default_factory=lambda: {"collective": 0.0, "message": 0.0})
    payload_bytes: int = 0
    traffic_bytes: float = 0.0
    calls: int = 0
    first_arrival: float | None = None
    flights: list[Flight] | None = None

    def begin_step(self, *, keep: bool) -> None:
        """A step begins.

        Args:
            keep: keep its communications one by one.
        """
        self.first_arrival = None
        self.flights = [] if keep else None

    def start(self, kind: Kind, payload_bytes: int, members: int, *, others_bytes: int | None = None) -> float:
        """Count a communication that starts now.

        Args:
            kind: which.
            payload_bytes: of this rank's tensor; of a reduce_scatter the whole input.
            members: ranks that take part.
            others_bytes: of an all_to_all, what goes to other ranks.

        Returns:
            The time, to be given to `waiting`.
        """
        now = perf_counter()
        if self.first_arrival is None:
            self.first_arrival = now
        self.calls += 1
        self.payload_bytes += payload_bytes
        self.traffic_bytes += _traffic(kind, payload_bytes, members, others_bytes)
        return now

    @contextmanager
    def waiting(self, kind: Kind, began: float) -> Iterator[None]:
        """Around what blocks until a communication is over."""
        waited = perf_counter()
        try:
            yield
        finally:
            ended = perf_counter()
            self.waited_seconds["message" if kind == "message" else "collective"] += ended - waited
            if self.flights is not None:
                self.flights.append(Flight(kind, began, waited, ended))


def _traffic(kind: Kind, payload_bytes: int, members: int, others_bytes: int | None) -> float:
    others = (members - 1) / members
    if kind == "all_reduce":
        return 2 * others * payload_bytes
    if kind == "all_gather":
        return (members - 1) * payload_bytes
    if kind == "reduce_scatter":
        return others * payload_bytes
    if kind == "all_to_all":
        return payload_bytes * others if others_bytes is None else others_bytes
    return 0 if kind == "barrier" else payload_bytes
