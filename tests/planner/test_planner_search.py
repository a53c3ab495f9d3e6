"""Search and explanation: rules of the space, published winners, reasons that follow from the numbers."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from shardwise.cli.plan import plan as plan_command
from shardwise.cli.plan_job import write_plan
from shardwise.errors import PlanError, UserError
from shardwise.planner import catalogue
from shardwise.planner.breakeven import LAYOUTS, Budget, break_even_batch, break_even_gbits, break_even_link
from shardwise.planner.confidence import PUBLISHED, published_kind
from shardwise.planner.constants import DEFAULT
from shardwise.planner.explain import (
    enough_workers,
    losers,
    nothing_fits,
    what_helps,
    why_best,
    why_not,
)
from shardwise.planner.search import MANY, Candidate, Problem, as_plan, cases, family, fewer_workers, search
from shardwise.planner.stagecuts import best_cuts
from shardwise.planner.step import Memo, estimate
from shardwise.spec.facts import Transformer
from shardwise.spec.layout import Layout
from shardwise.spec.machine import Figure
from shardwise.spec.measured import Measured
from shardwise.spec.plan import Plan
from shardwise.spec.runnable import check_plan, refusals

SMALL = "llama:layers=32,hidden=4096,heads=32,kv_heads=8,ffn=14336,vocab=128256,seq=8192"
LARGE = "gpt:layers=96,hidden=12288,heads=96,seq=2048,vocab=51200"


def problem(text: str, workers: int, batch: int, hardware: str = "a100-80gb-sxm", **changes: object) -> Problem:
    model, seq_len = Transformer.parse(text)
    base = Problem(
        model=model, machine=catalogue.machine(hardware), workers=workers, seq_len=seq_len, global_batch=batch
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_every_layout_uses_all_workers_and_keeps_the_rules() -> None:
    asked = problem(SMALL, 64, 192)
    found = list(cases(asked))
    assert len(found) > 500
    assert len(
        {
            (
                case.data,
                case.tensor,
                case.pipeline,
                case.zero_stage,
                case.micro_batch,
                case.schedule,
                case.virtual_stages,
                case.recompute,
            )
            for case in found
        }
    ) == len(found)
    for case in found:
        assert case.workers == 64
        assert case.tensor <= 8 and asked.model.heads % case.tensor == 0
        assert case.pipeline * case.virtual_stages <= asked.model.layers
        assert asked.global_batch == case.data * case.micro_batch * case.micro_batches
        assert case.context == 1 and case.expert == 1


def test_long_sequences_open_context_and_experts_open_expert_parallelism() -> None:
    long = problem(SMALL.replace("seq=8192", "seq=131072"), 16, 16)
    assert {case.context for case in cases(long)} >= {1, 2, 4, 8, 16}
    sparse = problem("llama:layers=32,hidden=4096,experts=8,seq=4096", 16, 64)
    assert {case.expert for case in cases(sparse)} == {1, 2, 4, 8}
    assert all(case.data % case.expert == 0 for case in cases(sparse))


def test_the_best_plan_is_the_fastest_that_fits() -> None:
    asked = problem(SMALL, 16, 64)
    found = search(asked)
    assert found.best is not None
    fitting = [one for case in cases(asked) if (one := estimate(case)).comfortable]
    assert found.best.estimate.step_seconds <= 1.01 * min(one.step_seconds for one in fitting)
    steps = [item.estimate.step_seconds for item in found.plans[:8]]
    assert steps == sorted(steps)
    assert all(item.estimate.comfortable for item in found.plans)
    assert not any(item.estimate.comfortable for item in found.too_large)


def test_sharing_the_times_of_layers_changes_nothing() -> None:
    for text in (SMALL, SMALL.replace("seq=8192", "seq=65536"), SMALL + ",experts=4"):
        asked, memo = problem(text, 16, 16), Memo()
        for case in list(cases(asked))[::7]:
            shared = estimate(case, quick=True, memo=memo)
            assert shared == estimate(case, quick=True), str(case)


def test_a_small_model_on_a_fast_node_is_not_split() -> None:
    best = search(problem("gpt:layers=12,hidden=768,seq=1024", 8, 512)).best
    assert best is not None and best.case.data == 8
    alone = search(problem("gpt:layers=12,hidden=768,seq=1024", 1, 64)).best
    assert alone is not None and alone.family == "serial"


def test_published_winners_at_scale() -> None:
    # Narayanan et al. 2021: tensor parallelism inside the node, pipeline across nodes
    best = search(problem(LARGE, 1536, 1536, precision="fp16", attention="math")).best
    assert best is not None
    assert 1 < best.case.tensor <= 8 and best.case.pipeline > 1
    # the same paper, table 2: at a fixed batch fully sharded training falls behind as GPUs are added
    ratios = []
    for workers in (384, 1536):
        found = search(problem(LARGE, workers, 1536, precision="fp16", attention="math"))
        sharded = [item for item in found.plans if item.case.zero_stage == 3 and item.case.tensor == 1]
        assert found.best is not None and sharded
        ratios.append(sharded[0].estimate.step_seconds / found.best.estimate.step_seconds)
    assert ratios[1] > 1.5 and ratios[1] > 1.2 * ratios[0]


def test_a_trillion_parameters_on_3072_devices() -> None:
    # Narayanan et al. 2021, table 1: tensor=8 inside the node, a pipeline of 64 stages across nodes
    asked = problem(
        "gpt:layers=128,hidden=25600,heads=160,seq=2048,vocab=51200", 3072, 3072, precision="fp16", attention="math"
    )
    best = search(asked).best
    assert best is not None
    assert best.case.tensor == 8 and best.case.pipeline >= 16
    told = why_not(asked, Layout(shard=3072), search(asked))
    assert "gathering and reducing shards" in told and "times as long as the winner" in told


def test_a_slow_network_changes_the_answer() -> None:
    fast = problem(SMALL, 32, 64)
    slow = replace(fast, machine=fast.machine.with_network(1, "test"))
    quick, crawling = search(fast).best, search(slow).best
    assert quick is not None and crawling is not None
    assert crawling.estimate.step_seconds > quick.estimate.step_seconds
    assert crawling.case.pipeline > quick.case.pipeline


def test_reasons_name_the_part_that_costs() -> None:
    asked = problem(SMALL, 32, 64)
    asked = replace(asked, machine=asked.machine.with_network(5, "test"))
    found = search(asked)
    reasons = {item.family: item for item in losers(asked, found)}
    assert found.best is not None and found.best.family not in reasons
    assert "slower than the winner" in reasons["shard"].sentence
    assert "gathering and reducing shards" in reasons["shard"].sentence
    assert "does not fit" in reasons["data"].sentence and "optimizer" in reasons["data"].sentence
    assert f"{found.best}" in why_best(found)
    assert any("network twice as fast" in sentence for sentence in what_helps(found))


def test_break_even_is_where_two_layouts_meet_on_the_same_network() -> None:
    asked = problem(SMALL, 32, 64)
    asked = replace(asked, machine=asked.machine.with_network(10, "test"))
    best = search(asked).best
    quick = search(replace(asked, machine=asked.machine.with_network(1000, "test"))).best
    assert best is not None and quick is not None and best.family != quick.family
    case = replace(quick.case, machine=asked.machine)
    gbits = break_even_gbits(case, [best.case])
    assert gbits is not None and gbits > 10

    def leads(speed: float) -> bool:
        mine, theirs = (
            estimate(replace(one, machine=one.machine.with_network(speed, "test")), quick=True).step_seconds
            for one in (case, best.case)
        )
        return mine <= theirs

    assert leads(gbits) and not leads(0.99 * gbits)
    twice = replace(case, recompute="full")
    assert break_even_gbits(twice, [best.case, case]) is None, "it computes more than another on any network"


def test_break_even_of_links_and_batches() -> None:
    asked = problem(SMALL, 8, 64)
    link = Figure(20e9, "nominal", "test")
    asked = replace(asked, machine=replace(asked.machine, intra=replace(asked.machine.intra, bytes_per_second=link)))
    ways = list(cases(asked))
    wide = next(case for case in ways if case.tensor == 8 and case.recompute == "none" and case.micro_batch == 8)
    deep = next(case for case in ways if case.pipeline == 8 and case.recompute == "full" and case.micro_batch == 1)
    gbytes = break_even_link(wide, [deep])
    assert gbytes is not None and gbytes > 20
    for speed, wins in ((gbytes, True), (0.99 * gbytes, False)):
        fast = Figure(speed * 1e9, "nominal", "test")
        place = replace(asked.machine, intra=replace(asked.machine.intra, bytes_per_second=fast))
        mine, theirs = (estimate(replace(one, machine=place), quick=True).step_seconds for one in (wide, deep))
        assert (mine <= theirs) is wins
    thin = problem(SMALL, 16, 16)
    open_cases = list(cases(replace(thin, machine=thin.machine.with_network(15, "test"))))
    deep = next(case for case in open_cases if case.pipeline == 4 and case.data == 4 and case.micro_batch == 1)
    flat = next(case for case in open_cases if case.data == 16 and case.zero_stage == 3 and case.micro_batch == 1)
    more = break_even_batch(deep, [flat])
    assert more is not None and more > 16
    for batch, wins in ((more, True), (more // 2, False)):
        mine, theirs = (estimate(replace(one, global_batch=batch), quick=True).step_seconds for one in (deep, flat))
        assert (mine <= theirs) is wins


@pytest.mark.parametrize(
    ("text", "workers", "gbits"),
    [("gpt:layers=24,hidden=2048,heads=16,seq=1024,vocab=50257", 16, 7), (SMALL, 512, 50)],
)
def test_planned_again_at_its_break_even_a_family_wins(text: str, workers: int, gbits: float) -> None:
    asked = problem(text, workers, 256)
    asked = replace(asked, machine=asked.machine.with_network(gbits, "test"))
    told = [
        (item.family, float(match.group(1)))
        for item in losers(asked, search(asked))
        if (match := re.search(r"would win above (\d+) Gbit", item.sentence))
    ]
    assert told
    for name, speed in told:
        best = search(replace(asked, machine=asked.machine.with_network(1.03 * speed + 1, "test"))).best
        assert best is not None and best.family == name


def test_more_of_anything_is_never_slower() -> None:
    rng = random.Random(5)
    texts = ("gpt:layers=12,hidden=768,seq=1024", "gpt:layers=24,hidden=2048,seq=1024", SMALL)
    for _ in range(8):
        text, hardware = rng.choice(texts), rng.choice(("h100", "v100-32gb-sxm", "a100-80gb-sxm"))
        asked = problem(text, rng.choice((8, 24, 64, 100)), rng.choice((24, 64, 100)), hardware)
        asked = replace(asked, machine=asked.machine.with_network(rng.choice((10.0, 100.0)), "test"))
        base = search(asked).best
        now = base.estimate.step_seconds if base is not None else math.inf
        device, link = asked.machine.accelerator, asked.machine.intra
        room = Figure(1.5 * device.memory_bytes.value, "nominal", "test")
        fast = Figure(2 * link.bytes_per_second.value, "nominal", "test")
        gbits = asked.machine.inter.bytes_per_second.value * 16 / 1e9
        changed = {
            "memory": replace(asked, machine=replace(asked.machine, accelerator=replace(device, memory_bytes=room))),
            "links": replace(asked, machine=replace(asked.machine, intra=replace(link, bytes_per_second=fast))),
            "network": replace(asked, machine=asked.machine.with_network(gbits, "test")),
            "workers": replace(asked, workers=2 * asked.workers),
            "batch": replace(asked, global_batch=2 * asked.global_batch),
        }
        for name, more in changed.items():
            best = search(more).best
            then = best.estimate.step_seconds if best is not None else math.inf
            assert then / (2 if name == "batch" else 1) <= 1.005 * now, f"{name}: {asked} {base} {best}"


def test_workers_that_the_batch_cannot_use_stay_idle() -> None:
    asked = problem("gpt:layers=12,hidden=768,seq=1024", 96, 64, "h100")
    found = search(asked)
    assert found.best is not None and found.best.case.workers < 96
    assert f"on {found.best.case.workers} of 96 workers" in str(found.best)
    whole = min(estimate(case, quick=True).step_seconds for case in cases(asked))
    assert found.best.estimate.step_seconds < whole
    assert fewer_workers(asked) == (64, 48, 32, 24, 16, 8, 6, 4, 3, 2, 1)


def test_a_rich_space_is_searched_once_and_its_reasons_cost_few_searches() -> None:
    text = "llama:layers=61,hidden=7168,heads=128,ffn=2048,seq=4096,experts=256,experts_per_token=8"
    asked = problem(text, 256, 960, "h100")
    found = search(asked)
    assert MANY < found.priced <= sum(1 for _ in cases(asked)), "no fewer workers beside all of them"
    budget = Budget.of(found.priced)
    assert budget.searches == LAYOUTS // found.priced
    first = Budget(1)
    assert first.search(problem("gpt:layers=2,hidden=256", 1, 8), DEFAULT) is not None and first.searches == 0


def test_tensor_groups_do_not_straddle_nodes() -> None:
    asked = problem("gpt:layers=24,hidden=3072,heads=24", 48, 96)
    six = replace(asked, machine=replace(asked.machine, gpus_per_node=6))
    assert {case.tensor for case in cases(six)} == {1, 2, 3, 6}
    assert {case.tensor for case in cases(asked)} == {1, 2, 4, 8}
    assert {case.tensor for case in cases(replace(asked, workers=6))} == {1, 2, 3, 6}
    told = why_not(six, Layout(tensor=4), search(six))
    assert "must divide the 6 ranks of a node" in told and "Priced" not in told


def test_odd_shares_have_more_micro_batches_than_one() -> None:
    assert {case.micro_batch for case in cases(problem(SMALL, 8, 1000)) if case.data == 8} == {1, 5, 25}
    assert {case.micro_batch for case in cases(problem(SMALL, 8, 512)) if case.data == 8} == {1, 2, 4, 8, 16, 32}


def test_every_kind_of_loss_says_what_would_change_it() -> None:
    asked = problem(LARGE, 1536, 1536, precision="fp16", attention="math")
    told = " ".join(item.sentence for item in losers(asked, search(asked)))
    assert "waiting in the pipeline" in told and "batch" in told
    assert "of device memory it need not" in told and "does not fit" in told
    slow = problem(SMALL, 32, 64)
    slow = replace(slow, machine=slow.machine.with_network(5, "test"))
    assert "Gbit/s per rank between nodes (now 5)" in " ".join(item.sentence for item in losers(slow, search(slow)))


def test_why_not_of_experts_leaves_the_other_degrees_free() -> None:
    asked = problem("llama:layers=32,hidden=4096,heads=32,kv_heads=8,ffn=14336,experts=8,seq=4096", 64, 512, "h100")
    found = search(asked)
    assert found.best is not None and found.best.case.expert > 1
    assert "nothing speaks against it" in why_not(asked, Layout(expert=found.best.case.expert), found)


def test_why_not_answers_for_one_layout() -> None:
    asked = problem(SMALL, 32, 64)
    found = search(asked)
    assert found.best is not None
    assert "nothing speaks against it" in why_not(asked, found.best.case.layout(), found)
    assert "its smallest form is serial micro_batch=1 recompute=full on 1 of 32 workers; it does not fit" in why_not(
        asked, Layout(), found
    )
    wide = why_not(asked, Layout(tensor=16), found)
    assert "Priced all the same, its best form is " in wide and "tensor=16" in wide and "slower than the winner" in wide
    assert "slower than the winner" in why_not(asked, Layout(tensor=8), found)
    for layout, rule in (
        (Layout(tensor=7), "not possible here: tensor must divide the 32 heads; 7 must divide the 32 workers"),
        (Layout(tensor=16), "not possible here: tensor ranks stay within the 8 ranks of a node"),
        (Layout(expert=2), "not possible here: the model has no experts"),
        (Layout(context=2), "not possible here: sequences are split only from 16384 tokens on"),
        (Layout(pipeline=64), "not possible here: a pipeline has at most 32 stages; 64 must divide the 32 workers"),
        (Layout(shard=128), "the 64 sequences of a step must divide evenly over 128 data ranks"),
        (Layout(pipeline=16, tensor=4), "64 must divide the 32 workers"),
    ):
        assert rule in why_not(asked, layout, found)
    assert "does not fit" in why_not(asked, Layout(data=32), found)


def test_what_cannot_fit_is_an_answer_not_an_error() -> None:
    tiny = problem(SMALL, 2, 8)
    device = replace(tiny.machine.accelerator, memory_bytes=Figure(16 * 2**30, "nominal", "test"))
    asked = replace(tiny, machine=replace(tiny.machine, accelerator=device))
    found = search(asked)
    assert found.best is None and found.too_large
    assert "nothing fits" in nothing_fits(found) and "16.0 GiB" in nothing_fits(found)
    with pytest.raises(PlanError, match="nothing fits"):
        why_best(found)
    enough = enough_workers(asked)
    assert enough is not None and f"Use more workers: {enough} of these" in nothing_fits(found, enough)
    assert search(replace(asked, workers=enough)).best is not None
    assert search(replace(asked, workers=enough // 2)).best is None


def test_the_winner_becomes_a_plan_that_reads_back() -> None:
    found = search(problem(SMALL, 16, 64))
    assert found.best is not None
    plan = as_plan(found.best, (why_best(found),))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert plan.layout.workers == 16 and plan.layout.tensor == found.best.case.tensor
    assert plan.prediction is not None
    assert sum(plan.prediction.seconds_by_part.values()) == pytest.approx(plan.prediction.step_seconds)


def test_a_plan_file_says_all_that_the_search_chose_and_training_refuses_the_rest_in_words(tmp_path: Path) -> None:
    asked = problem(
        "gpt:layers=30,hidden=4096,heads=32,seq=2048,vocab=51200", 64, 256, precision="fp8", hardware="h100"
    )
    case = next(
        item
        for item in cases(asked)
        if item.schedule == "interleaved1f1b" and item.zero_stage == 1 and len(set(item.layers_per_stage)) > 1
    )
    chosen, path = Candidate(case, estimate(case)), tmp_path / "plan.toml"
    write_plan(as_plan(chosen, ("because",)), path)
    plan = Plan.read(path)
    assert plan == as_plan(chosen, ("because",))
    said = (plan.virtual_stages, plan.zero_stage, plan.stage_layers, plan.precision, plan.recompute, plan.micro_batch)
    assert said == (
        case.virtual_stages, 1, case.layers_per_stage, "fp8", case.recompute, case.micro_batch
    )  # fmt: skip
    assert f"virtual_stages={case.virtual_stages}" in str(plan) and "zero_stage=1" in str(plan)
    assert plan.for_batch(256).prediction is not None
    assert replace(plan, virtual_stages=None).for_batch(256).prediction is None  # it was made for another plan
    told = " / ".join(refusals(plan))
    assert "precision='fp8': shardwise trains in fp32 or bf16" in told
    assert "zero_stage=1: shardwise's shard axis splits gradients too; write zero_stage=2" in told
    with pytest.raises(PlanError, match="fp8"):
        check_plan(plan)
    runs = replace(plan, precision="bf16", zero_stage=None)
    check_plan(runs)  # the rest can be executed
    assert "stage_layers: give one number for each" in " ".join(refusals(replace(runs, stage_layers=(30,))))
    assert "only interleaved1f1b" in " ".join(refusals(replace(runs, schedule="1f1b")))


def test_the_ends_of_a_pipeline_get_fewer_layers_where_that_is_faster() -> None:
    asked = problem("gpt:layers=32,hidden=2048,heads=16,seq=2048,vocab=256000", 8, 64)
    wide = next(c for c in cases(asked) if c.pipeline == 8 and c.schedule == "1f1b" and c.micro_batch == 1)
    assert wide.head_in_layers > 4  # the output projection alone is more than an even stage
    case, found = best_cuts(wide)
    assert sum(case.layers_per_stage) == 32 and case.layers_per_stage[-1] == 0
    assert max(case.layers_per_stage) - min(case.layers_per_stage[1:-1]) <= 1
    everything = [
        replace(wide, stage_layers=(first, *middle, 32 - first - sum(middle)))
        for first in range(1, 7)
        for least in range(2, 6)
        for more in range(7)
        if 32 - first - sum(middle := (least + 1,) * more + (least,) * (6 - more)) >= 0
    ]
    assert found.step_seconds <= 1.002 * min(estimate(item).step_seconds for item in everything)
    assert found.step_seconds < estimate(replace(wide, stage_layers=(4,) * 8)).step_seconds
    flat = problem("gpt:layers=32,hidden=8192,heads=64,seq=2048,vocab=51200", 8, 64)
    even = next(c for c in cases(flat) if c.pipeline == 4 and c.schedule == "1f1b" and c.micro_batch == 1)
    assert best_cuts(even)[0].layers_per_stage == (8,) * 4
    with pytest.raises(PlanError, match="8 numbers that sum to 32"):
        replace(wide, stage_layers=(4,) * 7)


def test_schedules_are_those_that_software_offers() -> None:
    dense = list(cases(problem("gpt:layers=32,hidden=4096,heads=32,seq=2048,vocab=51200", 16, 256)))
    assert {case.schedule for case in dense} == {"1f1b", "interleaved1f1b", "zbv"}
    for case in dense:
        if case.schedule == "zbv":
            assert case.recompute == "none" and case.micro_batches >= 2 * case.pipeline
            assert case.virtual_stages == 2 and 2 * case.pipeline <= 32
    assert {case.zero_stage for case in dense if case.pipeline == 1 and case.data > 1} == {0, 1, 2, 3}
    old = problem("gpt:layers=32,hidden=4096,heads=32,seq=2048,vocab=51200", 16, 256, "v100-32gb-sxm", precision="fp16")
    assert {case.schedule for case in cases(replace(old, attention="math"))} == {"1f1b", "interleaved1f1b"}
    mixture = list(cases(problem(SMALL + ",experts=8,experts_per_token=2", 16, 256)))
    assert {case.schedule for case in mixture if case.expert > 1} == {"1f1b", "interleaved1f1b", "dualpipev"}


def test_experts_over_nodes_are_hidden_by_dualpipe_as_published() -> None:
    """DeepSeek-V3 (arXiv:2412.19437, section 3.2): 2,048 H800, 16 stages of DualPipe, ZeRO-1, no tensor ranks."""
    text = "llama:layers=61,hidden=7168,heads=128,ffn=2048,vocab=129280,experts=256,experts_per_token=8,seq=4096"
    best = search(problem(text, 2048, 15360, "h800-sxm")).best
    assert best is not None
    case = best.case
    assert (case.schedule, case.pipeline, case.zero_stage, case.tensor) == ("dualpipev", 16, 1, 1)
    assert case.expert >= 8
    plan = as_plan(best)
    assert plan.schedule == "dualpipev" and plan.virtual_stages is None and sum(plan.stage_layers) == 61


def test_the_range_goes_by_the_kind_of_run() -> None:
    kinds = {
        name: published_kind(next(cases(problem(text, workers, 64, hardware))))
        for name, text, workers, hardware in (
            ("one", SMALL, 8, "a100-80gb-sxm"),
            ("two", SMALL, 16, "h100-sxm"),
            ("mixture", SMALL + ",experts=8,experts_per_token=2", 8, "b200"),
            ("old", SMALL, 8, "v100-32gb-sxm"),
        )
    }
    assert kinds == {"one": "one node", "two": "several nodes", "mixture": "experts", "old": "other parts"}
    assert all(low < 1.0 < high for low, high in PUBLISHED.values())


def test_families_have_names() -> None:
    names = {family(case) for case in cases(problem(SMALL, 8, 64))}
    assert {"data", "shard", "tensor", "pipeline", "data+tensor+pipeline"} <= names


def run(*words: str) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(plan_command, list(words))
    return result.exit_code, result.stdout, result.exception


def test_command_line() -> None:
    words = ("--model", SMALL, "--machine", "h100", "--nodes", "2", "--batch", "64")
    code, text, _ = run(*words, "--json", "--top", "3", "--why-not", "tensor=8")
    document = json.loads(text)
    assert code == 0 and document["workers"] == 16 and len(document["plans"]) == 3
    best = document["plans"][0]
    assert best["fits"] is True and best["layout"].keys() == Layout().degrees.keys()
    assert sum(best["breakdown"]["seconds"].values()) == pytest.approx(best["step_seconds"])
    low, high = PUBLISHED["several nodes"]
    assert best["step_seconds_range"] == pytest.approx([low * best["step_seconds"], high * best["step_seconds"]])
    assert best["range_of"] == "4 of 5 published runs, several nodes"
    assert {"layout", "family", "reason"} == document["rejected"][0].keys()
    assert document["why_not"]["layout"] == "tensor=8"
    code, text, _ = run(*words)
    assert code == 0 and text.splitlines()[1].startswith("1. ")
    assert f"4 of 5 published runs on several nodes took {low:g} to {high:g} times their prediction" in text


def test_command_line_says_no_and_refuses_nonsense() -> None:
    code, text, _ = run("--model", SMALL, "--machine", "a100", "--gpus-per-node", "1", "--memory", "8GiB", "--json")
    assert code == 1 and json.loads(text)["plans"] == [] and "nothing fits" in json.loads(text)["why"]
    for words, message in (
        (("--model", "bert:layers=2", "--machine", "a100"), "family must be gpt or llama"),
        (("--model", SMALL, "--machine", "abacus"), "abacus"),
        (("--model", SMALL, "--machine", "a100", "--memory", "much"), "'much' is not a size"),
        (("--model", SMALL, "--machine", "a100", "--memory", "80"), "--memory 80 is 80 B: give"),
        (("--model", SMALL, "--machine", "a100", "-o", "plan.json"), "plan files end in .toml"),
        (("--model", "gpt:layers=1000000000,hidden=2048", "--machine", "a100"), "at most 100,000"),
        (("--model", "gpt:layers=24,hidden=2048,heads=7", "--machine", "a100"), "heads=7 must divide hidden=2048"),
        (("--model", "llama:layers=2,hidden=4096,heads=32,kv_heads=7", "--machine", "a100"), "kv_heads=7 must divide"),
        (("--model", "gpt:layers=2,hidden=256,seq=0", "--machine", "a100"), "seq=0"),
    ):
        _, _, error = run(*words)
        assert isinstance(error, UserError) and message in str(error)


def test_machine_files_may_leave_rates_out_and_say_so_where_one_is_needed(tmp_path: Path) -> None:
    whole = catalogue.machine("h100")

    def written(*names: str) -> str:
        device = replace(
            whole.accelerator,
            peak_flops={name: whole.accelerator.peak_flops[name] for name in names},
            matmul_fraction={name: whole.accelerator.matmul_fraction[name] for name in names},
        )
        path = tmp_path / f"{'-'.join(names)}.toml"
        replace(whole, accelerator=device).write(path)
        return str(path)

    words = ("--model", SMALL, "--batch", "64", "--json", "--machine")
    code, text, error = run(*words, written("bf16", "fp32"))
    assert code == 0, error
    steps = [json.loads(each)["plans"][0]["step_seconds"] for each in (text, run(*words, "h100")[1])]
    assert steps[0] == pytest.approx(steps[1])
    for file, more, message in (
        (written("bf16"), ("--precision", "fp32"), "states no peak_flops and matmul_fraction for fp32; it has bf16"),
        (written("fp16"), ("--precision", "fp8"), "matmul_fraction for bf16; it has fp16"),
        (written("fp32"), (), "--model needs peak_flops and matmul_fraction for bf16 or fp16"),
    ):
        _, _, error = run(*words, file, *more)
        assert isinstance(error, UserError) and message in str(error)


def test_a_file_of_cpus_is_refused_for_described_models(tmp_path: Path) -> None:
    found = catalogue.machine("a100")
    cores = Measured(
        date="2026-11-26",
        place={"processor": "test"},
        cores=2,
        memory_bytes=1e9,
        call_seconds=1e-6,
        graph_seconds=1e-6,
        overlap_slowdown=1.0,
        startup_seconds=1.0,
        worker_bytes=1e8,
    )
    path = tmp_path / "here.toml"
    replace(found, name="here", measured=cores).write(path)
    _, _, error = run("--model", SMALL, "--machine", str(path))
    assert isinstance(error, UserError) and "here was measured by `shardwise probe` and has CPUs" in str(error)


def test_parts_without_bf16_units_are_planned_in_fp16() -> None:
    words = ("--model", "gpt:layers=12,hidden=768", "--machine", "v100", "--json")
    old = json.loads(run(*words)[1])["plans"][0]
    asked = json.loads(run(*words, "--precision", "bf16")[1])["plans"][0]
    assert old["settings"]["precision"] == "fp16" and asked["settings"]["precision"] == "bf16"
    assert old["step_seconds"] < asked["step_seconds"]
