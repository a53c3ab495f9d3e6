"""What shardwise costs per step against a hand-written DDP loop, Accelerate and Lightning Fabric.

    python benchmarks/overhead.py [--models lenet,resnet18,gpt10m] [--workers 1,2] [--rounds 15] [--out results.json]

Steady state: each contender is a program of its own, started by torchrun, and they take turns, a few steps each, for many
rounds, so that a machine whose speed drifts hits all alike. While one has its turn, the others wait for a message and take
no processor time. The figure is the ratio of shardwise's time to the other's within a round; the table gives its median and
its quartiles, of wall time and of processor time (of all threads of all ranks). All train the same model on the same batches,
gathered from tensors in memory. shardwise runs as a training in a folder does, with its events, losses and watching. Peak
resident bytes are those of the largest rank.

Start-up: time from the command to the end of the first optimizer step, of `shardwise train` against `torchrun` with the
hand-written loop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d

from contenders import MAKERS, TURN_SECONDS
from models import CASES

HERE = Path(__file__).resolve()
CONTENDERS = ("shardwise", "ddp", "accelerate", "fabric")


def rank_main(arguments: argparse.Namespace) -> None:
    """Inside a rank of a contender: take as many steps as the parent says, and tell it the seconds of each turn."""
    torch.set_num_threads(arguments.threads)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        c10d.init_process_group("gloo")
    step = MAKERS[arguments.contender](CASES[arguments.model], rank, ranks)
    with Client(os.environ["OVERHEAD_ADDRESS"], authkey=bytes.fromhex(os.environ["OVERHEAD_KEY"])) as parent:
        while (steps := parent.recv()) > 0:
            wall, processor = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
            parent.send((time.perf_counter() - wall, time.process_time() - processor))
        parent.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        parent.recv()
    # Some runs of torch 2.13 with gloo, DDP alone too, are aborted while the interpreter goes (docs/notes.md).
    os._exit(0)


@contextmanager
def _contender(name: str, model: str, workers: int) -> Iterator[list[Connection]]:
    """A contender's program under torchrun: the connections to its ranks."""
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        key = secrets.token_bytes(16)
        listener = stack.enter_context(Listener(f"{folder}/socket", "AF_UNIX", authkey=key))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)),
            *(str(HERE), "--rank", "--models", model, "--contender", name, "--threads", str(threads)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OVERHEAD_OUT": f"{folder}/run"}
        environment |= {"OVERHEAD_ADDRESS": f"{folder}/socket", "OVERHEAD_KEY": key.hex()}
        log = stack.enter_context(Path(folder, "log").open("w+", encoding="utf-8"))
        program = stack.enter_context(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        listener._listener._socket.settimeout(0.5)  # type: ignore[attr-defined]  # to see a program that has ended
        ranks: list[Connection] = []
        while len(ranks) < workers:
            try:
                ranks.append(stack.enter_context(listener.accept()))
            except TimeoutError:
                if program.poll() is not None:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(command)} ended early:\n{log.read()[-4000:]}") from None
        try:
            yield ranks
        except BaseException:
            time.sleep(1)  # torchrun ends by itself where a rank has failed
            program.terminate()
            log.seek(0)
            print(f"{' '.join(command)}:\n{log.read()[-4000:]}", file=sys.stderr)
            raise
        for rank in ranks:
            rank.send(0)


def _turn(ranks: list[Connection], steps: int) -> tuple[float, float]:
    """(wall seconds, processor seconds of all ranks) of so many steps, a step."""
    for rank in ranks:
        rank.send(steps)
    told = [rank.recv() for rank in ranks]
    return max(wall for wall, _ in told) / steps, sum(processor for _, processor in told) / steps


def _measure(model: str, workers: int, contenders: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Of each contender: `wall` and `processor`, seconds a step, one a round; `peak_bytes` of its largest rank."""
    with ExitStack() as stack:
        programs = {name: stack.enter_context(_contender(name, model, workers)) for name in contenders}
        for ranks in programs.values():
            _turn(ranks, 24)  # as many as are looked at more closely than later ones
        steps = max(2, min(300, round(TURN_SECONDS / min(_turn(ranks, 3)[0] for ranks in programs.values()))))
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        for index in range(rounds):
            turn = index % len(contenders)
            for name in contenders[turn:] + contenders[:turn]:
                seen[name].append(_turn(programs[name], steps))
        answer: dict[str, dict[str, Any]] = {}
        for name, ranks in programs.items():
            for rank in ranks:
                rank.send(0)
            peak = max(rank.recv() for rank in ranks)
            wall, processor = ([pair[which] for pair in seen[name]] for which in (0, 1))
            answer[name] = {"wall": wall, "processor": processor, "peak_bytes": peak}
        return answer


def _quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": low, "high": high}


def steady_state(model: str, workers: int, contenders: list[str], rounds: int) -> list[dict[str, Any]]:
    """Ratios of step times, and peak memory, one row a contender."""
    seen = _measure(model, workers, contenders, rounds)
    ours, rows = seen["shardwise"], []
    for name, theirs in seen.items():
        row: dict[str, Any] = {"model": model, "workers": workers, "against": name, "peak_bytes": theirs["peak_bytes"]}
        for kind in ("wall", "processor"):
            ratios = [one / other for one, other in zip(ours[kind], theirs[kind], strict=True)]
            row[f"{kind}_ratio"] = _quartiles(ratios)
            row[f"{kind}_seconds"] = statistics.median(theirs[kind])
        rows.append(row)
        wall, processor = row["wall_ratio"], row["processor_ratio"]
        print(
            f"{model:22} workers={workers}  {name:10} {row['wall_seconds'] * 1e3:8.3f} ms/step  shardwise/it "
            f"{wall['median']:.3f} [{wall['low']:.3f} .. {wall['high']:.3f}]  processor {processor['median']:.3f} "
            f"[{processor['low']:.3f} .. {processor['high']:.3f}]  peak {row['peak_bytes'] / 2**20:5.0f} MiB",
            flush=True,
        )
    return rows


def start_up(rounds: int) -> dict[str, Any]:
    """Seconds from the command to the end of the first step, two workers, interleaved; ratios within a round."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        hand = Path(folder) / "hand.py"
        hand.write_text(_HAND_WRITTEN, encoding="utf-8")
        for index in range(rounds):
            marks = [Path(folder) / f"{name}{index}" for name in ("shardwise", "torchrun")]
            job = f"{HERE.with_name('startup_job.py')}:startup"
            ours = [
                *(str(Path(sys.executable).with_name("shardwise")), "train", job, "--set", f"mark={marks[0]}"),
                *("--plan", "data=2", "--quiet", "--out", f"{folder}/run{index}"),
            ]
            theirs = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            pairs.append([_until_mark(ours, marks[0]), _until_mark([*theirs, str(hand), str(marks[1])], marks[1])])
    ratios = [one / other for one, other in pairs]
    result: dict[str, Any] = {
        "ratio": _quartiles(ratios),
        "shardwise_seconds": statistics.median(one for one, _ in pairs),
    }
    result["torchrun_seconds"] = statistics.median(other for _, other in pairs)
    print(
        f"start to first step: shardwise {result['shardwise_seconds']:.2f} s, torchrun {result['torchrun_seconds']:.2f} s, "
        f"ratio {result['ratio']['median']:.3f} [{result['ratio']['low']:.3f} .. {result['ratio']['high']:.3f}]"
    )
    return result


def _until_mark(command: list[str], mark: Path) -> float:
    began = time.time()
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(mark.read_text(encoding="utf-8")) - began


_HAND_WRITTEN = """
import sys, time
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
inputs, targets = torch.randn(32, 64), torch.randint(0, 10, (32,))
cross_entropy(model(inputs), targets).backward()
optimizer.step()
if dist.get_rank() == 0:
    open(sys.argv[1], "w").write(repr(time.time()))
dist.barrier()
dist.destroy_process_group()
"""


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES), help="names of models.py, commas between them")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--no-start-up", action="store_true", help="only the steady state")
    parser.add_argument("--out", type=Path, help="what is there of other models is kept")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        arguments.model = arguments.models
        rank_main(arguments)
        return
    machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "torch": torch.__version__}
    print(f"machine: {machine}")
    document: dict[str, Any] = {"steady_state": []}
    if arguments.out is not None and arguments.out.exists():
        document = json.loads(arguments.out.read_text(encoding="utf-8"))
    document["machine"] = machine
    if not arguments.no_start_up:
        document["start_up"] = start_up(max(3, arguments.rounds // 3))
    for model in arguments.models.split(","):
        for workers in map(int, arguments.workers.split(",")):
            rows = steady_state(model, workers, arguments.contenders.split(","), arguments.rounds)
            kept = [row for row in document["steady_state"] if (row["model"], row["workers"]) != (model, workers)]
            document["steady_state"] = kept + rows
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
