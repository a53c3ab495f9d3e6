"""Experts: parameters stacked along a first dim, one entry an expert, and tokens that go to some of them.

A module that declares its stacked parameters and sends tokens with `dispatch` trains on one worker as it is, and its
experts can be dealt to the ranks of the expert axis: tokens then travel to the rank that holds their expert and back.

Shapes: T tokens of this rank, K experts a token goes to, S (token, expert) pairs, E experts in all, D features, R ranks
that hold different tokens, P ranks the experts are dealt to, L = E / P experts of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from shardwise.dist.collectives import Group
from shardwise.dist.split import local_part
from shardwise.errors import JobError

_KEY = "_shardwise_experts"


def _never() -> bool:
    return False


@final
@dataclass(frozen=True)
class Place:
    """Where the tokens and the experts of a module are; by default all here.

    Attributes:
        tokens: ranks that hold different tokens of the global batch, in the order of the batch.
        experts: ranks the experts are dealt to; each is one of `tokens`.
        members: rank in `tokens` of each member of `experts`.
        phantom: whether the tokens of the forward pass under way count for nothing.
        everywhere: the ranks that together hold all modules and all tokens: `tokens` of all pipeline stages.
    """

    tokens: Group = field(default_factory=Group)
    experts: Group = field(default_factory=Group)
    members: tuple[int, ...] = (0,)
    phantom: Callable[[], bool] = _never
    everywhere: Group = field(default_factory=Group)


@final
@dataclass(frozen=True)
class Load:
    """What the experts of one module were given in training, over all ranks.

    Attributes:
        tokens: tokens that chose each expert, one number an expert.
        dropped: how many of them found their expert full.
    """

    tokens: tuple[int, ...]
    dropped: int


@final
@dataclass
class Experts:
    """The experts that a module declared.

    Attributes:
        names: of its stacked parameters.
        count: experts in all.
        place: where they are.
        load: int64 (E + 1,), this rank's tokens of each expert and dropped ones since the last look.
    """

    names: tuple[str, ...]
    count: int
    place: Place = field(default_factory=Place)
    load: Tensor | None = None


def declare_experts(module: nn.Module, *names: str) -> None:
    """Say which parameters of `module` are stacked experts: expert e is entry e of each.

    Call it in the constructor, when the parameters are there. The module's forward pass sends tokens with `dispatch`.

    Raises:
        JobError: no names, no parameter of that name, or parameters that stack different numbers of experts.
    """
    if not names:
        raise JobError(
            f"declare_experts({type(module).__name__}) names no parameter: give the names of stacked parameters"
        )
    counts = set()
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is None or parameter.dim() == 0:
            raise JobError(
                f"declare_experts: {type(module).__name__} has no parameter {name!r} with a first dim over the experts; "
                "assign it before, as torch.nn.Parameter of shape (experts, ...)"
            )
        counts.add(parameter.shape[0])
    if len(counts) > 1:
        shapes = ", ".join(f"{name} {tuple(module.get_parameter(name).shape)}" for name in names)
        raise JobError(f"declare_experts: the first dims differ ({shapes}): all must stack the same number of experts")
    module.__dict__[_KEY] = Experts(names, counts.pop())


def declared_experts(module: nn.Module) -> Experts | None:
    """What the module itself declared, None for nothing."""
    return cast("Experts | None", module.__dict__.get(_KEY))


def modules_with_experts(model: nn.Module) -> list[tuple[str, nn.Module, Experts]]:
    """(name, module, its experts) of every module of the model that declared some."""
    return [(n, m, experts) for n, m in model.named_modules() if (experts := declared_experts(m)) is not None]


def dispatch(
    module: nn.Module,
    x_TD: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    run: Callable[..., Tensor],
    *,
    capacity_factor: float | None = None,
    counts_RE: Tensor | None = None,
) -> Tensor:
    """Send every token to its experts, and add up what they answer, weighted.

    Collective where the experts are dealt to several ranks or have a capacity: every rank calls it, with or without
    tokens, in the forward and in the backward pass.

    Args:
        module: that declared the experts.
        x_TD: tokens.
        expert_TK: indices of the K different experts of each token, int64.
        weight_TK: their weights.
        run: `(rows, counts, *parameters)` -> what the experts answer, one row for each of `rows`; the first `counts[0]`
            rows are for the first expert of `parameters`, and so on. `parameters` are those declared, or the part that
            this rank holds.
        capacity_factor: an expert takes at most this times the tokens it would get if all got the same, rounded up; the
            first in the order of the global batch. A dropped token gets nothing from that expert. None: no limit.
        counts_RE: tokens of every rank for every expert, where they are known already.

    Returns:
        Tensor (T, features of the answer), of the dtype of `x_TD`.
    """
    experts = declared_experts(module)
    if experts is None:
        raise JobError(
            f"dispatch: {type(module).__name__} declared no experts; call declare_experts in its constructor"
        )
    place = experts.place
    tokens, choices = expert_TK.shape
    order_S, own_E = sort_by_expert(expert_TK, experts)
    if counts_RE is None and (capacity_factor is not None or place.experts.size > 1):
        counts_RE = place.tokens.gather(own_E)
    if capacity_factor is not None:
        assert counts_RE is not None
        wanted_E, counts_RE = own_E, _within_capacity(counts_RE, capacity_factor)
        own_E = counts_RE[place.tokens.rank]
        order_S = order_S[_first_of_each(wanted_E, own_E)]
        _record(module, experts, wanted_E, int((wanted_E - own_E).sum()))
    else:
        _record(module, experts, own_E, 0)
    parameters = [local_part(getattr(module, name)) for name in experts.names]
    rows_SD = x_TD.index_select(0, order_S // choices)
    if place.experts.size == 1:
        y_SH = run(rows_SD, own_E.tolist(), *parameters)
    else:
        assert counts_RE is not None
        y_SH = _through_other_ranks(place, rows_SD, counts_RE, run, parameters)
    y_pairs = y_SH.new_zeros((tokens * choices, y_SH.shape[1])).index_copy(0, order_S, y_SH)
    # Added up in the order of a token's choices, which does not depend on where the experts are.
    weighted_TKH = y_pairs.view(tokens, choices, y_SH.shape[1]) * weight_TK.unsqueeze(2)
    return weighted_TKH.sum(1).to(x_TD.dtype)


def sort_by_expert(expert_TK: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """Pairs (token * K + choice) sorted by expert, in order within one; and the pairs of each expert. None of a phantom."""
    flat_S = expert_TK.reshape(-1)
    if experts.place.phantom():
        flat_S = flat_S[:0]
    return torch.argsort(flat_S, stable=True), torch.bincount(flat_S, minlength=experts.count)


def expert_load(model: nn.Module) -> dict[str, Load]:
    """Tokens that each expert was given in training since the last call, over all ranks. Collective.

    Returns:
        Name of each module with experts -> its load.
    """
    found = modules_with_experts(model)
    if not found:
        return {}
    device = next(model.parameters()).device
    loads = [e.load if e.load is not None else torch.zeros(e.count + 1, dtype=torch.int64) for _, _, e in found]
    sums = found[0][2].place.everywhere.sum_(torch.cat([load.to(device) for load in loads])).tolist()
    answer, start = {}, 0
    for name, _, experts in found:
        numbers = sums[start : start + experts.count + 1]
        answer[name] = Load(tuple(numbers[:-1]), numbers[-1])
        start += experts.count + 1
        experts.load = None
    return answer


def in_backward() -> bool:
    """Whether a backward pass is under way: a forward pass inside it is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def _record(module: nn.Module, experts: Experts, wanted_E: Tensor, dropped: int) -> None:
    if not module.training or in_backward():
        return
    new = torch.cat([wanted_E, wanted_E.new_tensor([dropped])])
    experts.load = new if experts.load is None else experts.load + new


