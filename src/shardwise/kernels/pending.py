"""A convolution and the max-pooling behind it as one operator, forward and backward, wherever a model has the two in a row.

`max_pool2d(conv(x), 2)`, with a ReLU between them or none, is what small nets spend their step on. Apart, the two write and
read the whole output of the convolution and its gradient, more than a processor's own cache holds. Together
(`pooled.py`) they never do.

Models stay as they are, and nobody declares what follows what: `Conv2d` puts off its work. What it returns is a tensor that
has no values yet. If the next thing that happens to it is the pooling, both are computed at once. Anything else
(another operator, a hook, a look at its values) computes the convolution then and there, by torch's own operator and graph,
even when the pooling is done already. Weights or inputs that changed in the meantime are an error, as they are for
torch's own backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_map_only

from shardwise.kernels import convolution
from shardwise.kernels.pooled import may_pay, pays, pooled, pooled_gradients

_F = torch.nn.functional
_POOLINGS = {_F.max_pool2d, torch.max_pool2d}
_POOLING_NAMES = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_IN_PLACE = {torch.relu_, Tensor.relu_}
_RELUS = {_F.relu, torch.relu, Tensor.relu, *_IN_PLACE}


def _read(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


_ASKS = {Tensor.size, Tensor.dim, Tensor.numel, *_read("shape", "ndim", "dtype", "device", "requires_grad")}
"""What is known without the values."""

_WATCHES = {
    *(torch.autograd.grad, Tensor.register_hook, Tensor.retain_grad),
    *_read("grad", "grad_fn", "is_leaf", "retains_grad", "output_nr"),
}
"""What is about the place in autograd's graph."""


