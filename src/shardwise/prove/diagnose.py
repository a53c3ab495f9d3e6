"""What is wrong with a refuted run, told from the pattern of its differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import final

import torch
from torch import Tensor

from shardwise.dist.mesh import SAMPLE_AXES
from shardwise.prove.compare import Yardstick, global_norm, norm, reference_key
from shardwise.prove.pieces import Piece, Pieces
from shardwise.prove.record import Record
from shardwise.spec.layout import AXES, Layout
from shardwise.spec.verdict import Comparison, Finding

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
                found[name] = (value.double(), exact.double())
        return found


def diagnose(evidence: Evidence) -> list[Finding]:
    """Findings, the most telling first; empty where no pattern fits."""
    found = _first(evidence, (_initial_weights, _wrong_samples, _coupled_loss, _untied))
    if found:
        return found
    if evidence.names("gradient"):
        found = _first(evidence, _GRADIENT_PATTERNS)
        return [*(found or [_unexplained(evidence, "gradient")]), *_buffers(evidence)]
    if evidence.names("applied gradient"):
        return [*_clipping(evidence), *_buffers(evidence)]
    return [*_buffers(evidence), *_update(evidence)]


def _first(evidence: Evidence, looks: Sequence[Callable[[Evidence], list[Finding]]]) -> list[Finding]:
    """What the first of these that finds anything finds."""
    for look in looks:
        found = look(evidence)
        if found:
            return found
    return []


def _initial_weights(e: Evidence) -> list[Finding]:
    names = tuple(dict.fromkeys(name for _, name in e.initial))
    if not names:
        return []
    ranks = sorted({rank for rank, _ in e.initial})
    text = f"{listed(names)} does not start with the values of a serial run on rank {listed([str(rank) for rank in ranks])}"
    return [Finding(pattern="other start", message=text, parameters=names)]


def _wrong_samples(e: Evidence) -> list[Finding]:
    return [Finding(pattern="wrong samples", message="; ".join(e.sample_faults))] if e.sample_faults else []


def _coupled_loss(e: Evidence) -> list[Finding]:
    if e.pieces is None or e.pieces.coupled is None:
        return []
    whole, mean = e.pieces.coupled
    text = (
        f"the loss couples samples: over the whole global batch it is {whole:.6g}, the mean over its parts is {mean:.6g}, "
        "from the same outputs. A contrastive loss, or any other that compares samples, cannot be split over samples without "
        "gathering the outputs; a mean over something else than samples (tokens, unignored targets, class weights) needs "
        "Job.weight, or an objective that returns (sum, count)"
    )
    return [Finding(pattern="loss couples samples", message=text)]


def _untied(e: Evidence) -> list[Finding]:
    """Names that are one tensor in the serial run, have a gradient each in the candidate, and would add up to the right one."""
    found = []
    for alias, first in e.aliases.items():
        own, other = (e.candidate.first(f"gradient/{name}") for name in (alias, first))
        exact = e.yardstick.exact.first(f"gradient/{first}")
        if own is None or other is None or exact is None or own.shape != exact.shape or alike(own, exact):
            continue
        text = f"{alias} and {first} are one weight in the serial run, but have a gradient each here"
        if alike(own.double() + other.double(), exact):
            text += ", which add up to the right one: the weight was untied"
        found.append(Finding(pattern="tied weight untied", message=text, parameters=(first, alias)))
    return found


def _missing_reduction(e: Evidence) -> list[Finding]:
    """Along some axes the ranks hold different gradients, and their sum is the right one."""
    names = e.names("gradient")
    degrees = e.layout.degrees
    axes = [axis for axis in AXES if degrees[axis] > 1]
    for count in range(1, len(axes) + 1):
        for chosen in combinations(axes, count):
            missing = [name for name in names if _adds_up(e, name, chosen)]
            if missing:
                where = " and ".join(chosen)
                holder = "each rank has only the gradient of its own samples" if set(chosen) <= set(SAMPLE_AXES) else (
                    "each rank has only its own part of the gradient"
                )  # fmt: skip
                text = f"missing reduction over {where}: {holder}, for {_described(e, missing)}"
                return [
                    Finding(pattern="missing reduction", message=text, parameters=tuple(missing), axes=tuple(chosen))
                ]
    return []


def _adds_up(e: Evidence, name: str, axes: Sequence[str]) -> bool:
    exact = e.yardstick.exact.first(reference_key(f"gradient/{name}", e.aliases))
    ranks = [
        report.rank
        for report in e.candidate.reports
        if all(place == 0 for axis, place in report.coordinates.items() if axis not in axes)
    ]
    values = [value for rank in ranks if (value := e.candidate.at(f"gradient/{name}", rank)) is not None]
    if exact is None or len(values) < 2 or any(value.shape != exact.shape for value in values):
        return False
    if all(torch.equal(value, values[0]) for value in values):
        return False
    return alike(sum((value.double() for value in values), torch.zeros_like(exact)), exact)


def _one_factor(e: Evidence) -> list[Finding]:
    return _scaled(e, _factors(e, "gradient/"))


def _several_factors(e: Evidence) -> list[Finding]:
    factors = _factors(e, "gradient/", partial=True)
    return _scaled(e, factors)


def _factors(e: Evidence, prefix: str, *, partial: bool = False) -> dict[str, float]:
    """Name -> factor of each tensor that is a multiple of the reference; empty where some wrong tensor is none."""
    failed = set(e.names("gradient" if prefix == "gradient/" else "applied gradient"))
    factors = {}
    for name, (value, exact) in e.gradient_pairs(prefix).items():
        square = float((exact * exact).sum())
        if name not in failed or not square:
            continue
        factor = float((value * exact).sum()) / square
        if alike(value, factor * exact) and factor:
            factors[name] = factor
        elif not partial:
            return {}
    return factors


def _scaled(e: Evidence, factors: Mapping[str, float]) -> list[Finding]:
    found = []
    for factor, names in _grouped(factors).items():
        if abs(factor - 1) <= ALIKE:
            continue
        text = f"gradients x{_number(factor)} on {_described(e, names)}{_meaning(e, factor)}"
        found.append(Finding(pattern="scaled gradients", message=text, parameters=tuple(names), factor=factor))
    return found


def _meaning(e: Evidence, factor: float) -> str:
    """Which degree of the layout a factor is, or is one over."""
    degrees = {axis: degree for axis, degree in e.layout.degrees.items() if degree > 1}
    for axis, degree in degrees.items():
        if abs(factor - degree) <= ALIKE * degree:
            return f": the degree of {axis}, as if summed once too often, or not divided by it"
        if abs(factor * degree - 1) <= ALIKE:
            return f": one over the degree of {axis}, as if averaged where a sum belongs"
    return ""


def _sum_of_parts(e: Evidence) -> list[Finding]:
    """The gradient as a combination of what the parts of the batch contribute."""
    if e.pieces is None or e.pieces.has_batch_norm or len(e.pieces.parts) < 2:
        return []
    pairs = e.gradient_pairs("gradient/")
    weights = _combination([value for value, _ in pairs.values()], list(pairs), e.pieces.parts, e.aliases)
    if weights is None:
        return []
    parts = e.pieces.parts
    clip = e.clip_norm
    if clip is not None and all(part.index == 0 for part in parts):
        clipped = [min(1.0, clip / (_piece_norm(part) + 1e-6)) for part in parts]
        if all(abs(weight - own) <= 1e-2 * own for weight, own in zip(weights, clipped, strict=True)):
            text = (
                "clipped per rank: each worker's own gradient was scaled to the clip norm before the sum, by "
                + ", ".join(f"{weight:.3g}" for weight in weights)
                + "; the norm to clip by is that of the summed gradient"
            )
            return [Finding(pattern="clipped per rank", message=text, parameters=tuple(pairs))]
    lost = [part for part, weight in zip(parts, weights, strict=True) if abs(weight) <= 1e-2]
    several = any(part.index for part in parts)
    if lost and all(abs(w - 1) <= 1e-2 for part, w in zip(parts, weights, strict=True) if part not in lost):
        what = "micro-batch" if several else "share of worker"
        shown = listed([f"{part.index} of worker {part.share}" if several else str(part.share) for part in lost])
        text = f"dropped: the gradient lacks {what} {shown} (samples {_spans(lost)} of the global batch)"
        return [
            Finding(
                pattern="dropped micro-batch" if several else "dropped samples", message=text, parameters=tuple(pairs)
            )
        ]
    text = "the gradient is not the sum of its parts; they count " + ", ".join(
        f"{weight:.3g} x samples {_spans([part])}" for part, weight in list(zip(parts, weights, strict=True))[:8]
    )
    return [Finding(pattern="parts miscounted", message=text, parameters=tuple(pairs))]


def _combination(
    values: Sequence[Tensor], names: Sequence[str], parts: Sequence[Piece], aliases: Mapping[str, str]
) -> list[float] | None:
    """Factors of the parts whose sum is the given gradient; None where there are none."""
    columns = []
    for part in parts:
        pieces = [part.gradient.get(aliases.get(name, name)) for name in names]
        columns.append(
            torch.cat([
                (torch.zeros_like(value) if piece is None else piece).reshape(-1)
                for piece, value in zip(pieces, values, strict=True)
            ])
        )  # fmt: skip
    target = torch.cat([value.reshape(-1) for value in values])
    matrix = torch.stack(columns, 1)
    if matrix.shape[0] <= matrix.shape[1]:
        return None
    solution = torch.linalg.lstsq(matrix, target.unsqueeze(1), driver="gelsd").solution
    if not alike((matrix @ solution).squeeze(1), target):
        return None
    weights: list[float] = solution.squeeze(1).tolist()
    return weights


def _local_batch_norm(e: Evidence) -> list[Finding]:
    """The gradient is that of a run in which each worker's BatchNorm saw its own samples only."""
    if e.pieces is None or not e.pieces.has_batch_norm:
        return []
    pairs = e.gradient_pairs("gradient/")
    for name, (value, _) in pairs.items():
        parts = [gradient for part in e.pieces.parts if (gradient := part.gradient.get(name)) is not None]
        if not parts or not alike(value, sum(parts, torch.zeros_like(value))):
            return []
    text = "BatchNorm on local statistics: each worker normalises over its own samples instead of the global batch"
    return [Finding(pattern="local BatchNorm statistics", message=text, parameters=tuple(e.names("buffer")))]


