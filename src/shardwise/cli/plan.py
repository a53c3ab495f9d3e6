"""`shardwise plan`: which layout, will it fit, how fast, and why, for a job or for a transformer described in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardwise.errors import UserError
from shardwise.units import format_bytes, format_count, format_seconds, parse_bytes

if TYPE_CHECKING:
    from shardwise.planner.search import Candidate, Found, Problem
    from shardwise.spec.machine import Machine
    from shardwise.spec.plan import Plan


@click.command()
@click.argument("job", required=False)
@click.option(
    "--model",
    metavar="SPEC",
    help="Instead of JOB: gpt:layers=24,hidden=2048,heads=16, also seq= and vocab=, or llama:...",
)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A hyper-parameter of the job; repeatable."
)
@click.option(
    "--machine",
    metavar="NAME|FILE",
    help="Catalogue name, such as a100-80gb-sxm, or a machine file. JOB: this machine if left out.",
)
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(min=1), metavar="N", help="Number of nodes.")
@click.option(
    "--gpus-per-node",
    type=click.IntRange(min=1),
    metavar="N",
    help="Workers that share the fast link; default as usual.",
)
@click.option(
    "--network", type=click.FloatRange(min=0, min_open=True), metavar="X", help="Gbit/s between nodes of one worker."
)
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="At most so many workers for JOB.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Compute threads per worker of JOB.")
@click.option("--memory", metavar="SIZE", help="Memory of one device (of one worker on a CPU), such as 80GiB.")
@click.option(
    "--batch", "--batch-size", type=click.IntRange(min=1), metavar="N", help="Samples per step, in all. --model: 512."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "pure-bf16", "fp8", "fp4"]),
    help="--model: bf16 if left out, fp16 on parts without it.",
)
@click.option(
    "--attention", type=click.Choice(["flash", "math"]), help="Of --model; flash if left out, math on old parts."
)
@click.option(
    "--measured",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RUNS.csv",
    help="Of --model: runs that you measured on this machine; the plans are priced for their software.",
)
@click.option(
    "--measured-step",
    "measured_steps",
    type=(click.Path(path_type=Path, dir_okay=False), float),
    multiple=True,
    metavar="PLAN.toml SECONDS",
    help="The same of one plan (as -o writes it) of this --model and --batch; repeatable.",
)
@click.option(
    "--save-machine",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep the machine with what was learned, for --machine (.toml).",
)
@click.option("--top", default=5, show_default=True, type=click.IntRange(min=1), metavar="N", help="Plans to show.")
@click.option("--why-not", "why_not_text", metavar="LAYOUT", help="Explain one layout, such as tensor=4.")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the best plan (.toml).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def plan(
    job: str | None,
    model: str | None,
    settings: tuple[str, ...],
    machine: str | None,
    workers: int | None,
    threads: int | None,
    batch: int | None,
    precision: str | None,
    attention: str | None,
    out: Path | None,
    measured: Path | None,
    measured_steps: tuple[tuple[Path, float], ...],
    save_machine: Path | None,
    **rest: Any,
) -> None:
    """Rank the plans for JOB by predicted step time, and say why; or those of a transformer that is described by --model.

    JOB is what `train` takes. Its operations are counted in one step, or on tensors without memory for machines of the
    catalogue. Only plans that `train` can run are shown.
    """
    if (job is None) == (model is None):
        given = "neither" if job is None else "both"
        raise UserError(f"plan was given {given} of JOB and --model: give one of them, as in: shardwise plan digits")
    if job is not None:
        _refuse("JOB", attention=attention, measured=measured, measured_step=measured_steps or None)
        _refuse("JOB", save_machine=save_machine)
        changes = {"batch_size": batch, "precision": precision}
        code = _for_job(
            job, settings, {k: v for k, v in changes.items() if v is not None}, machine, workers, threads, out, **rest
        )
    else:
        _refuse("--model", set=settings or None, workers=workers, threads=threads)
        if machine is None:
            raise UserError("--model needs --machine: a catalogue name, such as a100-80gb-sxm, or a machine file")
        runs = (measured, measured_steps, save_machine)
        code = _for_model(str(model), machine, batch or 512, precision, attention, out, runs, **rest)
    if code:
        raise SystemExit(code)


def _refuse(kind: str, **given: Any) -> None:
    """Settings that would have no effect."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')} means nothing with {kind}: leave it out")


