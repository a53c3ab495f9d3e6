"""`shardwise train`: train it."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from shardwise.spec.job import Job
    from shardwise.spec.plan import Plan


@click.command()
@click.argument("job")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A hyper-parameter of the job; repeatable."
)
@click.option(
    "--plan",
    metavar="PLAN",
    help="serial, data=2, ..., a plan file (.toml), or auto (as if left out): planned for this machine.",
)
@click.option("--no-trial", is_flag=True, help="Plan without trying the best plans for some steps first.")
@click.option("--workers", type=int, metavar="N", help="Number of workers in all.")
@click.option("--threads", type=int, metavar="N", help="Compute threads per worker.")
@click.option(
    "--recompute", type=click.Choice(["none", "selective", "full"]), help="Compute activations again, to save memory."
)
@click.option("--device", default="auto", show_default=True, metavar="KIND", help="auto, cpu, cuda, ...")
@click.option("--epochs", type=int, metavar="N", help="Passes over the training data.")
@click.option("--steps", type=int, metavar="N", help="Optimizer steps in all, instead of epochs.")
@click.option("--batch-size", type=int, metavar="N", help="Samples per step over all workers together.")
@click.option("--micro-batch", type=int, metavar="N", help="Samples per worker and forward pass; gradients accumulate.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Arithmetic of forward and backward passes.")
@click.option("--compile/--no-compile", "compile_model", default=None, help="Use torch.compile.")
@click.option("--seed", type=int, metavar="N", help="Of initial weights, sample order and randomness.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Run folder. Default: runs/JOB-DATE-N.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --out.")
@click.option("--auto-resume", is_flag=True, help="The same if --out holds a run, else begin one.")
@click.option(
    "--checkpoint-every",
    default="10m",
    show_default=True,
    metavar="WHEN",
    help="Steps (500) or time (10m); never: only at the end.",
)
@click.option("--keep-last", type=int, default=2, show_default=True, metavar="K", help="Checkpoints to keep.")
@click.option(
    "--last-checkpoint/--no-last-checkpoint",
    default=True,
    show_default=True,
    help="Write a checkpoint after the last step too, to train for longer from. The weights are kept in any case.",
)
@click.option(
    "--evaluate-every",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Evaluate after every N epochs, and at the end; 0: only at the end.",
)
@click.option(
    "--max-restarts", type=int, default=0, show_default=True, metavar="N", help="Heal the run after a dead worker."
)
@click.option(
    "--nnodes", type=int, default=1, show_default=True, metavar="N", help="Machines; run the command on each."
)
@click.option("--node-rank", type=int, default=0, show_default=True, metavar="I", help="Number of this machine.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where the machines meet: an address of machine 0.")
@click.option("--rdzv-id", default="shardwise", show_default=True, metavar="NAME", help="Name of the meeting.")
@click.option("--timeout", default="10m", show_default=True, metavar="TIME", help="Longest wait for a missing worker.")
@click.option(
    "--stall-after",
    default="60s",
    show_default=True,
    metavar="TIME",
    help="Longest step before it is looked into; 0: never.",
)
@click.option("--trace", metavar="FIRST:STOP", help="Keep a trace of these steps of all ranks, for Perfetto or Chrome.")
@click.option("--balance", is_flag=True, help="Divide each batch by the measured speed of the workers.")
@click.option("--prove", "prove_first", is_flag=True, help="First prove that the plan's steps equal serial ones.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout; progress stays on stderr.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def train(
    job: str,
    settings: tuple[str, ...],
    out: Path | None,
    nnodes: int,
    node_rank: int,
    rdzv_endpoint: str | None,
    rdzv_id: str,
    timeout: str,
    stall_after: str,
    trace: str | None,
    prove_first: bool,
    no_trial: bool,
    auto_resume: bool,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> None:
    """Train JOB: a built-in name (digits, cifar10, mnist, charlm, moe, linear, autoencoder), file.py, file.py:function or
    package.module:function.

    The result does not depend on the number of workers: each step trains on the same global batch, and its gradient is
    that of one worker up to rounding.
    """
    from shardwise.cli.main import loading, print_json, stdout_to_stderr

    with loading():
        from shardwise.run.command import TrainCommand, train_command
        from shardwise.run.launch import Nodes
        from shardwise.run.progress import tell
        from shardwise.run.summary import closing_lines, predicted
        from shardwise.run.trace import parse_trace
        from shardwise.units import parse_seconds

    changes = {name: rest.pop(name) for name in ("epochs", "steps", "batch_size", "micro_batch", "precision", "seed")}
    changes["compile"] = rest.pop("compile_model")
    command = TrainCommand(
        job=job,
        settings=settings,
        changes={name: value for name, value in changes.items() if value is not None},
        options={
            **rest,
            "plan": rest["plan"] or "auto",
            "resume": "auto" if auto_resume else rest["resume"],
            "out": out,
            "nodes": Nodes(count=nnodes, node_rank=node_rank, endpoint=rdzv_endpoint, run_id=rdzv_id),
            "timeout_seconds": parse_seconds(timeout),
            "stall_seconds": parse_seconds(stall_after),
            "recording": parse_trace(trace) if trace is not None else None,
            "progress": not quiet,
        },
        given=_given() | ({"resume"} if auto_resume else set()),
    )
    with stdout_to_stderr(as_json):
        chooser = functools.partial(_planned, trial=not no_trial, show=not quiet)
        run = train_command(command, before=_prove if prove_first else None, chooser=chooser)
    if run is None:
        return
    if as_json:
        told = predicted(run)
        print_json(run.summary if told is None else {**run.summary, "predicted": told})
    if not quiet:
        tell("\n".join(closing_lines(run)))


def _prove(job: Job, plan: Plan) -> None:
    from shardwise.prove.proof import prove_before_training

    print(prove_before_training(job, plan), file=sys.stderr)


def _planned(job: Job, **options: Any) -> Plan:
    from shardwise.advise.auto import automatic  # only where a plan is wanted: a named one starts sooner

    return automatic(job, **options)


def _given() -> frozenset[str]:
    """Names of the options that stand on the command line."""
    context = click.get_current_context()
    source = click.core.ParameterSource.COMMANDLINE
    return frozenset(name for name in context.params if context.get_parameter_source(name) == source)
