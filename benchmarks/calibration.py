"""What a few measured runs are worth: learn from some rows of every published table, predict the others; docs/calibration.md.

    python benchmarks/calibration.py [--tables ../shared/tables] [--sealed] [--draws 10]

For every table 1, 3, 5 or 8 of its rows are chosen at random (seeded), `shardwise.planner.calibrate` learns from them as
`shardwise predict --measured` does, and the other rows are predicted with and without. Tables of set E, of which nobody has
looked at a row beside its prediction, are scored with `--sealed` alone, and only what they give together is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from heldout import PUBLISHED
from published_sets import SEALED
from scoring import SOURCES, SWEEP, cluster_machine, percent
from shardwise.errors import UserError
from shardwise.planner.calibrate import Sample, calibrate, sample
from shardwise.planner.confidence import PUBLISHED as RANGES
from shardwise.planner.confidence import published_kind, step_range
from shardwise.planner.measured import MeasuredRow, read_measured
from shardwise.planner.predict import printed_bytes, resolve
from shardwise.planner.repair import repair
from shardwise.spec.machine import Machine
from shardwise.spec.software import Software

RESULTS = Path(__file__).parent / "results" / "calibration.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "calibration.md"
COUNTS = (1, 3, 5, 8)
MOST = 60
"""Other rows of a table that one draw predicts, chosen at random where there are more."""
WORSE = 0.01
"""A table gets worse where its median error grows by more than this."""
ODD = 3.0
"""What one measured step is multiplied by to see what a slip does."""
ROWS = 1000
"""Rows of a table at most that are resolved, chosen at random."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Table:
    """The measured rows of one table, resolved without calibration."""

    name: str
    samples: list[Sample]
    machine: Machine | None


def read_table(path: Path, machine: Machine | None) -> Table:
    """Rows of any number are read: the limit of `read_measured` is for one calibration."""
    from shardwise.planner import measured

    measured.MOST = 10**9
    found = []
    rows = [run for run in read_measured(path) if run.step_seconds or run.memory_bytes]
    for run in random.Random(0).sample(rows, ROWS) if len(rows) > ROWS else rows:
        try:
            found += sample([run], machine)
        except UserError:
            continue  # a row without an answer
    return Table(path.stem, found, machine)


def draw(table: Table, count: int, seed: int, kind: str, slip: bool = False) -> Figures | None:
    """Errors of the other rows without and with what `count` rows teach, `kind` being `step` or `memory`; None for too few."""
    usable = [item for item in table.samples if _measured(item.run, kind) is not None]
    if len(usable) < count + 2:
        return None
    chance = random.Random(f"{table.name} {count} {seed} {kind}")
    chance.shuffle(usable)
    known, others = usable[:count], usable[count : count + MOST]
    if slip:
        first = known[0]
        known = [replace(first, run=replace(first.run, step_seconds=ODD * (first.run.step_seconds or 0.0))), *known[1:]]
    try:
        software = calibrate(known, table.name)
    except UserError:  # refused: the row is no matter of software
        software = Software()
    before, after, inside, narrow = [], [], [], []
    for item in others:
        case, found = resolve(repair(item.run.row)[0], table.machine, software=software)
        truth = _measured(item.run, kind) or math.nan
        if kind == "memory":
            before.append(abs(printed_bytes(item.case, item.estimate.memory) / truth - 1.0))
            after.append(abs(printed_bytes(case, found.memory) / truth - 1.0))
            continue
        before.append(abs(item.estimate.step_seconds / truth - 1.0))
        after.append(abs(found.step_seconds / truth - 1.0))
        low, high = step_range(case)
        inside.append(low <= truth / found.step_seconds <= high)
        plain = RANGES[published_kind(item.case)]
        narrow.append((math.log(high / low), math.log(plain[1] / plain[0])))
    told = {"before": statistics.median(before), "after": statistics.median(after)}
    if kind == "step":
        told |= {
            "inside": statistics.mean(inside),
            "width": statistics.mean(width for width, _ in narrow),
            "plain width": statistics.mean(width for _, width in narrow),
        }
    return told


def _measured(run: MeasuredRow, kind: str) -> float | None:
    return run.step_seconds if kind == "step" else run.memory_bytes


def score(tables: Sequence[Table], count: int, draws: int, kind: str, slip: bool = False) -> Figures | None:
    """Mean over tables of what the draws give in the mean, and the share of tables that get worse."""
    means: list[Figures] = []
    for table in tables:
        found = [draw(table, count, seed, kind, slip) for seed in range(draws)]
        kept = [item for item in found if item is not None]
        if kept:
            means.append({name: statistics.mean(item[name] for item in kept) for name in kept[0]})
    if not means:
        return None
    whole = {name: statistics.mean(item[name] for item in means) for name in means[0]}
    worse = statistics.mean(item["after"] > item["before"] + WORSE for item in means)
    return {
        **whole,
        "worse": worse,
        "better": statistics.mean(item["after"] < item["before"] - WORSE for item in means),
    } | {"tables": len(means)}


def lines_of(results: dict[str, dict[str, Figures]]) -> list[str]:
    """One line for each set and number of measured rows."""
    lines = [
        "| tables | measured rows | error without | with | tables better | worse | in the range "
        "| its ends apart: without | with |",
        "|---" * 9 + "|",
    ]
    for name, found in results.items():
        for key, told in found.items():
            ranges = [
                percent(told["inside"]),
                *(f"{math.exp(told[width]):.2f} times" for width in ("plain width", "width")),
            ]
            cells = [
                f"{name} ({told['tables']:.0f})",
                key,
                *(percent(told[side]) for side in ("before", "after", "better", "worse")),
            ]
            lines.append("| " + " | ".join([*cells, *ranges]) + " |")
    return lines


