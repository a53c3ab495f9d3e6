"""`shardwise watch`: what is it doing now."""

from __future__ import annotations

import functools
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardwise.errors import UserError
from shardwise.units import MIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardwise.monitor.runs import FollowedRun, Watcher
    from shardwise.monitor.sinks import Sink
    from shardwise.monitor.state import RunState
    from shardwise.spec.events import Event

POLL_SECONDS = 0.5
LARGE_BYTES = 64 * MIB
"""Of events, which take some seconds to read (20 MiB a second on the CPU this was written on)."""
_ENDED = ("finished", "stopped", "failed")


@click.command()
@click.argument("place", required=False, type=click.Path(path_type=Path), metavar="[PLACE]")
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="P", help="Of the page; 0 takes a free one.")
@click.option("--token", default="", metavar="TEXT", help="Of the page's address, to keep it; random if left out.")
@click.option(
    "--export",
    "exports",
    multiple=True,
    metavar="WHERE",
    help="Also write to FILE.csv, FILE.parquet, tensorboard:FOLDER or FILE.py:FUNCTION; repeatable.",
)
@click.option("--text", "as_text", is_flag=True, help="In the terminal instead of a page.")
@click.option("--once", is_flag=True, help="With --text: show it once and end.")
@click.option("--json", "as_json", is_flag=True, help="Print the state as one JSON document and end.")
def watch(
    place: Path | None, port: int, token: str, exports: tuple[str, ...], as_text: bool, once: bool, as_json: bool
) -> None:
    """Show what a run is doing: live, or afterwards, also of runs that were killed.

    PLACE is a run folder, or a folder whose runs are shown side by side; `runs` if left out. Only the runs' events.jsonl are
    read, so watching cannot disturb a training. Without --text a page is served on this machine alone, at the address
    that is printed.
    """
    from shardwise.cli.main import print_json
    from shardwise.monitor.runs import Watcher
    from shardwise.monitor.sinks import make_sink

    if once and not as_text:
        raise UserError("--once shows the text once: give it together with --text")
    source = click.get_current_context().get_parameter_source("port")
    if source == click.core.ParameterSource.COMMANDLINE and (as_text or as_json):
        raise UserError("--port is of the page: leave it out with --text and --json")
    with ExitStack() as stack:
        listeners: list[Callable[[FollowedRun, Event], None]] = []
        for where in exports:
            sink = make_sink(where)
            stack.callback(sink.close)
            listeners.append(functools.partial(_feed, sink))

        def tell(run: FollowedRun, event: Event) -> None:
            for listener in listeners:
                listener(run, event)

        watcher = Watcher(place if place is not None else Path("runs"), tell)
        if (size := watcher.size_bytes()) > LARGE_BYTES:
            print(f"{format_bytes(size)} of events are read first", file=sys.stderr, flush=True)
        if as_json:
            watcher.poll()
            print_json(document(watcher))
        elif as_text:
            _show_text(watcher, listeners, once=once)
        else:
            _serve(watcher, port, token)


def _feed(sink: Sink, run: FollowedRun, event: Event) -> None:
    sink.take(run.name, event)


def document(watcher: Watcher) -> dict[str, object]:
    """All runs as JSON data, and in what they differ."""
    from shardwise.monitor.runs import printable
    from shardwise.monitor.state import differing_settings

    runs = watcher.newest_first()
    return {
        "place": printable(watcher.place),
        "runs": [{**run.state.snapshot(), "skipped_lines": run.skipped} for run in runs],
        "differing_settings": differing_settings([run.state for run in runs]),
    }


def _show_text(watcher: Watcher, listeners: list[Callable[[FollowedRun, Event], None]], *, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from shardwise.monitor.notes import note_of
    from shardwise.monitor.text import note_line, render

    console = Console()
    watcher.poll()

    def states() -> list[RunState]:
        return [run.state for run in watcher.newest_first()]

    if once or _over(watcher):
        console.print(render(states()))
        return
    try:
        if console.is_terminal:
            with Live(render(states()), console=console, refresh_per_second=4, screen=False) as live:
                while not _over(watcher):
                    time.sleep(POLL_SECONDS)
                    watcher.poll()
                    live.update(render(states()))
            return
        # A pipe or a log: the state once, then a line for each thing that happens.
        console.print(render(states()))

        def tell(run: FollowedRun, event: Event) -> None:
            note = note_of(event)
            if note is not None:
                print(note_line(note, "" if run.folder == watcher.place else run.name), flush=True)

        listeners.append(tell)
        silent: set[str] = set()
        while not _over(watcher):
            _tell_silence(watcher, silent)
            time.sleep(POLL_SECONDS)
            watcher.poll()
    except KeyboardInterrupt:
        return
    except BrokenPipeError:
        sys.stderr.close()  # whoever read it has gone; nothing is left to be said


def _tell_silence(watcher: Watcher, silent: set[str]) -> None:
    """A line for each run that has become silent: of a killed one no event tells, and the reader would wait for ever."""
    for run in watcher.runs.values():
        if run.state.status() != "silent":
            silent.discard(run.name)
        elif run.name not in silent:
            silent.add(run.name)
            ago = format_seconds(time.time() - run.state.last) if run.state.last is not None else "long"
            print(
                f"{run.name}: silent, no news for {ago}: it was killed, hangs, or does something long between steps. "
                "Watching on; Ctrl-C ends it",
                flush=True,
            )


def _over(watcher: Watcher) -> bool:
    """A single run or sweep that has ended. A folder of runs may always get another one."""
    return any(run.folder == watcher.place and run.state.end in _ENDED for run in watcher.runs.values())


def _serve(watcher: Watcher, port: int, token: str) -> None:
    from shardwise.monitor.server import serve

    serve(watcher, port, lambda text: print(text, flush=True), token=token)
