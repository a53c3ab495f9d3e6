"""What a model returns: tensors in tuples, lists, mappings and dataclasses, also of classes of the user's libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def map_output(function: Callable[[Tensor], Any], output: Any) -> Any:
    """The same output with `function` applied to every tensor.

    Mappings and dataclasses keep their class, and with it the attributes that a loss reads; lists become tuples, and what is none
    of these (a cache, a number) stays as it is.
    """
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, Mapping):
        mapped = {key: map_output(function, value) for key, value in output.items()}
        if type(output) is dict:
            return mapped
        made: Any = copy.copy(output)
        for key, value in mapped.items():
            made[key] = value
        return made
    if isinstance(output, list | tuple):
        make = getattr(type(output), "_make", tuple)
        return make(map_output(function, value) for value in output)
    if is_dataclass(output) and not isinstance(output, type):
        made = copy.copy(output)
        for item in fields(output):
            object.__setattr__(made, item.name, map_output(function, getattr(output, item.name)))
        return made
    return output


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_output(note, output)
    return found
