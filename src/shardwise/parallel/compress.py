"""Inexact sums of gradients over replicas, which send fewer bytes. Opt-in: the result is not that of a serial run.

`fp16` and `bf16` send every gradient in 16 bits and add it up in them. `powersgd` (Vogels, Karimireddy, Jaggi 2019,
"PowerSGD: practical low-rank gradient compression for distributed optimization", algorithms 1 and 2) sends, for a gradient
matrix M of shape (n, m), two thin factors of rank r: with M the sum over ranks of M_i, P = orthogonalised sum of M_i Q, then
Q = sum of M_i^T P, and P Q^T stands for M. Each rank keeps what it left out, M_i - P P^T M_i, and adds it to its next
gradient (error feedback). Only sums over ranks of these errors enter any later gradient, so that is what a checkpoint keeps.

Gradients are compressed after the backward pass, when they are complete and scaled; exact sums travel during it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from shardwise.dist.collectives import Group
from shardwise.errors import PlanError
from shardwise.parallel.data import (
    BUCKET_BYTES,
    Bucket,
    fill,
    hand_out,
    in_buckets,
    make_bucket,
    receive,
    sparse_parameters,
)
from shardwise.spec.plan import Plan

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_FACTORED = (torch.float32, torch.float64)
_SEED = 1729
"""Of the first factors, which must be the same on all ranks."""


def check_compression(model: nn.Module, plan: Plan) -> None:
    """Refuse compression where it does not apply or would have no effect.

    Raises:
        PlanError: the rule and what to do.
    """
    if plan.compression != "powersgd" and plan.compression_rank != Plan().compression_rank:
        raise PlanError(
            f"plan compression_rank={plan.compression_rank} with compression={plan.compression!r}: only powersgd has a rank; "
            "leave it out"
        )
    if plan.compression == "none":
        return
    given = f"plan {plan.layout} with compression={plan.compression!r}"
    if plan.layout.data == 1:
        raise PlanError(f"{given}: there is no gradient sum over data to compress; leave compression out")
    if plan.layout.data != plan.layout.workers:
        raise PlanError(
            f"{given}: gradients are compressed between whole replicas only; leave compression out, or use "
            f"data={plan.layout.workers} alone"
        )
    sparse = sorted(sparse_parameters(model))
    if sparse:
        raise PlanError(
            f"{given}: the gradient of {sparse[0]} is sparse and travels as rows; leave compression out, or build the embedding "
            "with sparse=False"
        )


def compressed_sum(parameters: Iterable[tuple[str, nn.Parameter]], group: Group, plan: Plan) -> HalfSum | LowRankSum:
    """The sum that a plan's compression asks for."""
    if plan.compression == "powersgd":
        return LowRankSum(parameters, group, rank=plan.compression_rank)
    return HalfSum(parameters, group, dtype=_HALVES[plan.compression])


