"""Readers on the real files, where they lie next to the repository."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import shardwise.data as data
from shardwise.data.loader import batches, eval_batches

REAL = Path(__file__).parents[3] / "shared" / "data"


def real(*names: str) -> Path:
    path = REAL.joinpath(*names)
    if not path.exists():
        pytest.skip(f"REAL DATA ABSENT: {path} is not here, this reader was not tried on it")
    return path


def whole(source: Any) -> tuple[Any, Any]:
    batch = next(eval_batches(source, batch_size=source.length))
    return batch.inputs, batch.targets


def test_official_cifar10_images() -> None:
    splits = data.cifar10(real("cifar10-official-6k"), transform=data.ToFloat())
    images, labels = whole(splits.train)
    assert images.shape == (5000, 3, 32, 32)
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]  # frog, truck, truck, deer, ...
    # the channel means published for the full training set
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.01, rtol=0)
    images, labels = whole(splits.test)
    assert (len(images), splits.classes[labels[0]]) == (1000, "cat")


def test_mnist_files() -> None:
    splits = data.mnist(real("mnist"))
    images, labels = whole(splits.train)
    assert images.shape == (60000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(images.mean().item()) < 1e-3
    assert abs(images.std().item() - 1) < 1e-3
    assert len(whole(splits.test)[0]) == 10000


def test_adult_tables() -> None:
    before = ["age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation"]
    after = ["relationship", "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country"]
    names = [*before, *after, "income"]
    folder = real("adult")
    splits = data.csv(
        folder / "adult-train.csv", folder / "adult-test.csv", target="income", names=names, strip_target="."
    )
    (numbers, codes), targets = whole(splits.train)
    assert (numbers.shape, codes.shape) == ((32561, 6), (32561, 8))
    assert splits.classes == ("<=50K", ">50K")
    assert torch.bincount(targets).tolist() == [24720, 7841]
    torch.testing.assert_close(numbers.double().std(0, correction=0), torch.ones(6).double())
    assert codes.amax(0).tolist() == [8, 16, 7, 14, 6, 5, 2, 41]
    assert (codes == 0).sum(0).tolist() == [1836, 0, 0, 1843, 0, 0, 0, 583]
    assert torch.bincount(whole(splits.test)[1]).tolist() == [12435, 3846]


def test_tiny_shakespeare() -> None:
    splits = data.text(real("tinyshakespeare", "input.txt"), block=64)
    assert len(splits.classes) == 65
    batch: Any = next(batches(splits.train, batch_size=8, seed=0, epoch=0, shuffle=False))
    assert "".join(splits.classes[code] for code in batch.inputs[0]).startswith("First Citizen:\nBefore we proceed")
    assert torch.equal(batch.inputs[0, 1:], batch.targets[0, :-1])
    as_bytes: Any = whole(data.text(real("tinyshakespeare", "input.txt"), unit="byte", block=64).train)
    assert bytes(as_bytes[0][0].tolist()).startswith(b"First Citizen")


def test_cifar_image_folder(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(real("cifar10", "images.tar.xz")) as tar, warnings.catch_warnings():
        for _ in range(40):
            member = tar.next()
            assert member is not None
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                path = tmp_path / "images" / "some" / Path(member.name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
    images, _ = whole(data.image_folder(tmp_path / "images", size=32, transform=data.ToFloat()).train)
    assert images.shape[1:] == (3, 32, 32)
    assert len(images) > 30
    assert 0.1 < images.std() < 0.4