def _ranks_disagree(e: Evidence) -> list[Finding]:
    """The first rank is right and another one is not."""
    ranks = sorted({item.rank for item in e.failed if item.kind == "gradient"})
    names = e.names("gradient")
    if not ranks or 0 in ranks:
        return []
    text = (
        f"rank {listed([str(rank) for rank in ranks])} holds another gradient than rank 0, for {_described(e, names)}"
    )
    return [Finding(pattern="ranks disagree", message=text, parameters=tuple(names))]


def _clipping(e: Evidence) -> list[Finding]:
    """The gradient is right before clipping and wrong after it."""
    names = e.names("applied gradient")
    factors = _factors(e, "applied/", partial=True)
    groups = {factor: members for factor, members in _grouped(factors).items() if abs(factor - 1) > ALIKE}
    if e.clip_norm is None or not groups:
        return [_unexplained(e, "applied gradient")]
    whole = global_norm(e.yardstick.exact, "gradient/", {})
    if len(groups) == 1 and len(factors) == len(e.gradient_pairs("applied/")):
        factor = next(iter(groups))
        own = whole / factor if whole > e.clip_norm else whole
        text = (
            f"clipped by a wrong norm: all gradients are x{_number(factor)} of what the global norm {whole:.4g} gives"
        )
        text += f", as if it were {own:.4g}"
        return [Finding(pattern="clipped by a wrong norm", message=text, parameters=tuple(names), factor=factor)]
    shown = "; ".join(f"x{_number(factor)} on {_described(e, members)}" for factor, members in list(groups.items())[:4])
    text = f"clipped per part of the model (per stage or per rank), not by the global norm {whole:.4g}: {shown}"
    return [Finding(pattern="clipped per part", message=text, parameters=tuple(names))]


