"""Loops that make their own data: episodes, replayed and mined samples; one worker against two, and resumed."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise import errors
from shardwise.run import ledger
from shardwise.run.live import LiveRun
from shardwise.run.start import start
from shardwise.run.train import train
from shardwise.spec.events import CheckpointEvent, read_events
from shardwise.spec.job import Job

PLACES, LONGEST, WALKERS = 5, 7, 6


class Walkers:
    """A line of places: who leaves it on the right is paid. One step in five goes the other way."""

    def __init__(self, numbers: range) -> None:
        self.places = torch.full((len(numbers),), PLACES // 2)
        self.alive = torch.ones(len(numbers), dtype=torch.bool)

    @property
    def seen(self) -> Tensor:
        return F.one_hot(self.places.clamp(0, PLACES - 1), PLACES).double()

    def step(self, right: Tensor, luck: Tensor) -> Tensor:
        right = right ^ (luck < 0.2)
        self.places = torch.where(self.alive, self.places + 2 * right.long() - 1, self.places)
        paid = ((self.places == PLACES) & self.alive).double() - 0.05 * self.alive.double()
        self.alive &= (self.places >= 0) & (self.places < PLACES)
        return paid


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(PLACES, 8), nn.Tanh()).double()
        self.actor, self.critic = nn.Linear(8, 1).double(), nn.Linear(8, 1).double()

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(seen)
        return self.actor(hidden).squeeze(1), self.critic(hidden).squeeze(1)


def improve(model: nn.Module, batch: Any) -> Tensor:
    """REINFORCE with a learned baseline (Williams 1992)."""
    seen, (right, returns) = batch
    preference, value = model(seen)
    chosen = -F.binary_cross_entropy_with_logits(preference, right, reduction="none")
    result: Tensor = (F.mse_loss(value, returns, reduction="none") - chosen * (returns - value.detach())).mean()
    return result


def actor_job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "model": ActorCritic,
        "data": None,
        "objective": improve,
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        "batch_size": 16,
        "clip_norm": 1.0,
    }
    return Job(**{**values, **changes})


def live_through(run: LiveRun) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Episodes of this worker's walkers, of different lengths."""
    mine = run.share(WALKERS)
    walkers, random = Walkers(mine), run.random(mine, "walk")
    steps: list[Any] = []
    for _ in range(LONGEST):
        with torch.no_grad():
            preference, _ = run.model(walkers.seen)
        seen, alive = walkers.seen, walkers.alive.clone()
        right = random.uniform() < preference.sigmoid()
        steps.append((seen, right.double(), alive, walkers.step(right, random.uniform())))
    returns = torch.zeros(len(mine), dtype=torch.float64)
    lived = []
    for seen, right, alive, paid in reversed(steps):
        returns = paid + 0.9 * returns
        lived.append((seen[alive], right[alive], returns[alive]))
    seen, right, returns = (torch.cat(parts) for parts in zip(*lived, strict=True))
    return seen, (right, returns)


def walk(run: LiveRun, rounds: int | None = None, noise: float = 0.0) -> list[float]:
    """The user's loop: own episodes on each worker, two steps on them. Noise of torch's is another on each worker."""
    for _ in run.rounds(rounds):
        inputs, targets = live_through(run)
        batch = run.batch(inputs + noise * torch.randn_like(inputs), targets, part=True)
        for _ in range(2):
            run.state.setdefault("losses", []).append(run.step(batch))
    return cast("list[float]", run.state["losses"])


