"""Arrays: batches over any number of ranks are the serial batches; prefetch; shapes of data; refusals."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import shardwise.data.gather as gather
from shardwise.data.batch import Batch, tree_leaves
from shardwise.data.loader import batches, eval_batches, steps_per_epoch
from shardwise.data.order import epoch_order
from shardwise.data.source import Arrays, Source, as_splits
from shardwise.data.transforms import Compose, Flip, Normalize, RandomCrop
from shardwise.errors import JobError, PlanError


def images(count: int = 23) -> Arrays:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    return Arrays((pixels, np.arange(count)), Compose(RandomCrop(2), Flip(), Normalize(0.5, 0.25)))


def joined(parts: list[Batch]) -> tuple[Tensor, Tensor]:
    real = [part for part in parts if not part.phantom]
    targets: list[Any] = [part.targets for part in real]
    inputs: list[Any] = [part.inputs for part in real]
    return torch.cat(inputs), torch.cat(targets)


def check_equal(serial: list[Batch], ranks: list[list[Batch]]) -> None:
    """Every step: the ranks' samples one after another are the serial samples, bit for bit."""
    assert {len(rank) for rank in ranks} == {len(serial)}
    for step, whole in enumerate(serial):
        parts = [rank[step] for rank in ranks]
        inputs, targets = joined(parts)
        assert torch.equal(inputs, whole.inputs)  # type: ignore[arg-type]
        assert torch.equal(targets, whole.targets)  # type: ignore[arg-type]
        assert sum(part.count for part in parts) == whole.count == whole.global_count
        for part in parts:
            assert (part.index, part.global_count, part.ragged) == (whole.index, whole.count, False)
            assert part.largest == max(other.count for other in parts)
            assert part.phantom == (part.count == 0)
            assert len(tree_leaves(part.inputs)[0]) == max(1, part.count)
            if part.phantom:
                assert torch.equal(part.inputs[0], whole.inputs[0])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_ranks_together_are_serial(ranks: int, prefetch: int) -> None:
    source = images()
    for epoch in range(2):
        every = [
            list(batches(source, batch_size=5, seed=3, epoch=epoch, rank=rank, ranks=ranks, prefetch=prefetch))
            for rank in range(ranks)
        ]
        serial = list(batches(source, batch_size=5, seed=3, epoch=epoch, prefetch=0))
        assert [batch.count for batch in serial] == [5, 5, 5, 5, 3]
        order = [index for batch in serial for index in batch.indices]  # type: ignore[union-attr]
        assert order == epoch_order(23, seed=3, epoch=epoch).tolist()
        check_equal(serial, every)


def test_shares_change_who_reads_and_nothing_else() -> None:
    source, shares = images(), [3.0, 0.0, 1.0]
    serial = list(batches(source, batch_size=8, seed=0, epoch=0))
    every = [list(batches(source, batch_size=8, seed=0, epoch=0, rank=r, ranks=3, shares=shares)) for r in range(3)]
    check_equal(serial, every)
    assert [part.count for part in every[0]] == [6, 6, 5]
    assert all(part.phantom for part in every[1])


@pytest.mark.parametrize("ranks", [1, 2, 5, 30])
def test_evaluation_counts_each_sample_once_in_order(ranks: int) -> None:
    source = images()
    every = [list(eval_batches(source, batch_size=6, rank=rank, ranks=ranks)) for rank in range(ranks)]
    check_equal(list(eval_batches(source, batch_size=6)), every)
    seen = [int(i) for step in zip(*every, strict=True) for part in step for i in part.indices]
    assert seen == list(range(23))
    first: Any = every[0][0].inputs
    assert torch.equal(first[0], Normalize(0.5, 0.25)(source.inputs[:1])[0])  # not flipped, not cropped


def test_start_and_stop_cut_the_epoch() -> None:
    source = images()
    whole = list(batches(source, batch_size=4, seed=1, epoch=0))
    part = list(batches(source, batch_size=4, seed=1, epoch=0, start=2, stop=5))
    assert [batch.index for batch in part] == [2, 3, 4]
    for one, other in zip(part, whole[2:5], strict=True):
        assert torch.equal(one.inputs, other.inputs)  # type: ignore[arg-type]
    assert list(batches(source, batch_size=4, seed=1, epoch=0, start=6)) == []
    assert len(list(batches(source, batch_size=4, seed=1, epoch=0, start=5, stop=99))) == 1


