"""`shardwise bench` behind the command line: choose the cases, run them in rounds, and make one result of it."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from shardwise.bench.analyse import Context, fastest_alone, make_cases
from shardwise.bench.cases import parse_plans, select
from shardwise.bench.execute import Target
from shardwise.bench.known import find_known
from shardwise.bench.result import Bench, Case, Spread
from shardwise.bench.runs import Orders, Runs
from shardwise.bench.why import crowd_remark, find_losses
from shardwise.data.loader import steps_per_epoch
from shardwise.data.source import as_splits
from shardwise.errors import RunFailed, UserError
from shardwise.probe.place import this_place
from shardwise.run.choose import choose_device, usable_cores
from shardwise.run.command import change_job, divide_changes, parse_settings
from shardwise.run.jobfile import find_job
from shardwise.spec.job import Job

UNSTEADY = 0.15
"""Step times that differ by more than this between rounds are remarked on."""


@final
@dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """What stands on the command line.

    Attributes:
        job: a built-in name, `file.py`, `file.py:function` or `package.module:function`.
        settings: `name=value` of the job function's arguments.
        changes: fields of the job that are overruled.
        plans: texts of `--plans`; empty for the usual ones.
        every: all layouts of up to `workers` workers.
        out: folder of the result and of all runs; it must not hold anything yet.
        tell: receives lines about the progress.
    """

    job: str
    settings: tuple[str, ...]
    changes: Mapping[str, Any]
    plans: tuple[str, ...]
    every: bool
    workers: int | None
    steps: int | None
    to: str | None
    weak: bool
    rounds: int
    price: float | None
    device: str
    timeout_seconds: float
    out: Path
    tell: Callable[[str], None]


def bench(command: BenchCommand) -> Bench:
    """Measure a job under several plans.

    Raises:
        UserError: wrong input; nothing was measured.
        RunFailed: the one-worker run, which everything is compared with, failed.
    """
    _check(command)
    settings = parse_settings(command.settings)
    found = find_job(command.job)
    hyper_parameters, changes = divide_changes(settings, command.changes, found)
    loaded = found.call(hyper_parameters)
    job = change_job(loaded.job, changes)
    device = choose_device(command.device)
    target = Target.parse(command.to) if command.to is not None else None
    if target is not None and target.metric not in ("loss", *job.metrics):
        raise UserError(
            f"--to {command.to}: the job has no metric {target.metric!r}; it has {', '.join(['loss', *job.metrics])}"
        )
    splits = as_splits(job.data)
    _ = splits.train, splits.test  # what is wrong with a file shows before anything is measured
    plans = parse_plans(command.plans) if command.plans else None
    selection = select(job, plans, every=command.every, weak=command.weak, workers=command.workers, device=device)
    _make_folder(command.out)
    orders = Orders(
        job=command.job,
        settings=settings,
        changes=command.changes,
        seed=job.seed,
        target=target,
        device=device,
        timeout_seconds=command.timeout_seconds,
        out=command.out,
        rounds=command.rounds,
        tell=command.tell,
    )
    began, clock = time.time(), time.perf_counter()
    runs = Runs(orders, selection.cases)
    steps, interrupted = command.steps, False
    try:
        if target is None and steps is None:
            steps = runs.pilot()
        runs.all_rounds(steps)
    except KeyboardInterrupt:
        interrupted = True
        command.tell("interrupted: reporting what was measured")
    runs.remove_checkpoints()
    baseline = fastest_alone(runs.found)
    if baseline.failed is not None:
        raise RunFailed(f"the one-worker run failed: {baseline.failed[1]}", details=baseline.failed[2])
    if not baseline.rounds:
        raise RunFailed("interrupted before the one-worker run was done: nothing was measured")
    cases, remarks, epoch = _cases(job, runs, selection.one_unit, device, command.price)
    shown = {f"set.{name}": str(value) for name, (value, _) in loaded.hyper_parameters.items()}
    return Bench(
        job=job.name,
        origin=loaded.origin,
        settings={**shown, "batch_size": str(job.batch_size), "seed": str(job.seed)},
        device=device,
        machine=_machine(device),
        baseline=baseline.wanted.name,
        one_unit=selection.one_unit,
        steps=steps,
        warm_up=runs.warm_up,
        rounds=command.rounds,
        target=str(target) if target is not None else None,
        price=command.price,
        steps_per_epoch=epoch,
        began=began,
        seconds=time.perf_counter() - clock,
        cases=cases,
        interrupted=interrupted,
        warnings=_doubts(cases, device),
        remarks=remarks,
    )


def _check(command: BenchCommand) -> None:
    if command.rounds < 1:
        raise UserError(f"--rounds {command.rounds}: at least 1")
    if command.steps is not None and command.to is not None:
        raise UserError("--steps and --to are both given: give one of them")
    if command.to is not None and command.weak:
        raise UserError(
            "--to and --weak are both given: weak scaling trains on larger batches, which is another training"
        )
    if command.every and command.plans:
        raise UserError("--all and --plans are both given: give one of them")
    if command.steps is not None and command.steps < 4:
        raise UserError(f"--steps {command.steps}: a steady state needs at least 4")
    if command.price is not None and not command.price >= 0:
        raise UserError(f"--price {command.price:g}: the price of a worker hour is 0 or more")


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UserError(f"--out {out}: the folder is not empty; a result goes to a new or an empty folder")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a place that can be written") from error


def _cases(
    job: Job, runs: Runs, one_unit: str, device: str, price: float | None
) -> tuple[list[Case], list[str], int | None]:
    """The cases with their losses, what to say of all of them, and the steps of an epoch."""
    cores = usable_cores()
    epoch = steps_per_epoch(as_splits(job.data).train, job.batch_size)
    known = find_known(job, device)
    context = Context(device=device, cores=cores, price=price, steps_per_epoch=epoch, known=known)
    cases = make_cases(runs.found, one_unit, context)
    unit = next(case for case in cases if case.name == one_unit)
    cases = [replace(case, findings=find_losses(case, unit, cores=cores, device=device)) for case in cases]
    remarks = list(known.remarks)
    if any(case.measured and "pipeline" in case.layout_name for case in cases):
        remarks.append("a pipeline stage does forward and backward passes in turn: both are in its backward pass here")
    return cases, remarks, epoch


def _doubts(cases: list[Case], device: str) -> list[str]:
    """What makes the numbers less certain than they look."""
    crowd = crowd_remark(cases, usable_cores()) if device == "cpu" else ""
    found = [crowd] if crowd else []
    for case in cases:
        if case.step_seconds is not None and case.outcome != "measured":
            rounds = f"{case.step_seconds.rounds} round{'' if case.step_seconds.rounds == 1 else 's'}"
            found.append(f"{case.name} {case.outcome} after {rounds}, which its numbers are of: {case.reason}")
    wide = [case.name for case in cases if case.step_seconds is not None and _width(case.step_seconds) > UNSTEADY]
    if wide:
        found.append(
            f"step times of {', '.join(wide)} differ by more than {UNSTEADY:.0%} between rounds: the machine was not quiet; "
            "believe ratios more than seconds, and add rounds"
        )
    if any(case.step_seconds is not None and case.step_seconds.rounds == 1 for case in cases):
        found.append("one round shows no spread and cannot tell whether metrics differ: --rounds 3 or more")
    return found


def _width(spread: Spread) -> float:
    return (spread.high - spread.low) / spread.median


def _machine(device: str) -> dict[str, Any]:
    place = this_place()
    return {"host": socket.gethostname(), "device": device, **place, "python": platform.python_version()}