def _buffers(e: Evidence) -> list[Finding]:
    """Buffers that did not follow the training, and others that are wrong."""
    stale: list[str] = []
    wrong: list[str] = []
    for name in e.names("buffer"):
        start, end = (e.candidate.first(f"{moment}/model/{name}") for moment in ("initial", "final"))
        is_stale = start is not None and end is not None and torch.equal(start, end)
        (stale if is_stale else wrong).append(name)
    found = []
    if stale:
        text = f"stale buffer: {listed(stale)} never changed, in the serial run it does"
        found.append(Finding(pattern="stale buffer", message=text, parameters=tuple(stale)))
    if wrong and not e.names("gradient"):
        text = f"{listed(wrong)} differs, though the gradients are right: it was computed from other values than in a serial run"
        found.append(Finding(pattern="wrong buffer", message=text, parameters=tuple(wrong)))
    return found


def _update(e: Evidence) -> list[Finding]:
    """Gradients are right, and what the optimizer made of them is not."""
    names = tuple(dict.fromkeys(name for kind in ("parameter", "optimizer state", "option") for name in e.names(kind)))
    if names:
        text = f"the first gradient is right, but after the last step {listed(names)} differs: look at the optimizer's update"
        later = e.names("loss") or e.names("gradient norm")
        text += f" and at what happens from {later[0]} on" if later else ""
        return [Finding(pattern="wrong update", message=text, parameters=names)]
    if e.names("loss") or e.names("gradient norm"):
        return [
            Finding(pattern="wrong report", message="weights are right, but the reported loss or gradient norm is not")
        ]
    return []


