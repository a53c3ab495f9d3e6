"""`shardwise sweep`: many trainings at once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from shardwise.run.choose import Priced
    from shardwise.spec.job import Job


@click.command()
@click.argument("job")
@click.option(
    "--over",
    multiple=True,
    required=True,
    metavar="NAME=VALUES",
    help="A hyper-parameter and its values: 0.1,0.03 or LOW:HIGH[:log][:POINTS]; repeatable.",
)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="The same in all trials; repeatable.")
@click.option(
    "--search", type=click.Choice(["grid", "random", "tpe"]), default="grid", show_default=True, help="What to try."
)
@click.option("--trials", type=int, metavar="N", help="Combinations to try. Default: the whole grid, else 20.")
@click.option("--stop", metavar="asha", help="Pause poor trials early: asha, or asha:eta=3,min=1.")
@click.option("--folds", type=int, default=0, metavar="K", help="Cross-validate over K parts of the training split.")
@click.option("--seeds", type=int, default=1, show_default=True, metavar="S", help="Train each combination S times.")
@click.option("--metric", metavar="NAME", help="What to choose by. Default: the job's first metric.")
@click.option("--goal", type=click.Choice(["max", "min"]), help="Default: min for a loss or error, else max.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the search and the folds.")
@click.option("--lanes", type=int, metavar="N", help="Trials under way that tpe and asha do not wait for. Default: 8.")
@click.option("--plan", metavar="PLAN", help="Of each training: serial, data=2, ... Default: as fills the machine.")
@click.option("--device", default="auto", show_default=True, metavar="KIND", help="auto, cpu, cuda, ...")
@click.option("--workers", type=int, metavar="N", help="Cores for all trainings together. Default: all.")
@click.option("--on", metavar="PLACE", help="ray or ray://HOST:PORT; the folder must be one that all nodes share.")
@click.option("--epochs", type=int, metavar="N", help="Passes over the training data.")
@click.option("--steps", type=int, metavar="N", help="Optimizer steps in all, instead of epochs.")
@click.option("--batch-size", type=int, metavar="N", help="Samples per step.")
@click.option("--timeout", metavar="TIME", help="Longest time of one training.")
@click.option("--retries", type=int, default=1, show_default=True, metavar="N", help="After a worker was killed.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder. Default: runs/sweep-JOB-DATE-N.")
@click.option("--resume", is_flag=True, help="Go on with the sweep in --out: only what is missing runs.")
@click.option("--best", type=int, default=1, show_default=True, metavar="N", help="How many of the best to export.")
@click.option("--export", type=click.Path(path_type=Path), metavar="DIR", help="Put the best models' weights there.")
@click.option("--ensemble", type=int, default=0, metavar="K", help="Evaluate the mean of the best K models' outputs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout; progress stays on stderr.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def sweep(as_json: bool, quiet: bool, **rest: Any) -> None:
    """Train JOB with many combinations of its hyper-parameters, as many at once as the machine holds.

    Same seed, same trials, same results, whatever the number of workers. A killed sweep goes on with --resume.
    """
    from shardwise.cli.main import print_json, stdout_to_stderr
    from shardwise.run.progress import tell
    from shardwise.tasks.sweep.result import closing_lines
    from shardwise.tasks.sweep.settle import SweepOptions
    from shardwise.tasks.sweep.sweep import run_sweep

    changes = {name: rest.pop(name) for name in ("epochs", "steps", "batch_size")}
    options = SweepOptions(
        changes={name: value for name, value in changes.items() if value is not None},
        progress=not quiet,
        pricer=functools.partial(_prices, show=not quiet),
        **rest,
    )
    with stdout_to_stderr(as_json):
        done = run_sweep(options)
    if as_json:
        print_json(done.summary)
    if not quiet:
        tell("\n".join(closing_lines(done)))
    if done.failed is not None:
        tell(f"error: every trial failed; the first one: {done.failed}")
        raise SystemExit(2 if done.wrong_input else 1)


def _prices(job: Job, **options: Any) -> list[Priced] | str:
    from shardwise.advise.trials import price_trials  # only where no plan was named

    return price_trials(job, **options)
