"""`shardwise prove` behind the command line: load the job, prove one plan or all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from shardwise.errors import UserError
from shardwise.prove.matrix import prove_all
from shardwise.prove.proof import prove
from shardwise.run.command import change_job, parse_settings
from shardwise.run.jobfile import load_job
from shardwise.run.options import read_plan
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.spec.verdict import Cell, Matrix, Verdict


@final
@dataclass(frozen=True, kw_only=True)
class ProveCommand:
    """What stands on the command line.

    Attributes:
        job: a built-in name, `file.py`, `file.py:function` or `package.module:function`.
        settings: `name=value` of the job function's arguments.
        changes: fields of the job that are overruled.
        plan: a layout in text form or a plan file; None for the plan that training would take.
        every: prove all layouts of up to `workers` workers.
        options: further arguments of `prove`.
        on_cell: called as each layout of a matrix is done.
    """

    job: str
    settings: tuple[str, ...]
    changes: Mapping[str, Any]
    plan: str | None
    every: bool
    workers: int | None
    options: Mapping[str, Any]
    on_cell: Callable[[Cell], None]


def prove_command(command: ProveCommand) -> Verdict | Matrix:
    """Prove what the command line says.

    Raises:
        UserError: options that contradict each other, or an error of `prove`.
    """
    settings = parse_settings(command.settings)
    again = functools.partial(_load, command.job, dict(settings), dict(command.changes))
    job = again()
    if not command.every:
        plan: Plan | str | None = command.plan
        if plan is None and command.workers is not None:
            plan = Plan(layout=Layout(data=command.workers))
        elif command.workers is not None and read_plan(plan or "").layout.workers != command.workers:
            raise UserError(
                f"--plan {command.plan} is for {read_plan(plan or '').layout.workers} workers, --workers says "
                f"{command.workers}: give one of the two"
            )
        return prove(job, plan, reference=again, **command.options)
    if command.workers is None:
        raise UserError("--all needs --workers N: how many workers a layout may have")
    settled = read_plan(command.plan) if command.plan is not None else None
    if settled is not None and settled.layout.workers > 1:
        raise UserError(
            f"--all and --plan {command.plan} are both given: --all tries every layout, so the plan must be serial (or a "
            "plan file without a layout, for its other settings)"
        )
    return prove_all(
        job, command.workers, plan=settled, reference=again, on_cell=command.on_cell, **command.options
    )  # fmt: skip


def _load(text: str, settings: Mapping[str, str], changes: Mapping[str, Any]) -> Job:
    return change_job(load_job(text, settings).job, changes)