@final
class HalfSum:
    """Sums gradients in 16 bits; parameters of 16 bits and complex ones as they are."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], group: Group, *, dtype: torch.dtype) -> None:
        self._group = group
        self._dtype = dtype
        self._buckets = _buckets([(name, p) for name, p in parameters if p.requires_grad])

    @property
    def bytes_per_step(self) -> int:
        """Bytes of gradients that each rank puts into the sum every step."""
        return sum(
            bucket.flat.numel() * min(bucket.flat.element_size(), 2 if _is_wide(bucket.flat) else 16)
            for bucket in self._buckets
        )

    def expect(self) -> None:
        """Nothing is sent during the backward pass."""

    def finish(self, *, scale: float | Tensor | None = None) -> None:
        """Compress, send, and leave the summed gradient in every `parameter.grad`.

        Args:
            scale: factor for every gradient, None for no scaling; it comes before the rounding.
        """
        small = []
        for bucket in self._buckets:
            _fill_scaled(bucket, scale)
            small.append(bucket.flat.to(self._dtype) if _is_wide(bucket.flat) else bucket.flat)
            bucket.sent = self._group.start_sum_(small[-1], f"{bucket.what} in {self._dtype}")
        for bucket, summed in zip(self._buckets, small, strict=True):
            if bucket.sent is not None:
                bucket.sent.wait()
                bucket.sent = None
            if summed is not bucket.flat:
                bucket.flat.copy_(summed)
            hand_out(bucket)


class _Matrix:
    """One gradient as a matrix of shape (n, m), with what this rank left out of it so far and the factor Q of (m, r).

    Products with a factor are written with its few columns as rows: M Q as (Q^T M^T)^T. On CPUs BLAS is several times slower
    on results of few columns (M^T P of 1500 x 1500 and rank 4: 1.9 ms, as here 0.36).
    """

    def __init__(self, name: str, parameter: nn.Parameter, rank: int, generator: torch.Generator) -> None:
        n, m = _matrix_shape(parameter)
        self.name = name
        self.parameter = parameter
        self.error = parameter.new_zeros((n, m))
        first = torch.randn((m, min(rank, n, m)), generator=generator, dtype=torch.float64)
        self.factor = first.to(parameter)
        self.left = parameter.new_empty((n, self.factor.shape[1]))

    def add(self, gradient: Tensor, scale: float | Tensor | None) -> None:
        """M_i: the scaled gradient and what was left out before."""
        gradient = gradient.reshape(self.error.shape)
        if isinstance(scale, Tensor):
            self.error.add_(gradient * scale)
        else:
            self.error.add_(gradient, alpha=1.0 if scale is None else scale)

    def lefts(self) -> Tensor:
        """M_i Q, of shape (n, r)."""
        return (self.factor.T.contiguous() @ self.error.T).T

    def project(self, total: Tensor) -> Tensor:
        """This rank's Q = M_i^T P, given the sum over ranks of M_i Q; keeps what P Q^T leaves out of M_i."""
        self.left = torch.linalg.qr(total).Q
        own = self.left.T @ self.error
        self.error.addmm_(self.left, own, alpha=-1)
        return own.T

    def rebuild(self, total: Tensor) -> None:
        """The gradient that stands for the sum, from the sum over ranks of M_i^T P."""
        self.factor.copy_(total)
        self.parameter.grad = (self.left @ total.T).view(self.parameter.shape)


