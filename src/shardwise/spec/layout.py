"""Layout: the degree of each mesh axis. The product of the degrees is the number of workers."""

from dataclasses import dataclass, fields
from functools import cached_property
from math import prod

from shardwise.errors import PlanError

AXES = ("pipeline", "data", "shard", "context", "expert", "tensor")
"""Mesh axes from the outermost (slowest links, furthest ranks) to the innermost (nearest ranks)."""

_HELP = (
    "write degrees of the axes " + ", ".join(sorted(AXES)) + ", such as data=2 or data=2,tensor=2, or the word serial"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ways each axis splits the work.

    Attributes:
        data: replicas that each take a part of every global batch.
        shard: sharded data parallel (FSDP2, ZeRO): as `data`, with parameters and states split.
        tensor: ways single weight matrices are split.
        pipeline: stages the layers are split into.
        context: ways the sequence is split.
        expert: ways the experts of mixture-of-experts layers are split.
    """

    data: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            degree = getattr(self, field.name)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise PlanError(f"layout {field.name}={degree!r}: a degree is a whole number of at least 1")

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Read the text form, `"data=2,tensor=2"` or `"serial"`.

        Raises:
            PlanError: an unknown axis, an axis given twice, or a degree that is not a whole number.
        """
        degrees: dict[str, int] = {}
        if text.strip() == "serial":
            return cls()
        for part in text.split(","):
            axis, equals, degree = (piece.strip() for piece in part.partition("="))
            if axis not in AXES or not equals:
                raise PlanError(f"layout {text!r}: {part.strip()!r} is not axis=degree; {_HELP}")
            if axis in degrees:
                raise PlanError(f"layout {text!r}: axis {axis} is given twice; {_HELP}")
            if not degree.isdecimal():
                raise PlanError(f"layout {text!r}: {degree!r} is no whole number; {_HELP}")
            degrees[axis] = int(degree)
        return cls(**degrees)

    @cached_property
    def workers(self) -> int:
        """Number of ranks: the product of all degrees."""
        return prod(self.degrees.values())

    @property
    def replicas(self) -> int:
        """Ways the samples of a global batch are split: `data * shard * expert`.

        Experts are spread over ranks that hold different samples, so the expert axis splits the batch as well.
        """
        return self.data * self.shard * self.expert

    @cached_property
    def degrees(self) -> dict[str, int]:
        """Every axis and its degree, outermost axis first."""
        return {axis: int(getattr(self, axis)) for axis in AXES}

    def __str__(self) -> str:
        shown = ("data", "shard", "tensor", "pipeline", "context", "expert")
        return ",".join(f"{axis}={self.degrees[axis]}" for axis in shown if self.degrees[axis] > 1) or "serial"


def layouts(workers: int) -> list[Layout]:
    """All layouts of 1 to `workers` workers, fewest workers first, then fewest axes."""
    found: list[dict[str, int]] = [{}]
    for axis in AXES:
        found += [
            {**degrees, axis: degree}
            for degrees in found
            for degree in range(2, workers // prod(degrees.values()) + 1)
        ]  # fmt: skip
    made = [Layout(**degrees) for degrees in found]
    return sorted(made, key=lambda layout: (layout.workers, sum(d > 1 for d in layout.degrees.values())))
