"""Settings: every resolved setting of a run, and where each came from.

The order of precedence is that of the layers given to `Settings.resolve`: command line, then plan or job file, then
default. They are printed when a run starts and stored in its folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from shardwise.errors import FolderError, UserError

COMMAND_LINE = "command line"
PLAN_FILE = "plan file"
JOB = "job"
DEFAULT = "default"


@final
@dataclass(frozen=True)
class Setting:
    """A value and where it came from, such as `command line`."""

    value: Any
    source: str


@final
@dataclass(frozen=True)
class Settings(Mapping[str, Any]):
    """Resolved settings; `settings["lr"]` is the value, `settings.entries["lr"].source` where it came from.

    Attributes:
        entries: by name, in the order in which they are shown.
    """

    entries: Mapping[str, Setting]

    @classmethod
    def resolve(cls, layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Settings:
        """For each name the value of the first layer that has it.

        Args:
            layers: source and values, strongest first. The last layer, the defaults, has every name there is, and its
                order is kept. A value of None is a value.

        Raises:
            UserError: a layer sets a name that there is not.
        """
        if not layers:
            return cls({})
        known = layers[-1][1]
        for source, values in layers[:-1]:
            unknown = [name for name in values if name not in known]
            if unknown:
                raise UserError(
                    f"{source}: there is no setting {unknown[0]!r}; the settings are {', '.join(sorted(known))}"
                )
        return cls(
            {name: next(Setting(values[name], source) for source, values in layers if name in values) for name in known}
        )

    def __getitem__(self, name: str) -> Any:
        return self.entries[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def with_value(self, name: str, value: Any, source: str) -> Settings:
        """The same settings with one more or another value, such as one that shardwise chose for the machine."""
        return Settings({**self.entries, name: Setting(value, source)})

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Names whose values differ -> value here and value there; a name that one side lacks counts as None there."""
        names = dict.fromkeys([*self, *other])
        pairs = {name: (_json(self.get(name)), _json(other.get(name))) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain data: name -> `value` and `source`. What JSON lacks is written as text."""
        return {name: {"value": _json(item.value), "source": item.source} for name, item in self.entries.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Settings:
        """Read what `to_dict` gave.

        Raises:
            FolderError: it is something else.
        """
        try:
            return cls({name: Setting(item["value"], str(item["source"])) for name, item in record.items()})
        except (AttributeError, KeyError, TypeError) as error:
            raise FolderError(f"these are no settings ({error}): each needs a value and a source") from error

    def to_json(self) -> str:
        """The text of a settings file."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Settings from a file that holds what `to_json` gave.

        Raises:
            FolderError: the file is missing or damaged.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FolderError(f"settings file {path} cannot be read ({error})") from error
        return cls.from_dict(record)

    def __str__(self) -> str:
        """A table: name, value, source."""
        rows = [(name, _shown(item.value), item.source) for name, item in self.entries.items()]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


def _json(value: Any) -> Any:
    """`value` as it comes back from JSON: tuples are lists, other objects their text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return str(value)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
