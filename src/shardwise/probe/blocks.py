"""From the counted calls of two steps of different size to blocks and operations that hold for any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from shardwise.probe.count import Call, Counted, draws
from shardwise.probe.operations import size_bytes
from shardwise.spec.facts import BlockFacts, ModelFacts
from shardwise.spec.work import OperationFacts

LARGE = 0.15
"""A module that does more than this part of the work is looked into: its parts become blocks of their own."""

INSIDE = 0.8
"""... if its parts do at least this share of it. The rest is done by functions between them, which belong to no part."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def block_names(model: nn.Module, calls: Sequence[Call]) -> list[str]:
    """Modules that become blocks, in the order of execution: the model's own parts, and the parts of large ones."""
    work: dict[str, float] = {}
    order: dict[str, int] = {}
    for number, call in enumerate(calls):
        for name in _above(call.module):
            work[name] = work.get(name, 0.0) + call.flops + call.moved_bytes
            if call.phase == "forward":
                order.setdefault(name, number)
    whole = max(work.get("", 0.0), 1.0)
    found: list[str] = []

    def descend(name: str, module: nn.Module) -> None:
        inner = [(f"{name}.{child}" if name else child, part) for child, part in module.named_children()]
        inner = [(path, part) for path, part in inner if path in order or isinstance(part, _CONTAINERS)]
        own = work.get(name, 0.0)
        parts = sum(work.get(path, 0.0) for path, _ in inner)
        opened = not name or isinstance(module, _CONTAINERS) or (own > LARGE * whole and parts > INSIDE * own)
        if not inner or not opened:
            if name in order:
                found.append(name)
            return
        for path, part in inner:
            descend(path, part)

    descend("", model)
    return sorted(dict.fromkeys(found), key=lambda name: order[name]) or [""]


def operations_of(
    low: Counted, high: Counted, owner: Callable[[Sequence[Call]], list[int]]
) -> tuple[list[OperationFacts], bool]:
    """Operations as linear functions of the samples; False where the steps differ in more than size.

    Then (experts whose tokens move, branches) the larger step counts, and all of it grows with the samples.
    """
    pairs = list(zip(low.calls, high.calls, strict=False))
    alike = len(low.calls) == len(high.calls) and all(one.name == other.name for one, other in pairs)
    linear = alike and high.samples > low.samples
    places = owner(high.calls)
    tally: dict[tuple[object, ...], int] = {}
    for index, (call, block) in enumerate(zip(high.calls, places, strict=True)):
        before = low.calls[index] if linear else None
        flops, moved = (
            _line(low.samples, high.samples, before.flops if before else None, call.flops),
            _line(low.samples, high.samples, before.moved_bytes if before else None, call.moved_bytes),
        )
        key = (block, call.phase, call.kind, call.precision, *flops, *moved, call.weighted)
        tally[key] = tally.get(key, 0) + 1
    found = [
        OperationFacts(
            block=int(str(block)),
            phase=phase,  # type: ignore[arg-type]
            kind=str(kind),
            precision=str(precision),
            calls=count,
            fixed_flops=numbers[0],  # type: ignore[arg-type]
            sample_flops=numbers[1],  # type: ignore[arg-type]
            fixed_bytes=numbers[2],  # type: ignore[arg-type]
            sample_bytes=numbers[3],  # type: ignore[arg-type]
            weighted=bool(numbers[4]),
        )
        for (block, phase, kind, precision, *numbers), count in tally.items()
    ]
    return found, alike


def owners(names: Sequence[str], calls: Sequence[Call]) -> list[int]:
    """Index of the block of each call. What runs between two blocks (functions in a module's own forward) belongs to the
    block before it; the optimizer's work to none in particular, so to the last."""
    index = {name: number for number, name in enumerate(names)}
    found: list[int] = []
    latest = 0
    for call in calls:
        inside = [index[name] for name in _above(call.module) if name in index]
        if inside:
            latest = inside[-1]
        elif call.phase == "optimizer":
            latest = len(names) - 1
        found.append(latest)
    return found


def model_facts(
    model: nn.Module,
    name: str,
    names: Sequence[str],
    low: Counted,
    high: Counted,
    operations: Sequence[OperationFacts],
    split_names: frozenset[str] = frozenset(),
    notes: tuple[str, ...] = (),
    origin: str = "counted",
) -> ModelFacts:
    """The model block by block.

    Args:
        names: of the blocks, in the order of execution.
        split_names: parameters that tensor parallelism can split.
        origin: `counted` on fake tensors, or `measured` in a real step.
    """
    drawn = {place for call, place in zip(high.calls, owners(names, high.calls), strict=True) if draws(call.name)}
    modules = dict(model.named_modules())
    seen: set[int] = set()
    blocks = []
    for index, block in enumerate(names):
        parameters = [(f"{block}.{n}" if block else n, p) for n, p in modules[block].named_parameters()]
        parameters = [(path, p) for path, p in parameters if id(p) not in seen]
        seen |= {id(p) for _, p in parameters}
        if index == len(names) - 1:  # what no block holds: parameters of the modules around the blocks
            parameters += [(path, p) for path, p in model.named_parameters() if id(p) not in seen]
        trained = sum(p.numel() for _, p in parameters if p.requires_grad)
        mine = [item for item in operations if item.block == index]
        ahead = [item for item in mine if item.phase == "forward"]
        split = sum(p.numel() for path, p in parameters if path in split_names)
        blocks.append(
            BlockFacts(
                name=block,
                parameters=trained,
                frozen_parameters=sum(p.numel() for _, p in parameters if not p.requires_grad),
                forward_flops=sum(item.calls * item.flops(1) for item in ahead),
                backward_flops=sum(item.calls * item.flops(1) for item in mine if item.phase == "backward"),
                forward_bytes=sum(item.calls * item.sample_bytes for item in ahead),
                saved_bytes=_slope(low, high, block),
                output_bytes=high.output_bytes.get(block, 0.0) / high.samples,
                kernels=sum(item.calls for item in ahead if item.kind != "view"),
                tensor_fraction=split / trained if trained else 0.0,
                stochastic=index in drawn,
                batch_coupled=any(isinstance(part, _BatchNorm) for part in modules[block].modules()),
            )
        )
    return ModelFacts(name=name, blocks=tuple(blocks), tied_groups=tied(model), origin=origin, notes=notes)


def tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of parameters that are one tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def parameter_bytes(model: nn.Module) -> float:
    """Bytes of parameters and buffers."""
    return float(sum(size_bytes(tensor) for tensor in (*model.parameters(), *model.buffers())))


def _line(low: int, high: int, at_low: float | None, at_high: float) -> tuple[float, float]:
    """(fixed, per sample) of a straight line through two sizes; through the origin where there is one size."""
    if at_low is None or at_low > at_high:
        return 0.0, at_high / high
    slope = (at_high - at_low) / (high - low)
    return max(0.0, at_high - slope * high), slope


def _slope(low: Counted, high: Counted, block: str) -> float:
    """Kept bytes of a block for one sample more."""
    most = _under(high.saved_bytes, block)
    if high.samples == low.samples:
        return most / high.samples
    return max(0.0, (most - _under(low.saved_bytes, block)) / (high.samples - low.samples))


def _under(values: Mapping[str, float], block: str) -> float:
    return sum(size for name, size in values.items() if name == block or name.startswith(f"{block}.") or not block)


def _above(name: str) -> list[str]:
    """`a.b.c` as `["", "a", "a.b", "a.b.c"]`."""
    parts = name.split(".") if name else []
    return ["", *(".".join(parts[:count]) for count in range(1, len(parts) + 1))]
