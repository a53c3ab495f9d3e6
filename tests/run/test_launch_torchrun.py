"""The same script under plain python, torchrun and spawned workers. Each case imports torch anew, so there are few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardwise import errors
from shardwise.run.launch import current_rank

SCRIPT = """
import dataclasses, json, os, sys
from pathlib import Path

import torch
import torch.distributed as dist

from shardwise.dist.group import process_group
from shardwise.run.launch import current_rank, launch


def work(rank):
    with process_group(rank, "cpu", 20.0):
        if rank.rank == 1 and rank.restarts < int(sys.argv[3]):
            os._exit(7)
        x = torch.tensor([rank.rank + 1.0])
        if rank.workers > 1:
            dist.all_reduce(x)
    return {**dataclasses.asdict(rank), "total": x.item(), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    result = launch(work, workers=int(sys.argv[1]), threads=2, start_method=None if sys.argv[2] == "any" else sys.argv[2])
    Path(f"result-{result['rank']}.json").write_text(json.dumps(result))
"""


def run_script(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def results(folder: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("result-*.json"))]


def test_spawned_workers_meet(tmp_path: Path) -> None:
    done = run_script(tmp_path, sys.executable, "script.py", "2", "spawn", "0")
    assert done.returncode == 0, done.stderr
    (result,) = results(tmp_path)
    assert (result["rank"], result["workers"], result["total"], result["threads"]) == (0, 2, 3.0, 2)
    assert result["launcher"] == "local"


def test_a_script_runs_under_torchrun_and_survives_its_restart(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_script(tmp_path, *torchrun, "--max-restarts", "1", "script.py", "2", "any", "1")
    assert done.returncode == 0, done.stderr
    first, second = results(tmp_path)
    assert (first["rank"], second["rank"]) == (0, 1)
    for result in (first, second):
        assert (result["workers"], result["total"], result["threads"]) == (2, 3.0, 2)
        assert (result["launcher"], result["restarts"]) == ("torchrun", 1)


VARIABLES = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RESTART_COUNT": "5",
}


def test_torchruns_variables_are_a_rank() -> None:
    rank = current_rank(VARIABLES)
    assert rank is not None
    assert (rank.rank, rank.local_rank, rank.workers, rank.local_workers) == (3, 1, 4, 2)
    assert (rank.node, rank.nodes, rank.restarts, rank.launcher) == (1, 2, 5, "torchrun")


def test_without_them_there_is_none() -> None:
    assert current_rank({}) is None
    assert current_rank({"RANK": "0"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOCAL_RANK": ""}, "not LOCAL_RANK"),
        ({"WORLD_SIZE": "four"}, "must be a whole number"),
        ({"RANK": "4"}, "contradict each other"),
        ({"LOCAL_RANK": "2"}, "contradict each other"),
    ],
)
def test_broken_variables_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(errors.UserError, match=message):
        current_rank({**VARIABLES, **change})
