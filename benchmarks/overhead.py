"""What shardwise costs per step against a hand-written DDP loop, Accelerate and Lightning Fabric.

    python benchmarks/overhead.py [--models lenet,resnet18,gpt10m] [--workers 1,2] [--rounds 15] [--out results.json]

Steady state: all contenders live in the same ranks and take turns, a few steps each, for many rounds, so that a machine
whose speed drifts hits all alike. The figure is the ratio of shardwise's time to the other's within a round; the table
gives its median and its quartiles. All train the same model on the same batches, gathered from tensors in memory.

Start-up: time from the command to the end of the first optimizer step, of `shardwise train` against `torchrun` with the
hand-written loop. Memory: peak resident bytes per rank of each contender alone, in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from models import CASES, Case

HERE = Path(__file__).resolve()
CONTENDERS = ("shardwise", "ddp", "accelerate", "fabric")
Step = Callable[[], None]


def _batches(case: Case, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What an expert writes: shuffle once per epoch, gather this rank's part of each batch from memory."""
    inputs, targets = case.data(case.batch * 8)
    share = case.batch // ranks
    while True:
        order = torch.randperm(len(inputs))
        for start in range(rank * share, len(inputs), case.batch):
            rows = order[start : start + share]
            yield inputs[rows], targets[rows]


def _ddp(case: Case, rank: int, ranks: int) -> Step:
    torch.manual_seed(0)
    model: Any = case.model()
    if ranks > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    optimizer = case.optimizer(model.parameters())
    stream = _batches(case, rank, ranks)

    def step() -> None:
        inputs, targets = next(stream)
        optimizer.zero_grad(set_to_none=True)
        case.loss(model(inputs), targets).backward()
        optimizer.step()

    return step


def _accelerate(case: Case, rank: int, ranks: int) -> Step:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = case.model()
    model, optimizer = accelerator.prepare(model, case.optimizer(model.parameters()))
    stream = _batches(case, rank, ranks)

    def step() -> None:
        inputs, targets = next(stream)
        optimizer.zero_grad()
        accelerator.backward(case.loss(model(inputs), targets))
        optimizer.step()

    return step


def _fabric(case: Case, rank: int, ranks: int) -> Step:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto")
    if ranks > 1:
        fabric.launch()
    torch.manual_seed(0)
    model: Any = case.model()
    model, optimizer = fabric.setup(model, case.optimizer(model.parameters()))
    stream = _batches(case, rank, ranks)

    def step() -> None:
        inputs, targets = next(stream)
        optimizer.zero_grad()
        fabric.backward(case.loss(model(inputs), targets))
        optimizer.step()

    return step


def _shardwise(case: Case, rank: int, ranks: int) -> Step:
    from shardwise.run.live import start
    from shardwise.run.step import take_step

    run = start(case.job(case.batch * 8))
    stream = run.batches(epochs=1_000_000)

    def step() -> None:
        take_step(run.assembly, next(stream))

    return step


MAKERS: dict[str, Callable[[Case, int, int], Step]] = {
    "shardwise": _shardwise,
    "ddp": _ddp,
    "accelerate": _accelerate,
    "fabric": _fabric,
}


def rank_main(arguments: argparse.Namespace) -> None:
    """Inside a rank: the contenders take turns; rank 0 writes the seconds per step of every round."""
    torch.set_num_threads(arguments.threads)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    case = CASES[arguments.model]
    if ranks > 1:
        c10d.init_process_group("gloo")
    steps = {name: MAKERS[name](case, rank, ranks) for name in arguments.contenders.split(",")}
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(arguments.rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            if ranks > 1:
                c10d.barrier()
            began = time.perf_counter()
            for _ in range(case.steps):
                steps[name]()
            if ranks > 1:
                c10d.barrier()
            seconds[name].append((time.perf_counter() - began) / case.steps)
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024])
    if ranks > 1:
        c10d.all_reduce(peak, op=c10d.ReduceOp.MAX)
    if rank == 0:
        Path(arguments.result).write_text(json.dumps({"seconds": seconds, "peak_bytes": int(peak)}), encoding="utf-8")
    if ranks > 1:
        c10d.destroy_process_group()
        # Some runs of torch 2.13 with gloo, DDP alone too, are aborted while the interpreter goes (docs/notes.md).
        os._exit(0)


def _run_ranks(model: str, workers: int, contenders: str, rounds: int) -> dict[str, Any]:
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)),
            *(str(HERE), "--rank", "--model", model, "--contenders", contenders, "--rounds", str(rounds)),
            *("--threads", str(threads), "--result", str(result)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=1800, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return answer


def _quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": low, "high": high}


def steady_state(models: list[str], workers: list[int], rounds: int) -> list[dict[str, Any]]:
    """Ratios of step times, and peak memory of each contender alone."""
    rows = []
    for model in models:
        for count in workers:
            together = _run_ranks(model, count, ",".join(CONTENDERS), rounds)["seconds"]
            for name in CONTENDERS:
                ratios = [one / other for one, other in zip(together["shardwise"], together[name], strict=True)]
                alone = _run_ranks(model, count, name, 1)["peak_bytes"]
                row: dict[str, Any] = {"model": model, "workers": count, "against": name, "ratio": _quartiles(ratios)}
                row |= {"step_seconds": statistics.median(together[name]), "peak_bytes": alone}
                rows.append(row)
                ratio = row["ratio"]
                print(
                    f"{model:9} workers={count}  {name:10} {row['step_seconds'] * 1e3:8.2f} ms/step  shardwise/it "
                    f"{ratio['median']:.3f} [{ratio['low']:.3f} .. {ratio['high']:.3f}]  peak {alone / 2**20:6.0f} MiB",
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
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    for name in ("--model", "--contenders", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(arguments)
        return
    machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "torch": torch.__version__}
    print(f"machine: {machine}")
    document: dict[str, Any] = {"machine": machine, "start_up": start_up(max(3, arguments.rounds // 3))}
    workers = [int(text) for text in arguments.workers.split(",")]
    document["steady_state"] = steady_state(arguments.models.split(","), workers, arguments.rounds)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
