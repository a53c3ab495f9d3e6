"""Rules found in the half of the blind tables that was opened later, each by hand."""

from dataclasses import replace
from typing import Any

import pytest

from shardwise.planner import catalogue
from shardwise.planner.case import Case
from shardwise.planner.compute import attention_core, device_rates, product
from shardwise.planner.constants import DEFAULT
from shardwise.planner.layers import layer_work
from shardwise.planner.predict import base_case
from shardwise.planner.runs import Row
from shardwise.planner.step import estimate
from shardwise.spec.facts import Transformer

LLAMA = Transformer(
    layers=8, hidden=4096, heads=32, kv_heads=32, ffn_hidden=11264, gated_ffn=True, vocab=32000, tied_embeddings=False
)
MIXTURE = replace(LLAMA, experts=64, experts_per_token=8, ffn_hidden=1024)


def case(hardware: str = "a100-80gb-sxm", **changes: object) -> Case:
    base = Case(
        model=LLAMA,
        machine=catalogue.machine(hardware),
        seq_len=4096,
        global_batch=64,
        micro_batch=1,
        data=8,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hardware", "gated", "share"),
    [
        ("a100-80gb-sxm", True, 1.0),
        ("a100-80gb-sxm", False, DEFAULT.attention_rate),
        ("h100-80gb-sxm", True, DEFAULT.attention_rate),
        ("mi300x-192gb", True, DEFAULT.attention_rate),
    ],
)
def test_models_of_the_time_of_flash_attention_2_run_it_at_its_published_rate(
    hardware: str, gated: bool, share: float
) -> None:
    part = catalogue.accelerator(hardware)
    layout = case(hardware, model=replace(LLAMA, gated_ffn=gated))
    forward, backward = attention_core(layout, device_rates(part, "bf16", DEFAULT))
    published = part.peak_flops["bf16"].value * part.attention_fraction.value
    flops = 2.0 * 4096 * 4096 * 4096 * (1 + 512 / 4096)
    assert forward.seconds == pytest.approx(flops / (share * published))
    assert backward.seconds == pytest.approx(2.5 * forward.seconds)


def element_seconds(**changes: Any) -> float:
    """Forward seconds of the element-wise part: what a layer takes beyond the same compiled one, and 22 units of that."""
    layout = case(**changes)
    device = device_rates(layout.machine.accelerator, "bf16", DEFAULT)
    compiled = layer_work(replace(layout, compile=True), device, DEFAULT).forward.seconds
    return layer_work(layout, device, DEFAULT).forward.seconds - compiled


def test_eager_parts_of_llama_layers_are_counted_kernel_by_kernel() -> None:
    device = device_rates(catalogue.accelerator("a100-80gb-sxm"), "bf16", DEFAULT)
    unit = 2.0 * 4096 * 4096 / device.memory_bytes  # one pass over an activation of 2 bytes
    ffn = 11264 / 4096
    norms, rotary, gate = 2 * (18 - 2), 2 * (10 - 2), (5 - 3) * ffn
    assert element_seconds(compile=False) == pytest.approx((norms + rotary + gate) * unit)
    assert element_seconds(compile=False, pipeline=2, data=4) == pytest.approx((norms + rotary + gate) * unit)
    # unknown: half of it, unless shards wrap a model as it was written
    fused, eager = 10 + 4 + 3 * ffn, 2 * 18 + 6 + 20 + 5 * ffn
    half = (fused * eager) ** 0.5 - fused
    assert element_seconds(compile=None, zero_stage=1) == pytest.approx(half * unit)
    assert element_seconds(compile=None, zero_stage=3) == pytest.approx((eager - fused) * unit)
    # layers of the GPT kind as before
    gpt = replace(LLAMA, gated_ffn=False)
    plain = (DEFAULT.eager_traffic - 1) * (10 + 2 * ffn) * unit
    assert element_seconds(model=gpt, compile=False) == pytest.approx(plain)


ROW: Row = {
    "run_id": "one",
    "hardware": "a100-80gb-sxm",
    "gpus": 8,
    "layers": 8,
    "hidden": 4096,
    "heads": 32,
    "seq_len": 2048,
    "global_batch": 64,
    "micro_batch": 1,
    "data": 8,
    "zero_stage": 1,
    "recompute": "selective",
    "precision": "bf16",
}


def test_selective_recomputation_without_a_stated_attention_repeats_scores() -> None:
    assert base_case(ROW).attention == "math"
    assert base_case({**ROW, "attention": "flash"}).attention == "flash"
    assert base_case({**ROW, "recompute": "none"}).attention == "flash"
    assert base_case({**ROW, "zero_stage": 3}).attention == "flash"  # every second product, not the scores
    assert base_case({**ROW, "hardware": "h100-80gb-sxm", "tensor": 2, "data": 4}).attention == "flash"  # the engine


@pytest.mark.parametrize(("compiled", "passes"), [(False, 7 + 9), (True, 4 + 5)])
@pytest.mark.parametrize(("expert", "sorts"), [(1, 0), (8, 4 + 4), (64, 0)])
def test_copies_of_tokens_are_moved_by_kernels_of_their_own(
    compiled: bool, passes: int, expert: int, sorts: int
) -> None:
    device = device_rates(catalogue.accelerator("h100-80gb-sxm"), "bf16", DEFAULT)
    work = layer_work(case("h100-80gb-sxm", model=MIXTURE, compile=compiled, expert=expert), device, DEFAULT)
    groups = 64 // expert
    together, apart = (groups, 1) if compiled else (1, groups)  # one kernel for all experts, or one after the other
    products = [
        *product(4096 * 8 // groups, 2 * 1024, 4096, device, together),
        *product(4096 * 8 // groups, 4096, 1024, device, together),
    ]
    one = 4096 * 8 * 4096 * 2 / device.memory_bytes  # a pass over the copies
    moved = work.inner_forward.seconds + work.inner_backward.seconds - apart * sum(part.seconds for part in products)
    assert moved == pytest.approx((passes + sorts) * one)


def test_pipelines_reduce_gradients_when_all_micro_batches_are_summed() -> None:
    def exposed(**changes: Any) -> float:
        return estimate(case(global_batch=256, **changes)).seconds["gradients"]

    def whole(**changes: Any) -> float:  # the same with nothing to hide behind
        bare = replace(DEFAULT, gradient_overlap=0.0)
        return estimate(case(global_batch=256, **changes), bare).seconds["gradients"]

    piped: dict[str, Any] = {"pipeline": 2, "data": 4, "compile": None}
    assert exposed(**piped) == pytest.approx(whole(**piped))
    assert exposed() < 0.5 * whole()  # a wrapper's hooks
    assert exposed(hardware="h100-80gb-sxm", **piped) < 0.5 * whole(hardware="h100-80gb-sxm", **piped)  # the engine's


def test_parts_of_a_vendor_share_its_guess() -> None:
    assert catalogue.accelerator("mi250x-64gb").matmul_fraction["bf16"].value == 0.6
    assert catalogue.accelerator("mi300x-192gb").matmul_fraction["bf16"].value == 0.5142  # measured
    assert catalogue.accelerator("v100-32gb-sxm").matmul_fraction["fp16"].value == 0.8
