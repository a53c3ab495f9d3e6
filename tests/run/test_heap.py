"""Freed memory stays with a worker between steps, and goes back to the system where that is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise.probe import place
from shardwise.run import cores
from shardwise.run.available import available_memory, memory_limit
from shardwise.run.cores import quota_cores
from shardwise.run.heap import HEAP_SHARE, _library, room_bytes, use_one_heap

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

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


WORKER = """
import resource, sys, torch
import shardwise
from shardwise.run.apart import call_in_child, in_thread
from shardwise.run.heap import keep_freed_memory
torch.ones(1000)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work(rank):
    keep_freed_memory()
    sizes = [1024 * ((i * 37) % 997) + 1000 for i in range(200)]  # up to 4 MB
    def step():
        alive = []
        for size in sizes:
            alive.append(torch.ones(size))
            if len(alive) > 40:  # some 80 MB: more than one heap of a thread holds
                alive.pop(size % 40)
    for _ in range(10):
        step()
    began = faults()
    for _ in range(20):
        step()
    kept = faults() - began
    began = faults()
    large = [torch.ones(16 * 1024**2) for _ in range(4)]  # 256 MiB
    return kept, faults() - began
print(*in_thread(lambda: call_in_child(work, threads=1, device="cpu")))
"""


def worker_faults(**environment: str) -> tuple[int, int]:
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    kept, large = done.stdout.split()
    return int(kept), int(large)


@pytest.mark.skipif(_library() is None, reason="the allocator of this system is not glibc's")
def test_a_forked_worker_keeps_memory_too() -> None:
    kept, large = worker_faults()
    own_heap, large_there = worker_faults(MALLOC_ARENA_MAX="64")
    # 20 steps touch 8 GB: two million pages of 4 KiB.
    assert kept < 2000
    assert own_heap > 1000
    if HUGE.exists() and "[never]" not in HUGE.read_text():
        assert large < 20_000 < large_there  # 65,536 pages of 4 KiB


@pytest.mark.skipif(_library() is None, reason="the allocator of this system is not glibc's")
def test_a_process_that_trained_gives_its_memory_back() -> None:
    program = (
        "import torch\n"
        "from shardwise.run.heap import give_freed_memory_back, keep_freed_memory\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "keep_freed_memory()\n"
        "before = resident()\n"
        "torch.ones(64 * 1024**2)\n"
        "kept = resident() - before\n"
        "give_freed_memory_back()\n"
        "print(kept, resident() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    kept, after = map(int, done.stdout.split())
    assert kept > 200 * 2**20
    assert after < 20 * 2**20


def test_the_number_of_heaps_that_somebody_chose_is_kept() -> None:
    assert not use_one_heap({"MALLOC_ARENA_MAX": "4"})
    assert not use_one_heap({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4:glibc.malloc.hugetlb=1"})


START = """
import torch
import shardwise
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
data = {"train": (torch.ones(4, 2), torch.ones(4, 2))}
loss = torch.nn.functional.mse_loss
with shardwise.start(
    model=lambda: torch.nn.Linear(2, 2), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), loss=loss, data=data, batch_size=4
) as run:
    for batch in run.batches():
        run.step(batch)
    before = resident()
    [torch.ones(16 * 1024**2) for _ in range(4)]
    during = resident() - before
