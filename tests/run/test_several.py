"""Trainings with several models, optimizers and objectives: equal to the loop by hand, kept, resumed, and refused in words."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from shardwise import errors
from shardwise.data.batch import Batch
from shardwise.parallel.several import Several
from shardwise.parallel.shard import check_shard
from shardwise.run.assemble import check_job
from shardwise.run.live import LiveRun
from shardwise.run.start import start
from shardwise.run.train import train
from shardwise.spec.events import StepsEvent, read_events
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

BATCH = 4


def pictures(samples: int = 22) -> Any:
    """(real, noise, mixing number) as inputs, classes as targets: what is drawn is data, so that no layout changes it."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(samples, 10, generator=generator) + 1
    noise, mixed = torch.randn(samples, 6, generator=generator), torch.rand(samples, 1, generator=generator)
    return (real, noise, mixed), (real.sum(1) > 10).long()


def generator() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(), nn.BatchNorm1d(16), nn.Linear(16, 10))


def discriminator() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.LeakyReLU(0.2), nn.BatchNorm1d(16), spectral_norm(nn.Linear(16, 1)))


def critic() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))


def against(output: Tensor, value: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, torch.full_like(output, value))


def tell_apart(model: Any, batch: Any) -> Tensor:
    (real, noise, _), _ = batch
    fake = model["G"](noise)  # no detach: this step does not train G
    return against(model["D"](real), 1.0) + against(model["D"](fake), 0.0)


def deceive(model: Any, batch: Any) -> Tensor:
    (_, noise, _), _ = batch
    return against(model["D"](model["G"](noise)), 1.0)


def penalised(model: Any, batch: Any) -> Tensor:
    """WGAN-GP (Gulrajani et al. 2017): the critic's gradient at points between real and made ones shall have norm 1."""
    (real, noise, mixed), _ = batch
    fake = model["G"](noise).detach()
    with torch.enable_grad():
        between = (mixed * real + (1 - mixed) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(model["D"](between).sum(), between, create_graph=True)
    penalty = ((slope.norm(dim=1) - 1) ** 2).mean()
    result: Tensor = model["D"](fake).mean() - model["D"](real).mean() + 10 * penalty
    return result


def raised(model: Any, batch: Any) -> Tensor:
    (_, noise, _), _ = batch
    result: Tensor = -model["D"](model["G"](noise)).mean()
    return result


class Aloof(nn.Module):
    """It can be called, and its objectives call its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.G, self.D = nn.Linear(6, 10), nn.Linear(10, 1)

    def forward(self, noise: Tensor) -> Tensor:
        made: Tensor = self.G(noise)
        return made

    def __getitem__(self, name: str) -> nn.Module:
        return self.get_submodule(name)


def aloof() -> Job:
    return gan(model=Aloof)


def aside(model: Any, batch: Any) -> Tensor:
    (_, noise, _), _ = batch
    return against(model["D"](model["G"](noise).detach()), 1.0)


def cosine(optimizer: Any, _: int | None) -> LRScheduler:
    return CosineAnnealingLR(optimizer, 12)


# An eps that is larger than rounding: by default Adam takes whole steps along gradients that are zero but for it.
def two(model: Any) -> dict[str, torch.optim.Optimizer]:
    return {
        "D": torch.optim.Adam(model["D"].parameters(), 1e-2, eps=1e-3),
        "G": torch.optim.AdamW(model["G"].parameters(), 2e-2, eps=1e-3),
    }


def gan(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "model": lambda: nn.ModuleDict({"G": generator(), "D": discriminator()}),
        "data": pictures(),
        "batch_size": BATCH,
        "epochs": 2,
        "objective": {"D": tell_apart, "G": deceive},
        "optimizer": two,
        "schedule": {"D": cosine},
        "clip_norm": {"D": 0.3},
    }
    return Job(**{**values, **changes})


def wgan(**changes: Any) -> Job:
    model = lambda: nn.ModuleDict({"G": nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 10)), "D": critic()})  # noqa: E731
    return gan(**{"model": model, "objective": {"D": penalised, "G": raised}, "micro_batch": 1, **changes})


class Pupil(nn.Module):
    """A net that learns from a frozen teacher and from its own moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)
        self.average = copy.deepcopy(self.body).requires_grad_(False)
        self.teacher = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 3)).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        seen = self.body(x)
        answer = self.head(seen)
        with torch.no_grad():
            return answer, seen, self.teacher(x), self.average(x)

    @torch.no_grad()
    def follow(self) -> None:
        for slow, fast in zip(self.average.parameters(), self.body.parameters(), strict=True):
            slow.lerp_(fast, 0.1)


