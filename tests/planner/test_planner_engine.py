"""What the row of a run tells about its software, and what follows: kernels, casts, exchanges, sums, precisions, chips."""

from dataclasses import replace

import pytest

from shardwise.planner import catalogue
from shardwise.planner.activations import layer_activation_bytes
from shardwise.planner.case import Case
from shardwise.planner.collectives import Group, all_gather, all_to_all, network
from shardwise.planner.compute import ENGINE_ATTENTION, attention_core, device_rates
from shardwise.planner.constants import DEFAULT
from shardwise.planner.layers import MASK_MOVES, MOVES, LayerWork, head_work, layer_work
from shardwise.planner.overlap import delay, exchange_overlaps, hidden, shards_in_a_loop
from shardwise.planner.predict import base_case, candidates
from shardwise.planner.runs import parse_runs
from shardwise.planner.step import Memo, estimate
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
        ("h100-80gb-sxm", {"precision": "bf16", "tensor": 2}, True),
        ("h100-80gb-sxm", {"precision": "bf16", "pipeline": 2}, True),
        ("h100-80gb-sxm", {"precision": "bf16", "context": 2}, True),
        ("h100-80gb-sxm", {"precision": "bf16", "context": 2, "zero_stage": 3}, False),
        ("h100-80gb-sxm", {"precision": "bf16", "tensor": 2, "compile": False}, False),
        ("h100-80gb-sxm", {"precision": "bf16", "tensor": 2, "zero_stage": 3}, False),
        ("a100-80gb-sxm", {"precision": "bf16", "tensor": 2}, False),
        ("b200-180gb-sxm", {"precision": "bf16"}, True),
        ("b200-180gb-sxm", {"precision": "bf16", "compile": True}, False),
        ("b200-180gb-sxm", {"precision": "fp32"}, False),
    ],
)
def test_the_row_tells_the_software(hardware: str, changes: dict[str, object], engine: bool) -> None:
    assert case(hardware, **changes).engine is engine
    assert case(hardware, **changes).graphs is (engine and hardware.startswith("b"))


def works(layout: Case) -> LayerWork:
    device = device_rates(layout.machine.accelerator, layout.precision, DEFAULT, layout.engine)
    return layer_work(layout, device, DEFAULT)


def test_attention_of_the_engine_has_the_measured_rate_of_its_generation() -> None:
    def rate(name: str, engine: bool) -> float:
        part = catalogue.accelerator(name)
        found = device_rates(part, "fp8", DEFAULT, engine=engine).attention_flops
        return found / part.peak_flops["bf16"].value / DEFAULT.attention_rate

    hopper, blackwell, ultra = ENGINE_ATTENTION.values()
    for names, found in (
        (("h100-80gb-sxm", "h200"), hopper),
        (("gb200", "b200"), blackwell),
        (("gb300", "b300"), ultra),
    ):
        assert [rate(name, True) for name in names] == pytest.approx([found, found])
    assert rate("h100-80gb-sxm", False) == pytest.approx(0.33)
    assert rate("a100-80gb-sxm", True) == rate("a100-80gb-sxm", False)


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
        estimate(case(model=MIXTURE, data=32, expert=32, global_batch=32, compile=compiled))
        for compiled in (None, False)
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


def test_graphs_hold_the_dense_part_of_a_layer_and_never_its_experts() -> None:
    dense, mixture = works(case("b200-180gb-sxm")), works(case("b200-180gb-sxm", model=MIXTURE, expert=8))
    assert dense.forward.kernels == dense.backward.kernels == 0
    # 8 experts on the rank, two products each, and what moves the tokens
    assert mixture.forward.kernels == mixture.inner_forward.kernels == 8 * 2 + 8
    assert works(case(model=MIXTURE, expert=8, tensor=2)).forward.kernels > mixture.forward.kernels


def test_the_host_queues_nothing_behind_a_router() -> None:
    # 64 experts of few tokens each: launching them takes longer than they do, and attention before them hides none of it
    layout = case(model=MIXTURE, expert=1, recompute="none")
    work = works(layout)
    before, behind = work.forward - work.inner_forward, work.inner_forward
    launches = behind.kernels * DEFAULT.launch_seconds
    assert launches > behind.seconds and before.seconds > before.kernels * DEFAULT.launch_seconds
    back = max(work.backward.seconds, work.backward.kernels * DEFAULT.launch_seconds)
    plain = estimate(layout).seconds["compute"]
    none = estimate(replace(layout, model=replace(MIXTURE, layers=7))).seconds["compute"]
    assert plain - none == pytest.approx(before.seconds + launches + back, rel=1e-6)


