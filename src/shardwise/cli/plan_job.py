"""`shardwise plan JOB`: the ranked table, the reasons under it, and the plan file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardwise.errors import UserError
from shardwise.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from shardwise.advise.advice import Advice
    from shardwise.planner.jobsearch import JobCandidate
    from shardwise.spec.layout import Layout
    from shardwise.spec.machine import Machine
    from shardwise.spec.plan import Plan


FAMILIES = 10
"""Kinds of layouts that are told why they lose: those of one axis, then the fastest others; more of them nobody reads."""


def plan_job(
    job: str,
    settings: tuple[str, ...],
    changes: Mapping[str, Any],
    *,
    machine: Machine | None,
    nodes: int,
    workers: int | None,
    threads: int | None,
    memory: float | None,
    top: int,
    wanted: Layout | None,
    out: Path | None,
    as_json: bool,
) -> int:
    """Rank the plans for a job, say why, and write the winner where asked; the exit code."""
    from shardwise.advise.advice import advise
    from shardwise.cli.main import print_json, stdout_to_stderr
    from shardwise.planner.jobexplain import losers_of_job, nothing_runs, what_helps_job, why_best_job, why_not_job
    from shardwise.run.command import change_job, divide_changes, parse_settings
    from shardwise.run.jobfile import find_job

    _check_nodes(machine, nodes)
    check_out(out)
    _note_foreign(machine)
    with stdout_to_stderr(True):  # what the job itself prints is no part of the answer
        found_job = find_job(job)
        hyper_parameters, rest = divide_changes(parse_settings(settings), changes, found_job)
        made = change_job(found_job.call(hyper_parameters).job, rest)
        if machine is not None and machine.measured is None and workers is None:
            workers = nodes * machine.gpus_per_node
        advice = advise(
            made,
            machine=machine,
            workers=workers,
            nodes=1 if machine is None or machine.measured is None else nodes,
            memory_bytes=memory,
            threads=threads,
            top=max(top, 12),
            tell=lambda text: print(text, file=sys.stderr),
        )
        problem, found = advice.problem, advice.found
        asked = why_not_job(problem, wanted, found, advice.check) if wanted is not None else None
    told = nothing_runs(found) if found.best is None else why_best_job(problem, found)
    reasons = losers_of_job(problem, found)
    helps = what_helps_job(problem, found)
    if out is not None and found.best is not None:
        write_plan(found.best.as_plan((told,)), out)
    if as_json:
        document = _document(advice, made.name, top, told, helps)
        if asked is not None:
            document["why_not"] = {"layout": str(wanted), "reason": asked}
        print_json(document)
    else:
        _print(advice, made.name, top)
        click.echo(told + ".")
        shown = [item for item in reasons if not ("context" in item.family and _no_sequences(advice, item.plan))]
        shown.sort(key=lambda item: "+" in item.family)
        for reason in shown[:FAMILIES]:
            click.echo(f"  {reason.family}: {reason.plan}: {reason.sentence}.")
        if len(shown) > FAMILIES:
            click.echo(f"  and {len(shown) - FAMILIES} more: --json tells about all, --why-not about one layout.")
        for sentence in helps:
            click.echo(f"  would help: {sentence}.")
        for note in advice.facts.model.notes:
            click.echo(f"  note: {note}.")
        if asked is not None:
            click.echo(f"{wanted}: {asked}.")
        if out is not None and found.best is not None:
            spread = found.best.nodes
            meet = f" --nnodes {spread} --node-rank K --rdzv-endpoint HOST:PORT on each node" if spread > 1 else ""
            click.echo(f"written to {out}: shardwise train {job} --plan {out}{meet}")
    return 0 if found.best is not None else 1


def _no_sequences(advice: Advice, plan: Plan) -> bool:
    """Nobody asks for split sequences of a model without attention that cannot have them; JSON tells it all the same."""
    refused = any(item.plan == plan and item.estimate is None for item in advice.found.refused)
    return refused and not advice.facts.attention_bytes


def _check_nodes(machine: Machine | None, nodes: int) -> None:
    """Several machines that were probed must have been probed together, or their network be given."""
    if machine is None or machine.measured is None or nodes <= machine.measured.nodes:
        return
    if machine.inter.bytes_per_second.source != "--network":
        raise UserError(
            f"--nodes {nodes}: {machine.name} was probed as {machine.measured.nodes}; probe them together (`shardwise probe "
            "--nnodes`), or give the speed of the network between two workers with --network, in Gbit/s"
        )


def write_plan(plan: Plan, out: Path) -> None:
    """Write a plan file that `train`, `prove` and `bench` accept.

    Raises:
        UserError: it cannot be written.
    """
    import tomli_w

    try:
        out.write_text(tomli_w.dumps(plan.to_dict()), encoding="utf-8")
    except OSError as error:
        raise UserError(f"-o {out} cannot be written: {error.strerror}") from error


def _note_foreign(machine: Machine | None) -> None:
    """Figures of another machine answer for that one: said, because a step is counted and timed on this one."""
    if machine is None or machine.measured is None:
        return
    from shardwise.probe.place import this_place, warnings_about

    for warning in warnings_about(machine.measured, this_place()):
        print(f"note on the machine file: {warning}", file=sys.stderr)


def check_out(out: Path | None) -> None:
    """Whether the plan file can be written, before anything is counted.

    Raises:
        UserError: no plan file by its name, or no such folder.
    """
    if out is not None and out.suffix != ".toml":
        raise UserError(f"-o {out}: plan files end in .toml, because --plan tells them from layouts by that")
    if out is not None and not out.resolve().parent.is_dir():
        raise UserError(f"-o {out}: the folder {out.resolve().parent} does not exist")


def _document(advice: Advice, name: str, top: int, told: str, helps: tuple[str, ...]) -> dict[str, Any]:
    from shardwise.planner.jobexplain import losers_of_job

    found, facts = advice.found, advice.facts
    rejected = [
        {"layout": str(item.plan.layout), "plan": str(item.plan), "reason": item.reason} for item in found.refused
    ]
    rejected += [
        {"layout": str(item.plan.layout), "plan": str(item.plan), "family": item.family, "reason": item.sentence}
        for item in losers_of_job(advice.problem, found)
        if item.plan not in [one.plan for one in found.refused]
    ]
    return {
        "job": name,
        "machine": str(advice.problem.machine),
        "workers": advice.problem.workers,
        "batch_size": facts.batch_size,
        "parameters": facts.model.parameters,
        "forward_flops": facts.model.forward_flops,
        "counted": facts.model.origin,
        "notes": list(facts.model.notes),
        "priced": found.priced,
        "plans": [_record(item) for item in found.plans[:top]],
        "rejected": rejected,
        "why": told,
        "what_helps": list(helps),
    }


def _record(item: JobCandidate) -> dict[str, Any]:
    found = item.estimate
    settings = replace(item.plan, prediction=None, reasons=()).to_dict()
    return {
        "layout": item.plan.layout.degrees,
        "nodes": item.nodes,
        "plan": settings,
        "step_seconds": found.step_seconds,
        "samples_per_second": item.samples_per_second,
        "memory_bytes": round(found.memory_bytes),
        "fits": found.fits,
        "certain": found.certain,
        "confidence": found.confidence,
        "breakdown": {
            "seconds": found.seconds,
            "bytes": {name: round(value) for name, value in found.memory.items()},
        },
    }


def _print(advice: Advice, name: str, top: int) -> None:
    from shardwise.planner.jobstep import COMMUNICATION

    facts, problem = advice.facts, advice.problem
    place = problem.machine.accelerator.name if problem.machine.measured is not None else str(problem.machine)
    click.echo(
        f"{name}: {facts.model.parameters:,} parameters, batch {facts.batch_size}, {facts.model.origin}; "
        f"up to {problem.workers} workers on {place}; {advice.found.priced} plans priced"
    )
    rows = [("plan", "step", "samples/s", "memory", "compute", "messages", "bubble", "data", "confidence")]
    for item in advice.found.plans[:top]:
        found = item.estimate
        rows.append(
            (
                str(item),
                format_seconds(found.step_seconds),
                f"{item.samples_per_second:,.0f}",
                format_bytes(found.memory_bytes),
                f"{100 * found.share(('compute', 'optimizer', 'loop')):.0f} %",
                f"{100 * found.share(COMMUNICATION):.0f} %",
                f"{100 * found.share(('bubble',)):.0f} %",
                f"{100 * found.share(('data',)):.0f} %",
                found.confidence,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            text.ljust(width) if column in (0, 8) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())