def distilled(model: Any, batch: Any) -> Tensor:
    (real, _, _), classes = batch
    answer, seen, taught, before = model(real)
    kept = F.kl_div(F.log_softmax(answer / 2, 1), F.softmax(taught / 2, 1), reduction="batchmean") * 4
    return F.cross_entropy(answer, classes) + kept + F.mse_loss(seen, before)


def muon_and_adamw(model: Any) -> list[torch.optim.Optimizer]:
    inner = [p for p in model.body.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not other for other in inner)]
    return [torch.optim.SGD(inner, lr=0.05, momentum=0.9, nesterov=True), torch.optim.AdamW(rest, lr=0.01, eps=1e-3)]


def pupil(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "model": Pupil,
        "data": pictures(),
        "batch_size": BATCH,
        "epochs": 2,
        "objective": distilled,
        "optimizer": muon_and_adamw,
        "schedule": cosine,
        "clip_norm": 0.5,
    }
    return Job(**{**values, **changes})


def smooth(**changes: Any) -> Job:
    """Without BatchNorm."""
    return wgan(**{"objective": {"D": tell_apart, "G": deceive}, "micro_batch": None, **changes})


JOBS: dict[str, Callable[..., Job]] = {"gan": gan, "wgan": wgan, "smooth": smooth, "pupil": pupil}


def names_of(job: Job, number: int) -> list[str | None]:
    """The steps on a batch: of a GAN two of the discriminator, and one of the generator on every other batch."""
    if not job.turns:
        return [None]
    return ["D", "D", "G"] if number % 2 == 0 else ["D"]


def walk(run: LiveRun, *, rounds: bool = False) -> list[float]:
    """The loop of a user."""
    losses: list[float] = []
    for batch in run.batches():
        number = run.state.get("batches", 0)
        for name in [None] if rounds else names_of(run.job, number):
            losses.append(run.step(batch, name))
        run.state["batches"] = number + 1
        if isinstance(run.model, Pupil):
            run.model.follow()
    return losses


def by_hand(job: Job, *, rounds: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """The same without shardwise, but for the batches and the initial weights."""
    with start(job, device="cpu") as run:
        batches = list(run.batches())
        model = job.model()
        model.load_state_dict(run.model.state_dict())
    made: Any = job.optimizer(model)
    named = made if isinstance(made, Mapping) else {None: made}
    optimizers = {name: each if isinstance(each, list) else [each] for name, each in named.items()}
    schedule: Any = job.schedule
    schedules = {
        name: [schedule(one, None) if callable(schedule) else schedule[name](one, None) for one in each]
        for name, each in optimizers.items()
        if callable(schedule) or name in schedule
    }
    losses = []
    for number, batch in enumerate(batches):
        names: list[Any] = list(job.turns) if rounds else names_of(job, number)
        losses += [_step(job, name, model, batch, optimizers[name], schedules.get(name, [])) for name in names]
        if isinstance(model, Pupil):
            model.follow()
    return losses, model.state_dict()


def _step(job: Job, name: Any, model: nn.Module, batch: Batch, optimizers: list[Any], schedules: list[Any]) -> float:
    objective: Any = job.objective if name is None else job.objective[name]  # type: ignore[index]
    model.zero_grad()
    loss: Tensor = objective(model, (batch.inputs, batch.targets))
    loss.backward()
    clip = job.clip_norm.get(name) if isinstance(job.clip_norm, Mapping) else job.clip_norm
    if clip is not None:
        nn.utils.clip_grad_norm_([p for one in optimizers for g in one.param_groups for p in g["params"]], clip)
    for one in [*optimizers, *schedules]:
        one.step()
    return loss.item()


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gan data": ("gan", "data=2", {}),
    "gan shard": ("gan", "shard=2", {}),
    "wgan phantom": ("wgan", "data=2", {"samples": 21}),
    "gan rounds": ("gan", "data=2", {"rounds": True}),
    "wgan data": ("wgan", "data=2", {}),
    "smooth tensor": ("smooth", "tensor=2", {}),
    "pupil data": ("pupil", "data=2", {}),
    "pupil shard": ("pupil", "shard=2", {}),
}

