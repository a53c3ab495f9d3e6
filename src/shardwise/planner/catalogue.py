"""Nominal machines by name. Rates are dense (without sparsity) and per direction; every row names its datasheet."""

import re
from dataclasses import dataclass

from shardwise.errors import UserError
from shardwise.spec.machine import Accelerator, Figure, Link, Machine, Origin

GIB = 1024**3
MATMUL_SOURCE = "best shape of a search, Stas Bekman, ML Engineering, accelerator benchmarks, read 2026"
MATMUL_GUESS = "mean of the measured parts of the same vendor (where none is, of NVIDIA's); no measurement of this part"
MATMUL_GUESSES = {"mi": 0.60}
"""That mean by the start of a name: of MI300X, MI325X and MI355X; of NVIDIA's parts it is 0.80."""
MATMUL_TPU = "assumed from published training runs (MaxText); no search over shapes is published"
ATTENTION_SOURCE = "FlashAttention-2 (arXiv:2307.08691) figure 4 and 7, forward and backward, causal, head width 128"
AITER_SOURCE = (
    "ROCm/aiter, op_tests/cpp/mha/README.md (2026): causal, head width 128, 4,096 and 8,192 tokens, sums of gradients in fp32,"
    " 3.5 / (1 / forward + 2.5 / backward), extended to endless sequences: 485 TFLOP/s on MI300X, 915 on MI355X"
)
ATTENTION_GUESS = "assumed from kernels of the same generation (FlashAttention-3, arXiv:2407.08608, from 2024 on)"
USABLE_SOURCE = "memory reported by the driver: datasheet capacity less what the driver keeps"


@dataclass(frozen=True)
class _Part:
    """Datasheet figures: TFLOP/s, GB/s, GiB; `node` is the usual number per node, `gbits` its share of the usual network."""

    fp16: float
    bf16: float
    fp8: float | None
    fp32: float
    memory_gib: float
    memory_gbytes: float
    link_gbytes: float
    gbits: float
    node: int
    units: int
    watts: float
    matmul: float | None
    attention: float
    source: str
    matmul_fp8: float | None = None
    fp4: float | None = None


_V100 = "NVIDIA V100 datasheet (2020); network: DGX-1 datasheet, four 100 Gbit/s ports for 8 parts"
_A100 = "NVIDIA A100 datasheet, nvidia-a100-datasheet-us-nvidia-1758950-r4 (2021)"
_H100 = "NVIDIA H100 datasheet, half of the figures with sparsity (2023)"
_H200 = "NVIDIA H200 datasheet: H100 with 141 GB at 4.8 TB/s (2023)"
_B200 = "NVIDIA DGX B200 datasheet: 1,440 GB, 64 TB/s, 72 PFLOP/s sparse fp8, 14.4 TB/s NVLink for 8 parts (2024)"
_B300 = "NVIDIA DGX B300 datasheet (2025): as B200, fp4 105 PFLOP/s dense for 8 parts"
_MI300 = "AMD Instinct MI300X data sheet: 7 links of 128 GB/s in both directions (2023)"
_MI325 = "AMD Instinct MI325X data sheet (2024)"
_ADA = "NVIDIA L40S / L4 / RTX datasheets (2023)"
_TPU = "cloud.google.com/tpu/docs, read 2026; links: half of the bidirectional ICI bandwidth, all ports together"
_TPU7 = "docs.cloud.google.com/tpu/docs/tpu7x, read 2026; links: half of the bidirectional 1,200 GB/s"
_TRAINIUM = (
    "awsdocs-neuron.readthedocs-hosted.com, Trainium architecture, read 2026; links: half of the 1.28 TB/s (2) and 2.56 TB/s (3)"
    " of NeuronLink; the links of the first and all watts typed from memory"
)
_TPU4 = "cloud.google.com/tpu/docs/v4, read 2026; links: 1.1 PB/s all-reduce bandwidth of a pod of 4,096"
_LEONARDO = (
    "TOP500 system 180128: 1,824,768 cores and 306.31 PFLOP/s are 124 units and 21.5 TFLOP/s (fp64) a part beside 32 CPU"
    " cores a node, 1.10 times the usual part; memory: Turisini et al. (arXiv:2307.16885), 64 GB at 1.6 TB/s"
)
_MARENOSTRUM = (
    "TOP500 system 180238: 260 PFLOP/s on 4,480 parts and 89,600 CPU cores are 56.6 TFLOP/s (fp64) a part, 0.845 times the usual"
    " one; memory: four of the six stacks of the 96 GB part with HBM2e"
)
_P100 = "NVIDIA Tesla P100 announcement: 80 GB/s of NVLink in a direction, 56 units (hothardware.com, teckknow.com, read 2026)"
_GA102 = "NVIDIA A40 data sheet, reprinted at ecer.com; RTX A6000: llmperf.net and sysrqmts.com, read 2026"
_GB202 = (
    "NVIDIA GeForce RTX 5090 (spheron.network, read 2026): a quarter of 838 TFLOP/s, which are sparse and sum in fp16"
)
_B100 = "NVIDIA B100 beside B200, full specifications (hmc-tech.com, read 2026); memory as B200"
_MI210 = "AMD Instinct MI210 (AnandTech 17326, read 2026)"
_MI300A = (
    "AMD Instinct MI300A: 228 of the 304 units of MI300X, 128 GB at 5.3 TB/s (emergentmind.com, read 2026); watts and links typed"
    " from memory"
)
_ASCEND = "Huawei Ascend 910B: 320 TFLOP/s and 64 GB (boardor.com, read 2026); memory rate and links typed from memory"
_SIDE = "vendor's data sheet, typed from memory, not looked up again"