class Q(nn.Module):
    """Deep Q-learning's two networks (Mnih et al. 2015), of which one follows."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(PLACES, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        self.target = nn.Sequential(nn.Linear(PLACES, 8), nn.Tanh(), nn.Linear(8, 2)).double().requires_grad_(False)

    def forward(self, seen: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            best = self.target(later).amax(1)
        return self.online(seen), best


def bellman(model: nn.Module, batch: Any) -> Tensor:
    (seen, later), (right, paid, goes_on) = batch
    value, best = model(seen, later)
    return F.smooth_l1_loss(value.gather(1, right[:, None]).squeeze(1), paid + 0.9 * goes_on * best)


def remembered(count: int) -> Any:
    """A few samples like those of the loop, for plans that try the model first."""
    seen = torch.eye(PLACES, dtype=torch.float64)[torch.arange(count) % PLACES]
    ones = torch.ones(count, dtype=torch.float64)
    return (seen, seen), (torch.zeros(count, dtype=torch.long), ones, ones)


def replay_job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "model": Q,
        "data": None,
        "objective": bellman,
        "optimizer": lambda model: torch.optim.Adam(model.online.parameters(), lr=0.02),
        "batch_size": 9,
        "steps": 20,
    }
    return Job(**{**values, **changes})


def replay(run: LiveRun) -> list[float]:
    """The user's loop: every worker has the same walkers and the same memory of them."""
    for number in run.rounds():
        memory = run.state.setdefault("memory", deque(maxlen=60))
        places, alive = run.state.get("walkers", (torch.full((4,), PLACES // 2), torch.ones(4, dtype=torch.bool)))
        walkers, random = Walkers(range(4)), run.random(4, "walk")
        walkers.places, walkers.alive = places.clone(), alive.clone()
        seen, was = walkers.seen, walkers.alive.clone()
        with torch.no_grad():
            value, _ = run.model(seen, seen)
        right = torch.where(random.uniform() < 0.3, random.uniform() < 0.5, value[:, 1] > value[:, 0])
        paid = walkers.step(right, random.uniform())
        later = walkers.seen
        for index in was.nonzero().flatten().tolist():
            memory.append(
                (seen[index], later[index], int(right[index]), float(paid[index]), float(walkers.alive[index]))
            )
        if not walkers.alive.any():
            walkers = Walkers(range(4))
        run.state["walkers"] = (walkers.places, walkers.alive)
        if number < 2:
            continue  # a round without a step
        drawn = run.random(9, "replay").integers(0, len(memory)).tolist()
        before, after, *others = zip(*[memory[index] for index in drawn], strict=True)
        batch = run.batch((torch.stack(before), torch.stack(after)), tuple(torch.tensor(other) for other in others))
        run.state.setdefault("losses", []).append(run.step(batch))
        with torch.no_grad():
            model: Any = run.model
            for slow, fast in zip(model.target.parameters(), model.online.parameters(), strict=True):
                slow.lerp_(fast, 0.2)
    return cast("list[float]", run.state["losses"])


def mined_job(**changes: Any) -> Job:
    inputs = torch.randn(26, 5, generator=torch.Generator().manual_seed(0)).double()
    values: dict[str, Any] = {
        "model": lambda: nn.Linear(5, 2).double(),
        "data": (inputs, (inputs.sum(1) > 0).long()),
        "loss": F.cross_entropy,
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        "batch_size": 4,
        "epochs": 2,
    }
    return Job(**{**values, **changes})


def mine(run: LiveRun) -> list[float]:
    """The user's loop: a second step on the samples that the model has not learned; workers have none, or one, or two."""
    losses = []
    for batch in run.batches():
        losses.append(run.step(batch))
        with torch.no_grad():
            output = run.model(batch.inputs)
        hard = (output.argmax(1) != batch.targets)[: batch.count]
        inputs, targets = cast("Tensor", batch.inputs)[: batch.count], cast("Tensor", batch.targets)[: batch.count]
        again = run.batch(inputs[hard], targets[hard], part=True)
        if again.global_count:
            losses.append(run.step(again))
    return losses


CASES: dict[str, tuple[Callable[..., Job], Callable[[LiveRun], list[float]], str, dict[str, Any]]] = {
    "episodes data": (actor_job, lambda run: walk(run, 6), "data=2", {}),
    "episodes shard": (actor_job, lambda run: walk(run, 6), "shard=2", {}),
    "episodes pieces": (actor_job, lambda run: walk(run, 6), "data=2", {"micro_batch": 5}),
    "replay data": (replay_job, replay, "data=2", {}),
    "replay shard": (replay_job, replay, "shard=2", {}),
    "mined data": (mined_job, mine, "data=2", {}),
    "mined shard": (mined_job, mine, "shard=2", {}),
}

SCRIPT = """
import json, sys, threading
import torch
sys.path.insert(0, {here!r})
from shardwise import errors
from test_made import CASES, actor_job, on_two, samples
from shardwise.run.start import start

torch.distributed.init_process_group("gloo")  # one for all cases
for name, (job, loop, plan, changes) in CASES.items():
    with start(job(**changes), device="cpu", plan=plan) as run:
        losses = loop(run)
        run.save_weights(f"{{name}}.safetensors")
        if run.rank == 0:
            open(f"{{name}}.json", "w").write(json.dumps(losses))
on_two()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
for part in range(2):  # runs with a folder make and end a group of their own
    with start(actor_job(), device="cpu", out="own", resume="auto") as run:
        seen = run.own_state.setdefault("seen", [])
        for number in run.rounds(2 * part + 2):
            run.step(run.batch(*samples(3)))
            seen.append((run.rank, number))
        if run.rank == 0:
            run.own_state["only"] = part
        open(f"own-{{run.rank}}.json", "w").write(json.dumps(run.own_state))
try:
    with start(actor_job(), device="cpu", out="lock") as run:
        run.own_state["lock" if run.rank else "number"] = threading.Lock() if run.rank else 1
except errors.RunFailed as error:
    open(f"lock-{{run.rank}}.json", "w").write(json.dumps(str(error)))
"""


def scaled(model: nn.Module, batch: Any) -> Tensor:
    """Advantages that are scaled within the batch, which is another one on each worker."""
    seen, (right, returns) = batch
    return improve(model, (seen, (right, (returns - returns.mean()) / (returns.std() + 1e-3))))


def samples(count: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(count)
    seen, right = torch.rand(count, PLACES, generator=random).double(), torch.ones(count).double()
    return seen, (right, torch.rand(count, generator=random).double())


def changed(run: LiveRun, count: int) -> tuple[Tensor, Any]:
    """Worker 1 has another value in a sample."""
    seen, rest = samples(count)
    seen[count // 2, 2] += float(run.rank)
    return seen, rest


def own_step(run: LiveRun) -> None:
    for _ in run.rounds(1):
        improve(run.model, samples(3)).backward()
        run.optimizer.step()


def both_ways(run: LiveRun) -> None:
    whole, part = samples(3), (None, None)
    run.batch(*(whole if run.rank else part), part=run.rank == 0)


def drawn(run: LiveRun) -> None:
    """Draws of torch's own are others on each worker."""
    for _ in run.rounds(1):
        torch.manual_seed(run.rank)
        run.batch(torch.randn(3, PLACES))


REFUSED: dict[str, tuple[dict[str, Any], Callable[[LiveRun], Any], str]] = {
    "content": ({}, lambda run: run.batch(*changed(run, 7)), "rank 1 gave run.batch other samples than rank 0 (7 and 7"),
    "drawn": ({}, drawn, "Draw with run.random()"),
    "length": ({}, lambda run: run.batch(*samples(2 + run.rank)), "(3 and 2 of them)"),
    "form": ({}, lambda run: run.batch(torch.ones(2, 3 + run.rank), part=True), "of another form by rank 1 than by rank 0"),
    "both": ({}, both_ways, "run.batch was called with part="),
    "none": ({}, lambda run: run.step(run.batch(None, part=True)), "a batch without samples on any worker"),
    "scaled": (
        {"objective": scaled}, lambda run: run.step(run.batch(*samples(2 + run.rank), part=True)), "but the loss couples samples",
    ),
    "own step": ({}, own_step, "the batch was not given to run.step()"),
}  # fmt: skip


def on_two() -> None:
    """What two workers refuse, in words, on both of them, and what they do not."""
    told: dict[str, Any] = {}
    for name, (changes, call, _) in REFUSED.items():
        with start(actor_job(**changes), device="cpu") as run:
            try:
                call(run)
            except errors.UserError as error:
                told[name] = str(error)
    torch.manual_seed(5)
    with start(model=ActorCritic(), objective=improve, optimizer=actor_job().optimizer, batch_size=4) as run:
        # Bits that tell nothing: one sample for two workers, no sample on one of them, and sums.
        told["one"] = [run.step(run.batch(*samples(1))), run.step(run.batch(*samples(1 if run.rank else 3), part=True))]
        seen, targets = samples(2)
        told["empty"] = run.step(run.batch(seen[: 2 * run.rank], tuple(t[: 2 * run.rank] for t in targets), part=True))
        told["without"] = run.step(run.batch(*(samples(2) if run.rank else (None, None)), part=True))
        told["sum"] = [run.sum(run.rank + 1), cast("Tensor", run.sum(torch.ones(2))).tolist(), list(run.share(3))]
        told["random"] = [run.random(run.share(5)).normal().tolist(), run.random(5, "other").normal().tolist()]
    Path(f"told-{run.rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory, on_two_workers: Callable[[Path, str], Path]) -> Path:
    """What all cases gave on two workers."""
    return on_two_workers(tmp_path_factory.mktemp("made"), SCRIPT.format(here=str(Path(__file__).parent)))


@pytest.mark.parametrize("name", list(CASES))
def test_two_workers_equal_one(parallel: Path, name: str) -> None:
    job, loop, _, changes = CASES[name]
    with start(job(**changes), device="cpu", plan="serial") as run:
        expected = loop(run)
        state = {key: value.clone() for key, value in run.model.state_dict().items()}
        before = job().model().state_dict()
    losses = json.loads((parallel / f"{name}.json").read_text())
    assert len(losses) > 8
    assert losses == pytest.approx(expected, rel=1e-9)
    stored = load_file(parallel / f"{name}.safetensors")
    assert set(stored) == set(state) == set(before)
    for key, value in state.items():
        assert torch.allclose(stored[key], value, rtol=1e-9, atol=1e-12), key


def test_each_worker_gets_its_own_state_back(parallel: Path, tmp_path: Path) -> None:
    for rank in range(2):
        kept = json.loads((parallel / f"own-{rank}.json").read_text())
        assert kept.pop("seen") == [[rank, number] for number in range(4)]
        assert kept == ({} if rank else {"only": 1})
        assert "own_state/lock is a _thread.lock" in json.loads((parallel / f"lock-{rank}.json").read_text())
    with pytest.raises(errors.CheckpointError, match="an own_state on each of 2 workers, and 1 cannot take them over"):
        start(actor_job(), device="cpu", out=parallel / "own", resume=True)
    for place in ("own_state", "state"):
        words = rf"{place}/lock is a _thread.lock: a checkpoint keeps"
        with (
            pytest.raises(errors.RunFailed, match=words),
            start(actor_job(), device="cpu", out=tmp_path / place) as run,
        ):
            getattr(run, place)["lock"] = threading.Lock()


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals_of_two_workers_are_told_by_both(parallel: Path, name: str) -> None:
    for rank in range(2):
        assert REFUSED[name][2] in json.loads((parallel / f"told-{rank}.json").read_text())[name]


def test_what_two_workers_have_is_counted_once(parallel: Path) -> None:
    first, second = (json.loads((parallel / f"told-{rank}.json").read_text()) for rank in range(2))
    torch.manual_seed(5)
    with start(model=ActorCritic(), objective=improve, optimizer=actor_job().optimizer, batch_size=4) as run:
        one = [run.step(run.batch(*samples(1)))]
        parts = samples(3), samples(1)
        seen, (right, returns) = (torch.cat([part[0] for part in parts]), tuple(
            torch.cat([part[1][index] for part in parts]) for index in range(2)
        ))  # fmt: skip
        one.append(run.step(run.batch(seen, (right, returns))))
        empty, without = run.step(run.batch(*samples(2))), run.step(run.batch(*samples(2), part=True))
        draws = run.random(5).normal().tolist()
        assert run.random(5).normal().tolist() != draws, "called again, it goes on"
        assert run.random(5, "other").normal().tolist() == first["random"][1] == second["random"][1]
    assert first["one"] == second["one"] == pytest.approx(one, rel=1e-9)
    assert first["empty"] == pytest.approx(empty, rel=1e-9)
    assert first["without"] == pytest.approx(without, rel=1e-9)
    assert first["random"][0] + second["random"][0] == draws
    assert (first["sum"], second["sum"]) == ([3.0, [2.0, 2.0], [0, 1]], [3.0, [2.0, 2.0], [2]])


def label(run: LiveRun) -> list[float]:
    """The user's loop: a step on samples that the model labels itself, and a pass over those that have labels."""
    for _ in run.rounds(3):
        losses = list(run.state.get("losses", []))
        seen = run.random(6).normal(5).double()
        with torch.no_grad():
            guessed = run.model(seen).argmax(1)
        losses.append(run.step(run.batch(seen, guessed)))
        losses += [run.step(batch) for batch in run.batches(epochs=1)]
        run.state["losses"] = losses
    return cast("list[float]", run.state["losses"])


LOOPS: dict[str, tuple[Callable[..., Job], Callable[[LiveRun], list[float]]]] = {
    "replay": (replay_job, replay),
    "episodes": (actor_job, lambda run: walk(run, 8, 0.1)),
    "labels": (lambda **changes: mined_job(epochs=3, **changes), label),
}


@pytest.mark.parametrize("name", list(LOOPS))
@pytest.mark.parametrize("stopped", [False, True], ids=["killed", "stopped"])
def test_a_resumed_loop_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stopped: bool
) -> None:
    monkeypatch.setattr(ledger, "SETTLE_SECONDS", 0.0)  # a signal is seen at once
    job, loop = LOOPS[name]
    with start(job(), device="cpu") as run:
        expected = list(loop(run))
        final = {key: value.clone() for key, value in run.model.state_dict().items()}

    def spoiled(step: Callable[..., float]) -> Callable[..., float]:
        def one(*given: Any) -> float:
            if run.steps_taken == 10:
                if not stopped:
                    raise ZeroDivisionError
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*given)

        return one

    out = tmp_path / "run"
    every = "never" if stopped else "3"
    with (
        pytest.raises(errors.Stopped if stopped else ZeroDivisionError),
        start(job(), device="cpu", out=out, checkpoint_every=every) as run,
    ):
        monkeypatch.setattr(run, "step", spoiled(run.step))
        loop(run)
    with start(job(), device="cpu", out=out, resume=True) as run:
        assert 0 < run.steps_taken < len(expected)
        assert run.steps_taken == len(run.state["losses"])
        assert loop(run) == expected
        assert all(torch.equal(value, final[key]) for key, value in run.model.state_dict().items())
    with start(job(), device="cpu", out=out, resume=True) as run:
        assert loop(run) == expected, "there is nothing left to do"


def test_a_checkpoint_that_is_asked_for_in_a_round_goes_on_with_the_next(tmp_path: Path) -> None:
    with start(actor_job(), device="cpu", out=tmp_path / "run", checkpoint_every="1") as run:
        seen = []
        for number in run.rounds(5):
            seen.append(number)
            run.step(run.batch(*samples(3)))
            if number == 1:
                run.save()
            if number == 3:
                break
        saved = [
            event.step for event in read_events(tmp_path / "run" / "events.jsonl") if isinstance(event, CheckpointEvent)
        ]
        assert saved == [1, 2, 3]
    with start(actor_job(), device="cpu", out=tmp_path / "run", resume=True) as run:
        assert list(run.rounds(6)) == [4, 5], "without a step"
        run.save()
        assert list(run.rounds(7)) == [6]
    with start(actor_job(), device="cpu", out=tmp_path / "run", resume=True) as run:
        assert list(run.rounds(7)) == []
    assert seen == [0, 1, 2, 3]


def test_a_resumed_loop_over_data_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    def noisy(run: LiveRun, last: int) -> list[float]:
        losses = []
        for batch in run.batches():
            inputs = cast("Tensor", batch.inputs)
            losses.append(run.step(run.batch(inputs + torch.randn_like(inputs), batch.targets, part=True)))
            if run.steps_taken == last:
                break
        return losses

    with start(mined_job(), device="cpu") as run:
        expected = noisy(run, 99)
    with start(mined_job(), device="cpu", out=tmp_path / "run") as run:
        first = noisy(run, 5)
    with start(mined_job(), device="cpu", out=tmp_path / "run", resume=True) as run:
        assert first + noisy(run, 99) == expected


def test_a_made_batch_is_not_taken_for_one_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = torch.ones(12, 5, dtype=torch.float64)
    inputs[4:] = torch.nan
    job = mined_job(data=(inputs, torch.zeros(12, dtype=torch.long)), shuffle=False)
    with start(job, device="cpu", out=tmp_path / "run") as run:
        batch = next(batches := run.batches())
        run.step(batch)
        run.step(run.batch(torch.full((2, 5), torch.inf).double(), torch.zeros(2, dtype=torch.long)))
        batches.close()
    warned = capsys.readouterr().err
    assert "the loss became nan at step 2: the training goes on" in warned


def take_outside(out: Path) -> None:
    with start(actor_job(), device="cpu", out=out) as run:
        run.step(run.batch(*samples(3)))


def learn_through(out: Path) -> None:
    with start(actor_job(), device="cpu") as run:
        seen, _ = samples(3)
        run.batch(seen, run.model(seen))


def within(out: Path) -> None:
    with start(actor_job(), device="cpu") as run:
        for _ in run.rounds():
            next(run.rounds())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (take_outside, r"outside of rounds: .* write the loop as `for number in run.rounds\(\):`"),
        (learn_through, r"requires a gradient: a batch is data"),
        (within, "only the outermost loop"),
        (
            lambda out: start(actor_job()).batch([1.0, 2.0]),
            "was given a float: give tensors or arrays with a row for each",
        ),
        (lambda out: start(actor_job()).batch(torch.ones(())), "was given a single number"),
        (lambda out: start(actor_job()).batch(torch.ones(3), torch.ones(2)), r"first dims of \[2, 3\]"),
        (
            lambda out: start(actor_job()).step(start(actor_job()).batch(torch.ones(0, 2))),
            "without samples on any worker",
        ),
        (
            lambda out: next(start(actor_job()).batches()),
            r"the job has no data: give data=, or let the loop make its own",
        ),
        (lambda out: actor_job(epochs=3), "epochs=3 and no data to pass over"),
        (lambda out: train(actor_job(steps=3), out=out), "the job has no data, which a loop of your own"),
        (lambda out: start(actor_job(), plan="pipeline=2"), "plan pipeline=2"),
        (lambda out: start(actor_job()).evaluate(), "has no test split"),
    ],
)
def test_refusals(tmp_path: Path, call: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(errors.UserError, match=message):
        call(tmp_path / "run")


def test_arrays_and_trees_are_taken() -> None:
    with start(
        actor_job(objective=lambda model, batch: model(batch[0]["seen"].double())[1].mean()), device="cpu"
    ) as run:
        batch = run.batch({"seen": np.eye(PLACES, dtype="float32")}, None)
        assert batch.global_count == batch.count == PLACES
        assert run.step(batch) == run.step(batch) or run.steps_taken == 2
        assert len(list(zip(run.rounds(), range(3), strict=False))) == 3, "without steps= it has no end"


def test_the_loop_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    code = text.split("`walkers.py` is")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["round 10", "round 20", "round 30", "round 40"]
    assert float(lines[-1].split(", ")[1].split()[0]) > 0.75, "it has learned: by chance 0.5"
    exec(code, {})
    assert capsys.readouterr().out == "", "it is done"
