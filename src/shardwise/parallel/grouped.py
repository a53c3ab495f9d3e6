"""Products of experts' matrices where torch's own kernel (`torch.nn.functional.grouped_mm`) cannot compute them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROUPED: Any = torch._grouped_mm
"""What `torch.nn.functional.grouped_mm` calls. It takes no float64, and no float32 without values."""


def in_parts(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """The same one product after the other, in any dtype.

    Args:
        a: (rows, K), the rows of a group one after the other; or (groups, rows, K).
        b: (groups, K, N).
        offs: where each group of rows ends, with `a` of two dims.
    """
    if bias is not None or out_dtype is not None or b.dim() != 3:
        return _as_torch(a, b, offs, bias, out_dtype)
    if offs is None:
        return a @ b
    ends = offs.tolist()
    rows = a.split([end - start for start, end in zip([0, *ends], ends, strict=False)] + [len(a) - ends[-1]])
    products = [part @ matrix for part, matrix in zip(rows, b, strict=False)]
    return torch.cat([*products, a.new_zeros(len(rows[-1]), b.shape[-1])])


def in_shape(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """A tensor of the same shape that depends on the same tensors, for passes without values."""
    if bias is not None or out_dtype is not None or b.dim() != 3:
        return _as_torch(a, b, offs, bias, out_dtype)
    return a @ (b if offs is None else b[0])


def _as_torch(a: Tensor, b: Tensor, offs: Tensor | None, bias: Any, out_dtype: Any) -> Tensor:
    result: Tensor = GROUPED(a, b, offs=offs, bias=bias, out_dtype=out_dtype)
    return result
