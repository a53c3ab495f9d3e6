"""map: one function over many items, its results streamed as the tasks end."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, Literal, final

from shardwise.errors import UserError
from shardwise.tasks import wire
from shardwise.tasks.engine import QUEUE_SECONDS
from shardwise.tasks.options import Options
from shardwise.tasks.outcome import Outcome
from shardwise.tasks.pool import Pool, name_of
from shardwise.tasks.progress import Counts, make_meter
from shardwise.tasks.source import Live
from shardwise.tasks.store import Record, Store, open_store
from shardwise.tasks.task import Ending, Task

MOST_READY = 1000
"""Items of a list that are handed to the engine ahead of their turn, where their order does not matter."""

SLOW_SECONDS = 0.001
"""An input that takes so long for an item is one to wait for, such as a connection."""


@final
class Results(Iterator[Any]):
    """The results of a `map`, in the order of the items or as they come. Each call to `next` lets the tasks go on.

    Close it (or use it in a `with` block) to cancel what has not ended; so does leaving a `for` loop over it, if nothing else
    refers to it.
    """

    def __init__(
        self,
        pool: Pool,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        options: Options,
        ordered: bool,
        errors: Literal["raise", "return"],
        cost: Callable[[Any], float] | None,
        key: Callable[[Any], str] | None,
        window: int | None,
        store: Path | str | None,
        resume: bool,
        progress: bool,
        owns_pool: bool = False,
    ) -> None:
        if errors not in ("raise", "return"):
            raise UserError(f"errors={errors!r}: give 'raise', or 'return' to be given failures in place of results")
        if window is not None and window < 1:
            raise UserError(f"window={window}: at least 1 item must be on its way")
        self._pool, self._engine = pool, pool.engine
        self._function, self._options = function, options
        self._name = name_of(function)
        self._ordered, self._return = ordered, errors == "return"
        self._cost, self._key = cost, key
        self._live = items if isinstance(items, Live) else None
        self._items = iter(items)
        self._total = len(items) if isinstance(items, Sized) else None
        self._window = window
        self._owns_pool = owns_pool
        self._store: Store | None = open_store(store, self._name, resume=resume) if store is not None else None
        self._names: set[str] = set()
        self._open: dict[Task, tuple[int, str]] = {}
        self._ended: dict[int, Outcome | tuple[Ending, bool]] = {}
        self._arrived: deque[int] = deque()
        self._fed = self._given = 0
        self._exhausted = self._closed = False
        self._broken: BaseException | None = None
        self._counts = Counts(total=self._total)
        self._meter = make_meter(show=progress, name=self._name)
        self._sink = _weakly(self)
        pool.capacity.check(options.need)

    def __iter__(self) -> Results:
        return self

    def __repr__(self) -> str:
        """A prompt or a notebook shows this and not the results, which come by going over it."""
        given = f"{self._given} of {self._total}" if self._total is not None else str(self._given)
        return f"Results of {self._name}, {given} given: use list(...) or a for loop"

    def __next__(self) -> Any:
        outcome = self.next_outcome()
        if outcome is None:
            raise StopIteration
        if outcome.state == "done":
            return outcome.value
        if self._return:
            return outcome.failure
        try:
            return outcome.result()
        finally:
            self.close()

    def outcomes(self) -> Iterator[Outcome]:
        """How each task ended, instead of its bare result; nothing is raised for a failed one."""
        while (outcome := self.next_outcome()) is not None:
            yield outcome

    def next_outcome(self) -> Outcome | None:
        """How the next task ended; None after the last."""
        while not self._closed:
            index = self._next_index()
            if index is not None:
                if self._store is not None:
                    self._store.commit()  # another map or graph of the pool may have let it end
                return self._take(index)
            self._feed()
            if self._next_index() is not None:
                continue
            if self._exhausted and not self._open:
                self.close()
                if self._broken is not None:
                    raise self._broken
                break
            self._step()
        return None

    def _next_index(self) -> int | None:
        if not self._ordered:
            return self._arrived[0] if self._arrived else None
        return self._given if self._given in self._ended else None

    def _take(self, index: int) -> Outcome:
        self._given += 1
        if not self._ordered:
            self._arrived.popleft()
        kept = self._ended.pop(index)
        ending, restored = kept if isinstance(kept, tuple) else (None, False)
        if ending is None:
            assert isinstance(kept, Outcome)
            return kept
        return outcome_of(ending, index, f"{self._name}[{index}]", restored=restored)

    def _step(self) -> None:
        if self._live is None or self._exhausted or self._open or self._engine.busy:
            self._engine.step(self._meter.patience)  # a live source wakes it
        else:
            self._live.wait(self._meter.patience)
        if self._store is not None:
            self._store.commit()
        self._show()

    def _show(self) -> None:
        counts = self._counts
        counts.running = self._engine.running
        counts.waiting = self._engine.ready.waiting()
        self._meter.update(counts)

    def _feed_live(self, source: Live) -> None:
        for item in source.take(self._room(), self._engine.backend.wake):
            self._take_in(item)
        if source.ended:
            self._exhausted, self._broken = True, source.error

    def _take_in(self, item: Any) -> None:
        try:
            self._add(item)
        except BaseException:
            self.close()  # the item was taken, and its result will never come
            raise

    def _feed(self) -> None:
        if self._live is not None:
            self._feed_live(self._live)
            return
        room = self._room()
        while room > 0 and not self._exhausted:
            asked = time.monotonic()
            try:
                item = next(self._items)
            except StopIteration:
                self._exhausted = True
                return
            except Exception as error:  # noqa: BLE001  # the user's own code; raised after the results of what it gave
                self._exhausted, self._broken = True, error
                return
            self._take_in(item)
            room -= 1
            if time.monotonic() - asked > SLOW_SECONDS:
                # A source that makes us wait must hold up neither the tasks nor the results that are there.
                self._engine.step(0)
                if self._next_index() is not None:
                    return

    def _room(self) -> int:
        """How many more items may be taken now."""
        on_the_way = self._fed - self._given
        if self._window is not None:
            return self._window - on_the_way
        if self._total is not None:
            # Where lengths are known, the longest of all items comes first; else a few ahead will do.
            return self._total if self._cost is not None or self._store else MOST_READY - len(self._engine.ready)
        # An unbounded input: as much as keeps the workers busy, results that nobody has taken yet included.
        group = self._engine.ready.group(id(self._function), self._options.need)
        mean = group.statistics.mean if group is not None else 0.0
        each = max(4, min(1000, int(3 * QUEUE_SECONDS / mean))) if mean else 4
        return int(each * max(1.0, self._pool.capacity.cores)) - on_the_way

    def _add(self, item: Any) -> None:
        index = self._fed
        self._fed += 1
        key, expected = "", self._cost(item) if self._cost is not None else None
        if self._store is not None:
            named = self._named(item) if self._key is not None else None
            key = self._store.key(self._function, self._name, item, named=named)
            record = self._store.get(key)
            if record is not None and record.payload is not None:
                self._deliver(
                    index, Ending("done", record.payload, seconds=record.seconds, attempts=record.attempts), True
                )
                return
            if expected is None and record is not None:
                expected = record.seconds
        self._pool.check_open()
        task = self._engine.submit(
            self._function,
            lambda: wire.encode(((item,), {})),
            self._sink,
            name=f"{self._name}[{index}]",
            options=self._options,
            expected=expected,
        )
        self._open[task] = (index, key)

    def _named(self, item: Any) -> str:
        assert self._key is not None
        name = self._key(item)
        if name in self._names:
            raise UserError(
                f"key gives {name!r} for two items: in another order, each would be given the other's result from the store; "
                "give each a key of its own"
            )
        self._names.add(name)
        return name

    def _hear(self, task: Task, ending: Ending) -> None:
        if task not in self._open:
            return  # cancelled by `close`
        index, key = self._open.pop(task)
        if self._store is not None:
            self._store.put(key, Record.of(ending))
        self._deliver(index, ending, False)

    def _deliver(self, index: int, ending: Ending, restored: bool) -> None:
        self._counts.note(ending, restored=restored)
        self._ended[index] = (ending, restored)
        if not self._ordered:
            self._arrived.append(index)

    def close(self) -> None:
        """Cancel what has not ended. Results that are in the store stay there."""
        if self._closed:
            return
        self._closed = True
        if self._live is not None:
            self._live.close()
        left, self._open = list(self._open), {}
        for task in left:
            self._engine.cancel(task)
        if self._store is not None:
            self._store.close()
        self._meter.close(self._counts)
        if self._owns_pool:
            self._pool.close()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self._pool.is_ours:
            self.close()


def _weakly(results: Results) -> Callable[[Task, Ending], None]:
    """What its tasks tell their ends to. The engine holds it, and must not hold the results: nobody could give them up."""
    there = weakref.ref(results)

    def hear(task: Task, ending: Ending) -> None:
        if (asking := there()) is not None:
            asking._hear(task, ending)

    return hear


def outcome_of(ending: Ending, index: int, name: str, *, restored: bool = False) -> Outcome:
    """The outcome that users see; decodes the result."""
    return Outcome(
        index=index,
        name=name,
        state=ending.state,
        value=ending.payload.decode() if ending.payload is not None and ending.state == "done" else None,
        failure=ending.failure,
        attempts=ending.attempts,
        seconds=ending.seconds,
        peak_bytes=ending.peak_bytes,
        remarks=ending.remarks,
        restored=restored,
    )


def map_items(
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
    workers: int | None = None,
    on: str | None = None,
    **given: Any,
) -> Results:
    """`function(item)` of every item, on warm processes; an iterator over the results.

    Args:
        function: called with one item; may be a lambda or a local function.
        items: any iterable. One without a length is read only as far as needed to keep the workers busy, and while it waits
            for its next item nothing else goes on, unless it is given as `tasks.live(items)`.
        options: what each task needs; or give its fields as keyword arguments: `cores=2, timeout="10m", retries=1`.
        ordered: results in the order of the items; else as they come.
        errors: `raise` raises a TaskFailed at the place of a failed item and cancels the rest; `return` gives its
            TaskFailure in place of the result, and the others go on.
        cost: item -> how long it takes, in any unit: longer ones start first.
        key: item -> a text that names it in the store; by default a digest of its pickle.
        window: at most so many items are on their way, results not yet taken included.
        store: a file that keeps each result as soon as it is there; with
        resume: only what is missing in it runs.
        progress: show on stderr what runs, what waits and why.
        workers: cores for the tasks; None takes those this process may use.
        on: None for this machine, or the address of a Ray cluster.

    Raises:
        UserError: an option that there is not, or a task that could never start.
        TaskFailed: from `next`, see `errors`.
    """
    from shardwise.tasks.options import make_options

    pool = Pool(workers=workers, on=on)
    try:
        results = Results(
            pool,
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
            owns_pool=True,
        )
    except BaseException:
        pool.close()
        raise
    return results
