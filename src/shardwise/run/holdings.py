"""What processes that were started one by one must hold alike for their run to be one run: the job's code and its data.

A loss that was changed on one machine only, or data in another order there, gives gradients that are added up without an error.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator, Mapping
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from shardwise.data.batch import tree_leaves
from shardwise.data.gather import Arrays
from shardwise.data.source import Splits
from shardwise.spec.job import Job

ROWS = 16
"""Samples of arrays that are compared, spread evenly: of data in another order, or made with another seed, nearly all differ."""

CLOSE = 1e-3
"""Relative difference that may be rounding: arrays are often scaled by figures that each machine computes."""

_PATHS = sysconfig.get_paths()

_LIBRARIES = (*(Path(_PATHS[name]) for name in ("stdlib", "purelib", "platlib")), Path(__file__).parents[1])


class Held(NamedTuple):
    """What one process holds.

    Attributes:
        code: name of each file that the job comes from -> digests of its text, and of what Python reads in it (without
            comments); the second may differ between versions of Python, so one of them must agree.
        length: samples of the training split; None where only reading them tells.
        rows: index and means of the absolute values of some samples, where they are rows of arrays.
    """

    code: Mapping[str, tuple[str, str]]
    length: int | None
    rows: tuple[tuple[int, tuple[float, ...]], ...]


def held(job: Job, splits: Splits) -> Held:
    """What this process holds; reads the files of the job and a few samples."""
    code: dict[str, tuple[str, str]] = {}
    for file in sorted({file for function in _functions(job) for file in _files(function)}):
        text = file.read_bytes()
        before = code.get(file.name, ("", ""))
        read = zip(before, (text, _without_comments(text)), strict=True)
        first, second = (hashlib.sha256(digest.encode() + form).hexdigest() for digest, form in read)
        code[file.name] = first, second
    return Held(code, splits.train.length, tuple(_rows(splits.train)))


def difference(first: Held, other: Held, rank: int) -> str | None:
    """In words, what rank `rank` holds that is not as on rank 0; None where nothing is known to differ."""
    for name in first.code.keys() & other.code.keys():
        if not any(ours == theirs for ours, theirs in zip(first.code[name], other.code[name], strict=True)):
            return (
                f"the file {name} of the job is another one on rank {rank} than on rank 0; bring all machines the same"
            )
    if first.length != other.length:
        return (
            f"the training data has {other.length} samples on rank {rank} and {first.length} on rank 0; "
            "each must be given the whole data, and shardwise divides it"
        )
    for (index, ours), (_, theirs) in zip(first.rows, other.rows, strict=False):
        same = len(ours) == len(theirs) and all(
            isclose(a, b, rel_tol=CLOSE, abs_tol=CLOSE) or a != a for a, b in zip(ours, theirs, strict=True)
        )
        if not same:
            return (
                f"sample {index} of the training data is another one on rank {rank} than on rank 0; give all the same data in "
                "the same order (a listing of files has none until it is sorted), made with the same seed"
            )
    return None


def _without_comments(text: bytes) -> bytes:
    try:
        return ast.dump(ast.parse(text)).encode()
    except (SyntaxError, ValueError):  # it is no Python file
        return text


def _functions(job: Job) -> Iterator[Any]:
    yield from (job.model, job.loss, job.objective, job.weight, job.optimizer, job.schedule, *job.metrics.values())


def _files(function: Any) -> Iterator[Path]:
    """Files of the user's own that a function and what it names are defined in."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    named = [getattr(function, "__globals__", {}).get(name) for name in getattr(code, "co_names", ())]
    for thing in (function, type(function), *named, *_closed_over(function)):
        try:
            file = Path(inspect.getsourcefile(thing) or "")
        except (TypeError, OSError):  # it is no function, class or module, or one without a file
            continue
        if file.is_file() and not any(file.is_relative_to(library) for library in _LIBRARIES):
            yield file


def _closed_over(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it has no value yet
            continue


def _rows(source: Any) -> Iterator[tuple[int, tuple[float, ...]]]:
    if not isinstance(source, Arrays) or not source.length:
        return
    leaves: list[Tensor] = tree_leaves(source.inputs) + tree_leaves(source.targets)
    for index in sorted({number * (source.length - 1) // (ROWS - 1) for number in range(ROWS)}):
        yield index, tuple(float(leaf[index].double().abs().mean()) if leaf[index].numel() else 0.0 for leaf in leaves)
