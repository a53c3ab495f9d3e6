"""Patterns of models that libraries ship, in a few lines of plain torch: a cache of keys and values that starts empty,
activations computed again with and without reentrance, casts to float32 inside, padding masks made from positions, tied
embeddings, a loss of their own that shifts its labels, products of experts, blocks that return views, outputs in a dataclass.

`docs/zoo.md` tells which real models were tried; here are the reasons why they run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import shardwise
import shardwise.parallel.pipeline.stages
import shardwise.parallel.shard
import shardwise.run.dcp  # once, before ranks are forked
from shardwise.data.source import Samples, Splits, as_splits
from shardwise.errors import PlanError
from shardwise.parallel.grouped import GROUPED, in_parts, in_shape
from shardwise.run.assemble import check_job
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

ROOT = Path(__file__).parents[2]
VOCABULARY, TOKENS, WIDTH, HEADS, SAMPLES = 23, 12, 16, 4, 31
IGNORED = -100


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Norm(nn.Module):
    """Computes in float32, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        z: Tensor = self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return z


class Mixture(nn.Module):
    """Experts whose products are one call."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2, bias=False)
        self.matrices = nn.Parameter(torch.randn(2, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        weights = self.gate(rows).softmax(-1)
        chosen = torch.arange(len(rows)) % 2
        order = chosen.argsort(stable=True)
        ends = torch.bincount(chosen, minlength=2).cumsum(0).to(torch.int32)
        found = F.grouped_mm(rows[order], self.matrices, offs=ends)
        answers = torch.zeros_like(found).index_copy(0, order, found)
        mixed: Tensor = (answers * weights.gather(1, chosen[:, None])).view(x.shape)
        return mixed


class Block(nn.Module):
    def __init__(self, mixture: bool) -> None:
        super().__init__()
        self.norm, self.norm2 = Norm(), Norm()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)
        self.inner = Mixture() if mixture else nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).view(*x.shape[:2], -1, WIDTH // HEADS).transpose(1, 2) for part in (self.q, self.k, self.v))
        cached = torch.tensor([], dtype=k.dtype)
        k, v = torch.cat([cached, k], -2), torch.cat([cached, v], -2)
        answer = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + self.o(answer.transpose(1, 2).reshape(x.shape))
        x = x + self.inner(self.norm2(x))
        return x.view(x.shape)


class Decoder(nn.Module):
    """A language model as libraries have it."""

    def __init__(self, reentrant: bool | None, mixture: bool = False) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(TOKENS + 4, WIDTH)
        self.blocks = nn.ModuleList([Block(mixture) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Output:
        tokens = input_ids.shape[1]
        place = torch.arange(tokens)
        sample = torch.arange(len(input_ids))[:, None, None, None]
        real = attention_mask.to(torch.bool)
        mask = (place[None, :] <= place[:, None])[None, None] & real[sample, place[None, None, None, :]]
        x = self.embed(input_ids) + self.places(attention_mask.cumsum(-1) - 1 + 2)
        for block in self.blocks:
            x = block(x, mask) if self.reentrant is None else checkpoint(block, x, mask, use_reentrant=self.reentrant)
        logits = self.head(x)
        shifted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        loss = F.cross_entropy(
            logits.float().view(-1, VOCABULARY), shifted.reshape(-1), ignore_index=IGNORED, reduction="sum"
        )
        return Output(loss, logits)


def objective(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    inputs, _ = batch
    return model(**inputs).loss, (inputs["labels"][:, 1:] != IGNORED).sum()


def decoder_job(name: str, settings: Any = ()) -> Job:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (SAMPLES, TOKENS), generator=generator)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (SAMPLES,), generator=generator)
    real = torch.arange(TOKENS) < lengths[:, None]
    columns = {"input_ids": ids * real, "attention_mask": real.long(), "labels": torch.where(real, ids, IGNORED)}
    reentrant = {"reentrant": True, "again": False}.get(name)
    return Job(
        model=lambda: Decoder(reentrant, mixture=name == "mixture"),
        data=_splits(columns),
        objective=objective,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        batch_size=13,
        steps=3,
        clip_norm=0.5,
    )


def _splits(columns: dict[str, Tensor]) -> Any:
    samples: Any = [{key: value[row] for key, value in columns.items()} for row in range(SAMPLES)]
    return as_splits(Samples(samples))


@pytest.fixture(scope="module")
def matrix() -> Iterator[Any]:
    """The script that proves models under layouts, with the models of this file."""
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "benchmarks" / "matrix.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matrix", module)  # dataclasses look themselves up
        patch.syspath_prepend(ROOT / "benchmarks")
        spec.loader.exec_module(module)
        patch.setattr(module, "make_job", decoder_job)
        yield module


LAYOUTS = {
    "plain": ("shard=2", "tensor=2", "pipeline=2", "context=2"),
    "again": ("tensor=2", "pipeline=2", "context=2"),
    "reentrant": ("shard=2", "pipeline=2"),
    "mixture": ("data=2", "pipeline=2"),
}


def test_a_model_as_libraries_have_it(matrix: Any) -> None:
    cells = [matrix.Cell(name, layout, ("clipping",)) for name, layouts in LAYOUTS.items() for layout in layouts]
    assert [matrix.refusal(cell) for cell in cells] == [None] * len(cells)
    results = list(matrix.prove_cells(cells))
    assert [result for result in results if result.outcome != "proved"] == []
    assert len(results) == sum(map(len, LAYOUTS.values()))


def test_an_evaluation_on_parts_of_sequences_is_that_of_the_whole(tmp_path: Path) -> None:
    job = decoder_job("plain")
    job = replace(job, data=Splits(job.data.train, job.data.train), steps=2)
    serial, parts = (
        shardwise.train(job, plan=plan, out=str(tmp_path / plan), progress=False) for plan in ("serial", "context=2")
    )
    assert parts.history == pytest.approx(serial.history, rel=1e-5)
    assert parts.metrics["loss"] == pytest.approx(serial.metrics["loss"], rel=1e-5)


def test_grouped_products() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 16, generator=generator), torch.randn(3, 16, 24, generator=generator)
    offs = torch.tensor([3, 3, 8], dtype=torch.int32)
    expected = GROUPED(a, b, offs=offs)
    torch.testing.assert_close(in_parts(a, b, offs), expected)
    assert in_parts(a.double(), b.double(), offs).dtype == torch.float64
    assert in_shape(a, b, offs).shape == expected.shape
    batched = torch.randn(3, 8, 16, generator=generator)
    torch.testing.assert_close(in_parts(batched, b), GROUPED(batched, b))


class Adafactor(torch.optim.SGD):
    """As other libraries call theirs; theirs fail on parts as torch's does."""


