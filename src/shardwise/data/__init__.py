"""Data sets, readers, transforms: the names that users write as `shardwise.data.NAME`, each loaded when it is used."""

from importlib import import_module
from typing import Any

_WHERE = {
    "source": ("Arrays", "Samples", "Source", "Splits", "Stream", "as_splits"),
    "batch": ("Batch", "tree_map"),
    "folds": ("fold",),
    "transforms": ("Compose", "Flip", "Normalize", "RandomCrop", "ToFloat"),
    "readers.cifar": ("cifar10", "cifar100"),
    "readers.mnist": ("mnist",),
    "readers.images": ("image_folder",),
    "readers.packed": ("packed",),
    "readers.plain": ("arrays", "npy"),
    "readers.tables": ("csv", "parquet"),
    "readers.text": ("text",),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"shardwise.data has no {name!r}: it has {', '.join(sorted(_MODULE))}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
