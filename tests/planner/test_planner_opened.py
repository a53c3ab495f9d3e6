"""Rules found in the opened half of the tables that were collected blindly, each by hand."""

from dataclasses import replace

import pytest

from shardwise.planner import catalogue
from shardwise.planner.activations import spare_of_experts
from shardwise.planner.case import Case
from shardwise.planner.collectives import (
    BULK_SETUP_SECONDS,
    Group,
    all_to_all,
    bus_bytes,
    group,
    link_share,
    network,
    reduce_scatter,
    send,
)
from shardwise.planner.compute import UNALIGNED_SHARE, device_rates, matmul_seconds, on_tensor_units
from shardwise.planner.constants import DEFAULT
from shardwise.planner.exchanges import gradient_bytes
from shardwise.planner.step import estimate
from shardwise.spec.facts import Transformer

GPT = Transformer(layers=8, hidden=2048, heads=16, kv_heads=16, ffn_hidden=8192, vocab=32000)


def case(**changes: object) -> Case:
    base = Case(
        model=GPT,
        machine=catalogue.machine("a100-80gb-sxm"),
        seq_len=2048,
        global_batch=64,
        micro_batch=1,
        data=8,
        compile=None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hardware", "precision", "units"),
    [("v100-32gb-sxm", "fp32", False), ("v100-32gb-sxm", "fp16", True), ("a100-80gb-sxm", "fp32", True)],
)
def test_alignment_matters_to_units_for_matrices_alone(hardware: str, precision: str, units: bool) -> None:
    part = catalogue.accelerator(hardware)
    device = device_rates(part, precision, DEFAULT)
    assert on_tensor_units(part, precision) is units
    odd, even = (matmul_seconds(8192, columns, 4096, device) for columns in (8191, 8192))
    assert odd == pytest.approx(even / UNALIGNED_SHARE if units else even)


def test_a_slow_unit_does_few_inner_steps_while_a_tile_starts() -> None:
    # 15.7 TFLOP/s on 80 units are 0.068 of an A100's unit
    device = device_rates(catalogue.accelerator("v100-32gb-sxm"), "fp32", DEFAULT)
    assert device.inner_half == pytest.approx(DEFAULT.matmul_inner_half * (15.7 / 80) / (312 / 108))


def test_sharded_gradients_are_reduced_in_every_micro_batch() -> None:
    # classic software hides nothing: stage 2 reduces 8 times what stage 1 reduces once
    classic = case(attention="math", precision="fp16", zero_stage=1)
    once, often = (estimate(replace(classic, zero_stage=stage)).seconds["gradients"] for stage in (1, 2))
    net = network(classic.machine, DEFAULT)
    whole = reduce_scatter(2.0 * GPT.parameters, group(classic, "shard"), net)
    assert often - once == pytest.approx(7 * whole, rel=0.01)
    # in a pipeline they are summed first
    piped = replace(classic, data=4, pipeline=2)
    assert estimate(replace(piped, zero_stage=2)).seconds["gradients"] == estimate(piped).seconds["gradients"]


def test_sharded_gradients_are_reduced_as_they_are_made() -> None:
    assert [gradient_bytes(case(zero_stage=stage)) for stage in (0, 1, 2, 3)] == [4.0, 4.0, 2.0, 2.0]
    assert gradient_bytes(case(zero_stage=2, data=4, pipeline=2)) == 4.0
    assert gradient_bytes(case(zero_stage=2, precision="fp32")) == 4.0


def test_a_rank_of_plain_1f1b_computes_nothing_while_it_sends() -> None:
    # four nodes of one device at 1 Gbit/s: a pass is followed by its message, 8 MiB each way
    slow = catalogue.machine("v100-16gb-sxm", gpus_per_node=1, gbits_per_gpu=1.0)
    piped = case(machine=slow, data=1, pipeline=4, attention="math", precision="fp16", compile=False)
    message = send(2.0 * 2048 * 2048, True, network(slow, DEFAULT)) - send(0.0, True, network(slow, DEFAULT))
    few, many = (estimate(replace(piped, global_batch=count)) for count in (32, 64))
    near = replace(piped, machine=catalogue.machine("v100-16gb-sxm", gpus_per_node=4))
    plain = [estimate(replace(near, global_batch=count)).step_seconds for count in (32, 64)]
    near_by = send(2.0 * 2048 * 2048, False, network(near.machine, DEFAULT)) - send(
        0.0, False, network(near.machine, DEFAULT)
    )
    added = (many.step_seconds - few.step_seconds) - (plain[1] - plain[0])
    # 32 more micro-batches: a rank in the middle sends an activation and a gradient in each
    assert added == pytest.approx(64 * (message - near_by), rel=0.1)
    assert many.seconds["compute"] < estimate(replace(near, global_batch=64)).seconds["compute"] + 1e-9
    assert sum(many.seconds.values()) == pytest.approx(many.step_seconds)


