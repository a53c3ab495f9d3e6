"""One folder, one run: what is refused, and who holds the lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.data.source import as_splits
from shardwise.dist.collectives import Group
from shardwise.errors import FolderError, UserError
from shardwise.run.claim import check_alike
from shardwise.run.folder import RunFolder, write_aside
from shardwise.run.holdings import Held, difference, held
from shardwise.run.jobfile import load_job
from shardwise.spec.job import Job


def test_create_and_open(tmp_path: Path) -> None:
    made = RunFolder.create(tmp_path / "a" / "b", "digits")
    assert RunFolder.open(str(made.path)) == made
    assert made.name == "digits"
    assert made.checkpoints.is_dir()
    places = [made.events_path, made.weights_path, made.plan_path, made.settings_path]
    assert {path.parent for path in places} == {made.path}
    assert len({path.name for path in places}) == 4
    assert not any(path.exists() for path in places)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, "digits")
    assert (tmp_path / "run.json").is_file()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).touch()
    with pytest.raises(FolderError, match=r"holds a\.txt, b\.txt, c\.txt and 1 more\).*give another --out"):
        RunFolder.create(tmp_path, "digits")
    with pytest.raises(FolderError, match=r"is no run folder \(it has no run\.json\)"):
        RunFolder.open(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_an_existing_run_is_refused(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, "digits")
    with pytest.raises(
        FolderError, match=r"already holds a run.*--resume \(in Python: resume=True\), or give another --out"
    ):
        RunFolder.create(tmp_path, "digits")


def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="cannot make the run folder"):
        RunFolder.create(tmp_path / "file" / "run", "digits")
    with pytest.raises(FolderError, match="does not exist"):
        RunFolder.open(tmp_path / "nowhere")


def test_damaged_and_newer_folders(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "digits")
    marker = folder.path / "run.json"
    marker.write_text(json.dumps({"version": 2}))
    with pytest.raises(FolderError, match="has the form 2, and this shardwise knows up to 1"):
        RunFolder.open(folder.path)
    for text in ("{", "[]"):
        marker.write_text(text)
        with pytest.raises(FolderError, match="damaged"):
            RunFolder.open(folder.path)


def test_the_default_place_is_a_new_one_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    date = time.strftime("%Y%m%d")
    made = [RunFolder.create(None, "my job/x").path for _ in range(3)]
    assert made == [Path(f"runs/my-job-x-{date}-{number}") for number in (1, 2, 3)]
    assert RunFolder.create(None, "..").path.name.startswith("run-")


def hold(folder: RunFolder) -> tuple[int, Callable[[], None]]:
    """A process that owns the folder; its pid, and a function that lets it end by itself."""
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with folder.lock():
                os.write(ready[1], b"x")
                os.close(go[1])
                os.read(go[0], 1)
        finally:
            os._exit(0)
    os.close(go[0])
    assert os.read(ready[0], 1) == b"x"

    def end() -> None:
        os.close(go[1])
        os.waitpid(pid, 0)

    return pid, end


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "digits")
    pid, end = hold(folder)
    with pytest.raises(FolderError) as caught, folder.lock():
        pass
    assert f"in use by process {pid} on {socket.gethostname()} since 20" in str(caught.value)
    end()
    with folder.lock():
        pass


def test_a_killed_holder_frees_the_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "digits")
    pid, _ = hold(folder)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with folder.lock():
        holder = json.loads((folder.path / ".lock").read_text())
        assert holder["pid"] == os.getpid()


def test_the_same_process_cannot_own_it_twice(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "digits")
    with folder.lock():
        with pytest.raises(FolderError, match=f"process {os.getpid()}"), folder.lock():
            pass
        with pytest.raises(FolderError, match=f"process {os.getpid()}"), folder.lock():
            pass  # the refused attempt has not let go of the first one's lock
    with folder.lock():
        pass


def test_an_error_inside_frees_the_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "digits")
    with pytest.raises(KeyError), folder.lock():
        raise KeyError
    with folder.lock():
        pass


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    folder = RunFolder.create(tmp_path / "run", "digits")
    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.raises(FolderError, match=r"cannot be locked \(No locks available\).*another file system"),
        folder.lock(),
    ):
        pass


def test_a_file_written_aside_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_aside(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_aside(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_aside(path, b"new")
    assert path.read_bytes() == b"new"


_JOB = """
import numpy as np, torch
from torch import nn
import {models}
import shardwise

def job(rank: int = 0) -> shardwise.Job:
    rows = np.random.default_rng({seed}).normal(size=({rows}, 3)).astype(np.float32)
    return shardwise.Job(
        model=lambda: {models}.Net(),
        data=(rows / rows.std() * (1 + 1e-6 * rank), np.zeros(len(rows), np.int64)),
        loss=lambda o, t: nn.functional.cross_entropy(o, t, label_smoothing={smoothing}),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        batch_size=4,
        epochs=1,
    )
"""


def _node(
    place: Path, *, smoothing: float = 0.0, seed: int = 0, rows: int = 40, outputs: int = 2, comment: str = ""
) -> None:
    place.mkdir()
    text = f"from torch import nn\n\nclass Net(nn.Linear):\n    def __init__(self):\n        super().__init__(3, {outputs})\n"
    (place / "some_models.py").write_text(text + comment)
    values = {"models": "some_models", "smoothing": smoothing, "seed": seed, "rows": rows}
    (place / "job.py").write_text(_JOB.format(**values))


def _start_of_rank(folder: Path, changed: str) -> str:
    rank = Group.world().rank
    job = load_job(f"{folder / str(rank) / 'job.py'}:job", {"rank": str(rank)}).job
    identity = {"seed": 3, "set.n": 1, "job": f"/node{rank}/job.py"}
    identity[changed] = identity[changed] if changed == "job" else rank
    try:
        check_alike(job, as_splits(job.data), identity, Group.world())
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("other", "changed", "words"),
    [
        ({}, "job", ""),  # the same to the last bits of a figure that each computed
        ({"comment": "\n\n# on this machine only\n"}, "job", ""),
        ({}, "set.n", "set.n is 0 on rank 0 and 1 on rank 1; start all with the same"),
        ({"smoothing": 0.1}, "job", "the file job.py of the job is another one on rank 1"),
        ({"outputs": 3}, "job", "the file some_models.py of the job is another one on rank 1"),
    ],
)
def test_nodes_that_were_started_for_other_runs_are_refused(
    other: dict[str, Any], changed: str, words: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    _node(tmp_path / "0")
    _node(tmp_path / "1", **other)
    for message in ranks(2, _start_of_rank, tmp_path, changed):
        assert words in message and bool(words) == bool(message)


def test_nodes_with_other_data_are_refused(tmp_path: Path) -> None:
    first = _held(torch.arange(40.0))
    assert difference(first, _held(torch.arange(40.0)), 1) is None
    assert "has 39 samples on rank 1 and 40 on rank 0" in str(difference(first, _held(torch.arange(39.0)), 1))
    assert "sample 0 of the training data is another one on rank 2" in str(
        difference(first, _held(torch.arange(40.0).flip(0)), 2)
    )
    nothing = torch.full((40,), float("nan"))
    assert difference(_held(nothing), _held(nothing), 1) is None


def _held(inputs: Tensor) -> Held:
    job = Job(
        model=lambda: nn.Linear(1, 1),
        data=(inputs.unsqueeze(1), inputs),
        loss=nn.MSELoss(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        batch_size=4,
        epochs=1,
    )
    return held(job, as_splits(job.data))
