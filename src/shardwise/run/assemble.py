"""One assembly for training, proof and benchmark: job + plan + this rank -> a model that is ready for its first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardwise.dist.collectives import Group
from shardwise.dist.mesh import SAMPLE_AXES, Mesh
from shardwise.dist.meter import Meter
from shardwise.dist.split import is_dtensor, is_elsewhere
from shardwise.errors import JobError, PlanError
from shardwise.kernels.install import use_fast_kernels
from shardwise.parallel.blocks import has_forward
from shardwise.parallel.compiled import keep_from_messages
from shardwise.parallel.compose import Composed, check_layout, check_model, compose
from shardwise.parallel.context.split import Checked
from shardwise.parallel.several import as_one, optimizers_in
from shardwise.parallel.steps import check_apart, check_optimizer, check_step
from shardwise.run.blame import readable_failure
from shardwise.run.build import build_model, build_to_look_at, build_together, giving_back, without_memory
from shardwise.run.clock import PhaseClock
from shardwise.run.coupled import check_loss, check_writing, divides_batches, is_cheap
from shardwise.run.heap import keep_freed_memory
from shardwise.run.optimize import building_optimizers
from shardwise.run.record import Recorder
from shardwise.run.rehearse import rehearse
from shardwise.run.tryout import (
    OBJECTIVE_SAMPLES,
    check_sequences,
    check_tensor_optimizer,
    find_cut,
    find_tensor_split,
    training_samples,
)
from shardwise.run.turns import Schedules, Turn, build_schedules, check_names, check_turns, make_turns
from shardwise.spec.job import Job
from shardwise.spec.layout import AXES
from shardwise.spec.plan import Plan

CPU = torch.device("cpu")


@final
@dataclass
class Assembly:
    """Everything one rank needs to take steps.

    Attributes:
        optimizer: the job's; where it has several, one over all of them (`Several`).
        turns: what a step does, by the name of its objective; by an empty name where there is one only.
        parameters: what this rank holds of the model's, split as they are between passes. FSDP2 shows whole ones in the
            module's own list for as long as a forward pass, such as one of an evaluation, has left them gathered.
        step: optimizer steps taken so far.
        total_steps: steps the whole training will take, None when the data has no known length.
        looks_at_losses: whether a loss that is no mean over its parts ends the run; a proof finds out for itself.
        division: how each global batch is divided over `samples`, the same on every rank; None for evenly.
    """

    job: Job
    plan: Plan
    mesh: Mesh
    device: torch.device
    composed: Composed
    optimizer: Optimizer
    turns: dict[str, Turn]
    scheduler: LRScheduler | Schedules | None
    clock: PhaseClock
    total_steps: int | None
    parameters: tuple[nn.Parameter, ...] = ()
    step: int = 0
    looks_at_losses: bool = False
    division: tuple[float, ...] | None = None

    @property
    def world(self) -> Group:
        """All ranks of the run."""
        return self.mesh.world

    @property
    def samples(self) -> Group:
        """The ranks that share out each global batch; ranks of other axes walk through the same samples."""
        return self.mesh.samples

    @property
    def shares(self) -> Group:
        """The ranks whose losses add up to that of a global batch: those with other samples, or other tokens of them."""
        return self.mesh.group("data", "shard", "context", "expert")

    @property
    def reports(self) -> Group:
        """The ranks that together have all losses of a global batch: `shares`, and pipeline stages, the last of which has
        them and the others zeros."""
        return self.mesh.group("data", "shard", "context", "expert", "pipeline")

    @property
    def token_share(self) -> float:
        """The fraction of a sample's tokens that this rank has."""
        return 1.0 if self.composed.context is None else self.composed.context.share

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's losses count: of the ranks that compute the same losses, one does."""
        others = [axis for axis in AXES if axis not in (*SAMPLE_AXES, "context", "pipeline")]
        return all(self.mesh.coordinate(axis) == 0 for axis in others)

    def turn(self, name: str) -> Turn:
        """What the step with this objective does.

        Raises:
            JobError: there is no such objective.
        """
        if name and name in self.turns:
            return self.turns[name]
        known = (
            f"the job has {', '.join(self.turns)}" if "" not in self.turns else "give Job.objective a dict of several"
        )
        raise JobError(f"there is no objective {name!r}: {known}")

    def average(self) -> None:
        """Make equal what replicas do by themselves: steps, and running statistics. Collective; nothing where there is none."""
        if self.composed.statistics is not None:
            self.composed.statistics.average()
        if self.composed.local is not None:
            self.composed.local.average(self.optimizer)

    @property
    def model(self) -> nn.Module:
        """The user's module."""
        return self.composed.model


