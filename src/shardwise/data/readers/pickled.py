"""Pickles of plain containers, numbers, strings and NumPy arrays, read without running anything that is in them.

A pickle with one large array, as most data sets have, is read in one copy: the bytes of the array go from the file to
where they are wanted, and the rest is unpickled without them. The usual way copies them three times into memory that is new
every time, which takes ten times as long.
"""

import io
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import DataError

_LARGE = 1 << 20
_BEFORE = 1 << 22
"""How far into a file the large array is looked for."""

_STRING = re.compile(rb"[TB](?s:....)")
"""Opcodes BINSTRING and BINBYTES (Python: Lib/pickletools.py), each followed by its length in 4 bytes, little-endian."""

_STAND_IN = b"the bytes of the large array of this pickle"


def load_arrays(path: Path, into: NDArray[np.uint8] | None = None) -> Any:
    """What a pickle holds; no class in it but arrays is ever looked up. Text of Python 2 comes as bytes.

    Args:
        path: of the pickle.
        into: contiguous room for the values of a large array of bytes; where that could be used, the array is a view of it.

    Raises:
        DataError: damaged, or something else is in it.
        OSError: the file cannot be read.
    """
    if into is not None:
        content = _load_around(path, into.reshape(-1))
        if content is not None:
            return content
    try:
        with path.open("rb") as file:
            return _ArraysUnpickler(file, encoding="bytes").load()
    except OSError:
        raise
    except DataError as error:
        raise DataError(f"{path} {error}") from None
    except Exception as error:
        raise DataError(f"{path} is damaged or no pickle ({type(error).__name__}: {error}); fetch it again") from error


def _load_around(path: Path, into: NDArray[np.uint8]) -> Any:
    """As `load_arrays`, with the bytes of the large array read straight into place; None for any other file."""
    with path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        head = file.read(min(size, _BEFORE))
        for found in _STRING.finditer(head):
            length = int.from_bytes(found.group()[1:], "little")
            behind = found.end() + length
            if not (max(_LARGE, size // 2) <= length <= len(into) and behind <= size):
                continue
            file.seek(behind)
            parts = (head[: found.start()], b"U", bytes([len(_STAND_IN)]), _STAND_IN, file.read())
            room = into[:length]
            try:
                content = _AroundUnpickler(b"".join(parts), room).whole()
            except Exception:  # noqa: BLE001  # these bytes were no string, or something is wrong with the file
                continue
            file.seek(found.end())
            if content is not None and _read_all(file, room):
                return content
    return None


def _read_all(file: Any, room: NDArray[np.uint8]) -> bool:
    view, done = room.data, 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            return False
        done += count
    return True


_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)  # how Python 3 writes bytes in the old pickle protocols


class _ArraysUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return _RECONSTRUCT
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
            case "_codecs", "encode":
                return _encode
        raise DataError(f"asks for {module}.{name}: only NumPy arrays, numbers, strings and containers are loaded")


@final
class _Array:
    """An array while it is unpickled; the one whose bytes are the stand-in becomes a view of the room."""

    def __init__(self, room: NDArray[np.uint8], *made_of: Any) -> None:
        self.room, self.array, self.is_stand_in = room, _RECONSTRUCT(*made_of), False

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, values = state
        self.is_stand_in = values == _STAND_IN
        if not self.is_stand_in:
            self.array.__setstate__(state)
        elif dtype == np.uint8 and not is_fortran:
            self.array = self.room.reshape(shape)
        else:
            raise DataError("holds an array that is not of bytes")


@final
class _AroundUnpickler(_ArraysUnpickler):
    def __init__(self, content: bytes, room: NDArray[np.uint8]) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._room = room

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return partial(_Array, self._room) if found is _RECONSTRUCT else found

    def whole(self) -> Any:
        """The content, where it is a dict with the stand-in among its values; else None."""
        content = self.load()
        if not isinstance(content, dict):
            return None
        arrays = {name: value for name, value in content.items() if isinstance(value, _Array)}
        if sum(value.is_stand_in for value in arrays.values()) != 1:
            return None
        return {**content, **{name: value.array for name, value in arrays.items()}}
