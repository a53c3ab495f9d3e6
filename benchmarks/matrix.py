"""The parity matrix: small models of many kinds under many layouts and settings, each proved or refused with its reason.

    python benchmarks/matrix.py --out docs/matrix.md     # some minutes on two cores

Each cell is judged as by `shardwise prove`: steps under the plan against float64, with serial float32 runs as the yardstick.
All cells of as many workers share their processes, which is why this is quicker than so many proofs.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.data.gather import Arrays
from shardwise.data.source import Splits
from shardwise.errors import UserError
from shardwise.nn import MoE, with_auxiliary_loss
from shardwise.prove.compare import Yardstick, compare, initial_differences
from shardwise.prove.execute import ORDERS, same_run
from shardwise.prove.guards import check_guards, sample_faults
from shardwise.prove.record import RankReport, Record, read_record
from shardwise.prove.runs import Fault, Task, take_record
from shardwise.run.assemble import check_job
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan

CPU = torch.device("cpu")
STEPS = 3


# The models. Activations are smooth, so that rounding tips nothing over.


class Mlp(nn.Sequential):
    """Sizes that nothing divides."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(7, 15), nn.Tanh(), nn.Linear(15, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 3))


class ConvNet(nn.Module):
    """BatchNorm and residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.stem(x)))
        x = F.silu(x + self.norm2(self.conv(x)))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class UNet(nn.Module):
    """Skip connections across everything; the output is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)])
        self.middle = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.up = nn.ModuleList([nn.ConvTranspose2d(6, 6, 2, stride=2), nn.ConvTranspose2d(12, 4, 2, stride=2)])
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.down[0](x))
        b = F.silu(self.down[1](a))
        c = F.silu(self.middle(b))
        c = torch.cat([self.up[0](c), b], 1)
        y: Tensor = self.head(torch.cat([self.up[1](c), a], 1))
        return y


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.pair = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        k, v = self.pair(memory).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(x), k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Self-attention, cross-attention if there is a memory, and an MLP or another inner part."""

    def __init__(self, width: int, *, causal: bool, cross: bool = False, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, 2, causal=causal)
        if cross:
            self.norm2, self.cross = nn.LayerNorm(width), Attention(width, 2, causal=False)
        self.norm3 = nn.LayerNorm(width)
        self.inner = inner or nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y)
        if memory is not None:
            x = x + self.cross(self.norm2(x), memory)
        out: Tensor = x + self.inner(self.norm3(x))
        return out


class Gpt(nn.Module):
    """Tied embedding and head; with `experts`, their mixture in place of the MLPs."""

    def __init__(self, *, experts: bool = False, vocabulary: int = 12, width: int = 8, length: int = 6) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        make = functools.partial(MoE, width, 12, 4, balance=0.1) if experts else (lambda: None)
        self.blocks = nn.ModuleList(Block(width, causal=True, inner=make()) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x))
        return y


class EncoderDecoder(nn.Module):
    """Cross-attention to the encoder's output in every block of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(11, 8), nn.Embedding(12, 8)
        self.encoder = nn.ModuleList([Block(8, causal=False)])
        self.decoder = nn.ModuleList([Block(8, causal=True, cross=True) for _ in range(2)])
        self.head = nn.Linear(8, 12)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.source(source)
        for block in self.encoder:
            memory = block(memory)
        x = self.target(target)
        for block in self.decoder:
            x = block(x, memory)
        y: Tensor = self.head(x)
        return y


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(12, 7), nn.LSTM(7, 9, num_layers=2, batch_first=True)
        self.head = nn.Linear(9, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.lstm(self.embed(tokens))[0])
        return y


class Recommender(nn.Module):
    """Bags of items as sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(29, 6, sparse=True, mode="sum")
        self.hidden, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, items: Tensor) -> Tensor:
        y: Tensor = self.head(F.gelu(self.hidden(self.bag(items))))
        return y


class Towers(nn.Module):
    """Two encoders, compared over all pairs of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
        self.right = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.left(x), dim=1), F.normalize(self.right(x.flip(1)), dim=1)


