"""What the command tells of itself and what the pages tell of it are the same, and links between the pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import click
from click.testing import CliRunner

from shardwise.cli.main import shardwise as shardwise_command

PAGES = {
    "train": "train",
    "prove": "proof",
    "bench": "bench",
    "plan": "planner",
    "probe": "probe",
    "sweep": "sweep",
    "watch": "watch",
    "predict": "predict",
    "data": "data",
}
"""Verb -> its page."""


def _options(command: click.Command) -> set[str]:
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    return {
        word
        for one in commands
        for option in one.params
        for word in (*option.opts, *option.secondary_opts)
        if isinstance(option, click.Option) and word.startswith("--")
    }


def test_every_option_is_on_its_verbs_page_and_fits_the_terminal() -> None:
    docs = Path(__file__).parent.parent / "docs"
    everything = set()
    for verb, page in PAGES.items():
        command = shardwise_command.get_command(click.Context(shardwise_command), verb)
        assert command is not None
        told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (docs / f"{page}.md").read_text(encoding="utf-8")))
        everything |= _options(command)
        assert _options(command) - told == set(), f"docs/{page}.md does not tell of these options of {verb}"
        for one in command.commands.values() if isinstance(command, click.Group) else [command]:
            text = CliRunner().invoke(one, ["--help"], terminal_width=80).output
            assert max(map(len, text.splitlines())) <= 80
    for path in docs.glob("*.md"):
        commands = re.findall(r"^shardwise (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        told = {word for line in commands for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)}
        assert told - everything == set(), f"{path.name} tells of options that there are not"


def test_a_verb_that_is_nearly_right() -> None:
    result = CliRunner().invoke(shardwise_command, ["trian", "digits"])
    assert result.exit_code == 2 and "did you mean train?" in result.output
