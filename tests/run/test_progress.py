"""Where a bar can be drawn and where lines are better."""

from __future__ import annotations

import io
import sys

import pytest

from shardwise.run import progress
from shardwise.run.progress import Bar, Lines, OneLine, Silent, make_display


@pytest.mark.parametrize(
    ("terminal", "name", "kind"),
    [(True, "xterm-256color", Bar), (True, "dumb", Lines), (True, None, Lines), (False, "xterm-256color", Lines)],
)
def test_display_fits_the_terminal(
    terminal: bool, name: str | None, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    if name is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", name)
    display = make_display(show=True, total_steps=10, epochs=None, first_step=0)
    display.close()
    assert type(display) is kind


def test_nothing_is_shown_when_not_wanted() -> None:
    assert type(make_display(show=False, total_steps=10, epochs=None, first_step=0)) is Silent


def test_lines_name_what_they_show(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines(total_steps=10, epochs=2)
    lines.steps(step=1, epoch=0, loss=0.5, samples=617, seconds=0.5)
    lines.steps(step=2, epoch=0, loss=0.4, samples=800, seconds=0.5)  # too soon for another line
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    lines.steps(step=3, epoch=0, loss=0.4, samples=200, seconds=0.5)
    lines.steps(step=10, epoch=1, loss=float("nan"), samples=1234, seconds=1.0)
    first, second, last = capfd.readouterr().err.splitlines()
    assert first == "epoch 1/2  step 1/10  loss 0.5000  1,234 samples/s", (
        "the first step tells nothing of those to come"
    )
    assert second.startswith("epoch 1/2  step 3/10  loss 0.4000  1,000 samples/s, ") and second.endswith(" left")
    assert last == "epoch 2/2  step 10/10  loss nan  1,234 samples/s"


def test_lines_of_a_long_run_become_rare(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines, clock = Lines(total_steps=None, epochs=None), 0.0
    monkeypatch.setattr(progress, "perf_counter", lambda: clock)
    for step in range(1, 2 * 24 * 3600):  # a day, told twice a second
        lines.steps(step=step, epoch=0, loss=0.5, samples=1, seconds=0.5)
        clock += 0.5
    shown = capfd.readouterr().err.splitlines()
    assert 24 * 60 <= len(shown) < 24 * 60 + 60, "a line a minute at the latest, more often only at the start"


def test_a_notebook_keeps_what_is_said_and_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", stream)
    display = make_display(show=True, total_steps=1000, epochs=2, first_step=0)
    assert type(display) is OneLine
    for step in range(1, 501):
        display.steps(step=step, epoch=0, loss=0.5, samples=100, seconds=0.5)
    display.say("epoch 1/2  train loss 0.5\nand more")
    for step in range(501, 1001):
        display.steps(step=step, epoch=1, loss=0.25, samples=100, seconds=0.5)
    display.close()
    display.close()
    kept = [_written_over(line) for line in stream.getvalue().split("\n") if line]
    assert kept[:2] == ["epoch 1/2  train loss 0.5", "and more"]
    assert kept[2].startswith("epoch 2/2  step 1000/1000  loss 0.2500  200 samples/s") and len(kept) == 3


def _written_over(line: str) -> str:
    """What a notebook shows of a line: a carriage return goes back, and what comes then covers what was there."""
    shown = ""
    for text in line.split("\r"):
        shown = text + shown[len(text) :]
    return shown.rstrip()
