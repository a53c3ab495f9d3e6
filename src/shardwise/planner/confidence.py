"""How far predicted step times were found to be off, by kind of plan: the ranges that are stated beside them.

A range is a factor below and one above the prediction between which 4 of 5 measured times lie. docs/accuracy.md says how often
they did, on results that the ranges were not taken from too; a test holds them to the kept measurements.
"""

import math

from shardwise.planner.case import BLACKWELL, HOPPER, Case
from shardwise.planner.software import spread

PUBLISHED = {
    "one node": (0.83, 1.79),
    "several nodes": (0.84, 1.92),
    "experts": (0.76, 2.9),
    "other parts": (0.63, 2.55),
}
"""Kind of run -> measured over predicted, of described models: the 5th and 95th percentile over the tables that were looked at,
each table with the same weight (benchmarks/accuracy.py tells them). The 10th and 90th would hold 4 of 5 of these rows, but fewer
of a table that is not among them: runs of one source err together. With experts the upper end is the 90th: beyond it is one
table, whose software runs experts one after the other."""

CALIBRATED = (-0.8, 1.1)
"""The same of runs whose software was calibrated by measured ones, in standard deviations of what is left (`spread`): the 10th
and 90th percentile over 42 published tables, predicted by the planner as it was before anybody looked at them and calibrated on
1 to 8 of their rows; the percentiles hardly change with that number. benchmarks/calibration.py tells how often they hold."""

COUNTED = {"one worker": (0.90, 1.15), "replicas": (0.85, 1.35), "crowded": (0.75, 1.40), "other": (0.75, 1.75)}
"""Kind of plan -> measured over predicted, of jobs on the machine that was measured: 4 of 5 over eleven models on two cores
(benchmarks/results/regret.json). A run of the day before had "other" within 0.70 to 1.40: how long small messages take differs
between the moment of a probe and that of a training."""

KNOWN_PARTS = ("a100", "a800", *HOPPER, *BLACKWELL)
"""Parts with a share in most tables."""


def published_kind(case: Case) -> str:
    """The kind of published runs that a case is like: a key of `PUBLISHED`."""
    if not case.machine.accelerator.name.startswith(KNOWN_PARTS):
        return "other parts"
    if case.model.experts:
        return "experts"
    return "one node" if case.workers <= case.machine.gpus_per_node else "several nodes"


def step_range(case: Case) -> tuple[float, float]:
    """Between which multiples of its predicted step 4 of 5 runs like this one were measured."""
    left = spread(case)
    if left is None:
        return PUBLISHED[published_kind(case)]
    return math.exp(CALIBRATED[0] * left), math.exp(CALIBRATED[1] * left)


def range_source(case: Case) -> str:
    """What the range of a case is of."""
    if spread(case) is None:
        return f"4 of 5 published runs, {published_kind(case)}"
    return "4 of 5 runs, with as many measured ones of the same software and as like them"


def published_words(case: Case) -> str:
    """What 4 of 5 published runs of this kind took, over their predictions; with measured runs, 4 of 5 known as well."""
    low, high = step_range(case)
    if spread(case) is not None:
        return f"4 of 5 runs known as well, by measured ones, took {low:.2f} to {high:.2f} times their prediction"
    kind = published_kind(case)
    about = {"experts": "with experts", "other parts": "on other parts than A100 to B300"}.get(kind, f"on {kind}")
    return f"4 of 5 published runs {about} took {low:g} to {high:g} times their prediction"


def counted_words(kind: str) -> str:
    """The same of plans of jobs on the machine that was measured."""
    low, high = COUNTED[kind]
    return f"{low:.2f} to {high:.2f} times that (4 of 5)"


def counted_width(kind: str) -> float:
    """How far such a plan may be off to either side, as a share, its range taken as even on a scale of ratios."""
    low, high = COUNTED[kind]
    return float((high / low) ** 0.5 - 1.0)
