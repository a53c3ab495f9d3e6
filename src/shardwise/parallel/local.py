"""Local SGD: replicas take steps of their own and average their weights every k steps (Stich 2019, "Local SGD converges fast and
communicates little"). Opt-in: with k above 1 the result is not that of a serial run.

Between two averages each rank steps with the gradient of its own share, times the number of ranks: the shares' gradients are
parts of the global mean, so that the mean over ranks of what they step with is the gradient of the global batch, however
unevenly it is shared. With k = 1 and an optimizer that is linear in its gradients (SGD, also with momentum and weight
decay) that makes it data parallelism.

The optimizer's state is averaged with the weights, so that after it the replicas are equal in all that a checkpoint keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardwise.dist.collectives import Group
from shardwise.errors import PlanError, RunFailed
from shardwise.parallel.norm import batch_norms
from shardwise.spec.plan import Plan


def check_local_steps(model: nn.Module, plan: Plan, *, meets_others: bool) -> None:
    """Refuse local steps where they do not apply or would have no effect.

    Args:
        model: as its user built it.
        plan: to check.
        meets_others: whether a forward pass of the model talks to other ranks.

    Raises:
        PlanError: the rule and what to do.
    """
    if plan.local_steps == 1:
        return
    given = f"plan {plan.layout} with local_steps={plan.local_steps}"
    if plan.layout.data == 1 or plan.layout.data != plan.layout.workers:
        raise PlanError(
            f"{given}: only whole replicas take steps of their own; leave local_steps out, or use data alone"
        )
    if plan.compression != "none":
        raise PlanError(
            f"{given} and compression={plan.compression!r}: local steps sum no gradients; leave one of the two out"
        )
    norms = batch_norms(model)
    if norms:
        raise PlanError(
            f"{given}: BatchNorm layer {norms[0][0]!r} looks at the samples of all replicas in every step, and its statistics "
            "are no weights to average; leave local_steps out, or use GroupNorm"
        )
    if meets_others:
        raise PlanError(
            f"{given}: the model's forward pass talks to other workers in every step; leave local_steps out"
        )


@final
class LocalSteps:
    """In the place of a gradient sum: scales gradients, sends none, and averages every `every` steps."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], group: Group, *, every: int) -> None:
        self._named = [(name, p) for name, p in parameters if p.requires_grad]
        self._group = group
        self._every = every
        self._apart = False

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights that each rank puts into the averages, per step; optimizer states come on top."""
        return sum(p.numel() * p.element_size() for _, p in self._named) // self._every

    def expect(self) -> None:
        """Nothing is sent during the backward pass."""

    @torch.no_grad()
    def finish(self, *, scale: float | Tensor | None = None) -> None:
        """Make this rank's part of the global gradient the one it steps with.

        Args:
            scale: factor for every gradient, None for no scaling.
        """
        self._apart = True
        for _, parameter in self._named:
            if parameter.grad is not None:
                parameter.grad.mul_(self._group.size)
                if scale is not None:
                    parameter.grad.mul_(scale)

    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Average where it is time. Collective.

        Args:
            optimizer: that has just stepped.
            step: global steps taken.
        """
        if step % self._every == 0:
            self.average(optimizer)

    @torch.no_grad()
    def average(self, optimizer: Optimizer) -> None:
        """Make weights and optimizer state equal on all ranks: their mean. Collective; nothing where they are equal already.

        Raises:
            RunFailed: ranks whose optimizers keep other state, because a parameter had no gradient on some of them.
        """
        if not self._apart:
            return
        self._apart = False
        found = [(name, parameter.data) for name, parameter in self._named]
        for name, parameter in self._named:
            state = optimizer.state.get(parameter, {})
            found += [
                (f"{name}/{key}", value)
                for key, value in sorted(state.items())
                if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            ]
        names = [name for name, _ in found]
        for rank, others in enumerate(self._group.gather_objects(names, "what is averaged")):
            if others != names:
                odd = sorted(set(others) ^ set(names))[0]
                raise RunFailed(
                    f"local steps: the optimizers of rank {rank} and rank {self._group.rank} differ in the state {odd}: a "
                    "parameter had no gradient on one of them, so that their steps cannot be averaged; leave local_steps out"
                )
        by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for _, tensor in found:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for tensors in by_kind.values():
            flat = self._group.sum_(torch.cat([tensor.reshape(-1) for tensor in tensors]), "the average of the weights")
            flat.div_(self._group.size)
            for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(piece.view(tensor.shape))
