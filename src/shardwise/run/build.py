"""The job's module with its initial weights: whole on every worker, or without its large tensors, to be filled in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardwise.dist.collectives import Group
from shardwise.errors import JobError, PlanError
from shardwise.run.blame import readable_failure
from shardwise.run.heap import memory_given_back
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan
from shardwise.spec.runnable import defers_weights

if TYPE_CHECKING:
    from shardwise.parallel.deferred.build import Deferred


def build_model(job: Job, device: torch.device | None) -> nn.Module:
    """The job's module with its initial weights, which depend on the job's seed alone.

    Args:
        job: whose module.
        device: where to put it; None leaves it where the job built it.

    Raises:
        JobError: the job's function fails or returns no module with parameters.
    """
    model = _call(job)
    if not isinstance(model, nn.Module):
        raise JobError(f"Job.model returned a {type(model).__name__}: it must return a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise JobError("the model has no parameter with requires_grad=True: there is nothing to train")
    if device is None:
        return model
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise JobError(f"{name} of the model is on the meta device and has no values: build it on the CPU")
    if all(tensor.device == device for tensor in (*model.parameters(), *model.buffers())):
        return model  # tensors without memory, on which a step can be counted, do not allow `to`
    return model.to(device)


def build_together(
    job: Job, plan: Plan, world: Group, device: torch.device
) -> tuple[nn.Module, Deferred | None, tuple[str, ...]]:
    """The job's module on every rank; where the plan shards it, without its large parameters, to be filled later. Collective.

    Returns:
        the module; what fills it, None where it is whole; what the user should know, one sentence each.

    Raises:
        PlanError: the plan says that weights are to be made in parts, and for this model that cannot be done.
    """
    if not defers_weights(plan):
        return build_model(job, device), None, ()
    deferred, problem = build_in_parts(job)
    answers: list[tuple[str, str]] = world.gather_objects((problem, "" if deferred is None else deferred.digest))
    problem = next((why for why, _ in answers if why), "")
    if not problem and len({digest for _, digest in answers}) > 1:
        problem = "workers would get different weights (its random numbers are not torch's, or processors differ)"
    if problem:
        del deferred
        if plan.build == "deferred":
            raise _refusal(plan, problem)
        return build_model(job, device), None, (_whole_because(problem),)
    assert deferred is not None
    deferred.device = device
    if device.type != "cpu":
        for tensor in (*deferred.model.parameters(), *deferred.model.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)
    return deferred.model, deferred, ()


def build_to_look_at(job: Job, plan: Plan) -> nn.Module:
    """The job's module before any worker starts: names, shapes and types, without memory where that is possible.

    Raises:
        JobError: the job's function fails, or returns no module with parameters.
        PlanError: the plan says that weights are to be made in parts, and for this model that cannot be done.
    """
    if defers_weights(plan) and plan.build == "deferred":
        deferred, problem = build_in_parts(job)
        if deferred is None:
            raise _refusal(plan, problem)
    try:
        with without_memory():
            return build_model(job, None)
    except (JobError, PlanError):
        raise
    except Exception:  # noqa: BLE001  # a model may do anything in its constructor, such as looking at values
        pass
    with readable_failure("Job.model failed"):
        deferred = build_in_parts(job)[0] if defers_weights(plan) else None
        return deferred.model if deferred is not None else build_model(job, None)


@contextmanager
def without_memory() -> Iterator[None]:
    """Tensors that are made inside have shapes and types, no memory and no values."""
    with torch.device("meta"), _Undrawn():
        yield


@final
class _Undrawn(TorchFunctionMode):
    """Draws no normal values for tensors that hold none: torch 2.13 imports its compiler for it, which takes a second and
    70 MB of every worker, for any model with an embedding."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, Tensor.normal_):
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def build_in_parts(job: Job) -> tuple[Deferred | None, str]:
    """The module without its large parameters, or why that cannot be done."""
    from shardwise.parallel.deferred.build import build_deferred
    from shardwise.parallel.deferred.log import CannotReplayError

    try:
        return build_deferred(lambda: _call(job)), ""
    except CannotReplayError as error:
        return None, str(error) or "it cannot"


def giving_back(plan: Plan) -> AbstractContextManager[None]:
    """Around building and composing: memory of weights that a rank does not keep goes back to the system."""
    if not defers_weights(plan):
        return nullcontext()
    from shardwise.parallel.deferred.record import MIN_BYTES

    return memory_given_back(MIN_BYTES)


def _call(job: Job) -> Any:
    if isinstance(job.model, nn.Module):
        raise JobError(
            f"Job.model is a {type(job.model).__name__}: give a function that builds it, such as model=lambda: Net(), so that "
            "every worker starts from the same seed"
        )
    torch.manual_seed(job.seed)
    return job.model()


def _refusal(plan: Plan, problem: str) -> PlanError:
    return PlanError(
        f"plan {plan.layout} with build='deferred': the model's function cannot be replayed, because {problem}; change that, or "
        "leave build out, and every worker builds the whole model first"
    )


def _whole_because(problem: str) -> str:
    return f"every worker built the whole model before it was sharded, because {problem}"