print(during, resident() - before)
"""


@pytest.mark.skipif(_library() is None, reason="the allocator of this system is not glibc's")
def test_a_loop_of_ones_own_gives_memory_back_at_its_end() -> None:
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, timeout=60, check=True)
    during, after = map(int, done.stdout.split())
    assert during > 200 * 2**20
    assert after < 20 * 2**20


LIMITED = """
import mmap, resource, shardwise
from shardwise.run.heap import keep_freed_memory, room_bytes
most = int(open("/proc/self/statm").read().split()[0]) * 4096 + room_bytes(1) + 2**29
resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
keep_freed_memory()
mmap.mmap(-1, 2**30)  # as a mapped file of this size
"""


def test_a_limit_of_the_address_space_is_left_to_others() -> None:
    subprocess.run([sys.executable, "-c", LIMITED], timeout=60, check=True)


def test_no_room_is_taken_where_it_counts_as_used(tmp_path: Path) -> None:
    setting = tmp_path / "sys/vm/overcommit_memory"
    setting.parent.mkdir(parents=True)
    (tmp_path / "meminfo").write_text("MemTotal: 8000 kB\nMemAvailable: 4000 kB\n")
    setting.write_text("0\n")
    assert room_bytes(2, tmp_path) == HEAP_SHARE * 4000 * 1024 / 2
    setting.write_text("2\n")
    assert room_bytes(2, tmp_path) == 0


def _group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def test_memory_left_in_control_groups(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemAvailable: 8000 kB\n")
    lines = proc / "self" / "cgroup"
    lines.write_text("0::/user/job\n")
    assert available_memory(proc, groups) == 8000 * 1024
    v2 = ("memory.max", "memory.current")
    _group(groups / "user", v2, "5000000", 4_000_000, "anon 1000000\nactive_file 500000\ninactive_file 1500000\n")
    assert available_memory(proc, groups) == 3_000_000  # pages of files can go
    _group(groups / "user" / "job", v2, "max", 1, "anon 1\n")
    assert available_memory(proc, groups) == 3_000_000
    (groups / "user/job/memory.max").write_text("2000000\n")
    assert available_memory(proc, groups) == 1_999_999
    # Version 1, in a container that has its own group at the root and the host's path for it.
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    _group(
        groups / "memory", v1, "1000000", 900_000, "inactive_file 5\ntotal_active_file 0\ntotal_inactive_file 300000\n"
    )
    lines.write_text("5:cpu:/\n4:memory:/docker/1234\n0::/\n")
    assert available_memory(proc, groups) == 400_000
    (groups / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert available_memory(proc, groups) == 8000 * 1024


def test_limits_of_control_groups_of_both_versions(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    lines = proc / "self" / "cgroup"
    assert quota_cores(proc, groups) is None  # no Linux
    assert memory_limit(proc, groups) is None
    lines.parent.mkdir(parents=True)
    # Version 1, its two processor controllers mounted as one; the container sees its own group at the root.
    lines.write_text("5:cpu,cpuacct:/docker/1234\n4:memory:/docker/1234\n0::/\n")
    cpu, memory = groups / "cpu,cpuacct", groups / "memory"
    cpu.mkdir(parents=True)
    memory.mkdir()
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    (cpu / "cpu.cfs_quota_us").write_text("-1\n")
    (memory / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # what the kernel writes for none
    assert quota_cores(proc, groups) is None
    assert memory_limit(proc, groups) == 9223372036854771712
    (cpu / "cpu.cfs_quota_us").write_text("150000\n")
    (memory / "memory.limit_in_bytes").write_text("2147483648\n")
    assert quota_cores(proc, groups) == 1.5
    assert memory_limit(proc, groups) == 2**31
    # Version 2: the group around limits the processor, the own one memory.
    lines.write_text("0::/user/job\n")
    (groups / "user" / "job").mkdir(parents=True)
    assert quota_cores(proc, groups) is None
    (groups / "user" / "cpu.max").write_text("50000 100000\n")
    (groups / "user" / "job" / "cpu.max").write_text("max 100000\n")
    (groups / "user" / "memory.max").write_text("max\n")
    (groups / "user" / "job" / "memory.max").write_text("1048576\n")
    assert quota_cores(proc, groups) == 0.5
    assert memory_limit(proc, groups) == 2**20


def test_a_container_of_version_1_limits_what_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "memory_limit", lambda: 2**30)
    monkeypatch.setattr(cores, "quota_cores", lambda: 0.5)
    assert place.memory_bytes() == 2**30
    assert cores.usable_cores() == 1
