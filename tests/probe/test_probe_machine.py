"""What a probe finds, how it is kept, and how stale or foreign figures are noticed."""

from __future__ import annotations

import json
import multiprocessing
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from shardwise.cli.main import shardwise
from shardwise.errors import UserError
from shardwise.probe import busy, messages
from shardwise.probe import machine as probing
from shardwise.probe.kernels import samples
from shardwise.probe.operations import by_flops, kind_of
from shardwise.probe.place import cached_machine, cached_path, measuring, this_place, warnings_about
from shardwise.run.launch import Nodes
from shardwise.spec.machine import Machine
from shardwise.spec.measured import COLLECTIVES, DIVIDED_NORMS, KernelRate, Measured, MessageTime


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
    measured = replace(measured_of(machine), load=0.0, others_cores=0.0)
    place = this_place()
    assert warnings_about(measured, place) == []
    foreign = replace(measured, place={**place, "processor": "abacus", "torch": "1.0"})
    told = warnings_about(foreign, place)
    assert any("processor was abacus" in text for text in told)
    assert any("torch was 1.0" in text for text in told)
    assert "another version" in warnings_about(replace(measured, method=1), place)[0]
    assert "days ago" in warnings_about(replace(measured, date="2020-01-01"), place)[0]
    assert "yet to come" in warnings_about(replace(measured, date="2990-01-01"), place)[0]
    assert "other programs" in warnings_about(replace(measured, load=9.0 * measured.cores), place)[0]
    disturbed = warnings_about(replace(measured, others_cores=0.5 * measured.cores), place)[0]
    assert f"kept {0.5 * measured.cores:.1f} of {measured.cores} cores busy" in disturbed
    assert "no date" in warnings_about(replace(measured, date="soon"), place)[0]


def test_what_others_disturbed_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([0.0, 4.0, 4.0, 4.2, 9.0])  # cores' seconds before and after each attempt
    monkeypatch.setattr(busy, "cores_busy_seconds", lambda: next(used))
    monkeypatch.setattr(busy, "_own_seconds", lambda: 0.0)
    monkeypatch.setattr(busy, "is_busy", lambda: False)
    monkeypatch.setattr(busy, "usable_cores", lambda: 2)
    clock = iter([0.0, 2.0, 2.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    results = iter(["beside others", "alone"])
    told: list[str] = []
    found, others = busy.undisturbed(lambda: next(results), told.append)
    assert found == ["alone", "beside others"]
    assert others == pytest.approx(0.1)
    assert told == ["others kept 2.0 cores busy meanwhile: measuring again"]


def test_a_machine_that_stays_busy_is_measured_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "others_cores", lambda *given: 5.0)
    monkeypatch.setattr(busy, "is_busy", lambda: False)
    results = iter(range(10))
    assert busy.undisturbed(lambda: next(results)) == ([0, 1, 2], 5.0)
    assert busy.undisturbed(lambda: next(results), attempts=1) == ([3], 5.0)
    assert busy.undisturbed(lambda: next(results), may_go_on=lambda: False) == ([4], 5.0)


def test_a_process_beside_ours_is_seen_and_our_own_is_not() -> None:
    if busy.cores_busy_seconds() is None:
        pytest.skip("the system does not say what its cores do")

    def burn() -> None:
        ends = time.monotonic() + 0.6
        while time.monotonic() < ends:
            pass

    def beside() -> None:
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.6)
        finally:
            other.kill()
            seen.append(busy.others_cores(before, 0.0, time.perf_counter() - began))
            other.wait()

    seen: list[float] = []
    before, began = busy.cores_busy_seconds(), time.perf_counter()
    beside()
    assert seen[0] > 0.3
    # What was started and waited for is our own.
    child = "import time; e = time.monotonic() + 0.6\nwhile time.monotonic() < e: pass"
    own = busy._own_seconds()
    subprocess.run([sys.executable, "-c", child], check=True)
    burn()
    assert busy._own_seconds() - own > 0.3


def rates_of(*per_second: float) -> list[KernelRate]:
    kinds = [("matmul", "fp32"), ("matmul", "bf16"), ("copy", "fp32")]
    return [
        KernelRate(kind=kind, precision=precision, size=1e6, workers=1, threads=1, per_second=value)
        for (kind, precision), value in zip(kinds, per_second, strict=True)
    ]


