"""Starts the runs of a proof: serial ones in processes of their own, the candidate through the launcher."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch

from shardwise.data.source import Splits, as_splits
from shardwise.errors import JobError, PlanError, RunFailed, ShardwiseError
from shardwise.prove.compare import Yardstick, compare, norm
from shardwise.prove.record import RankReport, Record, read_record
from shardwise.prove.runs import Fault, Task, run_rank
from shardwise.run.apart import call_in_child
from shardwise.run.assemble import check_job
from shardwise.run.balance import check_division
from shardwise.run.launch import launch
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan

ORDERS = (11, 12, 13)
"""Seeds of the orders of samples within each batch in which further float32 serial runs are made."""

SAME = 1e-3
"""Serial float32 runs that differ by more than this part are not the same computation in another order of sums."""


@final
@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of a proof have in common.

    Attributes:
        folder: of this proof, for the records of its runs.
        cores: serial runs at the same time.
        resumes: the candidate goes on from a checkpoint in the middle.
        seed: in place of the job's own.
    """

    job: Job
    splits: Splits
    reference: Callable[[], Job] | None
    steps: int
    device: str
    folder: Path
    cores: int
    timeout_seconds: float
    report: Callable[[str], None]
    fault: Fault | None = None
    resumes: bool = False
    seed: int | None = None

    def task(self, name: str, plan: Plan, **changes: Any) -> Task:
        """A run of the job under a plan, which leaves its record in a folder of its own."""
        self.folder.mkdir(exist_ok=True)
        place = tempfile.mkdtemp(prefix=f"{name} ", dir=self.folder)
        whole = Task(
            job=self.job,
            splits=self.splits,
            reference=self.reference,
            plan=plan,
            steps=self.steps,
            device=self.device,
            folder=place,
            seed=self.seed,
            timeout_seconds=self.timeout_seconds,
        )
        return replace(whole if self.device == "cpu" else whole.for_new_process(), **changes)