def contrastive(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
    left, right = output
    return F.cross_entropy(5 * left @ right.T, torch.arange(len(left)))


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def _data(kind: str) -> Splits:
    """31 samples: two batches of 13 and one of 5."""
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 11, (31, 6), generator=g)
    classes = torch.randint(0, 3, (31,), generator=g)
    inputs: dict[str, tuple[Any, Any]] = {
        "vectors": (torch.randn(31, 7, generator=g), classes),
        "images": (torch.randn(31, 3, 8, 8, generator=g), classes),
        "pairs": (torch.randn(31, 3, 8, 8, generator=g), torch.randn(31, 3, 8, 8, generator=g)),
        "texts": (tokens, tokens.roll(-1, 1)),
        "translations": ((tokens, tokens.roll(1, 1)), tokens),
        "bags": (torch.randint(0, 29, (31, 4), generator=g), classes),
    }
    return Splits(Arrays(inputs[kind]))


MODELS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[Any, Any], Tensor]]] = {
    "MLP of awkward sizes": (Mlp, "vectors", F.cross_entropy),
    "conv net, BatchNorm, residuals": (ConvNet, "images", F.cross_entropy),
    "U-Net": (UNet, "pairs", F.mse_loss),
    "GPT, tied embedding": (Gpt, "texts", token_loss),
    "encoder-decoder": (EncoderDecoder, "translations", token_loss),
    "LSTM": (Lstm, "texts", token_loss),
    "mixture of experts": (functools.partial(Gpt, experts=True), "texts", token_loss),
    "recommender, sparse gradients": (Recommender, "bags", F.cross_entropy),
    "two towers, coupled loss": (Towers, "vectors", contrastive),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipping": {"clip_norm": 0.1},
    "accumulation": {"micro_batch": 2},
    "recompute": {},  # of the plan
}
"""What is varied; every run's last step is on the short batch that ends the epoch."""

LAYOUTS = (
    *("data=2", "shard=2", "tensor=2", "pipeline=2", "context=2", "expert=2"),
    *("data=2,shard=2", "data=2,tensor=2", "shard=2,tensor=2", "data=2,pipeline=2", "shard=2,pipeline=2"),
    *("tensor=2,pipeline=2", "data=2,context=2", "shard=2,context=2", "data=2,expert=2", "shard=2,expert=2"),
)


def make_job(model: str, settings: Sequence[str]) -> Job:
    build, data, loss = MODELS[model]
    values: dict[str, Any] = {}
    for name in settings:
        values |= SETTINGS[name]
    values |= {"objective": with_auxiliary_loss(loss)} if "experts" in model else {"loss": loss}
    if "sparse" in model:
        optimizer: Callable[[Any], Any] = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    else:
        optimizer = lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3)  # noqa: E731
    return Job(name=model, model=build, data=_data(data), optimizer=optimizer, batch_size=13, epochs=1, **values)


