"""What the user's own functions raise, as an error that shows their lines and none of ours."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from shardwise.errors import JobError, ShardwiseError, UserError

_OURS = str(Path(__file__).parent.parent)
_JOBS = _OURS + "/jobs/"
_TORCH = str(Path(torch.__file__).parent)


@contextmanager
def readable_failure(what: str) -> Iterator[None]:
    """Turns what the user's code raises into a JobError with the user's part of the traceback.

    Args:
        what: how the message begins, such as `job mine.py:job failed`.
    """
    try:
        yield
    except UserError as error:
        line = user_lines(error)
        kind = type(error) if type(error).__module__ == UserError.__module__ else JobError
        raise kind(f"{error}" + (f"\n  in {line[-1]}" if line else "")) from error
    except ShardwiseError:
        raise
    except SystemExit as error:
        raise JobError(
            f'{what}: it ended the program (exit {error.code}); put what a script does under if __name__ == "__main__"'
        ) from error
    except Exception as error:
        raise JobError(f"{what}:\n\n{user_traceback(error)}{_advice(error)}") from error


def user_lines(error: BaseException) -> list[str]:
    """The lines of the user's own code that an error passed through, outermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename}, line {frame.lineno}" for frame in frames if _is_users(frame.filename)]


def user_traceback(error: BaseException) -> str:
    """The traceback without the frames of torch, of this package and of generated code. Frames of built-in jobs stay."""
    report = traceback.TracebackException.from_exception(error)
    todo: list[traceback.TracebackException | None] = [report]
    while todo:
        one = todo.pop()
        if one is not None:
            kept = [frame for frame in one.stack if _is_users(frame.filename)]
            one.stack = traceback.StackSummary.from_list(kept)
            todo += [one.__cause__, one.__context__]
    text = "".join(report.format()).rstrip()
    return text if report.stack else text.removeprefix("Traceback (most recent call last):\n")


def _is_users(filename: str) -> bool:
    return not filename.startswith(("<", _TORCH)) and (not filename.startswith(_OURS) or filename.startswith(_JOBS))


def _advice(error: Exception) -> str:
    if isinstance(error, ImportError) and "relative import" in str(error):
        return "\n\nThe file is part of a package: give it as package.module:function, from the folder of the package."
    return ""
