"""Pipelines in a fixed order, simulated by position, against a plain run of the schedule's table."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from shardwise.planner.closedform import WEIGHT_SHARE, Wire
from shardwise.planner.inorder import NEARLY, spans
from shardwise.planner.schedule import simulate
from shardwise.spec.schedule import computations


def by_table(
    schedule: str, count: int, forward: Sequence[float], backward: Sequence[float], wires: Sequence[Wire], ranks: int
) -> float:
    """One action after the other, whichever rank can; links, waits and gaps as `simulate` states them."""
    stages = len(forward)
    # gradients of weights are placed here, in gaps
    rows = computations("1f1b" if schedule == "zerobubble" else schedule, ranks, stages, count)
    halves = WEIGHT_SHARE if schedule == "zerobubble" else 0.0
    ends: dict[tuple[str, int, int], float] = {}
    clock, place, waiting = [0.0] * ranks, [0] * ranks, [0] * ranks
    link: dict[tuple[int, int], float] = {}
    while any(place[rank] < len(rows[rank]) for rank in range(ranks)):
        for rank in range(ranks):
            if place[rank] == len(rows[rank]):
                continue
            kind, stage, index = rows[rank][place[rank]]
            source = stage - 1 if kind == "F" else stage + 1
            weight = halves * backward[stage]
            if 0 <= source < stages:
                if (kind, source, index) not in ends:
                    continue
                wire, way = wires[min(source, stage)], (source % ranks, rank)
                filled = wire.forward if kind == "F" else wire.backward
                link[way] = max(ends[kind, source, index], link.get(way, 0.0)) + filled
                while (
                    waiting[rank]
                    and weight
                    and clock[rank] + (1.0 - NEARLY) * weight <= link[way] + wire.latency + 1e-12
                ):
                    clock[rank], waiting[rank] = clock[rank] + weight, waiting[rank] - 1
                clock[rank] = max(clock[rank], link[way] + wire.latency)
            clock[rank] += forward[stage] if kind == "F" else backward[stage] - weight
            waiting[rank] += kind == "B" and halves > 0
            ends[kind, stage, index] = clock[rank]
            place[rank] += 1
    return max(
        now + left * halves * backward[rank] for rank, (now, left) in enumerate(zip(clock, waiting, strict=True))
    )


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zerobubble", "interleaved1f1b"])
def test_it_is_the_table_that_runs(schedule: str) -> None:
    draw = random.Random(schedule)
    for _ in range(40):
        ranks, chunks = draw.randint(2, 6), draw.randint(1, 3) if schedule == "interleaved1f1b" else 1
        stages, count = ranks * chunks, draw.randint(1, 4 * ranks)
        forward = [draw.uniform(0.5, 2.0) for _ in range(stages)]
        backward = [draw.uniform(1.0, 4.0) for _ in range(stages)]
        wires = [Wire(draw.uniform(0.0, 0.3), draw.uniform(0.0, 2.0), draw.uniform(0.0, 2.0)) for _ in forward[1:]]
        found = spans(schedule, (count,), forward, backward, wires, ranks)
        assert found == pytest.approx([by_table(schedule, count, forward, backward, wires, ranks)]), (ranks, count)
        both = spans(schedule, (count + ranks, count), forward, backward, wires, ranks)
        assert both == [spans(schedule, (each,), forward, backward, wires, ranks)[0] for each in (count + ranks, count)]


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 3, 5, 7, 8, 9, 40])
def test_chunks_in_flight_also_where_the_last_group_has_gaps(chunks: int, micro_batches: int) -> None:
    stages = 4 * chunks
    still = (Wire(0.0, 0.0, 0.0),) * (stages - 1)
    found = simulate("interleaved1f1b", micro_batches, (1.0,) * stages, (2.0,) * stages, still, 4)
    for row, peak in zip(computations("interleaved1f1b", 4, stages, micro_batches), found.in_flight, strict=True):
        levels = [sum(1 if kind == "F" else -1 for kind, _, _ in row[:end]) for end in range(len(row) + 1)]
        assert peak == max(levels)
