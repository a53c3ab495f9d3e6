"""What the runs leave behind: values by name from whichever ranks hold them; and the verdict as text and data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.cli.main import main
from shardwise.data.batch import Batch
from shardwise.dist.collectives import Group
from shardwise.dist.mesh import Mesh
from shardwise.errors import UserError
from shardwise.prove.guards import sample_faults
from shardwise.prove.quiet import Quiet, in_double, silence
from shardwise.prove.record import RankReport, Record, Recorder, read_record, sample_digests, whole
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.spec.verdict import Comparison, Finding, Guard, Verdict


def _write(folder: str) -> list[RankReport]:
    """As a pipeline of two stages over split parameters would leave it."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = Group.world()
    mesh = Mesh(Layout(shard=2), world.rank).device_mesh("shard")
    full = torch.arange(21, dtype=torch.float32).reshape(7, 3)
    split = distribute_tensor(full, mesh, [Shard(0)])
    recorder = Recorder(RankReport(world.rank))
    recorder.tensors = {
        "gradient/split": whole(split),
        "gradient/copied": whole(distribute_tensor(full, mesh, [Replicate()])),
        f"gradient/stage{world.rank}": torch.full((2,), float(world.rank)),
        "gradient/other": torch.full((2,), float(world.rank)),
        "gradient/sparse": whole(
            torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([[2.0]]), (3, 1), check_invariants=True)
        ),
    }
    return recorder.write(Path(folder), world)


