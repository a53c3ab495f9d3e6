"""Which parameters are split over the ranks, and how: plain data that prints itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, final

from shardwise.units import format_bytes


@final
@dataclass(frozen=True, kw_only=True)
class Share:
    """How one parameter is split.

    Attributes:
        dim: the dim that is cut.
        outer: number of equal blocks along it, of each of which a rank has its share (3 for a fused query-key-value
            projection).
    """

    dim: int
    outer: int = 1


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """What becomes of one module's parameters.

    Attributes:
        module: its name; empty for the model itself.
        kind: its class.
        how: `column` (outputs are split), `row` (inputs are split, outputs are summed), `vocabulary` (entries are split),
            `along` (goes with a split layer), or `whole`.
        bytes_saved: parameter bytes that a rank does not hold.
        why: why it is left whole, or what else is worth knowing.
    """

    module: str
    kind: str
    how: str
    bytes_saved: int = 0
    why: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """How a model is split over the tensor axis.

    Attributes:
        ranks: degree of the axis.
        shares: parameter name -> its split; a parameter that is not listed is whole on every rank.
        rows: every module that was looked at.
        inside: modules that are given or return pieces: no boundaries of other kinds (shard units) may lie there.
        remarks: what will not equal the serial run, one sentence each.
    """

    ranks: int
    shares: dict[str, Share]
    rows: tuple[Row, ...]
    inside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def bytes_saved(self) -> int:
        """Parameter bytes that a rank does not hold."""
        return sum(row.bytes_saved for row in self.rows)

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        modules = sum(row.how != "whole" for row in self.rows)
        saved = format_bytes(self.bytes_saved)
        return f"tensor={self.ranks} splits {modules} of {len(self.rows)} modules and saves {saved} of parameters on each rank"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> TensorPlan:
        """Build from plain data."""
        return cls(
            ranks=record["ranks"],
            shares={name: Share(**share) for name, share in record["shares"].items()},
            rows=tuple(Row(**row) for row in record["rows"]),
            inside=tuple(record["inside"]),
            remarks=tuple(record["remarks"]),
        )

    def __str__(self) -> str:
        header = ("module", "kind", "split", "saved", "why")
        cells = [
            (
                row.module or "(model)",
                row.kind,
                row.how,
                format_bytes(row.bytes_saved) if row.bytes_saved else "",
                row.why,
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header) - 1)]
        lines = [
            "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
            for line in [header, *cells]
        ]
        lines.append(self.summary)
        return "\n".join([*lines, *self.remarks])
