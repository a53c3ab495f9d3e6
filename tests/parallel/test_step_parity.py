"""One step under data parallelism equals the serial step: weights, buffers and losses, in float64 to rounding.

float64 models make "up to rounding" 1e-12, so that a wrong weighting of a single sample shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shardwise.data.gather import Arrays
from shardwise.data.loader import batches
from shardwise.data.source import Splits
from shardwise.dist.collectives import Group
from shardwise.dist.split import is_dtensor
from shardwise.errors import PlanError
from shardwise.nn.moe import MoE
from shardwise.parallel.compose import check_model
from shardwise.run.alike import next_batch
from shardwise.run.assemble import assemble, settle_plan
from shardwise.run.evaluate import evaluate
from shardwise.run.step import take_step
from shardwise.spec.job import Job
from shardwise.spec.layout import Layout
from shardwise.spec.plan import Plan

Result = tuple[list[float], dict[str, Tensor], dict[str, float]]


def _train(
    job: Job, micro_batch: int | None = None, steps: int = 5, layout: str = "", zero_stage: int | None = None
) -> Result:
    """Losses over the global batch, final parameters and buffers, and metrics, as any rank sees them."""
    world = Group.world()
    axes = Layout.parse(layout or f"data={world.size}")
    plan = settle_plan(job, Plan(layout=axes, micro_batch=micro_batch, zero_stage=zero_stage))
    assembly = assemble(job, plan, world, torch.device("cpu"), total_steps=steps)
    losses: list[float] = []
    epoch = 0
    while len(losses) < steps:
        stream = batches(
            job.data.train,
            batch_size=job.batch_size,
            seed=job.seed,
            epoch=epoch,
            rank=assembly.samples.rank,
            ranks=assembly.samples.size,
        )
        while len(losses) < steps and (batch := next_batch(stream, assembly.samples, assembly.device)) is not None:
            result = take_step(assembly, batch)
            losses.append(float(assembly.samples.sum_(result.loss_sum.double()) / result.weight))
        stream.close()
        epoch += 1
    metrics = evaluate(assembly, job.data.train)[0]
    state = {name: cast(Any, tensor) for name, tensor in assembly.model.state_dict().items()}
    whole = {name: tensor.full_tensor() if is_dtensor(tensor) else tensor.clone() for name, tensor in state.items()}
    return losses, whole, metrics


def _data(samples: int = 31, width: int = 7, classes: int = 3, *, image: bool = False) -> Splits:
    generator = torch.Generator().manual_seed(5)
    shape = (samples, 3, 6, 6) if image else (samples, width)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, classes, (samples,), generator=generator)
    return Splits(Arrays((inputs, targets)))


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).double().mean()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 15), nn.Tanh(), nn.Linear(15, 3)).double()


def _job(**changes: Any) -> Job:
    settings: dict[str, Any] = {
        "model": _mlp,
        "data": _data(),
        "loss": F.cross_entropy,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
        "batch_size": 13,
        "steps": 5,
        "metrics": {"accuracy": _accuracy},
        **changes,
    }
    return Job(**settings)


class _ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)
        self.norm1d = nn.BatchNorm1d(3, affine=False, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = F.relu(self.norm(self.conv(x))).mean((2, 3))
        out: Tensor = self.norm1d(self.head(pooled))
        return out


class _Branches(nn.Module):
    """Some parameters get a gradient from some ranks only, one from none."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(7, 3)
        self.sometimes = nn.Linear(7, 3)
        self.never = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.always(x)
        if (x[:, 0] > 1.0).any():
            chosen = (x[:, :1] > 1.0).double()
            out = out + chosen * self.sometimes(x)
        return out


