"""The evaluation of a proof: loss and metrics over some of the test split, with the weights that the steps left."""

from __future__ import annotations

from math import inf

import torch

from shardwise.data.source import Source
from shardwise.prove.compare import MULTIPLE, Yardstick
from shardwise.prove.quiet import Quiet, noted_draws
from shardwise.prove.record import RankReport, Record
from shardwise.run.assemble import Assembly
from shardwise.run.evaluate import evaluation_sums, loss_names
from shardwise.spec.verdict import Comparison

KIND = "metric"

SAMPLES = "number of samples"
"""Under this name the count is compared."""

NO_MEAN = 1e-6
"""A metric of float64 whose parts give another value by more than this part is no mean over samples."""


def take_evaluation(a: Assembly, test: Source, steps: int, report: RankReport, *, double: bool) -> None:
    """Evaluate the first batches of the test split and its last one, and note the results. Collective.

    In a serial float64 run, what cannot be compared is noted too: metrics that are no means, and evaluations that fail
    or draw random numbers.
    """
    size = a.job.eval_batch_size or a.job.batch_size
    each = -(-(test.length or 0) // size)
    spans = [(0, each)] if each <= steps else [(0, steps - 1), (each - 1, each)]
    names = [*loss_names(a.job), *a.job.metrics, SAMPLES]

    def values(*parts: tuple[int, int] | None) -> dict[str, float]:
        sums = [evaluation_sums(a, test, start=start, stop=stop, part=part) for part in parts for start, stop in spans]
        rows = torch.stack(sums).sum(0).tolist()
        return {
            n: x if n == SAMPLES else x / count if count else inf for n, (x, count) in zip(names, rows, strict=True)
        }

    quiet = Quiet(double=double)
    with quiet, noted_draws(quiet.random):
        if a.world.size > 1 or not double:
            report.metrics = values(None)
            return
        try:
            report.metrics = values(None)
            apart = values((0, 2), (1, 2))
        except Exception as error:  # noqa: BLE001  # written for float32, or for whole batches
            report.evaluation = f"which fails in float64 or on half a batch: {error}"
            return
    if quiet.random:
        report.evaluation = f"which draws random numbers: {', '.join(sorted(quiet.random))}"
    report.coupled = {name for name, x in report.metrics.items() if abs(apart[name] - x) > NO_MEAN * abs(x)}


def compare_metrics(candidate: Record, yardstick: Yardstick) -> list[Comparison]:
    """Every rank's results, where those of the reference can be compared."""
    reference = yardstick.exact.reports[0]
    found = []
    for name, exact in ({} if reference.evaluation else reference.metrics).items():
        own = [run.reports[0].metrics.get(name, exact) for run in yardstick.serial]
        if name in reference.coupled:
            continue
        serial = max(_apart(value, exact) for value in own)
        for rank, report in enumerate(candidate.reports):
            if rank and report.metrics.get(name) == candidate.reports[0].metrics.get(name):
                continue
            found.append(
                Comparison(
                    kind=KIND,
                    name=name,
                    distance=_apart(report.metrics.get(name, inf), exact),
                    serial_distance=serial,
                    allowance=MULTIPLE * max(serial, yardstick.floor * abs(exact)),
                    size=abs(exact),
                    rank=rank,
                )
            )
    return found


def not_compared(yardstick: Yardstick) -> list[str]:
    """What of the evaluation says nothing about the plan, and why."""
    reference = yardstick.exact.reports[0]
    if reference.evaluation:
        return [f"the evaluation, {reference.evaluation}"]
    if not reference.coupled:
        return []
    names = ", ".join(sorted(reference.coupled))
    return [
        f"{names}: over parts of a batch it is another number, so it depends on the plan (give means or (sum, count) pairs)"
    ]


def _apart(value: float, exact: float) -> float:
    if value == exact or (value != value and exact != exact):
        return 0.0
    distance = abs(value - exact)
    return distance if distance == distance else inf