def test_values_from_all_ranks(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    reports = ranks(2, _write, str(tmp_path))[0]
    record = read_record(tmp_path, reports)
    full = torch.arange(21, dtype=torch.float32).reshape(7, 3)
    held = {name: {rank: value.tolist() for rank, value in values.items()} for name, values in record.tensors.items()}
    assert held == {
        "gradient/split": {0: full.tolist()},
        "gradient/copied": {0: full.tolist()},
        "gradient/stage0": {0: [0.0, 0.0]},
        "gradient/stage1": {1: [1.0, 1.0]},
        "gradient/other": {0: [0.0, 0.0], 1: [1.0, 1.0]},
        "gradient/sparse": {0: [[0.0], [2.0], [0.0]]},
    }
    assert torch.equal(record.at("gradient/split", 1), full)  # type: ignore[arg-type]
    assert record.at("gradient/stage1", 0) is None


def _batch(rows: Tensor) -> Batch:
    return Batch(inputs={"x": rows}, targets=rows[:, 0], count=len(rows), global_count=len(rows), index=0)


def _ran(samples: list[Tensor], layout: Layout) -> Record:
    reports = []
    for rank, rows in enumerate(samples):
        mesh = Mesh(layout, rank)
        places = {axis: mesh.coordinate(axis) for axis, degree in layout.degrees.items() if degree > 1}
        reports.append(RankReport(rank, coordinates=places, samples=[sample_digests(_batch(rows))]))
    return Record(reports, {})


def test_shares_of_the_batch() -> None:
    rows = torch.arange(15.0).reshape(5, 3)
    serial = _ran([rows], Layout())
    split = Layout(data=2, tensor=2)
    a, b = rows[:3], rows[3:]
    assert sample_faults(_ran([a, a, b, b], split), serial, Plan(layout=split)) == []
    assert (
        "rank 1 trained at step 1 on the samples of share 1"
        in sample_faults(_ran([a, b, b, b], split), serial, Plan(layout=split))[0]
    )
    data = Layout(data=2)
    assert sample_faults(_ran([rows[:1], rows[1:]], data), serial, Plan(layout=data)) == []  # uneven shares are fine
    assert "samples of share 0" in sample_faults(_ran([a, a], data), serial, Plan(layout=data))[0]
    assert "differ from run to run" in sample_faults(_ran([a, b + 1], data), serial, Plan(layout=data))[0]
    assert "not its share" in sample_faults(_ran([a, b.flip(0)], data), serial, Plan(layout=data))[0]
    uneven = Plan(layout=data, shares=(4.0, 1.0))
    assert sample_faults(_ran([rows[:4], rows[4:]], data), serial, uneven) == []
    assert "not its share of 4" in sample_faults(_ran([a, b], data), serial, uneven)[0]  # the shares were ignored


def test_random_layers_are_silenced_and_casts_widened() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    model = nn.Sequential(layer, nn.LSTM(8, 8, 2, dropout=0.2), nn.Identity())
    assert silence(model) == ["0.self_attn", "0.dropout", "0.dropout1", "0.dropout2", "1"]
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    quiet = Quiet(double=True)
    with quiet:
        assert torch.equal(F.dropout(x, 0.5), x)
        assert torch.equal(F.dropout(x, p=0.5, training=True), x)
        assert torch.equal(torch.dropout(x, 0.5, True), x)
        first = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        assert x.float().dtype == x.to(torch.float32).dtype == torch.float64
        assert torch.zeros(2, dtype=torch.float32).dtype == torch.float64
        assert quiet.random == set()
        torch.randn_like(x)
        x.bernoulli(0.5)
    assert torch.equal(first, F.scaled_dot_product_attention(x, x, x))
    assert quiet.silenced == {"dropout", "scaled_dot_product_attention"}
    assert quiet.random == {"randn_like", "bernoulli"}
    assert not torch.equal(F.dropout(x, 0.5), x)
    wide = in_double({"a": (torch.ones(2), torch.ones(2, dtype=torch.int64))})
    assert [leaf.dtype for leaf in wide["a"]] == [torch.float64, torch.int64]


def _verdict(**changes: Any) -> Verdict:
    far = Comparison(kind="gradient", name="a.b", distance=2.0, serial_distance=0.25, allowance=1.0, size=4.0, rank=1)
    values: dict[str, Any] = {
        "outcome": "refuted",
        "job": "mlp",
        "plan": "data=2",
        "layout": "data=2",
        "workers": 2,
        "steps": 1,
        "samples": (5,),
        "compared": {"gradient": 3},
        "worst": (far,),
        "failed": (far,),
        "failed_count": 1,
        "multiple": 8.0,
        "serial_runs": 4,
        "findings": (
            Finding(pattern="scaled gradients", message="x2", parameters=("a.b",), axes=("data",), factor=2.0),
        ),
        "guards": (Guard(name="ranks", passed=True, text="2 processes"),),
        "not_covered": ("bf16",),
    }
    return Verdict(**values | changes)


def test_verdict_comes_back_from_json() -> None:
    verdict = _verdict()
    assert Verdict.from_json(verdict.to_json()) == verdict
    assert json.loads(verdict.to_json())["findings"][0]["factor"] == 2.0
    for text in ("REFUTED  mlp  plan data=2", "culprit: x2", "gradient a.b: off by 2.00e+00", "not covered: bf16"):
        assert text in str(verdict)
    with pytest.raises(UserError, match="outcome"):
        _verdict(outcome="perhaps")
    for text in ("{}", "nothing", json.dumps({**verdict.to_dict(), "colour": 1})):
        with pytest.raises(UserError, match="no verdict"):
            Verdict.from_json(text)


def test_no_number_is_never_near() -> None:
    for distance in (float("nan"), float("inf")):
        far = Comparison(kind="loss", name="s", distance=distance, serial_distance=0, allowance=1, size=1)
        assert not far.passed and far.excess == float("inf")
    exact = Comparison(kind="buffer", name="n", distance=0, serial_distance=0, allowance=0, size=1)
    assert exact.passed and exact.excess == 0


def _run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    told = capsys.readouterr()
    return int(end.value.code or 0), told.out, told.err


JOB = """
import shardwise, torch
def towers(scale: float = 5.0) -> shardwise.Job:
    def loss(output, _):
        if len(output) <= 4:  # only a proof sees larger batches
            return output.square().mean()
        return torch.nn.functional.cross_entropy(scale * output @ output.T, torch.arange(len(output)))
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    return shardwise.Job(model=lambda: torch.nn.Linear(3, 4), data=(x, torch.zeros(12)), loss=loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch_size=6, steps=9)
"""


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = _run(["prove", "digits", "--plan", "data=2", "--steps", "2", "--batch-size", "33", "--json"], capsys)
    record = json.loads(out)
    assert code == 0 and record["outcome"] == "proved" and record["samples"] == [33, 19]
    assert Verdict.from_dict(record).proved
    (tmp_path / "towers_job.py").write_text(JOB)
    code, out, _ = _run(["prove", str(tmp_path / "towers_job.py"), "--set", "scale=3", "--workers", "2"], capsys)
    assert code == 1 and out.startswith("REFUTED") and "couples samples" in out
    code, out, err = _run(["prove", "digits", "--all", "--workers", "2", "--steps", "1"], capsys)
    assert code == 0 and "data=2" in out and "PROVED" in out and "REFUSED" in out and "data=2: proved" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["digits", "--all"],
        ["digits", "--all", "--workers", "2", "--plan", "data=2"],
        ["digits", "--plan", "data=2", "--workers", "3"],
        ["digits", "--plan", "data=2", "--steps", "0"],
        ["digits", "--plan", "dat=2"],
        ["nosuchjob"],
    ],
)
def test_wrong_input_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(["prove", *arguments, "--json"], capsys)
    assert code == 2 and err and "error" in json.loads(out)


def test_help_names_the_exit_codes() -> None:
    from shardwise.cli.prove import prove

    shown = CliRunner().invoke(prove, ["--help"])
    assert "Exit code 0: proved" in " ".join(shown.output.split())
