"""What a hang most likely is, from where every rank was found.

A position is plain data, one dict a rank, made by `run/position.py`:

    rank, pid, host    who
    answered           whether the rank itself said where it is; without it there is only what its system says
    step, activity     steps done; what is under way: a phase of a step, `evaluation`, `checkpoint`, ...
    inside             the collective it waits in, "" if it is in none
    module             the module whose forward pass is under way, ""
    stack              lines of Python, the innermost first
    line               the innermost of the user's own code, ""
    process            state of the process: `running`, `sleeping`, `stopped`, `disk`, `zombie`, `gone`, "" if unknown
    swap_bytes         of the process
    faults_per_second  pages that were read from disk
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from shardwise.units import format_seconds

SWAP_FAULTS_PER_SECOND = 100.0
"""Pages read from disk a second from which on a process is held up by them: at 4 KiB and 0.1 ms each (an SSD), a hundredth
of its time; a process in swap has thousands."""

HINTS = {
    "dead": "its process has ended; the run ends when the others notice, or restarts with --max-restarts",
    "stopped": "its process is stopped (SIGSTOP, Ctrl-Z, a debugger or a frozen container): continue it with kill -CONT {pid}",
    "swap": "its machine is out of memory and reads it back from disk: use a smaller micro-batch or fewer workers",
    "uneven": "the ranks are at different points of the training: one has more or fewer batches than the others, or left the "
    "loop early",
    "diverged": "the ranks wait in different collectives: they took different branches, so that one rank skipped a collective "
    "or has one of its own",
    "data": "it waits for its data: look at the loader's workers, the disk or the network",
    "slow": "it runs code that the others have finished, or waits there for something else",
    "native": "it does not answer: native code holds Python's lock there",
    "alone": "no other rank is involved: it runs, or waits, at the line shown",
    "unknown": "all ranks wait in the same collective: the network between them, or a rank that does not answer",
}


@final
@dataclass(frozen=True)
class Diagnosis:
    """What is known about a hang.

    Attributes:
        what: the class, a key of `HINTS`.
        missing: ranks that the others wait for.
        message: for people.
    """

    what: str
    missing: tuple[int, ...]
    message: str


def diagnose(positions: Sequence[dict[str, Any]], waited_seconds: float) -> Diagnosis:
    """The likely class of a hang and whom the others wait for.

    Args:
        positions: one of each rank.
        waited_seconds: since the last step ended.
    """
    waiting = [each for each in positions if each.get("inside")]
    others = [each for each in positions if not each.get("inside")]
    steps = max((int(each.get("step", 0)) for each in positions if each.get("answered")), default=0)
    head = f"no step has ended for {format_seconds(waited_seconds)}, after step {steps}: "
    if len(positions) == 1 and not _process_class(positions[0]):
        return Diagnosis("alone", (0,), f"{head}rank 0 is {where(positions[0])}; {HINTS['alone']}")
    what, missing = _class(waiting, others, positions)
    names = {int(each["rank"]): each for each in positions}
    parts = []
    for place, ranks in _places(waiting).items():
        parts.append(f"{_ranks(ranks)} {'waits' if len(ranks) == 1 else 'wait'} {place}")
    parts += [f"{_ranks([int(each['rank'])])} is {where(each)}" for each in others if int(each["rank"]) in missing]
    hint = HINTS[what].format(pid=names[missing[0]].get("pid", "PID") if missing else "PID")
    who = f"{_ranks(list(missing))} {'is' if len(missing) == 1 else 'are'} missing: " if missing else ""
    return Diagnosis(what, tuple(missing), f"{head}{'; '.join(parts)}. {who}{hint}")


def where(position: dict[str, Any]) -> str:
    """Where a rank is, in a few words."""
    process = str(position.get("process", ""))
    if process in ("stopped", "gone", "zombie"):
        words = {"stopped": "stopped", "gone": "gone", "zombie": "dead"}[process]
    elif not position.get("answered"):
        return "silent" + (f" ({process})" if process else "")
    elif position.get("inside"):
        words = f"in {position['inside']}"
    else:
        words = f"in {position.get('activity', 'a step')}"
    if position.get("module"):
        words += f", module {position['module']}"
    if position.get("line"):
        words += f", at {position['line']}"
    return words


def _class(
    waiting: list[dict[str, Any]], others: list[dict[str, Any]], positions: Sequence[dict[str, Any]]
) -> tuple[str, list[int]]:
    for what in ("dead", "stopped", "swap"):
        found = [int(each["rank"]) for each in positions if _process_class(each) == what]
        if found:
            return what, found
    if others:
        missing = [int(each["rank"]) for each in others]
        if any(not each.get("answered") for each in others):
            return "native", [int(each["rank"]) for each in others if not each.get("answered")]
        at = {(int(each["step"]), str(each.get("activity")) in _OUTSIDE) for each in positions}
        if waiting and len(at) > 1:
            return "uneven", missing
        return ("data" if all(each.get("activity") == "data" for each in others) else "slow"), missing
    if len({(int(each["step"]), str(each.get("activity")) in _OUTSIDE) for each in waiting}) > 1:
        return "uneven", _minority(waiting, lambda each: str((each["step"], each.get("activity") in _OUTSIDE)))
    if len({_collective(each) for each in waiting}) > 1:
        return "diverged", _minority(waiting, _collective)
    return "unknown", []


_OUTSIDE = ("evaluation", "checkpoint", "end")


def _process_class(position: dict[str, Any]) -> str:
    process = position.get("process")
    if process in ("gone", "zombie"):
        return "dead"
    if process == "stopped":
        return "stopped"
    if float(position.get("faults_per_second") or 0.0) > SWAP_FAULTS_PER_SECOND:
        return "swap"
    return ""


def _collective(position: dict[str, Any]) -> str:
    return str(position.get("inside"))


def _minority(waiting: list[dict[str, Any]], key: Any) -> list[int]:
    """Ranks that are not where most ranks are; where there is no most, those that are not with the lowest rank."""
    counts = Counter(key(each) for each in waiting)
    first = key(min(waiting, key=lambda each: int(each["rank"])))
    most = max(counts.items(), key=lambda item: (item[1], item[0] == first))[0]
    return [int(each["rank"]) for each in waiting if key(each) != most]


def _places(waiting: list[dict[str, Any]]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for each in waiting:
        places.setdefault(where(each), []).append(int(each["rank"]))
    return places


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 8:
        return f"{len(ranks)} ranks ({ranks[0]} ... {ranks[-1]})"
    return "ranks " + ", ".join(map(str, ranks))
