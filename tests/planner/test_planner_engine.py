"""What the row of a run tells about its software, and what follows: kernels, casts, exchanges, sums, precisions, chips."""

from dataclasses import replace

import pytest

from shardwise.planner import catalogue
from shardwise.planner.activations import layer_activation_bytes
from shardwise.planner.case import Case
from shardwise.planner.collectives import Group, all_to_all, network
from shardwise.planner.compute import HOPPER_ENGINE_GAIN, device_rates
from shardwise.planner.constants import DEFAULT
from shardwise.planner.runs import parse_runs
from shardwise.planner.step import estimate
from shardwise.spec.facts import Transformer

MODEL = Transformer(layers=8, hidden=4096, heads=32, kv_heads=8, ffn_hidden=14336, gated_ffn=True, vocab=32000)
MIXTURE = replace(MODEL, experts=64, experts_per_token=8, ffn_hidden=1024)


def case(hardware: str = "h100-80gb-sxm", **changes: object) -> Case:
    base = Case(
        model=MODEL,
        machine=catalogue.machine(hardware),
        seq_len=4096,
        global_batch=8,
        micro_batch=1,
        data=8,
        compile=None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hardware", "changes", "engine"),
    [
        ("h100-80gb-sxm", {"precision": "fp8"}, True),
        ("h100-80gb-sxm", {"precision": "fp8", "compile": False}, True),
        ("h100-80gb-sxm", {"precision": "fp8", "compile": False, "zero_stage": 3}, False),
        ("h100-80gb-sxm", {"precision": "fp8", "compile": True}, False),
        ("h100-80gb-sxm", {"precision": "bf16"}, False),
        ("b200-180gb-sxm", {"precision": "bf16"}, True),
        ("b200-180gb-sxm", {"precision": "bf16", "compile": True}, False),
        ("b200-180gb-sxm", {"precision": "fp32"}, False),
    ],
)
def test_the_row_tells_the_software(hardware: str, changes: dict[str, object], engine: bool) -> None:
    assert case(hardware, **changes).engine is engine
    assert case(hardware, **changes).graphs is (engine and hardware.startswith("b"))


def test_attention_of_the_engine_is_faster_on_hopper_and_the_same_elsewhere() -> None:
    def gain(name: str) -> float:
        part = catalogue.accelerator(name)
        return (
            device_rates(part, "fp8", DEFAULT, engine=True).attention_flops
            / device_rates(part, "fp8", DEFAULT).attention_flops
        )

    assert gain("h100-80gb-sxm") == pytest.approx(HOPPER_ENGINE_GAIN)
    assert gain("b200-180gb-sxm") == gain("a100-80gb-sxm") == 1.0


def test_the_engine_keeps_inputs_of_fp8_products_in_one_byte() -> None:
    fp8, bf16 = case("b200-180gb-sxm", precision="fp8"), case("b200-180gb-sxm", precision="bf16")
    # norm outputs 2 x 1 less, the product of gate and up 1 less, the output of attention once more in 1
    less = 4096 * (2 * 4096 + 14336 - 4096)
    assert layer_activation_bytes(bf16) - layer_activation_bytes(fp8) == pytest.approx(less)


def test_gradients_are_added_up_where_a_step_has_several_micro_batches() -> None:
    def compute(micro_batches: int, stage: int = 0) -> float:
        layout = case(global_batch=8 * micro_batches, zero_stage=stage)
        return estimate(layout).seconds["compute"] / micro_batches

    device = device_rates(catalogue.accelerator("h100-80gb-sxm"), "bf16", DEFAULT)
    layers = 8 * (MODEL.attention_parameters + MODEL.expert_parameters)
    assert compute(4) - compute(1) == pytest.approx(10 * layers / device.memory_bytes, rel=0.01)
    assert compute(4, stage=3) == pytest.approx(compute(1, stage=3))


def test_sharded_gradients_are_reduced_in_two_bytes() -> None:
    slow = replace(catalogue.machine("h100-80gb-sxm", gbits_per_gpu=1.0), gpus_per_node=1)
    seconds = estimate(case(machine=slow, zero_stage=3)).step_seconds
    # two gathers and a scatter of 2 bytes a parameter each over 0.1 GB/s; gathers and embedding hide nothing worth it here
    moved = 3 * 2.0 * 7 / 8 * 8 * (MODEL.attention_parameters + MODEL.expert_parameters)
    assert seconds == pytest.approx(moved / (1e9 / 8 * DEFAULT.network_rate), rel=0.1)


def test_tokens_go_once_to_every_node() -> None:
    net = network(catalogue.machine("h100-80gb-sxm"), DEFAULT)
    ranks = Group(32, 8)
    assert all_to_all(8e9, ranks, net, 3.6e9) < all_to_all(8e9, ranks, net)
    assert all_to_all(8e9, ranks, net, 8e9) == all_to_all(8e9, ranks, net)
    once, every = (
        estimate(case(model=MIXTURE, data=32, expert=32, global_batch=32, precision=precision))
        for precision in ("fp8", "bf16")
    )
    assert once.seconds["tensor"] < 0.6 * every.seconds["tensor"]


def test_the_host_launches_the_products_of_every_expert() -> None:
    few, many = (estimate(case(model=MIXTURE, expert=ways, seq_len=128)).seconds["compute"] for ways in (8, 1))
    assert many > 2 * few  # 64 experts on the rank instead of 8
    compiled = estimate(case(model=MIXTURE, expert=1, seq_len=128, compile=True)).seconds["compute"]
    assert compiled < 0.7 * many


def test_four_bits_are_read_and_are_faster_where_the_part_has_them() -> None:
    rows = parse_runs(
        ["run_id,hardware,precision\n", "a,gb300,NVFP4\n", "b,h100,int8\n", "c,b200,fp4 (nvfp4)\n"], "t", strict=False
    )
    assert [row["precision"] for row in rows] == ["fp4", "fp8", "fp4"]
    new, old = catalogue.accelerator("gb300"), catalogue.accelerator("h100")
    assert device_rates(new, "fp4", DEFAULT).matmul_flops > 2 * device_rates(new, "fp8", DEFAULT).matmul_flops
    assert device_rates(old, "fp4", DEFAULT).matmul_flops == device_rates(old, "fp8", DEFAULT).matmul_flops


@pytest.mark.parametrize(("recompute", "fits"), [("full", True), ("none", False)])
def test_a_tpu_may_keep_layer_inputs_on_the_host(recompute: str, fits: bool) -> None:
    large = replace(MODEL, layers=80, hidden=8192, heads=64, ffn_hidden=28672, vocab=128256)
    layout = replace(case("tpu-v6e"), model=large, data=64, zero_stage=3, global_batch=128, micro_batch=2, seq_len=8192)
    assert estimate(replace(layout, recompute=recompute)).fits is fits
