"""What a function is beside its name: the values that are bound to it, and its code. A store must not mistake one for another."""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

LAMBDA = "<lambda>"

_MOST_MEMBERS = 1000
"""Larger containers count by their pickle, which is quick."""


@final
@dataclass(frozen=True, slots=True)
class Identity:
    """Digests of what a function's name does not tell.

    Attributes:
        bound: of the values that travel with it: arguments of a `functools.partial`, the object of a method, defaults, and
            variables of the function around it; empty where there are none. Of a lambda, whose name is no name, the code too.
        code: of its instructions, with the version of Python that made them. What it calls is not part of it.
    """

    bound: str
    code: str


def identity_of(function: Callable[..., Any]) -> Identity:
    """The identity of a function. Modules' globals are not in it: they belong to the program."""
    walk = _Walk()
    bound = walk.callable(function)
    version = ".".join(map(str, sys.version_info[:2]))
    return Identity(bound if walk.found else "", f"{version}:{_digest(*walk.codes)}")


def _digest(*parts: str | bytes) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()[:32]


@final
class _Walk:
    """Goes through what a function holds. Sets, whose order is another one in each process, count by their members."""

    def __init__(self) -> None:
        self.codes: list[str] = []
        self.found = False
        self._open: set[int] = set()

    def callable(self, function: Any) -> str:
        if isinstance(function, functools.partial):
            self.found = True
            return _digest("partial", self.callable(function.func), self.value([function.args, function.keywords]))
        if isinstance(function, types.MethodType):
            self.found = True
            return _digest("method", self.callable(function.__func__), self.value(function.__self__))
        if isinstance(function, types.FunctionType):
            return self._function(function)
        if isinstance(function, type) or isinstance(getattr(function, "__self__", None), types.ModuleType):
            return _digest("name", _name(function))
        call = getattr(type(function), "__call__", None)  # noqa: B004  # its code is asked for, not whether there is one
        if isinstance(call, types.FunctionType):
            self._function(call)
        self.found = True
        return self._object(function)

    def _function(self, function: types.FunctionType) -> str:
        code = _code(function.__code__)
        self.codes.append(code)
        names = function.__code__.co_freevars
        cells = [_content(cell) for cell in function.__closure__ or ()]
        bound = [function.__defaults__, function.__kwdefaults__, dict(zip(names, cells, strict=True))]
        parts = ["function", _name(function), self.value(bound) if any(bound) else ""]
        if function.__name__ == LAMBDA:
            parts.append(code)
        self.found = self.found or any(bound) or function.__name__ == LAMBDA
        return _digest(*parts)

    def value(self, value: Any) -> str:
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | types.ModuleType):
            return _digest(type(value).__name__, _name(value) if isinstance(value, types.ModuleType) else repr(value))
        if id(value) in self._open:  # it holds itself
            return _digest("again", type(value).__name__)
        self._open.add(id(value))
        try:
            return self._container(value)
        finally:
            self._open.discard(id(value))

    def _container(self, value: Any) -> str:
        kind = type(value)
        if kind in (set, frozenset):
            return self.members(value)
        if kind in (list, tuple, dict) and len(value) > _MOST_MEMBERS:
            return self._object(value)
        if kind in (list, tuple):
            return _digest(kind.__name__, *map(self.value, value))
        if kind is dict:
            return _digest("dict", *(self.value(part) for item in value.items() for part in item))
        if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            return self.callable(value)
        return self._object(value)

    def members(self, value: Any) -> str:
        return _digest(type(value).__name__, *sorted(map(self.value, value)))

    def _object(self, value: Any) -> str:
        hashed = hashlib.sha256()

        def take(buffer: pickle.PickleBuffer) -> bool:
            hashed.update(buffer.raw())
            return False

        try:
            file = io.BytesIO()
            _Pickler(file, take, self).dump(value)
            hashed.update(file.getbuffer())
        except Exception:  # noqa: BLE001  # runs the object's own code; locks, open files and the like cannot be told apart
            inside = vars(value) if hasattr(value, "__dict__") else {}
            return _digest("object", _name(type(value)), self.value(dict(inside)))
        return _digest("object", hashed.digest())


@final
class _Pickler(pickle.Pickler):
    """Writes a digest of the members for each set."""

    def __init__(self, file: io.BytesIO, take: Callable[[pickle.PickleBuffer], bool], walk: _Walk) -> None:
        super().__init__(file, 5, buffer_callback=take)
        self._walk = walk

    def persistent_id(self, value: Any) -> str | None:
        return self._walk.members(value) if type(value) in (set, frozenset) else None


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"


def _code(code: types.CodeType) -> str:
    return _digest(code.co_code, *code.co_names, *code.co_varnames, *_constants(code.co_consts))


def _constants(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        if isinstance(value, types.CodeType):
            yield _code(value)
        elif isinstance(value, frozenset):
            yield _digest("frozenset", *sorted(_constants(value)))
        elif isinstance(value, tuple):
            yield _digest("tuple", *_constants(value))
        else:
            yield _digest(type(value).__name__, repr(value))
