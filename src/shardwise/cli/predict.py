"""`shardwise predict`: what would each published or planned layout of a table cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from shardwise.errors import DataError


@click.command()
@click.option(
    "--table",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="CSV of runs in the canonical columns.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write run_id,step_seconds,memory_gib,fits here instead of to stdout.",
)
@click.option(
    "--machine",
    "machine_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Machine file with the measured links of the cluster.",
)
@click.option(
    "--measured",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="RUNS.csv",
    help="Runs that you measured, in the same columns with what came out; the table is predicted for their software.",
)
@click.option("--strict", is_flag=True, help="Refuse a table with a cell that is not of its kind, instead of guessing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document with every prediction broken down.")
def predict(
    table: Path, out: Path | None, machine_file: Path | None, measured: Path | None, strict: bool, as_json: bool
) -> None:
    """Predict step time, memory and feasibility of every run in a table.

    Measured columns of the table are not read, only those of --measured. Blank cells are unknown and filled in by the rules
    in docs/predict.md.
    """
    from shardwise.cli.calibrated import calibrate_table, note_misspelt, say
    from shardwise.planner.learned import kept_words
    from shardwise.planner.predict import predict_runs, write_csv
    from shardwise.planner.repair import hardware_of
    from shardwise.planner.runs import read_runs
    from shardwise.spec.machine import Machine

    machine = Machine.read(machine_file) if machine_file else None
    note_misspelt(table)
    rows = read_runs(table, strict=strict)
    if machine is not None and machine.software is not None:
        told = kept_words(machine.software)
        click.echo(f"note: {told if measured is None else 'these runs replace what ' + told}", err=True)
    software, calibration = None, None
    if measured is not None:
        software, calibration = calibrate_table(measured, machine, {hardware_of(row) for row in rows})
    found = list(predict_runs(rows, machine, software=software))
    text = write_csv(found)
    if out is not None:
        _write(out, text)
    unknown = [item for item in found if item.estimate is None]
    for item in unknown[:10]:
        click.echo(f"no prediction for {item.run_id}: {item.reason}", err=True)
    if len(unknown) > 10:
        click.echo(f"... and {len(unknown) - 10} more without a prediction", err=True)
    guessed = [item for item in found if item.assumed]
    for item in guessed[:10]:
        click.echo(f"{item.run_id}: {'; '.join(item.assumed)}", err=True)
    if len(guessed) > 10:
        click.echo(f"... and {len(guessed) - 10} more rows with something assumed; --json tells all", err=True)
    if as_json:
        records = [item.record() for item in found]
        document: dict[str, Any] = {"table": str(table), "out": str(out) if out else None, "predictions": records}
        if calibration is not None:
            document["calibration"] = calibration
        click.echo(json.dumps(document))
    elif out is None:
        click.echo(text, nl=False)
    if calibration is not None:
        say(calibration, err=True)
    click.echo(f"{len(found) - len(unknown)} of {len(found)} runs predicted", err=True)
    if found and len(unknown) == len(found):
        raise SystemExit(1)


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"--out {out}: {error.strerror}; give a file in an existing, writable folder") from error
