"""Tables of training runs in the canonical columns: read what describes a run, never what was measured.

Only the columns in `INPUTS` reach the predictor; measured columns and free text are dropped while reading, before any
row is looked at, so that a prediction cannot depend on them.
"""

import csv
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from shardwise.errors import DataError

WHOLE = (
    "gpus",
    "gpus_per_node",
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "ffn_hidden",
    "vocab",
    "experts",
    "experts_per_token",
    "seq_len",
    "global_batch",
    "micro_batch",
    "data",
    "zero_stage",
    "tensor",
    "pipeline",
    "virtual_stages",
    "context",
    "expert",
)
FLAGS = ("gated_ffn", "tied_embeddings", "sequence_parallel", "compile")
REAL = ("internode_gbps_per_gpu",)
WORDS = ("hardware", "recompute", "attention", "precision", "schedule")
INPUTS = ("run_id", *WORDS, *REAL, *WHOLE, *FLAGS)
"""Columns a prediction may use."""

MEASURED = ("status", "step_seconds", "tokens_per_s_per_gpu", "memory_gib", "tflops_per_gpu", "note")
"""Columns that hold or tell outcomes; no prediction reads them (`planner/measured.py` does, of runs given for that)."""

LABELS = ("source", "group")
"""Columns that label rows; not read either."""

FILLERS = ("num", "n", "size", "dim", "parallel", "degree", "count")
"""Words that others put before or behind the names of columns."""

ALIKE = 0.8
"""Share of letters in common (difflib) from which a column that means nothing is taken for a misspelt one."""

REQUIRED = ("run_id", "hardware", "layers", "hidden", "seq_len")
CHOICES = {
    "recompute": {"none": "none", "selective": "selective", "full": "full"},
    "attention": {"flash": "flash", "math": "math"},
    "precision": {
        "fp32": "fp32",
        "tf32": "fp32",
        "fp16": "fp16",
        "bf16": "bf16",
        "pure-bf16": "pure-bf16",
        "pure_bf16": "pure-bf16",
        "bf16-true": "pure-bf16",
        "fp8": "fp8",
        "mxfp8": "fp8",
        "fp4": "fp4",
        "nvfp4": "fp4",
    },
    "schedule": {
        "gpipe": "gpipe",
        "1f1b": "1f1b",
        "interleaved": "interleaved1f1b",
        "interleaved1f1b": "interleaved1f1b",
        "zerobubble": "zerobubble",
        "zb-h1": "zerobubble",
        "zbv": "zbv",
        "zb-v": "zbv",
        "dualpipev": "dualpipev",
        "dualpipe": "dualpipev",
    },
}
SYNONYMS = {
    "recompute": {
        "selective": r"select|partial|attn|attention|\bop\b",
        "none": r"^(no|off|false|0|without)\b",
        "full": r"full|block|uniform|every|layer|^(yes|on|true|1)\b",
    },
    "attention": {
        "flash": r"flash|fa[ -]?[1-4]|sdpa|cudnn|xformers|efficient|triton|fused|splash|^te$",
        "math": r"math|torch|eager|naive|standard|core|materiali|vanilla|unfused",
    },
    "precision": {
        "fp4": r"fp4|e2m1|4[ -]?bit",
        "fp8": r"fp8|float8|mx|e4m3|int8|8[ -]?bit",
        "pure-bf16": r"(pure|only|alone|true|all).*(bf16|bfloat)|(bf16|bfloat).*(pure|only|alone|true|no master)",
        "bf16": r"bf16|bfloat",
        "fp16": r"fp16|float16|half|mixed|amp|16",
        "fp32": r"fp32|float32|tf32|single|32",
    },
    "schedule": {
        "dualpipev": r"dual",
        "zbv": r"zb[ -]?v|zero.*v\b",
        "zerobubble": r"zero|zb",
        "interleaved1f1b": r"interleav|looped|virtual|bfs|breadth",
        "gpipe": r"gpipe|afab|fthenb|all.?forward",
        "1f1b": r"1f1b|pipedream|one.?f|dapple",
    },
    "zero_stage": {
        "3": r"fsdp|full.?shard|hsdp|hybrid.?shard|(zero|stage)\D?3",
        "2": r"shard.?grad|(zero|stage)\D?2",
        "1": r"distributed.?opt|(zero|stage)\D?1",
        "0": r"^(ddp|no|none|off|no.?shard)$|(zero|stage)\D?0",
    },
    "gated_ffn": {"1": r"glu", "0": r"gelu|relu"},
    "flags": {"1": r"^(yes|true|on|y|t)$", "0": r"^(no|false|off|n|f)$"},
}
"""Other words for the same, tried in this order where a cell holds none of the canonical ones and guessing is allowed."""

