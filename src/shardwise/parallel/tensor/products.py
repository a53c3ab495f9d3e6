"""Rules for functions that multiply by weights: they are where a split begins, ends in a sum, or is passed on.

Legend of shapes: N samples, I inputs of a layer, O its outputs, V entries of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardwise.parallel.tensor.maths import own_randomness
from shardwise.parallel.tensor.part import SplitTensor, WholeNeeded, beside, each, like, shape_of, whole

Function = Callable[..., Any]


def linear(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`linear(x_NI, weight_OI, bias_O)`."""
    x, weight, bias = _named(args, kwargs, ("input", "weight", "bias"), (None,))
    if len(shape_of(weight)) != 2:
        raise WholeNeeded("its weight has not two dims")
    last = len(shape_of(x)) - 1
    if isinstance(weight, SplitTensor) and weight.cut.dim == 0:
        if isinstance(x, SplitTensor):
            raise WholeNeeded("a layer whose outputs are split gets inputs that are split")
        columns = [weight.ring.enter(x), weight.pieces, beside(weight, bias, 0)]
        return like(weight, each(weight.ring, F.linear, columns), weight.cut.at(last), taken=1)
    if isinstance(x, SplitTensor) and x.cut.dim < last:
        if isinstance(weight, SplitTensor):
            raise WholeNeeded("its input is split along another dim")
        columns = [x.pieces, beside(x, weight, None), beside(x, bias, None)]
        return like(x, each(x.ring, F.linear, columns))
    return _plus(_contracted(x, last, weight, 1, lambda a, b: F.linear(a, b)), bias)