def test_exchanges_between_nodes_overlap_in_pipelines_of_several_chunks() -> None:
    layout = case(model=MIXTURE, data=32, expert=32, pipeline=2, precision="fp8", schedule="interleaved1f1b")
    assert exchange_overlaps(replace(layout, virtual_stages=2))
    assert not exchange_overlaps(layout)
    assert not exchange_overlaps(replace(layout, virtual_stages=2, expert=8))
    assert not exchange_overlaps(replace(layout, virtual_stages=2, precision="bf16", compile=False))
    apart, beside = (estimate(replace(layout, virtual_stages=chunks, global_batch=512)) for chunks in (1, 2))
    assert beside.seconds["tensor"] < 0.8 * apart.seconds["tensor"]


def test_times_of_layers_are_shared_only_by_cases_that_agree_on_the_software() -> None:
    base = case(model=MIXTURE, data=16, expert=16, global_batch=512, schedule="interleaved1f1b", zero_stage=1)
    memo = Memo()
    for stages, chunks in ((1, 1), (2, 1), (2, 2)):
        layout = replace(
            base, pipeline=stages, virtual_stages=chunks, schedule="interleaved1f1b" if chunks > 1 else "1f1b"
        )
        assert estimate(layout, quick=True, memo=memo) == estimate(layout, quick=True)
    memo = Memo()
    for stages in (1, 2):  # on two stages of one node the engine runs, on one it need not
        layout = case(data=4, pipeline=stages, global_batch=64)
        assert layout.engine is (stages > 1)
        assert estimate(layout, quick=True, memo=memo) == estimate(layout, quick=True)


def test_the_output_projection_is_never_cast() -> None:
    part = catalogue.accelerator("gb300")
    wide, eight, four = (
        head_work(case("gb300", precision=name), device_rates(part, name, DEFAULT, engine=True))[0].seconds
        for name in ("bf16", "fp8", "fp4")
    )
    assert wide == eight == four


def test_casting_to_four_bits_takes_two_passes_over_inputs_and_gradients() -> None:
    part = catalogue.accelerator("gb300")
    eight, four = (device_rates(part, name, DEFAULT, engine=True).cast_bytes for name in ("fp8", "fp4"))
    assert eight == pytest.approx(2 / 3) and four == pytest.approx(2.5 * 2 / 3)
    assert device_rates(part, "bf16", DEFAULT, engine=True).cast_bytes == 0


def test_updated_parameters_are_gathered_beside_the_first_forward_pass() -> None:
    layout = case(data=64, tensor=2, zero_stage=1, global_batch=64, model=replace(MODEL, layers=32))
    ours, eager = estimate(layout), estimate(replace(layout, compile=False))
    assert layout.engine and not replace(layout, compile=False).engine
    # gathering takes half of the bytes of scattering; eager software shows all of it, ours what delays compute
    assert 0.3 < ours.seconds["gradients"] / eager.seconds["gradients"] < 0.5


def test_a_pipeline_of_the_engine_whose_schedule_is_unknown_may_be_interleaved() -> None:
    text = ["run_id,hardware,layers,hidden,seq_len,gpus,tensor,pipeline,global_batch,virtual_stages,schedule\n"]
    text += [
        "a,h100,32,4096,4096,16,2,4,64,,\n",
        "b,h100,32,4096,4096,16,2,4,64,1,\n",
        "c,h100,32,4096,4096,16,2,4,64,,1f1b\n",
    ]
    open_row, *stated = parse_runs(text, "t")
    found = {(one.virtual_stages, one.schedule) for one in candidates(open_row, base_case(open_row))}
    assert found == {(1, "1f1b"), *((count, "interleaved1f1b") for count in (2, 4))}
    for row in stated:
        assert {one.virtual_stages for one in candidates(row, base_case(row))} == {1}


def test_heads_are_padded_to_the_width_of_a_systolic_array() -> None:
    def seconds(hardware: str, heads: int) -> float:
        layout = case(hardware, model=replace(MODEL, heads=heads, kv_heads=heads))
        return attention_core(layout, device_rates(layout.machine.accelerator, "bf16", DEFAULT))[0].seconds

    assert seconds("tpu-v5p", 64) == pytest.approx(
        2 * seconds("tpu-v5p", 32)
    )  # width 64 takes as long as 128, twice as often
    assert seconds("a100", 64) < 1.3 * seconds("a100", 32)


