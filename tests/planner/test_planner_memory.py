"""Bytes per rank against the formulas of the papers, computed by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from shardwise.planner import catalogue
from shardwise.planner.activations import kept_bytes, layer_activation_bytes
from shardwise.planner.case import Case
from shardwise.planner.closedform import even
from shardwise.planner.constants import DEFAULT
from shardwise.planner.memory import (
    CONTEXT_BYTES,
    MemoryParts,
    context_bytes,
    gathered_bytes,
    rank_memory,
    rank_shares,
    state_bytes,
)
from shardwise.planner.predict import predict_runs, printed_bytes
from shardwise.planner.queued import queued_bytes
from shardwise.planner.runs import read_runs
from shardwise.planner.schedule import simulate
from shardwise.planner.step import estimate, room_bytes
from shardwise.spec.facts import Transformer

GPT = Transformer(layers=8, hidden=1024, heads=16, kv_heads=16, ffn_hidden=4096, vocab=1000)
LLAMA = replace(GPT, gated_ffn=True, kv_heads=4, tied_embeddings=False)


def case(**changes: object) -> Case:
    base = Case(
        model=GPT,
        machine=catalogue.machine("a100-80gb-sxm"),
        seq_len=2048,
        global_batch=32,
        micro_batch=4,
        attention="math",
        precision="fp16",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def flash(**changes: object) -> Case:
    return case(**{"attention": "flash", "precision": "bf16", **changes})


def test_states_by_zero_stage() -> None:
    # ZeRO, arXiv:1910.02054, figure 1, with gradients summed in 4 bytes: 2 + 4 + 12 bytes, each part over 8 ranks in turn
    million = 1e6
    found = {stage: state_bytes(flash(data=8, zero_stage=stage), million, 0.0) for stage in (0, 1, 2, 3)}
    assert found[0] == (2e6, 4e6, 12e6)
    assert found[1] == (2e6, 4e6, 1.5e6)
    assert found[2] == (2e6, 0.5e6, 1.5e6)
    assert found[3] == (0.5e6, 0.5e6, 1e6)  # the fp32 shard is the parameter: 4 + 4 + 8 over 8 ranks
    assert state_bytes(case(precision="fp32"), million, 0.0) == (4e6, 4e6, 8e6)


def test_experts_are_sharded_over_the_ranks_that_hold_the_same_ones() -> None:
    # 8 data ranks, experts over 4 of them: expert states have 2 copies to share, dense ones 8
    assert state_bytes(flash(data=8, expert=4, zero_stage=1), 0.0, 1e6) == (2e6, 4e6, 6e6)


def test_gradients_of_a_pipeline_stay_whole_until_the_last_micro_batch() -> None:
    layout = flash(data=8, zero_stage=2, pipeline=2, global_batch=64, micro_batch=4)
    assert layout.micro_batches == 2
    assert state_bytes(layout, 1e6, 0.0) == (2e6, 4e6, 1.5e6)
    assert state_bytes(replace(layout, micro_batch=8), 1e6, 0.0) == (2e6, 0.5e6, 1.5e6)


@pytest.mark.parametrize("tensor", [1, 4])
def test_activations_of_a_layer_follow_korthikanti(tensor: int) -> None:
    # arXiv:2205.05198 equation 2: s b h (10 + 24 / t + 5 a s / (h t)); equation 4 with sequence parallelism: all over t
    s, b, h, a = 2048, 4, 1024, 16
    plain = s * b * h * (10 + 24 / tensor + 5 * a * s / (h * tensor))
    assert layer_activation_bytes(case(tensor=tensor)) == pytest.approx(plain)
    split = s * b * h / tensor * (34 + 5 * a * s / h)
    assert layer_activation_bytes(case(tensor=tensor, sequence_parallel=tensor > 1)) == pytest.approx(split)


def test_recomputation_keeps_what_the_paper_says() -> None:
    s, b, h = 2048, 4, 1024
    # selective: equation 6 without the scores, 34 s b h; full: the input of the layer, 2 s b h
    assert kept_bytes(case(recompute="selective"))[0] == pytest.approx(34 * s * b * h)
    assert kept_bytes(case(recompute="full"))[0] == pytest.approx(2 * s * b * h)
    assert kept_bytes(case(recompute="none"))[1] == 0.0


def test_fused_attention_keeps_no_scores() -> None:
    # gpt without dropout: 8 h outside, 24 h inside
    assert layer_activation_bytes(case(attention="flash")) == pytest.approx(2048 * 4 * 1024 * 32)


def test_grouped_keys_and_gated_layers() -> None:
    # compiled llama: 8 h outside; query and output 4 h, key and value 4 x 256, gate, up and product 6 x 4096
    found = layer_activation_bytes(case(model=LLAMA, attention="flash", precision="bf16", compile=True))
    assert found == pytest.approx(2048 * 4 * (8 * 1024 + 4 * 1024 + 4 * 256 + 6 * 4096))


def test_embedding_and_projection_live_at_the_ends() -> None:
    whole = rank_shares(case())[0].dense
    assert whole == GPT.parameters
    split = case(pipeline=2)
    ends = [share.dense for share in rank_shares(split)]
    assert sum(ends) == GPT.parameters + GPT.embedding_parameters  # a tied matrix is held at both ends


def test_the_first_rank_of_an_interleaved_pipeline_is_the_fullest() -> None:
    # Korthikanti section 4.2.3: activations of L (1 + (p - 1) / (p v)) layers
    model = replace(GPT, layers=16)
    layout = case(model=model, pipeline=4, virtual_stages=2, schedule="interleaved1f1b", micro_batch=1)
    timeline = simulate("interleaved1f1b", layout.micro_batches, (1.0,) * 8, (2.0,) * 8, even(8, 0.0), 4)
    found = rank_memory(layout, timeline.in_flight, rank_shares(layout))
    layers = 16 * (1 + 3 / (4 * 2))
    assert found.activations == pytest.approx(layers * layer_activation_bytes(layout))


def test_memory_falls_with_every_kind_of_sharding_and_rises_with_the_micro_batch() -> None:
    def total(**changes: object) -> float:
        layout = case(attention="flash", precision="bf16", **changes)
        return rank_memory(layout, (1,) * layout.pipeline, rank_shares(layout)).total

    alone = total()
    assert total(tensor=2) < alone
    assert total(tensor=2, sequence_parallel=True) < total(tensor=2)
    assert total(pipeline=2) < alone
    assert total(context=2) < alone
    assert total(data=8, zero_stage=3) < total(data=8, zero_stage=2) < total(data=8, zero_stage=1) < total(data=8)
    assert total(micro_batch=8) > alone
    # the attention core keeps nothing that fused attention could give back; every second product does
    assert total(recompute="full") < total(recompute="selective") == alone
    sharded = {"data": 8, "zero_stage": 3}
    assert total(recompute="full", **sharded) < total(recompute="selective", **sharded) < total(**sharded)


def test_temporaries_of_the_update_reuse_only_blocks_that_can_hold_them() -> None:
    def update(**changes: object) -> float:
        layout = case(attention="flash", precision="bf16", **changes)
        return rank_memory(layout, (1,), rank_shares(layout)).update

    # replicated states beside fp32 sums are updated by one fused kernel, those of plain fp32 training are not
    few = {"micro_batch": 1, "seq_len": 512}
    assert update(**few) == 0.0
    plain = case(attention="flash", precision="fp32", **few)
    assert rank_memory(plain, (1,), rank_shares(plain)).update == pytest.approx(12.0 * GPT.parameters)
    # stage 3 over 2 ranks: 12 bytes a value; a block of activations holds 4096 x 4 x 2 bytes a token, the shard of a layer's
    # tensors in fp32 needs 4 bytes x its parameters / 2
    whole = 12.0 * GPT.parameters / 2
    tensor = 4.0 * GPT.layer_parameters / 2
    small, large = (case(attention="flash", precision="bf16", data=2, zero_stage=3, micro_batch=b) for b in (1, 4))
    assert 2.0 * 4096 * small.tokens < tensor < 2.0 * 4096 * large.tokens
    logits = 4.0 * 1000 * small.tokens
    assert logits < tensor
    assert update(data=2, zero_stage=3, micro_batch=1) == pytest.approx(whole)
    found = rank_memory(large, (1,), rank_shares(large))
    assert found.update == pytest.approx(
        max(0.0, whole - found.activations - found.logits * (4000 * large.tokens >= tensor))
    )
    assert found.update < 0.5 * whole


def test_the_least_estimate_is_never_above_the_usual_one() -> None:
    for stage in (0, 1, 2, 3):
        found = rank_memory(case(data=8, zero_stage=stage), (1,), rank_shares(case()))
        assert 0 < found.least < found.total
        assert found.total == pytest.approx(sum(found.by_part().values()))


def test_deepspeed_keeps_fp16_gradients_and_makes_flat_copies_of_its_shard() -> None:
    # stage_1_and_2.py: 2 N parameters, 2 N gradients, 12 N / D states, in the update 2 + 4 bytes a value of the shard
    assert state_bytes(case(data=8, zero_stage=1), 1e6, 0.0) == (2e6, 2e6, 1.5e6)
    assert state_bytes(case(data=8, zero_stage=2), 1e6, 0.0) == (2e6, 0.25e6, 1.5e6)
    # Megatron-LM's distributed optimizer the same with fp16 gradients, 4 + 16 / d; in bf16 both sum in fp32
    newer = flash(data=8, zero_stage=1, precision="fp16")
    assert state_bytes(newer, 1e6, 0.0) == (2e6, 2e6, 1.5e6)
    assert found_for(newer).gradients == 2.0 * GPT.parameters
    assert found_for(flash(data=8, zero_stage=1)).gradients == 6.0 * GPT.parameters
    assert state_bytes(case(data=8, zero_stage=1, precision="bf16"), 1e6, 0.0) == (2e6, 4e6, 1.5e6)
    layout = case(data=2, zero_stage=1, micro_batch=1, seq_len=256)
    found = rank_memory(layout, (1,), rank_shares(layout))
    assert found.update == pytest.approx(6.0 * GPT.parameters / 2)
    assert found.gathered == 1e9  # 5e8 gradients of 2 bytes
    assert found.spare == 0.0  # the software is known: the best can do no better
    changing = found.activations + found.logits + found.gathered + found.update
    assert found.slack == pytest.approx(0.03 * changing + 0.4 * 2**30)
    piped = replace(layout, pipeline=2)
    found = rank_memory(piped, (2, 1), rank_shares(piped))
    changing = found.activations + found.logits + found.gathered + found.update
    assert found.slack == pytest.approx(0.3 * changing + 0.4 * 2**30)  # between activations of a pipeline
    plain = case(data=2, micro_batch=1, seq_len=256)
    replicated = rank_memory(plain, (1,), rank_shares(plain))
    assert (replicated.update, replicated.gathered) == (0.0, 0.0)
    assert replicated.slack == pytest.approx(0.03 * (replicated.activations + replicated.logits) + 0.4 * 2**30)


def test_a_stage_keeps_its_output_for_the_backward_pass_unless_megatron_frees_it() -> None:
    shared = {"pipeline": 2, "recompute": "full", "data": 2}
    output = 2.0 * 4 * 2048 * 1024

    def kept(**changes: object) -> float:
        layout = case(**{**shared, **changes})
        found = rank_memory(layout, (3, 1), rank_shares(layout))
        entry, whole = kept_bytes(layout)
        return found.activations - 3 * 4 * entry - whole  # 3 in flight on the first rank, 4 layers, one computed again

    assert kept(zero_stage=1) == pytest.approx(3 * output)
    assert kept() == pytest.approx(0.0)  # Megatron-LM
    assert kept(attention="flash", precision="bf16") == pytest.approx(3 * output)
    assert kept(attention="flash", precision="fp8", compile=None) == pytest.approx(0.0)  # Transformer Engine


def test_what_is_printed_is_rank_0_and_what_must_fit_is_the_fullest_rank() -> None:
    layout = case(model=replace(GPT, vocab=200_000), pipeline=2, attention="flash", precision="bf16", micro_batch=4)
    shares = rank_shares(layout)
    found = rank_memory(layout, (1, 1), shares)
    assert found.logits == 14.0 * 200_000 * layout.tokens  # the last rank is the fuller one
    both = [rank_memory(layout, (flights, 1), shares) for flights in (1, 2)]
    one, entry = shares[0].layers * kept_bytes(layout)[0], 2.0 * layout.tokens * 1024
    assert both[1].first - both[0].first == pytest.approx(1.1 * (one + entry))  # its layers and the output, with slack
    assert found.first < found.total
    single = case(pipeline=1)
    first = rank_memory(single, (1,), rank_shares(single))
    assert first.first == first.total


def found_for(layout: Case) -> MemoryParts:
    return rank_memory(layout, (1,) * layout.pipeline, rank_shares(layout))


def test_sharded_gradients_leave_no_whole_copy_in_two_bytes() -> None:
    # stage 2 reduces and frees them bucket by bucket (5e8 values), stage 1 keeps all; in a pipeline all wait
    wide = replace(GPT, layers=96, hidden=4096, ffn_hidden=16384)
    values = float(wide.parameters)
    assert values > 5e8

    def gradients(**changes: object) -> float:
        return found_for(flash(model=wide, data=2, **changes)).gradients

    assert gradients(zero_stage=1) == pytest.approx((4.0 + 2.0) * values)
    assert gradients(zero_stage=2) == pytest.approx(4.0 * values / 2 + 2.0 * 5e8)
    half = rank_shares(flash(model=wide, data=2, pipeline=2, global_batch=64))[0].dense
    assert gradients(zero_stage=2, pipeline=2, global_batch=64) == pytest.approx((4.0 + 2.0) * half)


def test_what_a_row_leaves_open_the_best_software_saves() -> None:
    sharded = {"data": 2, "zero_stage": 3}
    stated = flash(model=LLAMA, compile=False, **sharded)
    layers = LLAMA.layers
    assert found_for(stated).spare == found_for(stated).update
    unknown = found_for(replace(stated, compile=None))
    fused = layer_activation_bytes(replace(stated, compile=True))
    assert unknown.spare - unknown.update == pytest.approx(
        layers * (layer_activation_bytes(replace(stated, compile=None)) - fused)
    )
    # blocks are recomputed as a whole, two of three; every second product and what is cheap leaves 0.4 of a layer
    some = replace(stated, recompute="selective")
    kept = layers * layer_activation_bytes(some)
    assert found_for(some).spare - found_for(some).update == pytest.approx(kept * (0.4 - 1.0 / 3.0))


def test_a_tpu_gathers_matrices_and_keeps_the_outputs_of_products() -> None:
    chip = catalogue.machine("tpu-v5p")
    layout = flash(machine=chip, compile=True, data=4, zero_stage=3, model=replace(LLAMA, vocab=100))
    assert context_bytes(layout) == 0.0
    assert context_bytes(case()) == CONTEXT_BYTES
    found = found_for(layout)
    assert found.gathered == pytest.approx(8.0 * 1024 * 4096)  # the largest matrix twice in 2 bytes, its gradient in 4
    # 2 bytes each: query, output, both products behind (4 h), keys and values 2 x 256, gate and up 2 x 4096
    products = 2.0 * layout.tokens * (4 * 1024 + 2 * 256 + 2 * 4096)
    halves = 0.5 * found.gradients  # `grad_dtype` bfloat16
    assert found.spare - found.update - halves == pytest.approx(8 * (layer_activation_bytes(layout) - products))
    whole = found_for(replace(layout, recompute="full"))
    tiled = whole.logits * 6.0 / 14.0 * 7.0 / 8.0
    assert whole.moved == pytest.approx(8 * 2.0 * layout.tokens * 1024 + tiled + whole.optimizer)


def test_checkpoints_of_tensor_ranks_can_wait_on_the_host_with_deepspeeds_stage_3() -> None:
    shape = {"data": 2, "zero_stage": 3, "recompute": "full"}
    entries = 8 * 2.0 * 4 * 2048 * 1024
    assert found_for(case(tensor=2, **shape)).moved == pytest.approx(entries)
    assert found_for(case(tensor=1, **shape)).moved == 0.0  # `partition_activations` splits over tensor ranks
    assert found_for(case(tensor=2, data=2, recompute="full")).moved == 0.0
    assert found_for(flash(tensor=2, **shape)).moved == 0.0


def test_a_run_that_fits_prints_no_more_than_the_device_has() -> None:
    wide = replace(GPT, vocab=250_000, tied_embeddings=False)
    layout = flash(model=wide, micro_batch=2, global_batch=2, seq_len=12288)
    found = estimate(layout)
    assert found.fits
    assert found.memory.first > room_bytes(layout)  # usual software does not fit
    assert printed_bytes(layout, found.memory) == room_bytes(layout)
    small = replace(layout, seq_len=2048)
    assert printed_bytes(small, estimate(small).memory) == estimate(small).memory.first
    large = replace(layout, seq_len=65536)
    assert not estimate(large).fits
    assert printed_bytes(large, estimate(large).memory) == estimate(large).memory.first > room_bytes(large)


def test_layers_split_over_ranks_of_eager_software_keep_what_nanotron_saves() -> None:
    # h a token in 2 bytes: both inputs and outputs of the norms / t; query, key, value, output of attention / t; gate, up, the
    # activated gate and their product / t (nanotron, llama.py; TritonRMSNorm saves its input alone)
    model = replace(GPT, gated_ffn=True)
    layout = flash(model=model, tensor=2, sequence_parallel=True)
    assert layer_activation_bytes(layout) == layout.tokens * (8 * 1024 + 8 * 1024 + 8 * 4096) / 2
    alone = flash(model=model)  # replicas may be anybody's: eager norms keep 3 h more each
    assert layer_activation_bytes(alone) == layout.tokens * (14 * 1024 + 8 * 1024 + 8 * 4096)
    # the fp32 copy of a logit and the copy that becomes softmax and gradient; the row leaves no better loss open
    found = found_for(layout)
    assert (found.logits, found.fused) == (8.0 * 500 * layout.tokens, 0.0)
    assert found_for(alone).logits == found_for(replace(alone, pipeline=2)).logits == 14.0 * 1000 * layout.tokens
    assert found_for(alone).fused == pytest.approx(8.0 * 1000 * layout.tokens)  # 6 bytes a logit are left


def test_outputs_of_tensor_ranks_wait_for_the_device_in_eager_software() -> None:
    output = 2.0 * 4 * 2048 * 1024

    def queued(in_flight: int = 1, layers: float = 8, **changes: object) -> float:
        return queued_bytes(flash(**{"tensor": 2, **changes}), layers, in_flight) / output

    # without a pipeline all of one forward pass, embedding included, as long as the queue of 1024 launches takes them
    assert queued() == 17
    assert queued(layers=40) == pytest.approx(2 * 1024 / 46)
    # the first rank of 4 stages: 4 in flight, one of them under way, and one waits for the next rank's message
    assert queued(pipeline=4, layers=2, in_flight=4) == 2 * 5
    assert queued(pipeline=2, layers=4, in_flight=2) == 0
    others: tuple[dict[str, object], ...] = (
        {"tensor": 1},
        {"compile": True},
        {"compile": None},
        {"zero_stage": 3, "data": 2},  # collectives of DTensors give their buffers back
        {"tensor": 16, "pipeline": 4},  # more than a node has, beside a pipeline
    )
    for other in others:
        layout = flash(**{"tensor": 2, **other})
        assert queued_bytes(layout, 8, 4) == 0, other
    layout = flash(tensor=2, sequence_parallel=True)
    found = found_for(layout)
    assert found.queued == 17 * output
    assert found.held == found.total + found.queued
    assert found.first == found.held
    assert found.total == pytest.approx(sum(found.by_part().values()))  # what must fit is without it


@pytest.mark.parametrize(
    ("micro_batch", "changes", "printed"),
    [
        (32, {"data": 8, "tensor": 16}, 41.0),
        (1, {"data": 16, "tensor": 16}, 3.3),
        (8, {"data": 2, "tensor": 8}, 21.0),
        (16, {"tensor": 32, "pipeline": 4}, 6.8),
        (8, {"tensor": 8, "pipeline": 8}, 16.7),
    ],
)
def test_memory_of_published_runs_of_nanotron(micro_batch: int, changes: dict[str, int], printed: float) -> None:
    model = Transformer(
        layers=16,
        hidden=2048,
        heads=32,
        kv_heads=32,
        ffn_hidden=8192,
        vocab=131_072,
        gated_ffn=True,
        tied_embeddings=True,
    )
    layout = flash(
        model=model,
        machine=catalogue.machine("h100-80gb-sxm"),
        seq_len=4096,
        global_batch=256,
        micro_batch=micro_batch,
        sequence_parallel=True,
        **changes,
    )
    found = printed_bytes(layout, estimate(layout).memory) / 2**30
    assert found == pytest.approx(printed, rel=0.12)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_alone_has_eight_bytes_a_parameter(zero_stage: int) -> None:
    # weights, gradients and two moments of 2 bytes, each part over 8 ranks from its stage on
    alone = flash(data=8, zero_stage=zero_stage, precision="pure-bf16")
    ways = [8 if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    assert state_bytes(alone, 1e6, 0.0) == (2e6 / ways[0], 2e6 / ways[1], 4e6 / ways[2])
    if zero_stage == 3:  # two blocks of 2 bytes and a gradient of 2, not of 4
        assert gathered_bytes(alone) == pytest.approx(6 / 8 * gathered_bytes(flash(data=8, zero_stage=3)))


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_bf16_alone_needs_less_and_updates_faster_while_products_stay(zero_stage: int) -> None:
    mixed, alone = (
        estimate(flash(data=8, zero_stage=zero_stage, micro_batch=4, precision=precision))
        for precision in ("bf16", "pure-bf16")
    )
    least = [found.memory.least + found.memory.rare for found in (mixed, alone)]
    assert alone.memory.total < mixed.memory.total and least[1] < least[0]
    assert alone.memory.logits == mixed.memory.logits and alone.memory.activations == mixed.memory.activations
    update = [found.seconds["optimizer"] - DEFAULT.step_seconds for found in (mixed, alone)]
    assert update[1] == pytest.approx(18 / 38 * update[0])
    assert alone.seconds["compute"] == pytest.approx(mixed.seconds["compute"], rel=1e-9)
    assert alone.seconds["gradients"] <= mixed.seconds["gradients"]
    if zero_stage == 0:
        assert alone.seconds["gradients"] < 0.8 * mixed.seconds["gradients"]  # half of the bytes, and latency


def test_bf16_alone_adds_up_its_gradients_in_two_bytes() -> None:
    # gradient read, sum read and written: 6 bytes a value of a layer, 10 where the sum is in fp32
    compute = []
    for precision in ("bf16", "pure-bf16"):
        several = flash(micro_batch=4, precision=precision)
        single = replace(several, global_batch=4)
        compute.append(estimate(several).seconds["compute"] - 8 * estimate(single).seconds["compute"])
    assert compute[1] == pytest.approx(6 / 10 * compute[0], rel=1e-6) and compute[0] > 0


def test_peaks_of_litgpt_in_bf16_alone_are_told() -> None:
    # github.com/Lightning-AI/litgpt, extensions/thunder/README.md: TinyLlama with `bf16-true`, GiB on 8 and on 1 A100
    table = Path(__file__).parents[2] / "benchmarks" / "published" / "small_models.csv"
    told = {item.run_id: item for item in predict_runs(read_runs(table))}
    for run, peak in (("small-0005", 22.13), ("small-0006", 21.4), ("small-0007", 29.84), ("small-0008", 27.42)):
        item = told[run]
        assert item.case is not None and item.estimate is not None and item.case.precision == "pure-bf16"
        if run > "small-0006":  # one device, where nothing is sharded: 20 bytes a parameter would be a quarter too much
            mixed = estimate(replace(item.case, precision="bf16")).memory.first
            assert abs(item.estimate.memory.first / 2**30 - peak) < 0.8 * abs(mixed / 2**30 - peak)
        assert printed_bytes(item.case, item.estimate.memory) / 2**30 == pytest.approx(peak, rel=0.3)
