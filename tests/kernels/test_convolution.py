"""The compiled convolutions against float64: values, rounding, bits from run to run, and what goes to torch instead."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.kernels import convolution, install, library
from shardwise.kernels.convolution import (
    NEVER,
    convolve,
    fills_lanes,
    may_pay,
    most_filled,
    pays,
    sizes,
    sparse_gradients,
    turned,
    weight_gradient,
)
from shardwise.kernels.install import replace, use_fast_kernels

EPS = torch.finfo(torch.float32).eps
Case = tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int]]


@pytest.fixture
def kernels() -> ctypes.CDLL:
    loaded = library.load_convolutions()
    if loaded is None:
        pytest.skip("convolutions are torch's here: no AVX-512, or installed without a C compiler")
    return loaded


@pytest.fixture
def in_place(kernels: ctypes.CDLL) -> Iterator[torch.library.Library]:
    registration = replace("convolutions")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield registration
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ours were asked to compute."""
    seen: list[str] = []

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            seen.append("image" if named.get("back") else name)
            return work(*arguments, **named)

        return call

    monkeypatch.setattr(convolution, "convolve", watched("forward", convolve))
    monkeypatch.setattr(convolution, "weight_gradient", watched("weight", weight_gradient))

    def watched_sparse(*arguments: Any) -> Any:
        found = sparse_gradients(*arguments)
        seen.extend(f"sparse {name}" for name, one in zip(("image", "weight"), found, strict=False) if one is not None)
        return found

    monkeypatch.setattr(convolution, "sparse_gradients", watched_sparse)
    return seen


def cases(count: int, whole_numbers: bool) -> Iterator[Case]:
    """Image, weights, bias, gradient of the output, padding, of awkward sizes."""
    draw = random.Random(count)
    torch.manual_seed(count)
    while count:
        size = draw.choice((3, 5, 7))
        high, wide = draw.randrange(size), draw.randrange(size)
        samples, inside, outside = draw.choice((1, 2, 33)), draw.choice((1, 2, 3, 5, 8)), draw.randrange(1, 9)
        height, width = draw.randrange(1, 20), draw.choice((1, 3, 7, 15, 16, 17, 31, 33, 40, 70))
        tall, broad = height + 2 * high - size + 1, width + 2 * wide - size + 1
        if tall < 1 or broad < 1 or samples * height * width > 20_000:
            continue
        shapes = (
            (samples, inside, height, width),
            (outside, inside, size, size),
            (outside,),
            (samples, outside, tall, broad),
        )
        image, weight, bias, slope = (
            torch.randint(-3, 4, shape).float() if whole_numbers else torch.randn(shape) for shape in shapes
        )
        yield image, weight, bias, slope, (high, wide)
        count -= 1


def ours(kernels: ctypes.CDLL, case: Case, shape: Any = None) -> list[Tensor]:
    image, weight, bias, slope, padding = case
    shape = shape or sizes(image, weight, padding)
    out = convolve(kernels, image, weight, bias, shape, back=False)
    of_image = convolve(kernels, slope, weight, None, turned(shape), back=True)
    others = weight_gradient(kernels, image, weight, slope, shape, with_bias=True)
    assert out is not None
    assert of_image is not None
    assert others is not None
    assert others[1] is not None
    return [out, of_image, others[0], others[1]]


def exact(case: Case, absolute: bool = False) -> list[Tensor]:
    image, weight, bias, slope = (part.double() for part in case[:4])
    padding = case[4]
    if absolute:
        image, weight, bias, slope = image.abs(), weight.abs(), bias.abs(), slope.abs()
    out = nn.functional.conv2d(image, weight, bias, padding=padding)
    of_image, of_weight, of_bias = torch.ops.aten.convolution_backward(
        slope, image, weight, [len(bias)], [1, 1], list(padding), [1, 1], False, [0, 0], 1, [True, True, True]
    )
    return [out, of_image, of_weight, of_bias]


