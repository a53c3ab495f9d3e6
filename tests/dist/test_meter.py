"""What a group counts: bytes by the formulas of the collectives, and time spent waiting for others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shardwise.dist.collectives import Group
from shardwise.dist.meter import Meter
from shardwise.dist.p2p import start_receive, start_send


def talk(shared: bool) -> dict[str, Any]:
    meter = Meter()
    world = Group.world(meter)
    rank = world.rank
    if shared:
        world = world.with_shared_memory(30.0)
    ring = world.twin()
    counted = {}

    def note(name: str) -> None:
        counted[name] = (meter.payload_bytes, meter.traffic_bytes, meter.calls)
        meter.payload_bytes, meter.traffic_bytes, meter.calls = 0, 0.0, 0

    meter.begin_step(keep=True)
    note("start")
    world.sum_(torch.ones(30))
    note("sum")
    world.gather(torch.ones(7, dtype=torch.float64))
    note("gather")
    rows = [1, 3] if rank == 0 else [3, 1]
    ring.exchange(torch.ones(4, 5), rows, rows)
    note("exchange")
    if rank == 0:
        start_send(torch.ones(6), ring, 1).wait()
    else:
        start_receive(torch.empty(6), ring, 0).wait()
    note("message")
    meter.begin_step(keep=True)
    if rank == 1:
        time.sleep(0.3)
    before = dict(meter.waited_seconds)
    world.sum_(torch.ones(3))
    late = meter.waited_seconds["collective"] - before["collective"]
    assert meter.flights is not None and [flight.kind for flight in meter.flights] == ["all_reduce"]
    return {"counted": counted, "late": late, "arrived": meter.first_arrival}


@pytest.mark.parametrize("shared", [True, False])
def test_bytes_and_waiting_are_counted(ranks: Callable[..., list[Any]], shared: bool) -> None:
    first, second = ranks(2, talk, shared)
    for rank, answer in enumerate((first, second)):
        counted = answer["counted"]
        assert counted["sum"] == (120, 2 * 0.5 * 120, 1)
        assert counted["gather"] == (56, 56, 1)
        assert counted["exchange"] == (80, 60, 1)
        assert counted["message"] == ((24, 24, 1) if rank == 0 else (0, 0, 1))
    # The rank that comes late waits for nobody; the other one waits for it.
    assert first["late"] > 0.2 > second["late"]
    assert second["arrived"] - first["arrived"] > 0.2


def test_one_rank_sends_nothing() -> None:
    meter = Meter()
    group = Group(meter=meter)
    group.sum_(torch.ones(3))
    group.gather(torch.ones(3))
    group.barrier()
    assert (meter.calls, meter.traffic_bytes, sum(meter.waited_seconds.values())) == (0, 0.0, 0.0)
