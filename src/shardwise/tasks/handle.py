"""Handle: a task's result before there is one, given to other tasks as an argument."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwise.tasks.wire import Payload

_gathered: ContextVar[list[Handle] | None] = ContextVar("_gathered", default=None)
_inputs: ContextVar[Mapping[int, Payload] | None] = ContextVar("_inputs", default=None)


class Handle:
    """Stands for a task's result. Wherever it lies in another task's arguments, that task is given the result there.

    Attributes:
        number: of the task in its graph.
        name: of the task.
    """

    __slots__ = ("__weakref__", "name", "number")

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name

    def __repr__(self) -> str:
        return f"<task {self.number} {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        gathered = _gathered.get()
        if gathered is None:
            raise TypeError(f"{self!r} stands for a result and can only be sent as an argument of another task")
        gathered.append(self)
        return _read, (self.number,)


def _read(number: int) -> Any:
    inputs = _inputs.get()
    assert inputs is not None
    return inputs[number].decode() if number in inputs else None


@contextmanager
def gathering() -> Iterator[list[Handle]]:
    """Collects the handles among what is pickled in the block, in their order, each once for every place it has."""
    found: list[Handle] = []
    token = _gathered.set(found)
    try:
        yield found
    finally:
        _gathered.reset(token)


@contextmanager
def reading(inputs: Mapping[int, Payload]) -> Iterator[None]:
    """In the block, unpickled handles become the results of these tasks; None where a task has none."""
    token = _inputs.set(inputs)
    try:
        yield
    finally:
        _inputs.reset(token)
