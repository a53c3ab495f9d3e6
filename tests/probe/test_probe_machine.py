"""What a probe finds, how it is kept, and how stale or foreign figures are noticed."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from shardwise.cli.main import shardwise
from shardwise.errors import UserError
from shardwise.probe import machine as probing
from shardwise.probe.kernels import samples
from shardwise.probe.place import cached_machine, cached_path, this_place, warnings_about
from shardwise.spec.machine import Machine
from shardwise.spec.measured import COLLECTIVES, KernelRate, Measured, MessageTime


@pytest.fixture(scope="module")
def machine() -> Machine:
    return probing.probe(quick=True)


def measured_of(machine: Machine) -> Measured:
    assert machine.measured is not None
    return machine.measured


def test_every_figure_is_positive_and_says_where_it_comes_from(machine: Machine) -> None:
    measured = measured_of(machine)
    assert measured.date == date.today().isoformat()
    assert measured.place == this_place()
    assert {item.kind for item in measured.kernels} == {sample.kind for sample in samples()}
    assert all(item.per_second > 0 and item.size > 0 for item in measured.kernels)
    assert 1e-8 < measured.call_seconds < 1e-3
    assert machine.accelerator.peak_flops["fp32"].origin == "measured"
    assert measured.date in machine.accelerator.peak_flops["fp32"].source
    # A rate that no processor has would tell of a wrong count: a core does 1 to 1000 GFLOP/s.
    assert 1e8 < machine.accelerator.peak_flops["fp32"].value < 1e13
    if measured.cores > 1:
        assert {item.collective for item in measured.messages} == set(COLLECTIVES)
        assert all(item.seconds > 0 for item in measured.messages)


def test_gradients_are_timed_on_the_way_they_take(machine: Machine) -> None:
    measured = measured_of(machine)
    if measured.cores == 1:
        pytest.skip("one core: nobody to talk to")
    ways = {item.way for item in measured.messages if item.collective == "all_reduce"}
    assert "gloo" in ways
    if this_place()["system"] == "Linux x86_64":
        assert "shared memory" in ways


def test_a_machine_file_is_read_back_as_it_was(machine: Machine, tmp_path: Path) -> None:
    machine.write(tmp_path / "machine.toml")
    assert Machine.read(tmp_path / "machine.toml") == machine


def test_a_damaged_machine_file_is_refused(machine: Machine, tmp_path: Path) -> None:
    record = machine.to_dict()
    record["measured"]["kernels"][0]["colour"] = "red"
    with pytest.raises(UserError, match="colour"):
        Machine.from_dict(record)
    del record["measured"]["kernels"], record["measured"]["date"]
    with pytest.raises(UserError, match="date"):
        Machine.from_dict(record)


def test_foreign_old_and_future_figures_are_noticed(machine: Machine) -> None:
    measured = replace(measured_of(machine), load=0.0)
    place = this_place()
    assert warnings_about(measured, place) == []
    foreign = replace(measured, place={**place, "processor": "abacus", "torch": "1.0"})
    told = warnings_about(foreign, place)
    assert any("processor was abacus" in text for text in told)
    assert any("torch was 1.0" in text for text in told)
    assert "days ago" in warnings_about(replace(measured, date="2020-01-01"), place)[0]
    assert "yet to come" in warnings_about(replace(measured, date="2990-01-01"), place)[0]
    assert "other programs" in warnings_about(replace(measured, load=9.0 * measured.cores), place)[0]
    assert "no date" in warnings_about(replace(measured, date="soon"), place)[0]


def test_the_command_keeps_its_figures_and_answers_from_them(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[object] = []

    def measure(**options: object) -> Machine:
        calls.append(options)
        return machine

    monkeypatch.setattr(probing, "probe", measure)
    out = tmp_path / "machine.toml"
    first = CliRunner().invoke(shardwise, ["probe", "--out", str(out), "--json"])
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["measured_now"] is True
    assert Machine.read(out) == machine
    assert cached_machine() == machine
    second = CliRunner().invoke(shardwise, ["probe"])
    assert second.exit_code == 0
    assert "kept" in second.output
    assert "GFLOP/s" in second.output
    assert len(calls) == 1
    CliRunner().invoke(shardwise, ["probe", "--again"])
    assert len(calls) == 2
    # Figures that another machine left under our name do not count.
    foreign = replace(machine, measured=replace(measured_of(machine), place={"processor": "abacus"}))
    foreign.write(cached_path(this_place()))
    assert cached_machine() is None
    foreign.write(out)
    checked = CliRunner().invoke(shardwise, ["probe", "--check", str(out)])
    assert checked.exit_code == 1
    assert "abacus" in checked.output


def test_out_in_a_folder_that_does_not_exist_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "probe", lambda **options: pytest.fail("measured"))
    answer = CliRunner().invoke(shardwise, ["probe", "--out", str(tmp_path / "no" / "m.toml")])
    assert isinstance(answer.exception, UserError)


# Reading the figures


def table() -> Measured:
    def rate(kind: str, size: float, workers: int, threads: int, per_second: float) -> KernelRate:
        return KernelRate(
            kind=kind, precision="fp32", size=size, workers=workers, threads=threads, per_second=per_second
        )

    def time(way: str, size: float, ranks: int, seconds: float, placement: str = "all") -> MessageTime:
        return MessageTime(
            collective="all_reduce",
            way=way,  # type: ignore[arg-type]
            ranks=ranks,
            placement=placement,
            message_bytes=size,
            seconds=seconds,
        )

    return Measured(
        date="2026-01-01",
        place={},
        cores=2,
        memory_bytes=1e9,
        call_seconds=1e-6,
        graph_seconds=1e-6,
        overlap_slowdown=1.1,
        startup_seconds=0.1,
        worker_bytes=1e8,
        kernels=(
            rate("matmul", 1e6, 1, 1, 10e9),
            rate("matmul", 1e8, 1, 1, 40e9),
            rate("matmul", 1e6, 1, 2, 15e9),
            rate("matmul", 1e6, 2, 1, 8e9),
        ),
        messages=(
            time("gloo", 1000, 2, 1e-4),
            time("gloo", 1e6, 2, 1e-3),
            time("shared memory", 1000, 2, 1e-5),
            time("gloo", 1000, 4, 5e-4),
            time("gloo", 1000, 2, 7e-4, "strided"),
        ),
    )


def test_rates_lie_between_their_neighbours_and_know_who_shares_the_machine() -> None:
    measured = table()
    assert measured.rate("matmul", 1e6, workers=1, threads=1) == 10e9
    assert measured.rate("matmul", 1e7, workers=1, threads=1) == pytest.approx(20e9)
    assert measured.rate("matmul", 1e12, workers=1, threads=1) == 40e9
    assert measured.rate("matmul", 1e6, workers=2, threads=1) == 8e9
    assert measured.rate("matmul", 1e6, workers=1, threads=2) == 15e9
    assert measured.rate("convolution", 1e6, workers=1, threads=1) is None


def test_messages_grow_with_their_size_and_keep_to_their_way() -> None:
    measured = table()
    at = measured.message_seconds
    assert at("all_reduce", 10, ranks=2, way="gloo") == 1e-4
    assert at("all_reduce", 500_500, ranks=2, way="gloo") == pytest.approx(5.5e-4)
    assert at("all_reduce", 1.999e6, ranks=2, way="gloo") == pytest.approx(1.9e-3)
    assert at("all_reduce", 10, ranks=2, way="shared memory") == 1e-5
    assert at("all_reduce", 10, ranks=4, way="gloo") == 5e-4
    assert at("all_reduce", 10, ranks=2, way="gloo", placement="strided") == 7e-4
    assert at("send", 10, ranks=2) is None


def test_sizes_are_counted_and_not_guessed() -> None:
    products = [sample for sample in samples() if sample.kind == "matmul" and sample.precision == "fp32"]
    assert [sample.size for sample in products] == [2.0 * edge**3 for edge in (16, 64, 128, 256, 512)]
    first = next(sample for sample in samples() if sample.kind == "convolution")
    assert first.size == 2 * 8 * 6 * 28 * 28 * 3 * 25
    copy = next(sample for sample in samples() if sample.kind == "copy")
    assert copy.size == 3 * 4 * 4096
    assert torch.get_num_threads() == 1