SCRIPT = """
import json, sys
from shardwise import errors
sys.path.insert(0, {here!r})
from test_several import CASES, job_of, walk
from shardwise.run.start import start
import torch

torch.distributed.init_process_group("gloo")  # one for all cases
for name, (_, plan, options) in CASES.items():
    with start(job_of(name), device="cpu", plan=plan) as run:
        losses = walk(run, rounds=options.get("rounds", False))
        run.save_weights(f"{{name}}.safetensors")
        if run.rank == 0:
            open(f"{{name}}.json", "w").write(json.dumps([losses, run.steps_taken]))
from test_several import aloof, wgan

penalty, alone = "takes a gradient (torch.autograd.grad) on the way", "gathers only when the model itself"
for job, words in ((wgan(), penalty), (aloof(), alone)):
    try:
        with start(job, device="cpu", plan="shard=2") as run:
            run.step(next(run.batches()))
        raise SystemExit("not refused: " + words)
    except errors.PlanError as error:
        assert words in str(error), error
"""


def job_of(name: str) -> Any:
    kind, _, options = CASES[name]
    return JOBS[kind](**({"data": pictures(options["samples"])} if "samples" in options else {}))


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory, on_two_workers: Callable[[Path, str], Path]) -> Path:
    """What all cases gave on two workers."""
    return on_two_workers(tmp_path_factory.mktemp("several"), SCRIPT.format(here=str(Path(__file__).parent)))


@pytest.mark.parametrize("name", list(CASES))
def test_two_workers_equal_the_loop_by_hand(parallel: Path, name: str) -> None:
    rounds = CASES[name][2].get("rounds", False)
    expected, state = by_hand(job_of(name), rounds=rounds)
    losses, steps = json.loads((parallel / f"{name}.json").read_text())
    if rounds:
        expected = [one + other for one, other in zip(expected[::2], expected[1::2], strict=True)]
    assert steps == len(losses) == len(expected) > 8
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-5)
    stored = load_file(parallel / f"{name}.safetensors")
    assert set(stored) == set(state)
    for key, value in state.items():
        assert torch.allclose(stored[key], value, rtol=1e-3, atol=2e-5), key


def kept(out: Path, **options: Any) -> LiveRun:
    return start(gan(), device="cpu", out=out, **options)


def test_steps_count_batches_however_many_are_taken_on_each(tmp_path: Path) -> None:
    job = gan(epochs=None, steps=8, schedule=lambda optimizer, total: CosineAnnealingLR(optimizer, total))
    assert len(train(job, plan="serial", out=tmp_path / "train").history) == 8
    with start(job, device="cpu", out=tmp_path / "loop") as run:
        batches = run.batches()
        assert len(batches) == 8
        for _, batch in zip(range(3), batches, strict=False):
            run.step(batch, "D")
            run.step(batch, "G")
    with start(job, device="cpu", out=tmp_path / "loop", resume=True) as run:
        assert len(run.batches()) == 5
        for batch in run.batches():
            run.step(batch, "D")
            run.step(batch, "G")
        assert run.steps_taken == 16
        assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([0.0] * 2)


def in_rounds(run: LiveRun) -> Iterator[Batch]:
    for _ in run.rounds():
        for _ in range(2):
            noise = run.random(BATCH).normal(6).float()
            yield run.batch((noise @ torch.ones(6, 10) / 6, noise, noise[:, :1].sigmoid()))


def of_the_data(run: LiveRun) -> Iterator[Batch]:
    for batch in run.batches():
        yield run.batch(batch.inputs, batch.targets)


def beside_the_data(run: LiveRun) -> Iterator[Batch]:
    for batch in run.batches():
        yield batch
        yield run.batch(batch.inputs, batch.targets)


def passing_over(run: LiveRun) -> Iterator[Batch]:
    for number, batch in enumerate(run.batches()):
        if number % 2:
            yield batch


@pytest.mark.parametrize("batches", [in_rounds, of_the_data, beside_the_data, passing_over])
def test_steps_count_each_batch_that_is_trained_on_once(
    tmp_path: Path, batches: Callable[[LiveRun], Iterator[Batch]]
) -> None:
    """Also batches that the loop made; so many, and no others, are in the schedules, also of a resumed loop."""

    def loop(run: LiveRun, last: int = 99) -> list[float]:
        losses = []
        for batch in batches(run):
            losses += [run.step(batch, name) for name in ("D", "G")]
            if len(losses) == last:
                raise ZeroDivisionError
        run.state["losses"] = losses
        return losses

    job = smooth(epochs=None, steps=8, schedule=lambda optimizer, total: CosineAnnealingLR(optimizer, total))
    with start(job, device="cpu") as run:
        expected = loop(run)
        assert len(expected) == 16
        assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([0.0] * 2)
    out = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), start(job, device="cpu", out=out, checkpoint_every=1) as run:
        loop(run, 10)
    with start(job, device="cpu", out=out, resume=True) as run:
        first = run.steps_taken
        assert first in (4, 8)
        assert expected[first:] == loop(run)
        losses = run.losses
        assert len(losses) == 2
    with start(job, device="cpu", out=out, resume=True) as run:
        assert loop(run) == []
        assert run.losses == losses