def test_software_for_bf16_may_shard_states_at_stage_0() -> None:
    plain = case(data=8, compile=False)
    memory = estimate(plain).memory
    assert memory.optimizer == 12.0 * GPT.parameters
    assert memory.rare == pytest.approx(memory.optimizer * 7 / 8)
    for other in ({"precision": "fp16"}, {"zero_stage": 1}, {"compile": True}, {"data": 1}):
        assert estimate(replace(plain, **other)).memory.rare == 0.0


def test_mixtures_of_experts_may_keep_less() -> None:
    model = replace(GPT, experts=16, experts_per_token=4, ffn_hidden=1024)
    mixture = case(model=model)
    copies = 2.0 * 2048 * 2048 * 4  # 2 bytes, tokens x hidden, four visits
    assert spare_of_experts(mixture) == copies
    split = replace(
        mixture, machine=catalogue.machine("h100-80gb-sxm"), tensor=4, data=2, expert=2, sequence_parallel=True
    )
    assert split.engine
    assert spare_of_experts(split) == copies * (1 + 3 / 4)
    cheap = 2048 * (4.0 * 2048 / 4 + 2.0 * 1024 * 4 / 4)  # both norms; the activated inner width of four visits
    assert spare_of_experts(replace(split, recompute="selective")) == copies * (1 + 3 / 4) + cheap
    assert spare_of_experts(replace(split, recompute="full")) == 0.0 == spare_of_experts(case())


def test_what_only_some_software_spares_is_not_counted_on() -> None:
    # 10 GB of parameters: 18 bytes each do not fit, 6 + 12 / 8 do
    model = replace(GPT, layers=24, hidden=4096, heads=32, kv_heads=32, ffn_hidden=16384)
    found = estimate(case(model=model, compile=False, recompute="full"))
    assert found.fits and not found.likely and not found.comfortable


@pytest.mark.parametrize(
    ("hardware", "per_node", "devices", "share"),
    [
        ("a100-80gb-sxm", 8, 2, 1.0),  # a switch
        ("v100-32gb-sxm", 16, 2, 1.0),  # sixteen in a node are joined by switches
        ("v100-32gb-pcie", 8, 2, 1.0),
        ("v100-16gb-sxm", 8, 2, 1 / 6),
        ("v100-16gb-sxm", 8, 4, 2 / 3),
        ("v100-16gb-sxm", 8, 8, 1.0),
        ("v100-16gb-sxm", 4, 2, 1 / 3),  # four of them: two links to each
        ("mi300x-192gb", 8, 2, 1 / 7),
        ("mi300x-192gb", 8, 4, 3 / 7),
        ("gaudi2", 8, 8, 1.0),
    ],
)
def test_without_a_switch_a_group_has_the_links_among_itself(
    hardware: str, per_node: int, devices: int, share: float
) -> None:
    machine = catalogue.machine(hardware, gpus_per_node=per_node)
    assert link_share(machine, devices) == pytest.approx(share)
    net, nominal = network(machine, DEFAULT), machine.intra.bytes_per_second.value * DEFAULT.link_rate
    assert bus_bytes(net, Group(devices, devices)) == pytest.approx(share * nominal)
    assert bus_bytes(net, Group(4 * devices, devices)) <= share * nominal
    size = 1e9
    latency = 2.0 * machine.intra.latency_seconds.value
    assert send(size, False, net) == pytest.approx(latency + size / nominal / link_share(machine, 2))
    exchange = all_to_all(size, Group(devices, devices), net) - BULK_SETUP_SECONDS
    assert exchange == pytest.approx((devices - 1) / devices * size / (share * nominal))


def test_stage_2_keeps_its_flat_shards_in_16_bits() -> None:
    # 2 bytes a parameter whole; of its eighth 2 of gradient and 12 of states
    memory = estimate(case(zero_stage=2)).memory
    share = GPT.parameters / 8
    assert (memory.parameters, memory.gradients, memory.optimizer) == (16 * share, 2 * share, 12 * share)
    # PyTorch's sharding keeps fp32 gradients, and reduces buckets of copies in 2 bytes
    stated = estimate(case(zero_stage=2, compile=True)).memory
    assert stated.gradients > 4 * share
