"""Tensor parallelism under proof: it is proved with every other axis, and what is planted in it is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from shardwise.dist.split import is_dtensor, local_part
from shardwise.errors import PlanError
from shardwise.parallel import clip
from shardwise.parallel.tensor import products
from shardwise.parallel.tensor.ring import Ring
from shardwise.prove.matrix import prove_all
from shardwise.prove.proof import prove
from shardwise.run import loop
from shardwise.run.assemble import Assembly
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.spec.verdict import Verdict

Jobs = Callable[..., Job]


@pytest.mark.parametrize(
    ("kind", "layout", "changes"),
    [
        ("mlp", "tensor=2", {"micro_batch": 3}),
        ("conv", "data=2,tensor=2", {"clip_norm": 0.1}),
        ("gpt", "tensor=2", {"micro_batch": 4}),
        ("gpt", "data=2,tensor=2", {"clip_norm": 0.1}),
        ("gpt", "shard=2,tensor=2", {"clip_norm": 0.1, "micro_batch": 4}),
    ],
)
def test_proved(job: Jobs, kind: str, layout: str, changes: dict[str, Any]) -> None:
    verdict = prove(job(kind, **changes), layout)
    assert verdict.proved, verdict
    assert any(guard.name == "parameters split" for guard in verdict.guards)


def test_a_rule_of_the_plan_is_followed(job: Jobs) -> None:
    """With everything left whole, nothing is split, and that is refused before a worker starts."""
    rules = {"inner": "column", "head": "replicate"}
    verdict = prove(job("mlp"), Plan(layout=Layout(tensor=2), tensor_rules=rules))
    assert verdict.proved, verdict
    with pytest.raises(PlanError, match=r"nothing in this model can be split.*inner \(Linear\): as its rule says"):
        prove(job("mlp"), Plan(layout=Layout(tensor=2), tensor_rules={"inner": "replicate", "head": "replicate"}))
    with pytest.raises(PlanError, match="tensor_rules belong to a tensor axis"):
        prove(job("mlp"), Plan(layout=Layout(data=2), tensor_rules=rules))


def test_the_matrix_has_tensor(job: Jobs) -> None:
    """A model in which nothing can be split is refused, with the names of what was looked at."""
    cells = {cell.layout: cell for cell in prove_all(job("towers"), 2).cells}
    assert cells["serial"].result == "proved"
    assert cells["tensor=2"].result == "refused"
    assert "Looked at left (Linear)" in cells["tensor=2"].reason
    assert {cell.layout: cell.result for cell in prove_all(job("mlp"), 2).cells}["tensor=2"] == "proved"


def no_sum(a: Assembly) -> None:
    """Every rank takes its own summand of a row layer for the sum."""
    ring: Any = Ring
    ring.add = lambda self, values: values[0].clone()


def no_sum_backwards(a: Assembly) -> None:
    """The gradient of a whole tensor that met pieces is not summed."""
    ring: Any = Ring
    ring.enter = lambda self, whole: (whole,)


def bias_everywhere(a: Assembly) -> None:
    """A row layer adds its bias on every rank, before the sum."""
    module: Any = products
    module._plus = lambda result, bias: result if bias is None else result + 2 * bias


def other_piece(a: Assembly) -> None:
    """Rank 1 holds the piece of rank 0."""
    for parameter in a.model.parameters():
        if is_dtensor(parameter) and a.world.rank == 1:
            with torch.no_grad():
                local_part(parameter).add_(1e-3)


def own_norm(a: Assembly) -> None:
    """Every rank clips by the norm of its own pieces."""
    module: Any = clip
    module._split_over = lambda gradient: []


def other_samples(a: Assembly) -> None:
    """The ranks of the tensor axis read different samples, in an order of their own."""
    module = vars(loop)
    batches = module["batches"]
    module["batches"] = lambda *given, **options: batches(*given, **{**options, "seed": options["seed"] + a.world.rank})


def scaled_pieces(a: Assembly) -> None:
    """Gradients of pieces are averaged over the ranks, though each has another piece."""
    finish = a.composed.gradients.finish

    def finished(**options: Any) -> None:
        finish(**options)
        for parameter in a.model.parameters():
            if is_dtensor(parameter) and parameter.grad is not None:
                local_part(parameter.grad).mul_(0.5)

    cast(Any, a.composed.gradients).finish = finished


FAULTS: Sequence[tuple[Callable[[Assembly], None], str, str]] = [
    (no_sum, "", ""),
    (no_sum_backwards, "missing reduction", "missing reduction over tensor"),
    (bias_everywhere, "", ""),
    (other_piece, "other start", "does not start with the values of a serial run"),
    (own_norm, "", "clipped"),
    (other_samples, "wrong samples", "rank 1 trained at step 1"),
    (scaled_pieces, "scaled gradients", "one over the degree of tensor"),
]


@pytest.mark.parametrize(("fault", "pattern", "words"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_each_fault_is_found(job: Jobs, fault: Callable[[Assembly], None], pattern: str, words: str) -> None:
    verdict: Verdict = prove(job("gpt", clip_norm=0.1), "tensor=2", fault=fault)
    assert verdict.outcome == "refuted", verdict
    messages = "; ".join(f"{finding.pattern}: {finding.message}" for finding in verdict.findings)
    assert pattern in messages, verdict
    assert words in messages, verdict
    assert any("tensor" in finding.axes for finding in verdict.findings), verdict
    print(messages)


def test_the_loss_is_that_of_whole_logits(job: Jobs) -> None:
    """The reported losses come from logits in pieces."""
    from shardwise.parallel.tensor import loss

    def wrong(a: Assembly) -> None:
        module: Any = loss
        place = module._place

        def other(target: Tensor, cut: Any, rank: int) -> tuple[Tensor, Tensor]:
            index, absent = place(target, cut, rank)
            return index, torch.zeros_like(absent)

        module._place = other

    verdict = prove(job("gpt"), "tensor=2", fault=wrong)
    assert verdict.outcome == "refuted", verdict


def test_the_matrix_follows_the_plan_file(job: Jobs) -> None:
    """Rules count where there is a tensor axis and cuts where there is a pipeline; elsewhere they are no reason to refuse."""
    rules = {"inner": "replicate", "head": "replicate"}
    cells = {c.layout: c for c in prove_all(job("mlp"), 2, plan=Plan(tensor_rules=rules, cuts=("head",))).cells}
    assert cells["tensor=2"].result == "refused" and "as its rule says" in cells["tensor=2"].reason
    assert [cells[layout].result for layout in ("serial", "data=2", "shard=2", "pipeline=2")] == ["proved"] * 4
    cells = {c.layout: c for c in prove_all(job("mlp"), 2, plan=Plan(cuts=("nowhere",), build="deferred")).cells}
    assert cells["pipeline=2"].result == "refused" and "nowhere" in cells["pipeline=2"].reason
    verdicts = {layout: cells[layout].verdict for layout in ("data=2", "shard=2")}
    built = {layout: verdict is not None and "build=deferred" in verdict.plan for layout, verdict in verdicts.items()}
    assert built == {"data=2": False, "shard=2": True}