def test_a_resumed_run_has_all_optimizers_and_schedules_bit_for_bit(tmp_path: Path) -> None:
    with kept(tmp_path / "whole") as run:
        expected = walk(run)
        final = {name: value.clone() for name, value in run.model.state_dict().items()}
    first: list[float] = []
    with pytest.raises(ZeroDivisionError), kept(tmp_path / "run", checkpoint_every="1", keep_last=9) as run:
        for number, batch in enumerate(run.batches()):
            for name in names_of(run.job, number):
                first.append(run.step(batch, name))
                if len(first) == 14:  # the first of three steps on a batch
                    raise ZeroDivisionError
            run.state["batches"] = number + 1
    with kept(tmp_path / "run", resume=True) as run:
        assert run.state["batches"] == 6
        assert run.steps_taken == 12, "a checkpoint stands between two batches, never between the steps on one"
        rest = walk(run)
        assert isinstance(run.optimizer, Several)
        (slow,) = run.optimizer.named["D"]
        assert slow.param_groups[0]["lr"] != 1e-2
        assert all(torch.equal(value, final[name]) for name, value in run.model.state_dict().items())
    assert first[:12] + rest == expected
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["total_steps"]) == (24, None), "how many steps a loop will take, nobody knows"
    with kept(tmp_path / "run", resume=True) as run:
        assert len(run.batches()) == len(list(run.batches())) == 0
    events = [event for event in read_events(tmp_path / "whole" / "events.jsonl") if isinstance(event, StepsEvent)]
    noted = {
        name: [loss for event in events for loss in event.objectives.get(name, [None] * len(event.losses))]
        for name in ("D", "G")
    }
    names = [name for number in range(12) for name in names_of(gan(), number)]
    for name, losses in noted.items():
        assert [loss is not None for loss in losses] == [each == name for each in names]
        own = [loss for loss, each in zip(expected, names, strict=True) if each == name]
        assert [loss for loss in losses if loss is not None] == pytest.approx(own)


def test_a_signal_waits_for_the_steps_on_the_batch(tmp_path: Path) -> None:
    expected = walk(start(gan(), device="cpu"))
    first: list[float] = []
    with pytest.raises(errors.Stopped), kept(tmp_path / "run") as run:
        for batch in run.batches():
            number = run.state.get("batches", 0)
            for name in names_of(run.job, number):
                first.append(run.step(batch, name))
                if len(first) == 7:
                    os.kill(os.getpid(), signal.SIGTERM)
            run.state["batches"] = number + 1
    with kept(tmp_path / "run", resume=True) as run:
        assert run.steps_taken == len(first)
        assert first + walk(run) == expected


def test_a_step_leaves_the_others_alone() -> None:
    with start(gan(), device="cpu") as run:
        batch = next(run.batches())
        before = {name: value.clone() for name, value in run.model.named_parameters()}
        run.step(batch, "G")
        moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
        assert {name[0] for name in moved} == {"G"}
        assert all((p.grad is None) == name.startswith("D") for name, p in run.model.named_parameters())
        assert all(p.requires_grad for p in run.model.parameters())
        run.model.get_submodule("D").requires_grad_(False)  # a user's own freezing is kept
        run.step(batch, "G")
        assert not any(p.requires_grad for p in run.model.get_submodule("D").parameters())
        assert set(run.losses) == {"G"}


def test_what_only_one_optimizer_has_is_asked_of_each() -> None:
    layers = nn.Linear(2, 2), nn.Linear(2, 2)
    several = Several({"": tuple(torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers)})
    for ask in (several.state_dict, lambda: several.register_step_post_hook(lambda *_: None)):
        with pytest.raises(AttributeError, match=r"optimizer\.each"):
            ask()


def test_one_optimizer_by_several_names() -> None:
    """Maximum classifier discrepancy (Saito et al. 2018) steps both parts first, then each by itself."""

    def made(model: Any) -> Any:
        d, g = torch.optim.SGD(model["D"].parameters(), 0.1), torch.optim.SGD(model["G"].parameters(), 0.1)
        return {"both": [d, g], "one": d, "never": g}

    job = smooth(
        objective={"both": tell_apart, "one": tell_apart, "never": deceive}, optimizer=lambda model: made(model),
        schedule=cosine, clip_norm=1.0,
    )  # fmt: skip
    with start(job, device="cpu") as run:
        for batch in run.batches():
            run.step(batch, "both")
            run.step(batch, "one")
        rates = [one.param_groups[0]["lr"] for one in run.optimizer.each]  # type: ignore[attr-defined]
        assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * steps / 12)) / 2 for steps in (24, 12)], abs=1e-9)


