"""Scores of the published tables: the machine of the H100 sweep, predictions, and those of constants fitted without a source."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from shardwise.planner import catalogue
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.predict import RunPrediction, predict_runs, write_csv
from shardwise.planner.runs import Row, read_runs
from shardwise.planner.step import UNCERTAIN
from shardwise.spec.machine import CollectiveRate, Figure, Machine

LEFT_OUT_FILE = Path(__file__).parent / "results" / "left_out.json"
"""Constants fitted without each source in turn, by `fit_planner.py --each`."""

LEFT_OUT_MEMORY_FILE = Path(__file__).parent / "results" / "left_out_memory.json"
"""Constants of memory fitted without each source in turn and their error on it, by `fit_memory.py`."""

MACHINE_FILE = Path(__file__).parent / "machines" / "huggingface-h100.toml"
SWEEP = "nanotron_h100_1b_3b"
BANDWIDTHS = "nanotron_collective_bandwidth_h100"
REPEATS = 0.16
"""Median difference between two runs of one configuration of the sweep, as the head of its table says."""

PENDING_SEND_SECONDS = 2.9e-4
"""Read off the sweep itself, not part of the bandwidth table; see docs/accuracy.md."""

SOURCES = (
    "vtrain_ground_truth_single_node",
    SWEEP,
    "llm_foundry_mpt",
    "internevo",
    "torchtitan_performance",
    "megatron_sc21_table1",
    "megatron_sc21_table2",
    "korthikanti2022",
)
Score = Mapping[str, Any]

KINDS: dict[str, Callable[[Row], bool]] = {
    "Hopper parts (fitted on Ampere)": lambda row: str(row["hardware"]).startswith("h"),
    "Ampere parts (fitted on Hopper)": lambda row: str(row["hardware"]).startswith("a"),
    "fp8": lambda row: row.get("precision") == "fp8",
    "more than 8,192 tokens a sequence": lambda row: int(row["seq_len"]) > 8192,
    "more than 128 GPUs": lambda row: int(row["gpus"]) > 128,
    "hidden width of 8,192 or more": lambda row: int(row["hidden"]) >= 8192,
}
"""Kinds of runs, left out of the fit in every source at once."""


def load_scorer(tables: Path) -> ModuleType:
    """The scorer that lies beside the tables."""
    spec = importlib.util.spec_from_file_location("score", tables / "score.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{tables / 'score.py'} cannot be loaded: give the folder with the tables and their scorer")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cluster_machine(tables: Path) -> Machine:
    """The machine of the sweep: nominal H100 nodes with the measured collective bandwidths of that cluster.

    The latency between nodes is the slope of the gather and scatter times over the number of ranks.
    """
    with (tables / f"{BANDWIDTHS}.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(line for line in handle if not line.startswith("#")))
    source = "Ultra-Scale Playbook, collective bandwidths, 256 MiB messages"
    rates = [
        CollectiveRate(
            collective=row["collective"],
            nodes=int(row["nodes"]),
            message_bytes=float(row["message_bytes"]),
            bus_bytes_per_second=Figure(float(row["bandwidth_gbytes_s"]) * 1e9, "measured", source),
        )
        for row in rows
    ]
    points = [
        (8 * rate.nodes - 1, rate.message_bytes / rate.bus_bytes_per_second.value)
        for rate in rates
        if rate.collective != "all_reduce" and rate.nodes > 1
    ]
    steps, seconds = [float(point[0]) for point in points], [point[1] for point in points]
    hop = statistics.linear_regression(steps, seconds).slope
    nominal = catalogue.machine("h100-80gb-sxm")
    told = f"slope of {source}, over the constant hop_share"
    latency = Figure(hop / DEFAULT.hop_share, "measured", told)
    return replace(
        nominal,
        name="huggingface-h100",
        inter=replace(nominal.inter, latency_seconds=latency),
        rates=tuple(rates),
    )


def with_pending_sends(machine: Machine) -> Machine:
    """The same with the delay of tensor collectives beside pending sends, read off the sweep itself."""
    told = "read off the step times of the sweep"
    return replace(machine, pending_send_seconds=Figure(PENDING_SEND_SECONDS, "measured", told))


def score_table(
    scorer: ModuleType, tables: Path, name: str, machine: Machine | None
) -> tuple[Score, list[RunPrediction]]:
    """Score of one table, and the predictions."""
    path = tables / f"{name}.csv"
    found = list(predict_runs(read_runs(path), machine))
    predicted = list(csv.DictReader(io.StringIO(write_csv(found))))
    return scorer.score(scorer.read(path), predicted, per_group=name == SWEEP), found


def outside_band(scorer: ModuleType, tables: Path, name: str, found: Sequence[RunPrediction]) -> dict[str, int]:
    """Answers to "does it fit" over rows that ran or ran out of memory, and measured peaks within the band."""
    sure = {item.run_id: item.estimate for item in found}
    counts = dict.fromkeys(("right", "wrong", "uncertain", "peaks", "inside"), 0)
    for row in scorer.read(tables / f"{name}.csv"):
        estimate = sure.get(row["run_id"])
        if estimate is None or row["status"] not in ("ok", "oom"):
            continue
        answer = "right" if estimate.fits == (row["status"] == "ok") else "wrong"
        counts[answer if estimate.certain else "uncertain"] += 1
        if row["memory_gib"] and row["status"] == "ok":
            peak = float(row["memory_gib"]) * 2**30
            counts["peaks"] += 1
            counts["inside"] += estimate.memory.least / UNCERTAIN <= peak <= estimate.memory.held * UNCERTAIN
    return counts


def left_out_score(scorer: ModuleType, tables: Path, name: str, machine: Machine | None) -> Score | None:
    """Score with the constants fitted without this source; None before `fit_planner.py --each` has run."""
    if not LEFT_OUT_FILE.is_file():
        return None
    record = json.loads(LEFT_OUT_FILE.read_text(encoding="utf-8"))
    if name not in record:
        return None
    path = tables / f"{name}.csv"
    found = predict_runs(read_runs(path), machine, Constants(**record[name]))
    predicted = list(csv.DictReader(io.StringIO(write_csv(found))))
    scored: Score = scorer.score(scorer.read(path), predicted)
    return scored


def percent(value: float | None) -> str:
    """A share as people read it."""
    return "-" if value is None else f"{100 * value:.1f} %"