@final
class Pending(Tensor):
    """The output of a convolution, before anybody has asked for it; in autograd's graph it is what any other would be."""

    work: Work
    valued: Tensor | None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, cls) and first.work.values is None:
            done = _continued(first, func, args[1:], kwargs)
            if done is not None:
                return done
            if func in _ASKS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
        if func in _WATCHES:
            watched = tree_map_only(cls, Work.watch, (args, kwargs))
            with torch._C.DisableTorchFunctionSubclass():
                return func(*watched[0], **watched[1])
        args, kwargs = tree_map_only(cls, Work.compute, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What comes here went past Python (a function with its own backward pass): autograd has done its part already."""
        args, kwargs = tree_map_only(cls, lambda pending: pending.work.look().detach(), (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _continued(output: Pending, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What can be done without the values; None for anything else."""
    work = output.work
    if func in _POOLINGS and _of_pairs(args, kwargs):
        return work.pool(output)
    if args or func not in _RELUS:
        return None
    if func not in _IN_PLACE and not kwargs.get("inplace"):
        rectified: Tensor = _Rectified.apply(output, Work(work.layer, *work.operands, work.shape, before=work))  # type: ignore[no-untyped-call]
        return rectified
    if work.is_used or work.watched:
        return None
    work.rectified = True
    return output


@final
class Work:
    """A convolution that was put off, and what became of it.

    Attributes:
        layer: whose.
        operands: input, weight and bias.
        values: its output, once it was asked for.
        rectified: a ReLU comes behind it.
        is_used: something was computed from it already.
        watched: somebody may look at the gradient of its output.
    """

    def __init__(
        self,
        layer: nn.Conv2d,
        image: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: Any,
        before: Work | None = None,
    ) -> None:
        self.layer, self.operands, self.shape = layer, (image, weight, bias), shape
        self.padding = [int(shape[8]), int(shape[9])]
        self.values: Tensor | None = None
        self.rectified = before is not None
        self.is_used = self.watched = False
        self._before = before
        self._behind: list[weakref.ref[Work]] = []
        if before is not None:
            before.is_used = True
            before._behind.append(weakref.ref(self))
        self._versions = self._versions_now()
        self._values_version = 0
        self._output: weakref.ref[Pending] | None = None

    def output(self) -> Pending:
        """A tensor that stands for the result."""
        samples, _, outside, _, _, height, width, *_ = self.shape
        image = self.operands[0]
        pending: Pending = Tensor._make_wrapper_subclass(
            Pending, (samples, outside, height, width), dtype=image.dtype, device=image.device
        )
        pending.work, pending.valued = self, None
        self._output = weakref.ref(pending)
        return pending

    @staticmethod
    def compute(output: Pending) -> Tensor:
        """The same output with its values, behind it in autograd's graph; always the same tensor."""
        values = output.work.look()
        if output.valued is None:
            # Kept by the output, not by its work: the graph holds the work, and would be held by it in turn.
            with torch.enable_grad():
                output.valued = _Valued.apply(output, values)  # type: ignore[no-untyped-call]
        return output.valued

    @staticmethod
    def watch(output: Pending) -> Tensor:
        """The tensor that stands for this output in autograd's graph."""
        work = output.work
        work.watched = True
        return output if work.is_untouched else Work.compute(output)

    def look(self) -> Tensor:
        """The values alone, by torch's operator."""
        if self.values is None:
            self._check()
            _note(self.layer, pooled=False)
            image, weight, bias = (None if part is None else part.detach() for part in self.operands)
            with torch.no_grad():
                if self._before is not None:
                    values = torch.relu(self._before.look())
                else:
                    assert image is not None and weight is not None
                    values = torch.conv2d(image, weight, bias, padding=self.padding)
                    values = values.relu_() if self.rectified else values
            if self.values is None:  # else what came before has found these already
                self.values, self._values_version = values, values._version
            # What follows must have these values, whatever is done to them in place from here.
            for behind in self._behind:
                if (work := behind()) is not None:
                    work.look()
        return self.values

    def pool(self, output: Pending) -> Tensor | None:
        """Convolution and pooling at once; None where the kernel does not do it."""
        self._check()
        image, weight, bias = self.operands
        done = pooled(image, weight, bias, self.shape, relu=self.rectified)
        if done is None:
            return None
        self.is_used = True
        _note(self.layer, pooled=True)
        result: Tensor = _Pooled.apply(image, weight, bias, output, self, done)  # type: ignore[no-untyped-call]
        return result

    @property
    def is_untouched(self) -> bool:
        """Nobody has changed the values in place."""
        return self.values is None or self.values._version == self._values_version

    @property
    def is_alone(self) -> bool:
        """Nobody has, or may still ask for, the convolution's own output or its gradient."""
        gone = self._output is None or self._output() is None
        return gone and self.values is None and not self.watched and (self._before is None or self._before.is_alone)

    def slope(self, behind: Tensor) -> Tensor:
        """The gradient of the output, given that of what the pooling made of it. It can be differentiated again."""
        values = self.look()
        if not self.is_untouched:
            raise RuntimeError(_CHANGED)
        values = values.detach().requires_grad_()
        with torch.enable_grad():
            out = torch.max_pool2d(values, 2)
        return torch.autograd.grad(out, values, behind, create_graph=torch.is_grad_enabled())[0]

    def through_relu(self, slope: Tensor) -> Tensor:
        """The gradient in front of the ReLU."""
        masked: Tensor = torch.ops.aten.threshold_backward(slope, self.look(), 0)  # what torch's own ReLU does
        return masked

    def _versions_now(self) -> list[int]:
        return [tensor._version for tensor in self.operands if tensor is not None]

    def _check(self) -> None:
        if self._versions != self._versions_now():
            raise RuntimeError(_CHANGED)


_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: the input, the weight, "
    "the bias or the output of a convolution that max-pooling follows"
)

PATIENCE = 10
"""Uses without a pooling after which a layer that never had one is not put off any more."""

_alone: weakref.WeakKeyDictionary[nn.Conv2d, float] = weakref.WeakKeyDictionary()
"""Such uses of each layer; below zero for good once there was a pooling, so that a run that resumes computes alike."""


def _note(layer: nn.Conv2d, *, pooled: bool) -> None:
    _alone[layer] = float("-inf") if pooled else _alone.get(layer, 0) + 1


