"""What `shardwise probe` measured on a machine: rates of computation, times of messages, and where all that was."""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from shardwise.errors import UserError

Way = Literal["shared memory", "gloo", "device"]
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "exchange")
EXCHANGE_BYTES = 32 * 1024
"""Largest messages of `exchange`; what larger ones take beyond that is in the time on the way, as `send` has it."""

PLACEMENTS = ("all", "consecutive", "strided")

METHOD = 5
"""How figures are taken now; those taken otherwise are not comparable. 1: messages in a row. 2: messages between products, as
in a step, and operations with the compiled kernels that a training uses. 3: thin products, too. 4: memory
that is freed is kept, as in a training. 5: BatchNorm over several ranks, too."""

DIVIDED_NORMS = {
    "native_batch_norm": "divided_batch_norm",
    "native_batch_norm_backward": "divided_batch_norm_backward",
}
"""Operation of one rank -> kind of what takes its place where statistics are taken over several ranks, without the messages; its
size is that of the operation."""

THIN_ROWS = 8
"""Rows of the products of kind `thin`: of that many by n with n by n."""


@dataclass(frozen=True, kw_only=True)
class KernelRate:
    """Rate of one kind of operation at one size, of each process while all of them work at once.

    Attributes:
        kind: `matmul` (square), `thin` (products of `THIN_ROWS` rows, by their bytes), `convolution`, `copy`, or the name of an
            operation of torch.
        precision: of its operands.
        size: FLOPs of one call for products and convolutions, bytes read and written for anything else.
        workers: processes that did the same at the same time.
        threads: compute threads of each.
        per_second: FLOP/s or bytes/s of one process.
    """

    kind: str
    precision: str
    size: float
    workers: int
    threads: int
    per_second: float


