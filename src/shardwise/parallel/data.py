"""Data parallelism: every rank holds the whole model and takes a part of each global batch; gradients are summed.

Each rank's loss is already divided by the *global* weight of the batch, so the sum over ranks is the gradient of the
mean over the global batch, however unevenly the samples are shared. Gradients travel in a few flat buckets, sent while
the backward pass still runs. Behind the gradients of a bucket travels one flag per parameter that says on how many ranks
it has a gradient: a parameter that no rank used keeps `grad = None`, as in a serial run, and one that only another rank
used gets that rank's gradient.

torch's DistributedDataParallel does the same job for the common case. It is not used because it averages over ranks
instead of samples, needs a forward pass on every rank in every step, fails over tensor-parallel parameters and inside
pipeline stages, and takes a parameter without gradient for an error unless it may walk the graph in every step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor, nn

from shardwise.dist.collectives import Group, Work
from shardwise.dist.split import is_dtensor, local_part
from shardwise.errors import PlanError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from shardwise.parallel.shard import Sharded

BUCKET_BYTES = 25 * 1024**2
"""Bytes of gradients sent together: large enough for bandwidth, small enough to overlap; the size DDP uses."""


@dataclass
class Bucket:
    """Gradients that travel together, and behind them a flag per parameter.

    Attributes:
        held: references to its memory before a gradient was handed out; 0 before it was filled.
    """

    names: list[str]
    parameters: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]
    gradients: list[Tensor]
    flags: Tensor
    what: str
    held: int = 0
    missing: int = 0
    sent: Work | None = None
    absent: list[int] = field(default_factory=list)


@dataclass
class _Sums:
    """What is summed while one set of parameters is trained.

    Attributes:
        sparse: names and parameters with sparse gradients.
        place: identity of a parameter -> its bucket, where buckets are sent during the backward pass.
        at_once: whether each gradient comes once in a backward pass, so that it can be sent then; None before a pass showed it.
    """

    sparse: list[tuple[str, nn.Parameter]]
    buckets: list[Bucket]
    place: dict[int, Bucket] = field(default_factory=dict)
    at_once: bool | None = None


@final
class GradientSum:
    """Sums the gradients of replicated parameters over a group of ranks.

    A parameter may be a DTensor over other mesh axes (tensor): then the group's ranks hold the same piece of it, and the
    gradients of that piece are summed.

    Use: `expect()` before the last backward pass of a step, then `finish()` after it. Between the two, buckets are sent
    as soon as their gradients exist. Buckets are always sent in the same order, so ranks whose backward passes differ
    (a branch not taken, no samples at all) still meet in the same collectives.

    Backward passes inside of a backward pass (`torch.utils.checkpoint` with reentrance) give a parameter that is used in
    several of them its gradient in pieces. The first step shows whether there are any; then buckets are sent after the pass.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        group: Group,
        *,
        sparse: Iterable[str] = (),
        sharded: Sharded | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Plan the buckets.

        Args:
            parameters: (name, parameter) pairs, shared parameters once, in the order of the module tree.
            group: ranks that hold replicas of these parameters.
            sparse: names of parameters whose gradients are sparse tensors.
            sharded: parameters that FSDP2 reduces in the backward pass; here they are only finished and scaled.
            bucket_bytes: upper bound of a bucket; a larger parameter gets a bucket of its own.
        """
        self._group = group
        sparse_names = set(sparse)
        self._sharded = sharded
        elsewhere = {id(parameter) for parameter in sharded.held} if sharded is not None else set()
        self._parameters = [(name, p) for name, p in parameters if id(p) not in elsewhere]
        self._sparse_names, self._bucket_bytes = sparse_names, bucket_bytes
        self._expecting = False
        self._next = 0
        self._kept = 1
        self._plans: dict[tuple[bool, ...], _Sums] = {}
        self._watched: set[int] = set()
        self._come: set[int] = set()
        self._plan()

    def keep_plans(self, count: int) -> None:
        """Keep the buckets of so many sets of trained parameters (at least one), for loops that train them in turn."""
        self._kept = max(1, count)

    def _plan(self) -> None:
        """Take the buckets of the parameters that are trained now."""
        trained = tuple(p.requires_grad for _, p in self._parameters)
        plan = self._plans.pop(trained, None)
        if plan is None:
            while len(self._plans) >= self._kept:  # the one that was not used for longest
                del self._plans[next(iter(self._plans))]
            plan = self._make_plan()
        self._plans[trained] = plan
        self._trained, self._sums, self._sparse, self._buckets = trained, plan, plan.sparse, plan.buckets

    def _make_plan(self) -> _Sums:
        named = [(name, p) for name, p in self._parameters if p.requires_grad]
        sparse = [(name, parameter) for name, parameter in named if name in self._sparse_names]
        dense = [(name, parameter) for name, parameter in named if name not in self._sparse_names]
        # The backward pass walks the module tree backwards, so the last parameters have their gradients first.
        buckets = [make_bucket(part) for part in in_buckets(list(reversed(dense)), self._bucket_bytes)]
        plan = _Sums(sparse, buckets)
        # With one bucket nothing can be sent before the backward pass has ended: no need for hooks.
        if self._group.size > 1 and len(buckets) > 1:
            for bucket in buckets:
                for parameter in bucket.parameters:
                    plan.place[id(parameter)] = bucket
                    if id(parameter) not in self._watched:
                        self._watched.add(id(parameter))
                        parameter.register_post_accumulate_grad_hook(self._arrived)
        return plan

    @property
    def bytes_per_step(self) -> int:
        """Bytes of dense gradients that each rank puts into the sum every step."""
        return sum(bucket.flat.numel() * bucket.flat.element_size() for bucket in self._buckets)

    def expect(self) -> None:
        """The next backward pass is the last of this step: send each bucket when its gradients are complete."""
        if tuple(p.requires_grad for _, p in self._parameters) != self._trained:  # frozen or thawed since
            self._plan()
        self._expecting = True
        self._come.clear()
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
            bucket.sent = None

    def finish(self, *, scale: float | Tensor | None = None) -> None:
        """Send what is left, wait for all, and leave the summed gradient in every `parameter.grad`.

        Args:
            scale: factor for every summed gradient, None for no scaling.
        """
        if self._group.size > 1:
            while self._next < len(self._buckets):
                self._send_next()
            for bucket in self._buckets:
                receive(bucket)
        self._expecting = False
        if self._come and self._sums.at_once is None:
            self._sums.at_once = True
        for name, parameter in self._sparse:
            self._sum_sparse(name, parameter)
        if self._sharded is not None:
            self._sharded.finish()
        if scale is not None:
            for gradient in self._gradients():
                local_part(gradient).mul_(scale)

    def _gradients(self) -> list[Tensor]:
        alone = [parameter for _, parameter in self._sparse]
        if self._sharded is not None:
            alone += self._sharded.parameters
        flats: list[Tensor] = []
        if self._group.size > 1:
            flats = [bucket.flat for bucket in self._buckets]
        else:
            alone += [parameter for bucket in self._buckets for parameter in bucket.parameters]
        return flats + [parameter.grad for parameter in alone if parameter.grad is not None]

    def _arrived(self, parameter: Tensor) -> None:
        bucket = self._sums.place.get(id(parameter)) if self._expecting else None
        if bucket is None:
            return
        if id(parameter) in self._come:
            self._sums.at_once = False
            if bucket.sent is not None:
                raise PlanError(
                    f"{bucket.what}: a parameter of shape {tuple(parameter.shape)} was given a gradient once more after it had "
                    "been sent, which no step before did: torch.utils.checkpoint ran a backward pass inside of the backward "
                    "pass. Call it with use_reentrant=False"
                )
        self._come.add(id(parameter))
        bucket.missing -= 1
        while self._sums.at_once and self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        fill(bucket)
        bucket.sent = self._group.start_sum_(bucket.flat, bucket.what)

    def _sum_sparse(self, name: str, parameter: nn.Parameter) -> None:
        """Sparse gradients differ in length: gather every rank's rows and add them up."""
        gradient = parameter.grad
        if gradient is not None and not gradient.is_sparse:
            raise PlanError(
                f"parameter {name} belongs to an embedding with sparse=True but has a dense gradient, because it is used "
                "elsewhere too; build the embedding with sparse=False"
            )
        if self._group.size == 1:
            return
        rows = gradient.coalesce() if gradient is not None else None
        indices = (
            rows.indices() if rows is not None else torch.zeros((1, 0), dtype=torch.int64, device=parameter.device)
        )
        values = rows.values() if rows is not None else parameter.new_zeros((0, *parameter.shape[1:]))
        what = f"the sparse gradient of {name}"
        used = self._group.sum_(torch.tensor([float(gradient is not None)], device=parameter.device), what)
        if used.item() == 0:
            return
        all_indices = torch.cat(self._group.gather_uneven(indices.T.contiguous(), what)).T
        all_values = torch.cat(self._group.gather_uneven(values.detach(), what))
        parameter.grad = torch.sparse_coo_tensor(
            all_indices, all_values, parameter.shape, check_invariants=False
        ).coalesce()


