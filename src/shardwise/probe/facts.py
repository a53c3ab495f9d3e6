"""A job as the planner sees it, counted in a step: a real one of few samples, or one on fake tensors that hold no memory."""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shardwise.data.batch import Batch, tree_map
from shardwise.data.loader import batches
from shardwise.data.source import Splits
from shardwise.dist.collectives import Group
from shardwise.errors import PlanError, RunFailed, ShardwiseError
from shardwise.nn.experts import modules_with_experts
from shardwise.nn.moe import MoE
from shardwise.parallel.compose import READY_AXES
from shardwise.parallel.norm import batch_norms
from shardwise.probe.blocks import block_names, model_facts, operations_of, owners, parameter_bytes
from shardwise.probe.count import Counted, counting
from shardwise.probe.length import first_samples, serial_plan
from shardwise.probe.operations import size_bytes, tensors_in
from shardwise.probe.place import this_place
from shardwise.run.apart import call_in_child, fall_first, in_thread
from shardwise.run.assemble import Assembly, assemble
from shardwise.run.build import build_model
from shardwise.run.cores import usable_cores
from shardwise.run.gauge import peak_memory_bytes
from shardwise.run.loop import total_steps
from shardwise.run.step import take_step
from shardwise.run.tryout import SAMPLES, loss_program
from shardwise.spec.job import Job
from shardwise.spec.rank import Rank
from shardwise.spec.work import CutFacts, GradientFacts, JobFacts, StepSeen

ENOUGH_SECONDS = 0.1
"""Time spent on timing steps of one size, after one to warm up."""

THREADS_SECONDS = 0.4
"""The same with a thread on every core."""

SLOW_SECONDS = 1.5
"""A step that takes longer is not repeated, and larger ones are not tried."""

RISING = 1.05
"""From so many times as long a sample of the next larger step on, all sizes are timed again (eleven models: at most 1.04,
2026-11-26)."""

MOST_AGAIN = 3

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Counting:
    """How to count.

    Attributes:
        fake: on tensors without memory; nothing is timed then.
        thorough: also ask what can be split and sharded, which loads more of torch.
    """

    fake: bool = False
    thorough: bool = True


def facts_apart(
    job: Job, splits: Splits, *, fake: bool = False, thorough: bool = True, timeout_seconds: float | None = None
) -> JobFacts:
    """Count `job` in a process of its own, which ends with all that it allocated. The calling process runs no operation.

    Args:
        job: what to train.
        splits: its data, read already.
        fake: count on fake tensors, and in a real step only where these do not work.
        thorough: also find out what can be split and sharded; False answers sooner, for data parallelism alone.
        timeout_seconds: longest time for a real step; None waits for it.

    Raises:
        ShardwiseError: the job itself fails, or its process died or took too long.
    """
    how = Counting(fake=fake, thorough=thorough)

    def apart(how: Counting) -> JobFacts:
        work = functools.partial(_count, job=job, splits=splits, how=how)
        return in_thread(lambda: call_in_child(work, threads=1, device="cpu", timeout_seconds=timeout_seconds))

    if not fake:
        return _wide_apart(apart(how), job, splits, timeout_seconds)
    try:
        return apart(how)
    except ShardwiseError as error:
        first = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        real = apart(replace(how, fake=False))  # on another machine threads of this one mean nothing
        note = f"counted in a real step, because fake tensors did not work: {first}"
        return replace(real, model=replace(real.model, notes=(*real.model.notes, note)))


