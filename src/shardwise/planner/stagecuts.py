"""Layers of every pipeline stage where they need not be equal: the ends have an embedding and an output projection too."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from shardwise.planner.case import Case
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.step import Estimate, estimate
from shardwise.spec.schedule import rank_of

WORTH = 1.001
"""Unequal stages are taken where they are faster by this factor: equal ones are simpler to set up."""


def best_cuts(case: Case, constants: Constants = DEFAULT) -> tuple[Case, Estimate]:
    """The case with the layers a stage that make it fastest and fit, and its estimate; the usual cuts unless others pay.

    Others are weighed by the closed form; the best of them and the usual ones are simulated.
    """
    usual = case, estimate(case, constants)
    if case.pipeline == 1:
        return usual
    quick = estimate(case, constants, quick=True).step_seconds
    others = [(item, estimate(item, constants, quick=True)) for item in _others(case)]
    worth = 1.0 / WORTH if 0 in case.layers_per_stage[:-1] else WORTH  # a stage with nothing to do is no use
    fitting = [one for one in others if one[1].comfortable and worth * one[1].step_seconds < quick]
    if not fitting:
        return usual
    item = min(fitting, key=lambda one: one[1].step_seconds)[0]
    found = estimate(item, constants)
    return (item, found) if found.comfortable and worth * found.step_seconds < usual[1].step_seconds else usual


def _others(case: Case) -> Iterator[Case]:
    """Fewer layers for the ranks with the ends, by up to what the output projection is worth; the rest as even as can be.

    With several stages a rank the end's own stage is the first to give up layers. (Megatron-LM: `pipeline-model-parallel-layout`,
    `decoder-first-pipeline-num-layers` and `-last-`; torchtitan: `input_weight` and `output_weight`.)
    """
    stages = case.pipeline * case.virtual_stages
    layers, last = case.model.layers, stages - 1
    most = -(-layers // stages)
    for behind, ahead in product(range(min(most, math.ceil(case.head_in_layers) + 1) + 1), (0, 1)):
        ends = {
            0: max(1, layers // stages - ahead),
            last: most - behind,
        }  # the last one may have the output projection alone
        left, between = layers - sum(ends.values()), stages - 2
        if between < 1 or left < between:
            continue
        counts = [ends.get(stage, left // between) for stage in range(stages)]
        for _ in range(
            left % between
        ):  # what does not divide goes to stages of the ranks that have the least, early ones first
            order = list(zip(counts, _by_rank(case, counts), strict=True))
            counts[min(range(1, last), key=order.__getitem__)] += 1
        if tuple(counts) != case.layers_per_stage:
            yield replace(case, stage_layers=tuple(counts))


def _by_rank(case: Case, counts: list[int]) -> list[float]:
    """For every stage the layers of its rank, the output projection counted as what it is worth."""
    found = [0.0] * case.pipeline
    ranks = [rank_of(stage, case.pipeline, case.schedule) for stage in range(len(counts))]
    for rank, count in zip(ranks, counts, strict=True):
        found[rank] += count
    found[ranks[-1]] += case.head_in_layers
    return [found[rank] for rank in ranks]