@final
class GradientSums:
    """Several sums, of parameters whose replicas are on different ranks."""

    def __init__(self, *sums: GradientSum) -> None:
        self._sums = sums

    @property
    def bytes_per_step(self) -> int:
        """Bytes of dense gradients that each rank puts into the sums every step."""
        return sum(each.bytes_per_step for each in self._sums)

    def keep_plans(self, count: int) -> None:
        """As `GradientSum.keep_plans`."""
        for each in self._sums:
            each.keep_plans(count)

    def expect(self) -> None:
        """The next backward pass is the last of this step."""
        for each in self._sums:
            each.expect()

    def finish(self, *, scale: float | Tensor | None = None) -> None:
        """As `GradientSum.finish`."""
        for each in self._sums:
            each.finish(scale=scale)


def sparse_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of `Embedding` and `EmbeddingBag` modules that were built with `sparse=True`."""
    found = set()
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            found.add(f"{prefix}.weight" if prefix else "weight")
    return found


def in_buckets(
    parameters: Sequence[tuple[str, nn.Parameter]], bucket_bytes: int
) -> list[list[tuple[str, nn.Parameter]]]:
    """Runs of parameters of one dtype and device, each at most `bucket_bytes` unless a single one is larger."""
    parts: list[list[tuple[str, nn.Parameter]]] = []
    by_kind: dict[tuple[torch.dtype, torch.device], int] = {}
    filled: dict[int, int] = {}
    for name, parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        size = local_part(parameter).numel() * parameter.element_size()
        place = by_kind.get(kind)
        if place is None or filled[place] + size > bucket_bytes:
            parts.append([])
            place = by_kind[kind] = len(parts) - 1
            filled[place] = 0
        parts[place].append((name, parameter))
        filled[place] += size
    return parts


def make_bucket(part: list[tuple[str, nn.Parameter]]) -> Bucket:
    """A bucket of these parameters."""
    names = [name for name, _ in part]
    parameters = [parameter for _, parameter in part]
    shapes = [local_part(parameter).shape for parameter in parameters]
    sizes = [shape.numel() for shape in shapes]
    flat = torch.zeros(sum(sizes) + len(part), dtype=parameters[0].dtype, device=parameters[0].device)
    pieces = flat.split([*sizes, len(part)])
    views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=False)]
    gradients = [_like(view, parameter) for view, parameter in zip(views, parameters, strict=True)]
    what = f"the gradient of {names[0]}" if len(names) == 1 else f"the gradients of {names[0]} ... {names[-1]}"
    return Bucket(names, parameters, flat, views, gradients, pieces[-1], what)


def _holders(bucket: Bucket) -> int:
    """How many references there are to the gradients that are handed out, and to what they share memory with."""
    storage = bucket.flat.untyped_storage()
    return sum(map(sys.getrefcount, bucket.gradients)) + torch._C._storage_Use_Count(storage._cdata)


def _leave_to_others(bucket: Bucket) -> None:
    """Somebody has kept gradients of the step before (an optimizer may): they are theirs, and the next come into new memory."""
    new = make_bucket(list(zip(bucket.names, bucket.parameters, strict=True)))
    bucket.flat, bucket.views, bucket.gradients, bucket.flags = new.flat, new.views, new.gradients, new.flags
    bucket.held = 0


def _like(local: Tensor, parameter: nn.Parameter) -> Tensor:
    """A tensor that is split as the parameter is, of which `local` is this rank's part."""
    if not is_dtensor(parameter):
        return local
    split = cast("DTensor", parameter)
    return type(split).from_local(
        local, split.device_mesh, split.placements, run_check=False, shape=split.shape, stride=split.stride()
    )


