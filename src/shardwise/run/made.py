"""Batches that a loop makes itself: experience, replayed or mined samples. Compared or counted over the workers, once each."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, final
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from shardwise.data.batch import Batch, tree_leaves, tree_map
from shardwise.data.randomness import BatchRandom, loop_random
from shardwise.dist.split import is_dtensor
from shardwise.errors import DataError, JobError, PlanError
from shardwise.run.assemble import CPU, Assembly
from shardwise.run.build import build_model
from shardwise.run.coupled import MOST_BYTES, check_loss
from shardwise.run.rehearse import described
from shardwise.run.tryout import SAMPLES
from shardwise.spec.shares import share_bounds

MADE = -1
"""`Batch.index` of a batch that is none of an epoch."""

ROWS, COLUMNS = 16, 1024
"""Samples that are compared, spread evenly, and numbers of each. Of draws that differ between workers, nearly all differ."""


def make_batch(a: Assembly, inputs: Any, targets: Any, *, part: bool) -> Batch:
    """This rank's part of a global batch that the loop made. Collective.

    Args:
        inputs: trees of tensors or arrays, of one first dim; None, with `part`, for no samples.
        part: they are this rank's own samples, and those of all ranks together are the batch; else they are the whole batch,
            the same on every rank.

    Raises:
        JobError: they are no tensors of one length.
        DataError: ranks that should have given the same did not.
    """
    pair = _as_data(inputs), _as_data(targets)
    lengths = sorted({len(leaf) for leaf in tree_leaves(pair)})
    if len(lengths) > 1:
        raise JobError(f"run.batch was given first dims of {lengths}: every tensor must have a row for each sample")
    count = lengths[0] if lengths else 0
    sizes: list[int] = _agree(a, pair, count, part=part)
    bounds = share_bounds(count, a.samples.size, a.division)
    if not part:
        sizes = [stop - start for start, stop in bounds]
    mine = sizes[a.samples.rank]
    if part and 0 in sizes and any(sizes):
        # A worker without samples walks through the collectives of the pass on one that another worker has.
        giver = next(rank for rank, size in enumerate(sizes) if size)
        lent = a.world.gather_objects(_rows(pair, 0, 1) if a.samples.rank == giver else None)
        pair = pair if mine else next(each for each in lent if each is not None)
    elif not part and count:
        start, stop = bounds[a.samples.rank]
        pair = _rows(pair, start, stop) if mine else _rows(pair, 0, 1)
    return Batch(
        inputs=pair[0],
        targets=pair[1],
        count=mine,
        global_count=sum(sizes),
        index=MADE,
        phantom=mine == 0,
        largest=max(sizes),
    )


@final
class Draws:
    """Counts the random numbers that a loop has asked for since its last step."""

    def __init__(self) -> None:
        self._place, self._calls = (-1, -1), Counter[str]()

    def next(self, seed: int, place: tuple[int, int], name: str, numbers: int | Iterable[int]) -> BatchRandom:
        """Random numbers that were not asked for before.

        Args:
            place: round and step.
            name: what they are for.
            numbers: of samples, or how many there are.
        """
        if place != self._place:
            self._place, self._calls = place, Counter()
        self._calls[name] += 1
        rows = np.arange(numbers) if isinstance(numbers, int) else np.fromiter(numbers, np.int64)
        return loop_random(seed, *place, crc32(name.encode()), self._calls[name], indices=rows)


def check_objectives(a: Assembly, batch: Batch, names: list[str]) -> None:
    """Refuse objectives that couple samples (advantages scaled within the batch) where batches are split. Collective.

    What a job without data trains on is not known before it starts, so this is seen at the first step.

    Raises:
        PlanError: on every rank.
    """
    nowhere_split = a.samples.size == 1 and a.plan.micro_batch is None
    bytes_held = sum(parameter.numel() * parameter.element_size() for parameter in a.model.parameters())
    if nowhere_split or bytes_held > MOST_BYTES:
        return
    refusal = None
    singles = dict(zip(a.job.turns or ("",), a.job.singles, strict=True))
    few = batch.split(SAMPLES)[0].to(CPU)
    with torch.random.fork_rng(devices=[]):
        model = build_model(a.job, CPU)
        if model is a.model:  # the user's own, which the plan has wrapped
            if a.plan.layout.workers > a.plan.layout.data:
                return
            model = copy.deepcopy(model)
        try:
            for name in names:
                check_loss(singles[name], a.plan, model, few)
        except PlanError as error:
            refusal = error
    found = next((each for each in a.world.gather_objects(refusal) if each is not None), None)
    if found is not None:
        raise found


def _as_data(tree: Any) -> Any:
    return None if tree is None else tree_map(_as_tensor, tree)


def _as_tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, np.ndarray):
        leaf = torch.as_tensor(leaf)
    if not isinstance(leaf, Tensor) or not leaf.dim():
        given = "a single number" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
        raise JobError(
            f"run.batch was given {given}: give tensors or arrays with a row for each sample, or tuples or dicts of these; "
            "torch.stack() makes one of a list of equal ones"
        )
    if leaf.requires_grad:
        raise JobError(
            "run.batch was given a tensor that requires a gradient: a batch is data, through which nothing is learned; compute "
            "it under torch.no_grad(), or give .detach() of it"
        )
    whole: Tensor = leaf.full_tensor() if is_dtensor(leaf) else leaf  # type: ignore[attr-defined]
    return whole


def _rows(pair: Any, start: int, stop: int) -> Any:
    return tuple(None if tree is None else tree_map(lambda leaf: leaf[start:stop], tree) for tree in pair)


def _agree(a: Assembly, pair: Any, count: int, *, part: bool) -> list[int]:
    """Sizes of all ranks' samples, one number for each that holds other ones; of those that hold the same, these are compared."""
    if a.world.size == 1:
        return [count]
    alone = part and a.samples.size == a.world.size
    own = [a.samples.rank if part else 0, part, count, _form(pair), 0 if alone else _content(pair, count)]
    table = a.world.gather(torch.tensor(own, dtype=torch.int64, device=a.device), "samples that a loop made").tolist()
    sizes = [0] * (a.samples.size if part else 1)
    first: dict[int, tuple[int, list[int]]] = {}
    form: tuple[int, int] | None = None
    for rank, row in enumerate(table):
        if row[1] != table[0][1]:
            raise DataError(
                f"run.batch was called with part={part} here, and otherwise by rank {rank if row[1] != part else 0}"
            )
        if row[2]:
            form = form or (rank, row[3])
            if row[3] != form[1]:
                texts = a.world.gather_objects(f"inputs {described(pair[0])}; targets {described(pair[1])}")
                raise DataError(
                    f"run.batch was given samples of another form by rank {rank} than by rank {form[0]}: {texts[rank]}, "
                    f"and {texts[form[0]]}"
                )
        reader, other = first.setdefault(row[0], (rank, row))
        if other[2:] != row[2:]:
            raise DataError(_difference(a, reader, rank, other[2], row[2], part=part))
        sizes[row[0]] = row[2]
    return sizes


