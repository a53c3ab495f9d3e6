"""Distances between runs, and how much of them is rounding. `docs/proof.md` explains the yardstick and how it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import final

import torch
from torch import Tensor

from shardwise.prove.record import Record
from shardwise.spec.verdict import Comparison

MULTIPLE = 8.0
"""How often the distance of serial float32 from float64 a candidate may be away."""

FLOOR = float(torch.finfo(torch.float32).eps)
"""Below this part of its own size a serial distance says nothing; it then counts as this much."""

DOUBLE_FLOOR = 1e-9
"""The same of float64: far more than it rounds where float32 has any digit left, and far less than any mistake makes."""

COARSE = 1e-4
"""Where float32 rounding allows a tensor to be off by more than this part of its size, a mistake may hide behind it."""

NO_DIGIT = 0.1
"""A gradient whose serial float32 value is off by this part of its size has no digit that means anything."""

_KINDS = (
    ("gradient/", "gradient"),
    ("applied/", "applied gradient"),
    ("last/", "last gradient"),
    ("final/optimizer/", "optimizer state"),
)

_TENSOR_PREFIXES = ("initial/model/", "final/model/", "gradient/", "applied/", "last/")


@final
@dataclass(frozen=True)
class Yardstick:
    """The float64 reference and the serial runs that say how far rounding carries.

    Attributes:
        serial: in float32; in float64 with `double`, where the candidate is run in float64 as well.
        drawn: random functions whose numbers change the result.
        in_pieces: a run in micro-batches is among the serial ones.
        finer: the same in float64, where that was measured already.
    """

    exact: Record
    serial: Sequence[Record]
    double: bool = False
    drawn: frozenset[str] = frozenset()
    in_pieces: bool = False
    finer: Yardstick | None = None

    @property
    def floor(self) -> float:
        """The part of its own size below which a serial distance says nothing."""
        return DOUBLE_FLOOR if self.double else FLOOR

    @property
    def noise_only(self) -> set[str]:
        """Parameters whose gradient is rounding and nothing else, such as a bias in front of a BatchNorm."""
        return self.noise_of("gradient/")

    def noise_of(self, moment: str) -> set[str]:
        """The same of the gradients under a prefix."""
        found = set()
        for name, values in self.exact.starting_with(moment):
            exact = values[0]
            size = norm(exact)
            if any(_distance(run.first(moment + name), exact) > NO_DIGIT * size for run in self.serial):
                found.add(name)
        return found

    def allow(self, key: str, exact: Tensor) -> tuple[float, float, float]:
        """(largest serial distance, allowance, size) of one tensor."""
        size = norm(exact)
        serial = max(_distance(run.first(key), exact) for run in self.serial)
        if not (exact.is_floating_point() or exact.is_complex()):
            return serial, 0.0, size
        return serial, MULTIPLE * max(serial, self.floor * size), size


def compare(candidate: Record, yardstick: Yardstick) -> list[Comparison]:
    """Every number and tensor of the candidate against the reference, on every rank whose value is another."""
    found = [*_losses(candidate, yardstick), *_gradient_norms(candidate, yardstick)]
    aliases = yardstick.exact.aliases
    noise_only = yardstick.noise_only
    values = _by_reference_name(candidate, aliases)
    keys = list(yardstick.exact.tensors)
    for key in [*keys, *(key for key in values if key not in yardstick.exact.tensors)]:
        kind = _kind(key, yardstick.exact.buffers)
        if kind is None:
            continue
        exact = yardstick.exact.first(key)
        if exact is None:  # only the candidate has it: the reference is zero
            exact = torch.zeros_like(next(iter(values[key]))[2], dtype=torch.float64)
        serial, allowance, size = yardstick.allow(key, exact)
        if _parameter_of(key) in noise_only and kind in ("parameter", "optimizer state"):
            allowance = max(allowance, _movement(key, yardstick))
        found += [
            Comparison(
                kind=kind,
                name=name,
                distance=distance,
                serial_distance=serial,
                allowance=allowance,
                size=size,
                rank=rank,
            )
            for rank, name, distance in _distances(key, values.get(key, []), exact, kind)
        ]
    return found


def coarse(comparisons: Iterable[Comparison], yardstick: Yardstick) -> list[Comparison]:
    """Those that rounding allows so much that a mistake may hide behind it, the worst first.

    Not those of gradients that are rounding and nothing else, which are no clearer in any arithmetic.
    """
    noise_only = yardstick.noise_only | yardstick.noise_of("last/")
    found = [item for item in comparisons if item.size > 0 and item.allowance > COARSE * item.size]
    found = [item for item in found if item.name.split(" ")[0] not in noise_only]
    return sorted(found, key=lambda item: -item.allowance / item.size)


def _distances(
    key: str, values: Sequence[tuple[int, str, Tensor]], exact: Tensor, kind: str
) -> list[tuple[int, str, float]]:
    """(rank, name, distance) of each value; a missing gradient counts as zero, anything else that misses as infinite."""
    short = _short(key)
    if not values:
        return [(0, short, norm(exact) if kind.endswith("gradient") else inf)]
    return [(rank, name, _distance(value, exact)) for rank, name, value in values]


def _by_reference_name(candidate: Record, aliases: Mapping[str, str]) -> dict[str, list[tuple[int, str, Tensor]]]:
    """Key of the reference -> (rank, the candidate's own name, value): a tied tensor may stand under another of its names."""
    found: dict[str, list[tuple[int, str, Tensor]]] = {}
    for key, ranks in candidate.tensors.items():
        target = reference_key(key, aliases)
        for rank, value in ranks.items():
            found.setdefault(target, []).append((rank, _short(key), value))
    return found


def reference_key(key: str, aliases: Mapping[str, str]) -> str:
    """The key under which the reference keeps a tensor."""
    name = _parameter_of(key)
    if name not in aliases:
        return key
    head, _, rest = key.partition(name)
    return head + aliases[name] + rest


def _parameter_of(key: str) -> str:
    """The name of the parameter or buffer in a key."""
    for prefix in _TENSOR_PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    for prefix in ("initial/optimizer/", "final/optimizer/"):
        if key.startswith(prefix):
            return key[len(prefix) :].split("/")[0]
    return ""


def _short(key: str) -> str:
    """A key as people read it."""
    for prefix in (*_TENSOR_PREFIXES, "final/optimizer/", "final/options/"):
        if key.startswith(prefix):
            return key[len(prefix) :].replace("/", " ")
    return key


def _kind(key: str, buffers: set[str]) -> str | None:
    for prefix, kind in _KINDS:
        if key.startswith(prefix):
            return kind
    if key.startswith("final/model/"):
        return "buffer" if key[len("final/model/") :] in buffers else "parameter"
    return "option" if key.startswith("final/options/") else None


def _movement(key: str, yardstick: Yardstick) -> float:
    """How far a tensor has gone since the start, in the reference and in float32 together."""
    start = yardstick.exact.first(key.replace("final/", "initial/", 1))
    runs = [yardstick.exact, *yardstick.serial[:1]]
    ends = [end for end in (run.first(key) for run in runs) if end is not None]
    return sum(_distance(end, start if start is not None else torch.zeros_like(end)) for end in ends)


def _losses(candidate: Record, yardstick: Yardstick) -> list[Comparison]:
    exact = yardstick.exact.losses
    runs = [run.losses for run in yardstick.serial]
    return _numbers("loss", candidate.losses, exact, runs, yardstick.floor)


def _gradient_norms(candidate: Record, yardstick: Yardstick) -> list[Comparison]:
    """The norm that clipping reports at each step, or that of the first gradient where the job does not clip."""
    records = [candidate, yardstick.exact, *yardstick.serial]
    reported = [record.reports[0].reported_norms for record in records]
    if any(value is None for values in reported for value in values):
        aliases = yardstick.exact.aliases
        reported = [[global_norm(record, "gradient/", aliases)] for record in records]
    numbers = [[value for value in values if value is not None] for values in reported]
    return _numbers("gradient norm", numbers[0], numbers[1], numbers[2:], yardstick.floor)


def _numbers(
    kind: str, candidate: list[float], exact: list[float], serial: list[list[float]], floor: float
) -> list[Comparison]:
    """One comparison a step. A single number can be near by luck, so the rounding is the largest of all steps so far."""
    found = []
    relative = 0.0
    for index, reference in enumerate(exact):
        size = abs(reference)
        own = max(abs(run[index] - reference) for run in serial)
        relative = max(relative, own / size if size else 0.0)
        distance = abs(candidate[index] - reference) if index < len(candidate) else inf
        found.append(
            Comparison(
                kind=kind,
                name=f"step {index + 1}",
                distance=distance,
                serial_distance=own,
                allowance=MULTIPLE * max(own, relative * size, floor * size),
                size=size,
            )
        )
    return found


def global_norm(record: Record, prefix: str, aliases: Mapping[str, str]) -> float:
    """2-norm over all tensors under a prefix, a tied one once."""
    squares = {
        reference_key(prefix + name, aliases): norm(values[min(values)]) ** 2
        for name, values in record.starting_with(prefix)
    }
    return sqrt(sum(squares.values()))


def initial_differences(candidate: Record, serial: Record, aliases: Mapping[str, str]) -> list[tuple[int, str]]:
    """(rank, name) of parameters and buffers that do not start with the bits of the serial float32 run."""
    found = []
    for key, values in candidate.tensors.items():
        if not key.startswith("initial/model/"):
            continue
        reference = serial.first(reference_key(key, aliases))
        found += [
            (rank, _short(key))
            for rank, value in values.items()
            if reference is None or value.dtype != reference.dtype or not torch.equal(value, reference)
        ]
    return found


def norm(tensor: Tensor) -> float:
    """2-norm in float64."""
    return float(torch.linalg.vector_norm(wide(tensor)))


def _distance(value: Tensor | None, exact: Tensor) -> float:
    """2-norm of the difference; infinite where the shapes differ, and where one is no number and the other is one."""
    if value is None:
        return norm(exact)
    if value.shape != exact.shape:
        return inf
    a, b = wide(value), wide(exact)
    both = torch.isnan(a) & torch.isnan(b) | (a == b)
    distance = float(torch.linalg.vector_norm(torch.where(both, torch.zeros_like(a), a - b)))
    return distance if distance == distance else inf


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def worst_of_each_kind(comparisons: Iterable[Comparison]) -> tuple[Comparison, ...]:
    """For each kind, the comparison with the largest excess."""
    worst: dict[str, Comparison] = {}
    for item in comparisons:
        if item.kind not in worst or item.excess > worst[item.kind].excess:
            worst[item.kind] = item
    return tuple(worst.values())
