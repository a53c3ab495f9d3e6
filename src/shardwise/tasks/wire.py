"""What travels between the scheduler and its workers: values, arrays without copies, and whole messages.

A message is one packet of a `SOCK_SEQPACKET` pair, so that it is taken whole, by one reader, or not at all. Arrays and
other large buffers lie in files that exist in memory only (`memfd`); their descriptors travel with the message. Such a
file ends with its last holder, however that ends, so nothing can be left behind. A reader maps it privately: it sees the
sender's pages, and what it writes is its own.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import io
import os
import pickle
import socket
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import Any, final

BIG_BUFFER = 128 * 1024
"""Bytes from which a buffer goes into memory of its own: below, two copies through a socket cost less than mapping."""

BIG_MESSAGE = 96 * 1024
"""Bytes from which a message does; a packet must fit the socket's buffer (Linux gives 208 KiB)."""

_ALIGN = 64
_MAX_DESCRIPTORS = 64
_ACCESS = 0x1 | 0x2  # PROT_READ | PROT_WRITE
_PRIVATE = 0x02  # MAP_PRIVATE


@final
class SharedFile:
    """A file in memory; closed when nobody refers to it any more."""

    __slots__ = ("__weakref__", "fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        weakref.finalize(self, os.close, fd)

    @classmethod
    def of(cls, buffers: Sequence[memoryview]) -> SharedFile:
        """A new file with the buffers one after the other, each at a multiple of 64 bytes."""
        starts, size = places([len(buffer) for buffer in buffers])
        fd = os.memfd_create("shardwise")
        shared = cls(fd, size)
        os.ftruncate(fd, size)
        for buffer, start in zip(buffers, starts, strict=True):
            done = 0
            while done < len(buffer):  # one call writes at most 2 GiB
                done += os.pwrite(fd, buffer[done:], start + done)
        return shared

    def map(self) -> memoryview:
        """The file's bytes, shared until they are written to. The mapping ends with the last view of it."""
        return _map(self.fd, self.size)


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


_LIBC = _libc()


def _map(fd: int, size: int) -> memoryview:
    # Python's own mmap keeps a descriptor open for each mapping, and a process has only about a thousand of them.
    address = _LIBC.mmap(None, size, _ACCESS, _PRIVATE, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise MemoryError(f"cannot map {size} bytes: {os.strerror(number)}")
    array = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(array, _LIBC.munmap, address, size).atexit = False
    return memoryview(array).cast("B")


def places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each of the buffers starts in a file, and the file's size."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _ALIGN) * _ALIGN
    return starts, end


@final
@dataclass(frozen=True, slots=True)
class Payload:
    """A value as bytes: a pickle, and its large buffers in a file."""

    data: bytes
    sizes: tuple[int, ...] = ()
    file: SharedFile | None = None

    def decode(self) -> Any:
        """The value."""
        if self.file is None:
            return pickle.loads(self.data)
        view = self.file.map()
        starts, _ = places(self.sizes)
        return pickle.loads(
            self.data, buffers=[view[start : start + size] for start, size in zip(starts, self.sizes, strict=True)]
        )

    @property
    def size_bytes(self) -> int:
        return len(self.data) + sum(self.sizes)


def encode(value: Any) -> Payload:
    """A value as a payload.

    Raises:
        Exception: whatever its own pickling raises.
    """
    buffers: list[memoryview] = []

    def keep_inside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < BIG_BUFFER:
            return True
        buffers.append(raw)
        return False

    data = _dumps(value, keep_inside, buffers)
    if not buffers:
        return Payload(data)
    return Payload(data, tuple(len(buffer) for buffer in buffers), SharedFile.of(buffers))


def _dumps(value: Any, keep_inside: Callable[[pickle.PickleBuffer], bool], buffers: list[memoryview]) -> bytes:
    try:
        if "torch" in sys.modules:
            stream = io.BytesIO()
            pickler = pickle.Pickler(stream, 5, buffer_callback=keep_inside)
            pickler.dispatch_table = _torch_table()
            pickler.dump(value)
            data = stream.getvalue()
        else:
            data = pickle.dumps(value, 5, buffer_callback=keep_inside)
        if b"__main__" not in data:
            return data
    except (pickle.PicklingError, AttributeError, TypeError):
        pass  # functions and classes without an importable name travel as what they are
    buffers.clear()
    return _cloud_dumps(value, keep_inside)


def _cloud_dumps(value: Any, keep_inside: Callable[[pickle.PickleBuffer], bool] | None) -> bytes:
    import cloudpickle

    stream = io.BytesIO()
    pickler = cloudpickle.Pickler(stream, protocol=5, buffer_callback=keep_inside)
    if "torch" in sys.modules:
        table = dict(pickler.dispatch_table)
        table.update(_torch_only())
        pickler.dispatch_table = table
    pickler.dump(value)
    return stream.getvalue()


def _torch_table() -> dict[type, Callable[[Any], Any]]:
    import copyreg

    return {**copyreg.dispatch_table, **_torch_only()}


def _torch_only() -> dict[type, Callable[[Any], Any]]:
    torch = sys.modules["torch"]
    return {torch.Tensor: _reduce_tensor}


def _reduce_tensor(tensor: Any) -> Any:
    """A plain tensor on the CPU through its array, whose buffer can stay where it is; others in torch's own way."""
    torch = sys.modules["torch"]
    plain = (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.requires_grad
        and not tensor.is_conj()
        and not tensor.is_neg()
        and tensor.is_contiguous()
        and tensor.dtype in _NUMPY_KINDS()
        and not tensor.__dict__
    )
    return (_tensor_of, (tensor.numpy(),)) if plain else tensor.__reduce_ex__(5)


def _NUMPY_KINDS() -> frozenset[Any]:
    torch = sys.modules["torch"]
    names = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
    return frozenset(getattr(torch, name) for name in names)


def _tensor_of(array: Any) -> Any:
    import torch

    return torch.from_numpy(array)


def encode_function(function: Callable[..., Any]) -> Payload:
    """A function as a payload: by its name where a worker can import it, else as what it is.

    Raises:
        Exception: whatever pickling what it refers to raises.
    """
    import cloudpickle

    inner = function
    while isinstance(inner, functools.partial):  # its own module is functools
        inner = inner.func
    module = sys.modules.get(getattr(inner, "__module__", None) or "")
    by_value = module is not None and not _importable(module)
    if by_value:
        cloudpickle.register_pickle_by_value(module)
    buffers: list[memoryview] = []

    def keep_inside(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < BIG_BUFFER:
            return True
        buffers.append(raw)
        return False

    try:
        data = _cloud_dumps(function, keep_inside)
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)
    return Payload(data, tuple(len(buffer) for buffer in buffers), SharedFile.of(buffers) if buffers else None)


def _importable(module: Any) -> bool:
    """Whether importing the module's name in another process finds the same file."""
    name = module.__name__
    if name == "__main__" or name in sys.builtin_module_names:
        return True  # cloudpickle sends what is in __main__ by value anyway
    # Not importlib.util.find_spec: of what is loaded, it tells only that.
    found, path = None, None
    for end in range(1, name.count(".") + 2):
        found = _find(".".join(name.split(".")[:end]), path)
        if found is None:
            return False
        path = found.submodule_search_locations
    return found is not None and found.origin == getattr(module, "__file__", found.origin)


def _find(name: str, path: Any) -> ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            found = finder.find_spec(name, path)
        except (ImportError, AttributeError, ValueError):
            continue
        if found is not None:
            return found
    return None


# Whole messages


def send(sock: socket.socket, message: Any, files: Sequence[SharedFile] = ()) -> bool:
    """Send one message; False where the socket does not block and has no room.

    Raises:
        OSError: the other end is gone.
    """
    body = pickle.dumps(message, 5)
    held = list(files)
    if len(body) > BIG_MESSAGE:
        shared = SharedFile.of([memoryview(body)])
        held.append(shared)
        body = b"B" + len(body).to_bytes(8, "little")
    else:
        body = b"S" + body
    assert len(held) <= _MAX_DESCRIPTORS
    try:
        if held:
            socket.send_fds(sock, [body], [file.fd for file in held])
        else:
            sock.send(body)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno == errno.ENOBUFS:
            return False
        raise
    return True


MESSAGE_ROOM = BIG_MESSAGE + 4096
ROOM = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)


def receive(sock: socket.socket) -> tuple[Any, list[int]] | None:
    """One message and the descriptors that came with it, which now are ours; None where the other end is closed.

    Raises:
        BlockingIOError: the socket does not block and has nothing.
    """
    try:
        body, extra, _, _ = sock.recvmsg(MESSAGE_ROOM, ROOM)
    except ConnectionResetError:  # closed with something still unread
        return None
    return unpack(body, extra) if body else None


def unpack(body: bytes, extra: Sequence[tuple[int, int, bytes]]) -> tuple[Any, list[int]]:
    """A message as `recvmsg` gives it, and its descriptors, which now are ours."""
    descriptors: list[int] = []
    for _, _, data in extra:
        descriptors += [int.from_bytes(data[i : i + 4], sys.byteorder) for i in range(0, len(data), 4)]
    if body[:1] == b"B":
        fd = descriptors.pop()
        size = int.from_bytes(body[1:9], "little")
        whole = bytearray(size)
        done = 0
        while done < size:
            done += os.preadv(fd, [memoryview(whole)[done:]], done)
        os.close(fd)
        return pickle.loads(whole), descriptors
    return pickle.loads(memoryview(body)[1:]), descriptors


Wired = tuple[bytes, tuple[int, ...]]
"""A payload in a message; its file, where it has sizes, is the next of the message's descriptors."""


def to_wire(payload: Payload, files: list[SharedFile]) -> Wired:
    if payload.file is not None:
        files.append(payload.file)
    return payload.data, payload.sizes


def from_wire(wired: Wired, descriptors: list[int]) -> Payload:
    """Takes the payload's descriptor off the front of the list."""
    data, sizes = wired
    if not sizes:
        return Payload(data)
    return Payload(data, sizes, SharedFile(descriptors.pop(0), places(sizes)[1]))