def _within_capacity(counts_RE: Tensor, factor: float) -> Tensor:
    """Of the tokens of each rank for each expert, those that find room: ranks are served in order."""
    capacity = math.ceil(factor * int(counts_RE.sum()) / counts_RE.shape[1])
    before_RE = counts_RE.cumsum(0) - counts_RE
    return torch.minimum(counts_RE, (capacity - before_RE).clamp(min=0))


def _first_of_each(counts_E: Tensor, kept_E: Tensor) -> Tensor:
    """Mask over pairs sorted by expert: the first `kept_E[e]` of expert e's `counts_E[e]`."""
    start_E = counts_E.cumsum(0) - counts_E
    place_S = torch.arange(int(counts_E.sum()), device=counts_E.device) - start_E.repeat_interleave(counts_E)
    return place_S < kept_E.repeat_interleave(counts_E)


def _through_other_ranks(
    place: Place, rows_SD: Tensor, counts_RE: Tensor, run: Callable[..., Tensor], parameters: list[Tensor]
) -> Tensor:
    """Rows, sorted by expert, to the ranks of their experts; the experts there; the answers back."""
    group = place.experts
    counts_PPL = counts_RE[list(place.members)].view(group.size, group.size, -1)  # from, to, expert there
    send = counts_PPL[group.rank].sum(1).tolist()
    here_PL = counts_PPL[:, group.rank]
    receive = here_PL.sum(1).tolist()
    # Rows come in sorted by sender, then expert; experts want theirs side by side.
    local = torch.arange(here_PL.shape[1], device=here_PL.device).repeat(group.size)
    order = torch.argsort(local.repeat_interleave(here_PL.reshape(-1)), stable=True)
    arrived = _exchange(rows_SD, group, send, receive)
    answers = run(arrived.index_select(0, order), here_PL.sum(0).tolist(), *parameters)
    sorted_back = torch.empty_like(order)
    sorted_back[order] = torch.arange(len(order), device=order.device)
    return _exchange(answers.index_select(0, sorted_back), group, receive, send)


def _exchange(rows: Tensor, group: Group, send: list[int], receive: list[int]) -> Tensor:
    return cast("Tensor", _Exchange.apply(rows, group, send, receive))  # type: ignore[no-untyped-call]


class _Exchange(torch.autograd.Function):
    """All-to-all; the gradient of a row goes back to where the row came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group, send: list[int], receive: list[int]) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return group.exchange(rows.contiguous(), send, receive)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(gradient.contiguous(), ctx.group, ctx.receive, ctx.send), None, None, None
