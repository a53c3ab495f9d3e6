"""What a loss is a mean over, and whether it is one: looked at again while the training runs.

Before a run starts, four samples show whether a loss couples samples (`coupled.py`). A target that is to be ignored, or a
class with another weight, may come later, and large models and streams are not tried out at all. So the first steps, and some
of those that follow, compare the loss of a few samples with the losses of each of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import isfinite, isnan
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.data.batch import Batch, tree_leaves, tree_map
from shardwise.errors import JobError
from shardwise.run.outputs import map_output, tensors_of
from shardwise.spec.job import Job

if TYPE_CHECKING:
    Weight = Callable[[Any], Tensor | float]

IGNORED = -100
"""What torch's losses over classes ignore if nobody says otherwise."""

FIRST_STEPS = 16
"""Every step is looked at up to this one, then one in `THEN_EVERY`. Chosen: a look costs about as much as `SAMPLES` losses."""

THEN_EVERY = 64
SAMPLES = 16
LARGEST_BYTES = 1 << 24
"""Of outputs that are copied for a look: fewer samples of a language model, and none where two of them are larger."""

TOLERANCE, CLOSE = 1e-3, 1e-6
"""Relative differences that are no rounding, in the loss's own type and in float64, which has the last word."""


def weight_function(job: Job) -> Weight | None:
    """The job's own `weight`, or that of a loss of torch that divides by more than the number of samples.

    `CrossEntropyLoss` and `NLLLoss` divide by the summed weights of the classes, without the targets that they ignore. That
    costs a message in each step, so targets of -100 count only for those who say so, with `ignore_index` or `weight`.
    """
    loss = job.loss
    if job.weight is not None or type(loss) not in (nn.CrossEntropyLoss, nn.NLLLoss):
        return job.weight
    assert isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)
    if loss.reduction != "mean" or (loss.weight is None and loss.ignore_index == IGNORED):
        return None
    classes, ignored = loss.weight, loss.ignore_index

    def weight(target: Tensor) -> Tensor | float:
        if target.is_floating_point():  # probabilities of the classes: a mean over the samples
            return float(target.shape[0])
        kept = target[target != ignored]
        return float(kept.numel()) if classes is None else torch.sum(classes.to(kept.device)[kept].double())

    return weight


def is_looked_at(step: int) -> bool:
    """Whether the losses of this step are looked at."""
    return step < FIRST_STEPS or step % THEN_EVERY == 0


def check_mean(job: Job, output: Any, part: Batch, step: int) -> None:
    """Compare the loss of some samples with the weighted mean of their own losses.

    Says nothing where it cannot know: a loss that draws random numbers, fails on one sample, or is not finite.

    Args:
        output: of the model for this part; left as it is.
        part: samples of this rank.
        step: for the message, from 0.

    Raises:
        JobError: they are not equal, so this loss cannot be put together from parts of a batch.
    """
    count = min(part.count, SAMPLES)
    leaves = [leaf for leaf in tensors_of(output) if leaf.dim()]
    rows = [leaf for leaf in (*leaves, *tree_leaves(part.targets)) if leaf.dim()]
    if part.phantom or not leaves or any(leaf.shape[0] != part.count for leaf in rows):
        return
    each = sum(leaf[0].numel() * leaf.element_size() for leaf in leaves)
    count = min(count, LARGEST_BYTES // max(1, each))
    if count < 2:
        return
    apart: _Apart | None = None
    devices = sorted({leaf.device for leaf in leaves if leaf.device.type != "cpu"}, key=str)
    kinds = {device.type for device in devices}
    with torch.random.fork_rng(devices=devices, device_type=kinds.pop() if kinds else "cuda"), torch.no_grad():
        try:
            apart = _apart(job, output, part, count, double=False, tolerance=TOLERANCE)
            if apart is None or _apart(job, output, part, count, double=False, tolerance=TOLERANCE) != apart:
                return
            with torch.autocast(leaves[0].device.type, enabled=False):
                apart = _apart(job, output, part, count, double=True, tolerance=CLOSE)
        except JobError:
            raise
        except Exception:  # noqa: BLE001  # such as a loss in float32 alone: what was found in its own type stands
            if apart is None:
                return
    if apart is not None:
        raise JobError(
            f"step {step + 1}: the loss is no mean over samples{'' if job.weight is None else ' as Job.weight counts them'}: "
            f"for {count} samples it is {apart.whole:.6g}, the mean of their own losses is {apart.mean:.6g}, so a batch "
            f"that is split trains something else. {advice(job, part.targets)}"
        )


def advice(job: Job, targets: Any) -> str:
    """What to do about a loss that is no mean over samples."""
    known = (F.cross_entropy, F.nll_loss)
    ignoring = job.loss in known or type(job.loss) in (nn.CrossEntropyLoss, nn.NLLLoss)
    if ignoring and isinstance(targets, Tensor) and bool((targets == IGNORED).any()):
        return (
            "Targets of -100 are ignored, and the loss is a mean over the others: give Job.weight, such as "
            "weight=lambda target: (target != -100).sum()"
        )
    return (
        "A loss that compares samples needs the whole batch at once: use --plan serial, or tensor= or pipeline=, without "
        "micro_batch. A mean over tokens, unignored targets or class weights needs Job.weight, which counts them, or an "
        "objective that returns (sum, count)"
    )


class _Apart(NamedTuple):
    whole: float
    mean: float


def _apart(job: Job, output: Any, part: Batch, count: int, *, double: bool, tolerance: float) -> _Apart | None:
    """The loss of the first samples and the mean of their losses, where these differ."""
    loss = copy.deepcopy(job.loss) if isinstance(job.loss, nn.Module) else job.loss  # it may keep something
    if double and isinstance(loss, nn.Module):
        loss = loss.double()
    assert loss is not None
    weight = weight_function(job)

    def taken(start: int, stop: int) -> tuple[float, float]:
        def rows(leaf: Tensor) -> Tensor:
            leaf = leaf.detach()[start:stop].clone() if leaf.dim() else leaf.detach().clone()
            return leaf.double() if double and leaf.is_floating_point() else leaf

        targets = None if part.targets is None else tree_map(rows, part.targets)
        own = float(stop - start) if weight is None else float(weight(targets))
        value = float(loss(map_output(rows, output), targets)) if own else 0.0
        return (0.0 if isnan(value) and stop - start == 1 else value), own  # of a single ignored target: 0 / 0

    whole, total = taken(0, count)
    parts = [taken(row, row + 1) for row in range(count)]
    weights = sum(own for _, own in parts)
    if not isfinite(whole) or not weights or not total:
        return None
    mean = sum(value * own for value, own in parts) / weights
    scale = max(abs(whole), sum(abs(value) * own for value, own in parts) / weights)
    if abs(mean - whole) <= tolerance * scale and abs(weights - total) <= tolerance * total:
        return None
    return _Apart(whole, mean)
