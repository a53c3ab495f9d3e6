"""Seconds of single operations and of one step, by hand."""

from dataclasses import replace

import pytest

from shardwise.planner import catalogue
from shardwise.planner.case import Case, balanced
from shardwise.planner.collectives import all_gather, all_reduce, group, network
from shardwise.planner.compute import (
    UNALIGNED_SHARE,
    adam_seconds,
    attention_core,
    device_rates,
    matmul_seconds,
    product,
)
from shardwise.planner.constants import DEFAULT
from shardwise.planner.exchanges import GATHERS_PER_LAYER
from shardwise.planner.layers import head_work, layer_work, vocab_columns
from shardwise.planner.step import estimate
from shardwise.spec.facts import Transformer

GPT = Transformer(layers=4, hidden=8192, heads=64, kv_heads=64, ffn_hidden=32768, vocab=51200)
A100 = catalogue.accelerator("a100-80gb-sxm")
DEVICE = device_rates(A100, "bf16", DEFAULT)


def case(**changes: object) -> Case:
    base = Case(
        model=GPT,
        machine=catalogue.machine("a100-80gb-sxm"),
        seq_len=4096,
        global_batch=8,
        micro_batch=2,
        attention="flash",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_a_large_product_runs_at_the_rate_of_the_part() -> None:
    rate = 312e12 * 0.8692 * DEFAULT.matmul_rate
    size = 16384
    found = matmul_seconds(size, size, size, DEVICE)
    assert found == pytest.approx(2 * size**3 / rate, rel=0.03)
    assert found >= 2 * size**3 / rate


def test_small_and_narrow_products_are_less_efficient() -> None:
    def rate(rows: int, columns: int, inner: int) -> float:
        return 2 * rows * columns * inner / matmul_seconds(rows, columns, inner, DEVICE)

    assert rate(512, 512, 512) < 0.3 * rate(8192, 8192, 8192)
    assert rate(8192, 8192, 128) < 0.6 * rate(8192, 8192, 8192)
    # one tile more than the units can take in a round costs part of a second round
    full = matmul_seconds(128 * 108, 256, 4096, DEVICE)
    assert full < matmul_seconds(128 * 108 + 128, 256, 4096, DEVICE)
    assert matmul_seconds(1, 1, 1, DEVICE) == DEFAULT.kernel_seconds


def test_odd_dimensions_cost_what_the_constant_says() -> None:
    assert matmul_seconds(8192, 50257, 2048, DEVICE) == pytest.approx(
        matmul_seconds(8192, 50264, 2048, DEVICE) / UNALIGNED_SHARE, rel=1e-6
    )
    padded = case(model=replace(GPT, vocab=50257), tensor=4)
    assert vocab_columns(padded) == 12672 and vocab_columns(replace(padded, tensor=1)) == 50257


def test_a_linear_map_has_twice_the_work_backward() -> None:
    forward, backward = product(8192, 8192, 8192, DEVICE)
    assert backward.seconds == pytest.approx(2 * forward.seconds)


def test_fused_attention_counts_the_causal_half() -> None:
    long = case(seq_len=65536, micro_batch=1)
    forward, backward = attention_core(long, DEVICE)
    # 4 s^2 h FLOPs for scores and values, half of them causal (FlashAttention-2, section 4.1)
    flops = 2.0 * 65536**2 * 8192
    rate = 312e12 * A100.attention_fraction.value * DEFAULT.attention_rate
    assert forward.seconds == pytest.approx(flops / rate, rel=0.01)
    assert backward.seconds == pytest.approx(2.5 * forward.seconds)
    half, _ = attention_core(replace(long, tensor=2), DEVICE)
    assert half.seconds == pytest.approx(forward.seconds / 2)
    quarter, _ = attention_core(replace(long, context=4), DEVICE)
    assert quarter.seconds == pytest.approx(forward.seconds / 4)


def test_materialised_attention_costs_more_at_every_length() -> None:
    for seq_len in (1024, 4096, 16384):
        fused, _ = attention_core(case(seq_len=seq_len), DEVICE)
        written, _ = attention_core(case(seq_len=seq_len, attention="math"), DEVICE)
        assert written.seconds > fused.seconds


def test_adam_passes_memory_once() -> None:
    assert adam_seconds(1e9, DEVICE) == pytest.approx(38e9 / (2039e9 * DEFAULT.memory_rate))


def test_precisions_and_parts_fall_back() -> None:
    h100 = catalogue.accelerator("h100-80gb-sxm")
    assert device_rates(h100, "fp8", DEFAULT).matmul_flops > 1.5 * device_rates(h100, "bf16", DEFAULT).matmul_flops
    assert device_rates(A100, "fp8", DEFAULT).matmul_flops == DEVICE.matmul_flops
    assert device_rates(A100, "fp32", DEFAULT).matmul_flops == pytest.approx(DEVICE.matmul_flops / 2)


def test_recomputation_repeats_the_forward_pass() -> None:
    compute = {name: estimate(case(recompute=name)).seconds for name in ("none", "selective", "full")}
    assert compute["none"]["recompute"] == 0
    assert compute["full"]["recompute"] == pytest.approx(
        4 * 4 * layer_work(case(), DEVICE, DEFAULT).forward.seconds, rel=0.02
    )
    assert 0 < compute["selective"]["recompute"] < compute["full"]["recompute"]


def test_tensor_ranks_pay_four_reductions_a_layer() -> None:
    split = case(tensor=8, micro_batch=8)
    one = all_reduce(2.0 * 8 * 4096 * 8192, group(split, "tensor"), network(split.machine, DEFAULT))
    assert estimate(split).seconds["tensor"] == pytest.approx(4 * one * GPT.layers * split.micro_batches, rel=0.02)


def test_sequence_parallel_ranks_gather_their_inputs_again_in_the_backward_pass() -> None:
    # Korthikanti et al. 2022, section 4.2.2: per layer 4 gathers and 4 scatters, and 2 more gathers behind products
    bare = replace(DEFAULT, tensor_overlap=0.0, overlap_cost=0.0)
    slow = replace(catalogue.machine("a100-80gb-sxm", gbits_per_gpu=1), gpus_per_node=4)
    for place, extra in ((slow, 2.0), (catalogue.machine("a100-80gb-sxm"), 0.0)):
        split = case(tensor=8, micro_batch=8, sequence_parallel=True, machine=place)
        one = all_gather(2.0 * 8 * 4096 * 8192, group(split, "tensor"), network(place, bare))
        found = estimate(split, bare).seconds["tensor"] / (one * GPT.layers * split.micro_batches)
        assert found == pytest.approx(8.0 + extra, rel=0.05)  # a fast node hides them, a slow network does not


def test_an_eager_loss_moves_more_bytes_than_a_compiled_one() -> None:
    eager, compiled = (head_work(case(compile=flag), DEVICE)[1].seconds for flag in (False, True))
    logits = 2.0 * 4096 * GPT.vocab
    assert eager - compiled == pytest.approx(12.0 * logits / DEVICE.memory_bytes)


def test_classic_software_hides_nothing() -> None:
    for attention, hidden in (("flash", True), ("math", False)):
        sharded = case(data=8, zero_stage=3, attention=attention, precision="fp16", global_batch=16)
        whole = case(data=1, attention=attention, precision="fp16", global_batch=2)
        extra = estimate(sharded).seconds["shards"]
        assert extra > 0
        assert (extra < 0.5 * estimate(whole).step_seconds) or not hidden
    now, then = (
        estimate(case(data=16, attention=name, precision="fp16", global_batch=32)).seconds["gradients"]
        for name in ("flash", "math")
    )
    assert now < 0.6 * then


def test_fully_sharded_training_gathers_twice_and_scatters_once() -> None:
    # classic: tensor by tensor, nothing hidden; fp16 moves 2 bytes a parameter each time (ZeRO, section 7.2.2: 3 x 2 P)
    sharded = case(data=8, zero_stage=3, attention="math", precision="fp16", global_batch=32)
    net, ranks = network(sharded.machine, DEFAULT), group(sharded, "shard")
    part = 2.0 * GPT.layer_parameters / GATHERS_PER_LAYER
    once = GATHERS_PER_LAYER * all_gather(part, ranks, net)
    assert sharded.micro_batches == 2
    assert estimate(sharded).seconds["shards"] == pytest.approx(3 * once * GPT.layers * 2, rel=1e-6)


def test_layers_are_cut_by_cost() -> None:
    # 16 layers and a projection worth 4 on 2 ranks: 11 layers against 5 and the projection, not 8 against 12
    assert balanced(16, 2, 4.0) == (11, 5)
    assert balanced(8, 4, 0.5) == (2, 2, 2, 2)
    assert sum(balanced(28, 8, 2.5)) == 28 and len(balanced(28, 8, 2.5)) == 8
    assert case(model=replace(GPT, layers=10), pipeline=4, attention="math").layers_per_stage == (3, 3, 2, 2)


def test_only_scores_in_fp16_stand_for_software_of_the_time_before_overlap() -> None:
    assert case(attention="math", precision="fp16").classic
    assert (
        not case(attention="math", precision="bf16").classic and not case(attention="flash", precision="fp16").classic
    )


def test_what_selective_recomputation_repeats() -> None:
    def repeated(**changes: object) -> float:
        return estimate(case(recompute="selective", global_batch=16, data=8, **changes)).seconds["recompute"]

    # the attention core alone is cheaper than every second product
    assert 0 < repeated(zero_stage=1) < 0.5 * repeated(zero_stage=3)
    assert case(attention="math", precision="fp16", zero_stage=3).repeats_core


def test_a_tensor_group_waits_for_its_slowest_host() -> None:
    small = {"global_batch": 8, "micro_batch": 1, "seq_len": 512}
    loose, tight = replace(DEFAULT, host_norm=8.0), replace(DEFAULT, host_norm=0.5)
    for tensor, waits in ((1, False), (4, True)):
        layout = case(tensor=tensor, **small)
        assert (estimate(layout, tight).step_seconds > 1.05 * estimate(layout, loose).step_seconds) is waits


def test_dualpipe_hides_the_exchange_of_tokens() -> None:
    model = Transformer.from_values({"layers": 16, "hidden": 2048, "experts": 16, "experts_per_token": 4})
    layout = {"model": model, "data": 16, "expert": 16, "pipeline": 4, "global_batch": 256, "micro_batch": 1}
    plain = case(**layout, schedule="1f1b")
    hidden = case(**layout, schedule="dualpipev", virtual_stages=2)
    assert 0 < estimate(hidden).seconds["tensor"] < estimate(plain).seconds["tensor"]


def test_a_faster_unit_loses_more_at_short_inner_dimensions() -> None:
    def loss(name: str) -> float:
        rates = device_rates(catalogue.accelerator(name), "bf16", DEFAULT)
        short, long = (matmul_seconds(16384, 16384, inner, rates) / inner for inner in (1024, 65536))
        return short / long

    assert loss("v100-32gb-sxm") < loss("a100-80gb-sxm") < loss("h100-80gb-sxm") < loss("b200-180gb-sxm")
    assert loss("a100-80gb-sxm") == pytest.approx(1 + DEFAULT.matmul_inner_half / 1024, rel=0.01)
    assert loss("tpu-v4") == pytest.approx(loss("a100-80gb-sxm"), rel=0.01)
