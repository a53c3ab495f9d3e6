"""Patterns in wrong gradients: sums left out, factors, parts of the batch that count wrongly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from shardwise.dist.mesh import SAMPLE_AXES
from shardwise.prove.compare import norm, reference_key, wide
from shardwise.prove.evidence import ALIKE, Evidence, alike, described, factors, grouped, listed, shown_number
from shardwise.prove.pieces import Piece
from shardwise.spec.layout import AXES
from shardwise.spec.verdict import Finding


def _no_gradient(e: Evidence) -> list[Finding]:
    """Parameters that get a gradient in the serial run and none here."""
    kind, prefix = e.moment
    held = {reference_key(key, e.aliases) for key in e.candidate.tensors if key.startswith(prefix)}
    absent = [name for name in e.names(kind) if reference_key(prefix + name, e.aliases) not in held]
    if not absent:
        return []
    text = f"no gradient reaches {listed(absent)}, which has one in the serial run"
    return [Finding(pattern="no gradient", message=text, parameters=tuple(absent))]


def _missing_reduction(e: Evidence) -> list[Finding]:
    """Along some axes the ranks hold different gradients, and their sum is the right one."""
    names = e.names(e.moment[0])
    degrees = e.layout.degrees
    axes = [axis for axis in AXES if degrees[axis] > 1]
    for count in range(1, len(axes) + 1):
        for chosen in combinations(axes, count):
            missing = [name for name in names if _adds_up(e, name, chosen)]
            if missing and chosen == ("pipeline",):
                text = (
                    f"{listed(missing)} is used on several pipeline stages, each of which has only its own part of the "
                    "gradient: the parts add up to the right one, and were not added up"
                )
                return [Finding(pattern="tied weight untied", message=text, parameters=tuple(missing), axes=chosen)]
            if missing:
                where = " and ".join(chosen)
                holder = "each rank has only the gradient of its own samples" if set(chosen) <= set(SAMPLE_AXES) else (
                    "each rank has only its own part of the gradient"
                )  # fmt: skip
                text = f"missing reduction over {where}: {holder}, for {described(e, missing)}"
                return [
                    Finding(pattern="missing reduction", message=text, parameters=tuple(missing), axes=tuple(chosen))
                ]
    return []


def _adds_up(e: Evidence, name: str, axes: Sequence[str]) -> bool:
    exact = e.yardstick.exact.first(reference_key(e.moment[1] + name, e.aliases))
    every = [(report, e.candidate.at(e.moment[1] + name, report.rank)) for report in e.candidate.reports]
    held = [(report.coordinates, value) for report, value in every if value is not None]
    # Of the ranks that have it (one pipeline stage, perhaps), those that differ from the first along these axes only.
    values = [
        value
        for coordinates, value in held
        if all(place == held[0][0][axis] for axis, place in coordinates.items() if axis not in axes)
    ]
    if exact is None or len(values) < 2 or any(value.shape != exact.shape for value in values):
        return False
    if all(torch.equal(value, values[0]) for value in values):
        return False
    return alike(sum((wide(value) for value in values), torch.zeros_like(exact)), exact)


def _one_factor(e: Evidence) -> list[Finding]:
    return _scaled(e, factors(e, *e.moment))


def _several_factors(e: Evidence) -> list[Finding]:
    return _scaled(e, factors(e, *e.moment, partial=True))


def _scaled(e: Evidence, found_factors: Mapping[str, float]) -> list[Finding]:
    found = []
    for factor, names in grouped(found_factors).items():
        if abs(factor - 1) <= ALIKE:
            continue
        text = f"gradients x{shown_number(factor)} on {described(e, names)}{_meaning(e, factor)}"
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
    pieces = 1 + max((part.index for part in e.pieces.parts), default=0) if e.pieces is not None else 1
    if pieces > 1 and abs(factor - pieces) <= ALIKE * pieces:
        return ": the number of micro-batches, as if their means were summed and not weighted by their samples"
    return ""


def _sum_of_parts(e: Evidence) -> list[Finding]:
    """The gradient as a combination of what the parts of the batch contribute."""
    if e.pieces is None or e.pieces.has_batch_norm or len(e.pieces.parts) < 2 or not e.names("gradient"):
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
    if e.pieces is None or not e.pieces.has_batch_norm or not e.names("gradient"):
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
    kind = e.moment[0]
    ranks = sorted({item.rank for item in e.failed if item.kind == kind})
    names = e.names(kind)
    if not ranks or 0 in ranks:
        return []
    text = f"rank {listed([str(rank) for rank in ranks])} holds another gradient than rank 0, for {described(e, names)}"
    return [Finding(pattern="ranks disagree", message=text, parameters=tuple(names))]


def _piece_norm(part: Piece) -> float:
    return math.sqrt(sum(norm(gradient) ** 2 for gradient in part.gradient.values()))


def _spans(parts: Sequence[Piece]) -> str:
    return listed([f"{part.start} to {part.stop - 1}" for part in parts])


GRADIENT_PATTERNS = (
    _no_gradient,
    _missing_reduction,
    _one_factor,
    _sum_of_parts,
    _local_batch_norm,
    _several_factors,
    _ranks_disagree,
)
"""In this order: what explains every wrong gradient before what explains some."""