def test_a_loss_that_is_no_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(model: Any, batch: Any) -> Tensor:
        return deceive(model, batch) * float("nan")

    with start(gan(objective={"D": tell_apart, "G": broken}), device="cpu", out=tmp_path / "run") as run:
        run.step(next(run.batches()))
    assert "the loss of G became nan at step 1" in capsys.readouterr().err


def same(model: Any) -> Any:
    return [torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(model["G"].parameters(), 0.1)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gan(objective={}), "a dict with nothing in it"),
        (lambda: gan(objective={"D": 1}), r"a dict with 'D' in it: give names and functions"),
        (lambda: gan(metrics={"D": against}), "an objective and a metric called 'D'"),
        (lambda: gan(clip_norm={"d": 1.0}), r"clip_norm has the name 'd', .* those are D, G"),
        (lambda: gan(clip_norm={"D": 0.0}), "a number above 0"),
        (lambda: pupil(clip_norm={"D": 1.0}), "give one number, or a dict of objectives too"),
        (lambda: start(gan(schedule={"X": cosine})), r"Job.schedule has the name 'X', .* those are D, G"),
        (lambda: start(gan(objective={"D": tell_apart, "X": deceive})), r"for D, G, and Job has objectives D, X"),
        (lambda: start(gan(objective=deceive, clip_norm=None)), r"for D, G, and Job has one objective"),
        (lambda: start(gan(optimizer=lambda model: same(model))), r"the same parameter of shape \(16, 6\)"),
        (lambda: start(gan(optimizer=lambda m: same(m))), "given a list of the parameters .*: name its argument `model`"),
        (lambda: train(gan(optimizer=lambda m: m.D), plan="serial"), "given a list of the parameters .*: name its argument"),
        (lambda: start(gan(optimizer=lambda model: [])), "must return a torch.optim.Optimizer, or a list or dict"),
        (lambda: start(gan(optimizer=lambda model: {"D": 1, "G": 2})), "returned a dict with something else in it"),
        (lambda: start(gan(), plan="pipeline=1,data=1").step(first_batch(), "X"), "no objective 'X': the job has D, G"),
        (lambda: start(pupil()).step(first_batch(), "X"), "give Job.objective a dict"),
        (lambda: start(gan(metrics={"right": against})), "a ModuleDict without a forward pass, and Job.metrics is of its"),
        (lambda: start(gan(objective={"D": tell_apart, "G": aside})).step(first_batch(), "G"), "G gives a number that does"),
        (lambda: check_job(gan(), Plan(layout=Layout(pipeline=2))), "objectives D, G: the axis pipeline follows the model"),
        (lambda: check_job(gan(), Plan(layout=Layout(data=2), local_steps=2)), "local_steps is planned for steps that all"),
        (lambda: check_shard(tied()), "also one of a"),
    ],
)  # fmt: skip
def test_refusals(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(errors.UserError, match=message):
        call()


def tied() -> nn.Module:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight = one.weight
    return nn.ModuleDict({"a": one, "b": other})


def first_batch() -> Batch:
    return next(start(gan(), device="cpu").batches())


@pytest.mark.parametrize("name", ["digits_gan.py", "gan_loop.py", "pupil_loop.py"])
def test_the_examples_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "several.md").read_text(encoding="utf-8")
    code = {
        name: text.split(f"`{name}`:\n\n```python\n")[1].split("```")[0]
        for name in ("digits_gan.py", "gan_loop.py", "pupil_loop.py")
    }
    job: dict[str, Any] = {}
    exec(code["digits_gan.py"], job)
    if name == "digits_gan.py":
        run = train(job["digits_gan"](epochs=1), plan="serial", out=tmp_path / "run")
        assert len(run.history) == run.summary["steps"] == 23
        total = [sum(each) for each in zip(*run.histories.values(), strict=True)]
        assert total == pytest.approx(run.history, rel=1e-5)
        return
    monkeypatch.setitem(sys.modules, "digits_gan", SimpleNamespace(**job))
    monkeypatch.chdir(tmp_path)
    exec(code[name], {})
    shown = capsys.readouterr().out
    assert ("discriminator" in shown) == (name == "gan_loop.py")
    if name == "pupil_loop.py":
        assert float(shown.split("'accuracy': ")[1].split("}")[0]) > 0.8