BLANKS = ("", "-", "?", "na", "n/a", "nan", "unknown", "none stated", "null", "not stated")
ZERO_ALLOWED = ("experts", "experts_per_token", "zero_stage")

Row = Mapping[str, str | int | float]
"""What is known of one run: blanks are left out."""


def read_runs(path: Path, *, strict: bool = True) -> list[Row]:
    """Read the describing columns of a table; lines that start with `#` are comments.

    Args:
        strict: refuse a table with a cell that is not of its kind. Otherwise such a cell is read as its nearest meaning
            or as unknown, and the row says so under the key `assumed`.

    Raises:
        DataError: the file is missing or not a table, a required column is absent, a run_id is repeated, or (strict) a
            cell is not of its kind or a run_id is blank; the message names the file, the line and the column.
    """
    return rows_of(read_table(path), str(path), strict=strict)


Table = tuple[list[str], list[tuple[int, list[str]]]]
"""Names of the columns, and for every row its line and its cells."""


def read_table(path: Path) -> Table:
    """The cells of a table as text.

    Raises:
        DataError: the file is missing or not a table, or a column is there twice.
    """
    try:
        with path.open("rb") as raw:
            encoding = "utf-16" if raw.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        with path.open(newline="", encoding=encoding) as handle:
            return parse_table(handle, str(path))
    except OSError as error:
        raise DataError(f"table {path}: {error.strerror}; give a CSV file in the canonical columns") from error
    except UnicodeError as error:
        raise DataError(f"table {path} is no text in UTF-8 or UTF-16: {error}; save it as CSV UTF-8") from error


def parse_runs(lines: Iterable[str], name: str, *, strict: bool = True) -> list[Row]:
    """As `read_runs`, from lines of text; `name` is used in messages."""
    return rows_of(parse_table(lines, name), name, strict=strict)


def parse_table(lines: Iterable[str], name: str) -> Table:
    """As `read_table`, from lines of text."""
    numbered = [(number, line) for number, line in enumerate(lines, 1) if not line.startswith("#") and line.strip()]
    delimiter = _delimiter(numbered[0][1]) if numbered else ","
    reader = csv.reader((line for _, line in numbered), delimiter=delimiter)
    try:
        table = list(reader)
    except csv.Error as error:
        raise DataError(f"table {name}: {error}") from error
    if not table:
        raise DataError(f"table {name} is empty: the first line that is no comment names the columns")
    header = [column.strip().lower() for column in table[0]]
    if delimiter == ";":  # spreadsheets write it where the comma is the decimal point
        keep = header.index("run_id") if "run_id" in header else -1
        table = [[cell if at == keep else _decimal_point(cell) for at, cell in enumerate(cells)] for cells in table]
    doubled = [column for column in set(header) if header.count(column) > 1]
    if doubled:
        raise DataError(f"table {name}: column {doubled[0]!r} is there twice")
    places = [number for number, _ in numbered] if len(numbered) == len(table) else list(range(1, len(table) + 1))
    cells = [(number, row) for number, row in zip(places, table, strict=True) if any(cell.strip() for cell in row)]
    return header, cells[1:]  # without lines of separators, as spreadsheets leave them under a table


def rows_of(table: Table, name: str, *, strict: bool = True) -> list[Row]:
    """The describing columns of the rows of a table; see `read_runs`."""
    header, lines = table
    required = REQUIRED if strict else REQUIRED[:1]
    missing = [column for column in required if column not in header]
    if missing:
        raise DataError(f"table {name}: column {missing[0]!r} is missing; required are {', '.join(required)}")
    rows: list[Row] = []
    seen: set[str] = set()
    for number, cells in lines:
        row = _row(header, cells, f"table {name}, line {number}", number, strict)
        run = str(row["run_id"])
        if run in seen:
            where = f"table {name}, line {number}, column run_id"
            raise DataError(f"{where}: {run!r} is there twice; every run needs its own")
        seen.add(run)
        rows.append(row)
    return rows


def misspelt_columns(header: Iterable[str]) -> dict[str, str]:
    """Column that means nothing -> the canonical one that it looks like, where the table has no column of that name."""
    names = list(header)
    known = (*INPUTS, *MEASURED, *LABELS)
    plain = {name.replace("_", ""): name for name in known if name not in names}
    found: dict[str, str] = {}
    for column in names:
        if column and column not in known:
            bare = "".join(word for word in re.split(r"[\W_]+", column) if word not in FILLERS)
            near = difflib.get_close_matches(bare, plain, 1, ALIKE)
            if near:
                found[column] = plain[near[0]]
    return found


