"""All that is known about a refuted run, and how its differences are put into words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from shardwise.prove.compare import Yardstick, norm, reference_key, wide
from shardwise.prove.pieces import Pieces
from shardwise.prove.record import Record
from shardwise.spec.layout import Layout
from shardwise.spec.verdict import Comparison

ALIKE = 1e-4
"""Two gradients that agree to this part of their size are the same one: far above rounding, far below any mistake."""


@final
@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is known about a refuted run."""

    layout: Layout
    candidate: Record
    yardstick: Yardstick
    failed: Sequence[Comparison]
    pieces: Pieces | None
    clip_norm: float | None
    initial: Sequence[tuple[int, str]] = ()
    sample_faults: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def moment(self) -> tuple[str, str]:
        """(kind, key prefix) of the first unclipped gradient that is wrong: of the first step, else of the last."""
        return ("gradient", "gradient/") if self.names("gradient") else ("last gradient", "last/")

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind that are beyond rounding, each once."""
        return list(dict.fromkeys(item.name for item in self.failed if item.kind == kind))

    def gradient_pairs(self, prefix: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> (candidate's on its first rank, reference), in float64, of gradients that both have."""
        found = {}
        for name, values in self.candidate.starting_with(prefix):
            exact = self.yardstick.exact.first(reference_key(prefix + name, self.aliases))
            value = values[min(values)]
            if exact is not None and exact.shape == value.shape and name not in self.yardstick.noise_only:
                found[name] = (wide(value), wide(exact))
        return found


def factors(e: Evidence, kind: str, prefix: str, *, partial: bool = False) -> dict[str, float]:
    """Name -> factor of each tensor that is a multiple of the reference; empty where some wrong tensor is none."""
    failed = set(e.names(kind))
    found = {}
    for name, (value, exact) in e.gradient_pairs(prefix).items():
        square = norm(exact) ** 2
        if name not in failed or not square:
            continue
        factor = float((value * exact.conj()).sum().real) / square
        if alike(value, factor * exact) and factor:
            found[name] = factor
        elif not partial:
            return {}
    return found


def described(e: Evidence, names: Sequence[str]) -> str:
    """Parameters by the kind of their modules, where that says it all."""
    owners = e.candidate.owners
    everything = {name for name, _ in e.candidate.starting_with("gradient/")} - e.yardstick.noise_only
    if set(names) >= everything:
        return "all parameters"
    kinds = {owners.get(name, "") for name in names}
    if "" not in kinds and {name for name in everything if owners.get(name) in kinds} == set(names):
        return f"all parameters of {listed(sorted(kinds))} ({listed(list(names))})"
    return listed(list(names))


def grouped(factors: Mapping[str, float]) -> dict[float, list[str]]:
    """Factor -> names; factors that agree to 3 digits are one."""
    groups: dict[float, list[str]] = {}
    for name, factor in factors.items():
        known = next((other for other in groups if abs(other - factor) <= 1e-3 * abs(other)), factor)
        groups.setdefault(known, []).append(name)
    return groups


def shown_number(factor: float) -> str:
    nearest = round(factor)
    return str(nearest) if nearest and abs(factor - nearest) <= ALIKE * nearest else f"{factor:.4g}"


def alike(a: Tensor, b: Tensor) -> bool:
    """Equal up to more than rounding and less than any mistake."""
    return norm(wide(a) - wide(b)) <= ALIKE * norm(b)


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
