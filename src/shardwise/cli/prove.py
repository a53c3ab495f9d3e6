"""`shardwise prove`: is the parallel run right."""

from __future__ import annotations

import sys
from typing import Any

import click


@click.command()
@click.argument("job")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A hyper-parameter of the job; repeatable."
)
@click.option("--plan", metavar="PLAN", help="data=2, ... or a plan file (.toml). As training chooses it if left out.")
@click.option("--all", "every", is_flag=True, help="Prove every layout of up to --workers workers; print the matrix.")
@click.option("--workers", type=int, metavar="N", help="Number of workers; with --all the most of them.")
@click.option("--steps", type=int, default=3, show_default=True, metavar="K", help="Optimizer steps to compare.")
@click.option("--resume", is_flag=True, help="Go on from a checkpoint in the middle of the plan's steps.")
@click.option("--batch-size", type=int, metavar="N", help="Samples per step over all workers together.")
@click.option("--micro-batch", type=int, metavar="N", help="Samples per worker and forward pass; gradients accumulate.")
@click.option("--seed", type=int, metavar="N", help="Of initial weights and sample order.")
@click.option("--threads", type=int, metavar="N", help="Compute threads per worker.")
@click.option("--recompute", type=click.Choice(["none", "selective", "full"]), help="As in train.")
@click.option("--device", default="cpu", show_default=True, metavar="KIND", help="cpu, cuda, ... or auto.")
@click.option("--timeout", default="10m", show_default=True, metavar="TIME", help="Longest wait for a missing worker.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.option("--quiet", is_flag=True, help="Nothing on stderr but errors.")
def prove(
    job: str,
    settings: tuple[str, ...],
    plan: str | None,
    every: bool,
    workers: int | None,
    timeout: str,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> int:
    """Prove that JOB trained under a plan is JOB trained on one worker: losses, gradients, weights, buffers, optimizer state.

    A float64 run on one worker is the reference; the plan's run may be no further from it than a small multiple of what
    float32 on one worker is. Exit code 0: proved. 1: refuted, with what is wrong, not comparable, or
    inexact (a plan with gradient compression or local steps, whose distance is told instead). 2: wrong input.
    """
    from shardwise.cli.main import print_json, stdout_to_stderr
    from shardwise.prove.command import ProveCommand, prove_command
    from shardwise.spec.verdict import Cell, Matrix
    from shardwise.units import parse_seconds

    def tell(cell: Cell) -> None:
        if not quiet:
            print(f"{cell.layout}: {cell.result}", file=sys.stderr)

    changes = {name: rest.pop(name) for name in ("batch_size", "micro_batch", "seed")}
    command = ProveCommand(
        job=job,
        settings=settings,
        changes={name: value for name, value in changes.items() if value is not None},
        plan=plan,
        every=every,
        workers=workers,
        options={**rest, "timeout_seconds": parse_seconds(timeout)},
        on_cell=tell,
    )
    with stdout_to_stderr(as_json):
        answer = prove_command(command)
    if as_json:
        print_json(answer.to_dict())
    else:
        print(answer)
    return 0 if (answer.sound if isinstance(answer, Matrix) else answer.proved) else 1
