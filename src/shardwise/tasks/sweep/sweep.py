"""`shardwise sweep`: many trainings of one job, side by side."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from shardwise.errors import FolderError, UserError
from shardwise.run.folder import RunFolder, write_aside, writing_in
from shardwise.run.progress import tell
from shardwise.tasks.graph import Graph
from shardwise.tasks.options import Options
from shardwise.tasks.outcome import Outcome
from shardwise.tasks.pool import Pool
from shardwise.tasks.sweep.halving import Course, Unit
from shardwise.tasks.sweep.log import SweepLog
from shardwise.tasks.sweep.report import warm_up
from shardwise.tasks.sweep.result import Sweep, finish, spread
from shardwise.tasks.sweep.settle import Settled, SweepOptions, settle
from shardwise.tasks.sweep.space import brief, shown
from shardwise.tasks.sweep.table import Board, make_board
from shardwise.tasks.sweep.winners import best_complete, evaluate_ensemble, export, run_task, train_whole

_TEXT = "sha256 of the job's file"
_PRELOAD = ("shardwise.tasks.sweep.trial",)
_PRELOAD_CHECKPOINTS = ("shardwise.run.dcp",)


def run_sweep(options: SweepOptions) -> Sweep:
    """Train all combinations and compare them.

    Raises:
        UserError: the job, the axes or the folder is wrong; nothing was started.
    """
    began = time.time()
    preload = _PRELOAD + (_PRELOAD_CHECKPOINTS if options.stop else ())
    with Pool(workers=options.workers, preload=() if options.on else preload, on=options.on) as pool:
        pool.prepare()  # its imports go on while ours do
        from shardwise.run.choose import choose_device

        plan = settle(options, choose_device(options.device), pool)
        folder = _open_folder(options, plan)
        with folder.lock():
            _check_identity(folder, options, plan)
            with SweepLog(folder.path, metric=plan.metric, maximize=plan.maximize, trials=plan.search.size) as log:
                log.begin(
                    f"sweep {plan.found.function.__name__}", settings=_identity(options, plan), plan=plan.layout,
                    threads=plan.threads, device=plan.device, cores=int(pool.capacity.cores),
                )  # fmt: skip
                board = make_board(
                    show=options.progress, metric=plan.metric, maximize=plan.maximize, trials=plan.search.size, log=log
                )
                board.say("\n".join(_opening(options, plan, folder)))
                course = Course(plan.search, plan.rungs, eta=plan.eta, lanes=plan.lanes, maximize=plan.maximize)
                runner = _Runner(options, plan, folder, pool, course, board, log)
                runner.run()
                extra = runner.winners()
                done = finish(options, plan, folder, course, runner.records, extra, began)
                log.end(done.summary)
                return done


def _open_folder(options: SweepOptions, plan: Settled) -> RunFolder:
    if options.resume:
        if options.out is None:
            raise FolderError("--resume needs the sweep's folder: give the one to go on with as --out")
        return RunFolder.open(options.out)
    return RunFolder.create(options.out, f"sweep-{plan.found.function.__name__}")


def _identity(options: SweepOptions, plan: Settled) -> dict[str, Any]:
    """What must be equal for a sweep to be gone on with."""
    from shardwise.run.command import parse_settings

    given = {*(axis.name for axis in plan.axes), *parse_settings(options.settings)}
    return {
        "job": plan.found.origin,
        "defaults": {
            name: repr(parameter.default)
            for name, parameter in plan.found.parameters.items()
            if name not in given and isinstance(parameter.default, bool | int | float | str | None)
        },
        "over": sorted(options.over),
        "set": sorted(options.settings),
        "changes": dict(sorted(options.changes.items())),
        "search": options.search,
        "stop": options.stop,
        "folds": options.folds,
        "seeds": options.seeds,
        "metric": plan.metric,
        "seed": options.seed,
        "lanes": plan.lanes if plan.stops or plan.search.learns else None,
        "plan": f"{plan.layout} threads={plan.threads} on {plan.device}",
    }


def _check_identity(folder: RunFolder, options: SweepOptions, plan: Settled) -> None:
    path = folder.path / "sweep.json"
    now = json.loads(json.dumps(_identity(options, plan)))
    text = _digest_of_file(plan.found.function)
    if not path.exists():
        if (folder.path / "identity.json").exists():
            raise FolderError(f"{folder.path} holds a training, not a sweep: give the sweep's folder")
        with writing_in(folder.path):
            write_aside(path, json.dumps({**now, _TEXT: text}, indent=2).encode() + b"\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    first_text = before.pop(_TEXT, text)
    before.setdefault("defaults", now["defaults"])  # of a sweep that was started by an earlier version
    differ = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differ:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in differ)
        raise FolderError(
            f"{folder.path} holds another sweep: {changes}. Give what it was started with, or another --out"
        )
    if first_text != text:
        tell(
            f"warning: the file of {plan.found.origin} has changed since the sweep was started: trainings that have ended "
            "are not repeated, and may be compared with trainings of another job; give another --out if it matters"
        )


def _digest_of_file(function: Callable[..., Any]) -> str:
    """Of the file that a job function stands in; empty where there is none."""
    try:
        return hashlib.sha256(Path(inspect.getsourcefile(function) or "").read_bytes()).hexdigest()
    except (OSError, TypeError):
        return ""


def _opening(options: SweepOptions, plan: Settled, folder: RunFolder) -> list[str]:
    each = max(1, options.folds) * options.seeds
    times = [f"{options.folds} folds"] * bool(options.folds) + [f"{options.seeds} seeds"] * (options.seeds > 1)
    split = (
        "the part of the training data that was left out"
        if options.folds
        else "the test split, which flatters the best of many; --folds does not use it"
    )
    lines = [
        f"sweep {plan.found.origin}: {plan.search.size} combinations by {options.search} search"
        + (f" x {' x '.join(times)} = {plan.search.size * each} trainings" if times else ""),
        *(f"  because {reason}" for reason in plan.reasons),
        f"  best is the {'highest' if plan.maximize else 'lowest'} {plan.metric} on {split}",
    ]
    if plan.stops:
        compared = ", ".join(map(str, plan.rungs[:-1]))
        lines.append(f"  asha: compared after {compared} of {plan.rungs[-1]}; the best 1/{plan.eta} go on")
    return [*lines, f"  folder {folder.path}"]


@final
class _Runner:
    """Lets the course's units run as tasks, and tells it how they ended."""

    def __init__(
        self,
        options: SweepOptions,
        plan: Settled,
        folder: RunFolder,
        pool: Pool,
        course: Course,
        board: Board,
        log: SweepLog,
    ) -> None:
        self._options, self._plan, self._folder = options, plan, folder
        self._pool, self._course, self._board, self._log = pool, course, board, log
        self._parts: dict[Unit, list[Outcome | None]] = {}
        self._ended: dict[Unit, float | None] = {}
        self.records: list[dict[str, Any]] = []

    def run(self) -> None:
        with self._pool.graph(store=self._folder.path / "trainings.sqlite", resume=True, meter=self._board) as graph:
            where: dict[int, tuple[Unit, int]] = {}
            self._start(graph, where)
            warm_up()
            for handle, outcome in graph.stream():
                unit, part = where.pop(handle.number)
                self._take(unit, part, outcome)
                self._start(graph, where)

    def _start(self, graph: Graph, where: dict[int, tuple[Unit, int]]) -> None:
        for unit in self._course.advance(self._ended):
            parts = self._trainings(unit)
            self._parts[unit] = [None] * len(parts)
            for part, training in enumerate(parts):
                handle = graph.add(
                    run_task,
                    training,
                    options=self._task_options(self._length(unit)),
                    name=f"{Path(training.folder).relative_to(self._folder.path)} to {self._plan.rungs[unit.rung]}",
                )
                where[handle.number] = (unit, part)

    def _task_options(self, length: int) -> Options:
        return Options(
            cores=self._plan.cores if self._plan.device == "cpu" else 1,
            gpus=self._plan.cores if self._plan.device != "cpu" else 0,
            expected_memory=self._plan.memory_bytes,
            retries=self._options.retries,
            retry_on=("killed", "lost", "memory"),
            timeout=self._options.timeout,
            seconds=float(length),
        )

    def winners(self) -> dict[str, Any]:
        """What was asked for of the best trials, for the summary."""
        options, rungs = self._options, self._plan.rungs
        wanted = max(options.best if options.export is not None else 0, options.ensemble)
        if not wanted:
            return {}
        best = best_complete(self._course.best_first(), wanted, len(rungs))
        trainings = [self._trainings(Unit(trial.number, len(rungs) - 1))[0] for trial in best]
        if options.folds:
            self._board.say(f"training the best {len(best)} on the whole training split")
            describe = {trial.number: training for trial, training in zip(best, trainings, strict=True)}
            trainings = train_whole(
                best, lambda trial: describe[trial.number], self._folder, self._pool,
                self._task_options(rungs[-1]), self._board,
            )  # fmt: skip
        found: dict[str, Any] = {}
        if options.export is not None:
            count = options.best
            found["exported"] = export(best[:count], trainings[:count], Path(options.export), self._plan.metric)
        if options.ensemble:
            count = options.ensemble
            metrics = evaluate_ensemble(trainings[:count], self._pool)
            found["ensemble"] = {"trials": [trial.number for trial in best[:count]], "metrics": metrics}
        return found

    def _length(self, unit: Unit) -> int:
        return self._plan.rungs[unit.rung] - (self._plan.rungs[unit.rung - 1] if unit.rung else 0)

    def _trainings(self, unit: Unit) -> list[Any]:
        from shardwise.run.command import parse_settings
        from shardwise.tasks.sweep.trial import Training

        options, plan, trial = self._options, self._plan, self._course.trials[unit.trial]
        last = unit.rung == len(plan.rungs) - 1
        place = plan.found.place
        return [
            Training(
                job=f"{place}:{plan.found.function.__name__}",
                folders=() if place.endswith(".py") else (str(Path.cwd()),),
                settings=(*parse_settings(options.settings).items(), *trial.setting),
                changes=dict(options.changes),
                seed_step=seed,
                fold=(number, options.folds, options.seed) if number is not None else None,
                plan=plan.layout,
                threads=plan.threads,
                device=plan.device,
                folder=str(training_folder(self._folder, trial.number, number, seed)),
                pause_after=None if last else plan.rungs[unit.rung],
                checkpoint_every=options.checkpoint_every,
            )
            for number in (range(options.folds) if options.folds else [None])
            for seed in range(options.seeds)
        ]

    def _take(self, unit: Unit, part: int, outcome: Outcome) -> None:
        parts = self._parts[unit]
        parts[part] = outcome
        trial = self._course.trials[unit.trial]
        seeds = self._options.seeds
        self.records.append(
            {
                "trial": unit.trial,
                "fold": part // seeds if self._options.folds else None,
                "seed": part % seeds,
                "rung": unit.rung,
                "setting": dict(trial.setting),
                "state": outcome.state,
                "failure": _why_not(outcome, self._plan.metric),
                "wrong_input": outcome.failure is not None and isinstance(outcome.failure.error, UserError),
                "details": outcome.failure.details if outcome.failure is not None else None,
                "task_seconds": outcome.seconds,
                "attempts": outcome.attempts,
                **(outcome.value or {}),
            }
        )
        if any(one is None for one in parts):
            return
        values = [_value(one, self._plan.metric) for one in parts if one is not None]
        good = [value for value in values if value is not None]
        mean = statistics.fmean(good) if len(good) == len(values) else None
        self._ended[unit] = mean
        reasons = [_why_not(one, self._plan.metric) for one in parts if one is not None]
        reason = next((text for text in reasons if text is not None), None)
        last = unit.rung == len(self._plan.rungs) - 1
        self._log.came(
            trial.number,
            dict(trial.setting),
            value=mean,
            trained=self._plan.rungs[unit.rung],
            state="failed" if mean is None else "done" if last else "paused",
            failure=brief(reason or "its metric is no number") if mean is None else "",
        )
        self._board.trial(
            number=trial.number,
            text=shown(trial.setting),
            value=mean,
            spread=spread(good),
            after=f"{self._plan.rungs[unit.rung]} of {self._plan.rungs[-1]}" if self._plan.stops else "",
            failure=reason,
            ended=last,
        )


def training_folder(folder: RunFolder, trial: int, fold: int | None, seed: int) -> Path:
    """The run folder of one training of a sweep."""
    name = f"{trial:04d}" + (f"-fold{fold}" if fold is not None else "") + (f"-seed{seed}" if seed else "")
    return folder.path / "trials" / name


def _value(outcome: Outcome, metric: str) -> float | None:
    return None if _why_not(outcome, metric) is not None else float(outcome.value["metrics"][metric])


def _why_not(outcome: Outcome, metric: str) -> str | None:
    """Why a training does not count; None where it does."""
    if outcome.failure is not None:
        return outcome.failure.message
    if outcome.state != "done":
        return f"it was {outcome.state}"
    if math.isnan(outcome.value["loss"]):
        # Its weights are no numbers either: an accuracy of such outputs is one, and means nothing.
        return "its training loss is no number: it diverged"
    value = outcome.value["metrics"].get(metric, math.nan)
    return None if math.isfinite(value) else f"its {metric} is no number"
