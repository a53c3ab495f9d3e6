"""Convolution and max-pooling at once: values and gradients against float64, and everything a model may do in between."""

from __future__ import annotations

import copy
import gc
import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from shardwise.jobs.cifar10 import LeNet
from shardwise.kernels import convolution, install, library, pending
from shardwise.kernels.pending import PATIENCE, Pending
from shardwise.kernels.pooled import fuses, pays, pooled_gradients
from shardwise.kernels.pooled import pooled as pool

EPS = torch.finfo(torch.float32).eps
Use = Callable[[Tensor], Tensor]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions are put off in this test."""
    if library.load_convolutions() is None:
        pytest.skip("convolutions are torch's here: no AVX-512, or installed without a C compiler")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(nn.Conv2d, "forward", pending.putting_off(nn.Conv2d.forward))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often our kernels ran."""
    seen: list[str] = []
    for name in ("pooled", "pooled_gradients"):
        work = getattr(pending, name)

        def watched(*arguments: Any, work: Any = work, name: str = name, **named: Any) -> Any:
            seen.append(name)
            return work(*arguments, **named)

        monkeypatch.setattr(pending, name, watched)
    return seen


def _layer(inside: int = 3, outside: int = 6) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(inside, outside, 5)


def _image(inside: int = 3) -> Tensor:
    return torch.randn(20, inside, 16, 16, generator=torch.Generator().manual_seed(1))


def _gradients(layer: nn.Conv2d, image: Tensor, use: Use, *, images: bool = True) -> list[Tensor]:
    """The result of `use` on the layer's output, and the gradients of a function of it."""
    image = image.clone().requires_grad_(images)
    layer.zero_grad()
    result = use(layer(image))
    (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)).sum().backward()
    assert layer.weight.grad is not None
    found = [result.detach(), layer.weight.grad]
    found += [layer.bias.grad] if layer.bias is not None and layer.bias.grad is not None else []
    return [*found, image.grad] if image.grad is not None else found


def _torchs(layer: nn.Conv2d, image: Tensor, use: Use) -> list[Tensor]:
    """The same in float64, which is never put off."""
    return _gradients(copy.deepcopy(layer).double(), image.double(), use)


