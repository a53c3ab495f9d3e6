"""Rules for functions that compute each element on its own or along dims that are not split.

Legend: a *piece* is one member's part; `beside` brings the other arguments of a call into line with the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shardwise.parallel.tensor.part import SplitTensor, WholeNeeded, beside, each, like, shape_of
from shardwise.parallel.tensor.shapes import wrapped

Function = Callable[..., Any]


def names_in(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


ELEMENTWISE = names_in(
    """
    abs absolute acos acosh add addcdiv addcmul angle arccos arcsin arctan asin asinh atan atan2 atanh
    bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min clip clone copysign cos cosh
    deg2rad detach div divide elu eq erf erfc erfinv exp exp2 expm1 fix floor floor_divide fmod frac ge gelu
    greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot isfinite isinf isnan
    ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2 logaddexp logical_and logical_not
    logical_or logical_xor logit logsigmoid lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg
    negative not_equal ones_like positive pow prelu reciprocal relu relu6 remainder round rsqrt rsub selu sgn
    sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt square sub subtract tan tanh tanhshrink
    threshold true_divide trunc where xlogy zero zeros_like full_like empty_like to type type_as float double
    half bfloat16 int long bool contiguous cpu cuda requires_grad __add__ __radd__ __sub__ __rsub__ __mul__
    __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __floordiv__ __rfloordiv__ __mod__ __rmod__ __pow__
    __rpow__ __neg__ __pos__ __abs__ __invert__ __and__ __rand__ __or__ __ror__ __xor__ __eq__ __ne__ __lt__
    __le__ __gt__ __ge__ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ipow__ __iand__ __ior__
    """
)
"""Functions that compute each element of the result from the same elements of their arguments, by name."""

RANDOM = frozenset(
    ["dropout", "alpha_dropout", "rrelu", "bernoulli", "rand_like", "randn_like", "normal", "uniform", "exponential"]
)
"""Functions as above that draw random numbers."""

# Name -> (position of the dim, its keyword, its default, whether the dim is gone from the result).
ALONG_DIM: dict[str, tuple[int, str, Any, bool]] = {
    "softmax": (1, "dim", None, False),
    "log_softmax": (1, "dim", None, False),
    "softmin": (1, "dim", None, False),
    "cumsum": (1, "dim", None, False),
    "cumprod": (1, "dim", None, False),
    "sort": (1, "dim", -1, False),
    "argsort": (1, "dim", -1, False),
    "topk": (2, "dim", -1, False),
    "flip": (1, "dims", None, False),
    "roll": (2, "dims", None, False),
    "glu": (1, "dim", -1, False),
    "normalize": (2, "dim", 1, False),
    "sum": (1, "dim", None, True),
    "mean": (1, "dim", None, True),
    "var": (1, "dim", None, True),
    "std": (1, "dim", None, True),
    "amax": (1, "dim", None, True),
    "amin": (1, "dim", None, True),
    "max": (1, "dim", None, True),
    "min": (1, "dim", None, True),
    "argmax": (1, "dim", None, True),
    "argmin": (1, "dim", None, True),
    "logsumexp": (1, "dim", None, True),
    "prod": (1, "dim", None, True),
    "all": (1, "dim", None, True),
    "any": (1, "dim", None, True),
    "norm": (2, "dim", None, True),
}
"""Functions that work along one or several dims."""

_SPATIAL = {"1d": 1, "2d": 2, "3d": 3}
POOLS = frozenset(
    f"{kind}_pool{dims}" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for dims in _SPATIAL
) | {"boolean_dispatch"}


def elementwise(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any of `ELEMENTWISE`, with broadcasting; in place too, where the changed tensor is split."""
    if "out" in kwargs:
        raise WholeNeeded("it is written to another tensor")
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    part = next(value for value in tensors if isinstance(value, SplitTensor))
    dims = max(len(shape_of(tensor)) for tensor in tensors)
    from_right = len(shape_of(part)) - part.cut.dim
    changed = _changed(func)
    if changed and not isinstance(args[0], SplitTensor):
        raise WholeNeeded("a whole tensor is changed in place by it")

    def aligned(value: Any) -> tuple[Any, ...]:
        if isinstance(value, SplitTensor) and value is part:
            return value.pieces
        dim = len(shape_of(value)) - from_right if isinstance(value, Tensor) else None
        return tuple(beside(part, value, dim if dim is None or dim >= 0 else None))

    columns = [aligned(value) for value in args]
    named = {name: aligned(value) for name, value in kwargs.items()}
    results = [
        func(*(column[index] for column in columns), **{name: values[index] for name, values in named.items()})
        for index in range(len(part.pieces))
    ]
    if changed:
        return args[0]
    if not isinstance(results[0], Tensor):
        raise WholeNeeded(f"{func.__name__} gives no tensor")
    return like(part, results, part.cut.at(dims - from_right))


def _changed(func: Function) -> bool:
    name = func.__name__
    return (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name != "__invert__")