def small_job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "model": lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
        "data": (torch.randn(8, 4), torch.randn(8, 2)),
        "loss": F.mse_loss,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "batch_size": 8,
        "epochs": 1,
    }
    return Job(**{**values, **changes})


class TwoTypes(nn.Module):
    """Trained parameters of two types in one block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(4, 2), nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.inner(x) * self.scale
        return scaled.float()


def test_what_cannot_be_split_is_refused_before_a_worker_starts() -> None:
    shard = Plan(layout=Layout(shard=2))
    for optimizer in (torch.optim.Adafactor, torch.optim.Rprop, Adafactor):
        job = small_job(optimizer=lambda parameters, kind=optimizer: kind(parameters, lr=0.1))
        with pytest.raises(PlanError, match=r"(Adafactor|Rprop) cannot step on parameters .* by the shard axis"):
            check_job(job, shard)
        check_job(job, Plan(layout=Layout(data=2)))
    job = small_job(model=TwoTypes)
    with pytest.raises(PlanError, match="trained parameters of types float32 and float64"):
        check_job(job, shard)
    check_job(job, Plan(layout=Layout(data=2)))
    check_job(small_job(), shard)


class Stacked(nn.Module):
    """Experts as transformers has them: two stacked parameters, tokens and the router's answer as arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 2 * 6, WIDTH) / 4)
        self.down_proj = nn.Parameter(torch.randn(4, WIDTH, 6) / 4)
        self.act_fn = F.silu

    def forward(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        answer = torch.zeros_like(tokens)
        for each in range(4):
            row, choice = (experts == each).nonzero(as_tuple=True)
            gate, up = F.linear(tokens[row], self.gate_up_proj[each]).chunk(2, dim=-1)
            found = F.linear(self.act_fn(gate) * up, self.down_proj[each]) * weights[row, choice, None]
            answer = answer.index_add(0, row, found)
        return answer


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 2)
        self.experts = Stacked()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x)
        weights, experts = self.router(tokens).softmax(-1).topk(2)
        answer: Tensor = self.last(tokens + self.experts(tokens, experts, weights))
        return answer


def test_experts_of_a_library_are_dealt_out_as_the_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "zoo.md").read_text()
    (code,) = [block for block in page.split("```python\n")[1:] if "def spread_experts" in block]
    recipe: dict[str, Any] = {}
    exec(code.split("```")[0], recipe)
    generator = torch.Generator().manual_seed(5)
    data = (torch.randn(23, 4, generator=generator), torch.randn(23, 2, generator=generator))
    plain = small_job(model=Routed, data=data)
    serial = shardwise.train(plain, plan="serial", out=tmp_path / "serial", progress=False)
    spread = replace(plain, model=lambda: recipe["spread_experts"](Routed()))
    for plan in ("serial", "expert=2", "pipeline=2,expert=2"):
        run = shardwise.train(spread, plan=plan, out=tmp_path / "runs" / plan, progress=False)
        torch.testing.assert_close(run.history, serial.history, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(run.model.state_dict(), serial.model.state_dict(), rtol=1e-4, atol=1e-6)
    with pytest.raises(PlanError, match=r"no experts to split .*experts.gate_up_proj \(4, 12, 16\)"):
        check_job(plain, Plan(layout=Layout(expert=2)))
