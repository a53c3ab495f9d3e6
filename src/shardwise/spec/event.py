"""Event: the form that all lines of `events.jsonl` have in common. The kinds are in `events` and `observations`."""

from __future__ import annotations

import json
import math
import time
from abc import ABC
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

VERSION = 1
"""Version of the event format; a reader refuses lines of a higher one."""

LOSS_DIGITS = 7
"""Significant digits kept of a loss or metric: what float32 resolves."""

SECONDS_DIGITS = 4
"""Significant digits kept of a duration; clocks and schedulers are no steadier than that."""

LOSS = {"digits": LOSS_DIGITS}
SECONDS = {"digits": SECONDS_DIGITS}


@dataclass(frozen=True, kw_only=True)
class Event(ABC):
    """What happened, and when. Subclasses are final, one a kind.

    Attributes:
        t: unix seconds.
    """

    kind: ClassVar[str]
    t: float = field(default_factory=time.time)

    def to_line(self) -> str:
        """The event as one line of JSON without the line end."""
        record: dict[str, Any] = {"v": VERSION, "t": round(self.t, 3), "kind": self.kind}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "t" and value is not None:
                digits = item.metadata.get("digits")
                record[item.name] = _plain(value, digits)
        return json.dumps(record, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _plain(value: Any, digits: int | None) -> Any:
    """JSON data of `value`; floats keep `digits` significant digits, all of them where None."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return repr(value)
        if digits is None:
            return value
        short = float(f"{value:.{digits}g}")
        return int(short) if short.is_integer() and abs(short) < 10**digits else short
    if isinstance(value, dict):
        return {str(key): _plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, digits) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