def random(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any of `RANDOM`: every rank draws its own numbers, and the common stream of all ranks moves on equally."""
    part = args[0]
    if not isinstance(part, SplitTensor) or any(isinstance(value, Tensor) for value in args[1:]):
        raise WholeNeeded("random numbers are drawn by it")
    name = func.__name__
    if name == "dropout" and (_argument(args, kwargs, 2, "training", True) is False or args[1:2] == (0.0,)):
        return like(part, [func(piece, *args[1:], **kwargs) for piece in part.pieces])
    results = []
    for piece, generator in zip(part.pieces, own_randomness(part), strict=True):
        with generator:
            results.append(func(piece, *args[1:], **kwargs))
    return args[0] if _changed(func) else like(part, results)


def own_randomness(part: SplitTensor) -> list[Any]:
    """A context for each member, within which torch draws that rank's own numbers."""
    seed = int(torch.randint(1 << 62, ()))
    device = part.pieces[0].device
    devices = [device] if device.type not in ("cpu", "meta") else []

    @contextmanager
    def context(rank: int) -> Iterator[None]:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(seed + rank)
            yield

    return [context(rank) for rank in part.ring.members]


def along_dim(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any of `ALONG_DIM`, along dims that are not split."""
    name = func.__name__
    part = args[0]
    if not isinstance(part, SplitTensor) or "out" in kwargs or any(isinstance(v, Tensor) for v in args[1:]):
        raise WholeNeeded(f"{name} combines it with other tensors")
    position, keyword, default, reduces = ALONG_DIM[name]
    asked = _argument(args, kwargs, position, keyword, kwargs.get("axis", default))
    if asked is None:
        raise WholeNeeded(f"{name} is taken over all of it")
    count = len(shape_of(part))
    over = {wrapped(dim, count) for dim in (asked if isinstance(asked, (tuple, list)) else [asked])}
    if part.cut.dim in over or not over:
        raise WholeNeeded(f"{name} is taken along its split dim")
    # mean has (x, dim, keepdim), norm (x, p, dim, keepdim): keepdim always follows the dim.
    keeps = bool(_argument(args, kwargs, _keepdim_position(name, position), "keepdim", False))
    place = part.cut.dim - (sum(dim < part.cut.dim for dim in over) if reduces and not keeps else 0)
    return _wrap_all(part, [func(piece, *args[1:], **kwargs) for piece in part.pieces], place)


def _keepdim_position(name: str, position: int) -> int:
    return position + 2 if name in ("var", "std") else position + 1


def _wrap_all(part: SplitTensor, results: list[Any], place: int) -> Any:
    """Wrap a tensor, or a (named) tuple of tensors such as that of `max`."""
    if isinstance(results[0], Tensor):
        return like(part, results, part.cut.at(place))
    kind = type(results[0])
    columns = [like(part, list(column), part.cut.at(place)) for column in zip(*results, strict=True)]
    return tuple(columns) if kind is tuple else kind(columns)


def normalised(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`layer_norm`, `rms_norm` over trailing dims that are not split; their weights are whole."""
    part = args[0]
    shape = _argument(args, kwargs, 1, "normalized_shape", ())
    if not isinstance(part, SplitTensor) or part.cut.dim >= len(shape_of(part)) - len(shape):
        raise WholeNeeded(f"{func.__name__} is taken along its split dim")
    columns = [part.pieces, *(beside(part, value, None) for value in args[1:])]
    named = {name: beside(part, value, None) for name, value in kwargs.items()}
    return like(
        part,
        [
            func(*(column[index] for column in columns), **{name: values[index] for name, values in named.items()})
            for index in range(len(part.pieces))
        ],
    )


def pooled(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pooling over positions; channels are untouched."""
    part = args[0]
    if not isinstance(part, SplitTensor) or _argument(args, kwargs, 6, "return_indices", False) is not False:
        raise WholeNeeded("it is pooled with indices")
    # A batch of maps has channels in dim 1; without a batch dim they are in dim 0, which is never split here.
    if part.cut.dim != 1 or len(shape_of(part)) < 3:
        raise WholeNeeded("it is pooled along its split dim")
    return like(part, [func(piece, *args[1:], **kwargs) for piece in part.pieces])


def complexed(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`view_as_complex`, `view_as_real`, whose last dim goes or comes."""
    part = args[0]
    if func.__name__ == "view_as_complex" and part.cut.dim == len(shape_of(part)) - 1:
        raise WholeNeeded("pairs of its split dim become complex numbers")
    return like(part, [func(piece) for piece in part.pieces])


def new_tensor(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`new_zeros` and the like: a whole tensor of the shape that was asked for."""
    return func(args[0].pieces[0], *args[1:], **kwargs)


def as_it_is(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`as_tensor` of what is a tensor already."""
    if len(args) != 1 or kwargs:
        raise WholeNeeded("it is converted")
    return args[0]


def hooked(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`register_hook`, `retain_grad`: on the pieces, whose gradients are pieces of the whole gradient."""
    return each(args[0].ring, lambda piece: func(piece, *args[1:], **kwargs), [args[0].pieces])[0]


def trailing(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`tril`, `triu`, `pad`: they look at the last dims only."""
    part = args[0]
    last = 2 if func.__name__ in ("tril", "triu") else len(_argument(args, kwargs, 1, "pad", ())) // 2
    if not isinstance(part, SplitTensor) or part.cut.dim >= len(shape_of(part)) - last:
        raise WholeNeeded(f"{func.__name__} changes its split dim")
    return like(part, each(part.ring, lambda piece: func(piece, *args[1:], **kwargs), [part.pieces]))


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)
