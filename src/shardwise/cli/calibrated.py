"""`--measured` and `--measured-step`: machines of which a user has measured runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardwise.errors import UserError

if TYPE_CHECKING:
    from shardwise.planner.search import Problem
    from shardwise.spec.machine import Machine
    from shardwise.spec.software import Software


def calibrated(
    problem: Problem, measured: Path | None, steps: Sequence[tuple[Path, float]], save: Path | None
) -> tuple[Problem, dict[str, Any] | None]:
    """The problem on its machine with what measured runs say about the software, and what was learned as plain data.

    Raises:
        UserError: nothing measured, or not on this machine; or there is nothing to save.
    """
    from shardwise.planner.calibrate import calibrate, check_hardware, sample, sample_of
    from shardwise.planner.learned import kept_words, learned_record
    from shardwise.planner.measured import read_measured
    from shardwise.planner.search import case_of
    from shardwise.spec.plan import Plan

    place = problem.machine
    if measured is None and not steps:
        if save is not None:
            raise UserError("--save-machine keeps what measured runs say: also give --measured or --measured-step")
        if place.software is not None:
            click.echo(f"note: {kept_words(place.software)}", err=True)
        return problem, None
    samples = []
    if measured is not None:
        note_unread(measured)
        samples = sample(read_measured(measured), place, problem=problem)
    for path, seconds in steps:
        if not (math.isfinite(seconds) and seconds > 0):
            raise UserError(f"--measured-step {path} {seconds:g}: give the seconds of one step, a number above 0")
        samples.append(sample_of(case_of(Plan.read(path), problem), path.name, seconds))
    check_hardware(samples, {place.accelerator.name}, "and the plan is for --machine")
    if place.software is not None:
        click.echo(f"note: these runs replace what the machine file learned from {place.software.source}", err=True)
    source = ", ".join(str(path) for path in (*([measured] if measured else []), *(path for path, _ in steps)))
    software = calibrate(samples, source)
    place = replace(place, software=software)
    if save is not None:
        save_machine(place, save)
    return replace(problem, machine=place), learned_record(software, samples)


def save_machine(place: Machine, path: Path) -> None:
    """Write the machine file.

    Raises:
        UserError: it is no .toml file or cannot be written.
    """
    if path.suffix != ".toml":
        raise UserError(
            f"--save-machine {path}: machine files end in .toml, because --machine tells them from names by that"
        )
    try:
        place.write(path)
    except OSError as error:
        raise UserError(
            f"--save-machine {path}: {error.strerror}; give a file in an existing, writable folder"
        ) from error
    click.echo(f"machine with its software written to {path}", err=True)


def calibrate_table(measured: Path, machine: Machine | None, known: set[str]) -> tuple[Software, dict[str, Any]]:
    """What measured runs say about the software of the runs of a table on `known` parts, also as plain data.

    Raises:
        UserError: nothing measured, or not on these parts.
    """
    from shardwise.planner.calibrate import calibrate, check_hardware, sample
    from shardwise.planner.learned import learned_record
    from shardwise.planner.measured import read_measured

    note_unread(measured)
    samples = sample(read_measured(measured), machine)
    check_hardware(samples, known, "and the table")
    software = calibrate(samples, str(measured))
    return software, learned_record(software, samples)


def note_unread(path: Path) -> None:
    """A line about columns that look misspelt, and one about rows of measured runs left out for their status."""
    from shardwise.planner.measured import other_statuses

    note_misspelt(path)
    rows = ", ".join(
        f"{status!r} ({count} row{'s' if count > 1 else ''})" for status, count in sorted(other_statuses(path).items())
    )
    if rows:
        click.echo(
            f"note: of {path} nothing is learned from rows with status {rows}: write ok or oom if they ran or ran out of memory",
            err=True,
        )


def note_misspelt(path: Path) -> None:
    """One line about columns that mean nothing and look like some that do."""
    from shardwise.planner.runs import misspelt_columns, read_table

    header, _ = read_table(path)
    doubtful = ", ".join(f"{column!r} looks like {name!r}" for column, name in misspelt_columns(header).items())
    if doubtful:
        click.echo(f"note: unknown columns of {path} are ignored, but {doubtful}: rename them if they are", err=True)


def say(record: dict[str, Any], err: bool) -> None:
    """Print what was learned, and what was taken for granted about the measured runs."""
    for run in record["runs"]:
        if run["assumed"]:
            click.echo(f"{run['run_id']}: {'; '.join(run['assumed'])}", err=True)
    for sentence in record["told"]:
        click.echo(sentence, err=err)
