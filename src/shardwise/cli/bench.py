"""`shardwise bench`: what did the parallelism buy."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardwise.errors import UserError

if TYPE_CHECKING:
    from shardwise.bench.result import Bench


@click.command()
@click.argument("job", required=False)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A hyper-parameter of the job; repeatable."
)
@click.option(
    "--plans",
    multiple=True,
    metavar="PLANS",
    help="Plans with commas between: serial,data=2,data=2+shard=2 or plan files (.toml); repeatable.",
)
@click.option("--all", "every", is_flag=True, help="Every layout of up to --workers workers.")
@click.option(
    "--workers", type=int, metavar="N", help="Most workers of a layout. Default: the cores or accelerators here."
)
@click.option(
    "--steps", type=int, metavar="K", help="Optimizer steps of each run. Default: about three seconds of them."
)
@click.option("--to", metavar="METRIC=VALUE", help="Train until a test metric is reached, such as accuracy=0.97.")
@click.option("--epochs", type=int, metavar="N", help="Most passes over the data with --to.")
@click.option("--weak", is_flag=True, help="Also measure weak scaling: the job's batch for every worker.")
@click.option(
    "--rounds", type=int, default=3, show_default=True, metavar="R", help="How often each plan is run, in turn."
)
@click.option("--price", type=float, metavar="P", help="Price of a worker hour, for the cost of an epoch.")
@click.option("--batch-size", type=int, metavar="N", help="Samples per step over all workers together.")
@click.option("--device", default="auto", show_default=True, metavar="KIND", help="auto, cpu, cuda, ...")
@click.option("--timeout", default="2m", show_default=True, metavar="TIME", help="Longest wait for a missing worker.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Result folder. Default: runs/bench-JOB-DATE-N.",
)
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="A B",
    help="Compare two stored results instead of measuring.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.option("--quiet", is_flag=True, help="Nothing on stderr but errors.")
def bench(
    job: str | None,
    settings: tuple[str, ...],
    epochs: int | None,
    batch_size: int | None,
    timeout: str,
    out: Path | None,
    compare: tuple[Path, Path] | None,
    as_json: bool,
    quiet: bool,
    **rest: Any,
) -> int:
    """Measure JOB on one worker and under other plans: speed-up, efficiency, where the time goes, and why it is not less.

    Every plan is run in turn, several times. The folder gets bench.json and, with the extra `report`, report.html. Exit
    code 0: measured, also when a plan was refused or failed. 1: interrupted, or the one-worker run failed. 2: wrong input.
    """
    from shardwise.cli.main import print_json, stdout_to_stderr

    if compare is not None:
        if job is not None:
            raise UserError(f"a job ({job}) and --compare are both given: --compare measures nothing")
        return _compare(*compare, as_json)
    if job is None:
        raise UserError("give a JOB to measure (digits, file.py, ...), or --compare A B")
    if epochs is not None and rest["to"] is None:
        raise UserError("--epochs goes with --to; a bench without a target takes --steps")

    from shardwise.bench.command import BenchCommand
    from shardwise.bench.command import bench as measure
    from shardwise.bench.report import write_result
    from shardwise.bench.text import result_lines
    from shardwise.units import parse_seconds

    def tell(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    changes = {"batch_size": batch_size, "epochs": epochs}
    command = BenchCommand(
        job=job,
        settings=settings,
        changes={name: value for name, value in changes.items() if value is not None},
        timeout_seconds=parse_seconds(timeout),
        out=out if out is not None else _free_folder(job),
        tell=tell,
        **rest,
    )
    with stdout_to_stderr(as_json):
        result = measure(command)
        written = write_result(result, command.out)
    if as_json:
        print_json(result.to_dict())
        tell("\n".join(written))
    else:
        print("\n".join([*result_lines(result), "", *written]))
    return 1 if result.interrupted else 0


def _free_folder(job: str) -> Path:
    name = Path(job.partition(":")[0]).stem if ".py" in job else job.replace(":", "-")
    day = time.strftime("%Y%m%d")
    number = 1
    while (place := Path("runs") / f"bench-{name}-{day}-{number}").exists():
        number += 1
    return place


def _compare(first: Path, second: Path, as_json: bool) -> int:
    from shardwise.bench.compare import compare, comparison_lines
    from shardwise.bench.result import Bench
    from shardwise.cli.main import print_json

    before: Bench = Bench.read(first)
    comparison = compare(before, Bench.read(second))
    if as_json:
        print_json(comparison.to_dict())
    else:
        print("\n".join(comparison_lines(comparison)))
    return 0
