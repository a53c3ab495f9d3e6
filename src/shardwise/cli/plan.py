"""`shardwise plan`: which layout, will it fit, how fast, and why, for a model described in words on a catalogue machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardwise.errors import UserError
from shardwise.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from shardwise.planner.search import Candidate, Found, Problem
    from shardwise.spec.machine import Machine


@click.command()
@click.option(
    "--model", required=True, help="Such as gpt:layers=96,hidden=12288,heads=96,seq=2048,vocab=51200 or llama:..."
)
@click.option("--machine", required=True, help="Catalogue name, such as a100-80gb-sxm, or a machine file.")
@click.option("--nodes", default=1, show_default=True, type=click.IntRange(min=1), help="Number of nodes.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), help="Workers that share the fast link; default as usual.")
@click.option("--network", type=click.FloatRange(min=0, min_open=True), help="Gbit/s between nodes of one worker.")
@click.option("--memory", help="Memory of one device, such as 80GiB; default from the catalogue.")
@click.option("--batch", default=512, show_default=True, type=click.IntRange(min=1), help="Sequences per step, in all.")
@click.option("--precision", default="bf16", show_default=True, type=click.Choice(["fp32", "fp16", "bf16", "fp8"]))
@click.option("--attention", default="flash", show_default=True, type=click.Choice(["flash", "math"]))
@click.option("--top", default=5, show_default=True, type=click.IntRange(min=1), help="Plans to show.")
@click.option("--why-not", "why_not_text", help="Explain one layout, such as tensor=4.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def plan(
    model: str,
    machine: str,
    nodes: int,
    gpus_per_node: int | None,
    network: float | None,
    memory: str | None,
    batch: int,
    precision: str,
    attention: str,
    top: int,
    why_not_text: str | None,
    as_json: bool,
) -> None:
    """Rank the layouts of a model on a machine by predicted step time, and say why."""
    from shardwise.planner.explain import losers, nothing_fits, what_helps, why_best, why_not
    from shardwise.planner.search import Problem, search
    from shardwise.spec.facts import Transformer
    from shardwise.spec.layout import Layout

    described, seq_len = Transformer.parse(model)
    place = _machine(machine, gpus_per_node, network, memory)
    problem = Problem(
        model=described,
        machine=place,
        workers=nodes * place.gpus_per_node,
        seq_len=seq_len,
        global_batch=batch,
        precision=precision,
        attention=attention,
    )
    wanted = Layout.parse(why_not_text) if why_not_text else None
    found = search(problem)
    reasons = losers(problem, found)
    asked = why_not(problem, wanted, found) if wanted is not None else None
    helps = what_helps(found)
    told = nothing_fits(found) if found.best is None else why_best(found)
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
        if asked is not None:
            document["why_not"] = {"layout": str(wanted), "reason": asked}
        click.echo(json.dumps(document))
    else:
        _print_table(problem, found, top)
        click.echo(told)
        for item in reasons:
            click.echo(f"  {item.family}: {item.layout}: {item.sentence}.")
        for sentence in helps:
            click.echo(f"  would help: {sentence}.")
        if asked is not None:
            click.echo(f"{wanted}: {asked}.")
    if found.best is None:
        raise SystemExit(1)


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
    size = Figure(float(parse_bytes(memory)), "nominal", "--memory")
    return replace(place, accelerator=replace(place.accelerator, memory_bytes=size))


def _record(item: Candidate, problem: Problem) -> dict[str, Any]:
    case, found = item.case, item.estimate
    return {
        "layout": case.layout().degrees,
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
    click.echo(f"{problem.model} on {problem.machine}; {problem.workers} workers, {found.priced} layouts priced")
    for rank, item in enumerate(found.plans[:top], 1):
        speed = problem.global_batch / item.estimate.step_seconds
        exposed = sum(item.estimate.seconds[name] for name in ("tensor", "context", "shards", "gradients"))
        share = 100 / item.estimate.step_seconds
        sure = "sure to fit" if item.estimate.certain else "near the limit"
        click.echo(
            f"{rank}. {format_seconds(item.estimate.step_seconds)}  {speed:.3g} samples/s  "
            f"{format_bytes(item.estimate.memory.total)} ({sure})  communication {share * exposed:.0f} %  "
            f"bubble {share * item.estimate.seconds['bubble']:.0f} %  {item}"
        )
