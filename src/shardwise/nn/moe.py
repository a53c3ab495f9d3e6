"""MoE: a feed-forward layer of several experts, of which a router picks a few for each token.

Shapes: T tokens of this rank, D features (`width`), H hidden features, E experts, K experts a token goes to (`top_k`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn

from shardwise.dist.collectives import Group
from shardwise.errors import JobError
from shardwise.nn.experts import Place, declare_experts, declared_experts, dispatch, in_backward, sort_by_expert
from shardwise.nn.grouped import grouped_linear

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


@final
class MoE(nn.Module):
    """Tokens (..., D) -> (..., D): each goes through the `top_k` experts that the router likes best.

    The router is a softmax over all experts, computed at least in float32 (Fedus et al. 2021, section 2.4). No token is
    dropped unless there is a `capacity_factor`, and never in evaluation mode.

    Two auxiliary losses keep the router healthy. They are part of the objective only where the user adds them, with
    `auxiliary_loss` (of this module or this package) or by `with_auxiliary_loss`; a backward pass without them is an
    error. Both are over the tokens of the global batch, whatever the layout.
    - balance (Fedus et al. 2021, equation 4): E times the sum over the experts of the fraction of choices that fell on the
      expert times its mean probability. 1 where the experts are evenly used.
    - z (Zoph et al. 2022, equation 5): mean of the squared logarithm of the sum of the exponentials of a token's logits.

    Initial weights are those of `torch.nn.Linear`: uniform within one over the square root of the inputs.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int = 2,
        *,
        capacity_factor: float | None = None,
        balance: float = 0.01,
        z: float = 0.0,
        activation: Literal["gelu", "relu", "silu"] = "gelu",
        gated: bool = False,
        bias: bool = False,
        renormalize: bool | None = None,
    ) -> None:
        """Make the layer.

        Args:
            width: features of a token.
            hidden: features inside of an expert.
            experts: how many.
            top_k: experts a token goes to.
            capacity_factor: an expert takes at most this times an even share of the choices; None for all.
            balance: weight of the load-balancing loss.
            z: weight of the router's z-loss.
            activation: between the two linear layers of an expert.
            gated: the hidden features are the activation of one linear map times another (SwiGLU and its kind).
            bias: whether the experts have biases.
            renormalize: whether the weights of a token's experts sum to 1, instead of to their probability. None: where
                a token has more than one (with one, a weight that is always 1 would leave the router untrained).

        Raises:
            JobError: a number that makes no layer.
        """
        super().__init__()
        _check(width, hidden, experts, top_k, capacity_factor, balance, z, activation)
        self.width, self.hidden, self.top_k = width, hidden, top_k
        self.capacity_factor, self.balance, self.z = capacity_factor, balance, z
        self.activation, self.gated = activation, gated
        self.renormalize = top_k > 1 if renormalize is None else renormalize
        self.router = nn.Linear(width, experts, bias=False)
        self.w_in = nn.Parameter(torch.empty(experts, width, hidden * (2 if gated else 1)))
        self.w_out = nn.Parameter(torch.empty(experts, hidden, width))
        names = ["w_in", "w_out"]
        self.b_in: nn.Parameter | None = None
        self.b_out: nn.Parameter | None = None
        if bias:
            self.b_in = nn.Parameter(torch.empty(experts, self.w_in.shape[2]))
            self.b_out = nn.Parameter(torch.empty(experts, width))
            names += ["b_in", "b_out"]
        self._auxiliary: list[Tensor] = []
        self.reset_parameters()
        declare_experts(self, *names)

    @property
    def experts(self) -> int:
        """How many experts there are, on all ranks together."""
        return self.router.out_features

    def reset_parameters(self) -> None:
        """Draw new initial weights."""
        self.router.reset_parameters()
        for weight, bias in ((self.w_in, self.b_in), (self.w_out, self.b_out)):
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"experts={self.experts}, width={self.width}, hidden={self.hidden}, top_k={self.top_k}"

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., D) -> (..., D). Collective under expert parallelism, and in training with auxiliary losses."""
        x_TD = x.reshape(-1, self.width)
        with torch.autocast(x.device.type, enabled=False):
            logits_TE = self.router(x_TD.to(self.router.weight.dtype))
        probability_TE = logits_TE.softmax(1)
        expert_TK = probability_TE.detach().topk(self.top_k, dim=1).indices
        counts_RE = None
        if self.training and (self.balance or self.z):
            probability_TE, counts_RE = self._balanced(logits_TE, probability_TE, expert_TK)
        weight_TK = probability_TE.gather(1, expert_TK)
        if self.renormalize:
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        factor = self.capacity_factor if self.training else None
        y_TD = dispatch(
            self, x_TD, expert_TK, weight_TK, self._run, capacity_factor=factor, counts_RE=counts_RE
        )  # fmt: skip
        return y_TD.view(x.shape)

    def auxiliary_loss(self) -> Tensor:
        """Weighted balance and z loss of the training passes since the last call, a scalar to add to the objective.

        Zero in evaluation mode: it guides the router and says nothing about the model.
        """
        return _summed(self.take_auxiliary(), self.router.weight)

    def take_auxiliary(self) -> list[Tensor]:
        """The parts of `auxiliary_loss`, one a pass, which it will not hold any more."""
        parts, self._auxiliary = self._auxiliary, []
        return parts

    def put_auxiliary(self, parts: list[Tensor]) -> None:
        """Give `auxiliary_loss` parts that `take_auxiliary` took, of this layer or of its copy on another pipeline stage."""
        self._auxiliary += parts

    def _run(
        self,
        rows_SD: Tensor,
        counts: list[int],
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None = None,
        b_out: Tensor | None = None,
    ) -> Tensor:
        hidden_SH = grouped_linear(rows_SD, counts, w_in, b_in)
        activate = _ACTIVATIONS[self.activation]
        if self.gated:
            gate_SH, value_SH = hidden_SH.chunk(2, dim=1)
            hidden_SH = activate(gate_SH) * value_SH
        else:
            hidden_SH = activate(hidden_SH)
        return grouped_linear(hidden_SH, counts, w_out, b_out)

    def _balanced(self, logits_TE: Tensor, probability_TE: Tensor, expert_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Add the auxiliary loss of this pass to `_auxiliary`.

        Returns:
            The probabilities, to be used from here on, and the tokens of every rank for every expert.
        """
        experts = declared_experts(self)
        assert experts is not None
        place: Place = experts.place
        own_E = sort_by_expert(expert_TK, experts)[1]
        square_T = logits_TE.logsumexp(1).square()
        probability_TE, sums, counts_RE = cast(
            "tuple[Tensor, Tensor, Tensor]",
            _OverAllTokens.apply(  # type: ignore[no-untyped-call]
                probability_TE, square_T, own_E, place.tokens, place.phantom()
            ),
        )
        choice_E = counts_RE.sum(0).to(sums.dtype)
        choices = choice_E.sum()
        tokens = choices / self.top_k
        balance = self.experts * (choice_E / choices * (sums[:-1] / tokens)).sum()
        loss = self.balance * balance + self.z * (sums[-1] / tokens)
        # A recomputation does the same work again, but the loss has been taken already.
        if torch.is_grad_enabled() and not in_backward():
            self._auxiliary.append(loss)
        return probability_TE, counts_RE


