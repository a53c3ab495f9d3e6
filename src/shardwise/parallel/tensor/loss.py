"""Cross entropy of logits whose classes are split over the ranks, without putting the logits together.

Per sample, three numbers cross the ranks: the largest logit, the sum of exponentials, and the logit of the target. This is
the vocabulary-parallel loss of Shoeybi et al. (2019), "Megatron-LM", section 3.

Shapes: N samples (with any further dims behind the classes), C classes, of which a rank has some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shardwise.parallel.tensor.part import SplitTensor, WholeNeeded, shape_of
from shardwise.parallel.tensor.ring import Cut, Ring

_NAMES = (
    "input",
    "target",
    "weight",
    "size_average",
    "ignore_index",
    "reduce",
    "reduction",
    "label_smoothing",
)
_DEFAULTS: dict[str, Any] = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}


def cross_entropy(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`cross_entropy(logits_NC, target_N)` with class indices as targets and no class weights."""
    given = {**_DEFAULTS, **dict(zip(_NAMES, args, strict=False)), **kwargs}
    logits, target = given["input"], given["target"]
    if not isinstance(logits, SplitTensor) or isinstance(target, SplitTensor):
        raise WholeNeeded("it is the target of a loss")
    if logits.cut.dim != (1 if len(shape_of(logits)) > 1 else 0):
        raise WholeNeeded("the loss is taken along another dim")
    unusual = any(given.get(name) is not None for name in ("weight", "size_average", "reduce"))
    if unusual or target.is_floating_point() or len(shape_of(logits)) < 2 or logits.cut.outer != 1:
        raise WholeNeeded("a cross entropy with class weights or probabilities as targets")
    if given["reduction"] not in ("none", "mean", "sum"):
        raise WholeNeeded("a cross entropy with an unknown reduction")
    ring, ignored = logits.ring, int(given["ignore_index"])
    if ring.watcher is not None:
        ring.watcher.close(logits)
    pieces = logits.pieces
    if not pieces[0].is_meta and torch.is_autocast_enabled(pieces[0].device.type):
        pieces = tuple(piece.float() for piece in pieces)
    losses_N = cast(
        Tensor,
        _SplitCrossEntropy.apply(  # type: ignore[no-untyped-call]
            ring, logits.cut, target, ignored, float(given["label_smoothing"]), *pieces
        ),
    )
    if given["reduction"] == "none":
        return losses_N
    if given["reduction"] == "sum":
        return losses_N.sum()
    return losses_N.sum() / (target != ignored).sum()


class _SplitCrossEntropy(torch.autograd.Function):
    """Pieces of logits (N, part of C, ...) -> loss of every sample (N, ...), zero where the target is ignored."""

    @staticmethod
    def forward(
        ctx: Any, ring: Ring, cut: Cut, target_N: Tensor, ignored: int, smoothing: float, *pieces: Tensor
    ) -> Tensor:
        wide = torch.promote_types(pieces[0].dtype, torch.float32)
        own = [piece.to(wide) for piece in pieces]
        largest_N = ring.largest([piece.amax(1) for piece in own])
        parts = []
        places = [_place(target_N, cut, rank) for rank in ring.members]
        for logits_NC, (index_N, absent_N) in zip(own, places, strict=True):
            exponentials_N = (logits_NC - largest_N.unsqueeze(1)).exp().sum(1)
            picked_N = logits_NC.gather(1, index_N.unsqueeze(1)).squeeze(1).masked_fill(absent_N, 0.0)
            parts.append(torch.stack([exponentials_N, picked_N, logits_NC.sum(1)]))
        exponentials_N, picked_N, summed_N = ring.add(parts).unbind(0)
        logsumexp_N = largest_N + exponentials_N.log()
        losses_N = logsumexp_N - picked_N
        if smoothing:
            losses_N = (1 - smoothing) * losses_N + smoothing * (logsumexp_N - summed_N / cut.total)
        kept_N = target_N != ignored
        ctx.save_for_backward(*pieces, logsumexp_N, kept_N, target_N)
        ctx.ring, ctx.cut, ctx.smoothing = ring, cut, smoothing
        return losses_N.masked_fill(~kept_N, 0.0).to(pieces[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Any, ...]:
        *pieces, logsumexp_N, kept_N, target_N = ctx.saved_tensors
        scale_N = (gradient_N * kept_N).unsqueeze(1)
        gradients = []
        for piece, rank in zip(cast(Sequence[Tensor], pieces), ctx.ring.members, strict=True):
            gradient_NC = (piece.to(logsumexp_N.dtype) - logsumexp_N.unsqueeze(1)).exp()
            index_N, absent_N = _place(target_N, ctx.cut, rank)
            on_target_N = gradient_N.new_full(absent_N.shape, ctx.smoothing - 1.0, dtype=gradient_NC.dtype)
            on_target_N = on_target_N.masked_fill(absent_N, 0.0)
            gradient_NC.scatter_add_(1, index_N.unsqueeze(1), on_target_N.unsqueeze(1))
            if ctx.smoothing:
                gradient_NC -= ctx.smoothing / ctx.cut.total
            gradients.append((gradient_NC * scale_N).to(piece.dtype))
        return (None, None, None, None, None, *gradients)


def _place(target_N: Tensor, cut: Cut, rank: int) -> tuple[Tensor, Tensor]:
    """Index of each target among a rank's classes (0 where it is not there), and where it is not there."""
    start, share = cut.start(rank), cut.share(rank)
    absent_N = (target_N < start) | (target_N >= start + share)
    return (target_N - start).masked_fill(absent_N, 0), absent_N
