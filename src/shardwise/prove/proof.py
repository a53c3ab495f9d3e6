"""`prove`: is a plan's run the serial run? The serial runs, the candidate, the comparison, the culprit."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from shardwise.data.source import Splits, as_splits
from shardwise.errors import RunFailed, ShardwiseError, UserError
from shardwise.prove.compare import MULTIPLE, Yardstick, norm, wide, worst_of_each_kind
from shardwise.prove.diagnose import diagnose
from shardwise.prove.distance import measured_distance
from shardwise.prove.evaluation import not_compared
from shardwise.prove.evidence import Evidence, listed
from shardwise.prove.execute import Setting, measure, refuse
from shardwise.prove.pieces import Pieces, read_pieces, write_pieces
from shardwise.prove.record import Record
from shardwise.prove.runs import Fault
from shardwise.prove.trial import Trial, look_again, run_trial
from shardwise.run.apart import call_in_child
from shardwise.run.checkpoint import warm_up
from shardwise.run.choose import choose_device, usable_cores
from shardwise.run.launch import current_rank, print_report
from shardwise.run.options import TrainOptions, resolve_plan
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan
from shardwise.spec.verdict import Finding, Verdict

_MOST_FAILED = 50


def prove(
    job: Job,
    plan: Plan | str | Path | None = None,
    *,
    steps: int = 3,
    device: str = "cpu",
    threads: int | None = None,
    recompute: str | None = None,
    reference: Callable[[], Job] | None = None,
    resume: bool = False,
    timeout_seconds: float = 600.0,
    report: Callable[[str], None] = print_report,
    fault: Fault | None = None,
) -> Verdict:
    """Run the job serially in float64 and float32, and under the plan, and compare.

    Args:
        job: what to train; random layers are switched off for the proof.
        plan: a `Plan`, a layout in text form, the path of a plan file, or None for the plan that training would take.
        steps: optimizer steps of each run; where the data allow it, the last one is on the short batch that ends an epoch.
        device: `cpu`, or the name of an accelerator or `auto`.
        threads: compute threads per worker.
        recompute: instead of what the plan says.
        reference: picklable function that builds the job again, for workers that cannot inherit it (on accelerators).
        resume: save a checkpoint after half of the plan's steps, and take the others with everything built anew from it.
        timeout_seconds: how long a collective may wait for a missing rank.
        report: receives messages for people, such as the traceback of a worker.
        fault: changes each worker's assembled run; only to see the proof fail.

    Raises:
        UserError: the job or plan is wrong, or does not run in float64; nothing is said about the result.
        RunFailed: a worker failed.
    """
    began = time.perf_counter()
    settled = settle(job, plan, device=device, threads=threads, recompute=recompute)
    refuse(job, settled)
    with tempfile.TemporaryDirectory(prefix="shardwise-proof-") as folder:
        setting = make_setting(
            job,
            Path(folder),
            steps=steps,
            device=device,
            reference=reference,
            resume=resume,
            timeout_seconds=timeout_seconds,
            report=report,
            fault=fault,
        )
        yardstick, notes = measure(setting, settled)
        verdict = judge_any(setting, settled, yardstick, notes)
    return replace(verdict, seconds=time.perf_counter() - began)


def prove_before_training(job: Job, plan: Plan | str | Path | None, **options: Any) -> Verdict:
    """As `prove`, for `train --prove`: nothing is trained under a plan that is not proved.

    Raises:
        RunFailed: the verdict is another one; the message is the verdict.
    """
    verdict = prove(job, plan, **options)
    if not verdict.proved:
        raise RunFailed(f"nothing was trained, because the plan was not proved:\n{verdict}")
    return verdict


def settle(
    job: Job, plan: Plan | str | Path | None, *, device: str, threads: int | None, recompute: str | None = None
) -> Plan:
    """The plan as training would take it.

    Raises:
        PlanError: it is malformed or does not fit the machine.
        UserError: this process is already a rank.
    """
    if current_rank() is not None:
        raise UserError("prove starts its workers itself: run it once, in a plain process, without torchrun")
    options = TrainOptions(plan=plan, threads=threads, recompute=recompute)
    return resolve_plan(job, options, device=choose_device(device), world=None)


def make_setting(
    job: Job,
    folder: Path,
    *,
    steps: int,
    device: str = "cpu",
    reference: Callable[[], Job] | None = None,
    resume: bool = False,
    timeout_seconds: float = 600.0,
    report: Callable[[str], None] = print_report,
    fault: Fault | None = None,
) -> Setting:
    """What all runs of a proof have in common.

    Raises:
        UserError: a number makes no sense.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: a proof compares at least 1 optimizer step")
    if resume:
        if steps < 2:
            raise UserError(f"resume with steps={steps}: a checkpoint in the middle takes at least 2 optimizer steps")
        warm_up().join()  # here once, or in every worker
    splits: Splits = as_splits(job.data)
    return Setting(
        job=job,
        splits=splits,
        reference=reference,
        steps=steps,
        device=choose_device(device),
        folder=folder,
        cores=usable_cores(),
        timeout_seconds=timeout_seconds,
        report=report,
        fault=fault,
        resumes=resume,
    )


