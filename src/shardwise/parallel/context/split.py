"""Context parallelism: the tokens of every sequence are shared out over the ranks of the context axis.

Every rank takes its tokens of the same samples through the whole model. Layers that act on each token by itself need nothing;
attention gathers the keys and values of all tokens; positions are those in the whole sequence. Each rank's loss is over its
own tokens, so gradients are summed over the context axis as over the data axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardwise.dist.collectives import Group
from shardwise.errors import JobError, PlanError
from shardwise.parallel.context.attention import Gathered, Sequences, Sites, WholeSequence
from shardwise.parallel.context.part import Part, in_order
from shardwise.parallel.context.wholes import Wholes

TOKENS = 1
"""Dim of inputs and targets that runs over the tokens of a sequence."""


@final
@dataclass(frozen=True)
class TokenDim:
    """Where the tokens are in an output.

    Attributes:
        dim: along which they run.
        folded: whether samples and tokens are folded into that dim, samples outermost.
    """

    dim: int
    folded: bool


@final
@dataclass(frozen=True)
class Checked:
    """What is known about a model that can be split.

    Attributes:
        length: T, tokens of a sequence.
        shapes: of the inputs, without the samples.
        outputs: of each tensor that the model returns, in the order of the tree; None for what is not split.
        sites: where the model asks for positions.
    """

    length: int
    shapes: tuple[tuple[int, ...], ...]
    outputs: tuple[TokenDim | None, ...]
    sites: Sites


@final
class ContextSplit:
    """Splits batches over the context axis, and lets a model work on its part.

    Use: `wire(model)` once; for each batch `local(inputs, targets)`, then the forward and backward pass on what it returns.
    """

    def __init__(self, group: Group, checked: Checked) -> None:
        """Prepare. Collective.

        Args:
            group: ranks along the context axis.
            checked: what `check_context` found.
        """
        self._group = group.twin()  # what layers send must not depend on when gradients of other layers are ready
        self._part = Part(checked.length, group.size, group.rank)
        self._checked = checked
        self._wholes = Wholes(self._part)
        self._wiring: Wiring | None = None

    @property
    def share(self) -> float:
        """Fraction of the tokens of a sample that this rank has: what a mean over them weighs."""
        return self._part.share

    def wire(self, model: nn.Module) -> None:
        """Let the model's forward pass see whole sequences, in place. Types, names and parameters stay what they are."""
        self._wiring = Wiring(model)
        self._wiring.connect(self._part, Gathered(self._group), self._checked.sites, self._wholes)

    def around(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, which calls the wired model or parts of it, with whole sequences seen by all it calls."""
        assert self._wiring is not None
        return self._wiring.run(function, *args)

    def tracing(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, which walks through a model without values and must come to the same branches as `around`."""
        with WholeSequence(self._part, None, self._checked.sites, self._wholes):
            return function(*args)

    def local(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """This rank's tokens of a batch.

        Args:
            inputs, targets: trees of tensors. Those with T entries along dim 1 are split, others stay.

        Raises:
            JobError: the inputs have other shapes than those that were checked.
        """
        shapes = shapes_of(inputs)
        if shapes != self._checked.shapes:
            raise JobError(
                f"a batch has inputs of shapes {_shown(shapes)}, and the context axis was checked for "
                f"{_shown(self._checked.shapes)} (B is any number of samples): give all batches the same shapes (pad "
                "sequences, and leave padded targets out with Job.weight), or leave context out of the plan"
            )
        own = take_tokens(inputs, self._part), take_tokens(targets, self._part)
        self._wholes.know(own, (inputs, targets))
        return own

    @torch.no_grad()
    def whole(self, output: Any) -> Any:
        """The output for the whole sequences, from all ranks' outputs for their tokens. Without gradient. Collective.

        Args:
            output: as the model returned it.
        """
        part = self._part
        leaves, tree = pytree.tree_flatten(output)
        joined = []
        for leaf, split in zip(leaves, self._checked.outputs, strict=True):
            if split is not None:
                folded = leaf.unflatten(split.dim, (-1, part.own)) if split.folded else leaf
                dim = split.dim + split.folded
                rows = folded.movedim(dim, 0)
                padded = rows.new_zeros((max(part.counts), *rows.shape[1:]))
                padded[: part.own] = rows
                every = self._group.gather(padded).flatten(0, 1)
                leaf = every.index_select(0, in_order(part.length, part.degree, leaf.device)).movedim(0, dim)
                leaf = leaf.flatten(split.dim, dim) if split.folded else leaf
            joined.append(leaf)
        return pytree.tree_unflatten(joined, tree)


@final
class Wiring:
    """Lets the forward pass of a model see whole sequences, once connected.

    Each module is wrapped, not the model alone, because recomputation calls single modules in the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap the modules of `model`, in place."""
        self._mode: WholeSequence | None = None
        self._active = False
        for module in model.modules():
            if not _is_plain(module):
                module.forward = functools.partial(self.run, module.forward)

    def connect(self, part: Part, sequences: Sequences, sites: Sites, wholes: Wholes) -> None:
        """From now on forward passes are of this part of the sequences."""
        self._mode = WholeSequence(part, sequences, sites, wholes)

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`forward(*args, **kwargs)`, which sees whole sequences."""
        if self._active or self._mode is None:
            return forward(*args, **kwargs)
        self._active = True
        try:
            with self._mode:
                return forward(*args, **kwargs)
        finally:
            self._active = False


def shapes_of(inputs: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors in a tree, without their first dims, which run over the samples."""
    return tuple(tuple(leaf.shape[1:]) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))


def _shown(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join(f"({', '.join(['B', *map(str, shape)])})" for shape in shapes)


def sequence_length(inputs: Any) -> int:
    """T: the length of dim 1 of the first input that has one.

    Raises:
        PlanError: no input has a second dim.
    """
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim() > TOKENS:
            return leaf.shape[TOKENS]
    raise PlanError(
        "context splits the tokens of sequences, which run along dim 1 of the inputs (samples, tokens, ...): no input has a "
        "dim 1; leave context out of the plan"
    )


def take_tokens(tree: Any, part: Part) -> Any:
    """This rank's tokens of every tensor in the tree that has T of them along dim 1."""

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() > TOKENS and leaf.shape[TOKENS] == part.length:
            return part.take(leaf, TOKENS).contiguous()
        return leaf

    return pytree.tree_map(take, tree)


def _is_plain(module: nn.Module) -> bool:
    """A layer of torch's own that has no other inside and looks at no sequence: it needs no wrapping."""
    own = type(module).__module__.startswith("torch.nn.modules.")
    return own and not isinstance(module, nn.MultiheadAttention) and not any(True for _ in module.children())