_PARTS: dict[str, _Part] = {
    # name: fp16, bf16, fp8, fp32, GiB, HBM GB/s, link GB/s, net Gbit/s, per node, units, W, matmul, attention, source
    # h100-96gb-sxm: the measured 0.8033 and 0.7087 of the 700 W part times (500 W / 700 W)^(1/3), power grows as clock cubed;
    # gb300: the measured 0.7288 and 0.7231 of GB200 at 1,200 W times (1,400 W / 1,200 W)^(1/3)
    "v100-16gb-sxm": _Part(125, 15.7, None, 15.7, 15.8, 900, 150, 50, 8, 80, 300, None, 0.45, _V100),
    "v100-32gb-sxm": _Part(125, 15.7, None, 15.7, 31.7, 900, 150, 50, 8, 80, 300, None, 0.45, _V100),
    "v100-32gb-pcie": _Part(112, 14, None, 14, 31.7, 900, 12, 12.5, 8, 80, 250, None, 0.45, _V100),
    "t4-16gb": _Part(65, 8.1, None, 8.1, 14.7, 300, 12, 12.5, 4, 40, 70, None, 0.4, "NVIDIA T4 datasheet (2019)"),
    "a100-40gb-sxm": _Part(312, 312, None, 156, 39.4, 1555, 300, 200, 8, 108, 400, 0.8692, 0.58, _A100),
    "a100-80gb-sxm": _Part(312, 312, None, 156, 79.2, 2039, 300, 200, 8, 108, 400, 0.8692, 0.58, _A100),
    "a100-64gb-sxm": _Part(344, 344, None, 172, 63.3, 1600, 300, 100, 4, 124, 400, 0.8692, 0.58, _LEONARDO),
    "a100-40gb-pcie": _Part(312, 312, None, 156, 39.4, 1555, 25, 100, 8, 108, 250, 0.8106, 0.52, _A100),
    "a100-80gb-pcie": _Part(312, 312, None, 156, 79.2, 1935, 25, 100, 8, 108, 300, 0.8106, 0.52, _A100),
    "a800-80gb-sxm": _Part(312, 312, None, 156, 79.2, 2039, 200, 100, 8, 108, 400, 0.8692, 0.58, _A100),
    "p100-16gb": _Part(21.2, 10.6, None, 10.6, 15.9, 720, 80, 25, 8, 56, 300, None, 0.4, _P100),
    "a40-48gb": _Part(150, 150, None, 75, 44.5, 696, 25, 25, 8, 84, 300, None, 0.5, _GA102),
    "a6000-48gb": _Part(155, 155, None, 77, 47.5, 768, 25, 25, 8, 84, 300, None, 0.5, _GA102),
    "a10g-24gb": _Part(70, 70, None, 35, 22.2, 600, 12, 25, 8, 80, 300, None, 0.5, "NVIDIA A10 datasheet (2021)"),
    "l4-24gb": _Part(121, 121, 242, 60, 22.2, 300, 12, 25, 8, 58, 72, None, 0.4, _ADA),
    "l40s-48gb": _Part(362, 362, 733, 183, 44.5, 864, 25, 100, 8, 142, 350, None, 0.4, _ADA),
    "rtx3090-24gb": _Part(71, 71, None, 35.6, 23.7, 936, 12, 12.5, 8, 82, 350, None, 0.6, _ADA),
    "rtx4090-24gb": _Part(165, 165, 330, 82.6, 23.6, 1008, 12, 12.5, 8, 128, 450, None, 0.6, _ADA),
    "rtx5090-32gb": _Part(209, 209, 419, 105, 31.3, 1792, 25, 12.5, 8, 170, 575, None, 0.6, _GB202),
    "a30-24gb": _Part(165, 165, None, 82, 23.6, 933, 25, 25, 8, 56, 165, None, 0.5, _SIDE),
    "h100-80gb-sxm": _Part(989, 989, 1979, 494, 79.2, 3350, 450, 400, 8, 132, 700, 0.8033, 0.33, _H100, 0.7087),
    "h100-96gb-sxm": _Part(989, 989, 1979, 494, 95.0, 2400, 450, 400, 8, 132, 500, 0.718, 0.33, _H100, 0.634),
    "h100-64gb-sxm": _Part(836, 836, 1672, 418, 63.3, 1600, 450, 200, 4, 132, 700, None, 0.33, _MARENOSTRUM),
    "h100-80gb-pcie": _Part(756, 756, 1513, 378, 79.2, 2000, 50, 200, 8, 114, 350, 0.75, 0.33, _H100),
    "h100-94gb-nvl": _Part(835, 835, 1671, 418, 93.1, 3900, 50, 200, 8, 132, 400, 0.75, 0.33, _H100),
    "h800-80gb-sxm": _Part(989, 989, 1979, 494, 79.2, 3350, 200, 400, 8, 132, 700, 0.8033, 0.33, _H100, 0.7087),
    "h20-96gb-sxm": _Part(
        148, 148, 296, 74, 95.0, 4000, 450, 400, 8, 78, 500, 0.9, 0.6, "NVIDIA H20 specifications (2024)"
    ),
    "h200-141gb-sxm": _Part(989, 989, 1979, 494, 139.8, 4800, 450, 400, 8, 132, 700, 0.8033, 0.45, _H200, 0.7344),
    "gh200": _Part(
        989, 989, 1979, 494, 94.5, 4000, 450, 400, 4, 132, 900, 0.8378, 0.42, "NVIDIA GH200 datasheet (2023)", 0.7756
    ),
    "b200-180gb-sxm": _Part(
        2250, 2250, 4500, 1125, 178.3, 8000, 900, 400, 8, 148, 1000, 0.7756, 0.42, _B200, 0.7628, 9000
    ),
    "b300-sxm": _Part(2250, 2250, 4500, 1125, 268.0, 8000, 900, 800, 8, 148, 1100, 0.7862, 0.42, _B300, 0.7452, 13125),
    "b100-192gb-sxm": _Part(
        1750, 1750, 3500, 875, 178.3, 8000, 900, 400, 8, 148, 700, 0.7756, 0.42, _B100, 0.7628, 7000
    ),
    "gb200-186gb-nvl72": _Part(
        2500,
        2500,
        5000,
        1250,
        184.0,
        8000,
        900,
        400,
        72,
        148,
        1200,
        0.7288,
        0.42,
        "NVIDIA GB200 NVL72 datasheet (2024)",
        0.7231,
        10000,
    ),
    "gb300-288gb-nvl72": _Part(
        2500,
        2500,
        5000,
        1250,
        276.0,
        8000,
        900,
        800,
        72,
        148,
        1400,
        0.7672,
        0.42,
        "NVIDIA GB300 NVL72 datasheet (2025)",
        0.7612,
        15000,
    ),
    "mi250x-64gb": _Part(
        191.5, 191.5, None, 47.9, 64.0, 1638, 100, 100, 8, 110, 280, None, 0.3, "AMD Instinct MI250X data sheet (2021)"
    ),
    "mi210-64gb": _Part(181, 181, None, 45.3, 64.0, 1638, 100, 100, 8, 104, 300, None, 0.3, _MI210),
    "mi300a-128gb": _Part(980, 980, 1961, 123, 127.5, 5300, 384, 200, 4, 228, 550, 0.5142, 0.37, _MI300A),
    "ascend910b-64gb": _Part(320, 320, None, 80, 61.0, 1600, 196, 200, 8, 24, 400, None, 0.45, _ASCEND),
    "mi300x-192gb": _Part(1307, 1307, 2615, 163, 191.5, 5300, 448, 400, 8, 304, 750, 0.5142, 0.37, _MI300),
    "mi325x-256gb": _Part(1307, 1307, 2615, 163, 255.5, 6000, 448, 400, 8, 304, 1000, 0.6038, 0.37, _MI325),
    "mi355x-288gb": _Part(
        2300,
        2300,
        4600,
        157,
        287.5,
        8000,
        537,
        400,
        8,
        256,
        1400,
        0.6804,
        0.4,
        "AMD Instinct MI355X data sheet (2025)",
    ),
    "gaudi2": _Part(
        432, 432, 865, 54, 94.6, 2450, 262, 300, 8, 24, 600, 0.9692, 0.35, "Intel Gaudi 2 white paper (2022)", 0.9555
    ),
    "gaudi3": _Part(
        1677,
        1677,
        1677,
        229,
        126.0,
        3700,
        525,
        300,
        8,
        64,
        900,
        0.7412,
        0.25,
        "Intel Gaudi 3 white paper (2024)",
        0.7689,
    ),
    "tpu-v3": _Part(61.5, 61.5, None, 15, 16.0, 450, 80, 100, 256, 1, 225, 0.91, 0.8, _TPU),
    "tpu-v4": _Part(275, 275, None, 69, 31.8, 1200, 268, 50, 4096, 4, 192, 0.91, 0.8, _TPU4),
    "tpu-v5e": _Part(197, 197, None, 49, 15.8, 819, 200, 25, 256, 4, 225, 0.91, 0.8, _TPU),
    "tpu-v5p": _Part(459, 459, 459, 115, 95.0, 2765, 600, 50, 8960, 8, 450, 0.91, 0.8, _TPU),
    "tpu-v6e": _Part(918, 918, 918, 230, 31.2, 1638, 400, 50, 256, 2, 300, 0.86, 0.8, _TPU, 0.86),
    "tpu-7x": _Part(2307, 2307, 4614, 577, 191.0, 7380, 600, 50, 9216, 4, 1000, 0.86, 0.8, _TPU7),
    "trainium1-32gb": _Part(190, 190, 190, 47.5, 31.5, 880, 384, 50, 16, 2, 220, None, 0.5, _TRAINIUM),
    "trainium2-96gb": _Part(667, 667, 1299, 181, 95.0, 2900, 640, 200, 16, 8, 500, None, 0.5, _TRAINIUM),
    "trainium3-144gb": _Part(671, 671, 2517, 183, 142.0, 4900, 1280, 400, 64, 8, 800, None, 0.5, _TRAINIUM),
}

