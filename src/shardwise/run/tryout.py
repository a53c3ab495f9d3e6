"""What some axes must know of a model before they split it, found by running it on the first samples of the training data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from torch import nn

from shardwise.data.batch import Batch
from shardwise.data.loader import eval_batches
from shardwise.data.reading import Reading
from shardwise.data.source import as_splits
from shardwise.dist.split import is_dtensor
from shardwise.errors import PlanError
from shardwise.parallel.compiled import check_compiled_cut
from shardwise.parallel.context.check import Objective, check_context
from shardwise.parallel.context.split import Checked
from shardwise.parallel.expert import expert_parameters
from shardwise.run.weigh import weight_function
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from shardwise.parallel.pipeline.stages import Cut
    from shardwise.parallel.tensor.plan import TensorPlan

SAMPLES = 4
"""Samples that a model is tried out on: more than one, so that samples and features can be told apart."""

OBJECTIVE_SAMPLES = 16
"""Samples that show whether an objective compares samples of one class: of 10 classes, 4 samples hold two of one in half of the
cases, 16 always. Losses of outputs are looked at in the steps too, objectives are not: that would be a pass of the model more."""


def first_samples(job: Job) -> Batch:
    """The first samples of the training data, as evaluation would give them."""
    with closing(eval_batches(as_splits(job.data).train, batch_size=SAMPLES, stop=1, prefetch=0)) as stream:
        return next(stream)


def training_samples(job: Job, count: int = SAMPLES) -> Batch:
    """The first samples that the training comes to, as evaluation would give them: of a data set that is sorted by class, not
    all of one."""
    reading = Reading(
        batch_size=count,
        seed=job.seed,
        epoch=0,
        rank=0,
        ranks=1,
        start=0,
        stop=1,
        shuffle=job.shuffle,
        shares=None,
        training=False,
    )
    with closing(as_splits(job.data).train.read(reading)) as stream:
        return next(stream)


def check_sequences(
    job: Job, plan: Plan, model: nn.Module, tried: dict[int, Checked | PlanError] | None = None
) -> Checked | None:
    """Try out the context axis; None where the plan has none.

    Args:
        tried: answers for this job by degree of the context axis, on which alone they depend. One that is missing is added.

    Raises:
        PlanError: the model is not the same on parts of sequences.
    """
    degree, known = plan.layout.context, {} if tried is None else tried
    if degree == 1:
        return None
    if degree not in known:
        batch = first_samples(job)
        objective = Objective(loss=job.loss, objective=job.sole_objective, weight=weight_function(job))
        try:
            known[degree] = check_context(model, degree, batch.inputs, batch.targets, objective)
        except PlanError as error:
            known[degree] = PlanError(*error.args)  # without its traceback, which holds a copy of the model
            raise
    answer = known[degree]
    if isinstance(answer, PlanError):
        raise answer
    return answer


def find_cut(job: Job, plan: Plan, model: nn.Module, device: torch.device) -> Cut | None:
    """Where a pipeline cuts the model; None where the plan has none."""
    if plan.layout.pipeline == 1:
        return None
    from shardwise.parallel.pipeline.stages import cut_model  # tracing takes half a second to import

    batch = first_samples(job).to(device)
    cut = cut_model(model, plan, batch.inputs, batch.targets, job.sole_objective, device=device)
    check_compiled_cut(model, cut.split.program.opened)
    if plan.recompute != "none":
        from shardwise.parallel.recompute import check_cut

        check_cut(model, plan, cut.split.program.opened)
    return cut


def find_tensor_split(job: Job, plan: Plan, model: nn.Module, device: torch.device) -> TensorPlan | None:
    """How the tensor axis splits the model; None where the plan has no such axis. No collective; changes nothing.

    Args:
        job: whose data and loss to try the model with.
        plan: its layout and its rules.
        model: whole, with its initial weights.
        device: where the model is.

    Raises:
        PlanError: nothing in the model can be split, or a rule does not fit it.
    """
    if plan.layout.tensor == 1:
        return None
    from shardwise.parallel.tensor.find import find_split  # imports torch's DTensor, which takes most of a second

    return find_split(
        model,
        loss_program(job, first_samples(job).to(device)),
        plan.layout.tensor,
        rules=plan.tensor_rules,
        keep=expert_parameters(model),
    )


def loss_program(job: Job, batch: Batch) -> Callable[[nn.Module], Any]:
    """Computes the job's loss of a batch with a given model, as a training step does."""

    def program(model: nn.Module) -> Any:
        if job.loss is not None:
            return job.loss(call_model(model, batch.inputs), batch.targets)
        objectives = [single.sole_objective for single in job.singles]
        results = [each(model, (batch.inputs, batch.targets)) for each in objectives if each is not None]
        return results if job.turns else results[0]

    return program


def check_tensor_optimizer(optimizer: Optimizer, model: nn.Module, split: TensorPlan | None) -> tuple[str, ...]:
    """Refuse an optimizer that cannot step on the parameters which the tensor axis splits; they may be whole still.

    Returns:
        What will not equal the serial run, one sentence each.
    """
    if split is None:
        return ()
    from shardwise.parallel.steps import check_optimizer

    named = {id(parameter) for name, parameter in model.named_parameters() if name in split.shares}
    return check_optimizer(optimizer, lambda parameter: is_dtensor(parameter) or id(parameter) in named)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """`model(x)`, with a tuple of inputs as positional and a dict as keyword arguments."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)
