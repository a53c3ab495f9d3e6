"""What `watch` costs a training: events, meter, phase clock and stall thread, on against off.

    python benchmarks/watch_cost.py [--model lenet] [--batch 160] [--workers 2] [--rounds 40] [--steps 100] [--out results.json]

Both sides live in the same ranks and take turns, some steps each, so that a machine whose speed drifts hits both alike. The
side `off` is the same step over the same assembly with a meter and a clock that do nothing, without events and without
the thread; it settles losses as `on` does, because progress, stopping and checkpoints need that in any case. `off again` is a
second such side: its ratio to `off` is the noise of the measurement. The figures are ratios within a round, of processor
time (all ranks, all threads) and of wall time: median, quartiles, and the standard error of the median by bootstrap.

A ratio of whole steps is as noisy as the machine. So the added work is also counted: calls of meter and clock in a step, times
what one of them costs in a tight loop in the same process; the thread's processor time in the settlements of `on` that goes to
observing; and wakings of the stall thread, times what one costs. `added` is the sum of these, a rank and step.

Bytes are those that `on` wrote to `events.jsonl`, for 10,000 steps, of the whole run and divided by its ranks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d

from models import CASES
from shardwise.data.batch import Batch
from shardwise.data.source import Splits, as_splits
from shardwise.dist.collectives import Group
from shardwise.dist.meter import Call, Meter
from shardwise.run.alike import next_batch
from shardwise.run.assemble import CPU, Assembly, assemble
from shardwise.run.clock import PhaseClock
from shardwise.run.eventlog import EventLog
from shardwise.run.folder import RunFolder
from shardwise.run.ledger import Ledger
from shardwise.run.loop import open_epoch
from shardwise.run.observe import Observer
from shardwise.run.position import this_peer
from shardwise.run.sentinel import TICK_SECONDS, Sentinel
from shardwise.run.step import take_step
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

HERE = Path(__file__).resolve()
SIDES = ("on", "off", "off again")
GOAL_SHARE = 0.005
GOAL_BYTES = 1_000_000
_NOTHING = Call("all_reduce", "", "", 0.0)


class NoClock:
    """A phase clock that does nothing."""

    current = "forward"

    def begin_step(self, step: int = 0) -> None:
        """Nothing."""

    def mark(self, phase: str) -> None:
        """Nothing."""

    def stepped(self) -> None:
        """Nothing."""

    def end_step(self) -> None:
        """Nothing."""


def no_meter(meter: Meter) -> None:
    """Make a meter do nothing. What is left of it is two calls of an empty function a communication."""

    def start(*_: Any, **__: Any) -> Call:
        return _NOTHING

    def waiting(_: Call) -> AbstractContextManager[None]:
        return nullcontext()

    vars(meter).update(start=start, waiting=waiting)


@dataclass
class Side:
    """One contender in this rank, with its own model and its own place in the data."""

    assembly: Assembly
    stream: Iterator[Batch]
    ledger: Ledger
    observer: Observer | None
    beside: Callable[[], AbstractContextManager[object]]
    taken: int = 0
    observing_seconds: float = 0.0

    def steps(self, count: int) -> None:
        """As `run_loop` takes them."""
        a = self.assembly
        for _ in range(count):
            a.clock.begin_step(a.step)
            batch = next(self.stream)
            a.clock.mark("data")
            if self.observer is not None:
                self.observer.gauge.samples += batch.count
            result = take_step(a, batch)
            a.clock.stepped()
            self.ledger.add(result)
            if self.ledger.due:
                settled = self.ledger.settle()
                if self.observer is not None:
                    began = time.thread_time()
                    self.observer.settled(settled)
                    self.observing_seconds += time.thread_time() - began
            a.clock.mark("other")
            a.clock.end_step()
        self.taken += count


def _counted_calls(side: Side, steps: int = 20) -> dict[str, float]:
    """Calls of clock and meter in a step of `on`."""
    counts: Counter[str] = Counter()
    places = (
        (side.assembly.clock, ("begin_step", "mark", "end_step")),
        (side.assembly.mesh.meter, ("start", "waiting")),
    )

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return call(*arguments, **options)

        return counted

    for thing, names in places:
        vars(thing).update({name: counting(name, getattr(thing, name)) for name in names})
    side.steps(steps)
    for thing, names in places:
        for name in names:
            del vars(thing)[name]
    return {name: count / steps for name, count in counts.items()}


def _seconds_a_call(side: Side) -> dict[str, float]:
    """What one call of each costs here, and one waking of the stall thread."""
    meter = Meter()
    clock = PhaseClock(CPU, meter)
    call = meter.start("all_reduce", 1000, 2, what="weight", group="data")

    def wait() -> None:
        with meter.waiting(call):
            pass

    sentinel = side.beside()
    assert isinstance(sentinel, Sentinel)
    calls: dict[str, Callable[[], object]] = {
        "begin_step": clock.begin_step,
        "mark": lambda: clock.mark("forward"),
        "end_step": clock.end_step,
        "start": lambda: meter.start("all_reduce", 1000, 2, what="weight", group="data"),
        "waiting": wait,
        "waking": lambda: sentinel._look(0.0),
    }
    seconds = {}
    for name, once in calls.items():
        runs = []
        for _ in range(9):
            began = time.thread_time()
            for _ in range(1000):
                once()
            runs.append((time.thread_time() - began) / 1000)
        seconds[name] = statistics.median(runs)
    return seconds


def _endless(a: Assembly, splits: Splits) -> Iterator[Batch]:
    for epoch in itertools.count():
        stream = open_epoch(a, splits, epoch=epoch, start=0)
        while (batch := next_batch(stream, a.samples, a.device)) is not None:
            yield batch


def _side(name: str, arguments: argparse.Namespace, log: EventLog | None) -> Side:
    case = CASES[arguments.model]
    job = replace(case.job(arguments.batch * 8), batch_size=arguments.batch)
    world = Group.world()
    a = assemble(job, Plan(layout=Layout(data=world.size), threads=1), world, CPU, total_steps=None)
    observer: Observer | None = None
    beside: Callable[[], AbstractContextManager[object]] = nullcontext
    if name == "on":

        def tell(event: Any) -> None:
            if log is not None:
                log.write(event)

        def say(_: str) -> None:
            """Nobody reads it here."""

        observer = Observer(a, tell, say)
        peers = world.gather_objects(this_peer(world.rank))
        folder = RunFolder.open(arguments.folder)

        def watched() -> Sentinel:
            return Sentinel(a, folder, world.rank, peers, stall_seconds=60.0, say=say)

        beside = watched
    else:
        no_meter(a.mesh.meter)
        vars(a)["clock"] = NoClock()
    ledger = Ledger(a.world, a.counts_loss, CPU, stop_requested=lambda: False, save_due=lambda: False)
    return Side(a, _endless(a, as_splits(job.data)), ledger, observer, beside)


def rank_main(arguments: argparse.Namespace) -> None:
    """Inside a rank: the sides take turns; rank 0 writes the seconds of every round."""
    torch.set_num_threads(1)
    c10d.init_process_group("gloo")
    rank = c10d.get_rank()
    events = Path(arguments.folder) / "events.jsonl"
    with EventLog(events) as log:
        sides = {name: _side(name, arguments, log if rank == 0 else None) for name in SIDES}
        for side in sides.values():
            side.steps(arguments.steps)  # warm up, and let the time between settlements grow to its aim
        calls = _counted_calls(sides["on"])
        sides["on"].observing_seconds, sides["on"].taken = 0.0, 0
        c10d.barrier()
        size_before = events.stat().st_size
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
        for turn in range(arguments.rounds):
            first = turn % len(SIDES)
            for name in SIDES[first:] + SIDES[:first]:
                with sides[name].beside():
                    c10d.barrier()
                    sides[name].ledger.skip_time()
                    wall, cpu = time.perf_counter(), time.process_time()
                    sides[name].steps(arguments.steps)
                    spent = torch.tensor([time.process_time() - cpu], dtype=torch.float64)
                    wall = time.perf_counter() - wall
                    c10d.all_reduce(spent)
                times[name].append((wall, float(spent)))
        each = _seconds_a_call(sides["on"])
        c10d.barrier()
    on = sides["on"]
    added = {name: count * each[name] for name, count in calls.items()}
    added["observing"] = on.observing_seconds / on.taken
    mean_step = sum(wall for wall, _ in times["on"]) / on.taken
    added["waking"] = each["waking"] * mean_step / TICK_SECONDS
    if rank == 0:
        written = events.stat().st_size - size_before
        Path(arguments.result).write_text(
            json.dumps({"times": times, "bytes": written, "added": added, "calls": calls}), encoding="utf-8"
        )
    c10d.destroy_process_group()


def spread(ratios: list[float]) -> dict[str, float]:
    """Median, quartiles, and the standard error of the median over 2,000 bootstrap samples (seeded)."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    draw = random.Random(0)
    medians = [statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000)]
    return {"median": middle, "low": low, "high": high, "error": statistics.stdev(medians)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks, and sum up what they measured."""
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(Path(place) / "run", "watch_cost")
        result = Path(place) / "result.json"
        command = [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(arguments.workers),
            ),
            *(
                str(HERE),
                "--rank",
                "--model",
                arguments.model,
                "--batch",
                str(arguments.batch),
                "--folder",
                str(folder.path),
            ),
            *("--rounds", str(arguments.rounds), "--steps", str(arguments.steps), "--result", str(result)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, timeout=3600)
        answer = json.loads(result.read_text(encoding="utf-8"))
    times = answer["times"]
    row: dict[str, Any] = {"model": arguments.model, "batch": arguments.batch, "workers": arguments.workers}
    row |= {"rounds": arguments.rounds, "steps_a_round": arguments.steps}
    row["step_seconds"] = statistics.median(wall for wall, _ in times["off"]) / arguments.steps
    row["cpu_seconds"] = statistics.median(cpu for _, cpu in times["off"]) / arguments.steps
    for index, kind in enumerate(("wall", "cpu")):
        for side, key in (("on", "on_to_off"), ("off again", "off_to_off")):
            pairs = zip(times[side], times["off"], strict=True)
            row[f"{kind}_{key}"] = spread([one[index] / other[index] for one, other in pairs])
    row["added_seconds_by_part"], row["calls_a_step"] = answer["added"], answer["calls"]
    row["added_seconds"] = sum(answer["added"].values())
    row["added_share"] = row["added_seconds"] / row["step_seconds"]
    row["bytes_per_10000_steps"] = answer["bytes"] * 10_000 / (arguments.rounds * arguments.steps)
    row["bytes_per_10000_steps_and_rank"] = row["bytes_per_10000_steps"] / arguments.workers
    return row


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lenet", choices=sorted(CASES))
    parser.add_argument("--batch", type=int, default=160)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=100, help="of each side in a round")
    parser.add_argument("--out", type=Path)
    for name in ("--folder", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(arguments)
        return
    row = measure(arguments)
    print(f"{row['model']}, batch {row['batch']}, {row['workers']} workers: {row['step_seconds'] * 1e3:.2f} ms a step")
    for kind in ("cpu", "wall"):
        for key in ("on_to_off", "off_to_off"):
            r = row[f"{kind}_{key}"]
            print(f"  {kind:4} {key:10} {r['median']:.4f} +- {r['error']:.4f} [{r['low']:.4f} .. {r['high']:.4f}]")
    size = row["bytes_per_10000_steps_and_rank"]
    print(
        f"  events: {row['bytes_per_10000_steps']:,.0f} bytes for 10,000 steps, {size:,.0f} a rank (goal {GOAL_BYTES:,})"
    )
    parts = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in row["added_seconds_by_part"].items())
    print(f"  added: {row['added_seconds'] * 1e6:.0f} us a rank and step ({parts}),")
    print(f"         {row['added_share']:.2%} of the step (goal {GOAL_SHARE:.1%})")
    if arguments.out is not None:
        about = {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        arguments.out.write_text(json.dumps({"about": about, "result": row}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
