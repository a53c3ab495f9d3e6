"""A linear layer per group of rows: what experts compute once the tokens are sorted by expert.

Shapes: S rows, E experts, D features in, H features out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_linear(rows_SD: Tensor, counts: Sequence[int], weight_EDH: Tensor, bias_EH: Tensor | None = None) -> Tensor:
    """Row s times the matrix of its expert (plus its bias): the first `counts[0]` rows with matrix 0, and so on.

    Under autocast it computes in autocast's dtype, as `torch.nn.functional.linear` does.

    Args:
        rows_SD: rows sorted by expert.
        counts: rows of each expert, E numbers with the sum S; 0 is allowed.
        weight_EDH: one matrix an expert.
        bias_EH: one bias an expert.

    Returns:
        Tensor (S, H).

    Raises:
        ValueError: the counts do not fit the rows or the weights.
    """
    if len(counts) != weight_EDH.shape[0] or sum(counts) != rows_SD.shape[0]:
        raise ValueError(
            f"counts {list(counts)} for {rows_SD.shape[0]} rows and {weight_EDH.shape[0]} experts: give one count an "
            "expert, which together count the rows"
        )
    device = rows_SD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows_SD, weight_EDH = rows_SD.to(dtype), weight_EDH.to(dtype)
        bias_EH = None if bias_EH is None else bias_EH.to(dtype)
    y_SH = _GroupedLinear.apply(rows_SD, weight_EDH, bias_EH, tuple(counts))  # type: ignore[no-untyped-call]
    return cast("Tensor", y_SH)


class _GroupedLinear(torch.autograd.Function):
    """One matrix product an expert, written straight into its place.

    Indexing the stacked weights in plain autograd would make a gradient of all experts' size for every expert.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_SD: Tensor, weight_EDH: Tensor, bias_EH: Tensor | None, counts: tuple[int, ...]
    ) -> Tensor:
        y_SH = rows_SD.new_empty((rows_SD.shape[0], weight_EDH.shape[2]))
        for expert, rows in _segments(counts):
            if bias_EH is None:
                torch.mm(rows_SD[rows], weight_EDH[expert], out=y_SH[rows])
            else:
                torch.addmm(bias_EH[expert], rows_SD[rows], weight_EDH[expert], out=y_SH[rows])
        ctx.save_for_backward(rows_SD, weight_EDH)
        ctx.counts, ctx.biased = counts, bias_EH is not None
        return y_SH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SH: Tensor) -> tuple[Tensor | None, ...]:
        rows_SD, weight_EDH = ctx.saved_tensors
        dy_SH = dy_SH.contiguous()
        for_rows, for_weight, for_bias, _ = ctx.needs_input_grad
        drows_SD = torch.empty_like(rows_SD) if for_rows else None
        # An expert without rows has the gradient zero, not none: its weights are part of the layer.
        dweight_EDH = torch.zeros_like(weight_EDH) if for_weight else None
        dbias_EH = dy_SH.new_zeros((weight_EDH.shape[0], weight_EDH.shape[2])) if ctx.biased and for_bias else None
        for expert, rows in _segments(ctx.counts):
            if drows_SD is not None:
                torch.mm(dy_SH[rows], weight_EDH[expert].t(), out=drows_SD[rows])
            if dweight_EDH is not None:
                torch.mm(rows_SD[rows].t(), dy_SH[rows], out=dweight_EDH[expert])
            if dbias_EH is not None:
                torch.sum(dy_SH[rows], 0, out=dbias_EH[expert])
        return drows_SD, dweight_EDH, dbias_EH, None


def _segments(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of the experts that have any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count
