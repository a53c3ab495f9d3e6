"""Pool: where tasks run, and the resources they share. Its workers stay warm from one map or graph to the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, final

from shardwise.errors import UserError
from shardwise.tasks.backend import Backend
from shardwise.tasks.engine import Engine
from shardwise.tasks.local import LocalBackend
from shardwise.tasks.need import Capacity
from shardwise.tasks.options import Options, make_options

if TYPE_CHECKING:
    from pathlib import Path

    from shardwise.tasks.graph import Graph
    from shardwise.tasks.progress import Meter
    from shardwise.tasks.results import Results


@final
class Pool:
    """Warm workers and the resources that all tasks in it share; use it in a `with` block.

    Args:
        workers: how many cores there are for tasks; None takes those this process may use.
        gpus: the first so many of the visible GPUs; None takes all.
        memory: for the data of all running tasks, such as "16GiB"; None takes what is available.
        tokens: name -> how many there are of a limited thing, such as `{"licences": 4}`.
        on: None for processes of this machine, or the address of a Ray cluster (`"ray://HOST:PORT"`, `"ray"` for a local
            one).
        preload: modules to import once, before the first task; all workers share them.

    Raises:
        UserError: a number that makes no sense, or an unknown place.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        gpus: int | None = None,
        memory: str | int | None = None,
        tokens: Mapping[str, int] | None = None,
        on: str | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        self._backend: Backend
        if on is None or on == "local":
            capacity = Capacity.of_this_machine(workers=workers, gpus=gpus, memory=memory, tokens=tokens)
            self._backend = LocalBackend(capacity, preload)
        elif on == "ray" or on.startswith("ray://"):
            from shardwise.tasks.ray_backend import RayBackend

            if preload or gpus is not None or memory is not None:
                raise UserError(f"on={on!r}: gpus, memory and preload are the cluster's own; leave them out")
            self._backend = RayBackend(on, workers=workers, tokens=dict(tokens or {}))
        else:
            raise UserError(f"on={on!r}: give None for this machine, 'ray' for a local Ray, or 'ray://HOST:PORT'")
        self.engine = Engine(self._backend)
        self._owner = os.getpid()
        self._closed = False

    @property
    def capacity(self) -> Capacity:
        """What there is for all tasks together."""
        return self._backend.capacity

    @property
    def is_ours(self) -> bool:
        """Whether this process made it: in one that the user forked, the workers are not ours to end."""
        return self._owner == os.getpid()

    def check_open(self) -> None:
        """
        Raises:
            UserError: it is closed, so that nothing can start any more.
        """
        if self._closed:
            raise UserError(
                "this pool is closed: take all results inside its `with` block, for example list(pool.map(...))"
            )

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        options: Options | None = None,
        ordered: bool = True,
        errors: Literal["raise", "return"] = "raise",
        cost: Callable[[Any], float] | None = None,
        key: Callable[[Any], str] | None = None,
        window: int | None = None,
        store: Path | str | None = None,
        resume: bool = False,
        progress: bool = False,
        **given: Any,
    ) -> Results:
        """`function(item)` of every item, on the pool's workers, as `shardwise.tasks.map` describes it."""
        from shardwise.tasks.results import Results

        return Results(
            self,
            function,
            items,
            options=make_options(options, given),
            ordered=ordered,
            errors=errors,
            cost=cost,
            key=key,
            window=window,
            store=store,
            resume=resume,
            progress=progress,
        )

    def graph(
        self,
        *,
        store: Path | str | None = None,
        resume: bool = False,
        progress: bool = False,
        meter: Meter | None = None,
    ) -> Graph:
        """An empty graph of tasks that will run in this pool."""
        from shardwise.tasks.graph import Graph

        return Graph(self, store=store, resume=resume, progress=progress, meter=meter)

    def prepare(self) -> None:
        """Start what takes a while, such as the imports, and return at once."""
        self._backend.prepare()

    def close(self) -> None:
        """End the workers; what has not ended is cancelled."""
        if not self._closed and self.is_ours:
            self._closed = True
            self.engine.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def name_of(function: Callable[..., Any]) -> str:
    """What to call a function in messages and keys."""
    inner = getattr(function, "func", function)  # functools.partial
    name = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    return f"{getattr(inner, '__module__', '')}.{name}".lstrip(".")
