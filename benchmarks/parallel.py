"""What each kind of parallelism costs per step and per rank against the same torch pieces, put together by hand.

    python benchmarks/parallel.py [--kinds data,shard,tensor,recompute,pipeline,context,expert] [--rounds 12] [--out results.json]

| kind | by hand |
|---|---|
| data | `DistributedDataParallel` |
| shard | `fully_shard` of every block and the root |
| tensor | `parallelize_module`: column and row by the names of the layers, heads divided, logits gathered |
| recompute | `torch.utils.checkpoint` around every block, one worker |
| pipeline | `Schedule1F1B` of two `PipelineStage`s, the same cut and micro-batches |
| context, expert | gathers and exchanges of torch's functional collectives, and `DistributedDataParallel` |

The last two rows are in parallel_by_hand.py. With expert, blocks have a mixture of experts in place of the two linear layers.

Steady state: both live in the same ranks and take turns, a few steps each, so that a machine whose speed drifts hits both
alike. The figure is the ratio of shardwise's time to the other's within a round: its median and quartiles.

Memory: peak resident bytes of a rank with one of the two alone, in processes of its own; and the bytes of parameters and
optimizer states that a rank holds, counted, at 1, 2 and 4 ranks.

Shapes: B samples, T characters, D features.
"""

from __future__ import annotations

import argparse
import functools
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
from typing import Any, cast

import torch
import torch.distributed as c10d
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve()
KINDS = ("data", "shard", "tensor", "recompute", "pipeline", "context", "expert")
BATCH, LENGTH, WIDTH, HEADS, LAYERS, VOCABULARY = 16, 128, 256, 8, 4, 96
STEPS = 3
MICRO, CUT = 2, 2
"""Samples of a micro-batch of the pipeline, and the block that its second stage starts with."""
EXPERTS = 4
MADE = 8 * BATCH
MANY = 64
"""Samples of a step where the memory of activations is looked at, so that they outweigh what torch itself takes."""

Step = Callable[[], None]


class Block(nn.Module):
    """Attention with separate projections, and two linear layers or, with `experts`, a mixture."""

    def __init__(self, *, experts: bool = False) -> None:
        super().__init__()
        self.attend: Callable[..., Tensor] = functools.partial(F.scaled_dot_product_attention, is_causal=True)
        self.heads = HEADS
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        if experts:
            from shardwise.nn import MoE

            self.mixture = MoE(WIDTH, 2 * WIDTH, EXPERTS, balance=0)
        else:
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.experts = experts

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = self.norm1(x_BTD)
        q, k, v = (
            layer(y_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x_BTD = x_BTD + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        if self.experts:
            return torch.as_tensor(x_BTD + self.mixture(self.norm2(x_BTD)))
        return torch.as_tensor(x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD)))))


class Gpt(nn.Module):
    """3.3 million parameters, 5.4 with experts."""

    def __init__(self, *, experts: bool = False) -> None:
        super().__init__()
        self.positions: Tensor | None = None
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(experts=experts) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions = torch.arange(tokens_BT.shape[1]) if self.positions is None else self.positions
        x_BTD = self.tokens(tokens_BT) + self.places(positions)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return torch.as_tensor(self.head(self.norm(x_BTD)))


