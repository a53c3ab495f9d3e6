"""The parity matrix: small models of many kinds under many layouts and settings, each proved or refused with its reason.

    python benchmarks/matrix.py --out docs/matrix.md     # some minutes on two cores

Each cell is judged as by `shardwise prove`: steps under the plan against float64, with serial float32 runs as the yardstick.
All cells of as many workers share their processes, which is why this is quicker than so many proofs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d

from matrix_models import MODELS, SETTINGS, make_job
from shardwise.errors import UserError
from shardwise.prove.compare import Yardstick, compare, initial_differences
from shardwise.prove.execute import ORDERS, same_run
from shardwise.prove.guards import check_guards, sample_faults
from shardwise.prove.record import RankReport, Record, read_record
from shardwise.prove.runs import Fault, Task, take_record
from shardwise.run.assemble import check_job
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan

CPU = torch.device("cpu")
STEPS = 3


LAYOUTS = (
    *("data=2", "shard=2", "tensor=2", "pipeline=2", "context=2", "expert=2"),
    *("data=2,shard=2", "data=2,tensor=2", "shard=2,tensor=2", "data=2,pipeline=2", "shard=2,pipeline=2"),
    *("tensor=2,pipeline=2", "data=2,context=2", "shard=2,context=2", "data=2,expert=2", "shard=2,expert=2"),
    *("tensor=2,context=2", "tensor=2,expert=2", "context=2,expert=2", "context=2,pipeline=2", "expert=2,pipeline=2"),
)


@dataclass(frozen=True)
class Cell:
    """One model under one layout with some settings."""

    model: str
    layout: str
    settings: tuple[str, ...]

    @property
    def job(self) -> Job:
        return make_job(self.model, self.settings)

    @property
    def plan(self) -> Plan:
        recompute = "full" if "recompute" in self.settings else "none"
        return Plan.from_dict({
            "layout": self.layout, "recompute": recompute, "micro_batch": self.job.micro_batch, "threads": 1,
        })  # fmt: skip

    def task(self, folder: Path, plan: Plan | None = None, **changes: Any) -> Task:
        folder.mkdir(parents=True, exist_ok=True)
        job = self.job
        return Task(
            job=job, splits=job.data, reference=None, plan=plan or self.plan, steps=STEPS, device="cpu", folder=str(folder),
            **changes,
        )  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What became of a cell: `proved`, `refused` or `wrong`, and why."""

    cell: Cell
    outcome: str
    reason: str = ""


def refusal(cell: Cell) -> str | None:
    """Why the cell is refused before anything starts; None where it is not."""
    try:
        with torch.random.fork_rng(devices=[]):
            check_job(cell.job, cell.plan)
    except UserError as error:
        return str(error)
    return None


def judge(cells: Sequence[Cell]) -> Iterator[Result]:
    """Prove or refuse every cell."""
    reasons = {cell: refusal(cell) for cell in cells}
    for cell, reason in reasons.items():
        if reason is not None:
            yield Result(cell, "refused", reason)
    yield from prove_cells([cell for cell, reason in reasons.items() if reason is None])


def prove_cells(cells: Sequence[Cell], fault: Fault | None = None) -> Iterator[Result]:
    """Prove cells that are not refused; those with the same number of workers in the same processes."""
    yardsticks: dict[tuple[str, bool], Yardstick] = {}
    for workers in sorted({cell.plan.layout.workers for cell in cells}):
        group = [cell for cell in cells if cell.plan.layout.workers == workers]
        with tempfile.TemporaryDirectory(prefix="matrix-") as place:
            for cell, answer in zip(group, _run(workers, group, place, fault), strict=True):
                key = (cell.model, "clipping" in cell.settings)
                if key not in yardsticks:
                    yardsticks[key] = _yardstick(cell, Path(place) / "serial")
                yield _compared(cell, answer, yardsticks[key])


def _yardstick(cell: Cell, place: Path) -> Yardstick:
    serial = Plan(threads=1)
    tasks = [cell.task(place / "exact", serial, double=True), cell.task(place / "first", serial)]
    tasks += [cell.task(place / f"order {order}", serial, order=order) for order in ORDERS]
    tasks.append(cell.task(place / "pieces", replace(serial, micro_batch=7)))
    records = []
    for task in tasks:
        try:
            if task.plan.micro_batch is not None:
                check_job(task.job or cell.job, task.plan)
            records.append(read_record(Path(task.folder), take_record(task, CPU)))
        except UserError:  # the model must see its batch whole
            continue
        finally:
            torch.set_default_dtype(torch.float32)
    exact, first, *others = records
    return Yardstick(exact, [first, *(other for other in others if same_run(other, first))])


def _compared(cell: Cell, answer: tuple[Path, list[RankReport]], yardstick: Yardstick) -> Result:
    candidate: Record = read_record(*answer)
    layout = cell.plan.layout
    faults = sample_faults(candidate, yardstick.serial[0], cell.plan)
    wrong = [str(item) for item in compare(candidate, yardstick) if not item.passed]
    wrong += [
        f"other start: {name}"
        for _, name in initial_differences(candidate, yardstick.serial[0], yardstick.exact.aliases)
    ]
    wrong += [guard.text for guard in check_guards(candidate, yardstick, layout, faults) if not guard.passed]
    return Result(cell, "wrong", wrong[0]) if wrong else Result(cell, "proved")


