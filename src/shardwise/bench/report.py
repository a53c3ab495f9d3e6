"""Where a result is kept: `bench.json`, and the page `report.html` where the libraries for it are installed."""

from __future__ import annotations

import json
from pathlib import Path

from shardwise.bench.result import FILE_NAME, Bench
from shardwise.errors import UserError

PAGE_NAME = "report.html"
EXTRA = "report"


def write_result(bench: Bench, out: Path) -> list[str]:
    """Write everything into the folder; the lines say what is where.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        text = json.dumps(bench.to_dict(), indent=1, default=str)
        (out / FILE_NAME).write_text(text + "\n", encoding="utf-8")
        lines = [f"result      {out / FILE_NAME}"]
        try:
            from shardwise.bench.page import make_page  # matplotlib takes a second to load
        except ImportError as error:
            missing = error.name or str(error)
            return [*lines, f"no report: {missing} is not installed; pip install 'shardwise[{EXTRA}]' and bench again"]
        (out / PAGE_NAME).write_text(make_page(bench), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from error
    return [*lines, f"report      {out / PAGE_NAME}"]
