"""Find out from the model itself which parameters can be split over the tensor axis, and how."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shardwise.errors import PlanError
from shardwise.parallel.tensor.dispatch import split_arguments
from shardwise.parallel.tensor.plan import Row, Share, TensorPlan
from shardwise.parallel.tensor.rehearse import Book, Family, Rehearsal
from shardwise.spec.plan import TENSOR_RULES

Program = Callable[[nn.Module], Any]

LARGE_EMBEDDING = 0.1
"""An embedding that shares its weight with no split layer is split when it has at least this part of all parameters:
below that, the sum over the ranks that it costs in every step is not worth the memory."""

MAX_REHEARSALS = 100


def find_split(
    model: nn.Module,
    program: Program,
    ranks: int,
    *,
    rules: Mapping[str, str] | None = None,
    keep: Collection[str] = (),
) -> TensorPlan:
    """Decide how the model is split over `ranks` ranks. No collective; the model is not changed.

    Args:
        model: with its weights, whole; on the meta device too (then `program` must give it meta tensors, and values are not
            compared).
        program: calls the given model on a few samples and returns its output, or better the loss (then logits that a
            loss can take in pieces stay split).
        ranks: degree of the tensor axis.
        rules: module name -> `column`, `row`, `vocabulary` or `replicate`, where the user knows better.
        keep: names of parameters that stay whole, because another axis may deal them out (experts).

    Raises:
        PlanError: nothing can be split (the message names what was looked at), a rule names no module or does not fit it,
            or the split forward pass gave another result than the whole one.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    book = Book()
    for name in keep:
        book.refused[name] = "experts are split by the expert axis"
        book.fixed.add(name)
    _apply_rules(model, rules or {}, names, book)
    expected, drew = _run(model, program, Rehearsal(names, _closed_book(book, names), ranks))
    _choose_embeddings(model, book)
    for _ in range(MAX_REHEARSALS):
        rehearsal = Rehearsal(names, book, ranks)
        before = len(book.refused)
        result, _ = _run(model, program, rehearsal)
        if not _learn(rehearsal, book) and len(book.refused) == before:
            break
    else:
        raise PlanError(
            f"tensor={ranks}: no stable split was found in {MAX_REHEARSALS} passes; name modules by "
            "tensor_rules={name: 'replicate'}"
        )
    rows = _rows(model, rehearsal, book, ranks)
    if not rehearsal.shares:
        raise PlanError(_nothing(rows, ranks))
    if not drew:
        _check_same(expected, result, ranks)
    return TensorPlan(
        ranks=ranks,
        shares=rehearsal.shares,
        rows=rows,
        inside=tuple(sorted(rehearsal.inside)),
        remarks=_remarks(rehearsal.drops),
    )


def _closed_book(book: Book, names: dict[int, str]) -> Book:
    """For the first pass, which splits nothing."""
    return Book(refused=dict.fromkeys(names.values(), ""), fixed=set(names.values()), uses=book.uses)


def _run(model: nn.Module, program: Program, rehearsal: Rehearsal) -> tuple[Any, bool]:
    """The program's result, and whether it drew random numbers. What it writes into, and the random generator, are put back."""
    tensors = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        state = torch.get_rng_state()
        hooks = [
            module.register_forward_hook(_crossing(rehearsal, name), with_kwargs=True)
            for name, module in model.named_modules()
            if name
        ]
        try:
            result = rehearsal.run(lambda: program(model))
        finally:
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                for tensor, value in tensors:
                    tensor.copy_(value)
        drew = not torch.equal(state, torch.get_rng_state())
    return pytree.tree_map_only(Tensor, torch.Tensor.detach, result), drew


def _crossing(rehearsal: Rehearsal, name: str) -> Callable[..., None]:
    """A hook that notes modules between which pieces are passed."""

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if split_arguments((args, kwargs, output), {}):
            rehearsal.inside.add(name)

    return note


def _apply_rules(model: nn.Module, rules: Mapping[str, str], names: dict[int, str], book: Book) -> None:
    modules = dict(model.named_modules())
    for module_name, how in rules.items():
        if how not in TENSOR_RULES:
            raise PlanError(f"tensor rule {module_name}={how!r}: it must be one of {', '.join(TENSOR_RULES)}")
        if module_name not in modules:
            raise PlanError(f"tensor rule {module_name}={how!r}: the model has no module of that name")
        module = modules[module_name]
        if how == "replicate":
            for parameter in module.parameters():
                book.refused[names[id(parameter)]] = "as its rule says"
                book.fixed.add(names[id(parameter)])
            continue
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() < 2:
            raise PlanError(
                f"tensor rule {module_name}={how!r}: {type(module).__name__} has no weight matrix of its own; name the "
                "layer inside it"
            )
        name = names[id(weight)]
        is_embedding = isinstance(module, nn.Embedding)
        if (how == "vocabulary") != is_embedding and how != "column":
            raise PlanError(
                f"tensor rule {module_name}={how!r}: an Embedding is split by vocabulary, and any other layer by column or row"
            )
        if is_embedding:
            book.vocabulary.add(name)
        book.forced[name] = {"row": 1, "column": 1 if is_embedding else 0, "vocabulary": 0}[how]


