"""Which rule does which torch function, and what happens where there is none: the tensor is put together first.

Rules are looked up by the function's name, which `torch.add`, `Tensor.add` and `Tensor.__add__` share or resemble.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from shardwise.errors import PlanError
from shardwise.parallel.tensor import loss, maths, multihead, products, shapes
from shardwise.parallel.tensor.part import SplitTensor, WholeNeeded, like, whole
from shardwise.parallel.tensor.ring import Watcher

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

METADATA = maths.names_in(
    """
    size dim numel nelement ndimension is_floating_point is_complex is_signed element_size get_device __len__
    stride is_contiguous is_same_size __hash__ __repr__ __format__ is_inference
    """
)
"""Functions that ask for sizes and kinds, which the wrapper itself knows."""


def _rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for name in maths.ELEMENTWISE:
        rules[name] = maths.elementwise
        rules[name + "_"] = maths.elementwise
    for name in maths.RANDOM:
        rules[name] = rules[name + "_"] = maths.random
    rules.update(dict.fromkeys(maths.ALONG_DIM, maths.along_dim))
    rules.update(dict.fromkeys(maths.POOLS, maths.pooled))
    rules.update(dict.fromkeys(["layer_norm", "rms_norm"], maths.normalised))
    rules.update(dict.fromkeys(["view_as_complex", "view_as_real"], maths.complexed))
    rules.update(dict.fromkeys(["new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"], maths.new_tensor))
    rules.update(dict.fromkeys(["tril", "triu", "pad"], maths.trailing))
    rules.update(dict.fromkeys(["view", "reshape"], shapes.view))
    rules.update(dict.fromkeys(["view_as", "reshape_as"], shapes.view_as))
    orders = ["transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "adjoint", "matrix_H"]
    rules.update(dict.fromkeys(orders, shapes.permute))
    rules.update(dict.fromkeys(["expand", "expand_as", "broadcast_to"], shapes.expand))
    rules.update(dict.fromkeys(["split", "chunk", "unbind", "split_with_sizes"], shapes.split))
    rules.update(dict.fromkeys(["cat", "concat", "concatenate", "stack"], shapes.cat))
    rules.update(dict.fromkeys(["matmul", "__matmul__", "__rmatmul__", "mm", "bmm"], products.matmul))
    rules.update(dict.fromkeys(["conv1d", "conv2d", "conv3d"], products.convolution))
    rules.update(
        flatten=shapes.flatten,
        unflatten=shapes.unflatten,
        unsqueeze=shapes.unsqueeze,
        squeeze=shapes.squeeze,
        repeat=shapes.repeat,
        repeat_interleave=shapes.repeat_interleave,
        narrow=shapes.narrow,
        select=shapes.select,
        __getitem__=shapes.getitem,
        __iter__=shapes.iterate,
        linear=products.linear,
        addmm=products.addmm,
        baddbmm=products.baddbmm,
        einsum=products.einsum,
        multi_head_attention_forward=multihead.multi_head_attention,
        as_tensor=maths.as_it_is,
        register_hook=maths.hooked,
        retain_grad=maths.hooked,
        embedding=products.embedding,
        scaled_dot_product_attention=products.attention,
        cross_entropy=loss.cross_entropy,
    )
    return rules


RULES = _rules()


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a torch function some of whose arguments are split."""
    name = func.__name__
    if name in ("__get__", "__set__", "__delete__"):
        return _property(func, name, args)
    if name in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    rule = RULES.get(name)
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        rule = maths.elementwise
    try:
        if rule is None:
            raise WholeNeeded(f"{name} needs it whole")
        return rule(func, args, kwargs)
    except WholeNeeded as reason:
        return _gathered(func, args, kwargs, str(reason))


def split_arguments(args: Any, kwargs: Any) -> list[SplitTensor]:
    """Every split tensor among the arguments, in lists and dicts too."""
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, SplitTensor)]


def _gathered(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
    """Put split arguments together, then call. Exact always, at the price of a message."""
    parts = split_arguments(args, kwargs)
    watcher: Watcher | None = parts[0].ring.watcher
    if watcher is not None:
        watcher.block(parts, reason)
    name = func.__name__
    changes = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__",) or "out" in kwargs
    target = args[0] if args and isinstance(args[0], SplitTensor) else None
    if watcher is None and changes and (target is not None or isinstance(kwargs.get("out"), SplitTensor)):
        raise PlanError(
            f"{name} changes a tensor in place that is split over ranks, in a way that needs it whole ({reason}); "
            "name the layer that makes it as tensor_rules={name: 'replicate'}"
        )
    args, kwargs = pytree.tree_map_only(SplitTensor, whole, (args, kwargs))
    return func(*args, **kwargs)


def _property(func: Callable[..., Any], name: str, args: tuple[Any, ...]) -> Any:
    part = args[0]
    asked = getattr(func, "__self__", None)
    what = getattr(asked, "__name__", "")
    if name == "__get__" and isinstance(part, SplitTensor):
        if what == "requires_grad":
            return any(piece.requires_grad for piece in part.pieces)
        if what in ("grad_fn", "is_leaf", "_version"):
            return func(part.pieces[0], *args[1:])
        if what in ("T", "mT", "H", "mH"):
            return shapes.permute(func, args, {})
        if what in ("data", "real", "imag"):
            return like(part, [func(piece, *args[1:]) for piece in part.pieces])
        if what == "grad":
            return None
    elif name != "__get__":
        raise PlanError(
            f"{what or 'a property'} of a tensor that is split over ranks is set; name the layer that makes it as "
            "tensor_rules={name: 'replicate'}"
        )
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args)
