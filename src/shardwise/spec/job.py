"""Job: what to train. Nothing in it depends on how many workers there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from shardwise.errors import JobError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    Metric = Callable[[Any, Any], Tensor | tuple[Tensor, Tensor]]
    Objective = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]
    Schedule = Callable[[Optimizer, int | None], LRScheduler]


@dataclass(frozen=True, kw_only=True, repr=False)
class Job:
    """What to train: the result of a plain function whose keyword arguments are the hyper-parameters.

    Attributes:
        model: builds the module; called on every rank after the random generator was set from `seed`.
        data: anything `shardwise.data.as_splits` accepts: a `Splits`, one source, `(inputs, targets)` arrays, a torch
            `Dataset` or `IterableDataset`, or `{"train": ..., "test": ...}` of these. None for a loop that makes its own.
        loss: `(output, target)` -> mean over the samples of that batch (or over `weight`); not given with `objective`.
        objective: `(model, batch)` -> mean over the samples, or a `(sum, count)` pair of scalars, for models that
            compute their own loss; `batch` is the batch as the data source gives it, `(inputs, targets)`. A dict of
            these, by name, for trainings that take steps in turn: each step names its objective.
        optimizer: `params` -> optimizer. A function whose argument is named `model` is given the module instead, for
            parameter groups by name. It may return several, of different parameters: a list of those that step
            together, or a dict with an optimizer or list for each name of `objective`.
        batch_size: samples per optimizer step over all workers together, whatever the plan.
        epochs: passes over the training split; or
        steps: optimizer steps in all. Exactly one of the two; without data there are no epochs, and `steps` may be left out.
        metrics: name -> `(output, target)` -> mean over the samples, or a `(sum, count)` pair. Evaluated on the test
            split.
        schedule: `(optimizer, total_steps)` -> learning-rate scheduler, stepped once per optimizer step. With several
            optimizers it is called for each; or a dict of functions, by the name of the optimizer. `total_steps` counts
            global batches.
        clip_norm: gradients are scaled so that their norm over all parameters of the whole model is at most this; with
            named optimizers, over those of the optimizers that step. Or a dict of numbers, by name.
        micro_batch: samples per worker and forward pass; gradients accumulate exactly. None: the worker's whole share.
        weight: `target` -> how many items the loss of these targets is a mean over (tokens, unignored targets).
            None: the samples.
        batch_norm: `global` computes BatchNorm statistics over the whole global batch, as one worker would; `local`
            over each worker's own samples, which is cheaper and not the serial run.
        seed: of the initial weights, the sample order and all randomness.
        precision: `fp32`, or `bf16` for bfloat16 autocast.
        compile: run the model through `torch.compile`.
        shuffle: new order of the training samples every epoch.
        eval_batch_size: samples per evaluation step over all workers; None uses `batch_size`.
        name: shown in reports and in the name of the run folder.
    """

    model: Callable[[], nn.Module]
    data: Any
    optimizer: Callable[[Any], Any]
    batch_size: int
    loss: Callable[[Any, Any], Tensor] | None = None
    objective: Objective | Mapping[str, Objective] | None = None
    epochs: int | None = None
    steps: int | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    schedule: Schedule | Mapping[str, Schedule] | None = None
    clip_norm: float | Mapping[str, float] | None = None
    micro_batch: int | None = None
    weight: Callable[[Any], Tensor | float] | None = None
    batch_norm: Literal["global", "local"] = "global"
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    shuffle: bool = True
    eval_batch_size: int | None = None
    name: str = "job"

    def __repr__(self) -> str:
        """Its values and the names of its functions: the data may be gigabytes."""
        texts = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None or (item.default is not MISSING and value == item.default):
                continue
            texts.append(f"{item.name}={_in_short(value)}")
        return f"Job({', '.join(texts)})"

    @property
    def turns(self) -> tuple[str, ...]:
        """Names of the objectives, in order; none where each step has the same one."""
        return tuple(self.objective) if isinstance(self.objective, Mapping) else ()

    @property
    def sole_objective(self) -> Objective | None:
        """The objective, of a job that has no dict of them."""
        assert not isinstance(self.objective, Mapping), "one of the jobs in `singles` has one objective"
        return self.objective

    @property
    def sole_clip_norm(self) -> float | None:
        """As `sole_objective`."""
        assert not isinstance(self.clip_norm, Mapping), "one of the jobs in `singles` has one bound"
        return self.clip_norm

    @property
    def singles(self) -> tuple[Job, ...]:
        """The job once for each objective, with that one alone."""
        if not isinstance(self.objective, Mapping):
            return (self,)
        clip = self.clip_norm
        return tuple(
            replace(self, objective=each, clip_norm=clip.get(name) if isinstance(clip, Mapping) else clip)
            for name, each in self.objective.items()
        )

    def __post_init__(self) -> None:
        for name in ("model", "optimizer"):
            given = type(getattr(self, name)).__name__
            if not callable(getattr(self, name)):
                raise JobError(f"Job.{name} is a {given}: give a function, so that every worker can build its own")
        if isinstance(self.loss, type):
            raise JobError(
                f"Job.loss is the class {self.loss.__name__}: make one of it, {self.loss.__name__}(), or give a function "
                "(output, target) -> mean"
            )
        if not isinstance(self.metrics, Mapping) or not all(callable(metric) for metric in self.metrics.values()):
            raise JobError(
                f"Job.metrics is a {type(self.metrics).__name__}: give a dict of names and functions, such as "
                '{"accuracy": shardwise.metrics.accuracy}'
            )
        if (self.loss is None) == (self.objective is None):
            given = "neither" if self.loss is None else "both"
            raise JobError(
                f"Job has {given} of loss and objective: give loss=(output, target) -> mean, or objective=(model, batch)"
            )
        _check_names(self)
        if self.data is None and self.epochs is not None:
            raise JobError(f"Job has epochs={self.epochs} and no data to pass over: give data, or steps, or neither")
        if (self.epochs is None) == (self.steps is None) and self.data is not None:
            given = "neither" if self.epochs is None else "both"
            raise JobError(f"Job has {given} of epochs and steps: give exactly one")
        if self.weight is not None and self.objective is not None:
            raise JobError(
                "Job has weight and objective: an objective says what it is a mean over by returning a (sum, count) pair"
            )
        for name in ("batch_size", "epochs", "steps", "micro_batch", "eval_batch_size"):
            _check_count(name, getattr(self, name), required=name == "batch_size")
        # torch's generators take 64-bit seeds.
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 1 << 63:
            raise JobError(f"Job.seed is {self.seed!r}: give a whole number from 0 to 2**63 - 1")
        norms = self.clip_norm.values() if isinstance(self.clip_norm, Mapping) else [self.clip_norm]
        if not all(norm is None or norm > 0 for norm in norms):
            raise JobError(f"Job.clip_norm is {self.clip_norm!r}: give a number above 0, or None for no clipping")
        _check_choice("precision", self.precision, ("fp32", "bf16"))
        _check_choice("batch_norm", self.batch_norm, ("global", "local"))


def _check_names(job: Job) -> None:
    """What is given by name must have names that mean something."""
    names = job.turns
    if isinstance(job.objective, Mapping):
        wrong = [
            name for name, each in job.objective.items() if not isinstance(name, str) or not name or not callable(each)
        ]
        if wrong or not names:
            raise JobError(
                f"Job.objective is a dict with {f'{wrong[0]!r} in it' if wrong else 'nothing in it'}: give names and functions "
                "(model, batch) -> mean"
            )
        both = sorted({*names} & {*job.metrics})
        if both:
            raise JobError(
                f"Job has an objective and a metric called {both[0]!r}: an evaluation has both, so rename one"
            )
    if isinstance(job.schedule, Mapping) and not all(callable(each) for each in job.schedule.values()):
        raise JobError(
            "Job.schedule is a dict of something else than functions: give (optimizer, total_steps) -> scheduler"
        )
    if isinstance(job.clip_norm, Mapping) and (unknown := sorted({*job.clip_norm} - {*names})):
        raise JobError(
            f"Job.clip_norm has the name {unknown[0]!r}, which no objective has: "
            + (f"those are {', '.join(names)}" if names else "give one number, or a dict of objectives too")
        )


def _in_short(value: object) -> str:
    if isinstance(value, int | float | str):
        return repr(value)
    if isinstance(value, Mapping):
        return repr([*value])
    return getattr(value, "__qualname__", None) or type(value).__name__


def _check_count(name: str, value: object, *, required: bool) -> None:
    if value is None and not required:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise JobError(f"Job.{name} is {value!r}: give a whole number of at least 1")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise JobError(f"Job.{name} is {value!r}: give one of {', '.join(allowed)}")
