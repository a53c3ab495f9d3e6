"""A checkpoint counts whole or not at all, wherever its writer is killed, and damage is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.errors import CheckpointError
from shardwise.run import dcp  # here, or forked writers would each import it anew
from shardwise.run.checkpoint import MANIFEST, latest, load, save, step_of
from shardwise.run.folder import RunFolder

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
"""What Python reports before it asks the operating system to change a file or folder."""


class Saver:
    """A model whose every number is the step, so that a mixed checkpoint shows."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.model = nn.Linear(7, 15)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(value)
                self.optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)

    def save(self, step: int, value: float | None = None, keep_last: int = 2) -> Path:
        value = float(step) if value is None else value
        self.fill(value)
        return save(
            self.folder,
            step=step,
            model=self.model,
            optimizer=self.optimizer,
            progress={"value": value},
            keep_last=keep_last,
        )

    def value(self, path: Path) -> float:
        """Load a checkpoint; all it holds must be of one value."""
        self.fill(-1.0)
        progress = load(path, model=self.model, optimizer=self.optimizer)
        found = [*self.model.parameters(), *(state["momentum_buffer"] for state in self.optimizer.state.values())]
        assert len(found) == 4
        assert all(bool((tensor == progress["value"]).all()) for tensor in found)
        value: float = progress["value"]
        return value


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    return Saver(RunFolder.create(tmp_path / "run", "test"))


