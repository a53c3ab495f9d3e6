"""A backward pass in two halves: the gradients of activations, which another stage waits for, and those of weights, later.

Torch's split of the backward pass (`torch.distributed.pipelining`) finds the weights by walking from a stage's inputs. A weight
that no input leads to gets no gradient, without an error: an embedding of tokens that a later stage looks up, for one. And
some graphs (a weight used twice) cannot be run in halves at all. So the halves of every new shape of autograd graph are
compared with a whole backward pass when it is first met; where they differ, the pass stays whole.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

AGREE = 1e-3
"""Gradients that differ by less than this part of their size are the same one: above the rounding of bfloat16 sums in another
order, below anything that is left out."""

Shape: TypeAlias = tuple[Any, ...]


@final
class Halves:
    """Backward passes of one rank's stages, in halves where that is the same."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self._weights = [weight for weight in weights if weight.requires_grad]
        self._sound: dict[Shape, bool] = {}

    def inputs(
        self, stage: int, outputs: list[Tensor], gradients: list[Tensor] | None, leaves: list[Tensor]
    ) -> Callable[[], None] | None:
        """Put the gradients of the leaves into their `grad`.

        Args:
            stage: whose pass it is.
            outputs: with their autograd graph, which is used up.
            gradients: of the outputs; None for a scalar objective.
            leaves: activations of the stage before.

        Returns:
            What adds the gradients of the weights to their `grad`; None where that is done as well.
        """
        shape = (stage, _shape_of(outputs))
        if shape not in self._sound:
            self._sound[shape] = self._compare(outputs, gradients, leaves)
            if not self._sound[shape]:
                logging.getLogger("shardwise").info(
                    "stage %d: its backward pass cannot be halved and stays whole", stage
                )
            return None
        if not self._sound[shape]:
            torch.autograd.backward(outputs, gradients)
            return None
        _, groups = stage_backward_input(_owned(outputs), gradients, leaves, iter(self._weights))
        return functools.partial(_finish, self._weights, groups)

    def _compare(self, outputs: list[Tensor], gradients: list[Tensor] | None, leaves: list[Tensor]) -> bool:
        """Take a whole pass, and say whether halves give the same."""
        wanted = [*leaves, *self._weights]
        whole = torch.autograd.grad(outputs, wanted, gradients, retain_graph=True, allow_unused=True)
        before = [tensor.grad for tensor in wanted]
        for tensor in wanted:
            tensor.grad = None
        try:
            _, groups = stage_backward_input(_owned(outputs), gradients, leaves, iter(self._weights))
            stage_backward_weight(iter(self._weights), groups)
            sound = all(_alike(tensor.grad, expected) for tensor, expected in zip(wanted, whole, strict=True))
        except Exception:  # noqa: BLE001  # whatever it is, the whole pass went through
            sound = False
        for tensor, old, new in zip(wanted, before, whole, strict=True):
            tensor.grad = old if new is None else new if old is None else old + new
        return sound


def _owned(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Copies that torch can cut off from their graph in place, which it cannot do to views, to activations handed through, and
    to what the stage itself needs again."""
    return [output.clone() for output in outputs]


def _finish(weights: list[nn.Parameter], groups: list[dict[str, Any]]) -> None:
    stage_backward_weight(iter(weights), groups)


def _alike(found: Tensor | None, expected: Tensor | None) -> bool:
    if expected is None:
        return found is None or not found.any()
    if found is None:
        return not expected.any()
    return bool((found - expected).norm() <= AGREE * expected.norm())


def _shape_of(outputs: Sequence[Tensor]) -> Shape:
    """The operations of an autograd graph, and how they hang together."""
    places: dict[Any, int] = {}
    described: list[Any] = []
    stack = [output.grad_fn for output in reversed(outputs)]
    while stack:
        node = stack.pop()
        if node is None or node in places:
            continue
        places[node] = len(places)
        following = [following for following, _ in node.next_functions]
        described.append((node.name(), tuple(places.get(each, -1) for each in following)))
        stack.extend(reversed(following))
    return tuple(described)