def _delimiter(header: str) -> str:
    """What separates the columns: a comma, a semicolon or a tab, whichever the header line has most of."""
    return max((",", ";", "\t"), key=header.count)


def _decimal_point(cell: str) -> str:
    return cell.replace(",", ".") if re.fullmatch(r"\s*-?\d+,\d+\s*", cell) else cell


def _row(header: list[str], cells: list[str], where: str, number: int, strict: bool) -> Row:
    if len(cells) != len(header) and strict:
        raise DataError(f"{where}: {len(cells)} cells for {len(header)} columns")
    row: dict[str, str | int | float] = {}
    told: list[str] = []
    if len(cells) != len(header):
        told.append(f"{len(cells)} cells for {len(header)} columns: missing ones are unknown, others ignored")
    for column, text in zip(header, cells, strict=False):
        if column not in INPUTS:
            continue
        try:
            value = _cell(column, text, where)
        except DataError:
            if strict:
                raise
            value = _in_terms_of_others(column, text, row) or _guess(column, text)
            told.append(f"{column} {text.strip()!r} is read as {'unknown' if value is None else value}")
        if value is not None:
            row[column] = value
    if "run_id" not in row:
        if strict:
            raise DataError(f"{where}, column run_id: blank; every run needs its own")
        row["run_id"] = f"line-{number}"
    if told:
        row["assumed"] = "; ".join(told)
    return row


def _in_terms_of_others(column: str, text: str, row: Mapping[str, str | int | float]) -> int | None:
    """A batch in tokens as sequences, an inner width in hidden widths; None if it is neither or the other is not known yet."""
    text = text.strip().lower()
    times = re.match(r"(\d+(?:\.\d+)?)\s*\*?\s*(h|d)\b", text)
    if column == "ffn_hidden" and times and "hidden" in row:
        return round(float(times.group(1)) * int(row["hidden"]))
    if column in ("global_batch", "micro_batch") and "tok" in text and "seq_len" in row:
        tokens = _guess(column, text)
        return max(1, round(int(tokens) / int(row["seq_len"]))) if isinstance(tokens, int) else None
    return None


def _guess(column: str, text: str) -> str | int | float | None:
    """The nearest meaning of a cell that is not of its kind; None if it has none."""
    text = text.strip().lower()
    if text in BLANKS:
        return None
    words = [*SYNONYMS.get(column, {}).items(), *(SYNONYMS["flags"].items() if column in FLAGS else ())]
    for meaning, pattern in words:
        if re.search(pattern, text):
            return meaning if column in CHOICES else int(meaning)
    if column in CHOICES or column in FLAGS:
        return None
    number = re.match(r"([-+]?\d[\d,_]*(?:\.\d+)?(?:e[-+]?\d+)?)\s*(x\s*\d+|[km](?![a-z])|(?=.*tok))?", text)
    if number is None:
        return None
    value = float(number.group(1).replace(",", "").replace("_", ""))
    if column in REAL:
        return value if value > 0 and not (number.group(2) or "").startswith("x") else None
    if number.group(2) in ("k", "m"):
        value *= (1000.0 if column == "vocab" else 1024.0) ** (1 if number.group(2) == "k" else 2)
    low = 0 if column in ZERO_ALLOWED else 1
    whole = round(value)
    return whole if low <= whole <= (3 if column == "zero_stage" else 10**9) else None


def _cell(column: str, text: str, where: str) -> str | int | float | None:
    """The value of one cell; None for a blank one."""
    text = text.strip()
    if not text:
        return None
    here = f"{where}, column {column}"
    if column in CHOICES:
        known = CHOICES[column]
        if text.lower() not in known:
            raise DataError(f"{here}: {text!r} is not one of {', '.join(known)}; leave it blank if unknown")
        return known[text.lower()]
    if column in ("run_id", "hardware"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{here}: {text!r} is not a number; leave it blank if unknown")
    if column in REAL:
        if value < 0:
            raise DataError(f"{here}: {text!r} must not be negative; leave it blank if unknown")
        return value if value else None
    whole = round(value)
    low = 0 if column in FLAGS or column in ZERO_ALLOWED else 1
    high = {"zero_stage": 3}.get(column, 1 if column in FLAGS else 10**9)
    if whole != value or not low <= whole <= high:
        raise DataError(f"{here}: {text!r} must be a whole number from {low} to {high}; leave it blank if unknown")
    return whole