_ALIASES = {
    "v100": "v100-32gb-sxm",
    "v100-sxm": "v100-32gb-sxm",
    "a100": "a100-80gb-sxm",
    "a100-sxm": "a100-80gb-sxm",
    "a100-40gb": "a100-40gb-sxm",
    "a100-80gb": "a100-80gb-sxm",
    "a800": "a800-80gb-sxm",
    "h100": "h100-80gb-sxm",
    "h100-80gb": "h100-80gb-sxm",
    "h100-sxm": "h100-80gb-sxm",
    "h100-96gb": "h100-96gb-sxm",
    "h800": "h800-80gb-sxm",
    "h200": "h200-141gb-sxm",
    "b200": "b200-180gb-sxm",
    "gb200": "gb200-186gb-nvl72",
    "gb300": "gb300-288gb-nvl72",
    "b300": "b300-sxm",
    "mi250x": "mi250x-64gb",
    "mi250": "mi250x-64gb",
    "mi300x": "mi300x-192gb",
    "mi325x": "mi325x-256gb",
    "mi355x": "mi355x-288gb",
}

_PATTERNS = (
    (r"p3dn|v100.*32|32.*v100", "v100-32gb-sxm"),
    (r"dgx-?2\b", "v100-32gb-sxm"),
    (r"\bp3\b|v100.*16|16.*v100|summit|dgx-?1\b", "v100-16gb-sxm"),
    (r"p4de|selene|a100.*80|80.*a100", "a100-80gb-sxm"),
    (r"p4d|perlmutter|a100.*40|40.*a100", "a100-40gb-sxm"),
    (r"a2-ultra", "a100-80gb-sxm"),
    (r"a2-(high|mega)", "a100-40gb-sxm"),
    (r"a4x-?max", "gb300-288gb-nvl72"),
    (r"\ba4x\b|p6e", "gb200-186gb-nvl72"),
    (r"\ba4-high|p6-b200", "b200-180gb-sxm"),
    (r"p5en|h200|a3-?ultra", "h200-141gb-sxm"),
    (r"a3-?(high|mega|edge)", "h100-80gb-sxm"),
    (r"\bp5|eos\b", "h100-80gb-sxm"),
    (r"frontier|lumi|mi250", "mi250x-64gb"),
    (r"rtx-?a6000", "a6000-48gb"),
    (r"6000-?ada", "l40s-48gb"),
    (r"5090", "rtx5090-32gb"),
    (r"4090", "rtx4090-24gb"),
    (r"3090", "rtx3090-24gb"),
    (r"\ba10\b", "a10g-24gb"),
    (r"gaudi-?2|hl-?225", "gaudi2"),
    (r"910b|ascend", "ascend910b-64gb"),
    (r"tpu-?v?7x?|ironwood", "tpu-7x"),
    (r"tpu-?v?(\d[ep]?)(?!\d)", "tpu-v{}"),
    (r"\bv(3|4|5e|5p|6e)\b", "tpu-v{}"),
    (r"v5-?lite", "tpu-v5e"),
    (r"trillium", "tpu-v6e"),
    (r"trn3|trainium-?3", "trainium3-144gb"),
    (r"trn2|trainium-?2", "trainium2-96gb"),
    (r"trn1|trainium", "trainium1-32gb"),
    (r"nvl-?72", "gb200-186gb-nvl72"),
)
"""Names of clusters, instances and forms in the wild, tried in order -> the part they are made of."""