@final
class LowRankSum:
    """PowerSGD with error feedback; what a product of factors would not make smaller is summed exactly."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], group: Group, *, rank: int) -> None:
        self._group = group
        generator = torch.Generator().manual_seed(_SEED)
        exact: list[tuple[str, nn.Parameter]] = []
        by_kind: dict[tuple[torch.dtype, torch.device], list[_Matrix]] = {}
        for name, parameter in parameters:
            if parameter.requires_grad and _is_smaller(parameter, rank):
                kind = (parameter.dtype, parameter.device)
                by_kind.setdefault(kind, []).append(_Matrix(name, parameter, rank, generator))
            elif parameter.requires_grad:
                exact.append((name, parameter))
        self._sets = list(by_kind.values())
        self._exact = _buckets(exact)

    @property
    def bytes_per_step(self) -> int:
        """Bytes of gradients and factors that each rank puts into the sums every step."""
        exact = sum(bucket.flat.numel() * bucket.flat.element_size() for bucket in self._exact)
        each = [(m.left.numel() + m.factor.numel() + 1) * m.left.element_size() for part in self._sets for m in part]
        return exact + sum(each)

    def expect(self) -> None:
        """Nothing is sent during the backward pass."""

    @torch.no_grad()
    def finish(self, *, scale: float | Tensor | None = None) -> None:
        """Compress, send, and leave what stands for the summed gradient in every `parameter.grad`.

        Args:
            scale: factor for every gradient, None for no scaling; errors that are kept are scaled already.
        """
        for bucket in self._exact:
            _fill_scaled(bucket, scale)
            bucket.sent = self._group.start_sum_(bucket.flat, bucket.what)
        for matrices in self._sets:
            self._sum_matrices(matrices, scale)
        for bucket in self._exact:
            receive(bucket)

    def _sum_matrices(self, matrices: list[_Matrix], scale: float | Tensor | None) -> None:
        what = f"the factors of {matrices[0].name} ... {matrices[-1].name}"
        flags = matrices[0].factor.new_zeros((len(matrices),))
        lefts = []
        for index, matrix in enumerate(matrices):
            gradient = matrix.parameter.grad
            if gradient is not None:
                matrix.add(gradient, scale)
                flags[index] = 1
            lefts.append(matrix.lefts())
        absent = any(matrix.parameter.grad is None for matrix in matrices)
        *totals, counted = self._summed([*lefts, flags], what)
        # Reading the flags waits for the device, so it is done only where this rank lacks a gradient itself.
        counts = counted.tolist() if absent else [1.0] * len(matrices)
        used = [(matrix, total) for matrix, total, count in zip(matrices, totals, counts, strict=True) if count]
        if not used:
            return
        rights = self._summed([matrix.project(total) for matrix, total in used], what)
        for (matrix, _), total in zip(used, rights, strict=True):
            matrix.rebuild(total)

    def _summed(self, tensors: list[Tensor], what: str) -> list[Tensor]:
        flat = self._group.sum_(torch.cat([tensor.reshape(-1) for tensor in tensors]), what)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

    @torch.no_grad()
    def share_out(self) -> dict[str, dict[str, Tensor]]:
        """Sum what the ranks left out, share it out evenly, and return it with the factors. Collective.

        No later gradient changes but for rounding, and a run that goes on from what is returned, on as many workers, is the
        same as this one bit for bit.

        Returns:
            parameter name -> `error`, of the shape (n, m), the sum over all ranks, and `factor`, of the shape (m, r).
        """
        state = {}
        for matrix in (matrix for matrices in self._sets for matrix in matrices):
            total = self._group.sum_(matrix.error.clone(), f"what was left out of {matrix.name}")
            torch.div(total, self._group.size, out=matrix.error)
            state[matrix.name] = {"error": total, "factor": matrix.factor.clone()}
        return state

    @torch.no_grad()
    def take_up(self, state: Mapping[str, Any]) -> None:
        """Go on from what `share_out` returned, on any number of ranks; a factor of another rank is not taken up."""
        for matrix in (matrix for matrices in self._sets for matrix in matrices):
            saved = state.get(matrix.name)
            if saved is None or saved["error"].shape != matrix.error.shape:
                continue
            torch.div(saved["error"].to(matrix.error), self._group.size, out=matrix.error)
            if saved["factor"].shape == matrix.factor.shape:
                matrix.factor.copy_(saved["factor"])


CompressedSum = HalfSum | LowRankSum


def _buckets(parameters: list[tuple[str, nn.Parameter]]) -> list[Bucket]:
    return [make_bucket(part) for part in in_buckets(list(reversed(parameters)), BUCKET_BYTES)]


def _fill_scaled(bucket: Bucket, scale: float | Tensor | None) -> None:
    fill(bucket)
    if scale is not None:
        for view in bucket.views:
            view.mul_(scale)


def _is_wide(flat: Tensor) -> bool:
    return flat.is_floating_point() and flat.element_size() > 2


def _matrix_shape(parameter: nn.Parameter) -> tuple[int, int]:
    n = parameter.shape[0] if parameter.ndim > 1 else 1
    return n, parameter.numel() // max(1, n)


def _is_smaller(parameter: nn.Parameter, rank: int) -> bool:
    """Whether two factors of that rank hold fewer numbers than the gradient."""
    n, m = _matrix_shape(parameter)
    return parameter.dtype in _FACTORED and min(rank, n, m) * (n + m) < n * m