def judge_any(setting: Setting, plan: Plan, yardstick: Yardstick, notes: Sequence[str]) -> Verdict:
    """As `judge`; of a plan with an inexact saver, the verdict without it, and if that is good, the distance with it."""
    verdict = judge(setting, plan.exact(), yardstick, notes)
    if plan.exact() == plan or not verdict.proved:
        return verdict
    trial = run_trial(replace(setting, resumes=False), replace(plan, precision="fp32", compile=False), yardstick)
    return measured_distance(verdict, plan, yardstick, trial.candidate, trial.comparisons, trial.faults)


def judge(setting: Setting, plan: Plan, yardstick: Yardstick, notes: Sequence[str]) -> Verdict:
    """The verdict on one plan, given the serial runs."""
    began = time.perf_counter()
    compared = replace(plan, precision="fp32", compile=False)
    trial = run_trial(setting, compared, yardstick)
    notes = list(notes)
    reason = _not_comparable(setting.job, plan, trial, yardstick)
    findings: list[Finding] = []
    if reason is None:
        look = look_again(setting, compared, trial, yardstick)
        trial, yardstick, reason = look.trial, look.yardstick, look.disagree
        notes += look.notes
        if reason is not None:
            reason += _drawn(yardstick)
    if reason is not None:
        findings.append(Finding(pattern="not comparable", message=reason))
    elif not trial.passed:
        findings += _culprits(setting, compared, trial, yardstick)
    outcome = "not comparable" if reason is not None else ("proved" if trial.passed else "refuted")
    counts: dict[str, int] = {}
    for item in trial.comparisons:
        counts[item.kind] = counts.get(item.kind, 0) + 1
    samples = tuple(len(step) for step in yardstick.exact.reports[0].samples)
    return Verdict(
        outcome=outcome,  # type: ignore[arg-type]
        job=setting.job.name,
        plan=str(plan),
        layout=str(plan.layout),
        workers=plan.layout.workers,
        steps=len(samples),
        samples=samples,
        compared={"initial weight": _count_initial(trial.candidate), **counts},
        worst=worst_of_each_kind(trial.comparisons),
        failed=tuple(trial.failed[:_MOST_FAILED]),
        failed_count=len(trial.failed),
        multiple=MULTIPLE,
        serial_runs=len(yardstick.serial),
        findings=tuple(findings),
        guards=tuple(trial.guards),
        not_covered=tuple(_not_covered(plan, setting, trial.candidate, yardstick)),
        notes=tuple(notes),
        seconds=time.perf_counter() - began,
    )


def _culprits(setting: Setting, plan: Plan, trial: Trial, yardstick: Yardstick) -> list[Finding]:
    if setting.resumes:
        setting = replace(setting, resumes=False)
        whole = run_trial(setting, plan, yardstick)
        if whole.passed:
            return [_lost(trial)]
        trial = whole
    pieces, failure = _pieces(setting, plan)
    evidence = Evidence(
        layout=plan.layout,
        candidate=trial.candidate,
        yardstick=yardstick,
        failed=trial.failed,
        pieces=pieces,
        clip_norm=None if setting.job.turns else setting.job.sole_clip_norm,
        initial=trial.initial,
        sample_faults=trial.sample_faults,
        aliases=yardstick.exact.aliases,
    )
    findings = diagnose(evidence)
    axes, text = blame_axes(setting, plan, yardstick)
    named = [replace(finding, axes=finding.axes or axes) for finding in findings]
    if text:
        named.append(Finding(pattern="axis", message=text, axes=axes))
    if failure:
        named.append(Finding(pattern="no parts", message=failure))
    return named


def _lost(trial: Trial) -> Finding:
    """What a checkpoint did not give back, of a plan that is right without one."""
    lost = list(dict.fromkeys(key for report in trial.candidate.reports for key in report.lost))
    if lost:
        what = f"what was read from it is not what was saved: {listed(lost)}"
    else:
        what = (
            "all tensors and numbers came back, so the training depends on something that a checkpoint does not hold, such as a "
            "Python attribute of a module (register a buffer, or give the module get_extra_state)"
        )
    message = f"the same steps without a checkpoint in the middle pass; {what}"
    return Finding(pattern="checkpoint", message=message, parameters=tuple(lost))