class _TwoBuckets(nn.Module):
    """Gradients of two types make two buckets, the first of which is sent while the backward pass still runs: on some ranks
    before those messages that BatchNorm sends there, on others after them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 6).double()
        self.norm = nn.BatchNorm1d(6).double()
        self.always = nn.Linear(6, 3)
        self.sometimes = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x))).float()
        out: Tensor = self.always(hidden)
        if (x[:, 0] > 1.0).any():
            out = out + (x[:, :1] > 1.0) * self.sometimes(hidden)
        return out.double()


class _InPieces(nn.Module):
    """One backward pass gives the middle layer's parameters a gradient three times, by backward passes inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 6).double()
        self.middle = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)).float()
        for _ in range(3):
            again = checkpoint(self._again, hidden, use_reentrant=True) if self.training else self._again(hidden)
            hidden = torch.as_tensor(again)
        return torch.as_tensor(self.last(hidden)).double()

    def _again(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.middle(hidden))


class _Tied(nn.Module):
    def __init__(self, *, sparse: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, sparse=sparse)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.embedding(tokens)))


class _Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 6, sparse=True, mode="sum")
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.bag(tokens)))


def _tokens(samples: int = 23, length: int = 5) -> Splits:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 11, (samples, length), generator=generator)
    targets = torch.roll(tokens, 1, 1).clone()
    # Some samples are ignored as a whole, others in part, so that ranks have very different numbers of targets.
    targets[::3] = -100
    targets[1::4, 2:] = -100
    return Splits(Arrays((tokens, targets)))


def _token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100)


def _token_weight(target: Tensor) -> Tensor:
    return (target != -100).sum()


def _token_objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    tokens, targets = batch
    output = model(tokens)
    total = F.cross_entropy(output.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, (targets != -100).sum()


def _mean_objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _bag_data() -> Splits:
    generator = torch.Generator().manual_seed(3)
    return Splits(
        Arrays((torch.randint(0, 11, (23, 4), generator=generator), torch.randint(0, 3, (23,), generator=generator)))
    )


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.2)


def _cosine(optimizer: torch.optim.Optimizer, total_steps: int | None) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps or 1)


