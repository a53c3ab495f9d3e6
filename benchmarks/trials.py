"""What short trials add to predictions: rounds of trials are measured and kept, and ways to choose are replayed on them.

    python benchmarks/trials.py --rounds 9 --out benchmarks/results/trials.json
    python benchmarks/trials.py --replay benchmarks/results/trials.json

Measuring takes the plans that `train` would choose from (`advise/longer.py`), of the models of `regret.py`, in rounds over all
models and plans: the rounds of one plan are some 20 s apart, so that they see the machine in other states. The truth is the
mean over all quiet rounds, as a long run would see it; the regret of a choice is its truth over the least one, less 1.

Replaying starts at every round in turn. "Rounds apart" takes the following rounds as they come; "one moment" takes one round
again and again, each time with 2 % of noise: the worst that can happen to somebody who tries for seconds only. The
predictions are taken as they are, and moved by errors as large as they are stated to have ("wrong predictions"). Compared are
the prediction alone, the fastest of one trial each, and the contest of `advise/contest.py`, with the budget of a run of so
many seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from regret import MODELS
from shardwise.advise.advice import refusals, this_machine
from shardwise.advise.contest import FOUR_OF_FIVE, Contender, Seen, hold
from shardwise.advise.longer import AXES, BUDGET_SECONDS, BUDGET_SHARE, MOST_TRIED, TRIED_SECONDS, contender
from shardwise.advise.trial import try_plan
from shardwise.data.source import as_splits
from shardwise.planner.jobsearch import JobProblem, plans_of, price
from shardwise.probe.facts import facts_apart
from shardwise.run.choose import usable_cores

MOMENT_NOISE = 0.02

Draw = Callable[[int, int], dict[str, Any]]
"""(round of a session, contender) -> a trial."""


def measure(names: list[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Trials of the plans of these models in rounds; no round is begun after `seconds`."""
    machine = this_machine(lambda text: print(text, file=sys.stderr))
    ends = time.monotonic() + seconds
    cases = []
    for name in names:
        job = MODELS[name]()
        splits = as_splits(job.data)
        problem = JobProblem(facts=facts_apart(job, splits), machine=machine, workers=usable_cores(), axes=AXES)
        plans = list(plans_of(problem))
        able = [price(problem, plan) for plan, no in zip(plans, refusals(job, plans), strict=True) if no is None]
        able = sorted(able, key=lambda item: item.estimate.step_seconds)[:MOST_TRIED]
        cases.append((name, job, splits, able))
    results: list[dict[str, Any]] = [
        {"model": name, "plans": [{"plan": str(item.plan), **asdict(contender(item)), "rounds": []} for item in able]}
        for name, _, _, able in cases
    ]
    for number in range(rounds):
        if time.monotonic() > ends:
            break
        for (_, job, splits, able), result in zip(cases, results, strict=True):
            for item, row in zip(able, result["plans"], strict=True):
                seen = try_plan(job, splits, item.plan, step_budget_seconds=TRIED_SECONDS)
                figures = {"step_seconds": seen.step_seconds, "took_seconds": seen.seconds, "others": seen.others_cores}
                row["rounds"].append({**figures, "disturbed": seen.disturbed, "failed": seen.failure is not None})
        print(f"round {number + 1}", file=sys.stderr, flush=True)
    return results


def truths(result: dict[str, Any]) -> list[float]:
    """Seconds of a step of each plan over all moments."""
    found = []
    for row in result["plans"]:
        able = [one for one in row["rounds"] if not one["failed"]]
        quiet = [one for one in able if not one["disturbed"]] or able
        found.append(mean(one["step_seconds"] for one in quiet) if quiet else math.inf)
    return found


def sessions(result: dict[str, Any], moment: bool, luck: random.Random) -> Iterator[Draw]:
    """A session that starts at each round in turn."""
    rows = result["plans"]
    count = len(rows[0]["rounds"])

    def from_round(start: int) -> Draw:
        def draw(number: int, index: int) -> dict[str, Any]:
            one: dict[str, Any] = rows[index]["rounds"][start if moment else (start + number) % count]
            noise = math.exp(luck.gauss(0.0, MOMENT_NOISE)) if moment else 1.0
            return {**one, "step_seconds": one["step_seconds"] * noise}

        return draw

    return (from_round(start) for start in range(count))