def _choose_embeddings(model: nn.Module, book: Book) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, uses in book.uses.items():
        if "embedding" not in uses or name in book.refused:
            continue
        tied = bool(uses & {"linear", "matmul", "__matmul__"})
        if tied or model.get_parameter(name).numel() >= LARGE_EMBEDDING * total:
            book.vocabulary.add(name)
        else:
            book.refused[name] = (
                f"it is less than {LARGE_EMBEDDING:.0%} of the model: not worth a message in every step"
            )


def _learn(rehearsal: Rehearsal, book: Book) -> bool:
    """Write down what failed; whether there is anything to try differently."""
    changed = False
    for family in rehearsal.families:
        reasons = family.reasons or ([] if family.closed else ["its output goes to no layer that could sum it"])
        if not reasons:
            continue
        if _next_outers(family, book, reasons[0]):
            changed = True
            continue
        for name in family.columns:
            if name not in book.forced and name not in book.refused:
                book.refused[name] = book.first_reasons.get(name, reasons[0])
                changed = True
    return changed


def _next_outers(family: Family, book: Book, reason: str) -> bool:
    """Choose another number of blocks for the columns of a failed family, if one is left."""
    found = False
    for name in family.columns:
        tried = book.tried.setdefault(name, {1})
        queue = [outer for outer in [*family.outers, *book.outers.get(name, [])[1:]] if outer not in tried]
        if queue:
            tried.add(queue[0])
            book.first_reasons.setdefault(name, reason)
            book.outers[name] = queue
            found = True
    return found


def _rows(model: nn.Module, rehearsal: Rehearsal, book: Book, ranks: int) -> tuple[Row, ...]:
    rows = []
    seen: set[int] = set()
    own_name = {id(parameter): name for name, parameter in model.named_parameters()}
    for module_name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if not own:
            continue
        shares = {own_name[id(p)]: rehearsal.shares.get(own_name[id(p)]) for p in own}
        saved = 0
        for parameter in own:
            share = shares[own_name[id(parameter)]]
            if share is not None and id(parameter) not in seen:
                length = parameter.shape[share.dim] // share.outer
                largest = share.outer * -(-length // ranks)
                saved += (
                    parameter.numel()
                    // parameter.shape[share.dim]
                    * (parameter.shape[share.dim] - largest)
                    * parameter.element_size()
                )
            seen.add(id(parameter))
        rows.append(
            Row(
                module=module_name,
                kind=type(module).__name__,
                how=_how(module, own, shares, own_name, rehearsal),
                bytes_saved=saved,
                why=_why(module_name, own, shares, own_name, book),
            )
        )
    return tuple(rows)


def _how(
    module: nn.Module,
    own: list[nn.Parameter],
    shares: dict[str, Share | None],
    own_name: dict[int, str],
    rehearsal: Rehearsal,
) -> str:
    if not any(shares.values()):
        return "whole"
    columns = {name for family in rehearsal.families for name in family.columns}
    for parameter in own:
        name = own_name[id(parameter)]
        share = shares[name]
        if share is None or parameter.dim() < 2:
            continue
        if isinstance(module, nn.Embedding):
            return "vocabulary" if share.dim == 0 else "column"
        return "column" if name in columns and rehearsal.book.forced.get(name) != 1 else "row"
    return "along"


def _why(
    module_name: str,
    own: list[nn.Parameter],
    shares: dict[str, Share | None],
    own_name: dict[int, str],
    book: Book,
) -> str:
    if any(shares.values()):
        blocks = max(share.outer for share in shares.values() if share is not None)
        prefix = f"{module_name}." if module_name else ""
        tied = [name for name in shares if not name.startswith(prefix)]
        notes = [f"each of {blocks} blocks"] if blocks > 1 else []
        return "; ".join(notes + [f"shares {name}" for name in tied])
    for parameter in own:
        reason = book.refused.get(own_name[id(parameter)])
        if reason:
            return reason
    uses = {use for parameter in own for use in book.uses.get(own_name[id(parameter)], set())}
    if not uses:
        return "not used on the given samples, or by functions that no split passes through"
    return f"used by {', '.join(sorted(uses))}: stays whole"


def _nothing(rows: tuple[Row, ...], ranks: int) -> str:
    looked = "; ".join(f"{row.module or '(model)'} ({row.kind}): {row.why}" for row in rows[:20])
    more = f"; and {len(rows) - 20} more" if len(rows) > 20 else ""
    return (
        f"tensor={ranks}: nothing in this model can be split over {ranks} ranks. Looked at {looked}{more}. Use data or shard "
        "instead of tensor, or name a layer by tensor_rules={'name': 'column'}"
    )


def _check_same(expected: Any, found: Any, ranks: int) -> None:
    """The rehearsal computed what the whole model computes."""
    for one, other in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        if not isinstance(one, Tensor) or not one.is_floating_point() or not one.numel() or one.is_meta:
            continue
        tolerance = 1000 * torch.finfo(one.dtype).eps * max(1.0, float(one.abs().max()))
        if torch.isclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True).all():
            continue  # where all samples are ignored the loss is nan, split or not
        distance = float((one - other).abs().max())
        raise PlanError(
            f"tensor={ranks}: the split forward pass differs from the whole one by {distance:.3g} on the given samples; "
            "the model does something that is not understood: leave out tensor, or find the module by "
            "tensor_rules={name: 'replicate'}"
        )


def _remarks(drops: bool) -> tuple[str, ...]:
    if not drops:
        return ()
    return ("dropout inside split layers draws other masks than a serial run: equal in distribution, not in value",)