def test_whole_numbers_are_exact(kernels: ctypes.CDLL) -> None:
    for case in cases(60, whole_numbers=True):
        for found, right in zip(ours(kernels, case), exact(case), strict=True):
            assert torch.equal(found.double(), right), [part.shape for part in case[:4]]


def test_planted_faults_are_seen(kernels: ctypes.CDLL) -> None:
    """The check above, on a gradient by a kernel that is not turned around, and on one without the last sample."""
    unturned, short, count = 0, 0, 0
    for case in cases(30, whole_numbers=True):
        image, weight, _, slope, padding = case
        shape = sizes(image, weight, padding)
        _, of_image, of_weight, _ = exact(case)
        found = convolve(kernels, slope, weight.transpose(0, 1).contiguous(), None, turned(shape), back=False)
        assert found is not None
        unturned += not torch.equal(found.double(), of_image)
        shape[0] -= 1
        others = weight_gradient(kernels, image, weight, slope, shape, with_bias=True)
        assert others is not None
        short += not torch.equal(others[0].double(), of_weight)
        count += 1
    assert unturned >= 0.9 * count
    assert short >= 0.9 * count


def test_rounding_is_that_of_float32(kernels: ctypes.CDLL) -> None:
    for case in cases(40, whole_numbers=False):
        weight, slope = case[1], case[3]
        terms = (weight[0].numel(), weight[:, 0].numel(), slope[:, 0].numel(), slope[:, 0].numel())
        for found, right, size, count in zip(
            ours(kernels, case), exact(case), exact(case, absolute=True), terms, strict=True
        ):
            # Rounding errors of a sum of n products grow like a random walk: about sqrt(n) of an eps of their sizes.
            assert ((found - right).abs() <= (2 + count**0.5) * EPS * size).all(), [part.shape for part in case[:4]]


def test_bits_depend_neither_on_addresses_nor_on_the_place_in_a_batch(kernels: ctypes.CDLL) -> None:
    def moved(tensor: Tensor, by: int) -> Tensor:
        return torch.zeros(tensor.numel() + by)[by:].copy_(tensor.view(-1)).view(tensor.shape)

    for case in cases(20, whole_numbers=False):
        first = ours(kernels, case)
        for by in (1, 4, 7):
            again = ours(kernels, (*(moved(part, by) for part in case[:4]), case[4]))  # type: ignore[arg-type]
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        last = ours(kernels, (case[0][-1:], case[1], case[2], case[3][-1:], case[4]))
        assert torch.equal(last[0], first[0][-1:])
        assert torch.equal(last[1], first[1][-1:])


def test_what_is_not_finite_comes_through(kernels: ctypes.CDLL) -> None:
    for case in cases(20, whole_numbers=True):
        image, weight, bias, slope, padding = case
        shape = sizes(image, weight, padding)
        for value in (float("nan"), float("inf"), -float("inf")):
            spoilt = image.clone()
            spoilt[-1, 0, -1, -1] = value
            found = convolve(kernels, spoilt, weight, bias, shape, back=False)
            right = exact((spoilt, weight, bias, slope, padding))[0].float()
            assert found is not None
            assert torch.equal(torch.nan_to_num(found, 1e9, 2e9, 3e9), torch.nan_to_num(right, 1e9, 2e9, 3e9))
            broken = weight.clone()
            broken[-1, -1, 0, 0] = value
            assert convolve(kernels, image, broken, bias, shape, back=False) is None
            steep = slope.clone()
            steep[0, 0, 0, 0] = value
            assert weight_gradient(kernels, image, weight, steep, shape, with_bias=True) is None