NAMES = tuple(_PARTS)


def canonical_name(name: str) -> str | None:
    """The catalogue name meant by `name`, or None.

    Exact names and aliases first; then the same family (the part before the first dash) and the nearest memory size,
    so that `h100-64gb-sxm` or `a100-80gb-nvlink` find a relative; then known names of machines; then a family anywhere
    in the name, so that `NVIDIA DGX H100 (8x)` and `Tesla V100-SXM2` find theirs.
    """
    wanted = re.sub(r"[\s_/(),;+]+", "-", name.strip().lower()).strip("-")
    wanted = wanted.removeprefix("nvidia-").removeprefix("amd-").removeprefix("intel-").removeprefix("google-")
    if wanted in _PARTS:
        return wanted
    if wanted in _ALIASES:
        return _ALIASES[wanted]
    family = wanted.split("-")[0] if not wanted.startswith("tpu") else "-".join(wanted.split("-")[:2])
    if found := _relative(family, wanted):
        return found
    for pattern, known in _PATTERNS:
        match = re.search(pattern, wanted)
        meant = known.format(*match.groups()) if match else ""
        if meant in _PARTS:
            pcie = meant.replace("-sxm", "-pcie")
            return pcie if "pcie" in wanted and pcie in _PARTS else meant
    families = sorted({known.split("-")[0] for known in _PARTS}, key=len, reverse=True)
    inside = next((one for one in families if one != "tpu" and one in wanted), None)
    return _relative(inside, wanted) if inside else None


