"""Tables of schedules: complete, in an order that works, and free of deadlocks even if every message blocks both ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shardwise.errors import PlanError
from shardwise.spec.plan import HALVED, SCHEDULES
from shardwise.spec.schedule import (
    Action,
    ScheduleTable,
    _simulate,
    forward_table,
    halved_passes,
    schedule_table,
    stages_for,
)

GRID = [
    (schedule, ranks, micro_batches)
    for schedule in SCHEDULES
    for ranks in (2, 3, 4, 8)
    for micro_batches in (0, 1, 2, 3, 5, 8, 13)
]


def blocking_run(table: ScheduleTable) -> list[Action]:
    """Computations in an order in which they can run if a send waits for its receive and the other way round.

    Raises:
        RuntimeError: the rows wait for each other.
    """
    place = [0] * table.ranks
    done: list[Action] = []

    def current(rank: int) -> Action | None:
        row = table.rows[rank]
        return row[place[rank]] if place[rank] < len(row) else None

    while any(current(rank) is not None for rank in range(table.ranks)):
        moved = False
        for rank in range(table.ranks):
            action = current(rank)
            if action is None:
                continue
            if action.kind in ("F", "B", "W"):
                done.append(action)
                place[rank] += 1
                moved = True
            elif action.kind in ("SEND_F", "SEND_B"):
                target = action.stage + (1 if action.kind == "SEND_F" else -1)
                answer = Action("RECV_F" if action.kind == "SEND_F" else "RECV_B", target, action.micro_batch)
                there = table.placement[target]
                if current(there) == answer:
                    place[rank] += 1
                    place[there] += 1
                    moved = True
        if not moved:
            raise RuntimeError(f"stuck at {[str(current(rank)) for rank in range(table.ranks)]}\n{table}")
    return done


def check_order(table: ScheduleTable, done: Sequence[Action], *, backward: bool) -> None:
    last = table.stages - 1
    seen: set[Action] = set()
    for action in done:
        kind, stage, index = action
        assert action not in seen, f"{action} runs twice"
        if kind == "F":
            assert stage == 0 or Action("F", stage - 1, index) in seen
        else:
            assert Action("F", stage, index) in seen
            assert stage == last or Action("B", stage + 1, index) in seen
            assert kind == "B" or Action("B", stage, index) in seen
        seen.add(action)
    halved = sum(len(halved_passes(row)) for row in table.rows)
    passes = table.stages * table.micro_batches
    assert len(seen) == passes * (2 if backward else 1) + halved
    assert (halved > 0) == (table.name in HALVED and passes > 0)


@pytest.mark.parametrize(("schedule", "ranks", "micro_batches"), GRID)
def test_tables_work_with_blocking_messages(schedule: str, ranks: int, micro_batches: int) -> None:
    table = schedule_table(schedule, ranks, stages_for(schedule, ranks), micro_batches)
    check_order(table, blocking_run(table), backward=True)
    forward = forward_table(table.placement, ranks, micro_batches)
    check_order(forward, blocking_run(forward), backward=False)


def test_every_rank_starts_the_messages_between_two_ranks_in_one_order() -> None:
    table = schedule_table("interleaved1f1b", 2, 6, 5)
    sent = [(a.kind[-1], a.stage, a.micro_batch) for a in table.rows[0] if a.kind.startswith("SEND")]
    shift = {"F": -1, "B": 1}
    received = [
        (a.kind[-1], a.stage + shift[a.kind[-1]], a.micro_batch) for a in table.rows[1] if a.kind.startswith("RECV")
    ]
    assert sent == received
    assert len(sent) == 5 * 5


def test_one_forward_one_backward_holds_few_micro_batches() -> None:
    def most_in_flight(table: ScheduleTable, rank: int) -> int:
        level = peak = 0
        for action in table.rows[rank]:
            level += {"F": 1, "B": -1}.get(action.kind, 0)
            peak = max(peak, level)
        return peak

    one_one, all_all = schedule_table("1f1b", 4, 4, 12), schedule_table("gpipe", 4, 4, 12)
    assert [most_in_flight(one_one, rank) for rank in range(4)] == [4, 3, 2, 1]
    assert [most_in_flight(all_all, rank) for rank in range(4)] == [12, 12, 12, 12]


def _end(table: ScheduleTable) -> int:
    """When the last rank is done, if F, B and W take one unit each, and an unhalved B two."""
    rows = [[action for action in row if action.kind in ("F", "B", "W")] for row in table.rows]
    return max(end for _, end, _, _ in _simulate(rows, table.stages))


def test_zero_bubble_waits_less_and_holds_no_more() -> None:
    plain, halved = (schedule_table(name, 4, 4, 12) for name in ("1f1b", "zerobubble"))
    work = 3 * 12
    # Qi et al. 2023, table 2, with equal times: a bubble of (p - 1)(F + B + W) = 9 for 1F1B; their ZB-H1, which is not found
    # by preferences alone, has (p - 1)(F + B - W) = 3.
    assert _end(plain) - work == 9
    assert _end(halved) - work == 5
    for row in halved.rows:
        held = 0
        for action in row:
            held += {"F": 1, "W": -1}.get(action.kind, 0)
            assert held <= 4


@pytest.mark.parametrize(("schedule", "idle", "most"), [("zbv", 3, 8), ("dualpipev", 4, 9)])
def test_v_shaped_schedules_wait_least(schedule: str, idle: int, most: int) -> None:
    """Units of half a stage: a rank's work is 6 a micro-batch. The best there is with equal times is the later start of the
    last rank, 3, which zbv has, with no more activations than 1f1b (8 halves); dualpipev has one more of each."""
    table = schedule_table(schedule, 4, 8, 12)
    assert table.placement == (0, 1, 2, 3, 3, 2, 1, 0)
    assert _end(table) - 6 * 12 == idle
    assert _end(schedule_table("interleaved1f1b", 4, 8, 12)) - 6 * 12 == 9
    for row in table.rows:
        halved, held, peak = halved_passes(row), 0, 0
        for action in row:
            ends = action.kind == "W" or (action.kind == "B" and action[1:] not in halved)
            held += (action.kind == "F") - ends
            peak = max(peak, held)
        assert peak == most


def test_a_swapped_pair_of_messages_is_seen_as_a_deadlock() -> None:
    table = schedule_table("1f1b", 2, 2, 3)
    row = list(table.rows[1])
    first, second = [place for place, action in enumerate(row) if action.kind in ("RECV_F", "SEND_B")][1:3]
    row[first], row[second] = row[second], row[first]
    with pytest.raises((RuntimeError, AssertionError)):
        planted = ScheduleTable("planted", (0, 1), 3, (table.rows[0], tuple(row)))
        check_order(planted, blocking_run(planted), backward=True)


def test_a_table_prints_a_row_per_rank() -> None:
    assert str(schedule_table("gpipe", 2, 2, 1)).splitlines() == [
        "gpipe: 2 stages on 2 ranks, 1 micro-batches",
        "rank 0: 0F0 0SEND_F0 0RECV_B0 0B0",
        "rank 1: 1RECV_F0 1F0 1B0 1SEND_B0",
    ]


@pytest.mark.parametrize(
    ("schedule", "cuts", "says"),
    [
        ("interleaved1f1b", ("a",), "same number of"),
        ("interleaved1f1b", ("a", "b"), "same number of"),
    ],
)
def test_what_does_not_fit_is_refused(schedule: str, cuts: tuple[str, ...], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        stages_for(schedule, 2, cuts)
