"""Whether a model can be split over the tokens of a sequence: tried out, in one process, before anything starts.

A copy of the model in float64, its weights moved a little so that none is zero, computes some samples whole, then each
part of them as the ranks would. Keys and values of the whole come from the first pass, and each part's own are compared with
them, so no communication is needed. Whatever makes a token depend on its neighbours other than by attention, or on its place
other than by `arange` and tables, gives other numbers, and is refused with the name of the first module that did.

Shapes: T tokens of a sequence, L of a part of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shardwise.errors import PlanError
from shardwise.parallel.context.attention import ATTENTION, Sequences, Sites, attention_replaced
from shardwise.parallel.context.part import Part
from shardwise.parallel.context.split import Checked, TokenDim, Wiring, sequence_length, shapes_of, take_tokens
from shardwise.parallel.context.wholes import Wholes

TOLERANCE = 1e-9
"""Largest difference relative to the largest value, in float64: rounding stays far below, a wrong position far above."""

ROUGH_TOLERANCE = 1e-4
"""The same where a model computes some of it in a lower precision, whatever it is given."""

BLOCK = 2**20
"""Numbers of noise that are drawn at a time."""

Measured = tuple[Tensor, Tensor | None]
"""A loss: mean and None, or sum and count."""


@final
@dataclass(frozen=True)
class Objective:
    """How the job measures the model; see `shardwise.spec.job.Job`. One of `loss` and `objective` is set."""

    loss: Callable[[Any, Any], Tensor] | None = None
    objective: Callable[[nn.Module, Any], Any] | None = None
    weight: Callable[[Any], Tensor | float] | None = None

    def __call__(self, model: nn.Module, inputs: Any, targets: Any) -> Measured:
        if self.objective is not None:
            value = self.objective(model, (inputs, targets))
            return (value[0], torch.as_tensor(value[1])) if isinstance(value, tuple) else (value, None)
        assert self.loss is not None
        output = _call(model, inputs)
        count = None if self.weight is None else torch.as_tensor(self.weight(targets))
        if count is not None and not count > 0:
            return torch.zeros(()), count
        mean = self.loss(output, targets)
        return (mean, None) if count is None else (mean * count, count)


def check_context(model: nn.Module, degree: int, inputs: Any, targets: Any, objective: Objective) -> Checked:
    """Try out whether parts of sequences give what whole sequences give. No communication; costs about two forward passes.

    Args:
        model: with its initial weights, not wired yet; it is not changed.
        degree: of the context axis.
        inputs, targets: some samples of the training data, at least one.
        objective: how the job measures the model.

    Returns:
        What `ContextSplit` needs to know.

    Raises:
        PlanError: the sequence is too short, or the first thing that comes out otherwise.
    """
    length = sequence_length(inputs)
    parts = [Part(length, degree, rank) for rank in range(degree)]
    # As many samples as no rank has tokens, so that neither is taken for the other; more than one, to tell them apart.
    samples = next(count for count in (2, 3, 4) if count not in parts[0].counts)
    for dtype in (torch.float64, torch.float32):
        tried = _prepared(model, dtype)
        few_inputs, few_targets = _few(inputs, samples, dtype), _few(targets, samples, dtype)
        whole, recorder = _Whole(), _Recorder()
        try:
            with _observed(tried, whole.outputs), recorder, torch.random.fork_rng(devices=[]):
                loss = objective(tried, few_inputs, few_targets)
            whole.calls = recorder.calls
            break
        except RuntimeError:
            if dtype == torch.float32:
                raise
    tolerance = ROUGH_TOLERANCE if recorder.rough else TOLERANCE
    trial = _Trial(tried, Wiring(tried), whole, Sites(), tolerance)
    measured = [_try(trial, part, objective, few_inputs, few_targets) for part in parts]
    _check_loss(loss, measured, parts, tolerance)
    try:
        trial.sites.learned()
    except PlanError as error:
        raise PlanError(f"context={degree}: {error}") from error
    outputs = _token_dims(whole.of(""), trial.own_outputs, parts[-1])
    return Checked(length, shapes_of(inputs), outputs, trial.sites)


@final
@dataclass
class _Whole:
    """What was seen of the whole sequence: keys, values and mask of each attention, outputs (name, tensors) of modules."""

    calls: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    outputs: list[tuple[str, list[Tensor]]] = field(default_factory=list)

    def of(self, wanted: str) -> list[list[Tensor]]:
        """Outputs of one module, one list a call."""
        return [tensors for name, tensors in self.outputs if name == wanted]


@final
@dataclass
class _Trial:
    """What trying out a part needs; `own_outputs` are the model's in the last one, one list a call."""

    model: nn.Module
    wiring: Wiring
    whole: _Whole
    sites: Sites
    tolerance: float
    own_outputs: list[list[Tensor]] = field(default_factory=list)


