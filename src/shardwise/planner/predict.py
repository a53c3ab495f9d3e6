"""From rows of a table to predictions: fill in what is unknown by stated rules, then estimate."""

import csv
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardwise.errors import PlanError, UserError
from shardwise.planner import catalogue
from shardwise.planner.case import Case, usual_kernels
from shardwise.planner.confidence import step_range
from shardwise.planner.constants import DEFAULT, Constants
from shardwise.planner.memory import MemoryParts
from shardwise.planner.repair import repair
from shardwise.planner.runs import REQUIRED, Row
from shardwise.planner.step import Estimate, Memo, estimate, room_bytes
from shardwise.spec.facts import Transformer
from shardwise.spec.machine import Machine
from shardwise.spec.plan import V_SHAPED
from shardwise.spec.software import Software

GIB = 2**30
MODEL_KEYS = (
    "layers",
    "hidden",
    "heads",
    "kv_heads",
    "ffn_hidden",
    "gated_ffn",
    "vocab",
    "tied_embeddings",
    "experts",
    "experts_per_token",
)


@dataclass(frozen=True)
class RunPrediction:
    """Answer for one row; without an estimate `reason` says why. `assumed`: what was taken for granted about the row."""

    run_id: str
    case: Case | None
    estimate: Estimate | None
    reason: str = ""
    assumed: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The three answers and their parts, as plain data."""
        if self.estimate is None or self.case is None:
            return {
                "run_id": self.run_id,
                "step_seconds": None,
                "memory_gib": None,
                "fullest_gib": None,
                "fits": None,
                "reason": self.reason,
                "assumed": list(self.assumed),
            }
        return {
            "run_id": self.run_id,
            "step_seconds": self.estimate.step_seconds,
            "step_seconds_range": [factor * self.estimate.step_seconds for factor in step_range(self.case)],
            "memory_gib": printed_bytes(self.case, self.estimate.memory) / GIB,
            "fullest_gib": self.estimate.memory.held / GIB,
            "fits": self.estimate.fits,
            "certain": self.estimate.certain,
            "assumed": list(self.assumed),
            "micro_batch": self.case.micro_batch,
            "recompute": self.case.recompute,
            "seconds_by_part": self.estimate.seconds,
            "bytes_by_part": {**self.estimate.memory.by_part(), "queued": self.estimate.memory.queued},
        }


def predict_runs(
    rows: Iterable[Row],
    machine: Machine | None = None,
    constants: Constants = DEFAULT,
    software: Software | None = None,
) -> Iterator[RunPrediction]:
    """Predict every row, in order; what contradicts itself is repaired first, and the answer says how.

    Args:
        machine: measured links that replace the nominal ones for rows with the same hardware and no stated network.
        software: what measured runs say about the software of all rows; None is what `machine` says about rows with its hardware.
    """
    for row in rows:
        run_id = str(row["run_id"])
        fixed, assumed = repair(row)
        try:
            case, found = resolve(fixed, machine, constants, software)
            yield RunPrediction(run_id, case, found, assumed=assumed)
        except UserError as error:
            yield RunPrediction(run_id, None, None, str(error), assumed)


def printed_bytes(case: Case, memory: MemoryParts) -> float:
    """What the run prints if it runs: the memory of rank 0, and no more than the device has where it is said to fit.

    A layout that only fits with better software than usual can only have run with such software.
    """
    room = room_bytes(case)
    return min(memory.first, room) if memory.least <= room else memory.first


def write_csv(predictions: Iterable[RunPrediction]) -> str:
    """The predictions as the text of a table `run_id,step_seconds,memory_gib,fits`; blank where there is none.

    `memory_gib` is `printed_bytes`; `fits` asks the fullest rank.
    """
    handle = io.StringIO()
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow(("run_id", "step_seconds", "memory_gib", "fits"))
    for item in predictions:
        if item.estimate is None or item.case is None:
            writer.writerow((item.run_id, "", "", ""))
        else:
            found = item.estimate
            writer.writerow(
                (
                    item.run_id,
                    f"{found.step_seconds:.7g}",
                    f"{printed_bytes(item.case, found.memory) / GIB:.6g}",
                    int(found.fits),
                )
            )
    return handle.getvalue()


def resolve(
    row: Row, machine: Machine | None = None, constants: Constants = DEFAULT, software: Software | None = None
) -> tuple[Case, Estimate]:
    """The case a row describes and its estimate, with what the row leaves open chosen.

    Degrees: a blank degree is 1, except one that follows from the others and `gpus`. Micro-batch, virtual stages of an
    interleaved schedule (on the engine of `Case.engine` also of an unknown one), recomputation, ZeRO stage and ways to split
    the experts, where blank, are chosen as a careful user would: the fastest candidate among those predicted to fit, the
    smallest in memory if none does.

    Raises:
        UserError: the row lacks what a prediction needs, or contradicts itself.
    """
    base = base_case(row, machine)
    if software is not None:
        base = replace(base, machine=replace(base.machine, software=software))
    choices = list(candidates(row, base))
    case, memo = choices[0], Memo()
    if len(choices) > 1:
        quick = estimate(case, constants, quick=True, memo=memo)
        for other in choices[1:]:
            found = estimate(other, constants, quick=True, memo=memo)
            if _better(found, quick):
                case, quick = other, found
    return case, estimate(case, constants, memo=memo)


def _better(new: Estimate, old: Estimate) -> bool:
    if new.likely != old.likely:
        return new.likely
    if not new.likely:
        return new.memory.total < old.memory.total
    return new.step_seconds < old.step_seconds


def candidates(row: Row, base: Case) -> Iterator[Case]:
    """`base` with every choice of what the row leaves open."""
    share = max(1, base.global_batch // base.data)
    sizes = [base.micro_batch] if "micro_batch" in row else [size for size in (1, 2, 4, 8, 16, 32) if share % size == 0]
    if "micro_batch" not in row and base.pipeline > 1:
        if base.zero_stage >= 2:
            sizes = [max(1, share // (base.pipeline * base.virtual_stages))]
        else:
            sizes = [size for size in sizes if share // size >= base.pipeline] or [1]
    chunks: Sequence[int] = (base.virtual_stages,)
    if base.schedule == "interleaved1f1b" and "virtual_stages" not in row and base.classic:
        chunks = [count for count in (2, 3, 4, 5, 6) if count * base.pipeline <= base.model.layers] or [1]
    interleaves = base.engine and base.pipeline > 1 and "schedule" not in row and "virtual_stages" not in row
    if interleaves:
        chunks = [count for count in (1, 2, 4) if count * base.pipeline <= base.model.layers] or [1]
    repeats = (base.recompute,) if "recompute" in row else ("none", "selective", "full")
    stages = (base.zero_stage,) if "zero_stage" in row or base.data == 1 else (0, 1, 3)
    ways = [base.expert]
    if base.model.experts and "expert" not in row:
        widest = math.gcd(base.model.experts, base.data)
        ways = sorted({1, widest, math.gcd(widest, base.machine.gpus_per_node)})
    for size, count, repeat, stage, way in itertools.product(sizes, chunks, repeats, stages, ways):
        kind = "interleaved1f1b" if interleaves and count > 1 else base.schedule
        yield replace(
            base,
            micro_batch=size,
            virtual_stages=count,
            schedule=kind,
            recompute=repeat,
            zero_stage=stage,
            expert=way,
        )


def base_case(row: Row, machine: Machine | None = None) -> Case:
    """The case of a row, with open choices at their first candidate."""
    blank = [name for name in REQUIRED if name not in row]
    if blank:
        raise PlanError(f"{blank[0]} is unknown: a prediction needs {', '.join(REQUIRED[1:])}")
    model = Transformer.from_values({key: int(row[key]) for key in MODEL_KEYS if key in row})
    place = _machine(row, machine)
    degrees = _degrees(row)
    usual = usual_kernels(place.accelerator)
    attention = str(row.get("attention", usual[0]))
    precision = str(row.get("precision", usual[1]))
    schedule = str(row.get("schedule", "1f1b"))
    virtual = int(row.get("virtual_stages", 2 if schedule == "interleaved1f1b" else 1))
    if schedule in V_SHAPED:
        virtual = 2
    elif virtual > 1:
        schedule = "interleaved1f1b"
    micro_batch = int(row.get("micro_batch", 1))
    if degrees["pipeline"] == 1:
        schedule, virtual = "1f1b", 1
    experts = model.experts
    case = Case(
        model=model,
        machine=place,
        seq_len=int(row["seq_len"]),
        global_batch=int(row.get("global_batch", micro_batch * degrees["data"])),
        micro_batch=micro_batch,
        zero_stage=int(row.get("zero_stage", 0)),
        virtual_stages=virtual,
        expert=min(int(row.get("expert", 1)), experts) if experts else 1,
        sequence_parallel=bool(row.get("sequence_parallel", attention == "flash")) and degrees["tensor"] > 1,
        recompute=str(row.get("recompute", "none")),
        attention=attention,
        precision=precision,
        compile=_compiled(row, place),
        schedule=schedule,
        data=degrees["data"],
        tensor=degrees["tensor"],
        pipeline=degrees["pipeline"],
        context=degrees["context"],
    )
    if "attention" not in row and case.recompute == "selective" and case.repeats_core and not case.engine:
        # It repeats the scores because they are not kept: a fused kernel has none (Korthikanti et al. 2022, section 5).
        case = replace(case, attention="math")
    return case


def _compiled(row: Row, place: Machine) -> bool | None:
    """Whether the model is compiled; always on a TPU, unknown where the row does not say."""
    if place.accelerator.name.startswith("tpu"):
        return True
    return bool(row["compile"]) if "compile" in row else None


def _degrees(row: Row) -> dict[str, int]:
    """Degrees of data, tensor, pipeline and context; what is blank follows from `gpus` or is 1."""
    degrees = {axis: int(row[axis]) for axis in ("data", "tensor", "pipeline", "context") if axis in row}
    product = 1
    for degree in degrees.values():
        product *= degree
    gpus = int(row.get("gpus", product))
    if gpus % product:
        raise PlanError(
            f"gpus={gpus} is no multiple of the degrees {degrees}; their product must be the number of GPUs"
        )
    for axis in ("data", "tensor", "pipeline", "context"):
        if axis not in degrees:
            degrees[axis] = gpus // product if axis == "data" else 1
            product = product * degrees[axis]
    if product != gpus:
        raise PlanError(
            f"degrees {degrees} make {product} workers, but gpus={gpus}; their product must be the number of GPUs"
        )
    return degrees


def _machine(row: Row, measured: Machine | None) -> Machine:
    per_node = int(row["gpus_per_node"]) if "gpus_per_node" in row else None
    network = float(row["internode_gbps_per_gpu"]) if "internode_gbps_per_gpu" in row else None
    known = catalogue.canonical_name(str(row["hardware"]))
    if known is not None and known.startswith("tpu"):
        per_node = None  # hosts share the links of the whole slice
    if measured is None or known != catalogue.canonical_name(measured.accelerator.name):
        return catalogue.machine(str(row["hardware"]), gpus_per_node=per_node, gbits_per_gpu=network)
    if network is None:
        return replace(measured, gpus_per_node=per_node or measured.gpus_per_node)
    stated = catalogue.machine(str(row["hardware"]), gpus_per_node=per_node, gbits_per_gpu=network)
    return replace(stated, software=measured.software)
