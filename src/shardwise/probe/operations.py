"""What kind of operation a call of torch is, how many FLOPs it takes and how many bytes it moves.

The same rules name the operations that `probe` times and those that are counted in a model, so that they meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

MATMUL = frozenset({"mm", "addmm", "_scaled_mm", "mv", "dot", "linear", "matmul"})
BATCHED = frozenset({"bmm", "baddbmm"})
CONVOLUTION = frozenset({"convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable"})
CONVOLUTION_BACKWARD = frozenset({"convolution_backward"})
_BY_FLOPS = frozenset(
    {"matmul", "batched_matmul", "convolution", "convolution_backward", "attention", "attention_backward"}
)
FREE = frozenset(
    {
        "view",
        "_unsafe_view",
        "reshape",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
    }
    | {
        "detach",
        "alias",
        "as_strided",
        "split",
        "split_with_sizes",
        "unbind",
        "chunk",
        "unfold",
        "diagonal",
        "lift_fresh",
    }
    | {"_reshape_alias", "sym_size", "sym_stride", "sym_numel", "is_same_size", "_local_scalar_dense", "unsafe_split"}
)
"""Operations that move nothing: they make another view."""


def name_of(operation: Any) -> str:
    """`convolution` for `aten.convolution.default`; other namespaces keep theirs, as `prims.view_of`."""
    packet = operation.overloadpacket
    name = str(packet)
    return name.removeprefix("aten.")


def kind_of(name: str) -> str:
    """The kind under which an operation is timed: products, convolutions, attention and recurrent layers by FLOPs."""
    if name in MATMUL:
        return "matmul"
    if name in BATCHED:
        return "batched_matmul"
    if name in CONVOLUTION:
        return "convolution"
    if name in CONVOLUTION_BACKWARD:
        return "convolution_backward"
    if "scaled_dot_product" in name or "flash_attention" in name or "efficient_attention" in name:
        return "attention_backward" if name.endswith("backward") or "backward" in name else "attention"
    if name.startswith("mkldnn_rnn_layer"):
        return "recurrent_backward" if "backward" in name else "recurrent"
    return name


def by_flops(kind: str) -> bool:
    """Whether the rate of a kind is in FLOP/s; anything else is in bytes/s."""
    return kind in _BY_FLOPS or kind.startswith("recurrent")


def flops_of(operation: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
    """FLOPs of one call, two a multiply-add; 0 for operations that only move data.

    Causal attention counts in full, as torch's own counter does: the CPU kernels compute most of it.
    """
    if name.startswith("mkldnn_rnn_layer"):
        return _recurrent_flops(name, args)
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return float(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return float(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))
    if name in ("mv", "dot"):
        return float(2 * args[0].numel())
    formula = flop_registry.get(operation.overloadpacket)
    return float(formula(*args, **kwargs, out_val=out)) if formula is not None else 0.0


def _recurrent_flops(name: str, args: Sequence[Any]) -> float:
    """One direction of one layer: every step multiplies its input and its state by a matrix each (gates x width)."""
    first = args[0]
    matrices = sum(item.numel() for item in args[1:3] if isinstance(item, Tensor))
    steps = prod(first.shape[:-1])
    return float(2 * steps * matrices) * (2.0 if "backward" in name else 1.0)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def size_bytes(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor; of what is stored, for a sparse one."""
    if tensor.layout is not torch.strided:
        return 0
    return tensor.numel() * tensor.element_size()


def moved_bytes(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Bytes read and written: every input and output once, written in place twice."""
    return float(sum(size_bytes(tensor) for tensor in inputs) + sum(size_bytes(tensor) for tensor in outputs))


def table_bytes(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Bytes moved by look-ups, which read only the rows they are asked for, and by everything else."""
    if name in ("embedding", "index_select", "gather", "index", "_embedding_bag", "_embedding_bag_forward_only"):
        return 2.0 * sum(size_bytes(tensor) for tensor in outputs)
    return moved_bytes(inputs, outputs)
