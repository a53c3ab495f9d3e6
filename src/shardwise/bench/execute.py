"""One measured run: started as a process of its own, under a stopwatch, and stopped where it is asked to."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, final

from shardwise.bench.child import Task
from shardwise.errors import UserError
from shardwise.spec.events import EvaluationEvent, EventReader

_GRACE_SECONDS = 20.0
_POLL_SECONDS = 0.02
_LOW_IS_GOOD = ("loss", "error", "perplexity")
"""A metric with such a word in its name has reached a target from above."""


@final
@dataclass(frozen=True)
class Target:
    """A metric of the test split that ends a run, such as accuracy of at least 0.97."""

    metric: str
    bound: float
    at_least: bool

    @classmethod
    def parse(cls, text: str) -> Target:
        """`accuracy=0.97`, `loss=0.1`, or with the direction: `accuracy>=0.97`, `loss<=0.1`.

        Raises:
            UserError: the text is no metric with a number.
        """
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|=)\s*([-+.\deE]+)\s*", text)
        try:
            bound = float(match[3]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or not math.isfinite(bound):
            raise UserError(f"--to {text!r}: write METRIC=NUMBER, such as accuracy=0.97 or loss=0.1")
        low = any(word in match[1] for word in _LOW_IS_GOOD)
        return cls(match[1], bound, match[2] == ">=" or (match[2] == "=" and not low))

    def reached(self, metrics: dict[str, float]) -> bool:
        """Whether these metrics of an evaluation are good enough."""
        value = metrics.get(self.metric, math.nan)
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{self.metric} {'>=' if self.at_least else '<='} {self.bound:g}"


@final
@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What came of a run.

    Attributes:
        outcome: `done`, `stopped` (at the target), `refused` or `failed`.
        started: when its process was started, on `time.perf_counter`.
        seconds: until its process had ended.
        target_seconds: until the target was reached, as the events tell.
    """

    outcome: str
    reason: str
    details: str
    started: float
    seconds: float
    target_seconds: float | None = None


def run_once(task: Task, target: Target | None, log: Path) -> Attempt:
    """Run a task to its end, or to the target.

    Args:
        log: the file for what the run prints.

    Raises:
        KeyboardInterrupt: the run was ended with it.
    """
    with log.open("wb") as output:
        process, started, unix = _start(task, output)
        reached: float | None = None
        try:
            if target is not None:
                reached = _watch(process, Path(task.out) / "events.jsonl", target, unix)
            process.wait()
        except BaseException:
            _end(process)
            raise
        seconds = time.perf_counter() - started
    answer = _answer(Path(task.answer), process.returncode, log)
    if answer["outcome"] == "stopped" and reached is None:
        answer["outcome"] = "failed"
    return Attempt(
        outcome=answer["outcome"],
        reason=str(answer.get("reason", "")),
        details=str(answer.get("details", "")),
        started=started,
        seconds=seconds,
        target_seconds=reached,
    )


def _start(task: Task, output: IO[bytes]) -> tuple[subprocess.Popen[bytes], float, float]:
    started, unix = time.perf_counter(), time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "shardwise.bench.child"],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,  # Ctrl-C is for the bench, which ends its runs itself
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(task.to_json().encode())
        process.stdin.close()
    return process, started, unix


def _watch(process: subprocess.Popen[bytes], events: Path, target: Target, unix: float) -> float | None:
    """Ask the run to stop once the target is reached; the seconds until then."""
    reader = EventReader(events)
    while process.poll() is None:
        for event in reader.poll():
            if isinstance(event, EvaluationEvent) and target.reached(event.metrics):
                process.send_signal(signal.SIGTERM)
                return event.t - unix
        time.sleep(_POLL_SECONDS)
    for event in reader.poll():
        if isinstance(event, EvaluationEvent) and target.reached(event.metrics):
            return event.t - unix
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _answer(path: Path, code: int, log: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        pass
    printed = log.read_text(encoding="utf-8", errors="replace").strip()
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        reason = f"its process was ended by {name}"
        if -code == signal.SIGKILL:
            reason += " (by the system, if its memory ran out)"
    else:
        reason = f"its process ended with exit code {code} and no answer"
    return {"outcome": "failed", "reason": reason, "details": printed[-4000:]}
