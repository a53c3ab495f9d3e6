"""Checks against proving nothing: something was trained, and the candidate really used the axes that its plan names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardwise.dist.mesh import SAMPLE_AXES
from shardwise.prove.compare import Yardstick, global_norm
from shardwise.prove.record import RankReport, Record
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.spec.shares import share_bounds
from shardwise.spec.verdict import Guard

_SPLIT_PARAMETERS = ("shard", "tensor", "pipeline", "expert")
"""Axes along which every rank stores a part of the parameters only."""


def check_guards(candidate: Record, yardstick: Yardstick, layout: Layout, sample_faults: Sequence[str]) -> list[Guard]:
    """All guards, those that failed as well."""
    guards = [_moved(candidate, yardstick), _gradients(yardstick), _ranks(candidate, layout)]
    if layout.workers > 1:
        guards.append(_samples(candidate, layout, sample_faults))
    split = [axis for axis in _SPLIT_PARAMETERS if layout.degrees[axis] > 1]
    if split:
        guards.append(_parameters(candidate, yardstick, split))
    recomputed = [report.recomputed for report in candidate.reports if report.recomputed is not None]
    if recomputed:
        text = f"forward passes of modules were computed again {sum(recomputed)} times"
        guards.append(Guard(name="recomputed", passed=sum(recomputed) > 0, text=text))
    if candidate.reports[0].resumed_after:
        guards.append(_restored(candidate))
    return guards


def _restored(candidate: Record) -> Guard:
    reports = candidate.reports
    after, steps = reports[0].resumed_after, len(reports[0].losses)
    lost = [(report.rank, key) for report in reports for key in report.lost]
    if lost:
        rank, key = lost[0]
        text = f"{len({key for _, key in lost})} tensors and numbers did not come back from a checkpoint, {key} on rank {rank}"
        return Guard(name="checkpoint", passed=False, text=text)
    text = f"a checkpoint after step {after} of {steps} gave back {max(each.restored for each in reports)} tensors and numbers"
    return Guard(name="checkpoint", passed=True, text=f"{text} bit for bit")


def _moved(candidate: Record, yardstick: Yardstick) -> Guard:
    moved = [_count_moved(record) for record in (yardstick.exact, candidate)]
    text = f"{moved[0]} parameters changed in the serial run, {moved[1]} in the candidate"
    return Guard(name="weights changed", passed=min(moved) > 0, text=text)


def _count_moved(record: Record) -> int:
    count = 0
    for name, values in record.starting_with("final/model/"):
        start = record.first(f"initial/model/{name}")
        if name not in record.buffers and start is not None:
            count += any(not torch.equal(value, start) for value in values.values())
    return count


def _gradients(yardstick: Yardstick) -> Guard:
    size = global_norm(yardstick.exact, "gradient/", {})
    return Guard(name="gradients", passed=size > 0, text=f"the first gradient has the norm {size:.4g}")


def _ranks(candidate: Record, layout: Layout) -> Guard:
    reports = candidate.reports
    places = {tuple(sorted(report.coordinates.items())) for report in reports}
    processes = {report.pid for report in reports}
    passed = len(reports) == len(places) == len(processes) == layout.workers
    text = f"{len(processes)} processes at {len(places)} places of the mesh {layout}"
    return Guard(name="ranks", passed=passed, text=text)


def _samples(candidate: Record, layout: Layout, sample_faults: Sequence[str]) -> Guard:
    if sample_faults:
        return Guard(name="samples", passed=False, text=sample_faults[0])
    first = [len(report.samples[0]) for report in candidate.reports]
    shares = f"the first batch was shared out as {', '.join(map(str, first))}"
    if layout.replicas == 1:
        return Guard(name="samples", passed=True, text=f"every rank saw all {first[0]} samples of the first batch")
    idle = [report.rank for report in candidate.reports if not any(report.samples)]
    if idle:
        text = f"rank {idle[0]} had no sample in any step: take a larger batch_size or fewer workers"
        return Guard(name="samples", passed=False, text=text)
    return Guard(name="samples", passed=True, text=shares)


def _parameters(candidate: Record, yardstick: Yardstick, axes: list[str]) -> Guard:
    whole = yardstick.exact.reports[0].whole_elements
    held = [report.local_elements for report in candidate.reports]
    least, most = min(held), max(held)
    text = f"a rank holds at most {most:,} of {whole:,} parameter elements, split over {' and '.join(axes)}"
    if "pipeline" in axes and 0 < least < most == whole:
        # One stage may use all, where what the others use is tied to its own.
        text = f"ranks hold {least:,} to {most:,} of {whole:,} parameter elements, split over {' and '.join(axes)}"
        return Guard(name="parameters split", passed=True, text=text)
    return Guard(name="parameters split", passed=0 < most < whole, text=text)


def sample_faults(candidate: Record, serial: Record, plan: Plan) -> list[str]:
    """Ranks that did not train on their part of the global batch, a sentence each; for the first step where any did not."""
    groups: dict[tuple[tuple[str, int], ...], list[RankReport]] = {}
    for report in candidate.reports:
        others = tuple(sorted(item for item in report.coordinates.items() if item[0] not in SAMPLE_AXES))
        groups.setdefault(others, []).append(report)
    for step, whole in enumerate(serial.reports[0].samples):
        found = [fault for group in groups.values() for fault in _faults(group, step, whole, plan)]
        if found:
            return list(dict.fromkeys(found))
    return []


def _faults(group: list[RankReport], step: int, whole: tuple[bytes, ...], plan: Plan) -> list[str]:
    """`group`: the ranks that together hold one copy of the batch, in the order of their shares."""
    shares = [report.samples[step] if step < len(report.samples) else () for report in group]
    slices = [whole[start:stop] for start, stop in share_bounds(len(whole), plan.layout.replicas, plan.shares or None)]
    # A sharded stream divides unevenly by itself; where the plan says how, each rank must have just its slice.
    if shares == slices or (not plan.shares and sum(shares, ()) == whole):
        return []
    known = set(whole)
    found = []
    for report, share, own in zip(group, shares, slices, strict=True):
        if share == own:
            continue
        start = f"rank {report.rank} trained at step {step + 1} on"
        if share in slices:
            found.append(f"{start} the samples of share {slices.index(share)} instead of its own")
        elif not known.issuperset(share):
            strange = sum(sample not in known for sample in share)
            found.append(f"{start} {strange} samples that are not in the global batch: the data differ from run to run")
        else:
            found.append(f"{start} {len(share)} samples of the global batch that are not its share of {len(own)}")
    return found or [f"step {step + 1} did not train on the samples of the global batch in their order"]
