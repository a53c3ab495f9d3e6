"""The blocks of a model: what other kinds of parallelism treat as a whole where the plan names nothing."""

from __future__ import annotations

from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that are never called themselves."""


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called; a `ModuleDict`, or a class of parts, cannot."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def repeated_blocks(model: nn.Module) -> list[str]:
    """Names of the outermost repeated blocks, in the order of the module tree.

    A block is a child of a module that has at least two children of one class with structure of their own (the layers of a
    transformer, the stages of a ResNet). Attention of torch's own is none: the layer around it is.
    """
    chosen = [name for name, module in model.named_modules() if _is_block(model, name, module)]
    return [name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)]


def _is_block(model: nn.Module, name: str, module: nn.Module) -> bool:
    if (
        not name
        or isinstance(module, (nn.MultiheadAttention, *CONTAINERS))
        or not any(True for _ in module.parameters())
    ):
        return False
    parent = model.get_submodule(name.rpartition(".")[0])
    alike = [
        child for child in parent.children() if type(child) is type(module) and any(True for _ in child.parameters())
    ]
    # Two linear layers side by side are no blocks; blocks have structure of their own.
    return len(alike) >= 2 and any(True for _ in module.children())
