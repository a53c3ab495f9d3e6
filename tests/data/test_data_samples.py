"""Map-style data sets through torch's DataLoader, and streams in both modes."""

import multiprocessing
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, get_worker_info

from shardwise.data.batch import Batch
from shardwise.data.loader import batches, eval_batches, steps_per_epoch
from shardwise.data.source import Arrays, Samples, Source, Splits, Stream, as_splits
from shardwise.errors import DataError, JobError


class Noisy(Dataset[tuple[Tensor, int]]):
    """Draws from all three global generators, as augmentations do."""

    def __len__(self) -> int:
        return 17

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
        return torch.tensor([index, *drawn]), index


def epoch(source: Source, rank: int = 0, ranks: int = 1, **more: Any) -> list[Batch]:
    return list(batches(source, batch_size=5, seed=2, epoch=1, rank=rank, ranks=ranks, **more))


def same(serial: list[Batch], ranks: list[list[Batch]]) -> bool:
    for whole, parts in zip(serial, zip(*ranks, strict=True), strict=True):
        real: list[Any] = [part for part in parts if not part.phantom]
        if not torch.equal(torch.cat([part.inputs for part in real]), whole.inputs):  # type: ignore[arg-type]
            return False
        if not torch.equal(torch.cat([part.targets for part in real]), whole.targets):  # type: ignore[arg-type]
            return False
        if sum(part.count for part in parts) != whole.global_count or {part.index for part in parts} != {whole.index}:
            return False
    return True


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (0, 2), (0, 7), (2, 1), (2, 2)])
def test_data_sets_are_the_same_under_every_layout(workers: int, ranks: int) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    serial = epoch(Samples(Noisy()))
    assert same(serial, [epoch(Samples(Noisy(), workers), rank, ranks) for rank in range(ranks)])
    assert torch.equal(torch.rand(2), expected)  # reading drew nothing from the training's generator
    assert [batch.count for batch in serial] == [5, 5, 5, 2]
    assert serial[0].targets.tolist() == serial[0].indices.tolist()  # type: ignore[union-attr]


def test_data_set_noise_changes_with_the_epoch() -> None:
    one, other = (next(batches(Samples(Noisy()), batch_size=17, seed=2, epoch=e, shuffle=False)) for e in (0, 1))
    assert torch.equal(one.inputs[:, 0], other.inputs[:, 0])  # type: ignore[call-overload]
    assert not torch.isin(one.inputs[:, 1:], other.inputs[:, 1:]).any()  # type: ignore[call-overload]


