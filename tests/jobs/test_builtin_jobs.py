"""The built-in jobs learn what they say, in a plain serial loop."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shardwise.data.loader import batches, eval_batches
from shardwise.errors import DataError
from shardwise.jobs.autoencoder import autoencoder
from shardwise.jobs.charlm import CharGPT, bits_per_character, charlm
from shardwise.jobs.cifar10 import LeNet, cifar10
from shardwise.jobs.digits import digit_arrays, digits
from shardwise.jobs.linear import hinge_loss, linear, signs, squares_loss
from shardwise.jobs.mnist import mnist
from shardwise.run.jobfile import built_in_names, find_job
from shardwise.spec.job import Job

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def real(name: str) -> str:
    """A folder of real data next to the repository."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"no {SHARED / name}: the real {name} images are not here")
    return str(SHARED / name)


def train(job: Job, steps: int | None = None) -> tuple[nn.Module, dict[str, float]]:
    """What everybody writes: one process, one loop. The model and its metrics on the test split."""
    assert job.loss is not None
    torch.manual_seed(job.seed)
    model = job.model()
    wants_model = "model" in inspect.signature(job.optimizer).parameters
    optimizer = job.optimizer(model if wants_model else model.parameters())
    length = job.data.train.length
    total = steps or (job.epochs or 1) * math.ceil(length / job.batch_size)
    schedule = job.schedule(optimizer, total) if callable(job.schedule) else None
    step = epoch = 0
    while step < total:
        for batch in batches(job.data.train, batch_size=job.batch_size, seed=job.seed, epoch=epoch):
            optimizer.zero_grad()
            job.loss(model(batch.inputs), batch.targets).backward()
            if isinstance(job.clip_norm, float):
                nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.step()
            if schedule:
                schedule.step()
            step += 1
            if step == total:
                break
        epoch += 1
    return model, evaluate(job, model)


@torch.no_grad()
def evaluate(job: Job, model: nn.Module) -> dict[str, float]:
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in job.metrics}
    for batch in eval_batches(job.data.test, batch_size=500):
        output = model.eval()(batch.inputs)
        for name, metric in job.metrics.items():
            sums[name] += torch.stack([torch.as_tensor(value).double() for value in metric(output, batch.targets)])
    return {name: (total / count).item() for name, (total, count) in sums.items()}


def test_there_are_no_others_than_those_tested_here() -> None:
    assert built_in_names() == ["autoencoder", "charlm", "cifar10", "digits", "linear", "mnist", "moe"]


@pytest.mark.parametrize("name", built_in_names())
def test_a_job_reads_as_an_example(name: str) -> None:
    found = find_job(name)
    assert found.parameters.keys() >= {"lr", "batch_size", "epochs", "seed"}
    assert inspect.getdoc(found.function)
    assert len(Path(inspect.getfile(found.function)).read_text().splitlines()) < 160
    job = found.call({"seed": "5", "epochs": "2"}).job
    assert (job.name, job.seed, job.epochs) == (name, 5, 2)


def test_the_digits_are_whole_and_split_as_stated() -> None:
    inputs, targets = digit_arrays("train")
    test_inputs, test_targets = digit_arrays("test")
    assert inputs.shape == (1438, 1, 8, 8)
    assert test_inputs.shape == (359, 1, 8, 8)
    counts = torch.bincount(targets, minlength=10) + torch.bincount(test_targets, minlength=10)
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as published with the data set
    assert (inputs.min().item(), inputs.max().item()) == (0, 1)
    assert test_targets[:2].tolist() == [4, 9]  # the 5th and the 10th image; the set begins 0, 1, 2, ...


def test_digits_learns() -> None:
    _, metrics = train(digits())
    assert metrics["accuracy"] > 0.97


def test_least_squares_comes_near_the_exact_solution() -> None:
    job = linear(l2=0.0)
    model, metrics = train(job)
    images, labels = digit_arrays("train")
    rows = torch.cat([images.flatten(1), torch.ones(len(images), 1)], dim=1).double()
    exact = rows @ torch.linalg.lstsq(rows, signs(labels).double(), driver="gelsd").solution
    least = squares_loss(exact, labels).item()
    with torch.no_grad():
        reached = squares_loss(model(images.flatten(1)).double(), labels).item()
    assert least <= reached < 1.1 * least
    assert metrics["accuracy"] > 0.92


