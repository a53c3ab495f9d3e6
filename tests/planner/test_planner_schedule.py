"""Pipeline schedules: the tables, their simulated duration against known formulas, and chunks in flight."""

import pytest

from shardwise.errors import PlanError
from shardwise.planner.closedform import Timeline, Wire, closed_form, even
from shardwise.planner.schedule import simulate
from shardwise.spec.schedule import computations, rank_of, schedule_table

F, B = 1.0, 2.0


def run(schedule: str, ranks: int, micro_batches: int, chunks: int = 1, send: float = 0.0) -> Timeline:
    stages = ranks * chunks
    return simulate(schedule, micro_batches, (F / chunks,) * stages, (B / chunks,) * stages, even(stages, send), ranks)


def test_one_forward_one_backward_can_be_read_as_a_table() -> None:
    assert computations("1f1b", 2, 2, 3) == [
        [("F", 0, 0), ("F", 0, 1), ("B", 0, 0), ("F", 0, 2), ("B", 0, 1), ("B", 0, 2)],
        [("F", 1, 0), ("B", 1, 0), ("F", 1, 1), ("B", 1, 1), ("F", 1, 2), ("B", 1, 2)],
    ]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (2, 3), (4, 4), (4, 9), (8, 40)])
def test_equal_stages_take_micro_batches_plus_ranks_less_one(schedule: str, ranks: int, micro_batches: int) -> None:
    # Huang et al. 2019 and Narayanan et al. 2019: (m + p - 1) (f + b)
    found = run(schedule, ranks, micro_batches)
    assert found.seconds == pytest.approx((micro_batches + ranks - 1) * (F + B))
    assert found.bubble == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))


@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaving_divides_the_bubble_by_the_chunks(chunks: int) -> None:
    # Narayanan et al. 2021, section 2.2: bubble time (p - 1) (f + b) / v
    found = run("interleaved1f1b", 4, 8, chunks)
    assert found.seconds - 8 * (F + B) == pytest.approx(3 * (F + B) / chunks)


def test_every_action_of_the_interleaved_table_appears_once() -> None:
    rows = computations("interleaved1f1b", 4, 12, 6)
    actions = [action for row in rows for action in row]
    assert sorted(actions) == sorted((kind, stage, index) for kind in "FB" for stage in range(12) for index in range(6))
    assert all(stage % 4 == rank for rank, row in enumerate(rows) for _, stage, _ in row)


def test_chunks_in_flight() -> None:
    assert run("gpipe", 4, 6).in_flight == (6, 6, 6, 6)
    assert run("1f1b", 4, 6).in_flight == (4, 3, 2, 1)
    assert run("1f1b", 4, 2).in_flight == (2, 2, 2, 1)
    # Korthikanti et al. 2022, section 4.2.3: the first rank keeps p v + p - 1 chunks of L / (p v) layers
    assert run("interleaved1f1b", 4, 8, 2).in_flight[0] == 4 * 2 + 4 - 1


def test_a_slow_stage_sets_the_pace() -> None:
    # every stage once, then the slowest stage for the other micro-batches
    found = simulate("1f1b", 10, (1.0, 1.0, 3.0), (2.0, 2.0, 5.0), even(3, 0.0), 3)
    assert found.seconds == pytest.approx(3.0 + 3.0 + 8.0 + 9 * 8.0)
    assert found.busiest_seconds == pytest.approx(80.0)


def test_sends_delay_the_pipeline_and_never_speed_it_up() -> None:
    times = [run("1f1b", 4, 8, send=send).seconds for send in (0.0, 0.1, 0.5)]
    assert times[0] < times[1] < times[2]
    assert run("1f1b", 2, 1, send=0.25).seconds == pytest.approx(2 * (F + B) + 2 * 0.25)


def test_zero_bubble_fills_gaps_with_weight_gradients() -> None:
    plain, filled = run("1f1b", 4, 8), run("zerobubble", 4, 8)
    assert 8 * (F + B) <= filled.seconds < plain.seconds
    # Qi et al. 2023, table 2, ZB-H1 with f = b = w: bubble (p - 1) (f + b - w) instead of (p - 1) (f + b + w)
    assert filled.seconds == pytest.approx(8 * (F + B) + 3 * F)


def test_v_schedules_place_the_first_and_last_stage_on_the_first_rank() -> None:
    assert [rank_of(stage, 3, "zbv") for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    found = run("zbv", 4, 8, 2)
    # What is left for equal times is the later start of the last rank, as in the table that runs
    assert found.seconds == pytest.approx(8 * (F + B) + 3 * F / 2)
    assert found.in_flight[0] == 2 * 4


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("gpipe", 1), ("interleaved1f1b", 2)])
def test_closed_form_is_the_simulation_for_equal_stages(schedule: str, chunks: int) -> None:
    stages = 4 * chunks
    arguments = (schedule, 12, (F,) * stages, (B,) * stages, even(stages, 0.0), 4)
    assert closed_form(*arguments).seconds == pytest.approx(simulate(*arguments).seconds)
    assert closed_form(*arguments).in_flight == simulate(*arguments).in_flight