def fill(bucket: Bucket) -> None:
    """Copy this rank's gradients into the bucket; parameters without one count as zero and as not used."""
    if bucket.held and _holders(bucket) > bucket.held:
        _leave_to_others(bucket)
    if not bucket.held:
        bucket.held = _holders(bucket)
    bucket.absent = [index for index, parameter in enumerate(bucket.parameters) if parameter.grad is None]
    if not bucket.absent:
        gradients = [local_part(parameter.grad) for parameter in bucket.parameters if parameter.grad is not None]
        torch._foreach_copy_(bucket.views, gradients)
        bucket.flags.fill_(1)
        return
    bucket.flat.zero_()
    for index, (view, parameter) in enumerate(zip(bucket.views, bucket.parameters, strict=True)):
        if parameter.grad is not None:
            view.copy_(local_part(parameter.grad))
            bucket.flags[index] = 1


def receive(bucket: Bucket) -> None:
    """Wait for the sum and hand out its pieces as gradients."""
    if bucket.sent is None:
        raise AssertionError("a bucket was not sent")
    bucket.sent.wait()
    bucket.sent = None
    hand_out(bucket)


def hand_out(bucket: Bucket) -> None:
    """Make the pieces of a summed bucket the gradients; what no rank used stays without a gradient."""
    # Reading the flags waits for the device, so it is done only where this rank lacks a gradient itself.
    flags = bucket.flags.tolist() if bucket.absent else []
    unused = {index for index in bucket.absent if flags[index] == 0}
    for index, (gradient, parameter) in enumerate(zip(bucket.gradients, bucket.parameters, strict=True)):
        parameter.grad = None if index in unused else gradient
