"""What is wrong with a refuted run, told from the pattern of its differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shardwise.prove.compare import global_norm, wide
from shardwise.prove.evaluation import KIND as METRIC
from shardwise.prove.evidence import ALIKE, Evidence, alike, described, factors, grouped, listed, shown_number
from shardwise.prove.gradients import GRADIENT_PATTERNS
from shardwise.prove.record import Record
from shardwise.spec.verdict import Finding


def diagnose(evidence: Evidence) -> list[Finding]:
    """Findings, the most telling first; empty where no pattern fits."""
    found = _first(evidence, (_initial_weights, _wrong_samples, _coupled_loss, _untied))
    if found:
        return found
    if evidence.names("applied gradient") and not evidence.names("gradient"):
        return [*_clipping(evidence), *_buffers(evidence)]
    if evidence.names("gradient"):
        found = _first(evidence, GRADIENT_PATTERNS)
        return [*(found or [_unexplained(evidence, "gradient")]), *_buffers(evidence)]
    found = _first(evidence, GRADIENT_PATTERNS) if evidence.names("last gradient") else []
    found = [*found, *_buffers(evidence), *([] if found else _update(evidence))]
    return found or _evaluation(evidence)


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
        if alike(wide(own) + wide(other), exact):
            text += ", which add up to the right one: the weight was untied"
        found.append(Finding(pattern="tied weight untied", message=text, parameters=(first, alias)))
    return found


def _clipping(e: Evidence) -> list[Finding]:
    """The gradient is right before clipping and wrong after it."""
    names = e.names("applied gradient")
    found_factors = factors(e, "applied gradient", "applied/", partial=True)
    groups = {factor: members for factor, members in grouped(found_factors).items() if abs(factor - 1) > ALIKE}
    if e.clip_norm is None or not groups:
        return [_unexplained(e, "applied gradient")]
    whole = global_norm(e.yardstick.exact, "gradient/", {})
    if len(groups) == 1 and len(found_factors) == len(e.gradient_pairs("applied/")):
        factor = next(iter(groups))
        own = whole / factor if whole > e.clip_norm else whole
        text = f"clipped by a wrong norm: all gradients are x{shown_number(factor)} of what the global norm {whole:.4g} gives"
        text += f", as if it were {own:.4g}"
        return [Finding(pattern="clipped by a wrong norm", message=text, parameters=tuple(names), factor=factor)]
    shown = "; ".join(
        f"x{shown_number(factor)} on {described(e, members)}" for factor, members in list(groups.items())[:4]
    )
    text = f"clipped per part of the model (per stage or per rank), not by the global norm {whole:.4g}: {shown}"
    return [Finding(pattern="clipped per part", message=text, parameters=tuple(names))]


def _buffers(e: Evidence) -> list[Finding]:
    """Buffers that did not follow the training, and others that are wrong."""
    stale: list[str] = []
    wrong: list[str] = []
    for name in e.names("buffer"):
        is_stale = not _changed(e.candidate, name) and _changed(e.yardstick.exact, name)
        (stale if is_stale else wrong).append(name)
    found = []
    if stale:
        text = f"stale buffer: {listed(stale)} never changed, in the serial run it does"
        found.append(Finding(pattern="stale buffer", message=text, parameters=tuple(stale)))
    if wrong and not e.names("gradient"):
        text = f"{listed(wrong)} differs, though the gradients are right: it was computed from other values than in a serial run"
        found.append(Finding(pattern="wrong buffer", message=text, parameters=tuple(wrong)))
    return found


def _changed(run: Record, name: str) -> bool:
    """Whether a buffer had another value at the end, on any rank."""
    start = run.first(f"initial/model/{name}")
    ends = run.tensors.get(f"final/model/{name}", {}).values()
    return start is None or any(not torch.equal(start, end) for end in ends)


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


def _evaluation(e: Evidence) -> list[Finding]:
    """Only what is reported of the test split is wrong."""
    names = e.names(METRIC)
    if not names:
        return []
    text = f"the training is right, but the evaluation is not: {listed(names)} of the test split is another number"
    return [Finding(pattern="wrong evaluation", message=text)]


def _unexplained(e: Evidence, kind: str) -> Finding:
    names = e.names(kind)
    text = f"the {kind} of {described(e, names)} is wrong in no pattern that is known"
    return Finding(pattern="wrong gradient", message=text, parameters=tuple(names))
