"""A rehearsal before any worker starts: the job's own functions are called on the first samples of its data.

Most first mistakes (layers that do not fit the data, targets of another type, a metric that fails after the first epoch) show
on a few samples. Here they are wrong input, told with the shapes and types that met; in a worker they would be a failed run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn

from shardwise.data.batch import Batch, tree_leaves
from shardwise.data.loader import eval_batches
from shardwise.data.source import Source, as_splits
from shardwise.errors import JobError, ShardwiseError
from shardwise.run.blame import readable_failure, user_traceback
from shardwise.run.coupled import state_kept
from shardwise.run.pair import as_pair
from shardwise.run.tryout import SAMPLES, call_model
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan

NAMED_LEAVES = 4
"""Tensors of a batch that a message describes."""


@final
class _Fails(Exception):
    """A function of the job raised; the message says which, and what it was given."""


@final
class _NoVerdict(Exception):
    """It cannot be told here: too large for one process, or it needs the other workers, which there are not yet."""


def rehearse(job: Job, plan: Plan, model: nn.Module) -> None:
    """Call the model, the loss and the metrics on the first samples of each split, as training and evaluation will.

    A failure on a few samples in evaluation mode is no verdict: a model may be written for one size of batch, or for training
    alone. It is one if the first share of a worker and the first whole batch fail too.

    Args:
        plan: what it makes of a batch is the second and third try.
        model: whole, on the CPU, and not used for anything else.

    Raises:
        JobError: a function of the job fails, with what it was given; or the samples cannot be read.
    """
    splits = as_splits(job.data)
    share = plan.micro_batch or -(-job.batch_size // plan.layout.replicas)
    _rehearse(job, plan, model, splits.train, "training", (share, job.batch_size))
    _rehearse_last(job, plan, model, splits.train, "training", job.batch_size)
    if splits.test is not None and splits.test.length is not None:
        size = job.eval_batch_size or job.batch_size
        _rehearse(job, plan, model, splits.test, "test", (-(-size // plan.layout.replicas), size))
        _rehearse_last(job, plan, model, splits.test, "test", size)


def _rehearse(job: Job, plan: Plan, model: nn.Module, source: Source, split: str, sizes: tuple[int, int]) -> None:
    """Raise the first failure if all tries fail."""
    first: JobError | None = None
    training = split == "training"
    for attempt, size in enumerate((SAMPLES, *sizes)):
        opened = closing(eval_batches(source, batch_size=size, stop=1, prefetch=0))
        with readable_failure(f"the first samples of the {split} data cannot be read"), opened as stream:
            batch = next(stream)
        if batch.phantom:
            return
        model.train(training and attempt > 0)
        try:
            with state_kept(model), torch.set_grad_enabled(training), _precision(plan):
                _walk(job, model, batch, split)
        except _Fails as error:
            first = first or JobError(str(error))
            continue
        except _NoVerdict:
            pass
        return
    assert first is not None
    raise first


def _rehearse_last(job: Job, plan: Plan, model: nn.Module, source: Source, split: str, batch_size: int) -> None:
    """Raise what fails on the one sample that is left over for the last batch: BatchNorm, or a `squeeze` too many."""
    length, training = source.length, split == "training"
    if length is None or length == 1 or length % batch_size != 1:
        return
    each = -(-length // batch_size)
    if training and job.steps is not None and job.steps < each:
        return
    with closing(eval_batches(source, batch_size=1, stop=1, prefetch=0)) as stream:
        batch = next(stream)
    model.train(training)
    try:
        with state_kept(model), torch.set_grad_enabled(training), _precision(plan):
            _walk(job, model, batch, split)
    except _NoVerdict:
        pass
    except _Fails as error:
        name = "batch_size" if training or job.eval_batch_size is None else "eval_batch_size"
        raise JobError(
            f"{error}\nThe first batches of the {split} data do not fail, but {length} samples in batches of {batch_size} leave "
            f"one over, and step {each} is one sample alone. Choose another {name}, leave one sample out, or let the model "
            "take a single sample (BatchNorm cannot in training; squeeze() also takes away the dim of the samples)"
        ) from error


def _walk(job: Job, model: nn.Module, batch: Batch, split: str) -> None:
    """One forward pass, loss and metrics."""
    given = [f"inputs {described(batch.inputs)}", f"targets {described(batch.targets)}"]
    training = split == "training"
    where = "on one sample" if batch.count == 1 else f"on the first {batch.count} samples"
    where += f" of the {split} data"
    output = None
    objective = job.sole_objective
    if objective is not None:
        with _told(f"Job.objective fails {where}", given, lambda error: _advice(error, model, batch, None)):
            value = objective(model, (batch.inputs, batch.targets))
        loss = value[0] if isinstance(value, tuple) and value else value
    if job.objective is None or (job.metrics and not training):
        with _told(f"the model fails {where}", given, lambda error: _advice(error, model, batch, None)):
            output = call_model(model, batch.inputs)
        given.append(f"output of the model {described(output)}")
    if job.loss is not None:
        with _told(f"Job.loss fails {where}", given, lambda error: _advice(error, model, batch, output)):
            loss = job.loss(output, batch.targets)
    if training and isinstance(loss, Tensor) and not loss.requires_grad:
        what = "loss" if job.objective is None else "objective"
        raise _Fails(
            f"Job.{what} gives a number that does not depend on the model's parameters {where}: nothing could be trained. "
            "Compute it from the model's output, without detach(), item(), no_grad() or argmax() on the way"
        )
    for name, metric in job.metrics.items() if not training else ():
        with _told(f"metric {name!r} fails {where}", given):
            as_pair(metric(output, batch.targets), batch.count, name)


@contextmanager
def _told(what: str, given: list[str], advice: Callable[[Exception], str] = lambda error: "") -> Iterator[None]:
    try:
        yield
    except JobError:
        raise  # ours, about what a metric returned
    except (MemoryError, ShardwiseError) as error:
        raise _NoVerdict from error
    except Exception as error:
        if "process group" in str(error).lower():  # it talks to other ranks itself
            raise _NoVerdict from error
        hint = advice(error)
        raise _Fails(
            f"{what}:\n\n{user_traceback(error)}\n\n" + "".join(f"  {line}\n" for line in given) + hint
        ) from error


def _advice(error: Exception, model: nn.Module, batch: Batch, output: Any) -> str:
    """What most often makes such shapes and types fail; empty where nothing is known."""
    weights = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    numbers = {leaf.dtype for leaf in tree_leaves(batch.inputs) if isinstance(leaf, Tensor)}
    if output is None:
        wrong = {dtype for dtype in numbers if dtype in (torch.float64, torch.float16, torch.uint8)} - weights
        if wrong and torch.float32 in weights:
            return (
                f"The model computes in float32 and its inputs are {_short(wrong.pop())}: give float32 "
                '(x.float(), array.astype("float32")), or the transform shardwise.data.ToFloat()'
            )
        return ""
    targets = batch.targets
    if isinstance(targets, Tensor) and isinstance(output, Tensor) and targets.dim() == output.dim() - 1:
        if targets.dtype != torch.int64:
            return 'Class numbers are int64: targets.long(), array.astype("int64"); of a table, name the target in categorical='
        if isinstance(error, IndexError):
            return (
                f"Classes are numbered from 0: an output of {output.shape[1]} classes takes 0 to {output.shape[1] - 1}"
            )
    if isinstance(targets, Tensor) and targets.dtype == torch.float64:
        return 'The model computes in float32 and its targets are float64: give float32 (y.float(), array.astype("float32"))'
    return ""


def described(tree: Any) -> str:
    """Types and shapes of tensors, and the range of whole numbers, on one line."""
    leaves = tree_leaves(tree)
    if not leaves:
        return "none"
    texts = [_leaf(leaf) for leaf in leaves[:NAMED_LEAVES]] + ["..."] * (len(leaves) > NAMED_LEAVES)
    return texts[0] if isinstance(tree, Tensor) else f"{type(tree).__name__} of {', '.join(texts)}"


def _leaf(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    text = f"{_short(leaf.dtype)} {tuple(leaf.shape)}"
    if leaf.numel() and not leaf.is_floating_point() and not leaf.is_complex() and leaf.dtype != torch.bool:
        text += f" from {int(leaf.min())} to {int(leaf.max())}"
    return text


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _precision(plan: Plan) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16) if plan.precision == "bf16" else nullcontext()