def _for_job(
    job: str,
    settings: tuple[str, ...],
    changes: dict[str, Any],
    machine: str | None,
    workers: int | None,
    threads: int | None,
    out: Path | None,
    *,
    nodes: int,
    gpus_per_node: int | None,
    network: float | None,
    memory: str | None,
    top: int,
    why_not_text: str | None,
    as_json: bool,
) -> int:
    from shardwise.cli.plan_job import plan_job
    from shardwise.spec.layout import Layout

    if changes.get("precision") not in (None, "fp32", "bf16"):
        raise UserError(f"--precision {changes['precision']}: a job trains in fp32 or bf16")
    place = None
    if machine is not None:
        place = without_software(_machine(machine, gpus_per_node, network, None))
    elif gpus_per_node is not None or network is not None or nodes > 1:
        raise UserError("--nodes, --gpus-per-node and --network describe a cluster: also give its --machine")
    return plan_job(
        job,
        settings,
        changes,
        machine=place,
        nodes=nodes,
        workers=workers,
        threads=threads,
        memory=None if memory is None else memory_bytes(memory),
        top=top,
        wanted=Layout.parse(why_not_text) if why_not_text else None,
        out=out,
        as_json=as_json,
    )


def _for_model(
    model: str,
    machine: str,
    batch: int,
    precision: str | None,
    attention: str | None,
    out: Path | None,
    runs: tuple[Path | None, tuple[tuple[Path, float], ...], Path | None],
    *,
    nodes: int,
    gpus_per_node: int | None,
    network: float | None,
    memory: str | None,
    top: int,
    why_not_text: str | None,
    as_json: bool,
) -> int:
    from shardwise.cli.calibrated import calibrated, say
    from shardwise.cli.plan_job import FAMILIES, check_out
    from shardwise.planner.confidence import published_words
    from shardwise.planner.explain import enough_workers, losers, nothing_fits, what_helps, why_best, why_not
    from shardwise.planner.search import Problem, as_plan, search
    from shardwise.spec.facts import Transformer
    from shardwise.spec.layout import Layout

    check_out(out)
    described, seq_len = Transformer.parse(model)
    place = _machine(machine, gpus_per_node, network, memory)
    usual = _usual_software(place, precision)
    problem = Problem(
        model=described,
        machine=place,
        workers=nodes * place.gpus_per_node,
        seq_len=seq_len,
        global_batch=batch,
        precision=precision or usual[1],
        attention=attention or usual[0],
    )
    problem, calibration = calibrated(problem, *runs)
    wanted = Layout.parse(why_not_text) if why_not_text else None
    found = search(problem)
    reasons = losers(problem, found)
    asked = why_not(problem, wanted, found) if wanted is not None else None
    helps = what_helps(found)
    told = nothing_fits(found, enough_workers(problem)) if found.best is None else why_best(found)
    if as_json:
        rejected = [{"layout": item.layout, "family": item.family, "reason": item.sentence} for item in reasons]
        document: dict[str, Any] = {
            "model": str(described),
            "machine": str(place),
            "workers": problem.workers,
            "priced": found.priced,
            "plans": [_record(item, problem) for item in found.plans[:top]],
            "rejected": rejected,
            "why": told,
            "what_helps": list(helps),
        }
        if calibration is not None:
            document["calibration"] = calibration
        if asked is not None:
            document["why_not"] = {"layout": str(wanted), "reason": asked}
        click.echo(json.dumps(document))
    else:
        _print_table(problem, found, top)
        if calibration is not None:
            say(calibration, err=False)
        click.echo(told)
        if found.best is not None:
            click.echo(f"  how sure: {published_words(found.best.case)}; layouts of one model err alike.")
        for item in reasons[:FAMILIES]:
            click.echo(f"  {item.family}: {item.layout}: {item.sentence}.")
        if len(reasons) > FAMILIES:
            click.echo(f"  and {len(reasons) - FAMILIES} more: --json tells about all, --why-not about one layout.")
        for sentence in helps:
            click.echo(f"  would help: {sentence}.")
        if asked is not None:
            click.echo(f"{wanted}: {asked}.")
    if out is not None and found.best is not None:
        _write(as_plan(found.best, (told,)), out)
    return 0 if found.best is not None else 1


def _write(plan: Plan, out: Path) -> None:
    """Write the plan of a described model, and say what of it `train` does not run."""
    from shardwise.cli.plan_job import write_plan
    from shardwise.spec.runnable import refusals

    write_plan(plan, out)
    click.echo(f"written to {out}", err=True)
    for reason in refusals(plan):
        click.echo(f"note: shardwise train refuses it as it is: plan {plan.layout}{reason}", err=True)


SMALLEST_MEMORY = 2**20
"""Bytes; less than this for a device is a number without its unit."""


def memory_bytes(text: str) -> float:
    """What `--memory` says.

    Raises:
        UserError: no size, or less than a megabyte.
    """
    size = float(parse_bytes(text))
    if size < SMALLEST_MEMORY:
        raise UserError(
            f"--memory {text} is {format_bytes(size)}: give the memory of a device with its unit, such as 80GiB"
        )
    return size


