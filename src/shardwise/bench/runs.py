"""All runs of a bench: in rounds, so that what changes on the machine meanwhile hits all cases alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from shardwise.bench.analyse import Measurement
from shardwise.bench.cases import Wanted
from shardwise.bench.child import Task
from shardwise.bench.execute import Attempt, Target, run_once
from shardwise.bench.reading import Reading, read_run
from shardwise.errors import RunFailed, UserError
from shardwise.units import format_seconds

PILOT_STEPS = 12
RUN_SECONDS = 3.0
"""Steady seconds that a run of the one-worker case is given where --steps does not say how many it takes."""

MOST_STEPS, LEAST_STEPS = 2000, 20
MOST_WARM_UP = 20
KEPT_STEPS = 3
"""Steps in the timeline."""


@final
@dataclass(frozen=True, kw_only=True)
class Orders:
    """What all runs have in common.

    Attributes:
        job, settings, changes: the job as the command line has it.
        seed: of the job; round r has this seed plus r.
        target: ends runs early.
        out: folder of the bench.
        rounds: how often each case is run.
        tell: receives lines about the progress.
    """

    job: str
    settings: Mapping[str, str]
    changes: Mapping[str, Any]
    seed: int
    target: Target | None
    device: str
    timeout_seconds: float
    out: Path
    rounds: int
    tell: Callable[[str], None]


@final
class Runs:
    """All runs of a bench, in rounds; `found` has one measurement a case."""

    def __init__(self, orders: Orders, cases: Sequence[Wanted]) -> None:
        self._orders = orders
        self.found = [Measurement(wanted=wanted) for wanted in cases]
        self.warm_up = 0
        self._outs: list[Path] = []

    def pilot(self) -> int:
        """A short run of the first case: reads the files once, and tells how many steps fill the time of a run."""
        first = self.found[0].wanted
        self._orders.tell(f"pilot: {first.name}, {PILOT_STEPS} steps")
        self.warm_up = PILOT_STEPS // 3
        _, reading = self._one(first, PILOT_STEPS, "pilot", 0)
        return min(MOST_STEPS, max(LEAST_STEPS, round(RUN_SECONDS / reading.step_seconds)))

    def all_rounds(self, steps: int | None) -> None:
        """Every case once a round; every other round in the reverse order, so that a drift hits all alike."""
        self.warm_up = MOST_WARM_UP if steps is None else min(MOST_WARM_UP, max(2, steps // 5))
        for number in range(self._orders.rounds):
            order = self.found if number % 2 == 0 else list(reversed(self.found))
            for one in order:
                if not one.wanted.refused and one.failed is None:
                    self._measure(one, steps, number)

    def _measure(self, one: Measurement, steps: int | None, number: int) -> None:
        name = one.wanted.name
        say = f"round {number + 1}/{self._orders.rounds}  {name}"
        try:
            attempt, reading = self._one(one.wanted, steps, f"round-{number + 1}", number)
        except UserError as error:
            one.failed = ("refused", str(error), "")
            self._orders.tell(f"{say}  refused: {_first_line(error)}")
            return
        except RunFailed as error:
            one.failed = ("failed", str(error), error.details)
            self._orders.tell(f"{say}  failed: {_first_line(error)}")
            return
        one.rounds[number] = (attempt, reading)
        in_all = format_seconds(attempt.seconds)
        self._orders.tell(f"{say}  {format_seconds(reading.step_seconds)} a step, {in_all} in all")
        if self._orders.target is not None and attempt.target_seconds is None:
            self._orders.tell(f"{say}  did not reach {self._orders.target}")

    def _one(self, wanted: Wanted, steps: int | None, folder: str, number: int) -> tuple[Attempt, Reading]:
        parent = self._orders.out / "runs" / folder
        parent.mkdir(parents=True, exist_ok=True)
        stem = _file_name(wanted.name)
        out = parent / stem
        self._outs.append(out)
        keep = self.warm_up + 1
        changes = self._changes(wanted, steps, number)
        task = Task(
            job=self._orders.job,
            settings=[f"{name}={value}" for name, value in self._orders.settings.items() if name not in changes],
            changes=changes,
            plan=replace(wanted.plan, prediction=None).to_dict(),
            device=self._orders.device,
            out=str(out),
            answer=str(parent / f"{stem}.answer.json"),
            keep=(keep, keep + KEPT_STEPS - 1),
            timeout_seconds=self._orders.timeout_seconds,
        )
        attempt = run_once(task, self._orders.target, parent / f"{stem}.log")
        if attempt.outcome == "refused":
            raise UserError(attempt.reason)
        if attempt.outcome == "failed":
            raise RunFailed(attempt.reason, details=attempt.details)
        ranks = wanted.plan.layout.workers
        return attempt, read_run(out, ranks=ranks, warm_up=self.warm_up, device=self._orders.device)

    def _changes(self, wanted: Wanted, steps: int | None, number: int) -> dict[str, Any]:
        """Every round has a seed of its own: how far metrics lie apart between seeds is their noise."""
        changes = {**self._orders.changes, "seed": self._orders.seed + number}
        if steps is not None:
            changes.pop("epochs", None)
            changes["steps"] = steps
        if wanted.scaling == "weak":
            changes["batch_size"] = wanted.batch_size
        return changes

    def remove_checkpoints(self) -> None:
        """What runs keep for going on is large and of no use here; events, records and settings stay."""
        for out in self._outs:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
            (out / "model.safetensors").unlink(missing_ok=True)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "=-" else "-" for letter in name)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
