"""Sums and gathers through shared memory: right, equal to the bit on all ranks, in any order of waiting, with a limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shardwise.dist import collectives
from shardwise.dist.collectives import Group
from shardwise.dist.exchange import PIECE_BYTES, RING_BYTES, Exchange, create_memory, has_ended
from shardwise.errors import RunFailed


def _group(timeout_seconds: float = 30.0) -> Group:
    group = Group.world().with_shared_memory(timeout_seconds)
    assert group.memory is not None
    return group


def _own(rank: int, size: int, dtype: torch.dtype, index: int) -> torch.Tensor:
    """What a rank sends as its tensor number `index`: others than in any other."""
    values = torch.rand(size, generator=torch.Generator().manual_seed(100 * rank + index), dtype=torch.float64)
    return (values * 100).to(dtype)


def _sums(sizes: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    group = _group()
    tensors = [_own(group.rank, size, dtype, index) for index, size in enumerate(sizes)]
    works = [group.start_sum_(tensor) for tensor in tensors]
    # Waited for from both ends: messages need not be finished in the order in which they were put.
    for work in works[::2] + works[1::2][::-1]:
        work.wait()
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_sums(size: int, dtype: torch.dtype, ranks: Callable[..., list[Any]]) -> None:
    sizes = [1, 7, 15, 1000, 64, 3]
    answers = ranks(size, _sums, sizes, dtype)
    for index, length in enumerate(sizes):
        expected = _own(0, length, dtype, index)
        for rank in range(1, size):
            expected = expected + _own(rank, length, dtype, index)
        for answer in answers:
            assert torch.equal(answer[index], expected)


def _another(same: int, size: int, what: str) -> str:
    """Rank 1 leaves out a message, as if it called no layer there."""
    group = _group()
    for _ in range(same):
        group.sum_(torch.ones(5), "before")
    try:
        if group.rank == 0:
            group.gather(torch.ones(8), "BatchNorm first")
        group.gather(torch.ones(size), what)
    except RunFailed as error:
        return str(error)
    return ""


@pytest.mark.parametrize("same, size, what", [(0, 8, "BatchNorm second"), (3, 15, "BatchNorm first")])
def test_different_messages_end_both_ranks(ranks: Callable[..., list[Any]], same: int, size: int, what: str) -> None:
    first, second = ranks(2, _another, same, size, what)
    assert "number 0 came to BatchNorm first, and number 1 to another" in first
    assert f"number 1 came to {what}, and number 0 to another" in second


def test_messages_that_do_not_fit_the_ring_together(ranks: Callable[..., list[Any]]) -> None:
    """Three tensors of more than a ring each, all put before the first is waited for."""
    length = RING_BYTES // 4 + 1001
    assert length * 4 > 2 * PIECE_BYTES
    first, second = ranks(2, _sums, [length, 5, length, length], torch.float32)
    for index, size in enumerate((length, 5, length, length)):
        assert torch.equal(first[index], _own(0, size, torch.float32, index) + _own(1, size, torch.float32, index))
        assert torch.equal(first[index], second[index])


def test_end_of_the_ring_that_was_not_used_again(ranks: Callable[..., list[Any]]) -> None:
    """The third message stays at the end of the ring when the last goes back to the beginning, where the fourth still is."""
    sizes = [PIECE_BYTES // 64 * part for part in (16, 14, 1, 12, 16, 8)]
    assert 4 * sum(sizes[:3]) < RING_BYTES and 4 * sum(sizes[3:5]) < 4 * sum(sizes[:2]) < RING_BYTES < 4 * sum(sizes[3:])
    first, second = ranks(2, _sums, sizes, torch.float32)
    for index, size in enumerate(sizes):
        assert torch.equal(first[index], _own(0, size, torch.float32, index) + _own(1, size, torch.float32, index))
        assert torch.equal(first[index], second[index])


def _many() -> list[float]:
    group = _group()
    found = []
    for step in range(2000):
        tensor = torch.full((1 + step * 37 % 5000,), float(group.rank + step))
        late = group.start_sum_(torch.ones(3))
        if step % 500 == 10 * group.rank:
            time.sleep(0.02)  # one rank falls behind the other
        gathered = group.gather(tensor[:2].contiguous())
        group.sum_(tensor)
        late.wait()
        found.append(float(tensor[-1]) + float(gathered[group.size - 1, 0]))
    return found


def test_many_messages_with_ranks_out_of_step(ranks: Callable[..., list[Any]]) -> None:
    for answer in ranks(3, _many):
        assert answer == [3 + 3 * step + 2.0 + step for step in range(2000)]


def _gathers() -> torch.Tensor:
    group = _group()
    return group.gather(torch.arange(6.0).view(2, 3) + 10 * group.rank)


def test_gather_keeps_shapes_and_order(ranks: Callable[..., list[Any]]) -> None:
    for answer in ranks(3, _gathers):
        assert torch.equal(answer, torch.stack([torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(3)]))


def _absent() -> str:
    group = _group(timeout_seconds=0.5)
    if group.rank == 1:
        time.sleep(1.5)
        return ""
    try:
        group.sum_(torch.ones(3))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_missing_rank_is_named(ranks: Callable[..., list[Any]]) -> None:
    answer = ranks(2, _absent)[0]
    assert "timed out" in answer and "ranks [1]" in answer


def _elsewhere(name: str) -> bool:
    if name == "identity":
        rank = Group.world().rank
        setattr(collectives, "machine_identity", lambda: (f"machine {rank}", 1))  # noqa: B010  # in a forked rank only
    elif Group.world().rank == 1:
        setattr(collectives, "open_memory", _refuse)  # noqa: B010
    group = Group.world().with_shared_memory(5)
    return group.memory is None and float(group.sum_(torch.ones(2))[0]) == 2.0


def _refuse(place: str, ranks: int) -> Any:
    raise OSError("not to be seen from here")


@pytest.mark.parametrize("name", ["identity", "open"])
def test_ranks_that_share_no_memory_use_the_process_group(name: str, ranks: Callable[..., list[Any]]) -> None:
    assert ranks(2, _elsewhere, name) == [True, True]


def test_a_peer_that_has_ended_is_not_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    processes = [os.getpid(), child.pid]
    _, memory = create_memory(2)
    mine, theirs = (Exchange(memory, rank, processes, 30.0) for rank in range(2))
    theirs.put(torch.ones(3))
    (message,) = mine.put(tensor := torch.ones(3))
    while not has_ended(child.pid):  # dead is enough: nobody has collected it yet
        time.sleep(0.01)
    message.sum_()  # what it sent before its end is there
    assert tensor.tolist() == [2.0, 2.0, 2.0]
    (message,) = mine.put(tensor)
    with pytest.raises(RuntimeError, match="connection closed by peer: the process of rank 1 has ended"):
        message.sum_()
    child.wait()
    assert has_ended(child.pid)
    assert not has_ended(os.getpid())
