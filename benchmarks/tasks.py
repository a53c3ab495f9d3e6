"""shardwise.tasks against multiprocessing.Pool, concurrent.futures, joblib (loky) and Ray, in one run.

    python benchmarks/tasks.py [--tasks 100000] [--rounds 5] [--workers 2] [--out results.json]

All libraries have warm workers before the clock starts, and take turns for some rounds; the figure is the ratio of the
others' time to shardwise's within a round, as median and range. Loads: tasks that do nothing, sent one by one where the
library lets the caller choose (its own grouping counts where it has one); arrays of 8 MiB as arguments, each its own; one
array of 64 MiB bound to the function of all tasks (Ray: put once); small trainings of 1 to 24 epochs, the longest at the
end of the list, which only a scheduler that knows the lengths can move to the front. Ray runs where it is installed.
joblib hashes large arrays and keeps them in files: equal arrays of later rounds are found again, so arrays are made anew
for each round.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])

from shardwise import tasks
from task_loads import noop, total, total_with, train

Load = tuple[Callable[[Any], Any], Sequence[Any]]


class Side(ABC):
    """One library with warm workers."""

    name: str

    @abstractmethod
    def run(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, lengths: Callable[[Any], float] | None
    ) -> list[Any]:
        """Results in order."""

    def close(self) -> None:  # noqa: B027  # joblib's workers end with the program
        """End the workers."""


@final
class Shardwise(Side):
    name = "shardwise"

    def __init__(self, workers: int) -> None:
        self._pool = tasks.Pool(workers=workers)

    def run(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, lengths: Callable[[Any], float] | None
    ) -> list[Any]:
        return list(self._pool.map(function, items, cost=lengths))

    def close(self) -> None:
        self._pool.close()


@final
class Processes(Side):
    """multiprocessing.Pool: `map` cuts the list into a few large pieces; `imap` sends one by one."""

    def __init__(self, workers: int, *, one_by_one: bool) -> None:
        self.name = "multiprocessing imap" if one_by_one else "multiprocessing map"
        self._one_by_one = one_by_one
        self._pool = multiprocessing.get_context("spawn").Pool(workers)

    def run(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, lengths: Callable[[Any], float] | None
    ) -> list[Any]:
        return list(self._pool.imap(function, items)) if self._one_by_one else self._pool.map(function, items)

    def close(self) -> None:
        self._pool.terminate()
        self._pool.join()


@final
class Futures(Side):
    name = "concurrent.futures"

    def __init__(self, workers: int) -> None:
        self._pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    def run(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, lengths: Callable[[Any], float] | None
    ) -> list[Any]:
        return list(self._pool.map(function, items))

    def close(self) -> None:
        self._pool.shutdown()


@final
class Joblib(Side):
    name = "joblib loky"

    def __init__(self, workers: int) -> None:
        import joblib

        self._joblib: Any = joblib
        self._parallel: Any = joblib.Parallel(n_jobs=workers)

    def run(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, lengths: Callable[[Any], float] | None
    ) -> list[Any]:
        found: list[Any] = self._parallel(self._joblib.delayed(function)(item) for item in items)
        return found


@final
class Ray(Side):
    name = "ray"

    def __init__(self, workers: int) -> None:
        import ray

        self._ray: Any = ray
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
        self._functions: dict[Any, Any] = {}

    def run(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, lengths: Callable[[Any], float] | None
    ) -> list[Any]:
        if isinstance(function, functools.partial):  # its own way to give one value to many tasks
            shared = [self._ray.put(value) for value in function.args]
            remote = self._ray.remote(function.func)
            return list(self._ray.get([remote.remote(*shared, item) for item in items]))
        remote = self._functions.setdefault(function, self._ray.remote(function))
        found: list[Any] = self._ray.get([remote.remote(item) for item in items])
        return found

    def close(self) -> None:
        self._ray.shutdown()


def _sides(workers: int) -> list[Side]:
    sides: list[Side] = [
        Shardwise(workers),
        Processes(workers, one_by_one=False),
        Processes(workers, one_by_one=True),
        Futures(workers),
    ]
    for make in (Joblib, Ray):
        try:
            sides.append(make(workers))
        except ImportError as error:
            print(f"without {make.name}: {error}", file=sys.stderr)
    return sides


def _loads(count: int) -> dict[str, tuple[Callable[[], Load], Callable[[Any], float] | None]]:
    lengths = [1, 2, 3, 4, 5, 6, 8, 10, 12, 24]

    def one_array() -> Load:
        array = np.random.default_rng().random(8 << 20)
        return functools.partial(total_with, array), range(16)

    return {
        f"{count} tasks that do nothing": (lambda: (noop, range(count)), None),
        "32 arrays of 8 MiB": (lambda: (total, [np.random.default_rng().random(1 << 20) for _ in range(32)]), None),
        "one array of 64 MiB, 16 tasks": (one_array, None),
        "10 uneven trainings": (lambda: (train, lengths), float),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sides = _sides(options.workers)
    found: dict[str, dict[str, list[float]]] = {}
    for title, (make, lengths) in _loads(options.tasks).items():
        times: dict[str, list[float]] = {side.name: [] for side in sides}
        for side in sides:  # processes, imports, code
            side.run(make()[0], list(make()[1])[:4], lengths=None)
        for number in range(options.rounds):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                function, items = make()
                began = time.perf_counter()
                results = side.run(function, items, lengths=lengths)
                times[side.name].append(time.perf_counter() - began)
                assert len(results) == len(items)
        found[title] = times
        _show(title, times)
    for side in sides:
        side.close()
    if options.out is not None:
        record = {"machine": platform.platform(), "cores": os.cpu_count(), "workers": options.workers, "seconds": found}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


def _show(title: str, times: dict[str, list[float]]) -> None:
    print(title)
    ours = times["shardwise"]
    for name, seconds in times.items():
        ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
        spread = f"[{min(ratios):.2f} .. {max(ratios):.2f}]"
        print(
            f"  {name:22} {statistics.median(seconds):8.3f} s   {statistics.median(ratios):6.2f} of shardwise {spread}"
        )


if __name__ == "__main__":
    main()
