"""Gates: the places where a forward pass asks whether a module is to be run here.

The user's forward functions run unchanged on every stage. What changes is what happens when they call a module: a gate
hands the call to the handler of the moment, which runs it, or answers with a stand-in because another stage runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from torch import Tensor, nn

from shardwise.nn.moe import MoE


class Handler(Protocol):
    """Decides what a call of a gated module does."""

    def module_call(self, name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer the call of the module `name`, whose own code is `run`."""


@final
@dataclass
class Session:
    """Who answers gated calls of one model at the moment; nobody outside of a pipelined pass.

    Attributes:
        layers: of the units, those that keep something for the objective beside what they return.
    """

    handler: Handler | None = None
    layers: list[MoE] = field(default_factory=list)

    def forget(self) -> None:
        """Let go of what the layers keep."""
        for layer in self.layers:
            layer.take_auxiliary()


def units(model: nn.Module, opened: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every unit: the outermost modules that run as a whole on one stage.

    Args:
        opened: names of the modules whose own forward function runs on every stage; the root always does.
    """
    seen: set[int] = set()
    for child_name, child in _named_children(model, ""):
        for name, module in _units(child_name, child, opened):
            if id(module) not in seen:  # one module under two names has one gate
                seen.add(id(module))
                yield name, module


def _units(name: str, module: nn.Module, opened: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    if name in opened or isinstance(module, nn.ModuleList | nn.ModuleDict):
        for inner, child in _named_children(module, name + "."):
            yield from _units(inner, child, opened)
    else:
        yield name, module


def _named_children(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        yield prefix + name, child


@final
class Gate:
    """Stands before a module's forward function.

    What layers inside keep for the objective (`shardwise.nn.MoE` its auxiliary loss) is for the handler a part of the answer,
    so that it gets to the stage that computes the objective as any other value does.

    Attributes:
        run: the module's own code.
    """

    def __init__(self, run: Callable[..., Any], name: str, session: Session, layers: list[MoE]) -> None:
        self.run = run
        self._name = name
        self._session = session
        self._layers = layers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handler = self._session.handler
        if handler is None:
            return self.run(*args, **kwargs)
        if not self._layers:
            return handler.module_call(self._name, self.run, args, kwargs)
        answer, kept = handler.module_call(self._name, self._run_and_take, args, kwargs)
        for layer, parts in zip(self._layers, kept, strict=True):
            layer.put_auxiliary(parts)
        return answer

    def _run_and_take(self, *args: Any, **kwargs: Any) -> tuple[Any, list[list[Tensor]]]:
        answer = self.run(*args, **kwargs)
        return answer, [layer.take_auxiliary() for layer in self._layers]


def install(module: nn.Module, name: str, session: Session) -> Gate:
    """Put a gate before a module, for `module(x)` and for `module.forward(x)` alike.

    Returns:
        The inner of the two gates, behind the module's hooks.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, MoE)]
    session.layers += [layer for layer in layers if layer not in session.layers]
    inner = Gate(module.forward, name, session, layers)
    module.forward = inner
    compiled: Callable[..., Any] | None = module._compiled_call_impl
    outer = compiled if compiled is not None else module._call_impl
    module._compiled_call_impl = Gate(outer, name, session, layers)  # torch's own slot for a replaced call
    return inner