def _machine(name: str, gpus_per_node: int | None, network: float | None, memory: str | None) -> Machine:
    from dataclasses import replace

    from shardwise.planner import catalogue
    from shardwise.spec.machine import Figure, Machine

    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        place = Machine.read(path)
        place = replace(place, gpus_per_node=gpus_per_node or place.gpus_per_node)
        place = place.with_network(network, "--network") if network else place
    elif catalogue.canonical_name(name) is None:
        raise UserError(f"--machine {name}: no such catalogue machine or file; known are {', '.join(catalogue.NAMES)}")
    else:
        place = catalogue.machine(name, gpus_per_node=gpus_per_node, gbits_per_gpu=network)
    if memory is None:
        return place
    size = Figure(memory_bytes(memory), "nominal", "--memory")
    return replace(place, accelerator=replace(place.accelerator, memory_bytes=size))


def without_software(place: Machine) -> Machine:
    """The machine of a JOB, whose operations are counted and priced one by one: runs of transformers say nothing of them."""
    from dataclasses import replace

    if place.software is not None:
        click.echo(f"note: what {place.software.source} says about software is for --model, and left out", err=True)
    return replace(place, software=None)


def _check_accelerator(place: Machine, precision: str | None) -> None:
    """Whether the formulas of `--model` hold for a machine file.

    Raises:
        UserError: it is of CPUs, or lacks the rate of a precision.
    """
    if place.measured is not None:
        raise UserError(
            f"--machine: {place.name} was measured by `shardwise probe` and has CPUs, but --model knows formulas of accelerators "
            "only: give a catalogue name or a file with an accelerator's figures, or plan a JOB on it"
        )
    peaks, fractions = place.accelerator.peak_flops, place.accelerator.matmul_fraction
    needed = {"fp8": "bf16", "fp4": "bf16", "pure-bf16": "bf16"}.get(
        precision or "", precision
    )  # narrow products fall back to bf16
    if needed is not None and not (needed in peaks and needed in fractions):
        raise UserError(
            f"--precision {precision}: {place.accelerator.name} states no peak_flops and matmul_fraction for {needed}; it has "
            f"{', '.join(sorted(set(peaks) & set(fractions)))}"
        )


def _usual_software(place: Machine, precision: str | None) -> tuple[str, str]:
    """(attention, precision) that the part is used with; says where that is not bf16, or where a file cannot be planned with.

    Raises:
        UserError: see `_check_accelerator`.
    """
    from shardwise.planner.case import usual_kernels

    _check_accelerator(place, precision)
    usual = usual_kernels(place.accelerator)
    if precision is None and usual[1] != "bf16":
        click.echo(f"note: {place.accelerator.name} has no bf16 units: planned in {usual[1]}", err=True)
    elif precision in ("bf16", "pure-bf16") and usual[1] != "bf16":
        click.echo(
            f"note: {place.accelerator.name} has no bf16 units, bf16 runs at the speed of fp32: try fp16", err=True
        )
    return usual


def _record(item: Candidate, problem: Problem) -> dict[str, Any]:
    from shardwise.planner.confidence import range_source, step_range

    case, found = item.case, item.estimate
    return {
        "layout": case.layout().degrees,
        "workers": case.workers,
        "settings": {
            "zero_stage": case.zero_stage,
            "micro_batch": case.micro_batch,
            "micro_batches": case.micro_batches,
            "virtual_stages": case.virtual_stages,
            "schedule": case.schedule,
            "recompute": case.recompute,
            "precision": case.precision,
        },
        "step_seconds": found.step_seconds,
        "step_seconds_range": [factor * found.step_seconds for factor in step_range(case)],
        "range_of": range_source(case),
        "samples_per_second": problem.global_batch / found.step_seconds,
        "memory_bytes": round(found.memory.total),
        "fits": found.fits,
        "certain": found.certain,
        "breakdown": {
            "seconds": found.seconds,
            "bytes": {key: round(value) for key, value in found.memory.by_part().items()},
        },
    }


def _print_table(problem: Problem, found: Found, top: int) -> None:
    workers = "1 worker" if problem.workers == 1 else f"{problem.workers} workers"
    click.echo(f"{problem.model} on {problem.machine}; {workers}, {found.priced} layouts priced")
    for rank, item in enumerate(found.plans[:top], 1):
        speed = problem.global_batch / item.estimate.step_seconds
        exposed = sum(item.estimate.seconds[name] for name in ("tensor", "context", "shards", "gradients"))
        share = 100 / item.estimate.step_seconds
        sure = "sure to fit" if item.estimate.certain else "near the limit"
        click.echo(
            f"{rank}. {format_seconds(item.estimate.step_seconds)}  {format_count(speed)} samples/s  "
            f"{format_bytes(item.estimate.memory.total)} ({sure})  communication {share * exposed:.0f} %  "
            f"bubble {share * item.estimate.seconds['bubble']:.0f} %  {item}"
        )
