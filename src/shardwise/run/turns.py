"""Turns: what one kind of step trains. A job with one objective has one; with several, each step names its own.

A step trains the parameters of its own optimizers alone: the others are frozen while it computes, so that their gradients
are neither computed nor sent. Gradients flow through them all the same (a generator learns through its discriminator).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from shardwise.errors import JobError, PlanError
from shardwise.parallel.several import ALL, Several, optimizers_in
from shardwise.run.optimize import OptimizerStep
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan


@final
class Schedules:
    """The learning-rate schedules of several optimizers, kept as one; the turns step them."""

    def __init__(self, of: Mapping[Optimizer, LRScheduler]) -> None:
        self.of = dict(of)

    def state_dict(self) -> dict[str, Any]:
        """That of each, by its number."""
        return {str(index): one.state_dict() for index, one in enumerate(self.of.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `state_dict` gave it."""
        for index, one in enumerate(self.of.values()):
            one.load_state_dict(state[str(index)])


@final
@dataclass(frozen=True, eq=False)
class Turn:
    """What a step does.

    Attributes:
        name: of the objective; empty where there is one only.
        objective: `(model, batch)` -> mean or (sum, count); None where the job has a `loss`.
        clip_norm: of the gradients of `trained`; None for no clipping.
        update: steps the optimizers.
        schedules: to step after them.
        trained: parameters that are stepped, and that clipping looks at; None for all.
        others: parameters that rest meanwhile.
    """

    name: str
    objective: Callable[..., Any] | None
    clip_norm: float | None
    update: Callable[[], None]
    schedules: tuple[LRScheduler, ...]
    trained: tuple[nn.Parameter, ...] | None = None
    others: tuple[nn.Parameter, ...] = ()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While the block runs, nothing else is trained."""
        resting = [parameter for parameter in self.others if parameter.requires_grad]
        try:
            for parameter in resting:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in resting:
                parameter.requires_grad_(True)


def make_turns(
    job: Job, optimizer: Optimizer, scheduler: LRScheduler | Schedules | None, parameters: tuple[nn.Parameter, ...]
) -> dict[str, Turn]:
    """The turns of a job by name; one with an empty name where it has one objective.

    Args:
        parameters: those of the model that this rank holds.
    """
    schedules: dict[Optimizer, LRScheduler] = {}
    if isinstance(scheduler, Schedules):
        schedules = scheduler.of
    elif scheduler is not None:
        schedules = {optimizer: scheduler}
    turns = {}
    for name, single in zip(job.turns or ("",), job.singles, strict=True):
        together = optimizers_in(optimizer)
        if name and isinstance(optimizer, Several):
            together = optimizer.named.get(name, together)
        mine = {id(p) for one in together for group in one.param_groups for p in group["params"]}
        turns[name] = Turn(
            name=name,
            objective=single.sole_objective,
            clip_norm=single.sole_clip_norm,
            update=OptimizerStep(*together),
            schedules=tuple(schedules[one] for one in together if one in schedules),
            trained=tuple(p for p in parameters if id(p) in mine) if name else None,
            others=tuple(p for p in parameters if id(p) not in mine) if name else (),
        )
    return turns


def check_names(job: Job, optimizer: Optimizer) -> None:
    """Refuse optimizers or schedules by names that no step would take.

    Raises:
        JobError: names that do not match.
    """
    named = sorted(optimizer.named) if isinstance(optimizer, Several) and ALL not in optimizer.named else []
    if named and named != sorted(job.turns):
        those = f"objectives {', '.join(job.turns)}" if job.turns else "one objective without a name"
        raise JobError(
            f"Job.optimizer returned optimizers for {', '.join(named)}, and Job has {those}: a step names an objective, and the "
            "optimizers of that name step. Give both the same names (one optimizer may go by several), or return a list "
            "of optimizers that step together"
        )
    if isinstance(job.schedule, Mapping) and (unknown := sorted({*job.schedule} - {*named})):
        raise JobError(
            f"Job.schedule has the name {unknown[0]!r}, which no optimizer has: "
            + (f"those are {', '.join(named)}" if named else "give one function, or a dict of optimizers too")
        )


def check_turns(job: Job, plan: Plan) -> None:
    """Refuse plans that know one objective only.

    Raises:
        PlanError: the rule, and what to do.
    """
    if not job.turns:
        return
    layout = plan.layout
    given = f"plan {plan} for a job with the objectives {', '.join(job.turns)}"
    for axis, degree in (("pipeline", layout.pipeline), ("context", layout.context)):
        if degree > 1:
            raise PlanError(
                f"{given}: the axis {axis} follows the model through one objective; use data=, shard=, tensor= or serial"
            )
    for setting, chosen in (("local_steps", plan.local_steps > 1), ("compression", plan.compression != "none")):
        if chosen:
            raise PlanError(f"{given}: {setting} is planned for steps that all train the same parameters; leave it out")


def build_schedules(job: Job, optimizer: Optimizer, total_steps: int | None) -> LRScheduler | Schedules | None:
    """The job's learning-rate schedules, None where it has none.

    Raises:
        JobError: a function returns no scheduler, or one that needs a metric at each step; or an optimizer would have two.
    """
    if job.schedule is None:
        return None
    if not isinstance(optimizer, Several):
        assert not isinstance(job.schedule, Mapping)  # refused by check_names
        return _checked(job.schedule(optimizer, total_steps))
    schedules = {}
    for one in optimizer.each:
        if isinstance(job.schedule, Mapping):
            names = [name for name, together in optimizer.named.items() if one in together]
            functions = list(dict.fromkeys(job.schedule[name] for name in names if name in job.schedule))
            if len(functions) > 1:
                raise JobError(
                    f"Job.schedule has {len(functions)} functions for the optimizer that goes by {', '.join(names)}: give it "
                    "one, under one of these names"
                )
        else:
            functions = [job.schedule]
        if functions:
            schedules[one] = _checked(functions[0](one, total_steps))
    return Schedules(schedules)


def _checked(scheduler: object) -> LRScheduler:
    if not isinstance(scheduler, LRScheduler):
        raise JobError(f"Job.schedule returned a {type(scheduler).__name__}: it must return a torch LRScheduler")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise JobError(
            "ReduceLROnPlateau needs a metric at each step, which a schedule in steps does not have; use another"
        )
    return scheduler
