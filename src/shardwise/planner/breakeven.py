"""Break-evens: the link speed, or the batch, from which a layout would win, checked against all that is known to compete."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shardwise.planner.case import Case
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.memory import context_bytes
from shardwise.planner.search import Candidate, Problem, family, search
from shardwise.planner.step import estimate
from shardwise.spec.machine import Figure, Machine
from shardwise.units import format_bytes

FASTEST = 10_000.0
"""Gbit/s between nodes or GB/s inside one beyond which a speed that would make a layout win is not worth a sentence."""

SEARCHES = 3
"""Searches at most that confirm one break-even."""

LAYOUTS = 15_000
"""Layouts that all confirmations of one answer may price: about a second."""


@dataclass
class Budget:
    """Searches that are left for confirming break-evens; without one, a layout is only said to overtake the winner."""

    searches: int

    @classmethod
    def of(cls, priced: int) -> "Budget":
        """For a problem whose search prices so many layouts."""
        return cls(LAYOUTS // max(1, priced))

    def search(self, problem: Problem, constants: Constants) -> Candidate | None:
        """The best layout of a changed problem; ask for it only while there are searches left."""
        self.searches -= 1
        return search(problem, constants).best


Change = Callable[[Case, float], Case]


def even_link(case: Case, problem: Problem, rivals: Sequence[Case], budget: Budget, constants: Constants) -> str:
    """The link speed from which a layout is the best of all, else the one from which it beats the winner of today."""
    gbits_now = case.machine.inter.bytes_per_second.value * 8 / 1e9
    gbytes_now = case.machine.intra.bytes_per_second.value / 1e9
    gbits = _confirmed(break_even_gbits, _with_network, case, problem, rivals, budget, constants)
    if gbits is not None:
        return f"it would win above {gbits:.0f} Gbit/s per rank between nodes (now {gbits_now:.0f})"
    gbytes = _confirmed(break_even_link, _with_link, case, problem, rivals, budget, constants)
    if gbytes is not None:
        return f"it would win above {gbytes:.0f} GB/s inside a node (now {gbytes_now:.0f})"
    overtakes = "it would overtake the winner, if not others,"
    if (gbits := break_even_gbits(case, rivals[:1], constants)) is not None:
        return f"{overtakes} above {gbits:.0f} Gbit/s per rank between nodes (now {gbits_now:.0f})"
    if (gbytes := break_even_link(case, rivals[:1], constants)) is not None:
        return f"{overtakes} above {gbytes:.0f} GB/s inside a node (now {gbytes_now:.0f})"
    return "no network between or inside nodes alone would make it win"


def even_batch(case: Case, problem: Problem, rivals: Sequence[Case], budget: Budget, constants: Constants) -> str:
    """The batch from which a layout is the best of all, else the one from which it beats the winner of today."""
    some = rivals
    for _ in range(min(SEARCHES, budget.searches)):
        batch = break_even_batch(case, some, constants)
        if batch is None:
            break
        best = budget.search(replace(problem, global_batch=batch), constants)
        if best is None or best.family == family(case):
            return f"it would win from a batch of {batch}"
        some = [*some, replace(best.case, global_batch=case.global_batch)]
    batch = break_even_batch(case, rivals[:1], constants)
    if batch is not None:
        return f"it would overtake the winner, if not others, from a batch of {batch}"
    return "no batch up to 64 times as large would make it win"


def even_memory(case: Case, problem: Problem, best: Candidate, budget: Budget, constants: Constants) -> str:
    """What a layout that computes activations again would do with room for them, beside all others with that room."""
    free = estimate(replace(case, recompute="none"), constants, quick=True)
    room = free.memory.total + context_bytes(case)
    if free.step_seconds > best.estimate.step_seconds:
        verb = "still lose"
    elif budget.searches < 1:
        verb = "overtake the winner, if not others"
    else:
        device = replace(problem.machine.accelerator, memory_bytes=Figure(room, "nominal", "asked"))
        then = budget.search(replace(problem, machine=replace(problem.machine, accelerator=device)), constants)
        wins = then is not None and then.family == family(case)
        verb = "win" if wins else "overtake the winner, but not all others"
    return f"with {format_bytes(room)} of device memory it need not, and it would {verb}"


def _confirmed(
    even: Callable[[Case, Sequence[Case], Constants], float | None],
    change: Callable[[Machine, float], Machine],
    case: Case,
    problem: Problem,
    rivals: Sequence[Case],
    budget: Budget,
    constants: Constants,
) -> float | None:
    """A break-even that a new search at that speed agrees with: there, other settings of the rivals may be best."""
    for _ in range(min(SEARCHES, budget.searches)):
        speed = even(case, rivals, constants)
        if speed is None:
            return None
        best = budget.search(replace(problem, machine=change(problem.machine, 1.02 * speed)), constants)
        if best is None or best.family == family(case):
            return speed
        rivals = [*rivals, replace(best.case, machine=case.machine)]
    return None


def break_even_gbits(case: Case, rivals: Sequence[Case], constants: Constants = DEFAULT) -> float | None:
    """Network speed in Gbit/s per rank above the present one at which `case` takes no longer than any of `rivals` does
    on that network; None if there is none up to 10 Tbit/s."""
    now = case.machine.inter.bytes_per_second.value * 8 / 1e9
    return _break_even(_on(_with_network), now, case, rivals, constants)


def break_even_link(case: Case, rivals: Sequence[Case], constants: Constants = DEFAULT) -> float | None:
    """As `break_even_gbits` for the links inside a node, in GB/s; None if there is none up to 10 TB/s."""
    return _break_even(_on(_with_link), case.machine.intra.bytes_per_second.value / 1e9, case, rivals, constants)


def _with_network(machine: Machine, gbits: float) -> Machine:
    return machine.with_network(gbits, "asked")


def _with_link(machine: Machine, gbytes: float) -> Machine:
    return replace(machine, intra=replace(machine.intra, bytes_per_second=Figure(gbytes * 1e9, "nominal", "asked")))


def _on(change: Callable[[Machine, float], Machine]) -> Change:
    return lambda case, speed: replace(case, machine=change(case.machine, speed))


def break_even_batch(case: Case, rivals: Sequence[Case], constants: Constants = DEFAULT) -> int | None:
    """Smallest of 2, 4, ... 64 times the global batch at which `case` is no slower than any of `rivals`; None if none."""
    for factor in (2, 4, 8, 16, 32, 64):
        if (
            _lead(
                lambda one, times: replace(one, global_batch=int(times) * one.global_batch),
                factor,
                case,
                rivals,
                constants,
            )
            >= 0
        ):
            return factor * case.global_batch
    return None


def _lead(change: Change, value: float, case: Case, rivals: Sequence[Case], constants: Constants) -> float:
    """Seconds by which `case` is faster than the fastest of `rivals`, all of them changed."""
    seconds = [estimate(change(one, value), constants, quick=True).step_seconds for one in (case, *rivals)]
    return min(seconds[1:]) - seconds[0]


def _break_even(change: Change, now: float, case: Case, rivals: Sequence[Case], constants: Constants) -> float | None:
    """The value above `now` from which `case` leads; None if it does not lead at `FASTEST`.

    Found by halving in the logarithm against the rivals that matter: one at first, then those that still lead there.
    """
    if now >= FASTEST or _lead(change, FASTEST, case, rivals, constants) < 0:
        return None
    low, high = now, FASTEST
    active = [rivals[0]]
    while True:
        while high > 1.005 * low:
            middle = (low * high) ** 0.5
            low, high = (low, middle) if _lead(change, middle, case, active, constants) >= 0 else (middle, high)
        if len(active) == len(rivals) or _lead(change, high, case, rivals, constants) >= 0:
            return high
        changed = [estimate(change(one, high), constants, quick=True).step_seconds for one in rivals]
        active.append(rivals[changed.index(min(changed))])
        low, high = high, FASTEST
