"""Metrics: `(output, target)` of one batch -> a `(sum, count)` pair of scalar tensors.

A pair, not a mean, so that the value over a whole split is exact whatever the batches are: sums add up and counts add
up, over batches and over workers, and the metric is the first divided by the second. Any function of this form, or one
that returns a mean over the samples, can stand in `Job.metrics`.

Shapes: N samples, ... any further dims, K classes. Both scalars are on the device of `output`; counts are int64.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shardwise.errors import JobError

Pair = tuple[Tensor, Tensor]


def accuracy(output: Tensor, target: Tensor) -> Pair:
    """How many predictions are the target.

    Args:
        output: scores (N, K) or (N, K, ...), the greatest along dim 1 is the prediction; or one score a sample, (N,) or
            (N, 1), whose sign decides between the targets 0 and 1, or -1 and 1.
        target: classes (N,) or (N, ...).

    Raises:
        JobError: shapes that do not belong together.
    """
    if output.dim() == target.dim() + 1 and output.shape[1] > 1:
        _check_classes("accuracy", output, target)
        return _pair(output.argmax(dim=1) == target)
    scores = output.squeeze(1) if output.dim() == target.dim() + 1 else output
    _check_same("accuracy", scores, target)
    return _pair((scores > 0) == (target > 0))


def top_k(k: int) -> Callable[[Tensor, Tensor], Pair]:
    """A metric that counts the samples whose target is among the `k` greatest scores.

    The metric takes scores (N, K) and classes (N,). With fewer than `k` classes every target counts.

    Raises:
        JobError: `k` below 1, or shapes that do not belong together.
    """
    if k < 1:
        raise JobError(f"top_k({k}): give a whole number of at least 1")

    def top_k_accuracy(output: Tensor, target: Tensor) -> Pair:
        if output.dim() != 2:
            raise JobError(f"top_k was given scores of shape {tuple(output.shape)}: it needs (samples, classes)")
        _check_classes("top_k", output, target)
        best = output.topk(min(k, output.shape[1]), dim=1).indices
        return _pair((best == target.unsqueeze(1)).any(dim=1))

    return top_k_accuracy


def token_accuracy(ignore_index: int = -100) -> Callable[[Tensor, Tensor], Pair]:
    """A metric that counts the tokens predicted right among those whose target is not `ignore_index`.

    The metric takes scores (..., K), the classes along the last dim as language models give them, and targets (...).
    Without a single target the count is 0.

    Raises:
        JobError: shapes that do not belong together.
    """

    def accuracy_of_tokens(output: Tensor, target: Tensor) -> Pair:
        if output.shape[:-1] != target.shape:
            raise JobError(
                f"token_accuracy was given scores {tuple(output.shape)} and targets {tuple(target.shape)}: "
                "it needs (..., classes) and (...)"
            )
        counted = target != ignore_index
        right = (output.argmax(dim=-1) == target) & counted
        return right.sum(), counted.sum()

    return accuracy_of_tokens


def mean_absolute_error(output: Tensor, target: Tensor) -> Pair:
    """|output - target|, a mean over all elements. Same shapes; (N, 1) and (N,) belong together too.

    Raises:
        JobError: shapes that differ.
    """
    return _errors("mean_absolute_error", output, target, torch.abs)


def mean_squared_error(output: Tensor, target: Tensor) -> Pair:
    """(output - target)^2, a mean over all elements. Same shapes; (N, 1) and (N,) belong together too.

    Raises:
        JobError: shapes that differ.
    """
    return _errors("mean_squared_error", output, target, torch.square)


def _errors(name: str, output: Tensor, target: Tensor, size: Callable[[Tensor], Tensor]) -> Pair:
    # (N, 1) - (N,) would silently broadcast to (N, N)
    if output.dim() == target.dim() + 1 and output.shape[-1] == 1:
        output = output.squeeze(-1)
    _check_same(name, output, target)
    wide = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    errors = size(output.to(wide) - target.to(wide))
    return errors.sum(), _count(errors)


def _pair(right: Tensor) -> Pair:
    return right.sum(), _count(right)


def _count(counted: Tensor) -> Tensor:
    return torch.tensor(counted.numel(), device=counted.device)


def _check_classes(name: str, output: Tensor, target: Tensor) -> None:
    if output.shape[:1] + output.shape[2:] != target.shape:
        raise JobError(
            f"{name} was given scores {tuple(output.shape)} and targets {tuple(target.shape)}: "
            "scores have the classes along dim 1, and otherwise the shape of the targets"
        )


def _check_same(name: str, output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape:
        raise JobError(
            f"{name} was given outputs {tuple(output.shape)} and targets {tuple(target.shape)}: shapes must be equal"
        )
