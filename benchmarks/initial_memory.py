"""Memory and time of a rank until a sharded model is ready for its first step: weights made whole, or one unit at a time.

    python benchmarks/initial_memory.py [--shard 4] [--layers 12] [--width 768] [--rounds 3] [--out results.json]

The model is a transformer (about 400 MB by default, float32) whose weights are drawn a second time by its own rule and then
scaled, as in GPT-2. Each figure comes from ranks of their own that build it, shard it over gloo and end; both ways take
turns. Memory is the most that is resident above what the rank held before (VmHWM after a reset, Linux); the table shows its
largest rank. That the weights are equal is part of the run: each rank compares a checksum of its parts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d
import torch.distributed.fsdp  # its code is no part of what is measured
from torch import Tensor, nn

from shardwise.data.gather import Arrays
from shardwise.data.source import Splits
from shardwise.dist.collectives import Group
from shardwise.dist.split import local_part
from shardwise.parallel.replicas import checksum
from shardwise.run.assemble import assemble
from shardwise.run.gauge import memory_bytes
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

VOCABULARY = 20_000
BUILDS = ("whole", "deferred")


class Block(nn.Module):
    """Two linear layers; attention would add nothing to what is looked at here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 4 * width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.project(nn.functional.gelu(self.mix(self.norm(x))))
        y: Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return y


class Model(nn.Module):
    """Embedding, blocks and a head, with GPT-2's initial weights."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(self._draw)
        with torch.no_grad():
            for name, parameter in self.blocks.named_parameters():
                if name.endswith("down.weight"):
                    parameter.mul_(1 / (2 * layers) ** 0.5)

    @staticmethod
    def _draw(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def _rank(sender: Connection, rank: int, size: int, address: str, build: str, layers: int, width: int) -> None:
    torch.set_num_threads(1)
    data = Splits(Arrays((torch.zeros(8, 4, dtype=torch.int64), torch.zeros(8, 4, dtype=torch.int64))))
    job = Job(
        name="initial",
        model=lambda: Model(layers, width),
        data=data,
        loss=lambda output, target: nn.functional.cross_entropy(output.flatten(0, 1), target.flatten()),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        batch_size=8,
        epochs=1,
    )
    plan = Plan(layout=Layout(shard=size), build=build)  # type: ignore[arg-type]
    c10d.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=size)
    world = Group.world()
    world.barrier()
    cpu = torch.device("cpu")
    before = memory_bytes(cpu)
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    assembly = assemble(job, plan, world, cpu, total_steps=None)
    seconds = time.perf_counter() - began
    peak = _peak_bytes()
    held = sum(local_part(p).numel() * p.element_size() for p in assembly.model.parameters())
    sums = [int(checksum(local_part(p.detach()))) for p in assembly.model.parameters()]
    whole = sum(p.numel() * p.element_size() for p in assembly.model.parameters())
    sender.send({"peak": peak - before, "held": held, "whole": whole, "seconds": seconds, "sums": sums})
    world.barrier()
    c10d.destroy_process_group()


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def measure(build: str, *, shard: int, layers: int, width: int) -> list[dict[str, Any]]:
    """One dict a rank: bytes, seconds, and checksums of its parts."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(shard):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(sender, rank, shard, f"{folder}/store", build, layers, width))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        rows = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    return rows


def main() -> int:
    """Print the table; exit code 1 if the weights differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("shard", 4), ("layers", 12), ("width", 768), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rounds: dict[str, list[list[dict[str, Any]]]] = {build: [] for build in BUILDS}
    for _ in range(options.rounds):
        for build in BUILDS:
            rounds[build].append(measure(build, shard=options.shard, layers=options.layers, width=options.width))
    first = rounds[BUILDS[0]][0]
    equal = all(
        [row["sums"] for row in rows] == [row["sums"] for row in first] for sides in rounds.values() for rows in sides
    )
    document: dict[str, Any] = {
        "model_bytes": first[0]["whole"],
        "held_bytes": max(row["held"] for row in first),
        "weights_equal": equal,
        "peak_bytes": {b: [max(row["peak"] for row in rows) for rows in sides] for b, sides in rounds.items()},
        "seconds": {b: [max(row["seconds"] for row in rows) for rows in sides] for b, sides in rounds.items()},
    }
    print(
        f"model {document['model_bytes'] / 1e6:.0f} MB, a rank's part {document['held_bytes'] / 1e6:.0f} MB "
        f"(shard={options.shard})"
    )
    print(f"{'build':<10}{'peak MB above the start':>26}{'seconds':>10}   median of {options.rounds}, largest rank")
    for build in BUILDS:
        peak, seconds = (statistics.median(document[key][build]) for key in ("peak_bytes", "seconds"))
        print(f"{build:<10}{peak / 1e6:>26.0f}{seconds:>10.1f}")
    print(f"weights equal bit for bit: {equal}")
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
