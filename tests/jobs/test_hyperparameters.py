"""Texts of `--set` become values of the kind that the job function declares."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

import pytest

from shardwise.errors import UserError
from shardwise.run.hyperparameters import choose_values, hyper_parameters

if TYPE_CHECKING:
    from decimal import Decimal


def declared(
    flag: bool = False,
    count: int = 1,
    rate: float = 0.1,
    name: str = "a",
    folder: Path = Path("b"),
    limit: Optional[int] = None,  # noqa: UP045
    both: float | None = 1.0,
    mixed: int | str = 3,
    kind: Literal["sgd", "adam", 3, None] = "sgd",
    sizes: tuple[int, ...] = (1, 2),
    pair: tuple[int, float] = (1, 0.5),
    rates: list[float] = [],  # noqa: B006
    unseen: Decimal | None = None,
    function: type[int] = int,
) -> None: ...


def undeclared(  # type: ignore[no-untyped-def]
    flag=True, count=2, rate=0.5, name="x", nothing=None, sizes=(8, 16), mixed=(1, 0.5), empty=()
) -> None: ...


def value(function: Any, name: str, text: str) -> Any:
    return choose_values(hyper_parameters(function), {name: text}, "made")[name][0]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("flag", "true", True),
        ("flag", "No", False),
        ("flag", "1", True),
        ("count", "-3", -3),
        ("count", "1e3", 1000),
        ("count", "1_000", 1000),
        ("rate", "1", 1.0),
        ("rate", "1e-3", 0.001),
        ("name", "3", "3"),
        ("name", "", ""),
        ("folder", "x/y", Path("x/y")),
        ("limit", "none", None),
        ("limit", "4", 4),
        ("both", "None", None),
        ("both", "2", 2.0),
        ("mixed", "5", 5),
        ("mixed", "five", "five"),
        ("kind", "adam", "adam"),
        ("kind", "3", 3),
        ("kind", "none", None),
        ("sizes", "8,16,32", (8, 16, 32)),
        ("sizes", "(8, 16,)", (8, 16)),
        ("sizes", "", ()),
        ("pair", "2,3", (2, 3.0)),
        ("rates", "[1,2]", [1.0, 2.0]),
        ("unseen", "1.5", 1.5),
    ],
)
def test_annotations_decide(name: str, text: str, expected: object) -> None:
    found = value(declared, name, text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("flag", "false", False),
        ("count", "7", 7),
        ("rate", "7", 7.0),
        ("name", "7", "7"),
        ("nothing", "7", 7),
        ("nothing", "none", None),
        ("nothing", "true", True),
        ("nothing", "0.5", 0.5),
        ("nothing", "word", "word"),
        ("sizes", "4,5", (4, 5)),
        ("mixed", "4,5", (4.0, 5.0)),
        ("empty", "4,a", (4, "a")),
    ],
)
def test_without_annotations_the_default_decides(name: str, text: str, expected: object) -> None:
    found = value(undeclared, name, text)
    assert found == expected
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("name", "text", "advice"),
    [
        ("flag", "maybe", "true or false"),
        ("count", "2.5", "whole number"),
        ("count", "many", "whole number"),
        ("count", "inf", "whole number"),
        ("rate", "fast", "number"),
        ("limit", "x", "none; or write a whole number"),
        ("kind", "lbfgs", "sgd, adam, 3, None"),
        ("sizes", "1,b", "whole number"),
        ("pair", "1,2,3", "2 values"),
        ("function", "int", "cannot be written"),
    ],
)
def test_wrong_texts_are_refused_readably(name: str, text: str, advice: str) -> None:
    with pytest.raises(UserError) as caught:
        value(declared, name, text)
    assert f"--set {name}={text}" in str(caught.value)
    assert advice in str(caught.value)


def test_sources() -> None:
    chosen = choose_values(hyper_parameters(undeclared), {"rate": "1"}, "made")
    assert chosen["rate"] == (1.0, "command line")
    assert chosen["count"] == (2, "default")
    assert list(chosen) == ["flag", "count", "rate", "name", "nothing", "sizes", "mixed", "empty"]
