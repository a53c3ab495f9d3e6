"""What is settled before the first training of a sweep starts: axes, search, metric, rungs, and how each one runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from shardwise.errors import ShardwiseError, UserError
from shardwise.run.jobfile import JobFunction, find_job
from shardwise.tasks.pool import Pool
from shardwise.tasks.sweep.halving import DEFAULT_LANES, parse_stop, rungs_of
from shardwise.tasks.sweep.search import Search, SearchName, make_search
from shardwise.tasks.sweep.space import Axis, parse_over
from shardwise.tasks.sweep.width import choose_width, plan_of_started
from shardwise.tasks.sweep.winners import check_place

if TYPE_CHECKING:
    from shardwise.run.choose import Pricer
    from shardwise.spec.job import Job

_LOWER_IS_BETTER = ("loss", "error", "perplexity")


@final
@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What stands on the command line.

    Attributes:
        over: `NAME=VALUES` texts.
        settings: `--set` texts of arguments that are the same in all trials.
        changes: fields of the job that are overruled.
        trials: how many combinations; None takes the whole grid, or the search's default.
        stop: `asha`, or None.
        folds: parts of the training split for cross-validation; 0 for none.
        seeds: how often each combination is trained, with the job's seed and the ones after it.
        metric: to choose by; None takes the job's first one.
        goal: `max` or `min`; None goes by the metric's name.
        seed: of the search and of the folds.
        lanes: trials whose results decisions do not wait for; None for all where nothing is decided.
        plan: of each training; None lets the number of trainings and cores decide.
        workers: cores for all of them; None takes those of the machine.
        retries: how often a training whose worker died is started again.
        best: how many of the best are exported to
        export: this folder.
        ensemble: how many of the best are evaluated as one model; 0 for none.
        pricer: prices plans, for the decision how wide each training is; None goes by the number of cores alone.
    """

    job: str
    over: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    search: SearchName = "grid"
    trials: int | None = None
    stop: str | None = None
    folds: int = 0
    seeds: int = 1
    metric: str | None = None
    goal: str | None = None
    seed: int = 0
    lanes: int | None = None
    plan: str | None = None
    device: str = "auto"
    workers: int | None = None
    out: Path | str | None = None
    resume: bool = False
    retries: int = 1
    timeout: str | None = None
    checkpoint_every: str = "10m"
    progress: bool = True
    on: str | None = None
    best: int = 1
    export: Path | str | None = None
    ensemble: int = 0
    pricer: Pricer | None = None


@final
@dataclass
class Settled:
    """What was settled before the first training starts."""

    found: JobFunction
    axes: tuple[Axis, ...]
    search: Search
    metric: str
    maximize: bool
    rungs: tuple[int, ...]
    eta: int
    lanes: int
    stops: bool
    layout: str
    threads: int
    device: str
    cores: int
    memory_bytes: int
    reasons: list[str]


def settle(options: SweepOptions, device: str, pool: Pool) -> Settled:
    from shardwise.run.command import change_job, divide_changes, parse_settings

    found = find_job(options.job)
    axes = parse_over(options.over, found.parameters, found.origin)
    fixed = parse_settings(options.settings)
    for axis in axes:
        if axis.name in fixed or axis.name in options.changes:
            raise UserError(f"{axis.name} is given a value and stands in --over too: give one of them")
    if options.folds == 1 or options.folds < 0 or options.seeds < 1:
        raise UserError(f"--folds {options.folds} --seeds {options.seeds}: at least 2 folds (0 for none) and 1 seed")
    if options.best < 1 or options.ensemble < 0 or options.ensemble == 1:
        raise UserError(
            f"--best {options.best} --ensemble {options.ensemble}: at least 1 to export, and 2 for an ensemble"
        )
    check_place(options.export)
    first = {**fixed, **{axis.name: axis.draw(0.0) for axis in axes}}
    settings, changes = divide_changes(first, options.changes, found)
    job = change_job(found.call(settings).job, changes)
    metric, maximize = _metric(options, job)
    search = make_search(options.search, axes, trials=options.trials, seed=options.seed, maximize=maximize)
    rungs, eta, stops = _rungs(options, job, axes)
    decides = stops or search.learns
    lanes = options.lanes or (DEFAULT_LANES if decides else search.size)
    if lanes < 1:
        raise UserError(f"--lanes {options.lanes}: at least 1")
    each = max(1, options.folds) * options.seeds
    width = choose_width(
        job if options.pricer is None else _larger(job, found, fixed, axes, options.changes),
        pool.capacity,
        device=device,
        plan=options.plan,
        started_as=plan_of_started(options.out, device) if options.resume else None,
        at_once=min(lanes, search.size) * each,
        trainings=search.size * each,
        pricer=options.pricer,
        elsewhere=options.on is not None,
    )
    layout, reasons = width.plan, width.reasons
    if decides and lanes * each < pool.capacity.cores / layout.layout.workers:
        reasons.append(
            f"only {lanes * each} trainings run at once: --lanes sets how many, and changes which trials are run"
        )
    return Settled(
        found=found,
        axes=axes,
        search=search,
        metric=metric,
        maximize=maximize,
        rungs=rungs,
        eta=eta,
        lanes=lanes,
        stops=stops,
        layout=str(layout.layout),
        threads=layout.threads or 1,
        device=device,
        cores=layout.layout.workers * (layout.threads or 1),
        memory_bytes=width.memory_bytes,
        reasons=reasons,
    )


def _larger(
    job: Job, found: JobFunction, fixed: Mapping[str, str], axes: tuple[Axis, ...], changes: Mapping[str, Any]
) -> Job:
    """Of the jobs at the low and at the high end of all axes the one with more parameters, which needs more memory."""
    from shardwise.run.command import change_job, divide_changes

    try:
        settings, rest = divide_changes({**fixed, **{axis.name: axis.draw(1.0) for axis in axes}}, changes, found)
        other = change_job(found.call(settings).job, rest)
    except ShardwiseError:
        return job  # a trial that cannot be built fails alone, later
    return max((job, other), key=_parameters)


def _parameters(job: Job) -> int:
    """Of its model; 0 where it cannot be built without memory."""
    import torch

    from shardwise.run.build import build_model, without_memory

    try:
        with torch.random.fork_rng(devices=[]), without_memory():
            return sum(parameter.numel() for parameter in build_model(job, None).parameters())
    except Exception:  # noqa: BLE001  # a model may do anything in its constructor
        return 0


def _metric(options: SweepOptions, job: Job) -> tuple[str, bool]:
    known = [*job.metrics, "loss"]
    name = options.metric or known[0]
    if name not in known:
        raise UserError(f"--metric {name}: the job has {', '.join(known)}")
    if options.goal not in (None, "max", "min"):
        raise UserError(f"--goal {options.goal}: give max or min")
    lower = any(word in name for word in _LOWER_IS_BETTER)
    return name, options.goal == "max" if options.goal is not None else not lower


def _rungs(options: SweepOptions, job: Job, axes: tuple[Axis, ...]) -> tuple[tuple[int, ...], int, bool]:
    length = job.epochs if job.epochs is not None else job.steps
    assert length is not None
    stop = parse_stop(options.stop)
    if stop is None:
        return (length,), 2, False
    varied = [axis.name for axis in axes if axis.name in ("epochs", "steps", "batch_size")]
    if varied and varied[0] != "batch_size":
        raise UserError(f"--over {varied[0]} with --stop: trials of different lengths cannot be compared on the way")
    return rungs_of(length, eta=stop[0], least=stop[1]), stop[0], True
