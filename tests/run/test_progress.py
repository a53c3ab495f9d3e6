"""Where a bar can be drawn and where lines are better."""

from __future__ import annotations

import sys

import pytest

from shardwise.run import progress
from shardwise.run.progress import Bar, Lines, Silent, make_display


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
