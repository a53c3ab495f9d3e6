"""Evaluation of a split in parallel, every sample counted exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardwise.data.batch import Batch
from shardwise.data.loader import eval_batches
from shardwise.data.source import Source
from shardwise.run.alike import alike, next_batch
from shardwise.run.assemble import Assembly
from shardwise.run.pair import as_pair
from shardwise.run.step import autocast, own_tokens, seeing_whole
from shardwise.run.tryout import call_model
from shardwise.run.weigh import weight_function
from shardwise.spec.job import Job

if TYPE_CHECKING:
    from shardwise.parallel.pipeline.stages import Stages

LOSS = "loss"
"""Name under which the mean loss over the split is reported beside the job's metrics."""


def loss_names(job: Job) -> tuple[str, ...]:
    """Names of what an evaluation sums up before the metrics: of several objectives, or the one of the loss."""
    return job.turns or (LOSS,)


def evaluate(assembly: Assembly, source: Source) -> tuple[dict[str, float], int]:
    """Loss and metrics over a whole split. Collective: every rank takes its part, one sum brings them together.

    Returns:
        Name -> value, and the number of samples in the split.

    Raises:
        JobError: a metric returns something else than a scalar or a (sum, count) pair.
    """
    totals = evaluation_sums(assembly, source)
    values = {
        name: (float(row[0] / row[1]) if row[1] else float("nan"))
        for name, row in zip([*loss_names(assembly.job), *assembly.job.metrics], totals.cpu(), strict=False)
    }
    return values, int(totals[-1, 0].item())


@torch.no_grad()
def evaluation_sums(
    assembly: Assembly,
    source: Source,
    *,
    start: int = 0,
    stop: int | None = None,
    part: tuple[int, int] | None = None,
) -> Tensor:
    """What `evaluate` divides: one (sum, count) row for each loss and each metric, and the number of samples in a last row.

    Args:
        start, stop: batches to look at; None for all to the end.
        part: (index, number of parts) of each batch; None for this rank's.
    """
    a = assembly
    a.average()
    # Restored one by one: a module that the user keeps in evaluation mode (frozen statistics) stays there.
    modes = [(module, module.training) for module in a.model.modules()]
    a.model.eval()
    totals = torch.zeros((len(loss_names(a.job)) + len(a.job.metrics) + 1, 2), dtype=torch.float64, device=a.device)
    rank, ranks = part or (a.samples.rank, a.samples.size)
    stream = eval_batches(
        source,
        batch_size=a.job.eval_batch_size or a.job.batch_size,
        rank=rank,
        ranks=ranks,
        start=start,
        stop=stop,
        prefetch=0 if a.device.type == "cpu" else 2,
    )
    stream = alike(stream, source, a.world, a.samples, a.device)
    batches = iter(lambda: next_batch(stream, a.samples, a.device), None)
    try:
        if a.composed.stages is not None:
            _through_stages(a, a.composed.stages, batches, totals)
        else:
            _on_whole_model(a, batches, totals)
    finally:
        for module, training in modes:
            module.training = training
    a.reports.sum_(totals)
    if a.plan.layout.shard > 1:
        from shardwise.parallel.shard import split_again  # FSDP2 takes most of a second to load

        split_again(a.model)
    return totals


def _on_whole_model(a: Assembly, batches: Iterator[Batch], totals: Tensor) -> None:
    """Add up over all batches."""
    objectives = [turn.objective for turn in a.turns.values() if turn.objective is not None]
    once = a.mesh.coordinate("context") == 0  # whole outputs are the same on all ranks of the context axis
    for batch in batches:
        a.composed.state.phantom = batch.phantom
        if batch.count == 0:
            if a.composed.forward_communicates:
                # As often as the ranks with samples do: each pass holds collectives.
                mine = own_tokens(a, batch).to(a.device)
                for objective in objectives:  # which parts of the model it calls, it alone knows
                    seeing_whole(a, objective, a.model, (mine.inputs, mine.targets))
                if not objectives or a.job.metrics:
                    call_model(a.model, mine.inputs)
            continue
        batch = batch.to(a.device)
        mine = own_tokens(a, batch)
        with autocast(a):
            for row, objective in enumerate(objectives):
                value = seeing_whole(a, objective, a.model, (mine.inputs, mine.targets))
                totals[row] += as_pair(value, batch.count * a.token_share, LOSS).to(a.device)
            if objectives:
                output = call_model(a.model, mine.inputs) if a.job.metrics else None
            else:
                output = whole_output(a, call_model(a.model, mine.inputs))
                if once:
                    _add_loss(a, totals, output, batch)
        if objectives and a.job.metrics:
            output = whole_output(a, output)
        if once:
            _add_metrics(totals[max(1, len(objectives)) :], a.job.metrics, output, batch.targets, batch.count)
            totals[-1, 0] += batch.count


def _through_stages(a: Assembly, stages: Stages, batches: Iterator[Batch], totals: Tensor) -> None:
    """Add up over all batches on the rank of the last stage. A few batches at a time, so that stages overlap."""
    while few := [batch.to(a.device) for batch in islice(batches, 2 * stages.group.size)]:
        if not a.composed.forward_communicates:
            few = [batch for batch in few if batch.count]
        _evaluate_few(a, stages, few, totals)


def _evaluate_few(a: Assembly, stages: Stages, few: list[Batch], totals: Tensor) -> None:
    once = a.mesh.coordinate("context") == 0
    mine = [own_tokens(a, batch) for batch in few]

    def walk_into(index: int) -> None:
        a.composed.state.phantom = few[index].phantom

    def add_value(value: Any, index: int) -> None:
        if few[index].count:
            totals[0] += as_pair(value, few[index].count * a.token_share, LOSS).to(a.device)

    def add_output(output: Any, index: int) -> None:
        batch, output = few[index], whole_output(a, output)
        if not batch.count or not once:
            return
        if not stages.own_loss:
            with autocast(a):
                _add_loss(a, totals, output, batch)
        _add_metrics(totals[1:], a.job.metrics, output, batch.targets, batch.count)

    if stages.own_loss:
        pairs = [(batch.inputs, batch.targets) for batch in mine]
        stages.runner.evaluate(pairs, add_value, on_micro_batch=walk_into)
    if a.job.metrics or not stages.own_loss:
        stages.outputs.evaluate([batch.inputs for batch in mine], add_output, on_micro_batch=walk_into)
    if stages.runner.has_output and once:
        totals[-1, 0] += sum(batch.count for batch in few)


def _add_loss(a: Assembly, totals: Tensor, output: Any, batch: Batch) -> None:
    assert a.job.loss is not None
    count = weight_function(a.job)
    weight = batch.count if count is None else float(count(batch.targets))
    if weight:
        totals[0] += as_pair(a.job.loss(output, batch.targets), weight, LOSS).to(a.device)


def whole_output(a: Assembly, output: Any) -> Any:
    """The output for whole sequences, of plain tensors: metrics may do anything with it."""
    if a.composed.split is not None:
        from shardwise.parallel.tensor.part import plain

        output = plain(output)
    return output if a.composed.context is None else a.composed.context.whole(output)


def _add_metrics(
    totals: Tensor, metrics: Mapping[str, Callable[[Any, Any], Any]], output: Any, targets: Any, count: int
) -> None:
    for row, (name, metric) in enumerate(metrics.items()):
        totals[row] += as_pair(metric(output, targets), count, name).to(totals.device)
