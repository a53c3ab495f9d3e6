"""Freed memory stays with a worker between steps."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from shardwise.run.heap import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
def step():
    return [torch.ones(2 * 1024**2) for _ in range(3)]  # 8 MiB each, freed together
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, timeout=60, check=True)
    kept, count = done.stdout.split()
    return kept == "1", int(count)


def test_pages_are_asked_for_once() -> None:
    kept, with_it = faults("keep")
    if not kept:
        pytest.skip("the allocator of this system is not glibc's")
    _, without = faults("leave")
    assert with_it < 100  # pages; one step touches thousands
    assert without > with_it