def _close(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        float((one - other).abs().max()) <= 200 * EPS * float(other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("seed", range(4))
def test_kernels_equal_float64_for_sizes_drawn_at_random(on: None, seed: int) -> None:
    draw, ran = random.Random(seed), 0
    torch.manual_seed(seed)
    while ran < 20:
        samples, inside, outside = (
            draw.choice((1, 2, 33)),
            draw.randint(1, 16),
            draw.choice((1, 3, 5, 8, 9, 16, 17, 32)),
        )
        size, padding, relu = draw.choice((3, 5, 7)), draw.randint(0, 2), draw.random() < 0.5
        image = torch.randn(samples, inside, draw.randint(6, 20), draw.randint(6, 37))
        weight, bias = torch.randn(outside, inside, size, size), torch.randn(outside) if draw.random() < 0.7 else None
        shape = convolution.sizes(image, weight, (padding, padding))
        if shape is None or min(shape[5], shape[6]) < 2 or not fuses(inside, size):
            continue
        done = pool(image, weight, bias, shape, relu=relu)
        assert done is not None
        slope = torch.randn_like(done[0])
        given = [None if part is None else part.double().requires_grad_() for part in (image, weight, bias)]
        out = F.conv2d(given[0], given[1], given[2], padding=padding)  # type: ignore[arg-type]
        out = F.max_pool2d(out.relu() if relu else out, 2)
        out.backward(slope.double())
        found = pooled_gradients(image, weight, slope, done[1], shape, (True, True, bias is not None))
        assert found is not None
        pairs = [(done[0], out.detach())] + [
            (one, part.grad) for one, part in zip(found, given, strict=True) if part is not None
        ]
        for one, other in pairs:
            assert one is not None and other is not None
            assert float((one - other).abs().max()) <= 200 * EPS * max(1.0, float(other.abs().max()))
        ran += 1


def test_the_forward_pass_has_the_bits_of_the_kernels_apart(on: None) -> None:
    layer, image = _layer(), _image()
    shape, kernels = convolution.sizes(image, layer.weight, (0, 0)), library.load_convolutions()
    assert kernels is not None and layer.bias is not None
    with torch.no_grad():
        apart = convolution.convolve(kernels, image, layer.weight, layer.bias, shape, back=False)
        done = pool(image, layer.weight, layer.bias, shape, relu=False)
    assert apart is not None and done is not None
    assert torch.equal(done[0], F.max_pool2d(apart, 2))


def test_ties_and_values_that_are_no_number_go_as_in_torch(on: None) -> None:
    for outside in (6, 16):
        layer = _layer(3, outside)
        image = torch.randint(0, 2, (20, 3, 16, 16)).float()
        image[3, 1, 5, 5] = float("nan")
        with torch.no_grad():
            layer.weight.copy_(layer.weight.sign())  # whole numbers: many windows have several largest values
        shape = convolution.sizes(image, layer.weight, (0, 0))
        done = pool(image, layer.weight, None, shape, relu=False)
        assert done is not None
        out, index = F.max_pool2d(F.conv2d(image, layer.weight), 2, return_indices=True)
        assert torch.equal(done[0].nan_to_num(1e9), out.nan_to_num(1e9))
        rows, columns = index // 12, index % 12
        assert torch.equal(done[1].long(), rows % 2 * 2 + columns % 2)


CHAINS: dict[str, Use] = {
    "pool": lambda y: F.max_pool2d(y, 2),
    "module": nn.MaxPool2d(2),
    "relu, pool": lambda y: F.max_pool2d(F.relu(y), (2, 2), stride=2),
    "method, pool": lambda y: torch.max_pool2d(y.relu(), 2),
    "relu in place, pool": nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    "relu_, pool": lambda y: F.max_pool2d(y.relu_(), 2),
    "shape, pool": lambda y: F.max_pool2d(y, 2) * y.shape[1] * y.size(0) * y.dim(),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("outside", [6, 16])
def test_chains_are_computed_at_once(on: None, counted: list[str], name: str, outside: int) -> None:
    layer, image = _layer(4, outside), _image(4)
    assert isinstance(layer(image), Pending)
    found = _gradients(layer, image, CHAINS[name])
    assert counted == ["pooled", "pooled_gradients"]
    assert _close(found, _torchs(layer, image, CHAINS[name]))


def _add_in_place(y: Tensor) -> Tensor:
    y.add_(1)
    return F.max_pool2d(y, 2) + y.mean()


def _relu_then_change(y: Tensor) -> Tensor:
    z = F.relu(y)
    y.add_(5)
    return z.sum() * y


def _double(y: Tensor) -> Tensor:
    """By a user's own function, whose argument goes past Python's protocol."""
    doubled: Tensor = _Double.apply(y)  # type: ignore[no-untyped-call]
    return doubled


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y * 2

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * 2


OTHERS: dict[str, Use] = {
    "nothing": lambda y: y,
    "relu": F.relu,
    "average": lambda y: F.avg_pool2d(y, 2),
    "window of 3": lambda y: F.max_pool2d(y, 3),
    "stride 1": lambda y: F.max_pool2d(y, 2, stride=1),
    "padding": lambda y: F.max_pool2d(y, 2, padding=1),
    "indices": lambda y: F.max_pool2d(y, 2, return_indices=True)[0],
    "pool and itself": lambda y: F.max_pool2d(y, 2) * y.square().mean(),
    "itself and pool": lambda y: y.square().mean() * F.max_pool2d(y, 2),
    "relu, pool, and all of them": lambda y: F.max_pool2d(F.relu(y), 2) * y.std() + F.relu(y).mean(),
    "added to in place": _add_in_place,
    "relu, then changed in place": _relu_then_change,
    "item": lambda y: F.max_pool2d(y, 2) * y[0, 0, 0, 0].item(),
    "list": lambda y: torch.cat([y, y], dim=1),
    "own function": _double,
    "relu, own function": lambda y: _double(F.relu(y)),
    "relu in place, own function": lambda y: _double(y.relu_()),
    "pool and own function": lambda y: F.max_pool2d(y, 2) * _double(y).square().mean(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_use_is_torchs(on: None, name: str) -> None:
    layer, image = _layer(), _image()
    assert isinstance(layer(image), Pending)
    assert _close(_gradients(layer, image, OTHERS[name]), _torchs(layer, image, OTHERS[name]))


def test_hooks_on_the_output_run_before_and_after_the_pooling(on: None) -> None:
    def sums(layer: nn.Conv2d, image: Tensor, after: bool) -> list[Tensor]:
        seen: list[Tensor] = []
        y = layer(image)
        if after:
            out = F.max_pool2d(y, 2)
        y.register_hook(lambda slope: seen.append(slope.abs().sum()))
        y.retain_grad()
        if not after:
            out = F.max_pool2d(y, 2)
        out.square().sum().backward()
        assert y.grad is not None
        return [*seen, y.grad]

    def asked(layer: nn.Conv2d, image: Tensor) -> list[Tensor]:
        y = layer(image)
        loss = (F.max_pool2d(F.relu(y), 2).square().sum() + y.mean()) * y.std()
        return list(torch.autograd.grad(loss, [y, layer.weight]))

    layer, image = _layer(), _image()
    for after in (False, True):
        assert _close(sums(layer, image, after), sums(copy.deepcopy(layer).double(), image.double(), after))
    assert _close(asked(layer, image), asked(copy.deepcopy(layer).double(), image.double()))


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_hooks_of_modules_see_what_they_would(on: None) -> None:
    def shapes(net: nn.Sequential, image: Tensor) -> list[Any]:
        seen: list[Any] = []

        def see(slopes: Any) -> None:
            seen.append(float(slopes[0].double().abs().mean()))

        net[0].register_forward_hook(lambda _, given, out: seen.append(float(out.detach().double().mean())))
        net[0].register_full_backward_hook(lambda _, inner, outer: see(outer))
        net[1].register_full_backward_hook(lambda _, inner, outer: see(inner))
        net(image).square().sum().backward()
        return seen

    net, image = nn.Sequential(_layer(), nn.MaxPool2d(2)), _image()
    found, expected = shapes(copy.deepcopy(net), image), shapes(copy.deepcopy(net).double(), image.double())
    assert len(found) == 3 and found == pytest.approx(expected, rel=1e-5)


def test_gradients_of_gradients(on: None) -> None:
    def penalty(layer: nn.Conv2d, image: Tensor) -> list[Tensor]:
        image = image.clone().requires_grad_()
        out = F.max_pool2d(F.relu(layer(image)), 2).square().sum()
        (slope,) = torch.autograd.grad(out, image, create_graph=True)
        slope.square().sum().backward()
        assert layer.weight.grad is not None and image.grad is not None
        return [layer.weight.grad, image.grad]

    layer, image = _layer(), _image()
    assert _close(penalty(copy.deepcopy(layer), image), penalty(copy.deepcopy(layer).double(), image.double()))


def test_what_changed_in_place_is_an_error_and_not_a_wrong_value(on: None) -> None:
    layer, image = _layer(), _image()
    y = layer(image)
    image.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.max_pool2d(y, 2)
    y = layer(image)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum()
    y = layer(image)
    out = F.max_pool2d(y, 2)
    y.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_output_that_is_kept_has_the_values_of_its_step(on: None) -> None:
    layer, image = _layer(), _image()
    kept = layer(image)
    expected = F.conv2d(image, layer.weight, layer.bias).detach()
    F.max_pool2d(kept, 2).sum().backward()
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.allclose(kept.detach(), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_put_off_where_nobody_differentiates_or_somebody_watches(on: None) -> None:
    layer, image = _layer(), _image()
    with torch.no_grad():
        assert type(layer(image)) is Tensor
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert type(layer(image)) is Tensor
    with FlopCounterMode(display=False) as counter:
        assert type(layer(image)) is Tensor
    assert counter.get_total_flops() > 0
    torch.set_num_threads(2)
    assert type(layer(image)) is Tensor
    torch.set_num_threads(1)
    layer.requires_grad_(False)
    assert type(layer(image.requires_grad_())) is Tensor
    assert type(_layer().double()(image.double())) is Tensor


def test_functional_transforms_are_torchs(on: None) -> None:
    layer, image = _layer(), _image()
    parameters: dict[str, Tensor] = dict(layer.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return F.max_pool2d(torch.func.functional_call(layer, values, (image,)), 2).square().mean()

    found = torch.func.grad(loss)(parameters)
    F.max_pool2d(layer(image), 2).square().mean().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None and torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_layer_that_is_never_pooled_is_left_alone_and_one_that_was_is_not(on: None) -> None:
    image, alone, both = _image(), _layer(), _layer()
    F.max_pool2d(both(image), 2)
    for _ in range(PATIENCE):
        for layer in (alone, both):
            y = layer(image)
            assert isinstance(y, Pending)
            y.sum()
    assert type(alone(image)) is Tensor and isinstance(both(image), Pending)


def test_values_that_are_not_finite_are_torchs(on: None) -> None:
    layer, image = _layer(), _image()
    image[0, 0, 3, 3] = float("inf")
    found = _gradients(layer, image, CHAINS["relu, pool"])
    expected = _gradients(copy.deepcopy(layer), image, lambda y: F.max_pool2d(F.relu(y + 0), 2))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not found[1].isfinite().all()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = float("nan")
    assert F.max_pool2d(layer(_image()), 2)[:, 0].isnan().all()


@pytest.mark.parametrize("name", [*CHAINS, *OTHERS])
def test_memory_is_given_back_without_the_collector(on: None, name: str) -> None:
    layer, image = _layer(), _image()
    gc.disable()
    try:
        y = layer(image)
        work = weakref.ref(y.work)
        out = {**CHAINS, **OTHERS}[name](y)
        out.sum().backward()
        del y, out
        assert work() is None
    finally:
        gc.enable()


def test_a_relu_stops_gradients_that_are_not_finite_as_torchs_does(on: None) -> None:
    layer, image = _layer(), _image()
    for use in (F.relu, lambda y: y.relu_()):
        values = use(layer(image))
        kept = values + 0
        slope = torch.where(kept > 0, 1.0, float("inf"))
        layer.zero_grad()
        kept.backward(slope)
        assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()


def test_a_whole_net_in_training(on: None, counted: list[str]) -> None:
    torch.manual_seed(0)
    net, images, labels = LeNet(), torch.randn(20, 3, 32, 32), torch.randint(0, 10, (20,))
    exact = copy.deepcopy(net).double()
    for model, given in ((net, images), (exact, images.double())):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(given), labels).backward()
            optimizer.step()
    assert counted == ["pooled"] * 2 + ["pooled_gradients"] * 2 + (["pooled"] * 2 + ["pooled_gradients"] * 2) * 2
    for one, other in zip(net.parameters(), exact.parameters(), strict=True):
        assert torch.allclose(one.double(), other, rtol=1e-4, atol=1e-6)


def test_a_planted_fault_is_seen(on: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is one that can fail: windows whose places are wrong give other gradients."""
    layer, image = _layer(), _image()
    right = pool

    def wrong(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor] | None:
        done = right(*arguments, **named)
        return None if done is None else (done[0], done[1] ^ 1)

    monkeypatch.setattr(pending, "pooled", wrong)
    assert not _close(_gradients(layer, image, CHAINS["pool"]), _torchs(layer, image, CHAINS["pool"]))


def test_it_is_installed_for_models_that_may_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.load_convolutions() is None:
        pytest.skip("no compiled convolutions here")
    asked: list[None] = []
    monkeypatch.setattr(install, "put_off_convolutions", lambda: asked.append(None))
    install.use_fast_kernels(nn.Sequential(nn.Conv2d(3, 6, 5, stride=2), nn.MaxPool2d(2)))
    install.use_fast_kernels(nn.Sequential(nn.Linear(3, 6)))
    assert not asked
    install.use_fast_kernels(LeNet())
    assert asked


def test_the_rule_leaves_small_work_and_few_channels(on: None) -> None:
    def shape(samples: int, outside: int) -> Any:
        return convolution.sizes(torch.empty(samples, 3, 32, 32), torch.empty(outside, 3, 5, 5), (0, 0))

    assert pays(shape(50, 6)) and pays(shape(50, 16))
    assert not pays(shape(1, 6)) and not pays(shape(50, 2)) and not pays(shape(50, 65))


def test_a_plan_may_leave_them_out(tmp_path: Path) -> None:
    """In processes of their own, because what is put in place stays."""
    if library.load_convolutions() is None:
        pytest.skip("no compiled convolutions here")
    code = """
import sys, torch, shardwise
from torch import nn
job = shardwise.Job(model=lambda: nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1176, 2)),
    data=(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)), loss=nn.functional.cross_entropy,
    optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch_size=8, epochs=1)
before = nn.Conv2d.forward
with shardwise.start(job, plan=shardwise.Plan(threads=1, kernels=sys.argv[1]), device="cpu") as run:
    for batch in run.batches():
        run.step(batch)
print(nn.Conv2d.forward is before)
"""
    for kernels, native in (("auto", "False"), ("torch", "True")):
        done = subprocess.run(
            [sys.executable, "-c", code, kernels],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.stdout.strip() == native, done.stderr


def test_tensors_without_memory_are_torchs(on: None, counted: list[str]) -> None:
    layer = nn.Sequential(_layer(), nn.ReLU(), nn.MaxPool2d(2))
    assert copy.deepcopy(layer).to("meta")(_image().to("meta")).shape == (20, 6, 6, 6)
    swapped = {name: parameter.to("meta") for name, parameter in layer.named_parameters()}
    assert torch.func.functional_call(layer, swapped, (_image().to("meta"),)).device.type == "meta"
    assert not counted