def memory_lines(results: dict[str, dict[str, Figures]]) -> list[str]:
    """The same of memory."""
    lines = ["| tables | measured rows | error without | with | tables better | worse |", "|---" * 6 + "|"]
    for name, found in results.items():
        for key, told in found.items():
            cells = [
                f"{name} ({told['tables']:.0f})",
                key,
                *(percent(told[side]) for side in ("before", "after", "better", "worse")),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def measure(tables: Sequence[Table], draws: int, name: str) -> dict[str, dict[str, dict[str, Figures]]]:
    """All figures of one set of tables: kind -> set -> number of rows -> figures."""
    step = {str(count): score(tables, count, draws, "step") for count in COUNTS}
    step["5, one of them 3 times too long"] = score(tables, 5, draws, "step", slip=True)
    memory = {str(count): score(tables, count, draws, "memory") for count in COUNTS[:3]}
    return {
        kind: {name: {key: told for key, told in found.items() if told is not None}}
        for kind, found in (("step", step), ("memory", memory))
    }


INTRODUCTION = """# What a few measured runs are worth

Generated by `python benchmarks/calibration.py`; do not edit. Predictions see a configuration and not the software that runs
it: [heldout.md](heldout.md) says how far they are off. `shardwise plan --measured` and `predict --measured` learn from runs that
a user measured ([planner.md](planner.md#measured-runs)). Here 1, 3, 5 or 8 rows of each published table are the measured ones,
chosen at random in {draws} ways, and the other rows of the table are predicted. Error is the median over rows of
|predicted / measured - 1|, its mean over draws and tables. A table gets better or worse where its error changes by more than a
percentage point. The range is the one between which 4 of 5 runs should lie; its ends apart are its upper end over its lower one.

"Looked at" are the tables that the formulas were developed on, so that little is left there for software to explain. "E" are
those of which nobody has looked at a row beside its prediction: **that is what to expect of one's own runs**. The form was
settled before; E was scored once.
"""

ENDING = """
## How it was chosen

On 42 tables predicted by the planner as it was before anybody looked at their rows (commits 371a3ad for A and B, 6945dab
for C, 3878c1f for D, which [heldout.md](heldout.md) explains), where errors are those of a newcomer, 23 %. Mean over tables of
the median error of the other rows, with 1, 3, 5 and 8 measured ones:

| form | 1 | 3 | 5 | 8 |
|---|---|---|---|---|
| nothing | 23.1 % | 23.2 % | 23.6 % | 22.3 % |
| one factor, noise normal | 25.0 % | 19.8 % | 19.7 % | |
| one factor, noise with long tails | 19.3 % | 17.1 % | 16.7 % | |
| and one for the network | 19.2 % | 16.9 % | 16.3 % | |
| and one for the host's launches | 19.1 % | 16.5 % | 15.7 % | 15.4 % |
| one factor, and likeness | 19.1 % | 15.8 % | 13.9 % | 12.4 % |
| one factor, the network, and likeness: what is used | 18.7 % | 15.2 % | 13.3 % | 12.1 % |

Likeness is the regression of `planner/software.py`: what a run has of its own is handed on to runs with about the same numbers
of GPUs, ranks, layers and tokens. It is worth more than further factors (pipeline waits, gradients, shards, optimizer: 0.5
points at most), and how alike counts for how much hardly matters (distances halved or doubled: 0.3 points). On memory a factor
on activations alone, or bytes added, did worse than one on all.

What gets better is how long a step is said to take, not which layout is taken: on the groups of layouts in these tables the one
predicted fastest took in the mean 12 to 15 % longer than the fastest, with 1 to 8 measured rows as without (12.3 and 11.8 % with
one, 15.1 and 14.1 % with five; on the tables that were looked at 13.9 and 14.3 %, 12.3 and 15.9 %).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "tables")
    parser.add_argument("--sealed", action="store_true", help="score set E too, and keep what comes out")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--page", action="store_true", help="only write the page anew, from what is kept")
    given = parser.parse_args()
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"step": {}, "memory": {}}
    for results in [] if given.page else _scored(given.tables, given.draws, given.sealed):
        for kind, told in results.items():
            kept[kind].update(told)
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    page = [INTRODUCTION.format(draws=given.draws), "## Steps", "", *lines_of(kept["step"])]
    page += ["", "## Memory", "", *memory_lines(kept["memory"])]
    PAGE.write_text("\n".join(page) + "\n" + ENDING, encoding="utf-8")


def _scored(tables: Path, draws: int, sealed: bool) -> list[dict[str, dict[str, dict[str, Figures]]]]:
    """Figures of the tables that were looked at, and of set E where it is asked for."""
    cluster = cluster_machine(tables)
    seen = [read_table(tables / f"{name}.csv", cluster if name == SWEEP else None) for name in SOURCES]
    paths = sorted(PUBLISHED.glob("*.csv"))
    seen += [read_table(path, None) for path in paths if path.stem not in SEALED]
    found = [measure(seen, draws, "looked at")]
    if sealed:
        found.append(measure([read_table(path, None) for path in paths if path.stem in SEALED], draws, "E"))
    return found


if __name__ == "__main__":
    main()
