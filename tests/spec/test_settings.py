"""Settings say where each value came from, print themselves and come back from JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import FolderError, UserError
from shardwise.spec.settings import COMMAND_LINE, DEFAULT, JOB, PLAN_FILE, Setting, Settings

LAYERS: list[tuple[str, Mapping[str, Any]]] = [
    (COMMAND_LINE, {"workers": 4}),
    (PLAN_FILE, {"workers": 2, "compile": True}),
    (JOB, {"epochs": None}),
    (DEFAULT, {"epochs": 10, "workers": None, "compile": False, "threads": None}),
]


def test_the_strongest_layer_wins() -> None:
    settings = Settings.resolve(LAYERS)
    assert dict(settings) == {"epochs": None, "workers": 4, "compile": True, "threads": None}
    assert [item.source for item in settings.entries.values()] == [JOB, COMMAND_LINE, PLAN_FILE, DEFAULT]
    assert list(settings) == ["epochs", "workers", "compile", "threads"]


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(UserError, match=r"plan file: there is no setting 'wokers'; the settings are compile, epochs"):
        Settings.resolve([(PLAN_FILE, {"wokers": 2}), LAYERS[-1]])


def test_the_table() -> None:
    assert str(Settings.resolve(LAYERS)).splitlines() == [
        "epochs   -    job",
        "workers  4    command line",
        "compile  yes  plan file",
        "threads  -    default",
    ]
    assert str(Settings.resolve([])) == ""


def test_json_gives_back_the_same(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    settings = Settings.resolve(LAYERS).with_value("cuts", ["a", "b"], "shardwise, for this machine")
    path.write_text(settings.to_json())
    assert Settings.read(path) == settings
    assert Settings.from_dict(settings.to_dict()) == settings
    odd = Settings({"place": Setting(Path("x"), JOB), "pair": Setting((1, 2), JOB)})
    assert dict(Settings.from_dict(json.loads(odd.to_json()))) == {"place": "x", "pair": [1, 2]}


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"value": 1}}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(FolderError, match=r"cannot be read|these are no settings"):
        Settings.read(tmp_path / "settings.json")
    with pytest.raises(FolderError, match="cannot be read"):
        Settings.read(tmp_path / "missing.json")


def test_differences_are_named_whatever_the_source() -> None:
    before = Settings.resolve(LAYERS)
    after = before.with_value("workers", 8, COMMAND_LINE).with_value("compile", True, DEFAULT)
    assert before.differences(after) == {"workers": (4, 8)}
    assert Settings({"pair": Setting((1, 2), JOB)}).differences({"pair": [1, 2]}) == {}
    assert before.differences({**before, "more": 1}) == {"more": (None, 1)}
