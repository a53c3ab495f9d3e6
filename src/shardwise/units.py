"""Sizes, rates and durations as people read them. Bytes are binary (GiB), rates decimal (TFLOP/s)."""

import math
import re

from shardwise.errors import UserError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_BYTE_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": 1024**4, "tib": 1024**4, "tb": 1000**4,
}  # fmt: skip
_SECOND_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def _quantity(text: str, units: dict[str, float], kind: str) -> float:
    match = _QUANTITY.fullmatch(text)
    unit = match.group(2).lower() if match else None
    if match is None or unit not in units:
        known = ", ".join(name for name in units if name)
        raise UserError(f"{text!r} is not a {kind}: write a number and one of {known}")
    return float(match.group(1)) * units[unit]


def parse_bytes(text: str) -> int:
    """`"80GiB"`, `"512m"` or `"1e9"` as a number of bytes; `k`, `m`, `g`, `t` alone are binary."""
    return round(_quantity(text, dict(_BYTE_UNITS), "size"))


def parse_seconds(text: str) -> float:
    """`"10m"`, `"30s"`, `"1.5h"` or `"20"` (seconds) as a number of seconds."""
    return _quantity(text, _SECOND_UNITS, "duration")


def format_bytes(size_bytes: float) -> str:
    """Three significant figures with a binary unit: `"1.50 GiB"`."""
    value, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{_three_figures(value)} {unit}"


def format_slower(share: float) -> str:
    """How a loser compares: `"it is 31 % slower than the winner"`, `"it takes 15.2 times as long as the winner"`."""
    if share > 1:
        return f"it takes {_three_figures(1 + share)} times as long as the winner"
    return f"it is {100 * share:.0f} % slower than the winner"


def format_seconds(seconds: float) -> str:
    """A duration with the unit that fits: `"3.10 ms"`, `"12.0 s"`, `"4 min 05 s"`, `"2 h 03 min"`."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 1e-3:
        return f"{_three_figures(seconds * 1e6)} us"
    if seconds < 1:
        return f"{_three_figures(seconds * 1e3)} ms"
    if seconds < 120:
        return f"{_three_figures(seconds)} s"
    whole = round(seconds)
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_rate(per_second: float, unit: str) -> str:
    """A decimal rate: `format_rate(3.2e12, "FLOP/s")` is `"3.20 TFLOP/s"`."""
    value, prefix = float(per_second), ""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000 or prefix == "P":
            break
        value /= 1000
    return f"{_three_figures(value)} {prefix}{unit}"


def _three_figures(value: float) -> str:
    magnitude = abs(value)
    if magnitude >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"


def format_count(value: float) -> str:
    """`3,132`, `214`, `14.5`, `0.023`: three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
