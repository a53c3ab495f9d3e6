"""A curve of bounded size that grows with the run: neighbours are merged when there are too many points."""

from __future__ import annotations

import math
from typing import final

MOST_POINTS = 512


@final
class Curve:
    """Mean, lowest and highest value over equal stretches of steps.

    Args:
        most: points kept; a stretch gets twice as long whenever there would be more.
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most = most
        self._width = 1
        self._buckets: dict[int, list[float]] = {}  # stretch -> sum, count, lowest, highest, last step

    def add(self, step: int, value: float) -> None:
        """A value of a step; what is no number is left out."""
        if not math.isfinite(value):
            return
        self._put(step // self._width, [value, 1.0, value, value, step])
        while len(self._buckets) > self._most:
            self._width *= 2
            old, self._buckets = self._buckets, {}
            for place, bucket in old.items():
                self._put(place // 2, bucket)

    def forget_from(self, step: int) -> None:
        """Steps from this one on were taken back: the run was started again before them."""
        self._buckets = {place: bucket for place, bucket in self._buckets.items() if place * self._width < step}

    def points(self) -> list[tuple[int, float, float, float]]:
        """(last step of the stretch that had a value, mean, lowest, highest), in the order of the steps."""
        return [
            (int(step), total / count, low, high)
            for _, (total, count, low, high, step) in sorted(self._buckets.items())
        ]

    def _put(self, place: int, new: list[float]) -> None:
        old = self._buckets.get(place)
        if old is None:
            self._buckets[place] = new
            return
        old[0] += new[0]
        old[1] += new[1]
        old[2] = min(old[2], new[2])
        old[3] = max(old[3], new[3])
        old[4] = max(old[4], new[4])
