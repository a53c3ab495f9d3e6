"""Loss and metrics of the test split are compared too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.data.gather import Arrays
from shardwise.data.source import Splits
from shardwise.metrics import accuracy
from shardwise.prove.proof import prove
from shardwise.run import evaluate
from shardwise.run.assemble import Assembly
from shardwise.spec.job import Job

Jobs = Callable[..., Job]

ROWS = torch.randn(31, 7, generator=torch.Generator().manual_seed(2))
DATA = Splits(Arrays((ROWS, ROWS[:, :3].argmax(1))), Arrays((ROWS.flip(0), ROWS.flip(0)[:, :3].argmax(1))))


def _job(job: Jobs, **changes: Any) -> Job:
    values = {"data": DATA, "loss": nn.functional.cross_entropy, "metrics": {"accuracy": accuracy}, **changes}
    return job("mlp", **values)


def spread(output: Tensor, target: Tensor) -> Tensor:
    """No mean over samples."""
    return output.std()


def by_ranks(a: Assembly) -> None:
    """Every worker's mean counts as much, however many samples it has."""
    pair: Any = vars(evaluate)["as_pair"]
    vars(evaluate)["as_pair"] = lambda value, count, name: pair(value, 1, name)


def reads_all(a: Assembly) -> None:
    """Every worker looks at the share of rank 0."""
    batches = vars(evaluate)["eval_batches"]
    vars(evaluate)["eval_batches"] = lambda *given, **options: batches(*given, **{**options, "rank": 0})


@pytest.mark.parametrize("plan", ["data=2", "shard=2", "pipeline=2"])
def test_evaluations_are_compared(job: Jobs, plan: str) -> None:
    verdict = prove(_job(job), plan)
    assert verdict.proved and verdict.compared["metric"] == 3, verdict


@pytest.mark.parametrize("fault", [by_ranks, reads_all])
def test_a_wrong_evaluation_is_refuted(job: Jobs, fault: Callable[[Assembly], None]) -> None:
    verdict = prove(_job(job), "data=2", fault=fault)
    assert verdict.outcome == "refuted", verdict
    assert verdict.findings[0].pattern == "wrong evaluation"
    assert {item.kind for item in verdict.failed} == {"metric"}


def test_metrics_that_are_no_means_are_said(job: Jobs) -> None:
    verdict = prove(_job(job, metrics={"spread": spread}), "data=2")
    assert verdict.proved and verdict.compared["metric"] == 2, verdict
    assert any(text.startswith("spread: over parts of a batch") for text in verdict.not_covered)


def flips(a: Assembly) -> None:
    """As rounding might in float32 alone."""
    original: Any = a.job.metrics["accuracy"]

    def metric(output: Tensor, target: Tensor) -> Any:
        right, count = original(output, target)
        return right + int(a.world.rank == 1 and output.dtype == torch.float32), count

    vars(a)["job"] = replace(a.job, metrics={"accuracy": metric})


def test_an_answer_that_rounding_tips_is_no_mistake(job: Jobs) -> None:
    verdict = prove(_job(job), "data=2", fault=flips)
    assert verdict.proved, verdict
    assert any("rounding moved a sample" in note for note in verdict.notes)


class Reader(nn.Module):
    """Its embedding is split by the words."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(13, 8)
        self.inner = nn.Linear(8, 24)
        self.outer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        query, key, value = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.inner(x).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return torch.as_tensor(self.head(x + self.outer(seen.transpose(1, 2).flatten(2))))


def of_tokens(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def test_pieces_of_weights_without_gradients_are_no_inputs(job: Jobs) -> None:
    """What is known of a whole sequence beforehand is computed apart, and a split embedding is not known."""
    texts = torch.randint(0, 13, (19, 9), generator=torch.Generator().manual_seed(3))
    pairs = (texts[:, :-1].clone(), texts[:, 1:].clone())
    own = _job(job, model=Reader, data=Splits(Arrays(pairs), Arrays(pairs)), loss=of_tokens, metrics={})
    verdict = prove(own, "context=2,tensor=2")
    assert verdict.proved and verdict.compared["metric"] == 2, verdict


ONES = torch.ones(3)


def by_dtype(output: Tensor, target: Tensor) -> Tensor:
    return (output @ ONES).mean()


def test_a_metric_that_is_for_float32_alone(job: Jobs) -> None:
    verdict = prove(_job(job, metrics={"own": by_dtype}), "data=2")
    assert verdict.proved and "metric" not in verdict.compared
    assert any(text.startswith("the evaluation, which fails in float64") for text in verdict.not_covered), verdict
