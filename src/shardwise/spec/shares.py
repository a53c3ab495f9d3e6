"""How a global batch is divided over the ranks that hold different samples: exact arithmetic, the same on every rank."""

from collections.abc import Sequence
from fractions import Fraction

from shardwise.errors import PlanError


def share_bounds(count: int, parts: int, shares: Sequence[float] | None = None) -> list[tuple[int, int]]:
    """Contiguous `[start, stop)` of `count` samples for each of `parts` ranks; together they cover it exactly once.

    Without `shares` the sizes differ by at most one, larger ones first. With `shares` (one number >= 0 a rank, in any
    unit) sizes are proportional by the method of largest remainders, in exact arithmetic, so that every rank computes
    the same answer; ties go to the lower rank. A size may be 0.

    Raises:
        PlanError: no ranks, or shares that are not one finite number >= 0 a rank with a sum above 0.
    """
    if parts < 1 or count < 0:
        raise PlanError(f"{count} samples over {parts} ranks: there must be at least 1 rank and 0 samples")
    if shares is None:
        base, more = divmod(count, parts)
        sizes = [base + (rank < more) for rank in range(parts)]
    else:
        sizes = _largest_remainder(count, parts, shares)
    bounds, start = [], 0
    for size in sizes:
        bounds.append((start, start + size))
        start += size
    return bounds


def _largest_remainder(count: int, parts: int, shares: Sequence[float]) -> list[int]:
    if len(shares) != parts:
        raise PlanError(f"{len(shares)} shares for {parts} ranks: give one number a rank")
    if not all(0 <= share < float("inf") for share in shares) or not sum(shares) > 0:
        raise PlanError(f"shares are {list(shares)!r}: give finite numbers of at least 0, not all of them 0")
    exact = [Fraction(share) for share in shares]
    scale = Fraction(count) / sum(exact)
    sizes = [int(share * scale) for share in exact]
    by_remainder = sorted(range(parts), key=lambda rank: (sizes[rank] - exact[rank] * scale, rank))
    for rank in by_remainder[: count - sum(sizes)]:
        sizes[rank] += 1
    return sizes
