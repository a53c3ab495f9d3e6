"""Every layout of up to a number of workers, proved, refused with its reason, or refuted."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shardwise.errors import RunFailed, UserError
from shardwise.prove.compare import Yardstick
from shardwise.prove.execute import Setting, measure, refuse
from shardwise.prove.proof import judge_any, make_setting, settle
from shardwise.run.choose import with_threads
from shardwise.run.launch import print_report
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout, layouts
from shardwise.spec.plan import Plan
from shardwise.spec.verdict import Cell, Matrix


def prove_all(
    job: Job,
    workers: int,
    *,
    plan: Plan | None = None,
    steps: int = 3,
    device: str = "cpu",
    threads: int | None = None,
    recompute: str | None = None,
    resume: bool = False,
    reference: Callable[[], Job] | None = None,
    timeout_seconds: float = 600.0,
    report: Callable[[str], None] = print_report,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> Matrix:
    """Prove every layout of up to `workers` workers; arguments as of `prove`.

    Args:
        plan: everything but the layout (micro-batch, recompute, ...); None for the defaults.
        on_cell: called as each layout is done.

    Raises:
        UserError: the job cannot be proved under any plan, or a number makes no sense.
    """
    began = time.perf_counter()
    if workers < 1:
        raise UserError(f"workers={workers}: at least 1 is needed")
    given = plan or Plan()
    serial = settle(job, given.with_layout(Layout()), device=device, threads=threads, recompute=recompute)
    # The settled plan, and what the serial layout has no use for.
    whole = replace(
        serial,
        schedule=given.schedule,
        virtual_stages=given.virtual_stages,
        cuts=given.cuts,
        stage_layers=given.stage_layers,
        zero_stage=given.zero_stage,
        build=given.build,
        tensor_rules=given.tensor_rules,
        compression=given.compression,
        compression_rank=given.compression_rank,
        local_steps=given.local_steps,
    )
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory(prefix="shardwise-proof-") as folder:
        setting = make_setting(
            job,
            Path(folder),
            steps=steps,
            device=device,
            reference=reference,
            resume=resume,
            timeout_seconds=timeout_seconds,
            report=report,
        )
        measured: tuple[Yardstick, list[str]] | None = None
        for layout in layouts(workers):
            candidate = with_threads(replace(whole.with_layout(layout), threads=threads))
            cell = _refused(job, candidate)
            if cell is None:
                if measured is None:
                    measured = measure(setting, serial)
                cell = _proved(setting, candidate, *measured)
            cells.append(cell)
            on_cell(cell)
    return Matrix(job=job.name, workers=workers, cells=tuple(cells), seconds=time.perf_counter() - began)


def _refused(job: Job, plan: Plan) -> Cell | None:
    """The cell of a plan that is refused before anything starts."""
    try:
        refuse(job, plan)
    except UserError as error:
        return Cell(layout=str(plan.layout), result="refused", reason=str(error))
    return None


def _proved(setting: Setting, plan: Plan, yardstick: Yardstick, notes: list[str]) -> Cell:
    try:
        verdict = judge_any(setting, plan, yardstick, notes)
    except UserError as error:
        # Contract 5: what a plan cannot do is known before any worker starts.
        return Cell(layout=str(plan.layout), result="failed", reason=f"refused after its workers had started: {error}")
    except RunFailed as error:
        return Cell(layout=str(plan.layout), result="failed", reason=str(error).splitlines()[0])
    reason = "; ".join(finding.message for finding in verdict.findings)
    return Cell(layout=str(plan.layout), result=verdict.outcome, reason=reason, verdict=verdict)
