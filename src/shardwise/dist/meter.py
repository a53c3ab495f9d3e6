"""What one rank sends, how long it stands still for the others, and where: noted where it happens.

Two questions are answered with it. Who holds the others up: a collective makes all ranks leave at the same time, so the
slow one shows in when it *arrives*, and in standing still less than the others. And where does a rank hang: what it began
last, of which tensor or module, and whether it is still inside. A communication costs about three microseconds of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, NamedTuple, final

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
        what: the tensor or module it was about.
    """

    kind: str
    began: float
    waited: float
    ended: float
    what: str = ""


class Call(NamedTuple):
    """A communication of this rank, for people.

    Attributes:
        kind: which collective, or `message`.
        what: the tensor or module it is about; "" where the caller did not say.
        group: axes of the mesh that its ranks lie along; "" for all ranks.
        began: when this rank started it, on `time.perf_counter`, in seconds.
    """

    kind: str
    what: str
    group: str
    began: float

    def __str__(self) -> str:
        words = self.kind.replace("_", "-") + (f" of {self.what}" if self.what else "")
        return words + (f" over {self.group}" if self.group else "")


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
        last: the one that was started last.
        inside: the one that this rank waits for; it stays where the wait ended in an error. Other threads may look.
    """

    waited_seconds: dict[str, float] = field(default_factory=lambda: {"collective": 0.0, "message": 0.0})
    payload_bytes: int = 0
    traffic_bytes: float = 0.0
    calls: int = 0
    first_arrival: float | None = None
    flights: list[Flight] | None = None
    last: Call | None = None
    inside: Call | None = None

    @property
    def blocked_seconds(self) -> float:
        """Of all kinds together."""
        return self.waited_seconds["collective"] + self.waited_seconds["message"]

    def begin_step(self, *, keep: bool) -> None:
        """A step begins.

        Args:
            keep: keep its communications one by one.
        """
        self.first_arrival = None
        self.flights = [] if keep else None

    def start(
        self,
        kind: Kind,
        payload_bytes: int,
        members: int,
        *,
        others_bytes: int | None = None,
        what: str = "",
        group: str = "",
    ) -> Call:
        """Count a communication that starts now.

        Args:
            kind: which.
            payload_bytes: of this rank's tensor; of a reduce_scatter the whole input.
            members: ranks that take part.
            others_bytes: of an all_to_all, what goes to other ranks.
            what: the tensor or module it is about, for people.
            group: axes of the mesh that the members lie along.

        Returns:
            What is to be given to `waiting`.
        """
        now = perf_counter()
        if self.first_arrival is None:
            self.first_arrival = now
        self.calls += 1
        self.payload_bytes += payload_bytes
        self.traffic_bytes += _traffic(kind, payload_bytes, members, others_bytes)
        self.last = call = Call(kind, what, group, now)
        return call

    @contextmanager
    def waiting(self, call: Call) -> Iterator[None]:
        """Around what blocks until a communication is over."""
        waited = perf_counter()
        self.inside = call
        try:
            yield
            self.inside = None
        finally:
            ended = perf_counter()
            self.waited_seconds["message" if call.kind == "message" else "collective"] += ended - waited
            if self.flights is not None:
                self.flights.append(Flight(call.kind, call.began, waited, ended, call.what))


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