@dataclass(frozen=True, kw_only=True)
class MessageTime:
    """What one collective adds to a step: seconds of a loop that computes and sends, less those of one that only computes.

    Attributes:
        collective: one of `COLLECTIVES`. `exchange` is the processor time that one message out and one in cost a rank that
            computes meanwhile: the host's calls, copies, and the threads of the library.
        way: through shared memory of one machine, gloo's sockets, or the device's own library.
        ranks: members of the group.
        placement: `all` is one group of all processes; `consecutive` and `strided` are several groups at the same time,
            of neighbours or of every n-th rank.
        message_bytes: what one rank puts in (the whole result for all_gather).
        nodes: machines that the group is spread over, evenly.
    """

    collective: str
    way: Way
    ranks: int
    placement: str
    message_bytes: float
    seconds: float
    nodes: int = 1

    def __post_init__(self) -> None:
        if self.collective not in COLLECTIVES or self.placement not in PLACEMENTS:
            raise UserError(
                f"measured {self.collective!r} with placement {self.placement!r}: collectives are {', '.join(COLLECTIVES)}, "
                f"placements {', '.join(PLACEMENTS)}"
            )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All figures of one probe; each was measured on `date`.

    Attributes:
        date: day of the measurement, ISO 8601.
        place: what identifies machine and software; figures hold only where these are the same.
        cores: cores this process may use.
        memory_bytes: memory of the machine, or of the container's limit.
        load: processes of others that wanted a core when the probe began.
        others_cores: cores that others kept busy during the part of the probe that they disturbed most; other virtual machines
            count too, where the system tells of them.
        kernels, messages: see there.
        call_seconds: shortest forward call of an operation from Python.
        graph_seconds: what one operation costs more when its gradient is computed: graph, engine, accumulation.
        overlap_slowdown: how much longer a matrix product takes while a message is under way.
        startup_seconds: from starting two workers to their first finished collective.
        worker_bytes: resident memory of one worker that has done nothing yet.
        method: how all this was measured; see `METHOD`.
        nodes: machines that messages were measured over, all of them like this one.
    """

    date: str
    place: Mapping[str, str]
    cores: int
    memory_bytes: float
    call_seconds: float
    graph_seconds: float
    overlap_slowdown: float
    startup_seconds: float
    worker_bytes: float
    load: float = 0.0
    others_cores: float = 0.0
    method: int = 1
    nodes: int = 1
    kernels: tuple[KernelRate, ...] = field(default=())
    messages: tuple[MessageTime, ...] = field(default=())

    def rate(self, kind: str, size: float, *, workers: int, threads: int, precision: str = "fp32") -> float | None:
        """FLOP/s or bytes/s of one of `workers` processes; between sizes on a straight line in logarithms.

        Between measured numbers of processes too, and level beyond them; None where the kind was not measured. Fewer processes
        are never slower: neighbours do not help, and what disturbs a measurement only slows it down.
        """
        table = self._kernels.get((kind, precision))
        if not table:
            return None
        alike = sorted(count for count, each in table if each == threads)
        if not alike:
            nearest = min(table, key=lambda one: (abs(one[1] - threads), abs(one[0] - workers)))
            return _between(table[nearest], size)
        above = next((count for count in alike if count >= workers), alike[-1])
        below = max((count for count in alike if count <= above and count <= workers), default=above)
        low, high = (
            max(_between(table[more, threads], size) for more in alike if more >= count) for count in (below, above)
        )
        share = (min(workers, above) - below) / (above - below) if above > below else 0.0
        return low + share * (high - low)

    def thin_seconds(self, flops: float, moved_bytes: float, *, workers: int, threads: int) -> float:
        """What a product takes longer than a square one of as many FLOPs, because it moves more bytes for them.

        A few rows against a large matrix cost what reading (and packing) that matrix costs, however few they are. 0 where thin
        products were not measured.
        """
        more = moved_bytes - 12.0 * (flops / 2.0) ** (2.0 / 3.0)  # a square product of 2 n^3 FLOPs moves 12 n^2 bytes
        thin = self.rate("thin", moved_bytes, workers=workers, threads=threads) if more > 0.0 else None
        work = THIN_ROWS / 2.0  # FLOPs for a byte of a thin product
        square = self.rate("matmul", work * moved_bytes, workers=workers, threads=threads) if thin else None
        return more * max(0.0, 1.0 / thin - work / square) if thin and square else 0.0

    def message_seconds(
        self,
        collective: str,
        size_bytes: float,
        *,
        ranks: int,
        way: Way | None = None,
        placement: str = "all",
        nodes: int = 1,
    ) -> float | None:
        """What one collective adds to a step, in seconds; None where it was not measured over so many nodes.

        Between sizes on a straight line. Of a number of ranks that was not measured, the next larger one answers, for want
        of that the largest.
        """
        tables = [
            (key[2] < ranks, abs(key[2] - ranks), key[3] != placement, points[-1][1], key)
            for key, points in self._messages.items()
            if key[0] == collective and (way is None or key[1] == way) and key[4] == nodes
        ]
        if not tables:
            return None
        points = self._messages[min(tables)[-1]]
        sizes = [size for size, _ in points]
        right = min(max(bisect.bisect_left(sizes, size_bytes), 1), len(points) - 1)
        if len(points) == 1 or size_bytes <= sizes[0]:
            return points[0][1]
        (low, low_seconds), (high, high_seconds) = points[right - 1], points[right]
        slope = max(0.0, (high_seconds - low_seconds) / (high - low))
        return low_seconds + slope * (size_bytes - low)

    def differs_from(self, place: Mapping[str, str]) -> list[str]:
        """What is not as it was where this was measured, one sentence each; empty where the figures hold."""
        names = sorted({*self.place, *place})
        return [
            f"{name} was {self.place.get(name, 'unknown')} and is {place.get(name, 'unknown')}"
            for name in names
            if self.place.get(name) != place.get(name)
        ]

    @cached_property
    def _kernels(self) -> dict[tuple[str, str], dict[tuple[int, int], list[tuple[float, float]]]]:
        found: dict[tuple[str, str], dict[tuple[int, int], list[tuple[float, float]]]] = {}
        for item in sorted(self.kernels, key=lambda one: one.size):
            table = found.setdefault((item.kind, item.precision), {})
            table.setdefault((item.workers, item.threads), []).append((item.size, item.per_second))
        return found

    @cached_property
    def _messages(self) -> dict[tuple[str, str, int, str, int], list[tuple[float, float]]]:
        found: dict[tuple[str, str, int, str, int], list[tuple[float, float]]] = {}
        for item in sorted(self.messages, key=lambda one: one.message_bytes):
            key = (item.collective, item.way, item.ranks, item.placement, item.nodes)
            found.setdefault(key, []).append((item.message_bytes, item.seconds))
        return found

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Measured":
        """Build from plain data.

        Raises:
            TypeError: a part is missing or unknown.
        """
        values = dict(record)
        values["kernels"] = tuple(KernelRate(**item) for item in values.get("kernels", ()))
        values["messages"] = tuple(MessageTime(**item) for item in values.get("messages", ()))
        unknown = set(values) - {item.name for item in fields(cls)}
        if unknown:
            raise TypeError(f"measured: {sorted(unknown)[0]!r} is unknown")
        return cls(**values)


def _between(points: list[tuple[float, float]], size: float) -> float:
    """The value at `size`, on a straight line in logarithms between its neighbours, level outside of them."""
    sizes = [point[0] for point in points]
    if size <= sizes[0]:
        return points[0][1]
    if size >= sizes[-1]:
        return points[-1][1]
    right = bisect.bisect_left(sizes, size)
    (low, low_rate), (high, high_rate) = points[right - 1], points[right]
    part = (math.log(size) - math.log(low)) / (math.log(high) - math.log(low))
    return float(low_rate * (high_rate / low_rate) ** part)
