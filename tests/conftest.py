"""Shared by all tests: ranks as forked processes, and real data where it is at hand."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as c10d

from shardwise.run.cores import usable_cores

# Forked ranks must not inherit a pool of compute threads that does not exist in the child.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs (figures of the machine, plans) is kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("kept")))
        yield


LONGEST = (
    "bench/test_bench_command",
    "test_readme",
    "test_cli_failures",
    "parallel/test_matrix",
    "run/test_train.py",
    "tasks/test_sweep.py",
    "parallel/test_step_parity",
    "prove/test_prove_faults",
    "prove/test_prove_honest",
    "run/test_watch_names",
)
"""Files that take longest, in this order: begun first, they leave no core alone at the end."""

MOST_PROCESSES = 8
"""Test processes side by side: each holds torch, and its tests start ranks of their own."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Test processes for `--numprocesses auto`."""
    return min(usable_cores(), MOST_PROCESSES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests that are divided over processes by file, the longest files first; within a file the order stays."""
    if config.getoption("numprocesses", None) or os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: next((k for k, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST)))


_SHARED = Path(__file__).resolve().parents[2] / "shared"


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 90.0) -> list[Any]:
    """Call `function(*arguments)` in `size` gloo ranks and return their results in rank order.

    Raises:
        RuntimeError: a rank raised (its traceback is the message) or gave no answer in `timeout` seconds.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends = []
        processes = []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(sender, rank, size, f"{folder}/store", function, arguments), daemon=True
            )
            process.start()
            sender.close()
            ends.append(receiver)
            processes.append(process)
        try:
            answers = [_answer(end, timeout) for end in ends]
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()
    failures = [text for failed, text in answers if failed]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [result for _, result in answers]


def _answer(end: Connection, timeout: float) -> tuple[bool, Any]:
    if not end.poll(timeout):
        return True, "a rank gave no answer in time"
    try:
        answer: tuple[bool, Any] = pickle.loads(end.recv_bytes())
    except EOFError:
        return True, "a rank ended without an answer"
    return answer


def _rank_main(
    sender: Connection, rank: int, size: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    try:
        if size > 1:
            c10d.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        # Plain pickle sends tensors by value; multiprocessing's own would share memory that ends with this process.
        sender.send_bytes(pickle.dumps((False, function(*arguments))))
        if size > 1:
            c10d.destroy_process_group()
    except BaseException:  # noqa: BLE001  # everything is reported to the test
        sender.send_bytes(pickle.dumps((True, traceback.format_exc())))


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """`ranks(size, function, *arguments)`: results of a module-level function called in gloo ranks."""
    return run_ranks


@pytest.fixture
def shared_data() -> Path:
    """Folder of real data sets next to the repository; the test is skipped where it is absent."""
    folder = _SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