def sparse_cases(count: int, whole_numbers: bool) -> Iterator[Case]:
    """As `cases`, with up to 16 inputs and a gradient of which one value in eight is left."""
    draw = random.Random(count)
    for image, weight, bias, slope, padding in cases(count, whole_numbers):
        inside = draw.choice([c for c in range(1, 17) if weight.shape[-1] * -(-weight.shape[-1] * c // 16) <= 28])
        image = image.repeat(1, inside, 1, 1)[:, :inside].contiguous()
        weight = weight.repeat(1, inside, 1, 1)[:, :inside].contiguous()
        image, weight = image.roll(1, 0), weight.roll(1, 1)
        slope = slope * (torch.rand(slope.shape) < 0.125)
        yield image, weight, bias, slope, padding


def sparse(kernels: ctypes.CDLL, case: Case) -> list[Tensor | None]:
    image, weight, _, slope, padding = case
    shape = sizes(image, weight, padding)
    return list(sparse_gradients(kernels, image, weight, slope, shape, (True, True, True), (1.0, 1.0)))


def test_gradients_that_are_mostly_zero(kernels: ctypes.CDLL) -> None:
    shapes = set()
    for whole_numbers in (True, False):
        for case in sparse_cases(80, whole_numbers):
            weight, slope = case[1], case[3]
            shapes.add((weight.shape[-1], -(-weight.shape[-1] * weight.shape[1] // 16)))
            terms = (weight[:, 0].numel(), slope[:, 0].numel(), slope[:, 0].numel())
            right, size = exact(case)[1:], exact(case, absolute=True)[1:]
            for found, one, most, count in zip(sparse(kernels, case), right, size, terms, strict=True):
                assert found is not None
                bound = 0 if whole_numbers else (2 + count**0.5) * EPS * most
                assert ((found - one).abs() <= bound).all(), [part.shape for part in case[:4]]
    assert len(shapes) == 12  # every kernel that is compiled


def test_planted_fault_in_sparse_gradients_is_seen(kernels: ctypes.CDLL) -> None:
    """The check above, on a gradient that lacks one of its values."""
    seen = count = 0
    for case in sparse_cases(20, whole_numbers=True):
        image, weight, bias, slope, padding = case
        if not slope.count_nonzero():
            continue
        less = slope.clone()
        less.view(-1)[int(slope.flatten().abs().argmax())] = 0
        found = sparse(kernels, (image, weight, bias, less, padding))
        pairs = zip(found, exact(case)[1:], strict=True)
        seen += any(one is not None and not torch.equal(one.double(), right) for one, right in pairs)
        count += 1
    assert seen == count > 10


def test_sparse_gradients_repeat_and_leave_the_rest_to_torch(kernels: ctypes.CDLL) -> None:
    def moved(tensor: Tensor, by: int) -> Tensor:
        return torch.zeros(tensor.numel() + by)[by:].copy_(tensor.view(-1)).view(tensor.shape)

    for case in sparse_cases(12, whole_numbers=False):
        first = sparse(kernels, case)
        for by in (1, 5):
            again = sparse(kernels, (*(moved(part, by) for part in case[:4]), case[4]))  # type: ignore[arg-type]
            for one, other in zip(again, first, strict=True):
                assert one is not None
                assert other is not None
                assert torch.equal(one, other)
        for part in (0, 1, 3):
            for value in (float("nan"), float("inf")):
                spoilt = [tensor.clone() for tensor in case[:4]]
                spoilt[part].view(-1)[-1] = value
                assert sparse(kernels, (*spoilt, case[4])) == [None] * 3  # type: ignore[arg-type]


def test_how_much_may_be_left_of_a_gradient(kernels: ctypes.CDLL) -> None:
    image, weight, slope = torch.randn(32, 6, 14, 14), torch.randn(16, 6, 5, 5), torch.zeros(32, 16, 10, 10)
    shape = sizes(image, weight, (0, 0))
    found = {}
    for rows in (0, 1, 2, 3):
        slope[:, :, :rows] = 1.0
        answer = sparse_gradients(kernels, image, weight, slope, shape, (True, True, True), (0.26, 0.19))
        found[rows] = [one is not None for one in answer]
    assert found == {0: [True] * 3, 1: [True] * 3, 2: [False, True, True], 3: [False] * 3}
    alone = sparse_gradients(kernels, image, weight, torch.zeros_like(slope), shape, (False, True, False), (0.26, 0.19))
    assert [one is not None for one in alone] == [False, True, False]
    assert most_filled(shape) == (0.2, NEVER)  # our dense kernels are fast
    assert most_filled(sizes(image[:1], weight, (0, 0))) == (NEVER, NEVER)  # too little work
    assert most_filled(sizes(torch.empty(16, 12, 14, 14), torch.empty(16, 12, 5, 5), (0, 0))) == (0.26, 0.19)
    assert not fills_lanes(1, 5)
    assert not fills_lanes(17, 3)


def test_behind_a_max_pooling_zeros_are_left_out(in_place: torch.library.Library, calls: list[str]) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(400, 10)),
    )
    with torch.no_grad():  # so that a ReLU leaves half
        for layer in model:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                layer.bias -= 0.3
    images = photos()

    def work() -> list[Tensor]:
        return list(torch.autograd.grad(model(images).square().sum(), tuple(model.parameters())))

    found = work()
    assert calls.count("sparse weight") == 2
    assert "weight" not in calls
    assert all(torch.equal(one, other) for one, other in zip(found, work(), strict=True))
    for one, other in zip(found, native(work), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 16, 5, bias=False), nn.ReLU(), nn.Conv2d(16, 8, 3)
    )


def photos(samples: int = 32) -> Tensor:
    return torch.randn(samples, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def native(work: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "LEAST_WORK", float("inf"))  # torch's kernels do it all
        return work()


def test_a_net_and_its_gradients_are_torchs_up_to_rounding(in_place: torch.library.Library, calls: list[str]) -> None:
    model, images = net(), photos().requires_grad_()
    wanted = (images, *model.parameters())

    def work() -> list[Tensor]:
        out = model(images)
        return [out, *torch.autograd.grad(out.square().sum(), wanted)]

    found = work()
    assert calls.count("forward") == 2
    assert calls.count("image") == 2
    assert calls.count("weight") == 2
    assert all(torch.equal(one, other) for one, other in zip(found, work(), strict=True))
    calls.clear()
    right = native(work)
    assert not calls
    for one, other in zip(found, right, strict=True):
        assert one.shape == other.shape
        assert one.stride() == other.stride()
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_without_gradient_of_images_and_in_double_backward(in_place: torch.library.Library, calls: list[str]) -> None:
    layer, images = net()[0], photos()
    assert isinstance(layer, nn.Conv2d)
    layer(images).square().sum().backward()
    assert calls == ["forward", "weight"]
    assert layer.bias is not None
    assert layer.bias.grad is not None

    def work() -> tuple[Tensor, ...]:
        inputs = images.clone().requires_grad_()
        slope = torch.autograd.grad(layer(inputs).square().sum(), inputs, create_graph=True)[0]
        return torch.autograd.grad(slope.square().sum(), (inputs, layer.weight))

    for one, other in zip(work(), native(work), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_what_it_was_not_written_for_goes_to_torch(in_place: torch.library.Library, calls: list[str]) -> None:
    images, weight = photos(), torch.randn(6, 3, 5, 5)
    conv = nn.functional.conv2d
    assert conv(images.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(images, weight).dtype == torch.bfloat16
    conv(images.to(memory_format=torch.channels_last), weight)
    conv(images[..., ::2], weight)
    conv(images, weight.permute(0, 1, 3, 2))
    conv(images, weight, stride=2)
    conv(images, weight, dilation=2)
    conv(images, weight, padding=5)
    conv(images, torch.randn(6, 1, 5, 5), groups=3)
    conv(images, torch.randn(6, 3, 4, 4))
    conv(images, torch.randn(9, 3, 5, 5))
    nn.functional.conv_transpose2d(images, torch.randn(3, 6, 5, 5))
    nn.functional.conv1d(torch.randn(50, 3, 400), torch.randn(6, 3, 5))
    assert conv(images[:0], weight).shape == (0, 6, 28, 28)
    with pytest.raises(RuntimeError, match="expected input"):
        conv(images, torch.randn(6, 4, 5, 5))
    torch.set_num_threads(2)
    conv(images, weight)
    assert not calls
    torch.set_num_threads(1)
    broken = weight.clone()
    broken[0, 0, 0, 0] = float("inf")
    assert torch.equal(conv(images, broken).isfinite(), native(lambda: conv(images, broken)).isfinite())
    conv(torch.randn(3, 64, 64), weight)  # one image, without a dim for the batch
    assert calls == ["forward", "forward"]


def test_tracing_and_transforms_see_the_same_operator(in_place: torch.library.Library, calls: list[str]) -> None:
    images = photos()
    assert net().to("meta")(torch.empty(4, 3, 32, 32, device="meta")).shape == (4, 8, 8, 8)
    with FakeTensorMode() as mode:
        fake = nn.functional.conv2d(mode.from_tensor(images), torch.empty(6, 3, 5, 5))
        assert fake.shape == (32, 6, 28, 28)
    assert not calls
    weight = torch.randn(6, 3, 5, 5)
    pairs = torch.vmap(lambda one: nn.functional.conv2d(one, weight))(images.view(2, 16, 3, 32, 32))
    assert (pairs.flatten(0, 1) - native(lambda: nn.functional.conv2d(images, weight))).abs().max() < 1e-4
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: nn.functional.conv2d(x, weight))(images)
    assert any(node.target is torch.ops.aten.convolution.default for node in traced.graph.nodes)


def test_the_rule_is_narrow() -> None:
    def chosen(samples: int, inside: int, outside: int, width: int, size: int, padding: int = 0) -> str:
        shape = sizes(
            torch.empty(samples, inside, width, width), torch.empty(outside, inside, size, size), [padding] * 2
        )
        return "".join(what[0] for what in ("forward", "image", "weight") if pays(what, shape))

    assert chosen(50, 3, 6, 32, 5) == "fiw"
    assert chosen(50, 6, 16, 14, 5) == "iw"
    assert chosen(50, 3, 16, 32, 3) == "i"
    assert chosen(50, 32, 8, 32, 3) == "f"
    assert chosen(50, 8, 8, 32, 7, 3) == "fi"
    assert chosen(16, 64, 64, 32, 3, 1) == ""  # a ResNet's
    assert chosen(1, 3, 6, 12, 5) == ""  # too little work
    assert chosen(128, 3, 6, 8, 5) == ""  # rows that fill less than half a vector


def test_other_processors_keep_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    library.load_convolutions.cache_clear()
    try:
        assert library.load_convolutions() is None
    finally:
        library.load_convolutions.cache_clear()


def test_convolutions_are_replaced_for_models_that_gain_from_it(
    monkeypatch: pytest.MonkeyPatch, kernels: ctypes.CDLL
) -> None:
    replaced: list[str] = []
    monkeypatch.setattr(install, "replace", replaced.append)
    plain = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(3, 3))
    use_fast_kernels(plain)
    assert replaced == ["pooling"]
    use_fast_kernels(plain.append(nn.MaxPool2d(2)))  # whose gradients may be mostly zero
    assert replaced == ["pooling", "pooling", "convolutions"]
    replaced.clear()
    use_fast_kernels(nn.Sequential(nn.Conv2d(1, 16, 3), nn.MaxPool2d(2)))
    assert replaced.pop() == "pooling"
    use_fast_kernels(net())
    assert replaced == ["pooling", "convolutions"]
    assert may_pay(nn.Conv2d(6, 16, 5))
    assert not may_pay(nn.Conv2d(6, 6, 5, stride=2))
    assert not may_pay(nn.Conv2d(6, 6, 4))
    assert not may_pay(nn.Conv2d(6, 6, 3, groups=2))
