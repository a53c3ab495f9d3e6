"""`shardwise train` behind the command line: load the job, resolve every setting and its source, train."""

from __future__ import annotations

import functools
import shutil
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, final

from shardwise.errors import UserError
from shardwise.run.choose import AUTO, Chooser, choose_device, choose_plan
from shardwise.run.jobfile import JobFunction, LoadedJob, Reference, find_job
from shardwise.run.launch import current_rank
from shardwise.run.options import TrainOptions, make_options, read_plan, resolve_plan
from shardwise.run.progress import tell
from shardwise.run.result import Run
from shardwise.run.train import job_identity, train
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan, Prediction
from shardwise.spec.settings import COMMAND_LINE, DEFAULT, JOB, PLAN_FILE, Settings
from shardwise.units import format_bytes, format_seconds

_PLAIN_FIELDS = (
    *("name", "batch_size", "epochs", "steps", "micro_batch", "eval_batch_size", "clip_norm", "batch_norm"),
    *("seed", "shuffle", "precision", "compile"),
)
"""Fields of a job that are values and not functions."""

_RUN_OPTIONS = (
    *("out", "resume", "checkpoint_every", "keep_last", "last_checkpoint", "evaluate_every", "max_restarts"),
    *("device", "balance"),
)
"""Options of a run that are kept with its settings."""

_WIDEST = 110
"""Columns of the longest line of settings that is easily read."""


@final
@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """What stands on the command line.

    Attributes:
        job: a built-in name, `file.py`, `file.py:function` or `package.module:function`.
        settings: `name=value` of the job function's arguments.
        changes: fields of the job that are overruled.
        options: fields of `TrainOptions`.
        given: names of the options that were typed, for telling them from defaults.
    """

    job: str
    settings: tuple[str, ...]
    changes: Mapping[str, Any]
    options: Mapping[str, Any]
    given: frozenset[str]


def train_command(
    command: TrainCommand, *, before: Callable[[Job, Plan], None] | None = None, chooser: Chooser = choose_plan
) -> Run | None:
    """Train as the command line says; None on ranks and nodes that have nothing to report.

    Args:
        command: what was typed.
        before: called with the job and the plan when both are settled; what it raises stops the training.
        chooser: decides on the plan where it is `auto`.
    """
    found = find_job(command.job)
    hyper_parameters, changes = divide_changes(parse_settings(command.settings), command.changes, found)
    loaded = found.call(hyper_parameters)
    job = change_job(loaded.job, changes)
    options = make_options(None, command.options)
    rank = current_rank()
    is_first = (rank is None or rank.rank == 0) and options.nodes.node_rank == 0
    device = choose_device(options.device)
    plan = resolve_plan(job, options, device=device, world=rank.workers if rank is not None else None, chooser=chooser)
    settings = resolve_settings(command, changes, loaded, job, plan, options)

    def announce() -> None:
        if before is not None:
            before(job, plan)
        if is_first and options.progress:
            tell("\n".join(opening_lines(job, plan, device, settings)))

    values = {f"set.{name}": value for name, (value, _) in loaded.hyper_parameters.items()}
    run = train(
        job,
        options=replace(options, plan=plan, workers=None, threads=None, recompute=None),
        settings=settings,
        reference=functools.partial(_load_again, loaded.reference, changes),
        identity=run_identity(job, loaded.origin, values),
        announce=announce,
    )
    return run if is_first else None


def divide_changes(
    settings: Mapping[str, str], changes: Mapping[str, Any], found: JobFunction
) -> tuple[dict[str, str], dict[str, Any]]:
    """Hyper-parameters and changed fields: `--batch-size 64` is the job's own `batch_size` argument where it has one,
    so that what the job derives from it follows.

    Raises:
        UserError: the same thing is given in both ways.
    """
    as_arguments = {name: str(value) for name, value in changes.items() if name in found.parameters}
    for name in as_arguments:
        if name in settings:
            raise UserError(f"--set {name}= and --{name.replace('_', '-')} are both given: give one of them")
    rest = {name: value for name, value in changes.items() if name not in as_arguments}
    if {"epochs", "steps"} <= {*as_arguments, *rest}:
        raise UserError("--epochs and --steps are both given: give one of them")
    return {**settings, **as_arguments}, rest