def serial_tasks(setting: Setting, plan: Plan) -> list[Task]:
    """The reference in float64 first, then float32 as it is, then float32 with sums in other orders.

    The last of these takes each batch in pieces, where that is the same computation.
    """
    threads = plan.threads or 1
    serial = Plan(threads=threads)
    tasks = [setting.task("float64", serial, double=True), setting.task("float32", serial)]
    tasks += [setting.task(f"order{order}", serial, order=order) for order in ORDERS]
    share = -(-setting.job.batch_size // max(2, plan.layout.replicas))
    pieces = replace(serial, micro_batch=share)
    try:
        refuse(setting.job, pieces)
    except PlanError:
        return tasks
    tasks[-1] = setting.task("pieces", pieces, order=ORDERS[-1])
    return tasks


def refuse(job: Job, plan: Plan) -> None:
    """Refuse what the plan cannot do for the job, before anything starts; the caller's random numbers stay as they are.

    Raises:
        UserError: what was given, the rule, and what to do.
    """
    with torch.random.fork_rng(devices=[]):
        check_job(job, plan, rehearsal=True)
    check_division(as_splits(job.data), plan)


def measure(setting: Setting, plan: Plan) -> tuple[Yardstick, list[str]]:
    """Make the serial runs.

    Returns:
        The yardstick, and what was left out of it and why.

    Raises:
        JobError: the job does not run in float64, or not at all.
    """
    tasks = serial_tasks(setting, plan)
    with ThreadPoolExecutor(max_workers=max(1, setting.cores)) as pool:
        futures = [pool.submit(_serial, task) for task in tasks]
        reports = [_in_double(futures[0]), *(future.result() for future in futures[1:])]
    exact, first, *rest = (read_record(Path(task.folder), own) for task, own in zip(tasks, reports, strict=True))
    others = list(zip(tasks[2:], rest, strict=True))
    orders = [record for task, record in others if _whole_batches(task)]
    pieces = [record for task, record in others if not _whole_batches(task)]
    kept = [first, *(record for record in orders if same_run(record, first))]
    yardstick, finer = Yardstick(exact, kept), None
    notes = []
    if len(kept) < 1 + len(orders):
        notes.append(
            "the job's result depends on the order of the samples within a batch: rounding was measured in one order"
        )
    in_pieces = bool(pieces) and same_run(pieces[0], first)
    if in_pieces and not _is_rounding(pieces[0], yardstick):
        # Sums of fewer samples round otherwise; a layer that keeps something in each forward pass keeps something else.
        with suppress(ShardwiseError):
            finer = measure_double(setting, plan, yardstick)
            in_pieces = finer.in_pieces
    if in_pieces:
        yardstick = replace(yardstick, serial=[*kept, *pieces])
    elif pieces and not notes:
        notes.append(
            "the job in micro-batches is another computation (the loss or a layer couples samples or counts passes)"
        )
    return replace(yardstick, drawn=_drawn(setting, tasks[1], first), finer=finer), notes


def _whole_batches(task: Task) -> bool:
    return task.plan.micro_batch is None


def _is_rounding(record: Record, yardstick: Yardstick) -> bool:
    """Whether a run would be proved."""
    return all(item.passed for item in compare(record, yardstick))


def _drawn(setting: Setting, task: Task, first: Record) -> frozenset[str]:
    """The random functions that a step calls, where the run is another one if they give their extremes."""
    names = first.reports[0].random
    if not names:
        return frozenset()
    for greatest in (False, True):
        other = replace(setting.task("extreme", task.plan), greatest=greatest, evaluates=False)
        try:
            record = read_record(Path(other.folder), _serial(other))
        except RunFailed:  # such as a sample of nothing: that it can be drawn does not mean that it ever is
            continue
        if not same_run(record, first):
            return frozenset(names)
    return frozenset()


def measure_double(setting: Setting, plan: Plan, yardstick: Yardstick) -> Yardstick:
    """The yardstick in float64: the same reference, and serial float64 runs with sums in other orders.

    Raises:
        RunFailed: the job does not run so.
    """
    if yardstick.finer is not None:
        return yardstick.finer
    tasks = [replace(task, double=True) for task in serial_tasks(setting, plan)[2:]]
    with ThreadPoolExecutor(max_workers=max(1, setting.cores)) as pool:
        reports = list(pool.map(_serial, tasks))
    records = [(task, read_record(Path(task.folder), own)) for task, own in zip(tasks, reports, strict=True)]
    same = [(task, record) for task, record in records if same_run(record, yardstick.exact)]
    # Where no other order is the same computation, the floor alone is the measure.
    kept = [record for task, record in same if _whole_batches(task)] or [yardstick.exact]
    finer = Yardstick(yardstick.exact, kept, double=True, drawn=yardstick.drawn)
    pieces = [record for task, record in same if not _whole_batches(task) and _is_rounding(record, finer)]
    return replace(finer, serial=[*kept, *pieces], in_pieces=bool(pieces))


def same_run(record: Record, first: Record) -> bool:
    """Whether a run is the other one up to rounding: the losses agree to 3 digits and the first gradients as well."""
    if any(abs(a - b) > SAME * abs(b) for a, b in zip(record.losses[:1], first.losses[:1], strict=True)):
        return False
    square = total = 0.0
    for name, values in first.starting_with("gradient/"):
        other = record.first(f"gradient/{name}")
        square += (norm(values[0] - other) if other is not None else norm(values[0])) ** 2
        total += norm(values[0]) ** 2
    return square <= SAME**2 * total


def run_candidate(
    setting: Setting, plan: Plan, name: str = "candidate", *, double: bool = False, evaluates: bool = True
) -> Record:
    """Run the plan on its workers; with `double` in float64.

    Raises:
        RunFailed: a worker failed.
    """
    task = setting.task(name, plan, fault=setting.fault, double=double, evaluates=evaluates, resumes=setting.resumes)
    worker = functools.partial(run_rank, task=task)
    workers, threads = plan.layout.workers, plan.threads or 1
    if workers == 1:
        with ThreadPoolExecutor(max_workers=1) as pool:
            reports = pool.submit(call_in_child, worker, threads=threads, device=setting.device).result()
    else:
        reports = launch(worker, workers=workers, threads=threads, device=setting.device, report=setting.report)
    return read_record(Path(task.folder), reports)


def _serial(task: Task) -> list[RankReport]:
    return call_in_child(functools.partial(run_rank, task=task), threads=task.plan.threads or 1, device=task.device)


def _in_double(future: Future[list[RankReport]]) -> list[RankReport]:
    try:
        return future.result()
    except RunFailed as error:
        raise JobError(
            "the float64 reference run of this job failed, and a proof needs it: let the model and the loss follow the dtype "
            f"of their parameters and inputs. Its own words:\n{error.details or error}"
        ) from error