@dataclass(frozen=True)
class Cell:
    """One model under one layout with some settings."""

    model: str
    layout: str
    settings: tuple[str, ...]

    @property
    def job(self) -> Job:
        return make_job(self.model, self.settings)

    @property
    def plan(self) -> Plan:
        recompute = "full" if "recompute" in self.settings else "none"
        return Plan.from_dict({
            "layout": self.layout, "recompute": recompute, "micro_batch": self.job.micro_batch, "threads": 1,
        })  # fmt: skip

    def task(self, folder: Path, plan: Plan | None = None, **changes: Any) -> Task:
        folder.mkdir(parents=True, exist_ok=True)
        job = self.job
        return Task(
            job=job, splits=job.data, reference=None, plan=plan or self.plan, steps=STEPS, device="cpu", folder=str(folder),
            **changes,
        )  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What became of a cell: `proved`, `refused` or `wrong`, and why."""

    cell: Cell
    outcome: str
    reason: str = ""


def refusal(cell: Cell) -> str | None:
    """Why the cell is refused before anything starts; None where it is not."""
    try:
        with torch.random.fork_rng(devices=[]):
            check_job(cell.job, cell.plan)
    except UserError as error:
        return str(error)
    return None


def judge(cells: Sequence[Cell]) -> Iterator[Result]:
    """Prove or refuse every cell."""
    reasons = {cell: refusal(cell) for cell in cells}
    for cell, reason in reasons.items():
        if reason is not None:
            yield Result(cell, "refused", reason)
    yield from prove_cells([cell for cell, reason in reasons.items() if reason is None])


def prove_cells(cells: Sequence[Cell], fault: Fault | None = None) -> Iterator[Result]:
    """Prove cells that are not refused; those with the same number of workers in the same processes."""
    yardsticks: dict[tuple[str, bool], Yardstick] = {}
    for workers in sorted({cell.plan.layout.workers for cell in cells}):
        group = [cell for cell in cells if cell.plan.layout.workers == workers]
        with tempfile.TemporaryDirectory(prefix="matrix-") as place:
            for cell, answer in zip(group, _run(workers, group, place, fault), strict=True):
                key = (cell.model, "clipping" in cell.settings)
                if key not in yardsticks:
                    yardsticks[key] = _yardstick(cell, Path(place) / "serial")
                yield _compared(cell, answer, yardsticks[key])


def _yardstick(cell: Cell, place: Path) -> Yardstick:
    serial = Plan(threads=1)
    tasks = [cell.task(place / "exact", serial, double=True), cell.task(place / "first", serial)]
    tasks += [cell.task(place / f"order {order}", serial, order=order) for order in ORDERS]
    tasks.append(cell.task(place / "pieces", replace(serial, micro_batch=7)))
    records = []
    for task in tasks:
        try:
            if task.plan.micro_batch is not None:
                check_job(task.job or cell.job, task.plan)
            records.append(read_record(Path(task.folder), take_record(task, CPU)))
        except UserError:  # the model must see its batch whole
            continue
        finally:
            torch.set_default_dtype(torch.float32)
    exact, first, *others = records
    return Yardstick(exact, [first, *(other for other in others if same_run(other, first))])


def _compared(cell: Cell, answer: tuple[Path, list[RankReport]], yardstick: Yardstick) -> Result:
    candidate: Record = read_record(*answer)
    layout = cell.plan.layout
    faults = sample_faults(candidate, yardstick.serial[0], layout)
    wrong = [str(item) for item in compare(candidate, yardstick) if not item.passed]
    wrong += [
        f"other start: {name}"
        for _, name in initial_differences(candidate, yardstick.serial[0], yardstick.exact.aliases)
    ]
    wrong += [guard.text for guard in check_guards(candidate, yardstick, layout, faults) if not guard.passed]
    return Result(cell, "wrong", wrong[0]) if wrong else Result(cell, "proved")


# The processes


def _run(workers: int, cells: Sequence[Cell], place: str, fault: Fault | None) -> list[tuple[Path, list[RankReport]]]:
    """Records of all cells, from one set of processes."""
    context = multiprocessing.get_context("fork")
    queue: SimpleQueue[Any] = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank_main, args=(rank, workers, cells, place, fault, queue), daemon=True)
        for rank in range(workers)
    ]
    for process in ranks:
        process.start()
    try:
        answers = queue.get()
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    if isinstance(answers, str):
        raise RuntimeError(answers)
    return list(answers)


def _rank_main(
    rank: int, workers: int, cells: Sequence[Cell], place: str, fault: Fault | None, queue: SimpleQueue[Any]
) -> None:
    torch.set_num_threads(1)
    c10d.init_process_group("gloo", init_method=f"file://{place}/store-{workers}", rank=rank, world_size=workers)
    answers = []
    for index, cell in enumerate(cells):
        folder = Path(place) / f"{workers}-{index}"
        try:
            answers.append((folder, take_record(cell.task(folder, fault=fault), CPU)))
        except BaseException as error:
            queue.put(f"{cell} failed on rank {rank}: {type(error).__name__}: {error}")
            raise
    if rank == 0:
        queue.put(answers)


# The table


def cells_of(models: Sequence[str], layouts: Sequence[str], settings: Sequence[tuple[str, ...]]) -> list[Cell]:
    return [Cell(model, layout, names) for model in models for layout in layouts for names in settings]


MARKS = {"plain": "", "clipping": "c", "accumulation": "a", "recompute": "r"}


def table(results: Sequence[Result]) -> str:
    """Markdown: rows are layouts, columns are models; below it the reasons of what is refused."""
    found = {(result.cell.model, result.cell.layout, result.cell.settings[0]): result for result in results}
    models, layouts = (
        list(dict.fromkeys(getattr(result.cell, name) for result in results)) for name in ("model", "layout")
    )
    notes: dict[str, int] = {}
    lines = ["| layout | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    for layout in layouts:
        row = []
        for model in models:
            each = {name: found[model, layout, name] for name in SETTINGS}
            row.append(_entry(each, notes))
        lines.append(f"| `{layout}` | " + " | ".join(row) + " |")
    lines += ["", *(f"{number}. {reason}" for reason, number in notes.items())]
    return "\n".join(lines) + "\n"


def _entry(each: dict[str, Result], notes: dict[str, int]) -> str:
    """`proved`, and what of it is not."""
    refused: dict[int, list[str]] = {}
    for name, result in each.items():
        if result.outcome == "wrong":
            return f"**WRONG** with {name}"
        if result.outcome == "refused":
            number = notes.setdefault(_reason(result), len(notes) + 1)
            refused.setdefault(number, []).append(name)
    if not refused:
        return "proved"
    if len(refused) == 1 and len(next(iter(refused.values()))) == len(each):
        return f"refused ({next(iter(refused))})"
    if "plain" in next(iter(refused.values())):
        return "refused (" + ", ".join(map(str, refused)) + ")"
    return "proved; " + ", ".join(f"not with {' and '.join(names)} ({number})" for number, names in refused.items())


def _reason(result: Result) -> str:
    """The reason without what is peculiar to the layout, so that one note serves all."""
    text = result.reason.replace(f"plan {result.cell.plan.layout}", "plan")
    return " ".join(text.split())


HEAD = """# Which models under which layouts