# The processes


def _run(workers: int, cells: Sequence[Cell], place: str, fault: Fault | None) -> list[tuple[Path, list[RankReport]]]:
    """Records of all cells, from one set of processes."""
    context = multiprocessing.get_context("fork")
    queue: SimpleQueue[Any] = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank_main, args=(rank, workers, cells, place, fault, queue), daemon=True)
        for rank in range(workers)
    ]
    for process in ranks:
        process.start()
    try:
        answers = queue.get()
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    if isinstance(answers, str):
        raise RuntimeError(answers)
    return list(answers)


def _rank_main(
    rank: int, workers: int, cells: Sequence[Cell], place: str, fault: Fault | None, queue: SimpleQueue[Any]
) -> None:
    torch.set_num_threads(1)
    c10d.init_process_group("gloo", init_method=f"file://{place}/store-{workers}", rank=rank, world_size=workers)
    answers = []
    for index, cell in enumerate(cells):
        folder = Path(place) / f"{workers}-{index}"
        try:
            answers.append((folder, take_record(cell.task(folder, fault=fault), CPU)))
        except BaseException as error:
            queue.put(f"{cell} failed on rank {rank}: {type(error).__name__}: {error}")
            raise
    if rank == 0:
        queue.put(answers)


# The table


def cells_of(models: Sequence[str], layouts: Sequence[str], settings: Sequence[tuple[str, ...]]) -> list[Cell]:
    return [Cell(model, layout, names) for model in models for layout in layouts for names in settings]


MARKS = {"plain": "", "clipping": "c", "accumulation": "a", "recompute": "r"}


def table(results: Sequence[Result]) -> str:
    """Markdown: rows are layouts, columns are models; below it the reasons of what is refused."""
    found = {(result.cell.model, result.cell.layout, result.cell.settings[0]): result for result in results}
    models, layouts = (
        list(dict.fromkeys(getattr(result.cell, name) for result in results)) for name in ("model", "layout")
    )
    notes: dict[str, int] = {}
    lines = ["| layout | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    for layout in layouts:
        row = []
        for model in models:
            each = {name: found[model, layout, name] for name in SETTINGS}
            row.append(_entry(each, notes))
        lines.append(f"| `{layout}` | " + " | ".join(row) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items())]
    return "\n".join(lines) + "\n"


def _entry(each: dict[str, Result], notes: dict[str, int]) -> str:
    """`proved`, and what of it is not."""
    refused: dict[int, list[str]] = {}
    for name, result in each.items():
        if result.outcome == "wrong":
            return f"**WRONG** with {name}"
        if result.outcome == "refused":
            number = notes.setdefault(_reason(result), len(notes) + 1)
            refused.setdefault(number, []).append(name)
    if not refused:
        return "proved"
    if len(refused) == 1 and len(next(iter(refused.values()))) == len(each):
        return f"refused ({next(iter(refused))})"
    if "plain" in next(iter(refused.values())):
        return "refused (" + ", ".join(map(str, refused)) + ")"
    return "proved; " + ", ".join(f"not with {' and '.join(names)} ({number})" for number, names in refused.items())


def _reason(result: Result) -> str:
    """The reason without what is peculiar to the layout, so that one note serves all."""
    text = result.reason.replace(f"plan {result.cell.plan.layout}", "plan")
    return " ".join(text.split())


HEAD = """# Which models under which layouts

Made by `python benchmarks/matrix.py --out docs/matrix.md`, which takes some minutes. Each model is trained 3 steps (of 13, 13
and 5 samples) under each layout: plainly, with clipping by the global norm, with accumulation (`micro_batch=2`) and with
recompute. *Proved* means what [`shardwise prove`](proof.md) means by it, for all four unless it says otherwise. *Refused* means
an error before a worker starts, with the reason below. The models are in `benchmarks/matrix.py`. The tests prove again, with all
settings at once, the layouts of one axis for all models and those of two axes for some.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the table there instead of printing it")
    parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="NAME")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), metavar="LAYOUT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    results: list[Result] = []
    for model in options.models:  # new processes for each: the groups of a cell last as long as its process
        results += judge(cells_of([model], options.layouts, [(name,) for name in SETTINGS]))
    order = {
        cell: place for place, cell in enumerate(cells_of(options.models, options.layouts, [(n,) for n in SETTINGS]))
    }
    text = HEAD + table(sorted(results, key=lambda result: order[result.cell]))
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    counts = {kind: sum(result.outcome == kind for result in results) for kind in ("proved", "refused", "wrong")}
    print(f"{counts} in {time.perf_counter() - began:.0f} s")
    for result in results:
        if result.outcome == "wrong":
            print(f"WRONG {result.cell}: {result.reason}")


if __name__ == "__main__":
    main()
