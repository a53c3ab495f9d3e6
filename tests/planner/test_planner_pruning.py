"""Layouts that the search rules out by a bound instead of pricing them change none of its answers."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from shardwise.planner import catalogue
from shardwise.planner.case import Case
from shardwise.planner.search import Found, Problem, cases, search
from shardwise.planner.step import Estimate, Memo, estimate
from shardwise.spec.facts import Transformer

Key = tuple[int, ...]


def _key(case: Case) -> Key:
    return (case.data, case.tensor, case.pipeline, case.context, case.expert, case.zero_stage)


def _every_layout(problem: Problem) -> tuple[dict[Key, tuple[Case, Estimate]], dict[Key, tuple[Case, Estimate]]]:
    """The fastest layout of every setting of the degrees that fits, and the smallest of every one of which none does."""
    best: dict[Key, tuple[Case, Estimate]] = {}
    least: dict[Key, tuple[Case, Estimate]] = {}
    settled: tuple[object, ...] = ()
    memo = Memo()
    for case in cases(problem):
        setting = (*_key(case), case.micro_batch, case.schedule, case.virtual_stages)
        if setting == settled:
            continue
        found, key = estimate(case, quick=True, memo=memo), _key(case)
        if found.comfortable:
            settled = setting
            if key not in best or found.step_seconds < best[key][1].step_seconds:
                best[key] = case, found
        elif key not in least or found.memory.least < least[key][1].memory.least:
            least[key] = case, found
    return best, {key: item for key, item in least.items() if key not in best}


def _problems() -> Iterator[Problem]:
    """Models too large, too small and about right for their machine, of every kind of setting."""
    draw = random.Random(7)
    for number in range(14):
        heads, experts = draw.choice((8, 16, 32, 64)), draw.choice((0, 0, 8, 64))
        text = (
            f"{draw.choice(('gpt', 'llama'))}:layers={draw.choice((8, 24, 61, 80))},hidden={128 * heads},heads={heads}"
        )
        text += f",experts={experts},experts_per_token=2" * (experts > 0)
        workers = (8, 16, 24, 64)[number % 4]
        yield Problem(
            model=Transformer.parse(text)[0],
            machine=catalogue.machine(("v100-32gb-sxm", "a100-40gb-sxm", "h100-80gb-sxm")[number % 3]),
            workers=workers,
            seq_len=draw.choice((1024, 8192, 32768)),
            global_batch=draw.choice((1, 3, 8)) * workers,
            precision=("bf16", "fp16", "fp32")[number // 3 % 3],
            attention=("flash", "math")[number // 2 % 2],
        )


@pytest.fixture(scope="module")
def searches() -> list[tuple[Problem, Found]]:
    return [(problem, search(problem)) for problem in _problems()]


def test_every_answer_is_that_of_pricing_every_layout(searches: list[tuple[Problem, Found]]) -> None:
    smaller_rank = fitting = refused = 0
    for problem, found in searches:
        best, least = _every_layout(problem)
        plans = {_key(item.case): item.case for item in found.plans if item.case.workers == problem.workers}
        assert plans == {key: case for key, (case, _) in best.items()}, problem
        lost = {_key(item.case): item for item in found.too_large}
        assert lost.keys() == least.keys(), problem
        for key, (case, seen) in least.items():
            mine = lost[key]
            if mine.case != case:  # the fullest rank of the other one is another rank, and fuller
                smaller_rank += 1
                assert mine.estimate.memory.total <= seen.memory.total, (str(mine), str(case))
        fitting, refused = fitting + len(best), refused + len(least)
    assert fitting > 150 and refused > 150  # both kinds are there
    assert smaller_rank < 0.03 * refused


def test_what_is_ruled_out_counts(searches: list[tuple[Problem, Found]]) -> None:
    """The number of layouts tells how large the space is, not how it was gone through."""
    for problem, found in searches:
        settings = {(*_key(case), case.micro_batch, case.virtual_stages) for case in cases(problem)}
        assert found.priced >= len(settings)