def blame_axes(setting: Setting, plan: Plan, yardstick: Yardstick) -> tuple[tuple[str, ...], str]:
    """The smallest part of the layout that fails as well, found by running the plan without some of its axes."""
    degrees = {axis: degree for axis, degree in plan.layout.degrees.items() if degree > 1}
    if not degrees:
        return (), ""
    if _fails(setting, plan.with_layout(Layout()), yardstick):
        return (
            (),
            "the same plan on one worker fails as well: no axis is to blame, but its other settings (micro_batch)",
        )
    if len(degrees) == 1:
        return tuple(degrees), f"one worker alone passes: {next(iter(degrees))} is to blame"
    for count in range(1, len(degrees)):
        parts = [{axis: degrees[axis] for axis in axes} for axes in combinations(degrees, count)]
        wrong = [part for part in parts if _fails(setting, plan.with_layout(Layout(**part)), yardstick)]
        if wrong:
            axes = tuple(axis for axis in degrees if any(axis in part for part in wrong))
            layouts = " and ".join(str(Layout(**part)) for part in wrong)
            each = "each by itself fails" if len(wrong) > 1 else "alone fails"
            return axes, f"layout {layouts} {each} as well: {' and '.join(axes)} is to blame"
    names = " and ".join(degrees)
    return tuple(degrees), f"each part of the layout alone passes: the combination of {names} is to blame"


def _fails(setting: Setting, plan: Plan, yardstick: Yardstick) -> bool:
    """Whether a smaller plan fails too; one that cannot run says nothing."""
    try:
        refuse(setting.job, plan)
        return not run_trial(setting, plan, yardstick).passed
    except ShardwiseError:
        return False


def _pieces(setting: Setting, plan: Plan) -> tuple[Pieces | None, str]:
    """The parts of the first batch; or why the job cannot be run in parts, which takes a clue away and nothing else."""
    task = setting.task("pieces of the batch", Plan(threads=plan.threads), double=True)
    worker = functools.partial(
        write_pieces,
        task=task,
        replicas=plan.layout.replicas,
        micro_batch=plan.micro_batch,
        shares=plan.shares or None,
    )
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            pool.submit(call_in_child, worker, threads=plan.threads or 1, device=setting.device).result()
    except ShardwiseError as error:
        return None, f"parts of the batch could not be looked at by themselves ({error})"
    return read_pieces(Path(task.folder)), ""


def _not_comparable(job: Job, plan: Plan, trial: Trial, yardstick: Yardstick) -> str | None:
    """Why the plan cannot equal a serial run, or the runs cannot be compared at all."""
    report = trial.candidate.reports[0]
    split = plan.layout.replicas > 1 or plan.micro_batch is not None
    if job.batch_norm == "local" and report.has_batch_norm and split:
        return "Job.batch_norm='local' normalises over each worker's own samples: by design not the serial run"
    if yardstick.drawn:
        return (
            f"the result depends on random numbers that a step draws ({listed(sorted(yardstick.drawn))}): serial runs with "
            "the least and the greatest of them differ, and each worker draws its own"
        )
    serial, exact = yardstick.serial[0], yardstick.exact
    square = total = 0.0
    for name, values in exact.starting_with("gradient/"):
        other = serial.first(f"gradient/{name}")
        square += norm(values[0] if other is None else wide(values[0]) - wide(other)) ** 2
        total += norm(values[0]) ** 2
    if square > 1e-4 * total:
        return (
            f"serial float32 is {(square / total) ** 0.5:.1e} of the gradient away from serial float64: two serial runs do not "
            f"agree, so that no parallel run can{_drawn(yardstick)}"
        )
    return None


def _drawn(yardstick: Yardstick) -> str:
    """The random numbers that may be why serial runs differ."""
    random = yardstick.serial[0].reports[0].random
    return f"; a step draws random numbers ({listed(sorted(random))})" if random else ""


def _not_covered(plan: Plan, setting: Setting, candidate: Record, yardstick: Yardstick) -> list[str]:
    report = yardstick.serial[0].reports[0]
    found = []
    silenced = [*report.modules, *sorted(report.silenced)]
    if silenced:
        found.append(f"random layers, which were switched off ({listed(silenced)})")
    if report.random:
        found.append(f"random numbers that a step draws ({listed(sorted(report.random))})")
    found += not_compared(yardstick)
    if plan.precision == "bf16":
        found.append("bf16: the plan was run in float32")
    if plan.compile:
        found.append("torch.compile: the plan was run without it")
    if setting.device == "cpu":
        found.append("kernels and collectives of accelerators: all runs were on the CPU")
    noise = sorted(yardstick.noise_only)
    if noise:
        found.append(
            f"digits of {listed(noise)}, whose gradients are zero but for rounding: compared up to how far rounding moves them"
        )
    return found


def _count_initial(candidate: Record) -> int:
    return sum(1 for _ in candidate.starting_with("initial/model/"))
