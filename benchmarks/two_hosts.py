"""Two "hosts" behind a slow link: which layout is best at 100 Mbit/s and at 1 Gbit/s, and does the planner say so?

    sudo python benchmarks/two_hosts.py --out benchmarks/results/two_hosts.json

Each host is a network and process namespace of this machine with one core, so that nothing is shared but the link. The link is
a pair of TUN devices and a relay between them that lets so many bytes a second through in each direction (a token bucket;
many kernels have no traffic shaping of their own). On every link the hosts are probed together, as `shardwise probe --nnodes`
does, the planner prices each plan from that (and, for comparison, from the nominal speed of the link), and each plan is run.

What is no property of two hosts, and in the figures all the same: the relay takes 1 to 4 ms of a core for a step of a small
pipeline at 1 Gbit/s and 11 ms for one that sends 18 MB, and has to wait for that core; and both hosts have one memory and one
last cache. For each model it is told how many times as long a host's share of a step takes while the other computes its own
and neither sends anything.

Linux, as root, with /dev/net/tun and at least two cores.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from regret import MODELS
from shardwise.advise.trial import try_plan
from shardwise.data.source import Splits, as_splits
from shardwise.dist.collectives import Group
from shardwise.dist.group import process_group
from shardwise.planner.jobsearch import JobProblem, price
from shardwise.probe.facts import facts_apart
from shardwise.probe.length import first_samples, serial_plan
from shardwise.probe.machine import probe, probe_nodes
from shardwise.run.assemble import assemble
from shardwise.run.launch import Nodes, launch
from shardwise.run.step import take_step
from shardwise.spec.job import Job
from shardwise.spec.machine import Machine
from shardwise.spec.plan import Plan
from shardwise.spec.rank import Rank

PLANS: list[tuple[dict[str, Any], int]] = [
    ({"layout": "serial"}, 1),
    ({"layout": "data=2"}, 2),
    ({"layout": "shard=2"}, 2),
    ({"layout": "pipeline=2"}, 2),
    ({"layout": "pipeline=2", "micro_batch": 8}, 2),
    ({"layout": "pipeline=2", "micro_batch": 8, "schedule": "gpipe"}, 2),
    ({"layout": "pipeline=2", "micro_batch": 8, "schedule": "interleaved1f1b"}, 2),
    ({"layout": "pipeline=2", "micro_batch": 8, "schedule": "zbv"}, 2),
    ({"layout": "data=2", "compression": "bf16"}, 2),
    ({"layout": "data=2", "compression": "powersgd"}, 2),
    ({"layout": "data=2", "local_steps": 8}, 2),
]
"""Settings of a plan, and hosts. The last three are inexact, so they are measured and priced, but no choice."""

ADDRESSES = ("10.77.0.1", "10.77.0.2")
MTU = 65000
"""Bytes of a packet: the larger, the less time the relay takes from the hosts' cores."""

QUEUE_PACKETS = 128
BURST_SECONDS = 1e-3
BESIDE_STEPS = 15

CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 0x0001, 0x1000  # linux/sched.h, linux/if_tun.h
FIRST_PORT = 29600


def of_64(name: str) -> Callable[[], Job]:
    """A job of regret.py with a global batch of 64."""
    return lambda: replace(MODELS[name](), batch_size=64)


JOBS = {"wide_mlp": MODELS["wide_mlp"], "gpt": of_64("gpt"), "residual": of_64("residual")}
"""More gradients than work; something of both; more work than gradients, but BatchNorm's messages in every layer."""


def enter(namespace: str) -> None:
    """Move this process into a network namespace."""
    with Path(f"/var/run/netns/{namespace}").open() as handle:
        if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def open_tun(namespace: str, own: str, other: str) -> int:
    """A TUN device in a namespace, up and with its address; this process is its other end."""
    enter(namespace)
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22s", b"wire", IFF_TUN | IFF_NO_PI, b""))
    run("ip", "link", "set", "wire", "mtu", str(MTU), "txqueuelen", str(QUEUE_PACKETS))
    run("ip", "addr", "add", own, "peer", other, "dev", "wire")
    run("ip", "link", "set", "wire", "up")
    run("ip", "link", "set", "lo", "up")
    return device