def test_long_runs_are_extended_by_their_period() -> None:
    # 200 micro-batches are far beyond what is simulated action by action; the formula knows the answer
    assert run("1f1b", 4, 203).seconds == pytest.approx((203 + 3) * (F + B))
    assert run("gpipe", 4, 203).in_flight == (203,) * 4
    uneven = simulate("1f1b", 203, (1.0, 1.5, 1.0), (2.0, 2.0, 2.5), even(3, 0.0), 3)
    assert uneven.seconds == pytest.approx(3.0 + 3.5 + 3.5 + 202 * 3.5)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved1f1b", "zerobubble", "zbv", "dualpipev"])
@pytest.mark.parametrize("micro_batches", [1, 5, 16, 67, 512])
def test_no_schedule_beats_its_busiest_rank(schedule: str, micro_batches: int) -> None:
    chunks = 2 if schedule in ("interleaved1f1b", "zbv", "dualpipev") else 1
    forward = tuple(1.0 + 0.3 * (stage % 3) for stage in range(3 * chunks))
    backward = tuple(2.0 * time for time in forward)
    for found in (
        simulate(schedule, micro_batches, forward, backward, even(3 * chunks, 0.005, 0.005), 3),
        closed_form(schedule, micro_batches, forward, backward, even(3 * chunks, 0.005, 0.005), 3),
    ):
        assert found.seconds >= found.busiest_seconds > 0
        assert 0 <= found.bubble < 1
        assert len(found.in_flight) == 3 and min(found.in_flight) >= 1


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(PlanError, match="zigzag"):
        computations("zigzag", 2, 2, 2)


# F and B of 1 and 2 against a link that takes 8 for every message: the link sets the pace.
SLOW = 8.0


def test_messages_of_many_micro_batches_wait_for_each_other_on_a_slow_link() -> None:
    # gpipe over two ranks is a row of three machines there and three back: the slowest one's time for each micro-batch
    found = simulate("gpipe", 6, (F, F), (B, B), even(2, 0.0, SLOW), 2)
    assert found.seconds == pytest.approx(2 * F + SLOW + 5 * SLOW + 2 * B + SLOW + 5 * SLOW)
    # as a delay alone they travel at the same time
    assert simulate("gpipe", 6, (F, F), (B, B), even(2, SLOW), 2).seconds == pytest.approx(7 * (F + B) + 2 * SLOW)


def test_both_directions_of_a_link_are_used_at_once() -> None:
    # two chunks a rank: three messages of every micro-batch go each way, and no fewer
    links = even(4, 0.0, SLOW)
    long, short = (simulate("interleaved1f1b", count, (F,) * 4, (B,) * 4, links, 2).seconds for count in (24, 16))
    assert long - short == pytest.approx(8 * 3 * SLOW, rel=0.15)
    faster_back = tuple(Wire(0.0, SLOW, 0.0) for _ in range(3))
    assert simulate("gpipe", 6, (F, F), (B, B), faster_back[:1], 2).seconds == pytest.approx(
        2 * F + 6 * SLOW + 2 * B + 5 * B
    )


def test_one_forward_one_backward_waits_for_the_way_there_and_back() -> None:
    # with two micro-batches in flight the first rank gets two gradients for each trip of 2 (F + B) + 2 messages
    links = even(2, 0.25, 0.25)
    long, short = (simulate("1f1b", count, (F, F), (B, B), links, 2).seconds for count in (14, 4))
    assert long - short == pytest.approx(5 * (2 * (F + B) + 2 * 0.5))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved1f1b", "zerobubble", "zbv", "dualpipev"])
