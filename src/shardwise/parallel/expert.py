"""Expert parallelism: the experts of mixture-of-experts layers are dealt to the ranks of the expert axis.

Rank p of P holds experts p*E/P to (p+1)*E/P - 1, as a DTensor with its first dim split, so that checkpoints and exports see
whole parameters. Ranks along the axis hold different samples: each sends its tokens to the ranks of their experts and
gets the answers back, by all-to-all.

Which gradients are summed over which ranks follows from that. The experts of a rank have already seen the tokens of all
ranks along the expert axis, and their answers' gradients came back with them: their gradients are complete there, and are
summed over the other axes only. All other parameters are summed over the expert axis too. No gradient is divided by a
degree, because each rank's loss is its share of the mean over the global batch.
"""

from __future__ import annotations

import torch
from torch import nn

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.errors import PlanError
from shardwise.nn.experts import Place, declared_experts, modules_with_experts
from shardwise.nn.moe import MoE
from shardwise.parallel.norm import BatchState
from shardwise.spec.layout import Layout


def check_experts(model: nn.Module, layout: Layout, *, splits_share: bool) -> None:
    """Refuse what cannot be split over experts, or not exactly.

    Args:
        model: as the user built it.
        layout: of the plan.
        splits_share: whether a worker's share of the global batch is walked through in micro-batches.

    Raises:
        PlanError: names the module or parameter, the rule, and what to do.
    """
    found = modules_with_experts(model)
    if layout.expert > 1:
        if not found:
            raise PlanError(
                f"plan {layout}: the model has no experts to split ({_looked_at(model)}); use shardwise.nn.MoE, declare "
                "stacked experts of your own with shardwise.nn.declare_experts, or leave expert out of the plan"
            )
        for name, _, experts in found:
            if experts.count % layout.expert:
                fitting = [str(d) for d in range(1, experts.count + 1) if experts.count % d == 0]
                raise PlanError(
                    f"plan {layout}: {name or 'the model'} has {experts.count} experts, which expert={layout.expert} does "
                    f"not divide; use one of {', '.join(fitting)}"
                )
        _check_owners(model, layout)
    for name, module, _ in found:
        if isinstance(module, MoE):
            _check_moe(name, module, layout, splits_share=splits_share)


def expert_parameters(model: nn.Module) -> set[str]:
    """Names of the stacked parameters of experts, dealt out or not."""
    experts = {id(module.get_parameter(name)) for _, module, each in modules_with_experts(model) for name in each.names}
    return {name for name, parameter in model.named_parameters() if id(parameter) in experts}


def forward_meets_others(model: nn.Module, layout: Layout) -> bool:
    """Whether forward passes hold collectives because of experts, so that every rank must walk through all of them."""
    if layout.replicas * layout.context == 1:
        return False
    return any(
        layout.expert > 1 or not isinstance(module, MoE) or bool(_over_all_tokens(module))
        for _, module, _ in modules_with_experts(model)
    )


def split_experts(model: nn.Module, mesh: Mesh, state: BatchState) -> set[str]:
    """Tell every module with experts where tokens and experts are, and deal its experts out, in place. Collective.

    To be called wherever the model has experts, also without an expert axis: losses over the global batch and capacities
    need the other ranks' tokens. The model must hold all experts, with equal values on every rank.

    Args:
        model: accepted by `check_experts`.
        mesh: all ranks.
        state: tells of phantoms.

    Returns:
        Names of the parameters that are split now.
    """
    found = modules_with_experts(model)
    if not found:
        return set()
    # Groups of their own: what layers send must not depend on when gradients of other layers are ready.
    tokens = mesh.group("data", "shard", "context", "expert").twin()
    experts = mesh.group("expert").twin()
    device = next(p.device for p in model.parameters() if not p.is_meta)
    members = experts.gather(torch.tensor(tokens.rank, device=device)).tolist()
    everywhere = mesh.group("data", "shard", "context", "expert", "pipeline")
    place = Place(tokens, experts, tuple(members), lambda: state.phantom, everywhere)
    replaced: dict[int, nn.Parameter] = {}
    for _, module, declared in found:
        declared.place = place
        if experts.size > 1:
            for name in declared.names:
                whole = module.get_parameter(name)
                if id(whole) not in replaced:
                    replaced[id(whole)] = _deal(whole, experts, mesh)
                module._parameters[name] = replaced[id(whole)]
    split = {id(parameter) for parameter in replaced.values()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in split}


def _deal(whole: nn.Parameter, experts: Group, mesh: Mesh) -> nn.Parameter:
    """This rank's experts of a stacked parameter, as a DTensor of the whole shape."""
    from torch.distributed.tensor import DTensor, Shard  # takes most of a second: only where it is used

    each = whole.shape[0] // experts.size
    own = whole.detach()[experts.rank * each : (experts.rank + 1) * each].clone()
    split = DTensor.from_local(own, mesh.device_mesh("expert"), [Shard(0)], run_check=False)
    return nn.Parameter(split, requires_grad=whole.requires_grad)


def _check_owners(model: nn.Module, layout: Layout) -> None:
    """A parameter that is declared in one place and used as a plain one in another cannot be dealt out."""
    found = modules_with_experts(model)
    dealt = {id(module.get_parameter(name)) for _, module, experts in found for name in experts.names}
    for prefix, module in model.named_modules():
        experts = declared_experts(module)
        for name, parameter in module._parameters.items():
            declared = experts is not None and name in experts.names
            if parameter is not None and id(parameter) in dealt and not declared:
                raise PlanError(
                    f"plan {layout}: parameter {f'{prefix}.{name}'.strip('.')} is declared as stacked experts elsewhere "
                    "and used here as a whole; untie the two, or leave expert out of the plan"
                )


def _over_all_tokens(module: MoE) -> list[str]:
    """Settings of the layer that look at all tokens of the global batch."""
    settings = {"balance": module.balance, "z": module.z, "capacity_factor": module.capacity_factor}
    return [f"{name}={value}" for name, value in settings.items() if value]


def _check_moe(name: str, module: MoE, layout: Layout, *, splits_share: bool) -> None:
    looking = _over_all_tokens(module)
    if looking and splits_share:
        raise PlanError(
            f"MoE layer {name!r} with {looking[0]} looks at all tokens of the global batch at once, but micro_batch splits "
            "a worker's share; leave micro_batch out, use more workers, or build the layer with balance=0, z=0 and no "
            "capacity_factor"
        )
    if module.capacity_factor and layout.context > 1:
        raise PlanError(
            f"plan {layout}: MoE layer {name!r} serves tokens in the order of the global batch (capacity_factor="
            f"{module.capacity_factor}), which context splits; leave the capacity out or use data instead of context"
        )


def _looked_at(model: nn.Module) -> str:
    stacked = [
        f"{prefix}.{name} {tuple(parameter.shape)}".lstrip(".")
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
        # Torch's own layers with three dims and more are convolutions.
        if parameter is not None and parameter.dim() >= 3 and not type(module).__module__.startswith("torch.nn.")
    ]
    if stacked:
        return "undeclared parameters that look like stacked ones: " + ", ".join(stacked[:5])
    return "no parameter of a module of your own has three dims"
