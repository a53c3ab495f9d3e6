"""Machine, catalogue and model facts: round trips, published sizes, messages."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from shardwise.errors import UserError
from shardwise.planner import catalogue
from shardwise.planner.constants import BOUNDS, DEFAULT, Constants, check_bounds
from shardwise.spec.facts import BlockFacts, ModelFacts, Transformer
from shardwise.spec.machine import CollectiveRate, Figure, Machine


def test_a_machine_file_reads_back(tmp_path: Path) -> None:
    rate = CollectiveRate(
        collective="all_reduce",
        nodes=4,
        message_bytes=2.0**28,
        bus_bytes_per_second=Figure(1e11, "measured", "here, 2026"),
    )
    for name in ("h100-80gb-sxm", "v100-32gb-sxm", "tpu-v5p"):
        machine = replace(
            catalogue.machine(name, gpus_per_node=4, gbits_per_gpu=25),
            rates=(rate,),
            pending_send_seconds=Figure(1e-4, "measured", "here, 2026"),
        )
        machine.write(tmp_path / "machine.toml")
        assert Machine.read(tmp_path / "machine.toml") == machine
    assert "4 x tpu-v5p per node" in str(machine)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'x'", "'accelerator' is missing"),
        ("not toml at all", "is not TOML"),
        ("name = 'x'\ngpus_per_node = 8\naccelerator = 3", "machine: "),
    ],
)
def test_a_malformed_machine_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        Machine.read(path)


def test_a_missing_machine_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml does not exist"):
        Machine.read(tmp_path / "nowhere.toml")


def test_every_catalogue_figure_has_a_source() -> None:
    for name in catalogue.NAMES:
        machine = catalogue.machine(name)
        device = machine.accelerator
        figures = [
            device.memory_bytes,
            device.memory_bytes_per_second,
            device.attention_fraction,
            *device.peak_flops.values(),
            *device.matmul_fraction.values(),
            machine.intra.bytes_per_second,
            machine.inter.bytes_per_second,
        ]
        assert all(figure.source and figure.value > 0 for figure in figures), name
        assert device.peak_flops["fp16"].value >= device.peak_flops["fp32"].value
        assert all(0.4 < figure.value <= 1 for figure in device.matmul_fraction.values()), name


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("a100-80gb-sxm", "a100-80gb-sxm"),
        ("A100", "a100-80gb-sxm"),
        ("NVIDIA H100", "h100-80gb-sxm"),
        ("a100-64gb-sxm", "a100-64gb-sxm"),
        ("h100-64gb", "h100-64gb-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("GB200 NVL72", "gb200-186gb-nvl72"),
        ("TPU v5p", "tpu-v5p"),
        ("tpu7x (Ironwood)", "tpu-7x"),
        ("trn1.32xlarge", "trainium1-32gb"),
        ("AWS Trainium2", "trainium2-96gb"),
        ("Gaudi 2", "gaudi2"),
        ("a3-ultragpu-8g", "h200-141gb-sxm"),
        ("a3-highgpu-8g", "h100-80gb-sxm"),
        ("NVIDIA GeForce RTX 5090", "rtx5090-32gb"),
        ("h100-80gb-nvlink", "h100-80gb-sxm"),
        ("mi300x", "mi300x-192gb"),
        ("tpu-v4-pod", "tpu-v4"),
        ("NVIDIA DGX H100 (8x)", "h100-80gb-sxm"),
        ("Tesla V100-SXM2-16GB", "v100-16gb-sxm"),
        ("A100 80GB PCIe", "a100-80gb-pcie"),
        ("p4d.24xlarge", "a100-40gb-sxm"),
        ("H100 NVL", "h100-94gb-nvl"),
        ("tpuv5e", "tpu-v5e"),
        ("MI250X GCD", "mi250x-64gb"),
        ("RTX 4090", "rtx4090-24gb"),
        ("", None),
        ("abacus", None),
    ],
)
def test_names_find_the_nearest_part(given: str, found: str | None) -> None:
    assert catalogue.canonical_name(given) == found


def test_memory_in_the_name_counts() -> None:
    assert catalogue.accelerator("h200-120gb-sxm").memory_bytes.value == pytest.approx(118.2 * 2**30)
    with pytest.raises(UserError, match="abacus"):
        catalogue.accelerator("abacus")


@pytest.mark.parametrize(
    ("text", "billions"),
    [
        ("gpt:layers=96,hidden=12288,heads=96,seq=2048,vocab=51200", 174.6),  # Narayanan et al. 2021, table 2
        ("gpt:layers=128,hidden=25600,heads=160,vocab=51200", 1008.0),  # the same, table 1
        ("llama:layers=32,hidden=4096,heads=32,kv_heads=8,ffn=14336,vocab=128256", 8.03),  # Llama 3 8B model card
        ("llama:layers=80,hidden=8192,heads=64,kv_heads=8,ffn=28672,vocab=128256", 70.6),  # Llama 3 70B
        ("llama:layers=32,hidden=4096,heads=32,kv_heads=8,ffn=14336,experts=8,experts_per_token=2", 46.7),  # Mixtral
    ],
)
def test_parameter_counts_of_published_models(text: str, billions: float) -> None:
    model, _ = Transformer.parse(text)
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.002)


def test_flops_of_a_gpt() -> None:
    # Narayanan et al. 2021, equation 3, forward part: 24 B s l h^2 (1 + s / (6 h) + V / (16 l h)), with causal attention half
    model, seq = Transformer.parse("gpt:layers=24,hidden=2048,seq=1024,vocab=51200")
    layers, h, s, vocab = 24, 2048, 1024, 51200
    full = 24 * s * layers * h * h * (1 + s / (6 * h) + vocab / (12 * layers * h))
    causal = full - 24 * s * layers * h * h * s / (12 * h)
    assert model.forward_flops(seq) == pytest.approx(causal)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bert:layers=2,hidden=8", "family must be gpt or llama"),
        ("gpt", "family must be gpt or llama"),
        ("gpt:layers=2", "hidden is missing"),
        ("gpt:layers=2,hidden=8,color=3", "'color=3' is unknown"),
        ("gpt:layers=2,hidden=8,layers=3", "given twice"),
        ("gpt:layers=two,hidden=8", "'two' for layers is no whole number"),
        ("gpt:layers=0,hidden=8", "layers=0"),
        ("gpt:layers=2,hidden=8,experts=4,experts_per_token=5", "experts_per_token=5"),
    ],
)
def test_a_malformed_model_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Transformer.parse(text)


def test_model_facts_read_back() -> None:
    block = BlockFacts(
        name="layers.0",
        parameters=10,
        forward_flops=2.0,
        backward_flops=4.0,
        forward_bytes=8.0,
        saved_bytes=3.0,
        output_bytes=1.0,
    )
    facts = ModelFacts(name="tiny", blocks=(block, replace(block, name="head", repeats=2)), tied_groups=(("a", "b"),))
    assert ModelFacts.from_dict(facts.to_dict()) == facts
    assert facts.parameters == 30
    with pytest.raises(UserError, match="blocks"):
        ModelFacts.from_dict({"name": "x"})


def test_constants_are_bounded() -> None:
    assert {item.name for item in fields(Constants)} == set(BOUNDS)
    check_bounds(DEFAULT)
    with pytest.raises(ValueError, match="matmul_rate"):
        check_bounds(replace(DEFAULT, matmul_rate=1.5))


def test_the_planner_starts_without_torch_or_numpy() -> None:
    script = (
        "import sys; import shardwise.planner.predict, shardwise.planner.runs; "
        "print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
