"""Hyper-parameters: the keyword arguments of a job function, and how the text of `--set name=value` becomes a value."""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, final

from shardwise.errors import JobError, UserError
from shardwise.spec.settings import COMMAND_LINE, DEFAULT

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_MISSING = inspect.Parameter.empty


@final
@dataclass(frozen=True)
class HyperParameter:
    """One keyword argument of a job function.

    Attributes:
        kind: its annotation, or else the type of its default; None where neither says.
        default: `inspect.Parameter.empty` where a value must be given.
    """

    name: str
    kind: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is _MISSING

    def convert(self, text: str) -> Any:
        """The value that `text` stands for.

        Raises:
            UserError: it is not of this parameter's kind.
        """
        try:
            return convert(text, self.kind)
        except ValueError as error:
            raise UserError(f"--set {self.name}={text}: {self.name} is {_described(self.kind)}: {error}") from None

    def __str__(self) -> str:
        return self.name if self.required else f"{self.name}={self.default!r}"


def hyper_parameters(function: Callable[..., Any]) -> dict[str, HyperParameter]:
    """The hyper-parameters of a job function, in its order.

    Raises:
        JobError: it takes arguments that have no name on the command line.
    """
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise JobError(
                f"job function {function.__name__} takes {parameter}: its arguments are the hyper-parameters, so each "
                "needs a name; write keyword arguments with defaults"
            )
        kind = _resolved(function, parameter)
        if kind is _MISSING:
            kind = _kind_of(parameter.default)
        found[parameter.name] = HyperParameter(parameter.name, kind, parameter.default)
    return found


def choose_values(
    parameters: Mapping[str, HyperParameter], settings: Mapping[str, str], job: str
) -> dict[str, tuple[Any, str]]:
    """Every hyper-parameter's value and its source, `command line` or `default`.

    Args:
        settings: name -> text.
        job: what to call the job in a message.

    Raises:
        UserError: an unknown name, a text of the wrong kind, or a value that must be given and is not.
    """
    for name in settings:
        if name not in parameters:
            raise UserError(_unknown(name, parameters, job))
    values: dict[str, tuple[Any, str]] = {}
    for name, parameter in parameters.items():
        if name in settings:
            values[name] = (parameter.convert(settings[name]), COMMAND_LINE)
        elif parameter.required:
            raise UserError(f"job {job} needs a value for {name}, which has no default: add --set {name}=VALUE")
        else:
            values[name] = (parameter.default, DEFAULT)
    return values


def _unknown(name: str, parameters: Mapping[str, HyperParameter], job: str) -> str:
    if not parameters:
        return f"--set {name}: job {job} has no hyper-parameters; they are the keyword arguments of its function"
    near = difflib.get_close_matches(name, parameters, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    known = ", ".join(str(parameter) for parameter in parameters.values())
    return f"--set {name}: job {job} has no hyper-parameter {name!r}: {hint}it has {known}"


def _resolved(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The annotation as a type; empty where there is none or where its names exist for a type checker only."""
    if parameter.annotation is _MISSING:
        return _MISSING
    holder = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    names = inspect.unwrap(function).__globals__
    try:
        return typing.get_type_hints(holder, globalns=names)[parameter.name]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return _MISSING


def _kind_of(default: Any) -> Any:
    if default is _MISSING or default is None:
        return None
    if isinstance(default, tuple | list) and default:
        kinds = {type(item) for item in default}
        item = kinds.pop() if len(kinds) == 1 else float if kinds == {int, float} else None
        return tuple[item, ...] if isinstance(default, tuple) else list[item]  # type: ignore[valid-type]
    return type(default)


def convert(text: str, kind: Any) -> Any:
    """`text` as a value of `kind`: bool, int, float, str, Path, None, Literal, unions, tuples and lists of these.

    A kind of None takes what the text looks like: a number, true or false, none, or else itself.

    Raises:
        ValueError: it is not one, with a sentence on what would be.
    """
    if kind is None or kind is Any:
        return _guessed(text)
    origin = typing.get_origin(kind)
    if origin is Literal:
        return _choice(text, typing.get_args(kind))
    if origin is Union or origin is types.UnionType:
        return _first_that_fits(text, typing.get_args(kind))
    if origin in (tuple, list, Sequence):
        return _items(text, kind, origin)
    if kind in _PLAIN:
        return _PLAIN[kind](text)
    if kind in (tuple, list):
        return kind(_guessed(item) for item in _split(text))
    raise ValueError(f"a value of that kind cannot be written on the command line; {_HELP}")


_HELP = "it takes numbers, words, true or false, and lists of them"


def _bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE + _FALSE:
        raise ValueError("write true or false")
    return word in _TRUE


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)  # 1e6 is a whole number too
    except ValueError:
        number = 0.5
    if not number.is_integer():
        raise ValueError("write a whole number, such as 3")
    return int(number)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("write a number, such as 0.1 or 1e-3") from None


def _none(text: str) -> None:
    if text.strip().lower() != "none":
        raise ValueError("write none")


_PLAIN: dict[Any, Callable[[str], Any]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: str,
    Path: Path,
    type(None): _none,
}


def _guessed(text: str) -> Any:
    for reader in (_none, int, float):
        try:
            return reader(text)
        except ValueError:
            continue
    word = text.strip().lower()
    return word == "true" if word in ("true", "false") else text


def _choice(text: str, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if text == str(choice) or (choice in (True, False, None) and text.lower() == str(choice).lower()):
            return choice
    raise ValueError(f"write one of {', '.join(str(choice) for choice in choices)}")


def _first_that_fits(text: str, kinds: Sequence[Any]) -> Any:
    advice = []
    for kind in sorted(kinds, key=lambda kind: (kind is not type(None), kind is str)):  # a str fits always, so last
        try:
            return convert(text, kind)
        except ValueError as error:
            advice.append(str(error))
    raise ValueError("; or ".join(advice))


def _items(text: str, kind: Any, origin: Any) -> Any:
    inner, parts = typing.get_args(kind), _split(text)
    make = list if origin is list else tuple
    if origin is tuple and (not inner or inner[-1] is not Ellipsis):
        if len(parts) != len(inner):
            raise ValueError(f"write {len(inner)} values with commas between them")
        return make(convert(part, one) for part, one in zip(parts, inner, strict=True))
    return make(convert(part, inner[0]) for part in parts)


def _split(text: str) -> list[str]:
    bare = text.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]")
    return [part.strip() for part in bare.split(",") if part.strip()]


def _described(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}
    if kind in names:
        return names[kind]
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_described(one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return "one of a few choices"
    return f"of type {getattr(kind, '__name__', kind) if isinstance(kind, type) else kind}".replace("typing.", "")