@final
class _Recorder(TorchFunctionMode):
    """Keeps what attention is called with, and whether anything is computed in less than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.rough = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = self._call(func, args, kwargs or {})
        if isinstance(result, Tensor) and result.is_floating_point() and result.dtype != torch.float64:
            self.rough = True
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is ATTENTION:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with attention_replaced(self._attend):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *rest: Any, **options: Any
    ) -> Any:
        self.calls.append((key.detach(), value.detach(), attn_mask))
        return ATTENTION(query, key, value, attn_mask, *rest, **options)


class _Differs(Exception):  # not an error of the user's: it is turned into one
    """What a part computes is not what the whole does."""


@final
class _Replayed(Sequences):
    """Keys, values and masks of the whole sequence from an earlier pass, in the order they were asked for."""

    def __init__(self, whole: _Whole, tolerance: float) -> None:
        self._whole = whole
        self._tolerance = tolerance
        self._next = 0

    def keys_values(self, part: Part, key_NHLD: Tensor, value_NHLD: Tensor) -> tuple[Tensor, Tensor]:
        # Attention to what is not split asks for nothing here.
        while self._next < len(self._whole.calls):
            key, value, _ = self._whole.calls[self._next]
            self._next += 1
            if key.shape[-2] == part.length and key.shape[:-2] == key_NHLD.shape[:-2]:
                for own, all_of_it in ((key_NHLD, key), (value_NHLD, value)):
                    if not _same(own, part.take(all_of_it, -2), self._tolerance):
                        raise _Differs("keys or values of attention")
                return key, value
        raise _Differs("the number of attention calls")

    def mask(self, part: Part, mask_L: Tensor) -> Tensor:
        for _, _, mask in self._whole.calls[self._next :]:
            if mask is not None and mask.shape[-1] == part.length:
                if mask.shape[:-1] != mask_L.shape[:-1] or not _same(mask_L, part.take(mask, -1), self._tolerance):
                    raise _Differs("a mask of attention")
                return mask
        raise _Differs("a mask of attention")


def _try(trial: _Trial, part: Part, objective: Objective, inputs: Any, targets: Any) -> Measured:
    """The loss of one part, after comparing all that can be compared."""
    seen = _Whole()
    running: list[str] = []
    wholes = Wholes(part)
    own = take_tokens(inputs, part), take_tokens(targets, part)
    wholes.know(own, (inputs, targets))
    trial.wiring.connect(part, _Replayed(trial.whole, trial.tolerance), trial.sites, wholes)
    try:
        with _observed(trial.model, seen.outputs, running), torch.random.fork_rng(devices=[]):
            measured: Measured = trial.wiring.run(objective, trial.model, *own)
    except PlanError as error:
        raise PlanError(f"context={part.degree}: in module {_named(running[-1:])}: {error}") from error
    except (_Differs, RuntimeError, ValueError, IndexError) as error:
        culprit = _first_difference(trial, seen, part) or f"module {_named(running[-1:])}"
        raise _refusal(part, culprit, str(error).splitlines()[0]) from error
    trial.own_outputs, all_of_them = seen.of(""), trial.whole.of("")
    same = len(trial.own_outputs) == len(all_of_them) and all(
        _all_same(_compared(own, objective), _compared(whole, objective), part, trial.tolerance)
        for own, whole in zip(trial.own_outputs, all_of_them, strict=True)
    )
    if not same:
        raise _refusal(part, _first_difference(trial, seen, part) or "the model itself", "its output")
    return measured


def _compared(outputs: list[Tensor], objective: Objective) -> list[Tensor]:
    """Outputs that must be the same. A scalar of a model that computes its own loss is that loss, which is over a part's own
    tokens and compared with all parts together."""
    return outputs if objective.objective is None else [tensor for tensor in outputs if tensor.dim()]


def _refusal(part: Part, culprit: str, what: str) -> PlanError:
    return PlanError(
        f"context={part.degree} with sequences of {part.length} tokens: on {part.own} of them the model does not compute what it "
        f"computes on all. First to differ: {culprit} ({what}). Tokens may meet only in scaled_dot_product_attention, and know "
        "their place only by torch.arange(tokens) and slices [:tokens] of tables; split over data or tensor instead"
    )


def _check_loss(whole: Measured, parts_measured: list[Measured], parts: list[Part], tolerance: float) -> None:
    value, count = whole
    if count is None:
        value = value.double()
        together = torch.stack([p.share * m[0].double() for p, m in zip(parts, parts_measured, strict=True)]).sum()
    else:
        value = value.double() / count
        counts = torch.stack([torch.as_tensor(m[1]) for m in parts_measured]).sum()
        together = torch.stack([m[0].double() for m in parts_measured]).sum() / counts
    if not _same(together, value, tolerance):
        raise PlanError(
            f"context={parts[0].degree}: the loss of whole sequences ({value.item():.6g}) is not the mean of the losses of their "
            f"parts ({together.item():.6g}): it must be a mean over tokens, with the targets given next to the inputs. If it "
            "leaves out some targets, give Job.weight, which counts the others, or let the objective return (sum, count)"
        )


def _prepared(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in evaluation mode, without a weight that hides what it multiplies."""
    # Copied in the other precision at once, and moved block by block: of a table of a gigabyte no third tensor is made.
    copies: dict[int, Any] = {
        id(own): nn.Parameter(own.detach().to(dtype, copy=True), own.requires_grad)
        for own in model.parameters()
        if type(own) is nn.Parameter and own.is_floating_point()
    }
    tried = copy.deepcopy(model, copies).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tried.parameters():
            if not parameter.is_floating_point():
                continue
            mean_square = float(torch.linalg.vector_norm(parameter)) ** 2 / max(1, parameter.numel())
            rows = parameter if parameter.dim() else parameter[None]
            for block in rows.split(max(1, BLOCK // max(1, rows.shape[1:].numel()))):
                noise = torch.randn(block.shape, generator=generator, dtype=torch.float32).to(block.device)
                block.add_(noise, alpha=0.3 * mean_square**0.5 + 0.1)
    return tried


def _few(tree: Any, samples: int, dtype: torch.dtype) -> Any:
    def few(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        rows = leaf[torch.arange(samples, device=leaf.device) % len(leaf)]
        return rows.to(dtype) if rows.is_floating_point() else rows

    return pytree.tree_map(few, tree)


@contextmanager
def _observed(
    model: nn.Module, outputs: list[tuple[str, list[Tensor]]], running: list[str] | None = None
) -> Iterator[None]:
    """Append (name, output tensors) of every module that has run; `running` are names of those that have not ended."""
    stack: list[str] = [] if running is None else running
    handles = []
    for name, module in model.named_modules():

        def enter(_: nn.Module, __: Any, name: str = name) -> None:
            stack.append(name)

        def leave(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            stack.pop()
            outputs.append((name, [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]))

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(trial: _Trial, seen: _Whole, part: Part) -> str:
    """The first module to end that gave other numbers, empty for none."""
    for (name, tensors), (whole_name, whole_tensors) in zip(seen.outputs, trial.whole.outputs, strict=False):
        if name != whole_name:
            break
        if not _all_same(tensors, whole_tensors, part, trial.tolerance):
            return f"module {_named([name])}, a {type(trial.model.get_submodule(name)).__name__}"
    return ""


def _named(names: list[str]) -> str:
    return repr(names[0]) if names and names[0] else "the model itself"


def _all_same(own: list[Tensor], whole: list[Tensor], part: Part, tolerance: float) -> bool:
    return len(own) == len(whole) and all(_part_same(a, b, part, tolerance) for a, b in zip(own, whole, strict=True))


def _part_same(own: Tensor, whole: Tensor, part: Part, tolerance: float) -> bool:
    """Whether `own` holds the part's tokens of `whole`, along whichever dim the tokens are, or is all of it."""
    if own.shape == whole.shape:
        return _same(own, whole, tolerance)
    split = _token_dim(own, whole, part)
    if split is None:
        return False
    if not split.folded:
        return _same(own, part.take(whole, split.dim), tolerance)
    unfolded = whole.unflatten(split.dim, (-1, part.length))
    return _same(own, part.take(unfolded, split.dim + 1).flatten(split.dim, split.dim + 1), tolerance)


def _token_dim(own: Tensor, whole: Tensor, part: Part) -> TokenDim | None:
    """The one dim in which the two differ, by the numbers of tokens; None where they do not, or otherwise."""
    dims = [dim for dim in range(min(own.dim(), whole.dim())) if own.shape[dim] != whole.shape[dim]]
    if own.dim() != whole.dim() or len(dims) != 1:
        return None
    times, rest = divmod(whole.shape[dims[0]], part.length)
    if rest or own.shape[dims[0]] != times * part.own:
        return None
    return TokenDim(dims[0], folded=times > 1)


def _token_dims(whole: list[list[Tensor]], own: list[list[Tensor]], part: Part) -> tuple[TokenDim | None, ...]:
    """For the tensors that the model returned when it was first called; empty where it never was."""
    if not whole:
        return ()
    return tuple(_token_dim(one, other, part) for one, other in zip(own[0], whole[0], strict=True))


def _same(own: Tensor, whole: Tensor, tolerance: float) -> bool:
    if own.shape != whole.shape or own.dtype != whole.dtype:
        return False
    if not own.is_floating_point():
        return bool(torch.equal(own, whole))
    own, whole = own.detach(), whole.detach()
    finite = whole[whole.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.isclose(own, whole, rtol=0, atol=tolerance * scale, equal_nan=True).all())


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)