def data() -> tuple[Tensor, Tensor]:
    """Random characters: how long a step takes does not depend on them."""
    tokens = torch.randint(0, VOCABULARY, (MADE, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the characters."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW: two states a parameter."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def ours(kind: str, ranks: int, batch: int) -> tuple[Step, nn.Module, torch.optim.Optimizer]:
    """shardwise, with the plan of the kind."""
    import shardwise
    from shardwise.run.step import take_step

    model = functools.partial(Gpt, experts=kind == "expert")
    job = shardwise.Job(
        model=model, data=data(), loss=loss, optimizer=optimizer, batch_size=batch, epochs=1, name="parallel"
    )
    recompute = "full" if kind == "recompute" else "none"
    axis = {} if ranks == 1 else {kind: ranks}
    staged = {"cuts": (f"blocks.{CUT}",), "micro_batch": MICRO} if axis and kind == "pipeline" else {}
    plan = shardwise.Plan(layout=shardwise.Layout(**axis), recompute=cast(Any, recompute), **cast(Any, staged))
    run = shardwise.start(job, plan=plan, device="cpu")
    stream = run.batches(epochs=1_000_000)
    return lambda: void(take_step(run.assembly, next(stream))), run.model, run.optimizer


def by_hand(kind: str, ranks: int, batch: int) -> tuple[Step, nn.Module, torch.optim.Optimizer]:
    """The torch pieces of the kind."""
    torch.manual_seed(0)
    model: Any = Gpt(experts=kind == "expert")
    rank = c10d.get_rank() if ranks > 1 else 0
    share, first = batch, 0
    if kind == "data" and ranks > 1:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    elif kind == "shard" and ranks > 1:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    elif kind == "tensor" and ranks > 1:
        parallelize(model, ranks)
    elif kind == "recompute":
        recompute(model)
    if kind in ("pipeline", "context", "expert"):
        return more_by_hand(kind, model, batch)
    if kind in ("data", "shard"):
        share, first = batch // ranks, rank * (batch // ranks)
    made = optimizer(model.parameters())
    stream = batches(first, share, batch)

    def step() -> None:
        inputs, targets = next(stream)
        made.zero_grad(set_to_none=True)
        loss(model(inputs), targets).backward()
        made.step()

    return step, model, made


def more_by_hand(kind: str, model: Any, batch: int) -> tuple[Step, nn.Module, torch.optim.Optimizer]:
    """The kinds whose pieces are in parallel_by_hand.py, on several ranks."""
    import parallel_by_hand as hand

    rank, ranks = c10d.get_rank(), c10d.get_world_size()
    stream, dealt = batches(0, batch, batch), cast("list[nn.Parameter]", [])
    if kind == "pipeline":
        model = hand.stage_of(model, CUT)
        passes = hand.pipeline_passes(model, loss, batch // MICRO, stream)
    else:
        if kind == "context":
            stream = hand.own_tokens(stream, hand.split_sequences(model, LENGTH))
        else:
            stream = batches(rank * (batch // ranks), batch // ranks, batch)
            dealt = hand.deal_experts(model)
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)

        def passes() -> None:
            inputs, targets = next(stream)
            loss(model(inputs), targets).backward()
            for parameter in dealt:  # complete, of the sum of the ranks' means
                cast(Tensor, parameter.grad).div_(ranks)

    made = optimizer(model.parameters())

    def step() -> None:
        made.zero_grad(set_to_none=True)
        passes()
        made.step()

    return step, model, made


def parallelize(model: Gpt, ranks: int) -> None:
    """What the tutorial on tensor parallelism does, without its sequence parallel norms, which send as much."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (ranks,))
    columns, rows = ("query", "key", "value", "up"), ("out", "down")
    for block in model.blocks:
        parallelize_module(
            block, mesh, {**{n: ColwiseParallel() for n in columns}, **{n: RowwiseParallel() for n in rows}}
        )
        cast(Block, block).heads //= ranks
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})


def recompute(model: Gpt) -> None:
    """torch's function around every block."""
    from torch.utils.checkpoint import checkpoint

    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)


def batches(first: int, share: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffle once an epoch, gather this rank's part of each batch from memory."""
    inputs, targets = data()
    while True:
        order = torch.randperm(len(inputs))
        for start in range(first, len(inputs), batch):
            rows = order[start : start + share]
            yield inputs[rows], targets[rows]


def void(_: object) -> None:
    """Nothing."""


def held_bytes(model: nn.Module, made: torch.optim.Optimizer) -> int:
    """Bytes of the parameters and optimizer states that this rank holds."""
    states = [value for state in made.state.values() for value in state.values() if isinstance(value, Tensor)]
    tensors = [*model.parameters(), *states]
    local = [cast(Any, t).to_local() if type(t).__name__ == "DTensor" else t for t in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def rank_main(arguments: argparse.Namespace) -> None:
    """Inside a rank: the sides take turns; rank 0 writes what was seen."""
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        c10d.init_process_group("gloo")
    sides = {
        name: {"ours": ours, "by_hand": by_hand}[name](arguments.kind, ranks, arguments.batch)
        for name in arguments.sides
    }
    for step, _, _ in sides.values():
        for _ in range(2):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for index in range(arguments.rounds):
        for name in names if index % 2 else names[::-1]:
            if ranks > 1:
                c10d.barrier()
            began = time.perf_counter()
            for _ in range(STEPS):
                sides[name][0]()
            if ranks > 1:
                c10d.barrier()
            seconds[name].append((time.perf_counter() - began) / STEPS)
    held = {name: held_bytes(model, made) for name, (_, model, made) in sides.items()}
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024])
    if ranks > 1:
        c10d.all_reduce(peak, op=c10d.ReduceOp.MAX)
    if int(os.environ["RANK"]) == 0:
        answer = {"seconds": seconds, "held_bytes": held, "peak_bytes": int(peak)}
        Path(arguments.result).write_text(json.dumps(answer), encoding="utf-8")
    if ranks > 1:
        c10d.barrier()
        c10d.destroy_process_group()
    os._exit(
        0
    )  # gloo's threads may abort an interpreter that ends in its own time ("terminate called", seen with 4 ranks)


def run_ranks(kind: str, ranks: int, sides: list[str], rounds: int, batch: int = BATCH) -> dict[str, Any]:
    """Start ranks and read what they saw."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *(str(HERE), "--rank", "--kind", kind, "--rounds", str(rounds), "--result", str(result)),
            *("--batch", str(batch), "--sides", *sides),
        ]
        done = subprocess.run(
            command,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        if done.returncode:
            raise SystemExit(f"{kind} on {ranks} ranks failed:\n{done.stderr}")
        answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return answer


def measure(kind: str, rounds: int) -> dict[str, Any]:
    """One kind: times of both sides in the same ranks, then the memory of each alone."""
    ranks = 1 if kind == "recompute" else 2
    seconds = run_ranks(kind, ranks, ["ours", "by_hand"], rounds)["seconds"]
    ratios = [one / other for one, other in zip(seconds["ours"], seconds["by_hand"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    alone = {name: run_ranks(kind, ranks, [name], 1) for name in ("ours", "by_hand")}
    row: dict[str, Any] = {"kind": kind, "ranks": ranks, "ratio": {"median": middle, "low": low, "high": high}}
    row |= {"step_seconds": {name: statistics.median(values) for name, values in seconds.items()}}
    row |= {"peak_bytes": {name: answer["peak_bytes"] for name, answer in alone.items()}}
    peaks = [row["peak_bytes"][name] / 2**20 for name in ("ours", "by_hand")]
    times = [row["step_seconds"][name] * 1e3 for name in ("ours", "by_hand")]
    print(
        f"{kind:9} ranks={ranks}  {times[0]:7.1f} ms, by hand {times[1]:7.1f} ms, ratio {middle:.3f} [{low:.3f} .. {high:.3f}]  "
        f"peak {peaks[0]:.0f} MiB, by hand {peaks[1]:.0f} MiB",
        flush=True,
    )
    return row


def memory_of_recompute() -> dict[str, int]:
    """Peak bytes of one worker without and with recomputation, with many samples."""
    peaks = {
        name: int(run_ranks(kind, 1, ["ours"], 1, MANY)["peak_bytes"])
        for name, kind in (("none", "data"), ("full", "recompute"))
    }
    print("recompute: peak " + ", ".join(f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items()), flush=True)
    return peaks


def memory_against_degree(kind: str) -> dict[str, int]:
    """Bytes of parameters and optimizer states that rank 0 holds, by the number of ranks."""
    held = {str(ranks): int(run_ranks(kind, ranks, ["ours"], 1)["held_bytes"]["ours"]) for ranks in (1, 2, 4)}
    parts = ", ".join(f"{ranks}: {size / held['1']:.3f}" for ranks, size in held.items())
    print(f"{kind}: parameters and states held by a rank, of the whole: {parts}", flush=True)
    return held


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--sides", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(arguments)
        return
    machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "torch": torch.__version__}
    print(f"machine: {machine}")
    document: dict[str, Any] = {"machine": machine, "load_average": os.getloadavg()}
    document["kinds"] = [measure(kind, arguments.rounds) for kind in arguments.kinds.split(",")]
    document["recompute_peak_bytes"] = memory_of_recompute()
    document["held_bytes"] = {kind: memory_against_degree(kind) for kind in ("shard", "tensor")}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