def _relative(family: str, wanted: str) -> str | None:
    """The member of `family` with the form and nearest to the memory size that `wanted` names."""
    relatives = [known for known in _PARTS if known == family or known.startswith(family + "-")]
    if not relatives:
        return None
    size = re.search(r"(\d+)-?g(?:i?b)?\b", wanted)
    words = {re.sub(r"(sxm)\d", r"\1", word) for word in wanted.split("-")}
    form = [known for known in relatives if known.split("-")[-1] in words] or relatives
    target = float(size.group(1)) if size else max(_PARTS[known].memory_gib for known in form)
    usual = _ALIASES.get(family)
    if size is None and usual in form:
        return usual
    return min(form, key=lambda known: abs(_PARTS[known].memory_gib - target))


def accelerator(name: str) -> Accelerator:
    """The accelerator of this catalogue name or alias; memory follows a size in the name, such as `a100-64gb-sxm`.

    Raises:
        UserError: the catalogue has no such device.
    """
    known = canonical_name(name)
    if known is None:
        raise UserError(f"hardware {name!r} is not in the catalogue; known are {', '.join(NAMES)}")
    part = _PARTS[known]
    size = re.search(r"(\d+)gb", name.lower())
    memory = part.memory_gib
    if size and abs(float(size.group(1)) - memory) > 0.1 * memory:
        memory = 0.985 * float(size.group(1))
    peaks = {"fp16": part.fp16, "bf16": part.bf16, "fp32": part.fp32, "fp8": part.fp8, "fp4": part.fp4}
    guess = next((mean for start, mean in MATMUL_GUESSES.items() if known.startswith(start)), 0.8)
    told: tuple[Origin, str] = ("measured", MATMUL_SOURCE)
    if known.startswith("tpu"):
        told = ("nominal", MATMUL_TPU)
    half = Figure(part.matmul, *told) if part.matmul else Figure(guess, "nominal", MATMUL_GUESS)
    eighth = Figure(part.matmul_fp8, *told) if part.matmul_fp8 else Figure(0.93 * half.value, "nominal", MATMUL_GUESS)
    sources = {("a100", "h100"): ATTENTION_SOURCE, ("mi300", "mi325", "mi355"): AITER_SOURCE}
    seen = next((told for names, told in sources.items() if known.startswith(names)), None)
    return Accelerator(
        name=known,
        memory_bytes=Figure(memory * GIB, "nominal", USABLE_SOURCE),
        memory_bytes_per_second=Figure(part.memory_gbytes * 1e9, "nominal", part.source),
        peak_flops={key: Figure(value * 1e12, "nominal", part.source) for key, value in peaks.items() if value},
        matmul_fraction={"fp32": half, "fp16": half, "bf16": half, "fp8": eighth, "fp4": eighth},
        attention_fraction=Figure(part.attention, "measured" if seen else "nominal", seen or ATTENTION_GUESS),
        multiprocessors=Figure(part.units, "nominal", part.source),
        power_watts=Figure(part.watts, "nominal", part.source),
    )


