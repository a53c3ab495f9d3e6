"""The compiled kernels, as functions of Python; absent where the package was installed without a C compiler."""

from __future__ import annotations

import ctypes
import importlib.machinery
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

Kernel = Callable[..., Any]
"""One operator's work, called with the arguments of its schema."""

_LEVELS = {"AVX512": ("avx512", "avx2", "plain"), "AVX2": ("avx2", "plain")}
"""What the processor can do, in torch's words -> builds that it can run, the best one first."""


@cache
def load() -> ctypes.CDLL | None:
    """The best build of max-pooling for this processor; None where there is none, and torch's own does the work."""
    for level in _LEVELS.get(torch.backends.cpu.get_cpu_capability(), ("plain",)):
        path = built(level)
        if path is None:
            continue
        try:
            return open_library(path)
        except (OSError, AttributeError):  # of another machine, or of an older version of the package
            continue
    return None


@cache
def load_convolutions() -> ctypes.CDLL | None:
    """The compiled convolutions, for processors with AVX-512 alone; None elsewhere, and torch's own do the work."""
    path = built("conv2d")
    if path is None or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        library = ctypes.CDLL(str(path))
        pointer = ctypes.c_void_p
        library.shardwise_conv2d_scratch.argtypes = [pointer]
        library.shardwise_conv2d_scratch.restype = ctypes.c_int64
        library.shardwise_conv2d.argtypes = [pointer] * 6 + [ctypes.c_int]
        library.shardwise_conv2d_weight.argtypes = [pointer] * 6
        library.shardwise_conv2d_sparse_scratch.argtypes = [pointer]
        library.shardwise_conv2d_sparse_scratch.restype = ctypes.c_int64
        library.shardwise_conv2d_sparse.argtypes = [pointer] * 8 + [ctypes.c_double] * 2
        library.shardwise_conv2d_pooled_scratch.argtypes = [pointer]
        library.shardwise_conv2d_pooled_scratch.restype = ctypes.c_int64
        library.shardwise_conv2d_pooled.argtypes = [pointer] * 7 + [ctypes.c_int]
        library.shardwise_conv2d_pooled_back_scratch.argtypes = [pointer]
        library.shardwise_conv2d_pooled_back_scratch.restype = ctypes.c_int64
        library.shardwise_conv2d_pooled_back.argtypes = [pointer] * 9
    except (OSError, AttributeError):
        return None
    return library


def built(name: str) -> Path | None:
    """The file of one build: `plain`, `avx2` or `avx512` of max-pooling; `conv2d`."""
    folder = Path(__file__).parent
    names = (f"_{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((folder / file for file in names if (folder / file).is_file()), None)


def open_library(path: Path) -> ctypes.CDLL:
    """Load a build of max-pooling and declare what is in it.

    Raises:
        OSError: it does not load here.
        AttributeError: it lacks a kernel.
    """
    library = ctypes.CDLL(str(path))
    pointer = ctypes.c_void_p
    library.shardwise_max_pool2d.argtypes = [pointer, pointer, pointer, pointer]
    library.shardwise_max_pool2d.restype = None
    return library
