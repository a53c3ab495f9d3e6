"""Shared by the tests of launch(): looking at processes from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  # FSDP2 loads it in every rank that did not inherit it, a second each


@pytest.fixture
def gone() -> Callable[[int], bool]:
    """gone(pid): whether the process ends within 5 seconds."""

    def wait(pid: int) -> bool:
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline:
            if not _runs(pid):
                return True
            time.sleep(0.02)
        return False

    return wait


@pytest.fixture
def children() -> Iterator[None]:
    """Checks that the test leaves no child process behind."""
    before = _children_of(os.getpid())
    yield
    assert [pid for pid in _children_of(os.getpid()) if pid not in before] == []


def _runs(pid: int) -> bool:
    """False for a process that does not exist, or that has ended and was not waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _children_of(pid: int) -> list[int]:
    """The child processes of all threads of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # that thread has just ended
            continue
    return found


@pytest.fixture(scope="session")
def on_two_workers() -> Callable[[Path, str], Path]:
    """on_two_workers(folder, script): the folder, once the script has run well in it under torchrun."""

    def run(place: Path, script: str) -> Path:
        (place / "loop.py").write_text(script)
        command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "loop.py")
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return place

    return run
