"""One run of a bench in a process of its own, as `shardwise train` would run it: `python -m shardwise.bench.child`.

The task comes as JSON on standard input; the answer goes to a file, so that what a job prints is in nobody's way.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from shardwise.errors import RunFailed, Stopped, UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """What to run.

    Attributes:
        job, settings, changes: as of `TrainCommand`.
        plan: as `Plan.to_dict` gives it.
        out: the run folder.
        answer: the file for what came of it.
        keep: first and last step of which every phase and message is kept.
    """

    job: str
    settings: list[str]
    changes: dict[str, Any]
    plan: dict[str, Any]
    device: str
    out: str
    answer: str
    keep: tuple[int, int]
    timeout_seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run(task: Task) -> dict[str, Any]:
    """Train and tell what came of it: `done`, `refused`, `stopped` or `failed`."""
    from shardwise.run.command import TrainCommand, train_command
    from shardwise.run.record import Recording
    from shardwise.spec.plan import Plan

    command = TrainCommand(
        job=task.job,
        settings=tuple(task.settings),
        changes=task.changes,
        options={
            "plan": Plan.from_dict(task.plan),
            "device": task.device,
            "out": task.out,
            "progress": False,
            "checkpoint_every": "never",
            "timeout_seconds": task.timeout_seconds,
            "recording": Recording(*task.keep),
        },
        given=frozenset({"plan", "out"}),
    )
    try:
        finished = train_command(command)
    except UserError as error:
        return {"outcome": "refused", "reason": str(error)}
    except Stopped as error:
        return {"outcome": "stopped", "reason": str(error)}
    except RunFailed as error:
        return {"outcome": "failed", "reason": str(error), "rank": error.rank, "details": error.details}
    except Exception as error:  # noqa: BLE001  # of the user's job: told as the cause, not lost
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {error}", "details": traceback.format_exc()}
    assert finished is not None
    return {"outcome": "done", "summary": finished.summary}


def main() -> None:
    """Run the task of standard input."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # a bench that was killed leaves no training behind
    record = json.load(sys.stdin)
    task = Task(**{**record, "keep": tuple(record["keep"])})
    answer = run(task)
    Path(task.answer).write_text(json.dumps(answer), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    # As the installed command does: taking torch's modules apart takes half a second.
    os._exit(0)


if __name__ == "__main__":
    main()