def in_child(work: Callable[[], Any]) -> int:
    """Run in a forked child; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(count: int, root: Path) -> None:
    """Kill this process (SIGKILL) before its `count`-th change of a file under `root`."""
    left = [count]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(root)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def every_kill(saver: Saver, work: Callable[[], Any], check: Callable[[], None]) -> int:
    """Kill `work` before each of its file operations in turn, each time from the same start; how many there were."""
    start = saver.folder.path.with_name("start")
    shutil.copytree(saver.folder.path, start)
    count = 0
    while True:
        count += 1

        def one(count: int = count) -> None:
            die_at(count, saver.folder.path)
            work()

        status = in_child(one)
        if status == 0:
            return count - 1
        assert status == -signal.SIGKILL
        check()
        shutil.rmtree(saver.folder.path)
        shutil.copytree(start, saver.folder.path)


def leftovers(folder: RunFolder) -> list[str]:
    return [path.name for path in folder.checkpoints.iterdir() if path.name.startswith(".")]


def test_killed_anywhere_the_newest_complete_one_counts(saver: Saver) -> None:
    saver.save(1)
    saver.save(2)
    seen = set()

    def check() -> None:
        path = latest(saver.folder)
        assert path is not None
        assert saver.value(path) == step_of(path)
        seen.add(step_of(path))
        for older in saver.folder.checkpoints.glob("step-*"):
            assert saver.value(older) == step_of(older)  # none is half removed
        saver.save(4)  # the next save clears what the kill left
        assert leftovers(saver.folder) == []
        assert sorted(path.name for path in saver.folder.checkpoints.iterdir()) in (
            ["step-00000002", "step-00000004"],
            ["step-00000003", "step-00000004"],
        )

    kills = every_kill(saver, lambda: saver.save(3), check)
    assert kills >= 12, "the save was killed at too few points to show anything"
    assert seen == {2, 3}


def test_killed_anywhere_a_first_checkpoint_is_there_or_not(saver: Saver) -> None:
    seen = set()

    def check() -> None:
        path = latest(saver.folder)
        seen.add(path if path is None else saver.value(path))

    every_kill(saver, lambda: saver.save(1), check)
    assert None in seen


def test_killed_while_replacing_one_of_the_same_step(saver: Saver) -> None:
    saver.save(1, value=10.0)
    seen = set()

    def check() -> None:
        path = latest(saver.folder)
        assert path is not None
        seen.add(saver.value(path))
        before = saver.value(path)
        saver.save(2)
        assert leftovers(saver.folder) == []
        assert saver.value(saver.folder.checkpoints / "step-00000001") == before

    every_kill(saver, lambda: saver.save(1, value=20.0), check)
    assert seen == {10.0, 20.0}


def test_killed_at_any_time(saver: Saver) -> None:
    """Kills by the clock reach places between file operations, such as half-written files."""
    saver.save(1)

    def forever() -> None:
        for step in range(2, 10_000):
            saver.save(step)

    steps = [1]
    for number in range(25):
        child = os.fork()
        if child == 0:
            try:
                forever()
            finally:
                os._exit(1)
        time.sleep(0.004 * number)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        path = latest(saver.folder)
        assert path is not None
        assert saver.value(path) == step_of(path)
        steps.append(step_of(path))
    assert max(steps) > 1


def test_keep_last(saver: Saver) -> None:
    for step in range(1, 6):
        saver.save(step, keep_last=3)
    assert sorted(path.name for path in saver.folder.checkpoints.iterdir()) == [
        "step-00000003",
        "step-00000004",
        "step-00000005",
    ]
    saver.save(6, keep_last=1)
    assert [path.name for path in saver.folder.checkpoints.iterdir()] == ["step-00000006"]


def test_no_checkpoint_yet(saver: Saver) -> None:
    assert latest(saver.folder) is None
    saver.folder.checkpoints.rmdir()
    assert latest(saver.folder) is None
    assert saver.value(saver.save(1)) == 1.0


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def flip(path: Path, before: bytes) -> None:
    """Change the last bit of the byte that comes first in `before`."""
    content = bytearray(path.read_bytes())
    content[content.index(before)] ^= 1
    path.write_bytes(content)


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("truncated", lambda path: truncate(path / "__0_0.distcp"), r"__0_0\.distcp has \d+ of \d+ bytes"),
    ("missing", lambda path: (path / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
    ("no metadata", lambda path: (path / ".metadata").unlink(), r"\.metadata is missing"),
    ("no manifest", lambda path: (path / MANIFEST).unlink(), rf"has no {MANIFEST}"),
    ("torn manifest", lambda path: truncate(path / MANIFEST), rf"{MANIFEST} cannot be read"),
    ("other number", lambda path: flip(path / MANIFEST, b'1,"momentum":0.9'), rf"{MANIFEST} is not what was written"),
    ("other checksum", lambda path: flip(path / MANIFEST, b'rc32":"'), rf"{MANIFEST} is not what was written"),
    ("other list", lambda path: flip(path / ".metadata", b"K\x0f"), r"\.metadata is not what was written"),
    ("emptied", lambda path: (path / MANIFEST).write_text("{}"), rf"{MANIFEST} cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), [entry[1:] for entry in DAMAGES], ids=[entry[0] for entry in DAMAGES])
def test_damage_is_told_with_what_to_fall_back_to(damage: Callable[[Path], Any], message: str, saver: Saver) -> None:
    older, newest = saver.save(1), saver.save(2)
    damage(newest)
    with pytest.raises(CheckpointError, match=message) as caught:
        latest(saver.folder)
    assert "step-00000002" in str(caught.value)
    assert f"continue from step-00000001, move {newest} out" in str(caught.value)
    with pytest.raises(CheckpointError, match=message):
        saver.value(newest)
    shutil.move(newest, saver.folder.path / "damaged")
    assert latest(saver.folder) == older
    assert saver.value(older) == 1.0
    damage(older)
    with pytest.raises(CheckpointError, match="to start anew, for there is no older one"):
        latest(saver.folder)


def test_changed_bytes_are_found_when_loading(saver: Saver) -> None:
    path = saver.save(1)
    data = path / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    place = content.find(torch.ones(4).numpy().tobytes())
    assert place > 0
    content[place] ^= 0x40
    data.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"is damaged: __0_0\.distcp at byte \d+ is not what was written"):
        saver.value(path)


def test_a_newer_form_is_refused(saver: Saver) -> None:
    path = saver.save(1)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "version": 3}))
    with pytest.raises(CheckpointError, match="has the form 3, and this shardwise knows up to 2"):
        saver.value(path)


def test_a_manifest_of_the_first_form_is_read(saver: Saver) -> None:
    path = saver.save(1)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["crc32"], manifest["dcp_crc32"]
    (path / MANIFEST).write_text(json.dumps({**manifest, "version": 1}))
    assert saver.value(path) == 1.0


def test_a_renamed_checkpoint_is_refused(saver: Saver) -> None:
    saver.save(1)
    saver.save(2).rename(saver.folder.checkpoints / "step-00000009")
    with pytest.raises(CheckpointError, match=r"written after step 2, .* call it step-00000002 again"):
        latest(saver.folder)


def test_a_full_disk_is_an_error_and_earlier_checkpoints_count(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    saver.save(1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"step-00000002 cannot be written \(rank 0: .*No space left"):
            saver.save(2)
        patch.setattr(dcp, "FULL_BYTES", 1 << 62)  # as if what torch broke over had left no room
        with pytest.raises(CheckpointError, match=r"The disk is full: .* free on that of .*; make room, or give --out"):
            saver.save(2)
    path = latest(saver.folder)
    assert path is not None
    assert saver.value(path) == 1.0
    assert saver.value(saver.save(3)) == 3.0
    assert leftovers(saver.folder) == []


def test_other_files_among_the_checkpoints_are_left_alone(saver: Saver) -> None:
    for name in ("notes.txt", "step-x", ".hidden"):
        (saver.folder.checkpoints / name).write_text("mine")
    saver.save(1)
    assert {path.name for path in saver.folder.checkpoints.iterdir()} == {
        "notes.txt",
        "step-x",
        ".hidden",
        "step-00000001",
    }