class _Deferred(Function):
    """The convolution in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor | None, work: Work) -> Tensor:
        ctx.save_for_backward(image, weight)
        ctx.set_materialize_grads(False)
        ctx.work = work
        return work.output()

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None) -> Any:
        if slope is None:  # the pooling has done it
            return None, None, None, None
        image, weight = ctx.saved_tensors
        work: Work = ctx.work
        if work.rectified:  # in place
            slope = work.through_relu(slope)
        outputs = None if work.operands[2] is None else [weight.shape[0]]
        return *torch.ops.aten.convolution_backward(
            slope, image, weight, outputs, [1, 1], work.padding, [1, 1], False, [0, 0], 1, ctx.needs_input_grad[:3]
        ), None  # fmt: skip


class _Rectified(Function):
    """A ReLU behind it."""

    @staticmethod
    def forward(ctx: Any, before: Tensor, work: Work) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.work = work
        return work.output()

    @staticmethod
    def backward(ctx: Any, slope: Tensor | None) -> Any:
        return None if slope is None else ctx.work.through_relu(slope), None


class _Valued(Function):
    """The values that somebody asked for."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return slope, None


class _Pooled(Function):
    """Convolution and pooling: its gradients go past the convolution, unless somebody looks at what is in between."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output: Tensor,
        work: Work,
        done: tuple[Tensor, Tensor],
    ) -> Tensor:
        out, codes = done
        ctx.save_for_backward(image, weight, codes)
        ctx.work = work
        return out

    @staticmethod
    def backward(ctx: Any, behind: Tensor) -> Any:
        image, weight, codes = ctx.saved_tensors
        work: Work = ctx.work
        if work.is_alone and not torch.is_grad_enabled():
            found = pooled_gradients(image, weight, behind, codes, work.shape, ctx.needs_input_grad[:3])
            if found is not None:
                return *found, None, None, None
        return None, None, None, work.slope(behind), None, None


def putting_off(native: Callable[[nn.Conv2d, Tensor], Tensor]) -> Callable[[nn.Conv2d, Tensor], Tensor]:
    """`Conv2d.forward`: puts off what may be computed together with a pooling, else as `native`."""
    known: dict[tuple[Any, ...], Any] = {}  # sizes -> those of C, None where it does not pay

    def forward(self: nn.Conv2d, input: Tensor) -> Tensor:
        if (
            torch.compiler.is_compiling()
            or type(input) is not Tensor
            or not may_pay(self)
            or _alone.get(self, 0) >= PATIENCE
        ):
            return native(self, input)
        weight, bias = self.weight, self.bias
        if _undisturbed() and input.dim() == 4 and _fit(input, weight, bias):
            key = (input.shape, weight.shape, self.padding)
            if key not in known:
                shape = convolution.sizes(input, weight, self.padding)  # type: ignore[arg-type]  # no string, see may_pay
                known[key] = shape if shape is not None and pays(shape) else None
            if (shape := known[key]) is not None:
                return _Deferred.apply(input, weight, bias, Work(self, input, weight, bias, shape))  # type: ignore
        return native(self, input)

    return forward


def _fit(image: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Plain float32 tensors of a training step."""
    return (
        type(weight) is nn.Parameter  # one that is split over ranks is of its tensor's class
        and weight.requires_grad
        and image.shape[1] == weight.shape[1]
        and not image.is_inference()
        and convolution.fits(image)
        and convolution.fits(weight)
        and (bias is None or (type(bias) is nn.Parameter and convolution.fits(bias)))
    )


def _undisturbed() -> bool:
    """A plain pass that will be differentiated: nobody counts operators, traces, transforms or casts."""
    return (
        torch.is_grad_enabled()
        and torch.get_num_threads() == convolution.THREADS
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def _of_pairs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether these arguments of a max-pooling mean windows of 2 x 2, two apart, and nothing else."""
    given = dict(zip(_POOLING_NAMES, args, strict=False)) | kwargs
    window, stride = given.get("kernel_size"), given.get("stride")
    return (
        not set(given) - set(_POOLING_NAMES)
        and _all(window, 2)
        and (stride is None or stride == [] or _all(stride, 2))
        and _all(given.get("padding", 0), 0)
        and _all(given.get("dilation", 1), 1)
        and not given.get("ceil_mode")
        and not given.get("return_indices")
    )


def _all(sizes: Any, value: int) -> bool:
    return sizes == value if isinstance(sizes, int) else tuple(sizes) in ((value,), (value, value))
