"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere. Everything goes to stderr."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from time import perf_counter
from typing import TYPE_CHECKING, final

from shardwise.units import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def tell(text: str, end: str = "\n") -> None:
    """A line for people, to stderr. Where its reader went away (a closed pipe, a lost terminal), the training goes on."""
    import os
    import sys

    try:
        print(text, end=end, file=sys.stderr, flush=True)  # noqa: T201
    except OSError:
        # Whatever is written from now on, also by Python at its end, goes nowhere and fails no more.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


LINE_SECONDS = 5.0
"""Least time between two plain lines."""

RARE_SECONDS = 60.0
"""Least time between two plain lines of a run that goes on for long: a log of a day stays one that can be read."""


class Display(ABC):
    """Shows a run. Only rank 0 has one that shows something."""

    @abstractmethod
    def steps(self, *, step: int, epoch: int, loss: float, samples: int, seconds: float) -> None:
        """Steps were taken, over so many samples in so many seconds; `loss` is that of the last one, over its global batch."""

    @abstractmethod
    def say(self, message: str) -> None:
        """A line of its own."""

    @abstractmethod
    def close(self) -> None:
        """The run ended."""


class Silent(Display):
    """Shows nothing."""

    def steps(self, *, step: int, epoch: int, loss: float, samples: int, seconds: float) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@final
class Remarks(Silent):
    """Only what is to be known: for a loop whose user prints what it does."""

    def say(self, message: str) -> None:
        tell(message)


@final
class _Text:
    """The line that says how far a training is; `haste` times as often as plain lines come."""

    def __init__(self, total_steps: int | None, epochs: int | None, haste: int = 1) -> None:
        self._total, self._epochs, self._haste = total_steps, epochs, haste
        self._began: tuple[int, float] | None = None  # after the first step, which takes longer than those to come
        self._last = -math.inf
        self._samples, self._seconds = 0, 0.0  # since the last line

    def steps(self, *, step: int, epoch: int, loss: float, samples: int, seconds: float) -> str | None:
        """The line; None where the last one is too fresh for another."""
        now = perf_counter()
        self._samples, self._seconds = self._samples + samples, self._seconds + seconds
        passed = 0.0 if self._began is None else now - self._began[1]
        patience = max(LINE_SECONDS, min(RARE_SECONDS, passed / 20)) / self._haste
        if now - self._last < patience and step != self._total:
            return None
        self._last = now
        to_go = self._total - step if self._total is not None else 0
        left = ""
        if self._began is None:
            self._began = (step, now)
        elif to_go and step > self._began[0]:
            left = f", {format_seconds(passed / (step - self._began[0]) * to_go)} left"
        of_steps = f"/{self._total}" if self._total is not None else ""
        of_epochs = f"/{self._epochs}" if self._epochs is not None else ""
        rate = _rate(self._samples, self._seconds)
        self._samples, self._seconds = 0, 0.0
        return f"epoch {epoch + 1}{of_epochs}  step {step}{of_steps}  loss {loss:.4f}  {rate}{left}"


@final
class Lines(Display):
    """Plain lines, at most one every few seconds, and more seldom as the run goes on, for logs and pipes."""

    def __init__(self, total_steps: int | None, epochs: int | None) -> None:
        self._text = _Text(total_steps, epochs)

    def steps(self, *, step: int, epoch: int, loss: float, samples: int, seconds: float) -> None:
        text = self._text.steps(step=step, epoch=epoch, loss=loss, samples=samples, seconds=seconds)
        if text is not None:
            self.say(text)

    def say(self, message: str) -> None:
        tell(message)

    def close(self) -> None:
        """Nothing to put back."""


@final
class OneLine(Display):
    """A line that is written over, below the cell of a notebook: only what `say` tells stays there, and the last line."""

    def __init__(self, total_steps: int | None, epochs: int | None) -> None:
        self._text = _Text(total_steps, epochs, haste=5)  # a notebook may keep all of them in its file
        self._shown = ""

    def steps(self, *, step: int, epoch: int, loss: float, samples: int, seconds: float) -> None:
        text = self._text.steps(step=step, epoch=epoch, loss=loss, samples=samples, seconds=seconds)
        if text is not None:
            tell(f"\r{text.ljust(len(self._shown))}", end="")
            self._shown = text

    def say(self, message: str) -> None:
        tell(f"\r{' ' * len(self._shown)}\r{message}" if self._shown else message)
        self._shown = ""

    def close(self) -> None:
        if self._shown:
            tell("")
            self._shown = ""


@final
class Bar(Display):
    """A progress bar on a terminal."""

    def __init__(self, total_steps: int | None, epochs: int | None, first_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._epochs = epochs
        self._bar: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}" if total_steps is not None else "step {task.completed}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=4,
        )
        self._task: TaskID = self._bar.add_task("training", total=total_steps, completed=first_step, numbers="")
        self._bar.start()

    def steps(self, *, step: int, epoch: int, loss: float, samples: int, seconds: float) -> None:
        of_epochs = f"/{self._epochs}" if self._epochs is not None else ""
        self._bar.update(
            self._task,
            completed=step,
            description=f"epoch {epoch + 1}{of_epochs}",
            numbers=f"loss {loss:.4f}  {_rate(samples, seconds)}",
        )

    def say(self, message: str) -> None:
        self._bar.console.print(message, highlight=False, markup=False)

    def close(self) -> None:
        self._bar.stop()


def make_display(*, show: bool, total_steps: int | None, epochs: int | None, first_step: int) -> Display:
    """A bar where stderr is a terminal that can move its cursor, one line below the cell of a notebook, lines elsewhere,
    nothing with `show=False`."""
    import os
    import sys

    if not show:
        return Silent()
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown"):
        return Bar(total_steps, epochs, first_step)
    if type(sys.stderr).__module__.startswith("ipykernel."):  # a worker that was forked from a kernel has it too
        return OneLine(total_steps, epochs)
    return Lines(total_steps, epochs)


def _rate(samples: int, seconds: float) -> str:
    return f"{samples / seconds if seconds else 0.0:,.0f} samples/s"