def test_start_reads_nothing_before_it() -> None:
    rows: list[int] = []

    def note(inputs: Tensor) -> Tensor:
        rows.extend(inputs.tolist())
        return inputs

    list(batches(Arrays(np.arange(20), note), batch_size=4, seed=0, epoch=0, start=3))
    assert rows == epoch_order(20, seed=0, epoch=0)[12:].tolist()


def test_groups_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = images()
    together = list(batches(source, batch_size=3, seed=0, epoch=0))
    monkeypatch.setattr(gather, "GROUP_BYTES", 0)
    for one, other in zip(together, batches(source, batch_size=3, seed=0, epoch=0), strict=True):
        assert torch.equal(one.inputs, other.inputs)  # type: ignore[arg-type]


def test_trees_and_missing_targets(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(12, dtype=np.float32).reshape(6, 2))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    source = Arrays(({"a": mapped, "b": (torch.arange(6), np.arange(6)[::-1])}, {"y": np.arange(6.0)}))
    batch = next(batches(source, batch_size=4, seed=0, epoch=0))
    inputs: Any = batch.inputs
    targets: Any = batch.targets
    order = epoch_order(6, seed=0, epoch=0)[:4]
    assert inputs["a"].tolist() == mapped[order].tolist()
    assert inputs["b"][0].tolist() == order.tolist()
    assert inputs["b"][1].tolist() == (5 - order).tolist()
    assert targets["y"].dtype == torch.float64
    assert next(batches(Arrays(np.arange(6)), batch_size=4, seed=0, epoch=0)).targets is None


