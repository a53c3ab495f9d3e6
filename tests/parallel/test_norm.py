"""BatchNorm over several ranks, its arithmetic alone: values and gradients against torch's own in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from shardwise.dist.collectives import Group
from shardwise.parallel.norm import BatchState, globalize_batch_norm

SHAPES = {
    "rows": ((12, 5), nn.BatchNorm1d),
    "series": ((6, 5, 7), nn.BatchNorm1d),
    "images": ((4, 5, 6, 3), nn.BatchNorm2d),
    "volumes": ((2, 5, 3, 2, 4), nn.BatchNorm3d),
}


def _pass(layer: nn.Module, image: Tensor, slope: Tensor | None) -> list[Tensor]:
    """Output and all gradients; the slope of a plain sum has no memory of its own."""
    image = image.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(image)
    (out.sum() if slope is None else (out * slope).sum()).backward()
    assert image.grad is not None
    return [out.detach(), image.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def _layers(kind: type[nn.Module], *, affine: bool, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    ours = kind(5, affine=affine)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, 1.0)
    ours = ours.to(dtype)
    exact = copy.deepcopy(ours).double()
    assert globalize_batch_norm(ours, Group(), BatchState()) == 1
    return ours, exact


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11), (torch.bfloat16, 4e-2)]
)
def test_equals_torchs_in_float64(shape: str, affine: bool, dtype: torch.dtype, tolerance: float) -> None:
    size, kind = SHAPES[shape]
    ours, exact = _layers(kind, affine=affine, dtype=dtype)
    image = (torch.randn(size) * 3 + 20).to(dtype)
    if image.dim() == 4:
        image = image.contiguous(memory_format=torch.channels_last)
    for slope in (torch.randn(size).to(dtype), None):
        found = _pass(ours, image, slope)
        expected = _pass(exact, image.double(), None if slope is None else slope.double())
        assert len(found) == len(expected) == (4 if affine else 2)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            assert float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))
        ours.zero_grad()
        exact.zero_grad()
    for one, other in zip(ours.buffers(), exact.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=10 * tolerance)


def test_no_more_is_kept_for_the_backward_pass_than_the_input() -> None:
    ours, _ = _layers(nn.BatchNorm2d, affine=True, dtype=torch.float32)
    image, kept = torch.randn(8, 5, 16, 16), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(image)
    large = [tensor for tensor in kept if tensor.numel() >= image.numel()]
    assert len(large) == 1 and large[0].data_ptr() == image.data_ptr()


def test_digits_are_not_lost_to_a_large_mean() -> None:
    """The gradient of the input is taken from centred values, as torch's is."""
    ours, exact = _layers(nn.BatchNorm2d, affine=True, dtype=torch.float32)
    image = torch.randn(8, 5, 16, 16) + 300
    slope = (image - 300).sign()  # so that it leans on the normalised input
    found, expected = _pass(ours, image, slope)[1], _pass(exact, image.double(), slope.double())[1]
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
