"""Plan: everything that decides how a job runs and nothing that decides what it computes."""

import math
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from shardwise.errors import PlanError
from shardwise.spec.layout import Layout

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Precision = Literal["fp32", "bf16", "pure-bf16", "fp16", "fp8", "fp4"]
Recompute = Literal["none", "selective", "full"]
Compression = Literal["none", "fp16", "bf16", "powersgd"]
Build = Literal["auto", "whole", "deferred"]
Kernels = Literal["auto", "torch"]
SCHEDULES = ("gpipe", "1f1b", "interleaved1f1b", "zerobubble", "zbv", "dualpipev")
V_SHAPED = ("zbv", "dualpipev")
"""Schedules under which a pipeline rank has two stages, as far from the two ends of the model as it is from the first rank."""
HALVED = ("zerobubble", "zbv", "dualpipev")
"""Schedules with backward passes in two halves: the gradients of activations, and those of weights, later."""
PRECISIONS = ("fp32", "bf16", "pure-bf16", "fp16", "fp8", "fp4")
TRAINED_PRECISIONS = ("fp32", "bf16")
"""Those that `train` knows; a cluster with other software may run a plan in the others."""
ZERO_STAGES = (1, 2, 3)
RECOMPUTES = ("none", "selective", "full")
COMPRESSIONS = ("none", "fp16", "bf16", "powersgd")
BUILDS = ("auto", "whole", "deferred")
KERNELS = ("auto", "torch")
TENSOR_RULES = ("column", "row", "vocabulary", "replicate")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the planner expects of a plan; seconds per optimizer step and peak bytes per rank, each broken down.

    Attributes:
        made_for: `planned_for` of the plan and batch; another plan or batch has no prediction. Empty where that is not known.
    """

    step_seconds: float
    memory_bytes: int
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    bytes_by_part: dict[str, int] = field(default_factory=dict)
    confidence: str = ""
    made_for: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a job runs. A plan written by hand is as good as a searched one.

    Attributes:
        layout: the degree of each mesh axis.
        schedule: pipeline schedule, one of `SCHEDULES`; meaningless without a pipeline.
        virtual_stages: stages of every pipeline rank under `interleaved1f1b`; None is 2, or what the cuts make.
        cuts: names of the modules that start a new pipeline stage; empty lets shardwise balance them.
        stage_layers: in place of cuts: how many of the model's repeated blocks each stage has, in model order; in files also as
            text, `7,8x14,7`. What comes before the first block goes with it, what comes after the last one with that.
        zero_stage: what the ranks of the `shard` axis split (Rajbhandari et al. 2020): 1 optimizer states, 2 gradients too, 3
            parameters too. None is 3. `train` runs 2 as FSDP2 does: parameters are whole from the forward pass of a
            micro-batch to its backward pass, and in parts between steps.
        micro_batch: samples per worker and forward pass; None is the worker's whole share of the global batch.
        recompute: what is thrown away after a module's forward pass and computed again in the backward pass: `none`, with
            `full` all but its inputs, with `selective` what is cheap (what products of matrices, convolutions and attention
            gave is kept).
        recompute_modules: names of the modules, `*` for any one part of a name ("blocks.*.mlp"); empty for the repeated blocks.
        precision: `fp32`, or `bf16` for bfloat16 autocast over fp32 weights; `pure-bf16` (weights and optimizer
            states in bf16 too), `fp16`, `fp8` and `fp4` are for other software.
        threads: compute threads per worker; None lets shardwise divide the cores.
        compile: run the model through `torch.compile`.
        tensor_rules: module name -> one of `TENSOR_RULES`, where the user knows better how the tensor axis splits it.
        compression: how gradients are made smaller on their way between replicas: `none`, or inexactly by `fp16`, `bf16` or
            `powersgd`. Only a user sets it.
        compression_rank: rank of the products that stand for gradient matrices under `powersgd`.
        local_steps: optimizer steps that replicas take by themselves between two averages of their weights; above 1 inexact.
            Only a user sets it.
        build: how a worker that will hold parts of the weights makes the initial ones: `whole` all at once, `deferred` one unit
            at a time, or refused where the model does not allow it, `auto` deferred where that is possible. The values are equal.
        kernels: what computes on CPUs: `auto` takes compiled kernels of our own where they were measured to pay, `torch` only
            PyTorch's. The values are equal up to rounding.
        shares: how each global batch is divided: one number above 0, in any unit, for each of the `layout.replicas` ranks
            that hold different samples, in rank order; empty for evenly.
        prediction: what the planner expects, None for a plan written by hand.
        reasons: why this plan was chosen, one sentence each.
    """

    layout: Layout = Layout()
    schedule: str = "1f1b"
    virtual_stages: int | None = None
    cuts: tuple[str, ...] = ()
    stage_layers: tuple[int, ...] = ()
    zero_stage: int | None = None
    micro_batch: int | None = None
    recompute: Recompute = "none"
    recompute_modules: tuple[str, ...] = ()
    precision: Precision = "fp32"
    threads: int | None = None
    compile: bool = False
    tensor_rules: dict[str, str] = field(default_factory=dict)
    compression: Compression = "none"
    compression_rank: int = 4
    local_steps: int = 1
    build: Build = "auto"
    kernels: Kernels = "auto"
    shares: tuple[float, ...] = ()
    prediction: Prediction | None = None
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("recompute", self.recompute, RECOMPUTES)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("compression", self.compression, COMPRESSIONS)
        _check_choice("build", self.build, BUILDS)
        _check_choice("kernels", self.kernels, KERNELS)
        for name in ("micro_batch", "threads", "virtual_stages", "compression_rank", "local_steps"):
            value = getattr(self, name)
            unset = value is None and name in ("micro_batch", "threads", "virtual_stages")
            if not unset and not _counts(value):
                raise PlanError(f"plan {name}={value!r}: it must be a whole number of at least 1, or be left out")
        if self.zero_stage is not None and (not _counts(self.zero_stage) or self.zero_stage not in ZERO_STAGES):
            raise PlanError(f"plan zero_stage={self.zero_stage!r}: it must be 1, 2 or 3, or be left out")
        if not isinstance(self.stage_layers, tuple) or not all(_counts(value, 0) for value in self.stage_layers):
            raise PlanError(f"plan stage_layers={self.stage_layers!r}: it must be a list of whole numbers")
        if not isinstance(self.compile, bool):
            raise PlanError(f"plan compile={self.compile!r}: it must be true or false")
        if not isinstance(self.layout, Layout):
            raise PlanError(f"plan layout={self.layout!r}: write a text such as 'data=2', or degrees by axis")
        if not isinstance(self.tensor_rules, dict):
            raise PlanError(f"plan tensor_rules={self.tensor_rules!r}: it must be a table of module names and rules")
        for name, rule in self.tensor_rules.items():
            _check_choice(f"tensor_rules of {name!r}", rule, TENSOR_RULES)
        for name in ("cuts", "recompute_modules", "reasons"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
                raise PlanError(f"plan {name}={value!r}: it must be a list of texts")
        _check_shares(self.shares, self.layout)

    def to_dict(self) -> dict[str, Any]:
        """Plain data without unset values; the layout in its text form. `from_dict` reads it back."""
        record = {key: value for key, value in asdict(self).items() if value is not None and value not in ((), {})}
        record["layout"] = str(self.layout)
        if self.stage_layers:
            record["stage_layers"] = in_runs(self.stage_layers)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in record.items()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Plan":
        """Build a plan from plain data.

        Raises:
            PlanError: an unknown key or a value of the wrong kind.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(record) - known)
        if unknown:
            raise PlanError(f"plan: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
        values = dict(record)
        layout = values.pop("layout", Layout())
        if isinstance(layout, str):
            layout = Layout.parse(layout)
        elif isinstance(layout, dict):
            layout = _layout_from_degrees(layout)
        prediction = values.pop("prediction", None)
        if prediction is not None and not isinstance(prediction, Prediction):
            prediction = _read_prediction(prediction)
        if isinstance(values.get("stage_layers"), str):
            values["stage_layers"] = _from_runs(values["stage_layers"])
        for name in ("cuts", "stage_layers", "recompute_modules", "reasons", "shares"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(layout=layout, prediction=prediction, **values)

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a plan from a TOML file.

        Raises:
            PlanError: the file cannot be read, is not TOML, or does not describe a plan.
        """
        try:
            return cls.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise PlanError(f"plan file {path} does not exist") from error
        except OSError as error:
            raise PlanError(f"plan file {path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"plan file {path} is not TOML: {error}") from error

    def with_layout(self, layout: Layout) -> "Plan":
        """The same plan under another layout, without what is said of axes that it has not."""
        shares = self.shares if layout.replicas == self.layout.replicas else ()
        plan = replace(self, layout=layout, shares=shares, prediction=None)
        if layout.tensor == 1:
            plan = replace(plan, tensor_rules={})
        if layout.shard == 1 and plan.build == "deferred":
            plan = replace(plan, build=Plan().build)
        if layout.shard == 1:
            plan = replace(plan, zero_stage=None)
        if layout.pipeline == 1:
            plan = replace(plan, schedule=Plan().schedule, virtual_stages=None, cuts=(), stage_layers=())
        return plan if layout.data > 1 else plan.exact()

    def planned_for(self, batch_size: int) -> str:
        """What a prediction holds for: the plan and the samples of a step, in one line."""
        named = f" cuts={','.join(self.cuts)}" if self.cuts else ""
        return f"{self}{named}, {batch_size} samples a step"

    def for_batch(self, batch_size: int) -> "Plan":
        """The same plan, without a prediction and its reasons where they were made for another plan or batch."""
        made_for = self.prediction.made_for if self.prediction is not None else ""
        stale = made_for not in ("", self.planned_for(batch_size))
        return replace(self, prediction=None, reasons=()) if stale else self

    def exact(self) -> "Plan":
        """The same plan without what makes its result another than the serial one."""
        defaults = Plan()
        return replace(
            self,
            compression=defaults.compression,
            compression_rank=defaults.compression_rank,
            local_steps=defaults.local_steps,
        )

    def __str__(self) -> str:
        parts = [str(self.layout)]
        defaults = Plan()
        for name in (
            "micro_batch",
            "recompute",
            "precision",
            "threads",
            "compile",
            "compression",
            "compression_rank",
            "local_steps",
            "build",
            "kernels",
        ):
            value = getattr(self, name)
            if value != getattr(defaults, name):
                parts.append(f"{name}={value}")
        if self.zero_stage not in (None, ZERO_STAGES[-1]):
            parts.append(f"zero_stage={self.zero_stage}")
        if self.layout.pipeline > 1:
            parts.append(f"schedule={self.schedule}")
        if self.virtual_stages is not None:
            parts.append(f"virtual_stages={self.virtual_stages}")
        if self.stage_layers:
            parts.append(f"stage_layers={in_runs(self.stage_layers)}")
        if self.shares:
            parts.append("shares=" + ",".join(f"{share:g}" for share in self.shares))
        return " ".join(parts)


def in_runs(counts: tuple[int, ...]) -> str:
    """`7,8x14,7` for a 7, fourteen times 8 and a 7."""
    runs = [(value, len(list(equal))) for value, equal in groupby(counts)]
    return ",".join(f"{value}x{times}" if times > 1 else str(value) for value, times in runs)


def _from_runs(text: str) -> tuple[int, ...]:
    """What `in_runs` wrote."""
    counts: list[int] = []
    for run in text.split(","):
        value, _, times = (part.strip() for part in run.partition("x"))
        if not value.isdecimal() or not (times or "1").isdecimal():
            raise PlanError(f"plan stage_layers={text!r}: write numbers of layers, such as [7, 8, 8, 7] or '7,8x2,7'")
        counts += [int(value)] * int(times or "1")
    return tuple(counts)


def _counts(value: object, least: int = 1) -> bool:
    """Whether it is a whole number of at least that."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _layout_from_degrees(degrees: dict[str, int]) -> Layout:
    try:
        return Layout(**degrees)
    except TypeError as error:
        raise PlanError(f"plan layout {degrees!r}: {error}") from error


def _check_shares(shares: object, layout: Layout) -> None:
    if not isinstance(shares, tuple):
        raise PlanError(f"plan shares={shares!r}: it must be a list of numbers, one for each part of the global batch")
    for share in shares:
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < float("inf"):
            raise PlanError(f"plan shares has {share!r}: each must be a finite number above 0")
    if shares and len(shares) != layout.replicas:
        raise PlanError(
            f"plan shares has {len(shares)} numbers, but {layout} divides each global batch into {layout.replicas} parts: give "
            "one number a part, or leave shares out to divide evenly"
        )


def _read_prediction(record: Any) -> Prediction:
    try:
        found = Prediction(**record)
    except TypeError as error:
        raise PlanError(f"plan prediction={record!r}: {error}; leave it out of a plan of your own") from error
    for item in fields(Prediction):
        value = getattr(found, item.name)
        if item.name in ("step_seconds", "memory_bytes"):
            right, rule = _is_number(value) and value > 0, "a number above 0"
        elif item.name in ("seconds_by_part", "bytes_by_part"):
            right, rule = (
                isinstance(value, dict) and all(_is_number(part) for part in value.values()),
                "a table of numbers",
            )
        else:
            right, rule = isinstance(value, str), "a text"
        if not right:
            raise PlanError(
                f"plan prediction {item.name}={value!r}: it must be {rule}; leave [prediction] out of a plan of your own"
            )
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PlanError(f"plan {name}={value!r}: it must be one of {', '.join(allowed)}")