def machine(name: str, *, gpus_per_node: int | None = None, gbits_per_gpu: float | None = None) -> Machine:
    """A nominal machine built from a catalogue device.

    Args:
        name: catalogue name or alias.
        gpus_per_node: ranks that share the fast link; default is the usual node of this device.
        gbits_per_gpu: network of one rank in Gbit/s; default is the usual network of this device.

    Raises:
        UserError: the catalogue has no such device.
    """
    device = accelerator(name)
    part = _PARTS[device.name]
    network = gbits_per_gpu if gbits_per_gpu else part.gbits
    told = "given" if gbits_per_gpu else f"usual network of {device.name} nodes"
    return Machine(
        name=device.name,
        accelerator=device,
        gpus_per_node=gpus_per_node or part.node,
        intra=Link(
            bytes_per_second=Figure(part.link_gbytes * 1e9, "nominal", part.source),
            latency_seconds=Figure(
                4e-6, "measured", "nccl-tests all-reduce of 8 bytes on 2 to 8 A100, NetX-lab Echo logs (2025)"
            ),
        ),
        inter=Link(
            bytes_per_second=Figure(network * 1e9 / 8, "nominal", told),
            latency_seconds=Figure(
                2e-5, "measured", "nccl-tests all-reduce of 2 KiB on 16 to 128 A100, NetX-lab Echo logs (2025)"
            ),
        ),
    )
