"""`shardwise data`: the command's answers, exit codes, and a kill in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardwise.cli.main import main
from shardwise.pack.pack import pack
from shardwise.pack.parts import PackOptions


def run(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code, *capfd.readouterr()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    path.write_text("x,letter,y\n" + "".join(f"{n},{'ab'[n % 2]},{n % 3}\n" for n in range(3000)))
    return path


def test_pack_check_show(table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    words = ["data", "pack", str(table), out, "--target", "y", "--categorical", "y", "--shard-bytes", "4k"]
    code, said, _ = run([*words, "--workers", "2", "--json"], capfd)
    assert code == 0
    packed = json.loads(said)
    assert packed["splits"]["train"]["rows"] == 3000 and packed["classes"] == ["0", "1", "2"]
    code, said, err = run(["data", "check", out, "--workers", "1"], capfd)
    assert code == 0 and "files are as they were packed" in err and "3,000 samples" in said
    code, said, _ = run(["data", "show", out, "--json"], capfd)
    assert code == 0 and json.loads(said) == packed
    victim = next(iter(sorted(Path(out).glob("*inputs*.npy"))))
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    code, said, err = run(["data", "check", out, "--json"], capfd)
    assert code == 2 and victim.name in err and json.loads(said)["kind"] == "DataError"


def test_wrong_input(table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert run(["data", "pack", str(table), out], capfd)[0] == 2
    code, _, err = run(["data", "pack", str(table), out, "--target", "z"], capfd)
    assert code == 2 and "no column 'z'" in err and "header line" in err
    code, _, err = run(["data", "show", str(tmp_path)], capfd)
    assert code == 2 and "no index.json" in err


def test_killed_and_called_again(table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--target", "y", "--shard-bytes", "256"]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "shardwise.cli.main", "data", "pack", str(table), str(out), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list((out / "parts").glob("train-*.json"))) < 10 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    if process.returncode != -signal.SIGKILL:
        pytest.skip("the packing ended before it could be killed")
    assert not (out / "index.json").exists()
    code, _, err = run(["data", "pack", str(table), str(out), *options], capfd)
    assert code == 0, err
    pack(str(table), tmp_path / "whole", PackOptions(target="y", shard_bytes=256))
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
