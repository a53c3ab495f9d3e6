"""Layers and declarations that users write as `shardwise.nn.NAME`, each loaded when it is used."""

from importlib import import_module
from typing import Any

_WHERE = {
    "moe": ("MoE", "auxiliary_loss", "with_auxiliary_loss"),
    "experts": ("declare_experts", "dispatch", "expert_load"),
    "grouped": ("grouped_linear",),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"shardwise.nn has no {name!r}: it has {', '.join(sorted(_MODULE))}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