def settle_plan(job: Job, plan: Plan) -> Plan:
    """The plan with what the job asks for where the plan itself says nothing."""
    values: dict[str, Any] = {}
    if plan.micro_batch is None and job.micro_batch is not None:
        values["micro_batch"] = job.micro_batch
    if plan.precision == "fp32" and job.precision != "fp32":
        values["precision"] = job.precision
    if job.compile:
        values["compile"] = True
    return Plan(**{**vars(plan), **values})


def build_optimizer(job: Job, model: nn.Module) -> Optimizer:
    """The job's optimizer over the model's parameters.

    Raises:
        JobError: the function returns no optimizer, or one that needs to evaluate the loss itself.
    """
    argument: Any = model if _first_argument(job.optimizer) == "model" else list(model.parameters())
    with building_optimizers():
        try:
            given = job.optimizer(argument)
        except (AttributeError, TypeError) as error:
            if isinstance(argument, list) and str(error).startswith(("'list' object", "list indices")):
                raise JobError(
                    f"Job.optimizer is given a list of the parameters and takes it for something else ({error}): name its "
                    "argument `model` (lambda model: ...), and it is given the module"
                ) from error
            raise
    optimizer = as_one(given)
    if optimizer is None:
        raise JobError(
            f"Job.optimizer returned a {type(given).__name__}{' with something else in it' if given else ''}: it must return a "
            "torch.optim.Optimizer, or a list or dict of several"
        )
    check_names(job, optimizer)
    if any(isinstance(one, torch.optim.LBFGS) for one in optimizers_in(optimizer)):
        raise JobError(
            "LBFGS evaluates the loss several times in a step, which a global step does not allow; use another optimizer"
        )
    own = {id(parameter) for parameter in model.parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in own:
                raise JobError(
                    f"Job.optimizer was made with a parameter of shape {tuple(parameter.shape)} that is none of the "
                    "model's: make it of the parameters that it is given, or add that parameter to the model"
                )
    _leave_to_other_stages(optimizer)
    return optimizer


def _leave_to_other_stages(optimizer: Optimizer) -> None:
    """Take out the parameters that only other pipeline stages hold; the groups stay, so that they mean the same everywhere."""
    for group in optimizer.param_groups:
        here = [not is_elsewhere(parameter) for parameter in group["params"]]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [item for item, is_here in zip(group[key], here, strict=True) if is_here]
    for parameter in [parameter for parameter in optimizer.state if is_elsewhere(parameter)]:
        del optimizer.state[parameter]


def check_updates(job: Job, total_steps: int | None) -> None:
    """Make the job's optimizer and schedule once before any worker starts, and throw them away.

    Raises:
        JobError: one of them cannot be used, or its function fails.
    """
    with torch.random.fork_rng(devices=[]):
        optimizer = _optimizer_to_look_at(job)
        endless = (
            "" if total_steps is not None else " (total_steps is None: the data has no known length; give Job.steps)"
        )
        with readable_failure(f"Job.schedule failed{endless}"):
            scheduler = build_schedules(job, optimizer, total_steps)
            if total_steps is None:
                for one in scheduler.of.values() if isinstance(scheduler, Schedules) else [scheduler]:
                    if one is not None:
                        one.step()  # some keep the length until then


def _optimizer_to_look_at(job: Job) -> Optimizer:
    try:
        with without_memory():
            return build_optimizer(job, build_model(job, None))
    except JobError:
        raise
    except Exception:  # noqa: BLE001  # some (fused=True) take no parameters without memory
        pass
    with readable_failure("Job.optimizer failed"):
        return build_optimizer(job, build_model(job, CPU))


def check_is_job(job: object, caller: str) -> None:
    """Refuse what is no job, such as the function that makes one.

    Raises:
        JobError: it is something else.
    """
    if isinstance(job, Job):
        return
    name = getattr(job, "__name__", "")
    if callable(job) and name:
        raise JobError(
            f"{caller} was given the function {name}: call it, {caller}({name}(), ...), for the Job that it returns"
        )
    raise JobError(f"{caller} was given a {type(job).__name__}: give it a shardwise.Job")


def check_job(
    job: Job, plan: Plan, *, rehearsal: bool = False, tried: dict[int, Checked | PlanError] | None = None
) -> None:
    """Build the model without memory where it allows that, and refuse what the plan cannot do, before any worker starts.

    Args:
        rehearsal: call the job's functions on its first samples too, where that costs little.
        tried: one dict for several plans of a job, empty at first; see `check_sequences`.

    Raises:
        UserError: what was given, the rule, and what to do. What a function of the job raises is shown with its lines.
    """
    check_layout(plan)
    check_turns(job, plan)
    with torch.random.fork_rng(devices=[]):  # the caller's own random numbers are none of our business
        model = build_to_look_at(job, plan)
    _check_called(job, model)
    check_model(model, plan, batch_size=job.batch_size, batch_norm=job.batch_norm)
    layout = plan.layout
    if layout.shard > 1:
        with torch.random.fork_rng(devices=[]):
            check_step(_optimizer_to_look_at(job), "shard")
    cheap = is_cheap(job, model)
    loss_in_parts = cheap and divides_batches(job, plan)
    if cheap and rehearsal:
        with torch.random.fork_rng(devices=[]):
            for single in job.singles:
                rehearse(single, plan, build_model(job, CPU))  # a model of its own, because it may count its calls
    if layout.context * layout.tensor * layout.pipeline > 1 or loss_in_parts:
        with torch.random.fork_rng(devices=[]):
            model = build_model(job, CPU)
            samples = training_samples(job) if cheap else None
            if samples is not None:
                for single in job.singles:
                    check_writing(single, plan, model, samples)
            check_sequences(job, plan, model, tried)
            split = find_tensor_split(job, plan, model, CPU)
            if split is not None:
                check_tensor_optimizer(build_optimizer(job, model), model, split)
            find_cut(job, plan, model, CPU)
            if cheap and layout.pipeline > 1:
                check_apart(lambda: build_optimizer(job, model), list(model.parameters()))
            if loss_in_parts and samples is not None:
                for single in job.singles:
                    check_loss(single, plan, model, samples)
                    if single.objective is not None:
                        more = min(OBJECTIVE_SAMPLES, job.batch_size)
                        check_loss(single, plan, model, training_samples(job, more))


def _check_called(job: Job, model: nn.Module) -> None:
    caller = "loss" if job.loss is not None else "metrics" if job.metrics else ""
    if caller and not has_forward(model):
        raise JobError(
            f"the model is a {type(model).__name__} without a forward pass, and Job.{caller} is of its output: give it a class "
            "with a forward method, or an objective, which calls the parts itself, and no metrics"
        )


def assemble(
    job: Job,
    plan: Plan,
    world: Group,
    device: torch.device,
    *,
    total_steps: int | None,
    timeout_seconds: float = 600.0,
    recorder: Recorder | None = None,
) -> Assembly:
    """Build, split and wire up everything, on this rank.

    Args:
        job: what to train.
        plan: as returned by `settle_plan`.
        world: all ranks of the run; its size must be the plan's number of workers.
        device: where this rank computes.
        total_steps: for the learning-rate schedule.
        timeout_seconds: how long a collective may wait for a missing rank.
        recorder: keeps where the time goes and what is sent; None for a run that is not measured.
    """
    if plan.layout.workers != world.size:
        raise PlanError(f"plan {plan.layout} needs {plan.layout.workers} workers but {world.size} were started")
    mesh = Mesh(plan.layout, world.rank, device.type, recorder.meter if recorder is not None else Meter())
    with giving_back(plan):
        model, deferred, remarks = build_together(job, plan, world, device)
        check_model(model, plan, batch_size=job.batch_size, batch_norm=job.batch_norm)
        mesh.share_memory(timeout_seconds)
        checked = check_sequences(job, plan, model)
        own_kernels = device.type == "cpu" and plan.kernels == "auto"
        if own_kernels and deferred is None:
            use_fast_kernels(model)
        cut = find_cut(job, plan, model, device)
        # One rank looks and tells the others: they would find the same, at the price of its time on shared cores.
        split = find_tensor_split(job, plan, model, device) if world.rank == 0 else None
        split = mesh.world.gather_objects(split)[0] if plan.layout.tensor > 1 else None
        composed = compose(
            model, plan, mesh, batch_norm=job.batch_norm, checked=checked, cut=cut, split=split, deferred=deferred
        )
    keep_from_messages(model, plan)
    if device.type == "cpu":
        keep_freed_memory()
    if own_kernels and deferred is not None:
        use_fast_kernels(model)  # not sooner: what computes initial weights a second time must be what did it first
    optimizer = build_optimizer(job, model)
    split_by = " and ".join(axis for axis in ("shard", "tensor", "expert") if plan.layout.degrees[axis] > 1)
    composed.remarks += remarks + check_optimizer(optimizer, is_dtensor, split_by)
    scheduler = build_schedules(job, optimizer, total_steps)
    parameters = tuple(parameter for parameter in model.parameters() if not is_elsewhere(parameter))
    composed.keep_plans(len(job.turns))
    return Assembly(
        job=job,
        plan=plan,
        mesh=mesh,
        device=device,
        composed=composed,
        optimizer=optimizer,
        turns=make_turns(job, optimizer, scheduler, parameters),
        scheduler=scheduler,
        clock=PhaseClock(device, mesh.meter, recorder=recorder),
        total_steps=total_steps,
        parameters=parameters,
        division=plan.shares or None,
    )


def _first_argument(function: Callable[..., Any]) -> str:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ""
    return names[0] if names else ""