class _OverAllTokens(torch.autograd.Function):
    """Sums over the tokens of all ranks: of the probabilities (E values) and of the squares (1 value, the last).

    The probabilities are passed through, so that every rank comes to the collective of the backward pass, even one whose
    objective leaves the sums out.
    """

    @staticmethod
    def forward(
        ctx: Any, probability_TE: Tensor, square_T: Tensor, counts_E: Tensor, group: Group, phantom: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        experts = len(counts_E)
        # Counts are exact in float64, and travel in the same message.
        own = torch.cat([probability_TE.sum(0).double(), square_T.sum().double().view(1), counts_E.double()])
        every_RX = group.gather(torch.zeros_like(own) if phantom else own)
        sums = every_RX[:, : experts + 1].sum(0).to(probability_TE.dtype)
        counts_RE = every_RX[:, experts + 1 :].round().long()
        ctx.group, ctx.phantom, ctx.shape, ctx.like = group, phantom, probability_TE.shape, sums
        ctx.mark_non_differentiable(counts_RE)
        ctx.set_materialize_grads(False)
        return probability_TE.view_as(probability_TE), sums, counts_RE

    @staticmethod
    def backward(ctx: Any, through_TE: Tensor | None, dsums: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dsums is None:
            raise JobError(
                "a MoE layer has an auxiliary loss (balance or z) that is no part of the objective: give the job "
                "objective=shardwise.nn.with_auxiliary_loss(loss) instead of loss=, add shardwise.nn.auxiliary_loss(model) "
                "in an objective of your own, or build the layer with balance=0 and z=0"
            )
        # Each rank's objective holds its share of the loss, so the gradient of the whole is the sum of all ranks'.
        dsums = ctx.group.sum_(dsums.clone())
        dprobability_TE = ctx.like.new_zeros(ctx.shape) if through_TE is None else through_TE
        if ctx.phantom:
            return dprobability_TE, None, None, None, None
        return dprobability_TE + dsums[:-1], dsums[-1].expand(ctx.shape[0]), None, None, None


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Sum of the auxiliary losses of all `MoE` layers of a model in its training passes since the last call.

    A scalar over the *global* batch, the same on every rank, to be added to a mean, or times its count to a sum.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    return _summed([part for layer in layers for part in layer.take_auxiliary()], next(model.parameters()))


def _summed(parts: list[Tensor], like: Tensor) -> Tensor:
    # Of `like` nothing is read: in a pipeline it may be on another stage.
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=like.dtype, device=like.device)


def with_auxiliary_loss(
    loss: Callable[[Any, Any], Tensor], weight: Callable[[Any], Tensor | float] | None = None
) -> Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]:
    """The objective `loss(model(inputs), targets)` plus the model's auxiliary losses, for `Job.objective`.

    Args:
        loss: `(output, target)` -> mean over the samples, or over what `weight` counts.
        weight: `target` -> how many items the loss is a mean over, as `Job.weight`.
    """

    def objective(model: nn.Module, batch: Any) -> Tensor | tuple[Tensor, Tensor]:
        inputs, targets = batch
        for module in model.modules():
            if isinstance(module, MoE):
                module.take_auxiliary()  # what passes outside of the objective left
        if isinstance(inputs, tuple):
            output = model(*inputs)
        else:
            output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        mean = loss(output, targets)
        if weight is None:
            return mean + auxiliary_loss(model)
        count = torch.as_tensor(weight(targets), device=mean.device)
        # The mean over nothing is not a number; its gradient must still meet those of the other ranks.
        mean = mean if count > 0 else _zero_of(output)
        return (mean + auxiliary_loss(model)) * count, count

    return objective


def _zero_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return (output * 0).sum()
    parts = list(output.values()) if isinstance(output, dict) else list(output)
    return torch.stack([_zero_of(part) for part in parts]).sum()


def _check(
    width: int, hidden: int, experts: int, top_k: int, factor: float | None, balance: float, z: float, activation: str
) -> None:
    for name, value in (("width", width), ("hidden", hidden), ("experts", experts), ("top_k", top_k)):
        if not isinstance(value, int) or value < 1:
            raise JobError(f"MoE({name}={value!r}): give a whole number of at least 1")
    if top_k > experts:
        raise JobError(f"MoE(top_k={top_k}, experts={experts}): a token cannot go to more experts than there are")
    if factor is not None and not factor > 0:
        raise JobError(f"MoE(capacity_factor={factor!r}): give a number above 0, or None for no limit")
    for name, weight in (("balance", balance), ("z", z)):
        if not weight >= 0:
            raise JobError(f"MoE({name}={weight!r}): give a number of at least 0; 0 leaves this loss out")
    if activation not in _ACTIVATIONS:
        raise JobError(f"MoE(activation={activation!r}): give one of {', '.join(_ACTIVATIONS)}")