def _unexplained(e: Evidence, kind: str) -> Finding:
    names = e.names(kind)
    text = f"the {kind} of {_described(e, names)} is wrong in no pattern that is known"
    return Finding(pattern="wrong gradient", message=text, parameters=tuple(names))


def _described(e: Evidence, names: Sequence[str]) -> str:
    """Parameters by the kind of their modules, where that says it all."""
    owners = e.candidate.owners
    everything = {name for name, _ in e.candidate.starting_with("gradient/")} - e.yardstick.noise_only
    if set(names) >= everything:
        return "all parameters"
    kinds = {owners.get(name, "") for name in names}
    if "" not in kinds and {name for name in everything if owners.get(name) in kinds} == set(names):
        return f"all parameters of {listed(sorted(kinds))} ({listed(list(names))})"
    return listed(list(names))


def _grouped(factors: Mapping[str, float]) -> dict[float, list[str]]:
    """Factor -> names; factors that agree to 3 digits are one."""
    groups: dict[float, list[str]] = {}
    for name, factor in factors.items():
        known = next((other for other in groups if abs(other - factor) <= 1e-3 * abs(other)), factor)
        groups.setdefault(known, []).append(name)
    return groups


def _piece_norm(part: Piece) -> float:
    return math.sqrt(sum(norm(gradient) ** 2 for gradient in part.gradient.values()))


def _spans(parts: Sequence[Piece]) -> str:
    return listed([f"{part.start} to {part.stop - 1}" for part in parts])


def _number(factor: float) -> str:
    nearest = round(factor)
    return str(nearest) if nearest and abs(factor - nearest) <= ALIKE * nearest else f"{factor:.4g}"


def alike(a: Tensor, b: Tensor) -> bool:
    """Equal up to more than rounding and less than any mistake."""
    return norm(a.double() - b.double()) <= ALIKE * norm(b)


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


_GRADIENT_PATTERNS = (
    _missing_reduction,
    _one_factor,
    _sum_of_parts,
    _local_batch_norm,
    _several_factors,
    _ranks_disagree,
)
"""In this order: what explains every wrong gradient before what explains some."""
