"""Values of JSON as the types that the fields of a dataclass have. What is of another type is a ValueError."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_MOST = 2**63
"""Whole numbers beyond this are no counts; JSON has no bound."""

Reader = Callable[[Any], Any]


@functools.cache
def field_readers(kind: type) -> dict[str, Reader]:
    """Name of each field of a dataclass -> what turns its JSON value into one of the field's type.

    Supported are numbers, texts, switches, `Any`, and lists, dicts and None of these. Numbers that JSON lacks are read from
    the words `nan`, `inf` and `-inf`.
    """
    hints = get_type_hints(kind)
    return {item.name: _reader(hints[item.name]) for item in fields(kind)}


def _reader(hint: Any) -> Reader:
    if hint is Any:
        return lambda value: value
    if hint is float:
        return _float
    if hint is int:
        return _int
    if hint in (str, bool):
        return functools.partial(_exactly, hint)
    inner = get_args(hint)
    if get_origin(hint) is list:
        return _floats if inner[0] is float else functools.partial(_list, _reader(inner[0]))
    if get_origin(hint) is dict and inner[0] is str:
        return functools.partial(_dict, _reader(inner[1]))
    if get_origin(hint) in (Union, types.UnionType) and inner[1:] == (type(None),):
        return functools.partial(_optional, _reader(inner[0]))
    raise TypeError(f"no reader for fields of type {hint}")


def _float(value: Any) -> float:
    if type(value) is float:
        return value
    if type(value) is int and abs(value) < _MOST:
        return float(value)
    if type(value) is str and value in _WORDS:
        return _WORDS[value]
    raise ValueError(f"{value!r:.40} is no number")


def _int(value: Any) -> int:
    if type(value) is not int or abs(value) >= _MOST:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _floats(value: Any) -> list[float]:
    if type(value) is list and set(map(type, value)) <= {float}:
        return value
    return _list(_float, value)


def _list(inner: Reader, value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError(f"{value!r:.40} is no list")
    return [inner(item) for item in value]


def _dict(inner: Reader, value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{value!r:.40} is no object")
    return {key: inner(item) for key, item in value.items()}


def _optional(inner: Reader, value: Any) -> Any:
    return None if value is None else inner(value)