CASES: dict[str, Callable[[], Job]] = {
    "mlp": _job,
    "clipping": lambda: _job(clip_norm=0.05),
    "accumulation": lambda: _job(micro_batch=2),
    "schedule": lambda: _job(schedule=_cosine),
    "adamw": lambda: _job(optimizer=lambda params: torch.optim.AdamW(params, lr=0.01)),
    "batch_norm": lambda: _job(model=lambda: _ConvNet().double(), data=_data(image=True)),
    "batch_norm_last_batch_of_2": lambda: _job(
        model=lambda: _ConvNet().double(), data=_data(15, image=True), steps=6, clip_norm=0.3
    ),
    "branches": lambda: _job(model=lambda: _Branches().double()),
    "branches_accumulation": lambda: _job(model=lambda: _Branches().double(), micro_batch=1),
    "tied_tokens": lambda: _job(
        model=lambda: _Tied().double(), data=_tokens(), loss=_token_loss, weight=_token_weight, metrics={}
    ),
    "tokens_accumulation": lambda: _job(
        model=lambda: _Tied().double(), data=_tokens(), loss=_token_loss, weight=_token_weight, metrics={}, micro_batch=1
    ),
    "token_objective": lambda: _job(
        model=lambda: _Tied().double(), data=_tokens(), loss=None, objective=_token_objective, metrics={}, micro_batch=2
    ),
    "mean_objective": lambda: _job(loss=None, objective=_mean_objective, micro_batch=3),
    "sparse": lambda: _job(model=lambda: _Bag().double(), data=_bag_data(), optimizer=_sgd, clip_norm=0.2),
    "single_sample_last": lambda: _job(data=_data(14)),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("size", [2, 3, 5])
def test_parallel_equals_serial(case: str, size: int, ranks: Callable[..., list[Any]]) -> None:
    serial_losses, serial_state, serial_metrics = _train(CASES[case]())
    start = CASES[case]().model
    torch.manual_seed(0)
    moved = [not torch.equal(value, serial_state[name]) for name, value in start().state_dict().items()]
    assert any(moved), "the reference did not train: the comparison would prove nothing"
    for losses, state, metrics in ranks(size, _train, CASES[case]()):
        torch.testing.assert_close(losses, serial_losses, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(state, serial_state, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(metrics, serial_metrics, rtol=1e-11, atol=1e-12)


def _other_formats() -> nn.Module:
    model: _ConvNet = cast(Any, _ConvNet().double()).to(memory_format=torch.channels_last)
    model.head.weight = nn.Parameter(model.head.weight.detach().T.contiguous().T)
    return model


@pytest.mark.parametrize("layout", ["data=2", "shard=2"])
def test_weights_that_lie_otherwise_in_memory(layout: str, ranks: Callable[..., list[Any]]) -> None:
    job = _job(model=_other_formats, data=_data(image=True))
    _, state, _ = _train(job)
    for _, weights, _ in ranks(2, _train, job, None, 5, layout):
        torch.testing.assert_close(weights, state, rtol=1e-10, atol=1e-11)


class _Keeping(torch.optim.Optimizer):
    """Goes along the difference of two steps' gradients; it keeps the gradient itself, which a plain loop makes anew in each."""

    def __init__(self, params: Any, alias: bool) -> None:
        super().__init__(params, {"alias": alias})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                last = self.state[parameter].get("last", torch.zeros_like(parameter))
                parameter.sub_(parameter.grad + 0.5 * (parameter.grad - last), alpha=0.1)
                self.state[parameter]["last"] = parameter.grad.detach() if group["alias"] else parameter.grad


@pytest.mark.parametrize("alias", [False, True])
def test_gradients_that_are_kept_stay_as_they_were(alias: bool, ranks: Callable[..., list[Any]]) -> None:
    job = _job(optimizer=lambda params: _Keeping(params, alias))
    _, state, _ = _train(job)
    for _, weights, _ in ranks(2, _train, job):
        torch.testing.assert_close(weights, state, rtol=1e-10, atol=1e-11)


def _compiled() -> tuple[Result, int]:
    """What training leaves, and how often the compiler was given a view of shared memory; a rank is a process of its own."""
    views: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        views.extend(node for node in graph.graph.nodes if node.target == "view" and torch.float64 in node.args)
        return graph.forward

    nn.Module.compile = partialmethod(nn.Module.compile, backend=backend)  # type: ignore[assignment,method-assign]
    job = _job(model=lambda: nn.Sequential(nn.BatchNorm1d(7), _mlp()).double(), compile=True)
    return _train(job, steps=4), len(views)


@pytest.mark.filterwarnings("ignore")  # of the compiler, about what it finds in torch itself
def test_the_compiler_leaves_shared_memory_alone(ranks: Callable[..., list[Any]]) -> None:
    ((alone, _),) = ranks(1, _compiled)
    for found, views in ranks(2, _compiled):
        torch.testing.assert_close(found[1], alone[1], rtol=1e-10, atol=1e-11)
        assert views == 0


class _OddShapes(nn.Module):
    """A parameter that is one number, and one without any, which a module with an empty list of classes has."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 5).double())
        self.scale = nn.Parameter(torch.tensor(1.5).double())
        self.body = _mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.body(x) * self.scale + self.empty.sum())


class _Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(7, 6), MoE(6, 8, 4, balance=0), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.experts(self.first(x).tanh().unsqueeze(1)).squeeze(1)))


@pytest.mark.parametrize("layout", ["data=2", "shard=2"])
def test_parameters_that_cannot_be_divided(layout: str, ranks: Callable[..., list[Any]]) -> None:
    job = _job(model=_OddShapes, clip_norm=0.3)
    _, state, _ = _train(job)
    for _, weights, _ in ranks(2, _train, job, None, 5, layout):
        torch.testing.assert_close(weights, state, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["Adafactor", "Rprop"])
def test_optimizers_that_cannot_step_on_dealt_experts_are_refused(name: str, ranks: Callable[..., list[Any]]) -> None:
    job = _job(model=lambda: _Mixture().double(), optimizer=lambda p: getattr(torch.optim, name)(p, lr=0.01))
    with pytest.raises(RuntimeError, match=rf"{name} cannot step on parameters that are split by the expert axis"):
        ranks(2, _train, job, None, 1, "expert=2")


def _remarks(layout: str) -> tuple[str, ...]:
    job = _job(model=lambda: nn.Linear(7, 3, bias=False), optimizer=lambda p: torch.optim.Muon(p, lr=0.01))
    plan = settle_plan(job, Plan(layout=Layout.parse(layout)))
    return assemble(job, plan, Group.world(), torch.device("cpu"), total_steps=2).composed.remarks


def test_muon_on_parts_is_told(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(2, _remarks, "data=2") == [(), ()]
    assert all("bfloat16" in remark for (remark,) in ranks(2, _remarks, "shard=2"))


@pytest.mark.parametrize("model", [_TwoBuckets, _InPieces])
def test_buckets_that_are_sent_in_the_backward_pass(
    model: Callable[[], nn.Module], ranks: Callable[..., list[Any]]
) -> None:
    """float32 here, because one bucket alone is sent at the end."""
    losses, state, _ = _train(_job(model=model))
    for found, weights, _ in ranks(2, _train, _job(model=model)):
        torch.testing.assert_close(found, losses, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(weights, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case != "sparse"])
@pytest.mark.parametrize(("size", "layout"), [(2, "shard=2"), (3, "shard=3"), (4, "data=2,shard=2")])
def test_sharded_equals_serial(case: str, size: int, layout: str, ranks: Callable[..., list[Any]]) -> None:
    serial_losses, serial_state, serial_metrics = _train(CASES[case]())
    for losses, state, metrics in ranks(size, _train, CASES[case](), None, 5, layout):
        torch.testing.assert_close(losses, serial_losses, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(state, serial_state, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(metrics, serial_metrics, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_stage_two_equals_serial(micro_batch: int | None, ranks: Callable[..., list[Any]]) -> None:
    serial = _train(_job())
    for found in ranks(2, _train, _job(), micro_batch, 5, "shard=2", 2):
        for here, there in zip(found, serial, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-11)


def _sent(zero_stage: int) -> int:
    """Bytes that one rank hands over in its second step, in two passes."""
    job = _job()
    plan = settle_plan(job, Plan(layout=Layout(shard=2), micro_batch=3, zero_stage=zero_stage))
    assembly = assemble(job, plan, Group.world(), torch.device("cpu"), total_steps=2)
    stream = batches(job.data.train, batch_size=job.batch_size, seed=0, epoch=0, rank=assembly.samples.rank, ranks=2)
    before = 0
    for _ in range(2):
        before = assembly.mesh.meter.payload_bytes
        batch = next_batch(stream, assembly.samples, assembly.device)
        assert batch is not None
        take_step(assembly, batch)
    stream.close()
    return assembly.mesh.meter.payload_bytes - before


def test_stage_two_gathers_once_in_every_pass(ranks: Callable[..., list[Any]]) -> None:
    every, once = ranks(2, _sent, 3), ranks(2, _sent, 2)
    parameters = sum(value.numel() * value.element_size() for value in _mlp().double().parameters())
    passes = -(-_job().batch_size // 2 // 3)
    for more, less in zip(every, once, strict=True):
        assert more - less == pytest.approx(passes * parameters / 2, rel=0.25)  # parts are padded to equal sizes


def test_sparse_gradients_cannot_be_sharded() -> None:
    with pytest.raises(PlanError, match=r"bag.weight has sparse gradients .* use data="):
        check_model(_Bag(), Plan(layout=Layout(shard=2)), batch_size=8, batch_norm="global")


def test_accumulation_equals_one_pass() -> None:
    """The same step in pieces on one worker, and with pieces of another size."""
    whole = _train(_job(clip_norm=0.05))
    for micro_batch in (1, 4, 12, 100):
        pieces = _train(_job(clip_norm=0.05), micro_batch)
        torch.testing.assert_close(pieces[1], whole[1], rtol=1e-10, atol=1e-11)


def test_parameter_without_gradient_is_left_alone(ranks: Callable[..., list[Any]]) -> None:
    """Weight decay would move an unused parameter if its missing gradient became zero."""
    torch.manual_seed(0)
    before = _Branches().double().state_dict()["never.weight"]
    for _, state, _ in ranks(2, _train, _job(model=lambda: _Branches().double())):
        assert torch.equal(state["never.weight"], before)
        assert not torch.equal(state["always.weight"], _Branches().double().state_dict()["always.weight"])