def by_contest(contenders: list[Contender], draw: Draw, training_seconds: float) -> tuple[int, float]:
    """The plan that the contest chooses, and the seconds it took."""
    budget = min(BUDGET_SECONDS, BUDGET_SHARE * training_seconds)
    tried = [0] * len(contenders)
    spent = 0.0

    def attempt(index: int) -> Seen:
        nonlocal spent
        one = draw(tried[index], index)
        tried[index] += 1
        spent += one["took_seconds"]
        return Seen(one["step_seconds"], one["took_seconds"], one["disturbed"], one["failed"])

    outcome = hold(contenders, attempt, training_seconds=training_seconds, left=lambda: budget - spent)
    assert outcome.winner is not None
    return outcome.winner, spent


def replay(
    results: list[dict[str, Any]], *, moment: bool, wrong: bool, training_seconds: float, repeats: int = 12
) -> dict[str, Any]:
    """Regrets of the three ways over all models and starts."""
    luck = random.Random(0)
    regrets: dict[str, list[float]] = {"prediction": [], "one trial": [], "contest": []}
    spent = []
    for result in results:
        true = truths(result)
        least = min(true)
        for _ in range(repeats if moment or wrong else 1):
            for draw in sessions(result, moment, luck):
                contenders = [_contender(row, luck if wrong else None) for row in result["plans"]]
                who = range(len(contenders))
                predicted = min(who, key=lambda index: contenders[index].predicted_seconds)
                once = min(who, key=lambda index: draw(0, index)["step_seconds"])
                chosen, seconds = by_contest(contenders, draw, training_seconds)
                spent.append(seconds)
                for name, index in zip(regrets, (predicted, once, chosen), strict=True):
                    regrets[name].append(true[index] / least - 1)
    figures = {name: {"median": median(v), "mean": mean(v), "worst": max(v)} for name, v in regrets.items()}
    return {"one_moment": moment, "wrong_predictions": wrong, "training_seconds": training_seconds,
            "regret": figures, "spent_seconds_mean": mean(spent)}  # fmt: skip


def _contender(row: dict[str, Any], luck: random.Random | None) -> Contender:
    found = Contender(row["predicted_seconds"], row["within"], row["threads"], row["trial_seconds"])
    if luck is None:
        return found
    error = luck.gauss(0.0, math.log1p(found.within) / FOUR_OF_FIVE)
    return Contender(found.predicted_seconds * math.exp(error), found.within, found.threads, found.trial_seconds)


def drift(results: list[dict[str, Any]]) -> dict[str, float]:
    """How far the logs of one plan's rounds move against those of others: for one thread a worker, and for several."""
    squares: dict[tuple[bool, bool], list[float]] = {}
    for result in results:
        rows = result["plans"]
        for i, one in enumerate(rows):
            for other in rows[i + 1 :]:
                pairs = [
                    math.log(a["step_seconds"] / b["step_seconds"])
                    for a, b in zip(one["rounds"], other["rounds"], strict=True)
                    if not (a["failed"] or b["failed"] or a["disturbed"] or b["disturbed"])
                ]
                if len(pairs) > 2:
                    kinds = sorted((one["threads"] > 1, other["threads"] > 1))
                    squares.setdefault((kinds[0], kinds[1]), []).append(stdev(pairs) ** 2)
    alone = mean(squares.get((False, False), [0.0])) / 2
    mixed = mean(squares.get((False, True), [0.0])) - alone
    return {"one_thread": math.sqrt(alone), "threads": math.sqrt(max(0.0, mixed))}


def main() -> None:
    """Measure or read, replay, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1e9, help="no round is begun later")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="rounds that were kept, instead of new ones")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.replay is not None:
        results = json.loads(options.replay.read_text(encoding="utf-8"))["results"]
    else:
        results = measure(options.models.split(","), options.rounds, options.seconds)
    replays = []
    for moment in (False, True):
        for wrong in (False, True):
            for seconds in (100.0, 300.0, 1000.0):
                one = replay(results, moment=moment, wrong=wrong, training_seconds=seconds)
                replays.append(one)
                text = "  ".join(
                    f"{name} {found['median']:.1%} {found['mean']:.1%} {found['worst']:.1%}"
                    for name, found in one["regret"].items()
                )
                where = "one moment" if moment else "rounds apart"
                spent = one["spent_seconds_mean"]
                print(f"{where:12} {'wrong' if wrong else 'real':5} {seconds:5.0f} s:  {text}  spent {spent:.1f} s")
    moved = drift(results)
    print(f"drift {moved['one_thread']:.3f} with one thread a worker, {moved['threads']:.3f} with several")
    if options.out is not None:
        document = {"drift": moved, "replays": replays, "results": results}
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
