"""Parameters on several stages (an embedding tied to the output layer): every copy gets the sum of all gradients."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.dist.collectives import Group
from shardwise.dist.p2p import start_receive, start_send
from shardwise.parallel.pipeline.message import Form, pack, unpack
from shardwise.parallel.pipeline.part import PipelinePart


@final
class SharedGradientSum:
    """Sums gradients over the ranks of a pipeline that hold the same parameter.

    The first holder adds all up in the order of the ranks and sends the sum back, so that all copies see the same bits
    and equal updates keep them equal. A parameter that no holder used keeps `grad = None`.
    """

    def __init__(self, part: PipelinePart, group: Group) -> None:
        """Plan the messages.

        Args:
            part: this rank's part of the model, with its final parameters.
            group: the ranks of this pipeline.
        """
        self._group = group
        self._rank = part.rank
        parameters = dict(part.named_parameters())
        self._shared = [
            (ranks, [parameters[name] for name in names])
            for ranks, names in part.shared().items()
            if part.rank in ranks
        ]

    @property
    def bytes_per_step(self) -> int:
        """Bytes that this rank sends every step."""
        total = 0
        for ranks, parameters in self._shared:
            peers = len(ranks) - 1 if ranks[0] == self._rank else 1
            total += peers * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        return total

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the sum in every `parameter.grad`. Collective over the ranks of the pipeline."""
        for ranks, parameters in self._shared:
            gradients = [_local(parameter.grad) for parameter in parameters]
            locals_ = [_local(parameter) for parameter in parameters]
            form = Form.of([tensor for tensor in locals_ if tensor is not None], range(len(parameters)), optional=True)
            device = parameters[0].device
            if ranks[0] == self._rank:
                summed = dict(enumerate(gradients))
                for peer in ranks[1:]:
                    message = start_receive(form.empty(device), self._group, peer).wait()
                    summed = {index: _add(summed[index], other) for index, other in unpack(form, message).items()}
                message = pack(form, summed, device)
                for sent in [start_send(message, self._group, peer) for peer in ranks[1:]]:
                    sent.wait()
            else:
                start_send(pack(form, dict(enumerate(gradients)), device), self._group, ranks[0]).wait()
                message = start_receive(form.empty(device), self._group, ranks[0]).wait()
                summed = unpack(form, message)
            for index, parameter in enumerate(parameters):
                _put(parameter, summed[index])


def _add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _put(parameter: nn.Parameter, summed: Tensor | None) -> None:
    """Write a sum into the gradient that is there, which other reductions may have views of."""
    if summed is None:
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    target = _local(parameter.grad)
    assert target is not None
    target.copy_(summed)


def _local(tensor: Tensor | None) -> Tensor | None:
    """This rank's own shard of a tensor that FSDP or tensor parallelism spread over other ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