def test_arrays_are_not_copied_and_not_changed() -> None:
    pixels = np.full((9, 3, 4, 4), 7, np.uint8)
    source = Arrays((pixels, np.arange(9)))
    assert source.inputs.data_ptr() == pixels.ctypes.data
    for batch in batches(source, batch_size=9, seed=0, epoch=0, shuffle=False):
        batch.inputs.zero_()  # type: ignore[union-attr]
    assert (pixels == 7).all()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((np.zeros(3), np.zeros(4)), "same number"),
        ((np.zeros(3), np.zeros(3), np.zeros(3)), "3 items"),
        ((np.array(["a"]), np.zeros(1)), "torch has no such numbers"),
        ((np.float64(3.0), None), "give NumPy arrays"),
        ((torch.tensor(3.0), None), "single number"),
        (([1, 2], [3, 4]), "give NumPy arrays"),
    ],
)
def test_wrong_arrays_are_refused(arrays: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        Arrays(arrays)


def test_targets_beside_the_inputs_are_not_printed() -> None:
    with pytest.raises(
        JobError, match=r"Arrays was given a Tensor as transform: .* Arrays\(\(inputs, targets\)\)"
    ) as refused:
        Arrays(torch.zeros(3, 2), torch.zeros(3))  # type: ignore[arg-type]
    assert len(str(refused.value)) < 200


def test_wrong_arguments_are_refused_at_once() -> None:
    source = images()
    for wrong in ({"batch_size": 0}, {"rank": 2, "ranks": 2}, {"start": 3, "stop": 2}, {"rank": -1}):
        with pytest.raises(JobError):
            batches(source, **{"batch_size": 4, "seed": 0, "epoch": 0, **wrong})  # type: ignore[arg-type]
    with pytest.raises(PlanError):
        batches(source, batch_size=4, seed=0, epoch=0, ranks=2, shares=[1.0])
    with pytest.raises(JobError, match="no samples"):
        batches(Arrays(np.zeros((0, 2))), batch_size=4, seed=0, epoch=0)


def test_steps_per_epoch() -> None:
    assert [steps_per_epoch(images(), size) for size in (1, 5, 23, 24)] == [23, 5, 1, 1]


def prefetch_threads() -> int:
    return sum(thread.name == "shardwise-prefetch" for thread in threading.enumerate())


def test_closing_ends_the_thread() -> None:
    iterator = batches(images(), batch_size=1, seed=0, epoch=0, prefetch=3)
    next(iterator)
    assert prefetch_threads() == 1
    iterator.close()
    assert prefetch_threads() == 0
    batches(images(), batch_size=1, seed=0, epoch=0).close()  # never started
    list(batches(images(), batch_size=1, seed=0, epoch=0))
    assert prefetch_threads() == 0


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_keep_their_traceback(prefetch: int) -> None:
    def broken(inputs: Tensor) -> Tensor:
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
        next(batches(Arrays(np.zeros(4), broken), batch_size=2, seed=0, epoch=0, prefetch=prefetch))
    assert "broken" in [entry.name for entry in caught.traceback]
    assert prefetch_threads() == 0


def test_reading_ahead_is_bounded() -> None:
    made: list[int] = []

    class Counting(Source):
        @property
        def length(self) -> int:
            return 100

        @property
        def threaded(self) -> bool:
            return True

        def read(self, reading: Any) -> Any:
            return self._make()

        def _make(self) -> Iterator[Batch]:
            for index in range(100):
                made.append(index)
                yield Batch(inputs=torch.zeros(1), targets=None, count=1, global_count=1, index=index)

    iterator = batches(Counting(), batch_size=1, seed=0, epoch=0, prefetch=3)
    next(iterator)
    iterator.close()
    # one taken, three waiting, one in the hand of the thread, one more room given by the close
    assert len(made) <= 6


def batch_of(count: int, largest: int, phantom: bool = False) -> Batch:
    rows = max(1, count)
    return Batch(
        inputs={"x": torch.arange(rows)},
        targets=torch.arange(rows) * 10,
        count=count,
        global_count=99,
        index=4,
        indices=np.arange(count),
        phantom=phantom,
        largest=largest,
    )


def test_split_gives_every_rank_the_same_number_of_pieces() -> None:
    pieces = batch_of(7, 9).split(4)
    assert [piece.count for piece in pieces] == [4, 3, 0]
    assert [piece.phantom for piece in pieces] == [False, False, True]
    assert [piece.targets.tolist() for piece in pieces] == [[0, 10, 20, 30], [40, 50, 60], [0]]  # type: ignore[union-attr]
    assert [piece.indices.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6], []]  # type: ignore[union-attr]
    assert {piece.global_count for piece in pieces} == {99}
    assert len(batch_of(9, 9).split(4)) == len(batch_of(0, 9, phantom=True).split(4)) == 3
    whole = batch_of(3, 3)
    assert whole.split(3) == [whole]
    with pytest.raises(JobError):
        whole.split(0)


def test_to_moves_every_leaf() -> None:
    batch = batch_of(3, 3)
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    assert {leaf.device.type for leaf in tree_leaves(moved.inputs) + tree_leaves(moved.targets)} == {"meta"}
    assert (moved.count, moved.index) == (3, 4)


def test_a_transform_must_keep_the_rows() -> None:
    with pytest.raises(JobError, match="one row a sample"):
        next(batches(Arrays(np.zeros((4, 2)), lambda inputs: inputs[:1]), batch_size=4, seed=0, epoch=0))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: iter(()), r"goes into shardwise\.data\.Stream\(function\)"),
        (iter(()), r"it can be read once"),
        ((np.zeros((4, 2)), np.zeros(4), np.zeros(4)), r"several inputs are a tuple or dict, \(\(a, b\), targets\)"),
        (([[0.0], [1.0]], [0, 1]), r"lists are no arrays: numpy\.array"),
        ((np.ma.masked_greater(np.arange(4.0), 2), np.zeros(4)), "a masked array: torch has no masks"),
        ((np.zeros(4), np.zeros(4, np.uint16)), r"numbers of torch\.uint16: .* give int32 or int64"),
    ],
)
def test_what_is_no_data_is_told_with_the_way_out(data: Any, words: str) -> None:
    with pytest.raises(JobError, match=words):
        as_splits(data)
