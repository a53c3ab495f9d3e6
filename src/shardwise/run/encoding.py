"""Plain Python values as JSON and named tensors: what a checkpoint keeps of progress, schedulers and optimizer options.

JSON values stand for themselves. What JSON lacks is an object with the key `$`: tuples, sets, counters, complex
numbers, bytes, floats without digits, dicts whose keys are no text, and tensors and arrays, which are kept apart under the path
that leads to them.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardwise.errors import CheckpointError

_TAG = "$"


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON data of `value`.

    Args:
        value: numbers, text, tensors, arrays, and lists, tuples, sets and dicts of these.
        path: name of the value; items are `path/key` and `path/index`.
        tensors: receives each tensor (detached, not copied) under its path.

    Raises:
        CheckpointError: a value of another kind, named by its path.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_TAG: "float", "value": repr(float(value))}
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {_TAG: "tensor"}
    if isinstance(value, np.number | np.bool_):
        return encode(value.item(), path, tensors)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        tensors[path] = torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
        return {_TAG: "array"}
    if isinstance(value, list):
        return _items(value, path, tensors)
    if isinstance(value, tuple | set | frozenset | deque):
        # A named tuple is kept as a plain one: its class belongs to the code, not to the data.
        kind = "tuple" if isinstance(value, tuple) else type(value).__name__
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else list(value)
        record = {_TAG: kind, "items": _items(items, path, tensors)}
        return {**record, "maxlen": value.maxlen} if isinstance(value, deque) else record
    if isinstance(value, dict):
        return _encode_dict(value, path, tensors)
    if isinstance(value, complex):
        return {_TAG: "complex", "value": [encode(value.real, path, tensors), encode(value.imag, path, tensors)]}
    if isinstance(value, bytes):
        return {_TAG: "bytes", "value": base64.b64encode(value).decode("ascii")}
    if isinstance(value, torch.dtype | torch.device):
        return {_TAG: type(value).__name__, "value": str(value)}
    raise CheckpointError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}: a checkpoint keeps numbers, text, tensors, "
        "arrays, and lists, tuples, sets and dicts of these; keep such values instead, or make the object anew after a resume"
    )


def _items(items: list[Any], path: str, tensors: dict[str, Tensor]) -> list[Any]:
    return [encode(item, f"{path}/{index}", tensors) for index, item in enumerate(items)]


def _encode_dict(value: dict[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    plain = type(value) in (dict, OrderedDict, defaultdict) or not isinstance(value, Counter)
    if plain and all(isinstance(key, str) and key != _TAG and "/" not in key for key in value):
        return {key: encode(item, f"{path}/{key}", tensors) for key, item in value.items()}
    pairs = [
        [encode(key, f"{path}/{index}/key", tensors), encode(item, f"{path}/{index}/value", tensors)]
        for index, (key, item) in enumerate(value.items())
    ]
    return {_TAG: "dict" if plain else "counter", "items": pairs}


def tensor_paths(record: Any, path: str) -> Iterator[str]:
    """Paths of all tensors in encoded data, which `decode` will ask for."""
    if isinstance(record, list):
        for index, item in enumerate(record):
            yield from tensor_paths(item, f"{path}/{index}")
    elif isinstance(record, dict):
        tag = record.get(_TAG)
        if tag in ("tensor", "array"):
            yield path
        elif tag in ("dict", "counter"):
            for index, (key, item) in enumerate(record["items"]):
                yield from tensor_paths(key, f"{path}/{index}/key")
                yield from tensor_paths(item, f"{path}/{index}/value")
        elif tag is None:
            for key, item in record.items():
                yield from tensor_paths(item, f"{path}/{key}")
        elif "items" in record:
            yield from tensor_paths(record["items"], path)


def decode(record: Any, path: str, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `encode` was given under the same path; tensors are those of `tensors`, not copied."""
    if isinstance(record, list):
        return [decode(item, f"{path}/{index}", tensors) for index, item in enumerate(record)]
    if not isinstance(record, dict):
        return record
    tag = record.get(_TAG)
    if tag is None:
        return {key: decode(item, f"{path}/{key}", tensors) for key, item in record.items()}
    if tag == "tensor":
        return tensors[path]
    if tag == "array":
        return tensors[path].numpy()
    if tag == "deque":
        return deque(decode(record["items"], path, tensors), record.get("maxlen"))
    if tag in ("dict", "counter"):
        pairs = {
            decode(key, f"{path}/{index}/key", tensors): decode(item, f"{path}/{index}/value", tensors)
            for index, (key, item) in enumerate(record["items"])
        }
        return pairs if tag == "dict" else Counter(pairs)
    if tag in _COLLECTIONS:
        return _COLLECTIONS[tag](decode(record["items"], path, tensors))
    return _decode_scalar(tag, record["value"], path)


_COLLECTIONS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def _decode_scalar(tag: str, value: Any, path: str) -> Any:
    if tag == "float":
        return float(value)
    if tag == "complex":
        return complex(*(decode(part, path, {}) for part in value))
    if tag == "bytes":
        return base64.b64decode(value)
    if tag == "device":
        return torch.device(value)
    if tag == "dtype":
        dtype = getattr(torch, value.removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype):
            return dtype
    raise CheckpointError(f"{path} is written as {tag} {value!r}, which this shardwise does not know: use a newer one")