def _contracted(
    x: Tensor, x_dim: int, weight: Tensor, weight_dim: int, product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """A product summed over a split dim that both have: every rank's summand, then the sum over the ranks."""
    if isinstance(x, SplitTensor):
        split: SplitTensor = x
        columns = [x.pieces, _pieces_of_weight(x, weight, weight_dim)]
    else:
        assert isinstance(weight, SplitTensor)
        split = weight
        columns = [weight.ring.scatter(x, weight.cut.at(x_dim)), weight.pieces]
    summands = each(split.ring, product, columns)
    if split.ring.watcher is not None:
        split.ring.watcher.close(split)
    return split.ring.total(summands)


def _pieces_of_weight(x: SplitTensor, weight: Tensor, dim: int) -> Sequence[Any]:
    """The weight in pieces like those of its input."""
    if isinstance(weight, SplitTensor) or weight.requires_grad:
        pieces = beside(x, weight, dim)
    else:
        claimed = x.ring.watcher.claim(weight, x.cut.at(dim), x) if x.ring.watcher is not None else None
        pieces = claimed.pieces if claimed is not None else beside(x, weight, dim)
    return pieces


def _plus(result: Tensor, bias: Tensor | None) -> Tensor:
    """Add the bias once, after the sum over the ranks."""
    if isinstance(bias, SplitTensor):
        bias = whole(bias)
    return result if bias is None else result + bias


def addmm(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`addmm(bias, x_NI, weight_IO)`, as models in the style of GPT-2 call it."""
    if kwargs or len(args) != 3:
        raise WholeNeeded("addmm has scale factors")
    bias, x, weight = args
    product = matmul(torch.matmul, (x, weight), {})
    if isinstance(product, SplitTensor):
        columns = [product.pieces, beside(product, bias, product.cut.dim - 2 + len(shape_of(bias)))]
        return like(product, each(product.ring, torch.add, columns))
    return _plus(product, bias)


def matmul(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`matmul`, `mm`, `bmm` of tensors with at least two dims: (..., rows, inner) times (..., inner, columns)."""
    if kwargs or len(args) != 2:
        raise WholeNeeded("the product has keywords")
    a, b = args if func.__name__ != "__rmatmul__" else (args[1], args[0])
    dims_a, dims_b = len(shape_of(a)), len(shape_of(b))
    if min(dims_a, dims_b) < 2:
        raise WholeNeeded("it is multiplied by a vector")
    dims = max(dims_a, dims_b)
    part = next(value for value in (a, b) if isinstance(value, SplitTensor))
    from_right = len(shape_of(part)) - part.cut.dim  # 1 columns, 2 rows, more: batch
    if part is a and isinstance(b, SplitTensor) and part.ring.watcher is not None:
        part.ring.watcher.meet(a, b)
    if (part is a and from_right == 1) or (part is b and from_right == 2):
        one_is_weight = any(getattr(t, "parameter", isinstance(t, torch.nn.Parameter)) for t in (a, b))
        if part.ring.watcher is not None and not one_is_weight:
            raise WholeNeeded("the product of two activations is summed over its split dim")
        if part is b and isinstance(a, SplitTensor) and a.cut.dim != dims_a - 1:
            raise WholeNeeded("both factors are split, along different dims")
        return _contracted(a, dims_a - 1, b, dims_b - 2, torch.matmul)
    if from_right <= 2:
        other = b if part is a else a
        if isinstance(other, SplitTensor):
            raise WholeNeeded("both factors are split, along different dims")
        columns = [part.pieces, part.ring.enter(other)] if part is a else [part.ring.enter(other), part.pieces]
        place = dims - from_right
        taken = 1 if part.parameter else part.taken
        return like(part, each(part.ring, torch.matmul, columns), part.cut.at(place), taken=taken)

    def batched(value: Tensor) -> tuple[Any, ...]:
        dim = len(shape_of(value)) - from_right
        return tuple(part.pieces if value is part else beside(part, value, dim if dim >= 0 else None))

    return like(part, each(part.ring, torch.matmul, [batched(a), batched(b)]), part.cut.at(dims - from_right))


def baddbmm(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`baddbmm(c, a, b)` of batches that are split."""
    part = next(value for value in args if isinstance(value, SplitTensor))
    if part.cut.dim != 0:
        raise WholeNeeded("a batched product is split within its matrices")
    columns = [beside(part, value, 0) if value is not part else part.pieces for value in args]
    return like(part, each(part.ring, func, columns, kwargs))


def einsum(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`einsum("nthd,nshd->nhts", a, b)`, without dots, each letter once a term."""
    equation, operands = args[0], list(args[1:])
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        raise WholeNeeded("an einsum in this form")
    left, result = equation.replace(" ", "").split("->")
    terms = left.split(",")
    part = next(value for value in operands if isinstance(value, SplitTensor))
    letter = terms[next(i for i, value in enumerate(operands) if value is part)][part.cut.dim]
    if any(len(set(term)) != len(term) for term in (*terms, result)):
        raise WholeNeeded("an einsum with a repeated letter")
    columns: list[Sequence[Any]] = []
    for term, value in zip(terms, operands, strict=True):
        if letter not in result and letter in term and value is not part and not isinstance(value, SplitTensor):
            columns.append(_pieces_of_weight(part, value, term.index(letter)))
        else:
            columns.append(
                part.pieces if value is part else beside(part, value, term.find(letter) if letter in term else None)
            )
    pieces = each(part.ring, lambda *values: torch.einsum(equation, *values), columns)
    if letter in result:
        taken = 1 if part.parameter else part.taken
        return like(part, pieces, part.cut.at(result.index(letter)), taken=taken)
    if part.ring.watcher is not None:
        if not any(getattr(t, "parameter", isinstance(t, torch.nn.Parameter)) for t in operands):
            raise WholeNeeded("the product of two activations is summed over its split dim")
        part.ring.watcher.close(part)
    return part.ring.total(pieces)


def embedding(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`embedding(index_N, weight_VD)`: each rank looks up the entries it has; the others count as zero in the sum."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    index, weight, padding, max_norm, _, by_frequency, sparse = _named(
        args, kwargs, names, (None, None, 2.0, False, False)
    )
    if not isinstance(weight, SplitTensor) or isinstance(index, SplitTensor):
        raise WholeNeeded("it is an index")
    if max_norm is not None or by_frequency or sparse:
        raise WholeNeeded("an embedding with max_norm, scale_grad_by_freq or sparse=True")
    cut, ring = weight.cut, weight.ring
    if cut.dim == 1:
        pieces = each(ring, lambda rows: F.embedding(index, rows, padding), [weight.pieces])
        return like(weight, pieces, cut.at(index.dim()), taken=1)
    if cut.outer != 1:
        raise WholeNeeded("a vocabulary of several blocks")
    if padding is not None and padding < 0:
        padding += cut.total
    summands = []
    for rows, rank in zip(weight.pieces, ring.members, strict=True):
        start, share = cut.start(rank), cut.share(rank)
        absent = (index < start) | (index >= start + share)
        own = None if padding is None or not start <= padding < start + share else padding - start
        found = F.embedding((index - start).masked_fill(absent, 0), rows, own)
        summands.append(found.masked_fill(absent.unsqueeze(-1), 0.0))
    if ring.watcher is not None:
        ring.watcher.close(weight)
    return ring.total(summands)


def convolution(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`conv1d`, `conv2d`, `conv3d` of (N, channels, ...) by a weight (O, I, ...), without groups."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = _named(args, kwargs, names, (None, 1, 0, 1, 1))
    if groups != 1 or len(shape_of(x)) != len(shape_of(weight)):
        raise WholeNeeded("a convolution with groups or without a batch dim")

    def apply(piece: Tensor, filters: Tensor, offsets: Tensor | None = None) -> Tensor:
        result: Tensor = func(piece, filters, offsets, stride, padding, dilation)
        return result

    if isinstance(weight, SplitTensor) and weight.cut.dim == 0 and not isinstance(x, SplitTensor):
        columns = [weight.ring.enter(x), weight.pieces, beside(weight, bias, 0)]
        return like(weight, each(weight.ring, apply, columns), weight.cut.at(1), taken=1)
    if isinstance(x, SplitTensor) and x.cut.dim != 1:
        raise WholeNeeded("a convolution over its split dim")
    if isinstance(weight, SplitTensor) and weight.cut.dim != 1:
        raise WholeNeeded("a layer whose outputs are split gets inputs that are split")
    shaped = bias.view(-1, *[1] * (len(shape_of(weight)) - 2)) if bias is not None else None
    return _plus(_contracted(x, 1, weight, 1, apply), shaped)


def attention(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`scaled_dot_product_attention(q, k, v)` of whole heads or samples; with `enable_gqa` keys may have fewer heads."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    extra = {name: value for name, value in kwargs.items() if name in ("scale", "enable_gqa")}
    rest = {name: value for name, value in kwargs.items() if name not in extra}
    query, key, value, mask, dropout, causal = _named(args, rest, names, (None, 0.0, False))
    parts = [tensor for tensor in (query, key, value) if isinstance(tensor, SplitTensor)]
    if not parts:
        raise WholeNeeded("its mask is split")
    part = parts[0]
    if part.ring.watcher is not None:
        for other in parts[1:]:
            part.ring.watcher.meet(part, other)
    from_right = len(shape_of(part)) - part.cut.dim
    if len(parts) < 3 or any(len(shape_of(p)) - p.cut.dim != from_right or not p.cut.even for p in parts):
        raise WholeNeeded("query, key and value are not split alike")
    if from_right < 3:
        raise WholeNeeded("attention goes along its split dim")
    if len({tensor.cut.outer for tensor in parts}) > 1 or (
        len({tensor.cut.length for tensor in parts}) > 1 and not (extra.get("enable_gqa") and part.cut.outer == 1)
    ):
        raise WholeNeeded("query, key and value have different numbers of heads")
    masks = (None,) * len(part.pieces)
    if isinstance(mask, Tensor):
        dim = len(shape_of(mask)) - from_right
        masks = beside(query, mask, dim if dim >= 0 else None)
    contexts = own_randomness(part) if dropout > 0 else None
    pieces = []
    for index in range(len(part.pieces)):
        given = (query.pieces[index], key.pieces[index], value.pieces[index], masks[index], dropout, causal)
        if contexts is None:
            pieces.append(func(*given, **extra))
        else:
            with contexts[index]:
                pieces.append(func(*given, **extra))
    return like(query, pieces)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
    """Arguments in the order of `names`, the last of which have defaults."""
    values = list(args)
    first_default = len(names) - len(defaults)
    for position in range(len(values), len(names)):
        name = names[position]
        if name in kwargs:
            values.append(kwargs[name])
        elif position >= first_default:
            values.append(defaults[position - first_default])
        else:
            raise WholeNeeded(f"a call without {name}")
    if len(values) > len(names) or set(kwargs) - set(names):
        raise WholeNeeded("a call with other arguments")
    return values