def _count(rank: Rank, *, job: Job, splits: Splits, how: Counting) -> JobFacts:
    fall_first()
    if how.fake:
        from torch._subclasses.fake_tensor import FakeTensorMode

        batch = first_samples(splits, job.batch_size)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assembly = assemble(job, serial_plan(job), Group(), _CPU, total_steps=None)
            fakes = [_on(part, mode.from_tensor) for part in _sizes(batch)]
            return _facts(assembly, splits, fakes, how)
    assembly = assemble(job, serial_plan(job), Group(), _CPU, total_steps=None)
    batch = first_samples(splits, max(1, min(job.batch_size, -(-job.batch_size // 4))))
    took = _seconds(assembly, batch)
    sizes = [batch]
    if took * 4 < SLOW_SECONDS and job.batch_size > batch.count:
        sizes.append(first_samples(splits, job.batch_size))
    elif batch.count > 1:
        sizes.insert(0, _cut(batch, -(-batch.count // 2)))
    return _facts(assembly, splits, sizes, how)


def _facts(assembly: Assembly, splits: Splits, sizes: list[Batch], how: Counting) -> JobFacts:
    job, model = assembly.job, assembly.model
    seen: list[StepSeen] = []
    resident, notes = 0.0, []
    if how.fake:
        take_step(assembly, sizes[-1])  # the optimizer makes its states in the first step
    else:
        seen = _steps_seen(assembly, _timed(sizes))
        resident = float(peak_memory_bytes(_CPU))  # before counting, which loads more of torch
    low, high = (_counted(assembly, batch) for batch in (sizes[0], sizes[-1]))
    states = sum(size_bytes(tensor) for tensor in tensors_in(list(assembly.optimizer.state.values())))
    base = max(0.0, resident - parameter_bytes(model) - states - high.peak_bytes)
    names = block_names(model, high.calls)
    operations, alike = operations_of(low, high, lambda calls: owners(names, calls))
    if not alike:
        notes.append("steps of two sizes called different operations: the larger one counts, in proportion to its size")
    asked = how.thorough and "tensor" in READY_AXES
    split, reason = _tensor_names(job, splits, fake=how.fake) if asked else (frozenset[str](), None)
    if reason is not None:
        notes.append(reason)
    cuts = _possible_cuts(job, splits, names, fake=how.fake) if how.thorough and "pipeline" in READY_AXES else ()
    slope = max(0.0, (high.peak_bytes - low.peak_bytes) / max(1, high.samples - low.samples))
    fixed = max(0.0, high.peak_bytes - slope * high.samples)
    return JobFacts(
        model=model_facts(
            model,
            job.name,
            names,
            low,
            high,
            operations,
            split,
            tuple(notes),
            origin="counted on fake tensors" if how.fake else "counted in a real step",
        ),
        operations=tuple(operations),
        batch_size=job.batch_size,
        steps=total_steps(splits, job.batch_size, epochs=job.epochs, steps=job.steps),
        peak_fixed_bytes=fixed,
        peak_sample_bytes=slope,
        optimizer_bytes=float(states),
        gradient_bytes=float(sum(size_bytes(p) for p in model.parameters() if p.requires_grad)),
        parameter_bytes=parameter_bytes(model),
        expert_bytes=_expert_bytes(model),
        shard_units=_shard_units(model) if how.thorough else 0,
        expert_layers=len(modules_with_experts(model)),
        expert_token_bytes=_expert_token_bytes(model, high),
        message_parts=sum(1 for p in model.parameters() if p.requires_grad),
        gradients=_gradients(model),
        cuts=cuts,
        norm_layers=len(batch_norms(model)) if job.batch_norm == "global" else 0,
        attention_bytes=high.attention_bytes / high.samples,
        data_seconds=0.0 if how.fake else _data_seconds(splits, job),
        data_whole=splits.train.whole,
        base_bytes=base,
        seen=tuple(seen),
        place={} if how.fake else this_place(),
        clip=job.clip_norm is not None,
    )


def _counted(assembly: Assembly, batch: Batch) -> Counted:
    with counting(assembly.model, batch.count) as mode:

        def update_begins() -> None:
            mode.updating = True

        take_step(assembly, batch, on_gradients=update_begins)
    return mode.counted


def _steps_seen(assembly: Assembly, sizes: list[Batch]) -> list[StepSeen]:
    """What steps of these sizes take.

    A sample of a larger step takes no longer, as a rule. Where it seems to, others may have used the core meanwhile, and all
    sizes are timed again; the fastest counts.
    """
    best = [_seconds(assembly, batch) for batch in sizes]
    for _ in range(MOST_AGAIN):
        each = [seconds / batch.count for seconds, batch in zip(best, sizes, strict=True)]
        if max(best) > SLOW_SECONDS or all(more < RISING * less for less, more in itertools.pairwise(each)):
            break
        best = [min(seconds, _seconds(assembly, batch)) for seconds, batch in zip(best, sizes, strict=True)]
    return [StepSeen(samples=batch.count, seconds=s, threads=1) for batch, s in zip(sizes, best, strict=True)]


def _seconds(assembly: Assembly, batch: Batch, *, enough: float = ENOUGH_SECONDS, most: int = 10) -> float:
    """Seconds of one step: the fastest of a few after the first; `most` at most, for about `enough` seconds."""
    began = time.perf_counter()
    take_step(assembly, batch)
    took = time.perf_counter() - began
    if took > SLOW_SECONDS:
        if took > 4 * SLOW_SECONDS:
            return took
        began = time.perf_counter()  # the first one may have been slow for what it found new: pages of large parameters
        take_step(assembly, batch)
        return min(took, time.perf_counter() - began)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or (time.perf_counter() - began < enough and len(times) < most):
        start = time.perf_counter()
        take_step(assembly, batch)
        times.append(time.perf_counter() - start)
    return min(times)


def _timed(sizes: list[Batch]) -> list[Batch]:
    """What is timed: both sizes that are counted, and one between them where they are far from each other."""
    low, high = sizes[0], sizes[-1]
    if low is high:
        return [high]
    middle = _cut(high, -(-high.count // 2))
    return [low, middle, high] if low.count < middle.count < high.count else [low, high]


def _wide_apart(facts: JobFacts, job: Job, splits: Splits, timeout_seconds: float | None) -> JobFacts:
    """The largest step that was seen, with a thread on every core too: other kernels may be chosen then, and do better or
    worse with threads than rates of single operations tell."""
    cores = usable_cores()
    largest = max(facts.seen, key=lambda seen: seen.samples)
    if cores == 1 or largest.seconds > SLOW_SECONDS:
        return facts
    work = functools.partial(_wide, job=job, splits=splits, samples=largest.samples, threads=cores)
    # In a process of its own: one that began with fewer threads may wait for each other for long after a change.
    try:
        seen = in_thread(lambda: call_in_child(work, threads=cores, device="cpu", timeout_seconds=timeout_seconds))
    except RunFailed:  # it took too long: rates of single operations answer for several threads
        return facts
    return replace(facts, seen=(*facts.seen, seen))


def _wide(rank: Rank, *, job: Job, splits: Splits, samples: int, threads: int) -> StepSeen:
    assembly = assemble(job, serial_plan(job), Group(), _CPU, total_steps=None)
    batch = first_samples(splits, samples)
    # Threads wait for each other in every operation: it takes more steps until one is undisturbed.
    seconds = _seconds(assembly, batch, enough=THREADS_SECONDS, most=100)
    return StepSeen(samples=batch.count, seconds=seconds, threads=threads)


def _sizes(batch: Batch) -> list[Batch]:
    return [_cut(batch, -(-batch.count // 2)), batch] if batch.count > 1 else [batch]


def _cut(batch: Batch, size: int) -> Batch:
    part = batch.split(size)[0]
    return replace(part, global_count=part.count)


def _on(batch: Batch, convert: Any) -> Batch:
    return replace(
        batch,
        inputs=tree_map(convert, batch.inputs),
        targets=None if batch.targets is None else tree_map(convert, batch.targets),
    )


def _data_seconds(splits: Splits, job: Job) -> float:
    """Seconds of reading one sample in the training's own way, without reading ahead."""
    times: list[float] = []
    stream = batches(
        splits.train, batch_size=job.batch_size, seed=job.seed, epoch=0, shuffle=job.shuffle, stop=4, prefetch=0
    )
    with closing(stream):
        began = time.perf_counter()
        for batch in _until_slow(stream):
            times.append((time.perf_counter() - began) / max(1, batch.count))
            began = time.perf_counter()
    return min(times) if times else 0.0


def _until_slow(stream: Iterator[Batch]) -> Iterator[Batch]:
    began = time.perf_counter()
    return itertools.takewhile(lambda batch: time.perf_counter() - began < SLOW_SECONDS, stream)


def _shard_units(model: nn.Module) -> int:
    from shardwise.parallel.shard import unit_names  # FSDP2 takes a second to import

    return len(unit_names(model))


def _gradients(model: nn.Module) -> tuple[GradientFacts, ...]:
    shapes = Counter(
        (p.shape[0] if p.ndim > 1 else 1, p.numel() // max(1, p.shape[0] if p.ndim > 1 else 1), p.element_size())
        for p in model.parameters()
        if p.requires_grad and p.numel()
    )
    return tuple(
        GradientFacts(rows=rows, columns=columns, value_bytes=size, count=count)
        for (rows, columns, size), count in shapes.items()
    )


def _expert_bytes(model: nn.Module) -> float:
    found = {
        id(parameter): size_bytes(parameter)
        for _, module, declared in modules_with_experts(model)
        for parameter in (module.get_parameter(name) for name in declared.names)
    }
    return float(sum(found.values()))


def _expert_token_bytes(model: nn.Module, counted: Counted) -> float:
    """Bytes of tokens of one sample that go to experts: a layer's output has their size; each goes to `top_k` experts."""
    total = 0.0
    for name, module, _ in modules_with_experts(model):
        visits = module.top_k if isinstance(module, MoE) else 1
        total += visits * counted.output_bytes.get(name, 0.0)
    return total / counted.samples


def _tensor_names(job: Job, splits: Splits, *, fake: bool) -> tuple[frozenset[str], str | None]:
    """Parameters that tensor parallelism can split, or why there are none."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from shardwise.parallel.tensor.find import find_split

    # A trial looks at values, which fake tensors refuse; on the meta device it does without them.
    with unset_fake_temporarily(), torch.device("meta" if fake else "cpu"):
        model, batch = build_model(job, None if fake else _CPU), first_samples(splits, 2)
    try:
        with unset_fake_temporarily():
            program = loss_program(job, batch.to(torch.device("meta")) if fake else batch)
            return frozenset(find_split(model, program, 2).shares), None
    except PlanError as error:
        return frozenset(), str(error)


def _possible_cuts(job: Job, splits: Splits, blocks: Sequence[str], *, fake: bool) -> tuple[CutFacts, ...]:
    """Where a pipeline may cut the model and what would cross there, for one sample; none where it cannot be cut."""
    if job.turns:  # a pipeline follows one objective through the model
        return ()
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    from shardwise.parallel.pipeline.stages import possible_cuts  # tracing takes half a second to import

    device = torch.device("meta" if fake else "cpu")
    with unset_fake_temporarily():
        with device:
            model, batch = build_model(job, None if fake else _CPU), first_samples(splits, SAMPLES).to(device)
        try:
            plan = serial_plan(job)
            found = possible_cuts(model, plan, batch.inputs, batch.targets, job.sole_objective, blocks, device=device)
        except (PlanError, RuntimeError):  # a check of the plan will say why; others it can be priced without
            return ()
    return tuple(
        replace(cut, sent_bytes=cut.sent_bytes / batch.count, returned_bytes=cut.returned_bytes / batch.count)
        for cut in found
    )
