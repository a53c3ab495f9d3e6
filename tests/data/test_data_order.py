"""The sample order, each rank's slice, and the hash under both."""

import numpy as np
import pytest

from shardwise.data.order import GOLDEN, epoch_order, hashed, mix_word, stream_key
from shardwise.errors import JobError, PlanError
from shardwise.spec.shares import share_bounds


def test_hash_is_splitmix64() -> None:
    # the first outputs of SplitMix64 for the seed 1234567, as published with its reference implementation
    words = [mix_word(1234567 + step * GOLDEN) for step in range(1, 4)]
    assert words == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert hashed(1234567, np.arange(1, 4, dtype=np.uint64)).tolist() == words


def test_order_is_pinned() -> None:
    """Changing these numbers changes every run anybody ever made."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [1, 2, 7, 4, 6, 3, 0, 5, 8, 9]
    assert epoch_order(10, seed=7, epoch=3).tolist() == [9, 4, 5, 2, 3, 7, 1, 8, 0, 6]


@pytest.mark.parametrize("length", [0, 1, 2, 1000])
def test_order_is_a_permutation(length: int) -> None:
    order = epoch_order(length, seed=5, epoch=2)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(length))
    assert epoch_order(length, seed=5, epoch=2, shuffle=False).tolist() == list(range(length))


def test_order_changes_with_seed_and_epoch() -> None:
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_order_is_uniform() -> None:
    """Each of the 24 orders of 4 samples comes up about equally often: chi-square with 23 degrees of freedom."""
    counts = np.zeros(256, int)
    for epoch in range(4800):
        counts[int(epoch_order(4, seed=1, epoch=epoch) @ np.array([64, 16, 4, 1]))] += 1
    seen = counts[counts > 0]
    assert len(seen) == 24
    assert ((seen - 200.0) ** 2 / 200.0).sum() < 60  # beyond the 99.99th percentile


def test_keys_tell_words_apart() -> None:
    words = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (2**64,), (2**64 + 1,), (2**70, 3)]
    assert len({stream_key(*word) for word in words}) == len(words)
    with pytest.raises(JobError, match="at least 0"):
        stream_key(-1)


@pytest.mark.parametrize("count", [0, 1, 5, 10, 101])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 200])
def test_shares_cover_exactly(count: int, parts: int) -> None:
    bounds = share_bounds(count, parts)
    assert [index for start, stop in bounds for index in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in bounds]
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


def test_shares_are_proportional() -> None:
    assert share_bounds(10, 3, [1, 2, 1]) == [(0, 3), (3, 8), (8, 10)]
    assert share_bounds(10, 3, [0, 1, 1]) == [(0, 0), (0, 5), (5, 10)]
    assert share_bounds(7, 2, [0.1, 0.2]) == [(0, 2), (2, 7)]
    for count in range(60):
        bounds = share_bounds(count, 4, [0.7, 0.11, 3.0, 1e-9])
        assert [i for start, stop in bounds for i in range(start, stop)] == list(range(count))
        for share, (start, stop) in zip([0.7, 0.11, 3.0, 1e-9], bounds, strict=True):
            assert abs(stop - start - count * share / 3.81) < 1


@pytest.mark.parametrize("shares", [[1.0], [1, -1], [0, 0], [1, float("inf")], [1, float("nan")]])
def test_wrong_shares_are_refused(shares: list[float]) -> None:
    with pytest.raises(PlanError):
        share_bounds(10, 2, shares)