@pytest.mark.parametrize(
    "job",
    [linear(loss="hinge"), linear(batch_size="full", lr=0.1, epochs=200), linear(batch_size=1, lr=0.01, epochs=2)],
)
def test_linear_learns_with_either_loss_and_any_batch(job: Job) -> None:
    assert train(job)[1]["accuracy"] > 0.88


def test_full_batch_is_the_training_set() -> None:
    assert linear(batch_size="full").batch_size == 1438


def test_losses_of_linear_by_hand() -> None:
    scores, target = torch.zeros(1, 10), torch.tensor([3])
    scores[0, 3], scores[0, 4] = 0.5, 2.0
    assert squares_loss(scores, target).item() == (0.25 + 9.0 + 8.0) / 2
    assert hinge_loss(scores, target).item() == 0.5 + 3.0 + 8.0


def test_autoencoder_beats_the_best_linear_code() -> None:
    images, held_out = (digit_arrays(split)[0].flatten(1) for split in ("train", "test"))
    mean = images.mean(dim=0)
    axes = torch.linalg.svd(images - mean, full_matrices=False).Vh[:8]
    linear_code = ((held_out - mean) @ axes.T @ axes + mean - held_out).square().mean().item()
    assert 0.02 < linear_code < 0.03
    _, metrics = train(autoencoder(epochs=15))
    assert metrics["mean_squared_error"] < 0.85 * linear_code


def test_charlm_learns_more_than_letter_frequencies() -> None:
    job = charlm(layers=1, block=32)
    codes = torch.cat([batch.inputs.flatten() for batch in eval_batches(job.data.test, batch_size=64)])  # type: ignore[union-attr]
    frequencies = torch.bincount(codes).double() / len(codes)
    entropy_bits = -(frequencies[frequencies > 0] * frequencies[frequencies > 0].log2()).sum().item()
    assert 4 < entropy_bits < 5
    _, metrics = train(job, steps=200)
    assert 1 < metrics["bits_per_character"] < 0.8 * entropy_bits


def test_charlm_does_not_look_ahead() -> None:
    model = CharGPT(vocabulary=11, block=7, width=12, layers=2, heads=3)
    text = torch.arange(14).view(2, 7) % 11
    changed = text.clone()
    changed[:, 5] = 10
    before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_charlm_ties_embedding_and_head() -> None:
    model = CharGPT(vocabulary=11, block=7, width=12, layers=1, heads=3)
    assert model.head.weight is model.characters.weight
    assert sum(parameter is model.head.weight for parameter in model.parameters()) == 1


def test_charlm_reads_another_text(tmp_path: Path) -> None:
    (tmp_path / "abc.txt").write_text("abcab " * 100)
    job = charlm(data=str(tmp_path / "abc.txt"), block=9)
    assert job.data.classes == (" ", "a", "b", "c")
    inputs = next(iter(eval_batches(job.data.train, batch_size=2))).inputs
    assert isinstance(inputs, Tensor)
    assert inputs.shape == (2, 9)


def test_lenet_is_that_of_the_tutorial() -> None:
    model = LeNet()
    shapes = [tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() > 1]
    assert shapes == [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_cifar10_can_be_trained_as_in_the_tutorial() -> None:
    job = cifar10(lr=0.001, schedule="constant")
    optimizer = job.optimizer(LeNet().parameters())
    assert job.schedule is None
    assert job.batch_size == 100
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.001, 0.9)


def test_cifar10_learns_on_real_images() -> None:
    job = cifar10(data=real("cifar10-official-6k"), lr=0.03, batch_size=50, augment=True)
    assert train(job, steps=300)[1]["accuracy"] > 0.3  # 0.1 is chance


def test_mnist_learns_on_real_images() -> None:
    assert train(mnist(data=real("mnist")), steps=150)[1]["accuracy"] > 0.93


@pytest.mark.parametrize("job", [cifar10, mnist])
def test_missing_images_are_reported_when_they_are_read(job: Callable[..., Job], tmp_path: Path) -> None:
    data = job(data=str(tmp_path / "nowhere")).data
    with pytest.raises(DataError, match="nowhere"):
        _ = data.train


def test_bits_per_character_by_hand() -> None:
    scores = torch.zeros(2, 3, 4)
    total, count = bits_per_character(scores, torch.zeros(2, 3, dtype=torch.long))
    assert (total.item(), count.item()) == pytest.approx((12.0, 6))  # four characters, equally likely: two bits each