Made by `python benchmarks/matrix.py --out docs/matrix.md`, which takes some minutes. Each model is trained 3 steps (of 13, 13
and 5 samples) under each layout: plainly, with clipping by the global norm, with accumulation (`micro_batch=2`) and with
recompute. *Proved* means what [`shardwise prove`](proof.md) means by it, for all four unless it says otherwise. *Refused* means
an error before a worker starts, with the reason below. The models are in `benchmarks/matrix.py`. The tests prove again, with all
settings at once, the layouts of one axis for all models and those of two axes for some.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the table there instead of printing it")
    parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="NAME")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), metavar="LAYOUT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    results = list(judge(cells_of(options.models, options.layouts, [(name,) for name in SETTINGS])))
    order = {
        cell: place for place, cell in enumerate(cells_of(options.models, options.layouts, [(n,) for n in SETTINGS]))
    }
    text = HEAD + table(sorted(results, key=lambda result: order[result.cell]))
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    counts = {kind: sum(result.outcome == kind for result in results) for kind in ("proved", "refused", "wrong")}
    print(f"{counts} in {time.perf_counter() - began:.0f} s")
    for result in results:
        if result.outcome == "wrong":
            print(f"WRONG {result.cell}: {result.reason}")


if __name__ == "__main__":
    main()