def test_shards_of_a_compiled_loop_are_not_gathered_ahead_of_their_layer() -> None:
    dense, mixture = (case("tpu-v5p", model=model, compile=True, zero_stage=3) for model in (MODEL, MIXTURE))
    assert dense.loops and not case("h100", compile=True).loops and not replace(dense, compile=False).loops
    share = MODEL.attention_parameters / (MODEL.attention_parameters + MODEL.expert_parameters)
    forward, backward = shards_in_a_loop(dense, works(dense), 1e-4, 2e-4, DEFAULT)
    hidden = (1 - share) * (1 - DEFAULT.overlap_cost)
    assert forward == pytest.approx(1e-4 * (1 - hidden))
    assert backward == pytest.approx(
        1e-4 + forward
    )  # gathered again with nothing before it, then scattered beside attention
    again = shards_in_a_loop(replace(dense, recompute="full"), works(dense), 1e-4, 2e-4, DEFAULT)[1]
    assert again == pytest.approx(2 * forward)
    work = works(mixture)
    room = (work.forward - work.inner_forward).seconds
    assert shards_in_a_loop(mixture, work, 1.0, 2.0, DEFAULT)[0] == pytest.approx(
        1.0 - room * (1 - DEFAULT.overlap_cost)
    )


def test_masks_move_tokens_to_their_experts_on_a_tpu() -> None:
    device = device_rates(catalogue.accelerator("tpu-v5p"), "bf16", DEFAULT)
    layout = case("tpu-v5p", model=MIXTURE, compile=True, zero_stage=3)
    more = works(layout).inner_forward.seconds - works(replace(layout, compile=False)).inner_forward.seconds
    flops = 2 * 2.0 * 4096 * (8 * 4096) * MIXTURE.hidden
    less = (MOVES[0] - MASK_MOVES) * 4096 * 8 * MIXTURE.hidden * 2 / device.memory_bytes  # the masks hold the weights
    assert more == pytest.approx(flops / device.matmul_flops - less, rel=0.1)


def test_modules_of_the_engine_launch_the_exchanges_of_tensor_ranks() -> None:
    def launches(compiled: bool | None) -> float:
        layout = case(tensor=4, data=1, global_batch=1, sequence_parallel=True, compile=compiled)
        slow, slower = (
            replace(DEFAULT, launch_seconds=seconds) for seconds in (1.0, 2.0)
        )  # so that nothing else counts
        return estimate(layout, slower).step_seconds - estimate(layout, slow).step_seconds

    # eager: two gathers and two scatters of 12 calls each in 8 layers and 2 passes
    assert launches(False) - launches(None) == pytest.approx(8 * 2 * 4 * 12, rel=0.01)


def test_what_a_slow_network_carries_delays_compute_less() -> None:
    ranks, size = Group(64, 8), 1e9

    def delays(gbits: float, moved: float = size) -> float:
        net = network(catalogue.machine("a100", gbits_per_gpu=gbits), DEFAULT)
        return delay(moved, all_gather(moved, ranks, net), ranks, net, DEFAULT)

    across = 8 * 50e9 / 8 * DEFAULT.network_rate / (300e9 * DEFAULT.link_rate)
    assert delays(50.0) == pytest.approx(DEFAULT.overlap_cost * across, rel=0.15)  # and some latency
    assert delays(400.0) == DEFAULT.overlap_cost
    assert delays(50.0, 1e5) > 0.8 * DEFAULT.overlap_cost  # nearly all latency, which counts in full
    alone = network(catalogue.machine("a100"), DEFAULT)
    assert delay(size, all_gather(size, Group(8, 8), alone), Group(8, 8), alone, DEFAULT) == pytest.approx(
        DEFAULT.overlap_cost, rel=0.01
    )
    layout = case("a100", compile=False)
    assert hidden(3.0, 2.0, layout, 0.1) == hidden(2.0, 3.0, layout, 0.1) == pytest.approx(3.2)
    # fully sharded training that hides its gathers takes what compute takes, and that share of them
    sharded = case(
        machine=catalogue.machine("a100", gbits_per_gpu=50.0), data=16, zero_stage=3, global_batch=64, micro_batch=4
    )
    found = estimate(replace(sharded, compile=False))
    wire = 16 * 50e9 / 8 / 2 * DEFAULT.network_rate  # the ring over two nodes of 8
    moved = 3 * 2.0 * 15 / 16 * 8 * (MODEL.attention_parameters + MODEL.expert_parameters) / wire
    assert found.seconds["shards"] == pytest.approx(DEFAULT.overlap_cost * across * moved, rel=0.15)