def run_identity(job: Job, origin: str, hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to be resumed. A run may be resumed for longer: its length is not part of it."""
    length = ("set.epochs", "set.steps")
    kept = {name: value for name, value in hyper_parameters.items() if name not in length}
    return {**job_identity(job), "job": origin, **kept}


def parse_settings(texts: tuple[str, ...]) -> dict[str, str]:
    """`("lr=0.1",)` as `{"lr": "0.1"}`.

    Raises:
        UserError: a text has no `=`, or a name is given twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--set {text!r}: write NAME=VALUE, such as --set lr=0.05")
        if name.strip() in values:
            raise UserError(f"--set {name.strip()} is given twice: give it once")
        values[name.strip()] = value.strip()
    return values


def change_job(job: Job, changes: Mapping[str, Any]) -> Job:
    """The job with some fields overruled; giving epochs takes the place of steps and the other way round."""
    values = dict(changes)
    for one, other in (("epochs", "steps"), ("steps", "epochs")):
        if one in changes:
            values[other] = None
    return replace(job, **values)


def resolve_settings(
    command: TrainCommand,
    changes: Mapping[str, Any],
    loaded: LoadedJob,
    job: Job,
    plan: Plan,
    options: TrainOptions,
) -> Settings:
    """Every setting of the run with its source: command line, then plan or job file, then default."""
    simple = [item for item in fields(job) if item.name in _PLAIN_FIELDS]
    defaults = {item.name: None if item.default is MISSING else item.default for item in simple}
    in_job = {
        item.name: getattr(job, item.name)
        for item in simple
        if item.name not in changes and getattr(job, item.name) != item.default
    }
    settings = Settings.resolve([(COMMAND_LINE, dict(changes)), (JOB, in_job), (DEFAULT, defaults)])
    for name, (value, source) in loaded.hyper_parameters.items():
        settings = settings.with_value(f"set.{name}", value, source)
    from_file = str(options.plan).endswith(".toml") and read_plan(options.plan or "serial").to_dict()
    for name, value in plan.to_dict().items():
        typed = "plan" if name == "layout" else name
        if name in ("reasons", "prediction"):
            continue
        if typed in command.given and not (typed == "plan" and (from_file or options.plan == AUTO)):
            source = COMMAND_LINE
        elif from_file and name in from_file:
            source = PLAN_FILE
        elif name == "layout" and "workers" in command.given:
            source = "command line (workers)"
        elif name in ("layout", "threads"):
            source = "chosen for this machine"
        else:
            source = JOB if name in in_job else DEFAULT
        settings = settings.with_value(f"plan.{name}", value, source)
    for name in _RUN_OPTIONS:
        settings = settings.with_value(name, getattr(options, name), COMMAND_LINE if name in command.given else DEFAULT)
    return settings


def opening_lines(job: Job, plan: Plan, device: str, settings: Settings) -> list[str]:
    """What will be run and why, and the settings by source, each once; the run folder keeps them one by one."""
    lines = [f"{job.name}: plan {plan} on {device}", *(f"  because {reason}" for reason in plan.reasons)]
    if plan.prediction is not None:
        lines.append(f"  expected: {expectation(job, plan.prediction)}")
    by_source: dict[str, list[str]] = {}
    for name, item in settings.entries.items():
        same = name.removeprefix("set.")
        known = settings.entries.get(same) if same != name and item.source == DEFAULT else None
        repeated = known is not None and known.value == item.value
        if item.value is not None and not repeated:
            by_source.setdefault(item.source, []).append(f"{name}={item.value}")
    for source, texts in by_source.items():
        lines += textwrap.wrap(
            f"  {source}: {', '.join(texts)}",
            width=min(shutil.get_terminal_size().columns, _WIDEST),
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def expectation(job: Job, prediction: Prediction) -> str:
    """What the planner expects of the run, in words."""
    step = prediction.step_seconds
    text = f"{format_seconds(step)} a step, {job.batch_size / step:,.0f} samples/s"
    if prediction.memory_bytes:
        text += f", {format_bytes(prediction.memory_bytes)} in one worker"
    return f"{text} ({prediction.confidence})" if prediction.confidence else text


def _load_again(reference: Reference, changes: Mapping[str, Any]) -> Job:
    return change_job(reference(), changes)
