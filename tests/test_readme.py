"""The README's commands and programs, run as they stand there, and what it says of DistributedDataParallel.

Shell lines are run in order in one folder, as a reader would. `shardwise` lines run in this process, which has loaded
torch already; others in a process of their own. Only lines about set-up are read instead of run.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DistributedSampler

from shardwise.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the prose since the block before."""

    language: str
    text: str
    before: str


def _blocks() -> list[Block]:
    found, last = [], 0
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        found.append(Block(match[1], match[2], README[last : match.start()]))
        last = match.end()
    return found


BLOCKS = _blocks()
COMMANDS = [line for block in BLOCKS if block.language == "sh" for line in block.text.splitlines()]
TWO_EPOCHS = ["train", "digits", "--plan", "data=2", "--epochs", "2"]


_ran: set[str] = set()
"""Lines that were run; later ones use the folders that earlier ones left."""


def _left_out(last: str | None = None) -> str:
    """For messages of failures: commands before `last` (of the page, where none is given) that -k left out."""
    before = COMMANDS[: COMMANDS.index(last)] if last is not None else COMMANDS
    missing = [line for line in before if _words(line)[0] != "make" and line not in _ran]
    return f"; these were not run before, run the whole file: {missing}" if missing else ""


def _left_by_commands(path: Path) -> str:
    assert path.exists(), f"no command wrote {path.name}{_left_out()}"
    return path.read_text("utf-8")


def _words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of somebody who copied the README's programs out of it."""
    folder = tmp_path_factory.mktemp("reader")
    for block in BLOCKS:
        if block.language == "python":
            name = re.findall(r"`(\w+\.py)`:\s*$", block.before)[0]
            (folder / name).write_text(block.text, encoding="utf-8")
    _write_cifar10(folder / "data" / "cifar10" / "cifar-10-batches-py")
    _write_photos(folder / "photos")
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    yield folder
    os.chdir(before)
    sys.path[:] = path
    sys.modules.pop("my_job", None)


def _write_photos(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        Image.fromarray(np.full((40, 50, 3), len(name), np.uint8)).save(folder / "train" / name / "1.png")


def _write_cifar10(folder: Path) -> None:
    """Files of the published form with a few random images."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        images = random.integers(0, 256, (40, 3072), dtype=np.uint8)
        batch = {b"data": images, b"labels": random.integers(0, 10, 40).tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"class%d" % k for k in range(10)]}))


def _shardwise(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capfd.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def test_every_program_and_command_is_found() -> None:
    """The patterns of this file still match the page."""
    assert sum(block.language == "python" for block in BLOCKS) == 3
    verbs = [_words(line)[0] for line in COMMANDS]
    assert set(verbs) == {"make", "shardwise", "python", "torchrun"}
    assert verbs.count("shardwise") >= 10


@pytest.mark.parametrize("line", [line for line in COMMANDS if _words(line)[0] == "make"])
def test_set_up_commands_exist(line: str) -> None:
    subprocess.run([*_words(line), "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("line", [line for line in COMMANDS if _words(line)[0] != "make"])
def test_command(line: str, reader: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program, *rest = _words(line)
    _ran.add(line)
    if program != "shardwise":
        # The interpreter of this environment: the reader's PATH need not name it.
        command = [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else []), *rest]
        done = subprocess.run(command, cwd=reader, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr + _left_out(line)
        if "my_loop.py" in rest:
            workers = 2 if program == "torchrun" else 1
            assert done.stdout.startswith(f"{workers} worker"), done.stdout
            (reader / f"loss-{workers}").write_text(done.stdout.split()[-1], encoding="utf-8")
        return
    code, out, err = _shardwise(rest, capfd)
    if line.endswith("# refused"):
        assert code == 2
        assert err.startswith("error: plan expert=2: the model has no experts")
        return
    assert code == 0, err + _left_out(line)
    if "--json" in rest:
        assert set(json.loads(out)) >= {"run", "plan", "workers", "steps", "loss", "metrics"}
        assert err == ""
    elif rest[0] == "train":
        assert out == ""
        assert "run folder" in err
    if rest == TWO_EPOCHS:
        (reader / "two-epochs").write_text(err, encoding="utf-8")


def test_loop_gives_one_loss_on_any_number_of_workers(reader: Path) -> None:
    assert _left_by_commands(reader / "loss-1") == _left_by_commands(reader / "loss-2")


def test_first_run_prints_what_the_page_shows(reader: Path) -> None:
    shown = next(block.text for block in BLOCKS if block.text.startswith("digits: plan"))
    err = _left_by_commands(reader / "two-epochs")
    pattern = re.compile(r"^(digits: plan|epoch \d+/\d+  train loss|[a-z]+ ?[a-z]*(?=  ))", re.MULTILINE)
    said, expected = set(pattern.findall(err)), set(pattern.findall(shown))
    assert {name for name in expected if not name.startswith("epoch")} <= said
    # The seed is fixed, so the first epochs are the same numbers on every machine, up to rounding.
    train_loss = re.compile(r"epoch 2/\d+  train loss ([\d.]+)  test loss ([\d.]+)  test accuracy ([\d.]+)")
    (now,), (then,) = train_loss.findall(err), train_loss.findall(shown)
    assert [float(x) for x in now] == pytest.approx([float(x) for x in then], abs=0.02)


def test_resumed_run_went_on(reader: Path) -> None:
    """The two commands under "Checkpoints" are one run of 200 steps."""
    summary = json.loads(_left_by_commands(reader / "runs" / "long" / "summary.json"))
    assert (summary["first_step"], summary["steps"]) == (100, 200)


class _HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(x)
        return out


def _ddp_rows(find_unused: bool) -> tuple[str, str]:
    """How DistributedDataParallel takes an unused parameter, and SyncBatchNorm a CPU."""
    failure = norm = ""
    model = nn.parallel.DistributedDataParallel(_HalfUsed(), find_unused_parameters=find_unused)
    try:
        for _ in range(2):
            model(torch.ones(4, 3)).sum().backward()
    except RuntimeError as error:
        failure = str(error)
    try:
        nn.SyncBatchNorm(3)(torch.ones(4, 3))
    except ValueError as error:
        norm = str(error)
    return failure, norm


def test_rows_on_ddp(ranks: Callable[..., list[Any]]) -> None:
    """The table "What differs": an unused parameter, SyncBatchNorm on CPU, repeated samples."""
    for failure, norm in ranks(2, _ddp_rows, False):
        assert "Expected to have finished reduction" in failure
        assert "on GPU" in norm
    assert [failure for failure, _ in ranks(2, _ddp_rows, True)] == ["", ""]
    five = [list(DistributedSampler(range(5), 2, rank, shuffle=False)) for rank in range(2)]  # type: ignore[arg-type, var-annotated]
    assert five == [[0, 2, 4], [1, 3, 0]]


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = re.sub(
            r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
        )  # no programs
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            name, _, anchor = target.partition("#")
            place = (page.parent / name) if name else page
            assert place.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{page.name}: {target}"
