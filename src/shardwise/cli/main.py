"""The `shardwise` command: finds the verb, runs it, and turns errors into exit codes.

Exit 0: it did what was asked. Exit 1: the answer is no (a failed training, a plan that cannot fit). Exit 2: wrong input.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

import click

from shardwise.errors import ShardwiseError, UserError

VERBS = {
    "train": "Train a model on real data, on one worker or on many.",
    "prove": "Prove that a plan's parallel run is the serial run, or name what makes it another.",
    "bench": "Measure what a plan buys: speed-up, efficiency, where the time goes, and why.",
    "plan": "Rank the plans of a job, or of a described transformer on a cluster, and say why.",
    "probe": "Measure this machine: rates of computation, memory and messages.",
    "sweep": "Train many combinations of hyper-parameters at once, and compare them.",
    "data": "Pack a data set into memory-mapped shards, in parallel; check and show it.",
    "watch": "Show what a run is doing, live: progress, stragglers, stalls.",
    "predict": "Predict what published training layouts cost; no torch needed.",
}
"""Verb -> its line in the help; each lives in `shardwise.cli.<verb>` and is loaded only when it is used."""


class _Verbs(click.Group):
    """Loads a verb's module when it is called, so that `--help` stays fast and never imports torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = getattr(importlib.import_module(f"shardwise.cli.{cmd_name}"), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise click.UsageError(f"there is no verb {args[0]!r}: {hint}the verbs are {', '.join(VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="shardwise")
def shardwise() -> None:
    """Train any PyTorch model in parallel: the same run, only faster.

    Start with `shardwise train digits`; every verb has its own --help.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


def entry() -> NoReturn:
    """The installed command: as `main`, and it leaves without the half second that taking torch's modules apart takes."""
    code = _run(sys.argv[1:])
    try:
        # What a normal exit does before it destroys modules, in the same order.
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _run(words: list[str]) -> int:
    _open_standard_streams()
    try:
        code = shardwise.main(words, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else 1
    except click.ClickException as error:
        error.show()
        _print_failure(words, error.format_message(), "UserError")
        return 2
    except click.exceptions.Abort:  # click's name for a KeyboardInterrupt
        print("interrupted", file=sys.stderr)
        _print_failure(words, "interrupted", "Stopped")
        return 1
    except ShardwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        _print_failure(words, str(error), type(error).__name__)
        return 2 if isinstance(error, UserError) else 1
    except Exception as error:  # noqa: BLE001  # a fault of the user's code or of ours: shown whole, and told in JSON too
        traceback.print_exc()
        _print_failure(words, f"{type(error).__name__}: {error}", type(error).__name__)
        return 1


def _open_standard_streams() -> None:
    """Where the caller closed stdin, stdout or stderr, a file opened later would get its number and all that is printed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that is not UTF-8 shows a question mark for what it lacks
        sys.stdout.reconfigure(errors="replace")


def _print_failure(words: list[str], message: str, kind: str) -> None:
    """With --json, stdout carries one JSON document whatever happens."""
    if "--json" in words:
        print_json({"error": message, "kind": kind})


@contextmanager
def loading() -> Iterator[None]:
    """Around slow imports: no garbage is looked for meanwhile, and later never among what they left, which all stays.

    Looking for it takes a tenth of a second or more while torch is imported.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def stdout_to_stderr(active: bool) -> Iterator[None]:
    """While the block runs, what a job prints, here or in a worker or in native code, goes to stderr: stdout is for JSON."""
    if not active:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout; numbers that JSON lacks become null."""
    # Flushed here, where a disk that is full still is an error and not a shorter document.
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(_plain(document), indent=2, ensure_ascii=not unicode), flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    if isinstance(value, float):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


if __name__ == "__main__":
    main()
