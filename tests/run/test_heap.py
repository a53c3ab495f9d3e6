"""Freed memory stays with a worker between steps, and goes back to the system where that is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import contextlib, resource, sys, torch
from shardwise.run.heap import keep_freed_memory, memory_given_back
kept = keep_freed_memory()
def step():
    return [torch.ones(2 * 1024**2) for _ in range(3)]  # 8 MiB each, freed together
with memory_given_back(2**20) if sys.argv[1] == "back" else contextlib.nullcontext():
    for _ in range(30):  # the first steps make room
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        step()
    print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, timeout=60, check=True)
    kept, count = done.stdout.split()
    return kept == "1", int(count)


def test_pages_are_asked_for_once_or_every_time() -> None:
    kept, with_it = faults("keep")
    if not kept:
        pytest.skip("the allocator of this system is not glibc's")
    _, given_back = faults("back")
    # Pages of 4 KiB, or fewer and larger ones; a hundred steps touch 100 * 24 MiB.
    assert with_it < 100
    assert given_back > 1000
