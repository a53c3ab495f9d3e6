"""Recomputation inside a model that is cut into stages.

`torch.utils.checkpoint` with reentrance runs a part of the model without autograd and inside an autograd function, where a
stage can neither end nor take up a value with its gradient. Without reentrance it computes the same, so stages run it so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import CheckpointFunction, checkpoint


def _apply(run: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextmanager
def without_reentrance() -> Iterator[None]:
    """Inside, a checkpoint with reentrance is one without."""
    before = CheckpointFunction.__dict__.get("apply")
    CheckpointFunction.apply = staticmethod(_apply)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del CheckpointFunction.apply  # it was inherited
        else:
            CheckpointFunction.apply = before  # type: ignore[method-assign]