def test_start_reads_only_the_rest() -> None:
    read: list[int] = []

    class Noting(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            read.append(index)
            return super().__getitem__(index)

    assert [batch.index for batch in epoch(Samples(Noting()), start=2)] == [2, 3]
    assert len(read) == 7


@pytest.mark.parametrize("make", [lambda: Samples(Noisy(), 2), lambda: Stream(list(range(50)), loader_workers=1)])
def test_closing_ends_the_workers(make: Callable[[], Source]) -> None:
    iterator = batches(make(), batch_size=2, seed=0, epoch=0)
    next(iterator)
    assert multiprocessing.active_children()
    iterator.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_in_a_data_set_surface(workers: int) -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            raise DataError("file x.png is broken")

    with pytest.raises(DataError, match=r"x\.png is broken"):
        epoch(Samples(Broken(), workers))
    assert not multiprocessing.active_children()


def test_dict_samples_collate_and_transform() -> None:
    rows: Any = [{"x": torch.tensor([i]), "y": {"z": i}} for i in range(6)]
    batch = next(eval_batches(as_splits({"train": Samples(rows)}).train, batch_size=4))
    assert batch.targets is None
    assert batch.inputs["y"]["z"].tolist() == [0, 1, 2, 3]  # type: ignore[call-overload,index]
    source = Samples(
        rows, collate=lambda group: (torch.stack([row["x"] for row in group]), None), transform=lambda x: -x
    )
    batch = next(eval_batches(source, batch_size=3))
    assert (batch.inputs.tolist(), batch.targets) == ([[0], [-1], [-2]], None)  # type: ignore[union-attr]


@pytest.mark.parametrize("sample", [(1, 2, 3), {"x": "text"}, "text"])
def test_samples_that_do_not_say_what_they_are(sample: Any) -> None:
    with pytest.raises(JobError, match=r"collate="):
        next(eval_batches(Samples([sample, sample]), batch_size=2))  # type: ignore[arg-type]


class Counting(IterableDataset[tuple[Tensor, int]]):
    """A stream that shuffles through the global generator and divides itself over loader workers."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        for index in range(0 if info is None else info.id, self.length, 1 if info is None else info.num_workers):
            yield torch.rand(2), index


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("length", [13, 15])
def test_a_shared_stream_is_serial_under_every_layout(workers: int, length: int) -> None:
    ranks = 3 if workers == 0 else 2
    serial = epoch(Stream(Counting(length), loader_workers=workers))
    assert [batch.count for batch in serial] == ([5, 5, 3] if length == 13 else [5, 5, 5])
    assert same(serial, [epoch(Stream(Counting(length), loader_workers=workers), r, ranks) for r in range(ranks)])
    seen = torch.cat([batch.targets for batch in serial]).tolist()  # type: ignore[misc]
    assert sorted(seen) == list(range(length))
    if workers < 2:
        assert seen == list(range(length))
        assert same(epoch(Stream(Counting(length))), [serial])  # one worker draws what none would


def test_a_stream_is_resumed_by_skipping() -> None:
    whole = epoch(Stream(Counting(13)))
    rest = epoch(Stream(Counting(13), length=13), start=1)
    assert [batch.index for batch in rest] == [1, 2]
    assert same(whole[1:], [rest])
    assert same(whole[1:2], [epoch(Stream(Counting(13), length=13), start=1, stop=2)])
    assert epoch(Stream(Counting(13)), start=3) == []


def test_more_ranks_than_samples_of_a_stream() -> None:
    every = [epoch(Stream(Counting(6)), rank, 4) for rank in range(4)]
    assert [[part.count for part in rank] for rank in every] == [[2, 1], [1, 0], [1, 0], [1, 0]]
    assert every[3][1].phantom
    assert every[3][1].targets.tolist() == [5]  # type: ignore[union-attr]


def parts(rank: int, ranks: int, epoch: int) -> Iterator[tuple[int, int]]:
    """Rank 0 has nine samples, the others two."""
    yield from ((100 * rank + i, epoch) for i in range(9 if rank == 0 else 2))


def test_a_sharded_stream_runs_until_all_ranks_are_done() -> None:
    readers = [batches(Stream(parts, sharded=True), batch_size=6, seed=0, epoch=4, rank=r, ranks=3) for r in range(3)]
    seen: list[list[int]] = [[], [], []]
    steps = 0
    while True:
        step = [next(reader) for reader in readers]
        assert all(batch.ragged and batch.global_count == -1 and batch.largest == 2 for batch in step)
        assert all(batch.phantom == (batch.count == 0) for batch in step)
        if sum(batch.count for batch in step) == 0:
            break
        for rank, batch in enumerate(step):
            targets: Any = batch.targets
            inputs: Any = batch.inputs
            assert targets.unique().tolist() == [4]
            assert batch.index == steps
            seen[rank].extend(inputs[: batch.count].tolist())
            assert len(inputs) == max(1, batch.count)
        steps += 1
    assert steps == 5
    assert seen == [list(range(9)), [100, 101], [200, 201]]
    for reader in readers:
        reader.close()


def test_a_sharded_stream_on_one_rank_ends_by_itself() -> None:
    serial = epoch(Stream(parts, sharded=True))
    assert [(batch.count, batch.ragged, batch.global_count) for batch in serial] == [(5, False, 5), (4, False, 4)]


def test_a_sharded_stream_resumes_and_divides_over_workers() -> None:
    def even(rank: int, ranks: int) -> range:
        return range(rank, 40, ranks)

    rest = batches(Stream(even, sharded=True), batch_size=4, seed=0, epoch=0, rank=1, ranks=2, start=3)
    assert next(rest).inputs.tolist() == [13, 15]  # type: ignore[union-attr]
    rest.close()
    reader = batches(Stream(even, sharded=True, loader_workers=2), batch_size=40, seed=0, epoch=0, rank=1, ranks=2)
    # four parts, two to a rank
    assert sorted(next(reader).inputs.tolist()) == [i for i in range(40) if i % 4 in (2, 3)]  # type: ignore[union-attr]
    reader.close()


def test_streams_that_cannot_be_divided_are_refused() -> None:
    def empty(rank: int, ranks: int) -> list[int]:
        return [1] if rank == 0 else []

    with pytest.raises(DataError, match="rank 1 of 2"):
        next(batches(Stream(empty, sharded=True), batch_size=4, seed=0, epoch=0, rank=1, ranks=2))
    with pytest.raises(JobError, match="at least one"):
        next(batches(Stream(parts, sharded=True), batch_size=2, seed=0, epoch=0, rank=2, ranks=3))
    with pytest.raises(JobError, match="used up"):
        Stream(iter([1, 2]))
    with pytest.raises(JobError, match="2 times"):
        Stream([1, 2], loader_workers=2)
    with pytest.raises(JobError, match="iterable"):
        Stream(3)  # type: ignore[arg-type]
    with pytest.raises(JobError, match="loader_workers"):
        Stream([1], loader_workers=-1)


@pytest.mark.parametrize(("length", "said"), [(14, "only 13"), (12, "at least 13"), (9, "at least 10")])
def test_a_wrong_length_is_an_error(length: int, said: str) -> None:
    with pytest.raises(DataError, match=said):
        epoch(Stream(Counting(13), length=length))
    assert steps_per_epoch(Stream(Counting(13), length=13), 5) == 3
    assert steps_per_epoch(Stream(Counting(13)), 5) is None
    assert steps_per_epoch(Stream(parts, sharded=True, length=13), 5) is None


def test_what_a_job_may_give() -> None:
    x, y = torch.zeros(4, 2), np.zeros(4)
    assert isinstance(as_splits((x, y)).train, Arrays)
    assert isinstance(as_splits(TensorDataset(x, x)).train, Arrays)
    assert isinstance(as_splits(Noisy()).train, Samples)
    assert isinstance(as_splits(Counting(3)).train, Stream)
    both = as_splits({"train": (x, y), "test": Noisy()})
    assert isinstance(both.test, Samples)
    assert as_splits(both) is both
    assert as_splits({"train": (x, y)}).test is None
    for nothing in (None, {"train": None}):
        with pytest.raises(JobError, match="the job has no data"):
            as_splits(nothing)
    for wrong in (3, "cifar10", [1, 2], {"train": 3}):
        with pytest.raises(JobError, match="torch Dataset or IterableDataset"):
            as_splits(wrong)
    for keys in ({}, {"test": (x, y)}, {"train": (x, y), "valid": (x, y)}):
        with pytest.raises(JobError, match="'train'"):
            as_splits(keys)


def test_splits_read_once_and_late() -> None:
    calls: list[str] = []

    def read() -> Source:
        calls.append("train")
        return Arrays(torch.zeros(3))

    splits = Splits(read, lambda: None, about="three zeros", classes=lambda: ["a"])
    assert repr(splits) == "Splits('three zeros')"
    assert calls == []
    assert splits.train is splits.train
    assert calls == ["train"]
    assert splits.test is None
    assert splits.classes == ("a",)
