"""Graph: tasks that wait for tasks, with results along the edges and conditions on them.

A graph is alive: while `stream` hands out what has ended, the caller may add tasks and cancel others, so that any rule
that plain Python can express chooses what runs next.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from shardwise.errors import UserError
from shardwise.tasks import wire
from shardwise.tasks.handle import Handle, gathering
from shardwise.tasks.options import Options
from shardwise.tasks.outcome import Outcome, State, TaskFailure
from shardwise.tasks.pool import Pool, name_of
from shardwise.tasks.progress import Counts, Meter, make_meter
from shardwise.tasks.results import outcome_of
from shardwise.tasks.store import Record, Store, digest, open_store
from shardwise.tasks.task import Ending, Task
from shardwise.tasks.wire import Payload

_LEVELS = 64
"""How far up a new task raises the expected length of what it waits for."""


@final
@dataclass(slots=True, eq=False)
class _Node:
    handle: Handle
    function: Callable[..., Any] | None
    arguments: Payload | None
    options: Options
    inputs: tuple[Handle, ...]
    after: tuple[Handle, ...]
    when: Callable[..., Any] | None
    needs_all: bool
    key: str
    tail: float
    waits_for: set[int] = field(default_factory=set)
    followers: list[_Node] = field(default_factory=list)
    task: Task | None = None
    state: State | None = None
    ending: Ending | None = None
    restored: bool = False


@final
class Graph:
    """Tasks and what they wait for. Made by `Pool.graph`, or with a pool of its own by `Graph(workers=...)`.

    Args:
        pool: where the tasks run; None makes a pool that ends with the graph.
        store: a file that keeps each result as soon as it is there; with
        resume: what is in it does not run again. The program must add the same tasks in the same order.
        progress: show on stderr what runs, what waits and why.
        meter: shows it in another way.
        options: of the pool, where none is given.

    Raises:
        FolderError: the store is in use or holds something else.
    """

    def __init__(
        self,
        pool: Pool | None = None,
        *,
        store: Path | str | None = None,
        resume: bool = False,
        progress: bool = False,
        meter: Meter | None = None,
        **options: Any,
    ) -> None:
        if pool is not None and options:
            raise UserError(f"{next(iter(options))} is of the pool, and a pool is given: give one of them")
        self._store: Store | None = open_store(store, "a graph", resume=resume) if store is not None else None
        self._pool = pool if pool is not None else Pool(**options)
        self._owns_pool = pool is None
        self._engine = self._pool.engine
        self._nodes: list[_Node] = []
        self._open = 0
        self._ended: deque[_Node] = deque()
        self._counts = Counts(total=0)
        self._meter = meter or make_meter(show=progress, name="tasks")
        self._closed = False

    # What there is to do

    def add(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        options: Options | None = None,
        after: Iterable[Handle] = (),
        when: Callable[..., Any] | None = None,
        needs_all: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> Handle:
        """A task: `function(*args, **kwargs)`, where handles among the arguments, at any depth, become results.

        Args:
            function: may be a lambda or a local function. Arguments of it that are named like those below: use
                functools.partial.
            options: what it needs.
            after: tasks that must have ended, whose results it is not given.
            when: called in this process with the results of the tasks it waits for (those among the arguments in their
                order, each once, then `after`); if it says no, the task is skipped, and so is what waits for it.
            needs_all: without it, the task runs too where tasks that it waits for were skipped or failed; their results
                are None.
            name: what to call it; also its key in the store.

        Raises:
            UserError: an argument that cannot be sent, a handle of another graph, more resources than there are.
        """
        if self._closed:
            raise UserError("the graph is closed: add tasks before, or while `stream` runs")
        chosen = options or Options()
        self._pool.capacity.check(chosen.need)
        title = name or name_of(function)
        try:
            with gathering() as found:
                arguments = wire.encode((args, kwargs))
        except Exception as error:
            raise UserError(
                f"an argument of {title} cannot be sent to another process: {type(error).__name__}: {error}"
            ) from error
        inputs, others = tuple(dict.fromkeys(found)), tuple(after)
        before = [self._node(handle) for handle in dict.fromkeys((*inputs, *others))]
        key = ""
        if self._store is not None:
            key = self._store.key(function, title, arguments, named=name, after=[other.key for other in before])
        node = _Node(
            handle=Handle(len(self._nodes), title),
            function=function,
            arguments=arguments,
            options=chosen,
            inputs=inputs,
            after=others,
            when=when,
            needs_all=needs_all,
            key=key,
            tail=chosen.seconds or 1.0,
        )
        self._nodes.append(node)
        self._open += 1
        assert self._counts.total is not None
        self._counts.total += 1
        for other in before:
            if other.state is None:
                node.waits_for.add(other.handle.number)
                other.followers.append(node)
        self._raise_tails(node, before)
        if not node.waits_for:
            self._decide(node)
        return node.handle

    def share(self, value: Any, name: str = "shared value") -> Handle:
        """A value that many tasks are given: it is stored once, and its large arrays are never copied."""
        payload = wire.encode(value)
        node = _Node(
            handle=Handle(len(self._nodes), name),
            function=None,
            arguments=None,
            options=Options(),
            inputs=(),
            after=(),
            when=None,
            needs_all=True,
            key=digest(name, payload) if self._store is not None else "",
            tail=0.0,
            state="done",
            ending=Ending("done", payload),
        )
        self._nodes.append(node)
        return node.handle

    def cancel(self, handle: Handle) -> None:
        """The task need not run any more; what waits for it is skipped."""
        node = self._node(handle)
        if node.state is not None:
            return
        if node.task is not None:
            self._engine.cancel(node.task)
        else:
            self._finish(node, "cancelled", Ending("cancelled"))

    # What comes of it

    def stream(self) -> Iterator[tuple[Handle, Outcome]]:
        """Each task with how it ended, as it ends, until none is left. Tasks may be added meanwhile."""
        while True:
            if self._store is not None:
                self._store.commit()
            while self._ended:
                node = self._ended.popleft()
                yield node.handle, self._outcome(node)
            if not self._open:
                return
            self._engine.step(self._meter.patience)
            self._show()

    def run(self) -> None:
        """Run until none is left. A failed task raises nothing here: ask for its result."""
        for _ in self.stream():
            pass

    def outcome(self, handle: Handle) -> Outcome:
        """How a task ended.

        Raises:
            UserError: it has not ended yet.
        """
        node = self._node(handle)
        if node.state is None:
            raise UserError(f"{handle!r} has not ended: call run, or wait for it in stream")
        return self._outcome(node)

    def result(self, handle: Handle) -> Any:
        """The result of a task that has ended.

        Raises:
            TaskFailed: it has none; the message says why.
        """
        return self.outcome(handle).result()

    def waiting(self) -> dict[str, int]:
        """What tasks that have not started wait for -> how many."""
        found = self._engine.ready.waiting()
        tasks = sum(1 for node in self._nodes if node.state is None and node.waits_for)
        return {**found, "other tasks": tasks} if tasks else found

    def close(self) -> None:
        """Cancel what has not ended, and end the pool if it is the graph's own."""
        if self._closed:
            return
        for node in self._nodes:
            if node.state is None:
                self.cancel(node.handle)
        self._closed = True
        if self._store is not None:
            self._store.close()
        self._meter.close(self._counts)
        if self._owns_pool:
            self._pool.close()

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # How

    def _node(self, handle: Handle) -> _Node:
        if not (handle.number < len(self._nodes) and self._nodes[handle.number].handle is handle):
            raise UserError(f"{handle!r} is not of this graph: a task waits for tasks of its own graph")
        return self._nodes[handle.number]

    def _raise_tails(self, node: _Node, before: list[_Node]) -> None:
        """What long chains wait for is urgent: a task's length counts what follows it (its critical path)."""
        level = [(other, node.tail) for other in before]
        for _ in range(_LEVELS):
            following = []
            for other, tail in level:
                length = (other.options.seconds or 1.0) + tail
                if other.state is None and length > other.tail:
                    other.tail = length
                    if other.task is not None:
                        self._engine.ready.raise_rank(other.task, length)
                    following += [
                        (self._nodes[handle.number], length) for handle in dict.fromkeys((*other.inputs, *other.after))
                    ]
            if not following:
                return
            level = following

    def _decide(self, node: _Node) -> None:
        """All that the task waits for has ended: does it run?"""
        before = [self._nodes[handle.number] for handle in dict.fromkeys((*node.inputs, *node.after))]
        missing = [other for other in before if other.state != "done"]
        if missing and node.needs_all:
            self._do_without(node, missing[0])
            return
        if missing and self._store is not None:
            # Once they have results, it is another task.
            node.key = digest(node.key, ["without", *(before.index(other) for other in missing)])
        if node.when is not None:
            try:
                results = [_value(other) for other in before]
                agreed = bool(node.when(*results))
            except Exception as error:  # noqa: BLE001  # the user's own code
                details = "".join(traceback.format_exception(error))
                failure = TaskFailure(
                    kind="error", message=f"its condition failed: {error}", details=details, error=error
                )
                self._finish(node, "failed", Ending("failed", failure=failure))
                return
            if not agreed:
                self._finish(node, "skipped", Ending("cancelled"))
                return
        record = self._store.get(node.key) if self._store is not None else None
        if record is not None and record.payload is not None:
            node.restored = True
            self._finish(node, "done", Ending("done", record.payload, attempts=record.attempts, seconds=record.seconds))
            return
        assert node.function is not None and node.arguments is not None
        arguments = node.arguments
        inputs = [self._nodes[handle.number] for handle in node.inputs]
        self._pool.check_open()
        node.task = self._engine.submit(
            node.function,
            lambda: arguments,
            lambda _task, ending: self._hear(node, ending),
            name=node.handle.name,
            options=node.options,
            inputs=tuple(
                (other.handle.number, other.ending.payload)
                for other in inputs
                if other.ending is not None and other.ending.payload is not None
            ),
            expected=node.tail,
        )

    def _do_without(self, node: _Node, missing: _Node) -> None:
        if missing.state != "failed":
            self._finish(node, "skipped", Ending("cancelled"))
            return
        why = (
            missing.ending.failure.message if missing.ending is not None and missing.ending.failure is not None else ""
        )
        first_line = why.splitlines()[0] if why else "it failed"
        already = "the task it waits for failed" in first_line
        message = first_line if already else f"the task it waits for failed, {missing.handle.name}: {first_line}"
        self._finish(node, "failed", Ending("failed", failure=TaskFailure(kind="dependency", message=message)))

    def _hear(self, node: _Node, ending: Ending) -> None:
        if self._store is not None:
            self._store.put(node.key, Record.of(ending))
        self._finish(node, ending.state, ending)

    def _finish(self, node: _Node, state: State, ending: Ending) -> None:
        finished = deque([(node, state, ending)])
        while finished:
            one, its_state, its_ending = finished.popleft()
            one.state, one.ending, one.task, one.arguments = its_state, its_ending, None, None
            self._open -= 1
            self._counts.skipped += its_state in ("skipped", "cancelled")
            self._counts.note(its_ending, restored=one.restored)
            self._ended.append(one)
            followers, one.followers = one.followers, []
            for follower in followers:
                follower.waits_for.discard(one.handle.number)
                if not follower.waits_for and follower.state is None:
                    self._decide(follower)

    def _outcome(self, node: _Node) -> Outcome:
        assert node.state is not None and node.ending is not None
        outcome = outcome_of(node.ending, node.handle.number, node.handle.name, restored=node.restored)
        return outcome if outcome.state == node.state else _with_state(outcome, node.state)

    def _show(self) -> None:
        if self._meter.patience is None:
            return
        self._counts.running = self._engine.running
        self._counts.waiting = self.waiting()
        self._meter.update(self._counts)


def _value(node: _Node) -> Any:
    payload = node.ending.payload if node.ending is not None else None
    return payload.decode() if payload is not None and node.state == "done" else None


def _with_state(outcome: Outcome, state: State) -> Outcome:
    from dataclasses import replace

    return replace(outcome, state=state)