def test_a_probe_keeps_the_best_rates_and_says_how_busy_the_cores_were(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = iter([(3e9, 1e9, 1e9, 2e-6), (2e9, 2e9, 1e9, 1e-6)])
    others = iter([1.5, 0.9, 0.0, 0.1])

    def launch(work: object, *, workers: int, **options: object) -> object:
        if workers > 1:
            message = MessageTime(
                collective="send", way="gloo", ranks=workers, placement="all", message_bytes=1024, seconds=1e-4
            )
            return probing._Together(time.time(), [], [message], 1.0, 1e8)
        *rates, call_seconds = next(alone)
        return probing._Alone(rates_of(*rates), call_seconds, 1e-6)

    monkeypatch.setattr(probing, "launch", launch)
    monkeypatch.setattr(probing, "usable_cores", lambda: 1)
    monkeypatch.setattr(busy, "others_cores", lambda *given: next(others))
    monkeypatch.setattr(busy, "is_busy", lambda: False)
    monkeypatch.setattr(probing, "MOST_ATTEMPTS", 2)
    measured = measured_of(probing.probe())
    assert [rate.per_second for rate in measured.kernels] == [3e9, 2e9, 1e9]
    assert (measured.others_cores, measured.call_seconds) == (0.9, 1e-6)  # of the least disturbed one
    assert busy.was_busy(measured)


def test_only_one_command_measures_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with measuring() as first, measuring(wait_seconds=0.2) as second:
        assert (first, second) == (True, False)
    with measuring() as again:
        assert again
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # nowhere to meet
    with measuring() as anyway:
        assert anyway


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
    replace(machine, measured=replace(measured_of(machine), method=1)).write(cached_path(this_place()))
    assert cached_machine() is None
    machine.write(cached_path(this_place()))
    whole = cached_path(this_place()).read_bytes()
    cached_path(this_place()).write_bytes(whole[: len(whole) // 2])  # a disk that was full, a machine that went down
    assert cached_machine() is None
    assert CliRunner().invoke(shardwise, ["probe"]).exit_code == 0
    assert len(calls) == 3 and cached_machine() == machine
    names = {path.name for path in cached_path(this_place()).parent.iterdir()}
    assert names == {cached_path(this_place()).name, "measuring.lock"}
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


# Several machines


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_machines_measure_what_is_between_them(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launchers on loopback, one process each; both end up with the same figures."""
    monkeypatch.setattr(messages, "SIZES", (1024, 64 * 1024))
    single = replace(machine, measured=replace(measured_of(machine), cores=1))
    endpoint = f"127.0.0.1:{free_port()}"
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for node in range(2):
        ours, theirs = context.Pipe(duplex=False)

        def main(node: int = node, pipe: Any = theirs) -> None:
            told: list[str] = []
            nodes = Nodes(count=2, node_rank=node, endpoint=endpoint, join_seconds=20.0)
            pipe.send((probing.probe_nodes(single, nodes, tell=told.append), told))

        process = context.Process(target=main)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        answers = []
        for pipe in pipes:
            assert pipe.poll(40.0), "no answer"
            answers.append(pipe.recv())
    finally:
        for process in processes:
            process.kill()
            process.join()
    (first, told), (second, _) = answers
    measured = measured_of(first)
    between = [item for item in measured.messages if item.nodes == 2]
    assert measured.nodes == 2
    assert {item.collective for item in between} == set(COLLECTIVES)
    assert {(item.way, item.ranks, item.placement) for item in between} == {("gloo", 2, "all")}
    assert [item for item in measured.messages if item.nodes == 1] == list(measured_of(machine).messages)
    assert between == [item for item in measured_of(second).messages if item.nodes == 2]
    assert first.inter.bytes_per_second.origin == "measured"
    assert first.inter != machine.inter
    assert told == ["2 machines with 1 process each: messages"]
    # A smaller message never seems to take longer than a larger one.
    sums = [item.seconds for item in between if item.collective == "all_reduce"]
    assert sums == sorted(sums)


def test_machines_that_are_not_alike_are_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    place = this_place()
    monkeypatch.setattr(
        probing, "launch", lambda work, **options: (sends(2), [place, {**place, "processor": "abacus"}])
    )
    told: list[str] = []
    single = replace(machine, measured=replace(measured_of(machine), cores=1))
    nodes = Nodes(count=2, node_rank=0, endpoint="127.0.0.1:1")
    found = probing.probe_nodes(single, nodes, tell=told.append)
    assert any("on node 1 processor" in text and "abacus" in text for text in told)
    # 1 MB in 9 ms more than 1 kB: that is the network of one worker of each machine.
    assert found.inter.bytes_per_second.value * found.gpus_per_node == pytest.approx(999e3 / 9e-3)
    assert found.inter.latency_seconds.value == 1e-3
    # Where sizes make no difference in the noise, there is still a speed.
    flat = [replace(item, seconds=1e-3) for item in sends(2)]
    monkeypatch.setattr(probing, "launch", lambda work, **options: (flat, [place, place]))
    found = probing.probe_nodes(single, nodes)
    assert found.inter.bytes_per_second.value * found.gpus_per_node == pytest.approx(1e9)


def sends(nodes: int) -> list[MessageTime]:
    return [
        MessageTime(
            collective="send", way="gloo", ranks=2, placement="all", message_bytes=size, seconds=seconds, nodes=nodes
        )
        for size, seconds in ((1e3, 1e-3), (1e6, 10e-3))
    ]


def test_more_ranks_are_never_faster() -> None:
    times = [
        MessageTime(
            collective="all_reduce", way="gloo", ranks=ranks, placement="all", message_bytes=1e3, seconds=seconds
        )
        for ranks, seconds in ((2, 2e-3), (4, 1e-6))
    ]
    assert [item.seconds for item in probing.no_faster_with_more(times)] == [2e-3, 2e-3]


def test_several_machines_need_a_file_and_a_place_to_meet() -> None:
    answer = CliRunner().invoke(shardwise, ["probe", "--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:29500"])
    assert isinstance(answer.exception, UserError)
    assert "--out" in str(answer.exception)
    answer = CliRunner().invoke(shardwise, ["probe", "--nnodes", "2", "--out", "m.toml"])
    assert isinstance(answer.exception, UserError)
    assert "--rdzv-endpoint" in str(answer.exception)


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


def test_one_process_alone_is_no_slower_than_beside_others() -> None:
    """A measurement that was disturbed: only the single process met the disturbance."""
    slower = [replace(one, per_second=one.per_second / 4) if one.workers == 1 else one for one in table().kernels]
    measured = replace(table(), kernels=tuple(slower))
    assert measured.rate("matmul", 1e6, workers=2, threads=1) == 8e9
    assert measured.rate("matmul", 1e6, workers=1, threads=1) == 8e9


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
    # Three ranks take as long as four; over several machines nothing was measured.
    assert at("all_reduce", 10, ranks=3, way="gloo") == 5e-4
    assert at("all_reduce", 10, ranks=9, way="gloo") == 5e-4
    assert at("all_reduce", 10, ranks=2, way="gloo", nodes=2) is None


def test_norms_over_ranks_are_timed_by_the_size_of_the_operation_they_replace() -> None:
    made = {(sample.kind, sample.size): sample for sample in samples()}
    for native, kind in DIVIDED_NORMS.items():
        sizes = sorted(size for name, size in made if name == kind)
        tensors = 2 if kind == "divided_batch_norm" else 3
        assert sizes == [4.0 * tensors * count for count in (16 * 1024, 128 * 1024, 1024 * 1024)]
        # Small tensors of one number a channel are all that differs from what is counted in a model.
        assert min(abs(size / sizes[1] - 1) for name, size in made if name == native) < 0.02
        with torch.no_grad():
            made[kind, sizes[0]].call()


def test_sizes_are_counted_and_not_guessed() -> None:
    products = [sample for sample in samples() if sample.kind == "matmul" and sample.precision == "fp32"]
    assert [sample.size for sample in products] == [2.0 * edge**3 for edge in (16, 64, 128, 256, 512)]
    thin = [sample for sample in samples() if sample.kind == "thin"]
    assert [sample.size for sample in thin] == [4.0 * edge * (edge + 2 * 8) for edge in (128, 512, 1536)]
    assert kind_of("mm") == "matmul"
    assert kind_of("bmm") == "batched_matmul"
    assert by_flops("batched_matmul")
    first = next(sample for sample in samples() if sample.kind == "convolution")
    assert first.size == 2 * 8 * 6 * 28 * 28 * 3 * 25
    copy = next(sample for sample in samples() if sample.kind == "copy")
    assert copy.size == 3 * 4 * 4096
    assert torch.get_num_threads() == 1
