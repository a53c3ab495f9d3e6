"""What a sweep varies: the axes of its search space, as they stand after `--over`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from shardwise.errors import UserError
from shardwise.run.hyperparameters import HyperParameter

Setting = tuple[tuple[str, str], ...]
"""Names and texts of one combination, in the order of the axes."""

_FORM = "write NAME=A,B,C for choices, or NAME=LOW:HIGH with :log and :POINTS if wanted (lr=1e-4:1e-1:log:4)"
_DIGITS = 6
"""Significant digits of a value drawn from a range: what one can type again."""


@final
@dataclass(frozen=True)
class Axis:
    """One hyper-parameter and its values: choices, or a range with both ends.

    Attributes:
        log: values are spread evenly over their logarithm.
        whole: values are whole numbers.
        points: of a grid over the range; None where a range of whole numbers takes each.
    """

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    points: int | None = None

    def grid(self) -> tuple[str, ...]:
        """All values of a grid, as texts.

        Raises:
            UserError: a range of real numbers without a number of points.
        """
        if self.choices:
            return self.choices
        if self.points is None:
            if not self.whole or self.log:
                raise UserError(
                    f"--over {self.name}={self.low:g}:{self.high:g}: a grid over a range needs its number of points: "
                    f"add :5, or use --search random"
                )
            return tuple(str(value) for value in range(int(self.low), int(self.high) + 1))
        last = max(1, self.points - 1)
        texts = (self._text(self._at(step / last)) for step in range(self.points))
        return tuple(dict.fromkeys(texts))

    def draw(self, chance: float) -> str:
        """The value at a random number from 0 (included) to 1."""
        if self.choices:
            return self.choices[min(len(self.choices) - 1, int(chance * len(self.choices)))]
        if self.whole and not self.log:
            return str(min(int(self.high), int(self.low + chance * (self.high - self.low + 1))))
        return self._text(self._at(chance))

    def _at(self, part: float) -> float:
        if self.log:
            return math.exp(math.log(self.low) + part * (math.log(self.high) - math.log(self.low)))
        return self.low + part * (self.high - self.low)

    def _text(self, value: float) -> str:
        return str(round(value)) if self.whole else repr(float(f"{value:.{_DIGITS}g}"))


def parse_over(texts: Sequence[str], parameters: Mapping[str, HyperParameter], job: str) -> tuple[Axis, ...]:
    """`("lr=0.1,0.03", "width=1:4")` as axes, each value checked against the job function's parameter.

    Raises:
        UserError: what was written, the form, and what the job has.
    """
    axes: dict[str, Axis] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip()
        if not equals or not name or not values.strip():
            raise UserError(f"--over {text!r}: {_FORM}")
        if name not in parameters:
            known = ", ".join(str(parameter) for parameter in parameters.values()) or "none"
            raise UserError(f"--over {name}: job {job} has no hyper-parameter {name!r}: it has {known}")
        if name in axes:
            raise UserError(f"--over {name} is given twice: give all its values at once")
        axes[name] = _axis(name, values.strip(), parameters[name])
    return tuple(axes.values())


def _axis(name: str, values: str, parameter: HyperParameter) -> Axis:
    if ":" not in values:
        choices = tuple(dict.fromkeys(part.strip() for part in values.split(",") if part.strip()))
        for choice in choices:
            parameter.convert(choice)
        return Axis(name, choices)
    low_text, high_text, *rest = (part.strip() for part in values.split(":"))
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        raise UserError(f"--over {name}={values}: the ends of a range are numbers; {_FORM}") from None
    log = "log" in rest
    points = [part for part in rest if part != "log"]
    if len(points) > 1 or (points and not points[0].isdecimal()) or (points and int(points[0]) < 1):
        raise UserError(f"--over {name}={values}: {_FORM}")
    if not low < high or not math.isfinite(low) or not math.isfinite(high):
        raise UserError(f"--over {name}={values}: the low end comes first, and is below the high end")
    if log and low <= 0:
        raise UserError(f"--over {name}={values}: a range over logarithms starts above 0")
    whole = parameter.kind is int or (parameter.kind is not float and low_text.isdecimal() and high_text.isdecimal())
    axis = Axis(name, (), low, high, log, whole, int(points[0]) if points else None)
    for part in (0.0, 1.0):
        parameter.convert(axis.draw(part))
    return axis


def all_combinations(axes: Sequence[Axis]) -> list[Setting]:
    """The grid: every combination, the last axis varying fastest."""
    names = [axis.name for axis in axes]
    return [tuple(zip(names, texts, strict=True)) for texts in itertools.product(*(axis.grid() for axis in axes))]


def shown(setting: Setting) -> str:
    """`lr=0.1 width=2`."""
    return " ".join(f"{name}={text}" for name, text in setting) or "(nothing varied)"


def brief(failure: str) -> str:
    """A failure in one line: its first one, and the last one where the first announces more (`... failed:`)."""
    lines = [line.strip() for line in failure.splitlines() if line.strip()] or ["no reason was given"]
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