def relay(namespaces: tuple[str, str], bytes_per_second: float, ready: Any) -> None:
    """Carry packets between the two, so many bytes a second in each direction, until this process is ended."""
    ends = [open_tun(namespaces[0], *ADDRESSES), open_tun(namespaces[1], *reversed(ADDRESSES))]
    ready.set()

    def carry(source: int, target: int) -> None:
        free = time.monotonic()
        while True:
            packet = os.read(source, MTU + 64)
            now = time.monotonic()
            free = max(free, now - BURST_SECONDS) + len(packet) / bytes_per_second
            if free > now:
                time.sleep(free - now)
            os.write(target, packet)

    threads = [threading.Thread(target=carry, args=pair, daemon=True) for pair in (ends, ends[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def hosts(bytes_per_second: float) -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by such a link; both are gone afterwards."""
    names = (f"shardwise{os.getpid()}a", f"shardwise{os.getpid()}b")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    carrier = context.Process(target=relay, args=(names, bytes_per_second, ready), daemon=True)
    try:
        for name in names:
            run("ip", "netns", "add", name)
        carrier.start()
        if not ready.wait(20):
            raise SystemExit("the relay did not start")
        yield names
    finally:
        if carrier.pid is not None:
            carrier.kill()
            carrier.join()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def run(*words: str) -> None:
    subprocess.run(words, check=True)


def on_host(number: int, namespace: str, folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """This script with other arguments on one host: its network, one core, processes and figures of its own."""
    core = sorted(os.sched_getaffinity(0))[number]
    command = ["ip", "netns", "exec", namespace, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += ["taskset", "-c", str(core), sys.executable, __file__, "--host", str(number), "--folder", str(folder)]
    cache = folder / f"cache{number}"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    with (folder / f"host{number}.txt").open("wb") as told:
        return subprocess.Popen([*command, *words], env=environment, start_new_session=True, stdout=told, stderr=told)


def beside(rank: Rank, job: Job, splits: Splits) -> float:
    """How many times as long a step of one host's share takes while the other computes its own, and neither sends anything.

    Both "hosts" are one machine: its caches and its memory are theirs together, as those of real hosts would not be.
    """
    torch.set_num_threads(1)
    share = replace(job, batch_size=max(1, job.batch_size // 2))
    with process_group(rank, "cpu", 60.0):
        world = Group.world()
        assembly = assemble(share, serial_plan(share), Group(), torch.device("cpu"), total_steps=None)
        batch = first_samples(splits, share.batch_size)
        took = []
        for working in (1, 2):
            for _ in range(2):
                take_step(assembly, batch)
            world.barrier()
            times = []
            for _ in range(BESIDE_STEPS if rank.rank < working else 0):
                began = time.perf_counter()
                take_step(assembly, batch)
                times.append(time.perf_counter() - began)
            world.barrier()
            took.append(median(times) if times else 1.0)
        return float(world.gather_objects(took[1] / took[0])[0])


def measure_link(megabits: float, options: argparse.Namespace) -> dict[str, Any]:
    """Everything on one link: probe, predictions and trials, by the two hosts together."""
    with tempfile.TemporaryDirectory() as name, hosts(megabits * 1e6 / 8) as namespaces:
        folder = Path(name)
        words: tuple[str, ...] = (
            "--models",
            options.models,
            "--seconds",
            str(options.seconds),
            "--link",
            str(megabits),
        )
        words += ("--rounds", str(options.rounds))
        started = [on_host(number, namespaces[number], folder, *words) for number in (0, 1)]
        try:
            codes = [process.wait(timeout=options.patience) for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if any(codes):
            print((folder / "host0.txt").read_text(encoding="utf-8"), file=sys.stderr)
            raise SystemExit(f"a host ended with exit codes {codes}")
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result


def be_host(options: argparse.Namespace) -> None:
    """One of the two hosts: probe, then try every plan together with the other; host 0 writes what came out."""
    number, ports = options.host, iter(range(FIRST_PORT, FIRST_PORT + 1000))

    def meet() -> Nodes:
        endpoint = f"{ADDRESSES[0]}:{next(ports)}"
        return Nodes(count=2, node_rank=number, endpoint=endpoint, join_seconds=200.0)

    machine = probe_nodes(probe(), meet(), tell=lambda text: print(text, file=sys.stderr))
    rows = []
    for name in options.models.split(","):
        job = JOBS[name]()
        splits = as_splits(job.data)
        facts = facts_apart(job, splits) if number == 0 else None
        tried: list[list[dict[str, Any]]] = [[] for _ in PLANS]
        for _ in range(options.rounds):
            for index, (settings, count) in enumerate(PLANS):
                if count == 1 and number == 1:
                    continue
                plan = Plan.from_dict({**settings, "threads": 1})
                nodes = meet() if count > 1 else None
                seen = try_plan(job, splits, plan, step_budget_seconds=options.seconds, nodes=nodes)
                seconds = seen.mean_seconds if plan.local_steps > 1 else seen.step_seconds
                tried[index].append({"seconds": seconds, "failure": seen.failure})
        slowdown = launch(
            functools.partial(beside, job=job, splits=splits),
            workers=2,
            threads=1,
            nodes=meet(),
            report=lambda text: None,
        )
        if facts is None:
            continue
        measured = JobProblem(facts=facts, machine=machine, workers=2, nodes=2)
        share = options.link / 1e3
        assert machine.measured is not None
        inside = tuple(item for item in machine.measured.messages if item.nodes == 1)
        bare = replace(machine.measured, messages=inside)
        nominal = replace(measured, machine=replace(machine, measured=bare).with_network(share, "the link's own speed"))
        for (settings, count), seen_rows in zip(PLANS, tried, strict=True):
            plan = Plan.from_dict({**settings, "threads": 1})
            estimates = [price(each, plan, nodes=count).estimate for each in (measured, nominal)]
            good = [row["seconds"] for row in seen_rows if row["failure"] is None]
            rows.append(
                {
                    "model": name,
                    "plan": str(plan),
                    "hosts": count,
                    "shared_slowdown": slowdown,
                    "exact": plan.local_steps == 1 and plan.compression == "none",
                    "measured_seconds": min(good) if good else None,
                    "failure": next((row["failure"] for row in seen_rows if row["failure"]), None),
                    "predicted_seconds": estimates[0].step_seconds - estimates[0].seconds["loop"],
                    "predicted_from_nominal_seconds": estimates[1].step_seconds - estimates[1].seconds["loop"],
                    "parts": {key: value for key, value in estimates[0].seconds.items() if value > 0},
                }
            )
    if number == 0:
        write(options.folder / "result.json", machine, rows)


def write(path: Path, machine: Machine, rows: list[dict[str, Any]]) -> None:
    assert machine.measured is not None
    between = [vars(item) for item in machine.measured.messages if item.nodes > 1]
    network = {"bytes_per_second": machine.inter.bytes_per_second.value, "latency": machine.inter.latency_seconds.value}
    path.write_text(json.dumps({"network": network, "messages": between, "rows": rows}), encoding="utf-8")


def judge(megabits: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best plan of one model on one link, and what the planner would have taken."""
    able = [row for row in rows if row["measured_seconds"] is not None and row["exact"]]
    best = min(able, key=lambda row: row["measured_seconds"])
    chosen = {
        key: min(able, key=lambda row: row[key]) for key in ("predicted_seconds", "predicted_from_nominal_seconds")
    }
    regret = {key: row["measured_seconds"] / best["measured_seconds"] - 1 for key, row in chosen.items()}
    return {
        "model": rows[0]["model"],
        "megabits": megabits,
        "best": best["plan"],
        "by_prediction": chosen["predicted_seconds"]["plan"],
        "by_nominal": chosen["predicted_from_nominal_seconds"]["plan"],
        "regret": regret["predicted_seconds"],
        "regret_by_nominal": regret["predicted_from_nominal_seconds"],
    }


def unable() -> str | None:
    """Why this cannot run here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "it makes network namespaces, which needs Linux and root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    missing = [name for name in ("ip", "unshare", "taskset") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    if len(os.sched_getaffinity(0)) < 2:
        return "each host needs a core of its own"
    return None


def main() -> None:
    """Measure every link, judge, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default="100,1000", help="Mbit/s")
    parser.add_argument("--models", default=",".join(JOBS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.6, help="timed steps of one trial")
    parser.add_argument("--patience", type=float, default=1500.0, help="seconds until a link is given up")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--host", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--link", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host is not None:
        be_host(options)
        return
    reason = unable()
    if reason is not None:
        print(f"SKIPPED: {reason}", file=sys.stderr)
        raise SystemExit(2)
    links, judged = [], []
    for megabits in (float(text) for text in options.links.split(",")):
        result = measure_link(megabits, options)
        links.append({"megabits": megabits, **result})
        speed = result["network"]["bytes_per_second"] * 8 / 1e6
        print(f"{megabits:g} Mbit/s: probed as {speed:.0f} Mbit/s, {result['network']['latency'] * 1e6:.0f} us")
        for name in options.models.split(","):
            rows = [row for row in result["rows"] if row["model"] == name]
            for row in rows:
                seen = (
                    f"{row['measured_seconds'] * 1e3:9.2f} ms"
                    if row["measured_seconds"]
                    else f"failed: {row['failure']}"
                )
                print(
                    f"  {name:12} {row['plan']:38} measured {seen}  predicted {row['predicted_seconds'] * 1e3:9.2f} ms"
                    f"  from the nominal link {row['predicted_from_nominal_seconds'] * 1e3:9.2f} ms"
                )
            judged.append(judge(megabits, rows))
            one = judged[-1]
            print(
                f"  {name:12} best {one['best']}; predicted {one['by_prediction']}, regret {one['regret']:.1%}; a host's share "
                f"takes {rows[0]['shared_slowdown']:.2f} times as long beside the other's",
                flush=True,
            )
    for name in options.models.split(","):
        mine = [one for one in judged if one["model"] == name]
        if len({one["best"] for one in mine}) > 1:
            told = len({one["by_prediction"] for one in mine}) > 1
            print(
                f"{name}: the best layout changes with the link; the planner {'says so' if told else 'does not say so'}"
            )
    if options.out is not None:
        options.out.write_text(json.dumps({"judged": judged, "links": links}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