def test_a_message_that_is_asked_for_late_comes_late(schedule: str) -> None:
    chunks = 2 if schedule in ("interleaved1f1b", "zbv", "dualpipev") else 1
    arguments = (schedule, 8, (F,) * 2 * chunks, (B,) * 2 * chunks, even(2 * chunks, 1.0, 4.0), 2)
    assert simulate(*arguments, True).seconds > simulate(*arguments).seconds
    # where messages take no time, none is asked for late; tables of trainings are less dense than what `zbv` allows
    free = (*arguments[:4], even(2 * chunks, 0.0), 2)
    assert simulate(*free, True).seconds == pytest.approx(simulate(*free).seconds, rel=0.05)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved1f1b", "zerobubble", "zbv", "dualpipev"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_trainings_run_is_what_is_priced(schedule: str, ranks: int) -> None:
    """The rows that the ranks walk, timed in another way: when everything ends, again and again until nothing moves."""
    chunks = 2 if schedule in ("interleaved1f1b", "zbv", "dualpipev") else 1
    stages, count = chunks * ranks, 3 * ranks + 1
    forward, backward = [3.0 + stage for stage in range(stages)], [5.0 + 2 * stage for stage in range(stages)]
    rows = [
        [(str(kind), stage, index) for kind, stage, index in row if kind in "FBW"]
        for row in schedule_table(schedule, ranks, stages, count).rows
    ]
    half = {(stage, index) for row in rows for kind, stage, index in row if kind == "W"}
    ends: dict[tuple[str, int, int], float] = {}
    for _ in range(2 * count * stages):
        before = dict(ends)
        for row in rows:
            now = 0.0
            for kind, stage, index in row:
                later = 0.0 if (stage, index) not in half else backward[stage] / (2.0 if stage else 1.0)
                took = {"F": forward[stage], "B": backward[stage] - later, "W": later}[kind]
                needs = ("F", stage - 1, index) if kind == "F" else ("B", stage + 1, index)
                needs = needs if kind != "B" or stage < stages - 1 else ("F", stage, index)
                now = max(now, ends.get(needs, 0.0) if kind != "W" else 0.0) + took
                ends[kind, stage, index] = now
        if ends == before:
            break
    found = simulate(schedule, count, tuple(forward), tuple(backward), even(stages, 0.0), ranks, True)
    assert found.seconds == pytest.approx(max(ends.values()))


def test_the_next_message_is_asked_for_when_one_is_taken() -> None:
    # the wish takes a latency, the message another and its time on the link: 10 from one to the next, there and back. The first
    # was asked for before it was made
    found = simulate("gpipe", 6, (F, F), (B, B), even(2, 1.0, SLOW), 2, True)
    assert found.seconds == pytest.approx((F + 9 + 5 * 10 + F) + (B + 9 + 5 * 10 + B))


def test_a_wish_travels_behind_what_is_under_way() -> None:
    # both ranks send and receive all the time: what one asks for waits for its own messages to the other
    links = even(4, 0.0, SLOW)
    meeting, free = (
        simulate("interleaved1f1b", 6, (F,) * 4, (B,) * 4, links, 2, each).seconds for each in (True, False)
    )
    assert 1.1 * free < meeting < 2.0 * free


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("wire", [(0.5, 0.0), (0.0, 0.5), (0.1, 2.0), (0.0, SLOW)])
def test_closed_forms_count_messages_exactly(schedule: str, ranks: int, wire: tuple[float, float]) -> None:
    for micro_batches in (1, 2, ranks, 3 * ranks + 1, 10 * ranks):
        arguments = (schedule, micro_batches, (F,) * ranks, (B,) * ranks, even(ranks, *wire), ranks)
        assert closed_form(*arguments).seconds == pytest.approx(simulate(*arguments).seconds)


@pytest.mark.parametrize("schedule", ["interleaved1f1b", "zerobubble", "zbv", "dualpipev"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("wire", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.1, 2.0), (0.0, SLOW)])
def test_the_other_closed_forms_are_near(schedule: str, ranks: int, wire: tuple[float, float]) -> None:
    chunks = 1 if schedule == "zerobubble" else 2
    stages = ranks * chunks
    for micro_batches in (1, 2, ranks, 4 * ranks, 10 * ranks):
        arguments = (
            schedule,
            micro_batches,
            (F / chunks,) * stages,
            (B / chunks,) * stages,
            even(stages, *wire),
            ranks,
        )
        assert closed_form(*arguments).seconds == pytest.approx(simulate(*arguments).seconds, rel=0.13)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved1f1b", "zerobubble", "zbv", "dualpipev"])
def test_no_run_is_faster_than_its_link(schedule: str) -> None:
    chunks = 2 if schedule in ("interleaved1f1b", "zbv", "dualpipev") else 1
    stages = 2 * chunks
    for count in (1, 7, 40):
        for price in (simulate, closed_form):
            found = price(schedule, count, (F,) * stages, (B,) * stages, even(stages, 0.0, SLOW), 2)
            # each way: one message of every micro-batch, and with two chunks at least one more
            assert found.seconds >= chunks * count * SLOW


def test_long_runs_over_slow_links_are_extended_by_their_period() -> None:
    links = even(2, 0.1, SLOW)
    whole = closed_form("1f1b", 203, (F, F), (B, B), links, 2)
    assert simulate("1f1b", 203, (F, F), (B, B), links, 2).seconds == pytest.approx(whole.seconds)