def _difference(a: Assembly, first: int, rank: int, before: int, now: int, *, part: bool) -> str:
    told = f"rank {rank} gave run.batch other samples than rank {first} ({now} and {before} of them)"
    if part:
        return f"{told}, but under plan {a.plan.layout} both walk through the same part: draw what they need with run.random()"
    return (
        f"{told}: every worker must give the whole batch, the same one, and takes its part of it. Draw with run.random(), whose "
        "numbers are the same on all workers, or let each give samples of its own with run.batch(..., part=True)"
    )


def _form(pair: Any) -> int:
    """A digest of what the samples look like."""
    form = [None if tree is None else tree_map(lambda leaf: (str(leaf.dtype), *leaf.shape[1:]), tree) for tree in pair]
    return _number(repr(form).encode())


def _content(pair: Any, count: int) -> int:
    """A digest of some of the samples."""
    places = sorted({place * (count - 1) // (ROWS - 1) for place in range(ROWS)}) if count else []
    pieces = []
    for leaf in tree_leaves(pair):
        rows = (
            leaf.detach()[places].reshape(len(places), -1) if leaf[:1].numel() and places else leaf[:0].reshape(-1, 1)
        )
        rows = rows[:, :: -(-rows.shape[1] // COLUMNS)]
        pieces.append(rows.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return _number(b"".join(pieces))


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")
