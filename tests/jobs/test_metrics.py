"""Metrics against values worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shardwise.errors import JobError
from shardwise.metrics import accuracy, mean_absolute_error, mean_squared_error, token_accuracy, top_k

SCORES = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.4], [0.0, 0.1, 0.9]])


def numbers(pair: tuple[Tensor, Tensor]) -> tuple[float, float]:
    total, count = pair
    assert total.shape == count.shape == ()
    return total.item(), count.item()


def test_accuracy_counts_greatest_scores() -> None:
    assert numbers(accuracy(SCORES, torch.tensor([1, 2, 2]))) == (2, 3)
    assert numbers(accuracy(SCORES, torch.tensor([0, 1, 0]))) == (0, 3)


def test_accuracy_of_pixels_counts_every_pixel() -> None:
    scores = torch.zeros(2, 3, 4, 5)
    scores[:, 1] = 1.0
    target = torch.ones(2, 4, 5, dtype=torch.long)
    target[0, 0, 0] = 2
    assert numbers(accuracy(scores, target)) == (39, 40)


@pytest.mark.parametrize("target", [torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1, 0, 1, 0])])
def test_accuracy_of_one_score_uses_its_sign(target: Tensor) -> None:
    scores = torch.tensor([2.0, -0.5, -3.0, 0.1])
    assert numbers(accuracy(scores, target)) == (2, 4)
    assert numbers(accuracy(scores.unsqueeze(1), target)) == (2, 4)


def test_top_k() -> None:
    target = torch.tensor([2, 2, 0])
    assert numbers(top_k(1)(SCORES, target)) == (0, 3)
    assert numbers(top_k(2)(SCORES, target)) == (2, 3)
    assert numbers(top_k(9)(SCORES, target)) == (3, 3)


def test_token_accuracy_leaves_out_ignored_targets() -> None:
    scores = SCORES.unsqueeze(0)
    assert numbers(token_accuracy()(scores, torch.tensor([[1, 1, -100]]))) == (1, 2)
    assert numbers(token_accuracy(ignore_index=2)(scores, torch.tensor([[1, 0, 2]]))) == (2, 2)
    assert numbers(token_accuracy()(scores, torch.full((1, 3), -100))) == (0, 0)


def test_errors_are_means_over_elements() -> None:
    output, target = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0, 0.0], [0.0, 6.0]])
    assert numbers(mean_absolute_error(output, target)) == (6, 4)
    assert numbers(mean_squared_error(output, target)) == (14, 4)
    assert numbers(mean_absolute_error(output.bfloat16(), target)) == (6, 4)


def test_a_column_of_outputs_is_not_broadcast() -> None:
    assert numbers(mean_squared_error(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]))) == (4, 2)


def test_pairs_of_uneven_batches_add_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(15, 7, generator=generator)
    target = torch.randint(7, (15,), generator=generator)
    whole = numbers(accuracy(scores, target))
    parts = [numbers(accuracy(scores[i : i + 4], target[i : i + 4])) for i in range(0, 15, 4)]
    assert (sum(part[0] for part in parts), sum(part[1] for part in parts)) == whole
    assert 0 < whole[0] < 15


@pytest.mark.parametrize(
    ("metric", "output", "target"),
    [
        (accuracy, (4, 3), (5,)),
        (accuracy, (4, 3), (4, 3, 1)),
        (accuracy, (4,), (5,)),
        (top_k(2), (4, 3, 2), (4, 2)),
        (top_k(2), (4, 3), (5,)),
        (token_accuracy(), (2, 7, 5), (2, 6)),
        (mean_squared_error, (4, 2), (4,)),
        (mean_absolute_error, (4,), (5,)),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(
    metric: Callable[[Tensor, Tensor], object], output: tuple[int, ...], target: tuple[int, ...]
) -> None:
    with pytest.raises(JobError) as caught:
        metric(torch.zeros(output), torch.zeros(target, dtype=torch.long))
    assert str(output) in str(caught.value)


def test_top_0_is_refused() -> None:
    with pytest.raises(JobError, match=r"top_k\(0\)"):
        top_k(0)
