"""Cutting a row of work into stages: training does it with a model, planning with what was counted of one."""

from collections.abc import Sequence

SLACK = 1.05
"""The busiest stage may do this multiple of the least possible work, for cuts that fewer bytes cross. Chosen."""


def balanced(work: Sequence[float], penalties: Sequence[float], stages: int) -> list[int]:
    """Indices of the places to cut at: the busiest stage does (nearly) the least possible work, and among such cuts the sum of
    penalties is the smallest.

    Args:
        work: that is done before each place, from 0 at the first, which is the start, to all of it at the last, the end.
        penalties: of the places between; at least `stages - 1`.
    """
    return _cheapest(work, penalties, stages, _least_limit(work, stages) * SLACK)


def _least_limit(work: Sequence[float], stages: int) -> float:
    """The least possible work of the busiest stage, by halving; `work` is cumulative at the places for cuts."""
    low, high = 0.0, work[-1]
    for _ in range(60):
        middle = (low + high) / 2
        if _fits(work, stages, middle):
            high = middle
        else:
            low = middle
    return high


def _fits(work: Sequence[float], stages: int, limit: float) -> bool:
    """Whether `stages` stages of at most `limit` are enough."""
    used, start = 1, 0
    for index in range(1, len(work)):
        if work[index] - work[index - 1] > limit:
            return False
        if work[index] - work[start] > limit:
            used, start = used + 1, index - 1
    return used <= stages


def _cheapest(work: Sequence[float], penalties: Sequence[float], stages: int, limit: float) -> list[int]:
    """Indices of the places with the smallest sum of penalties such that no stage exceeds `limit`."""
    count = len(work)
    best: list[list[tuple[float, int]]] = [[(float("inf"), -1)] * count for _ in range(stages + 1)]
    best[0][0] = (0.0, -1)
    for stage in range(1, stages + 1):
        for end in range(stage, count):
            penalty = penalties[end - 1] if end < count - 1 else 0.0
            for start in range(end - 1, stage - 2, -1):
                if work[end] - work[start] > limit * (1 + 1e-9):
                    break
                total = best[stage - 1][start][0] + penalty
                if total < best[stage][end][0]:
                    best[stage][end] = (total, start)
    chosen: list[int] = []
    place = count - 1
    for stage in range(stages, 0, -1):
        place = best[stage][place][1]
        if place < 0:
            raise AssertionError("no cuts within the limit")
        chosen.append(place)
    return list(reversed(chosen))[1:]
