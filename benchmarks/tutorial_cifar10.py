"""The CIFAR-10 tutorial everybody copies against `shardwise train cifar10`: whole-process wall time, same accuracy.

    python benchmarks/tutorial_cifar10.py --data DIR [--epochs 4] [--rounds 5] [--out results.json]

Both sides train the tutorial's LeNet for the same number of epochs, batch 100, SGD with lr 0.001 and momentum 0.9, and
evaluate it once on the test images; they run in turns, each a process of its own, timed from outside with start-up
included. Neither writes a checkpoint of the optimizer; shardwise also writes its weights, events and summary.
The tutorial side is its usual code: a DataLoader that converts one PIL image at a time, one process, all threads.

The floor is what the arithmetic alone would take: the operations of forward and backward passes (multiply-adds of the
convolutions and matrix products counted twice) over the rates this machine reaches on a convolution and a matrix product
that suit it well (64 to 64 channels, 3x3; 1024 cubed), measured in the same run with all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import LeNet

TRAIN_SAMPLES, TEST_SAMPLES, BATCH = 50_000, 10_000, 100


class _Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """CIFAR-10 the way torchvision reads and converts it: PIL image -> ToTensor -> Normalize, one at a time."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        pixels, self.labels = [], []
        for name in files:
            with (folder / name).open("rb") as file:
                record = pickle.load(file, encoding="latin1")
            pixels.append(record["data"])
            self.labels += list(record["labels"])
        self.images = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy()
        self.mean = torch.tensor([0.5, 0.5, 0.5]).view(3, 1, 1)
        self.deviation = torch.tensor([0.5, 0.5, 0.5]).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = Image.fromarray(self.images[index])
        tensor = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return tensor.clone().sub_(self.mean).div_(self.deviation), self.labels[index]


def tutorial(folder: Path, epochs: int, result: Path) -> None:
    """The tutorial's loop."""
    batches = folder / "cifar-10-batches-py"
    train = _Pictures(batches, [f"data_batch_{n}" for n in range(1, 6)])
    test = _Pictures(batches, ["test_batch"])
    train_loader = torch.utils.data.DataLoader(train, batch_size=BATCH, shuffle=True)
    test_loader = torch.utils.data.DataLoader(test, batch_size=BATCH)
    net = LeNet()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    for _ in range(epochs):
        for inputs, labels in train_loader:
            optimizer.zero_grad()
            loss = criterion(net(inputs), labels)
            loss.backward()
            optimizer.step()
    correct = 0
    with torch.no_grad():
        for inputs, labels in test_loader:
            correct += int((net(inputs).argmax(1) == labels).sum())
    result.write_text(json.dumps({"accuracy": correct / len(test)}), encoding="utf-8")


def lenet_flops(samples: int) -> tuple[float, float]:
    """Forward operations of LeNet's convolutions and linear layers for so many images; a multiply-add counts as two."""
    convolutions = 2.0 * (6 * 28 * 28 * 3 * 25 + 16 * 10 * 10 * 6 * 25)
    linears = 2.0 * (400 * 120 + 120 * 84 + 84 * 10)
    return convolutions * samples, linears * samples


def measured_rates() -> tuple[float, float]:
    """FLOP/s of a well-shaped convolution and matrix product, forward, all cores, best of several."""
    images, kernel = torch.randn(32, 64, 32, 32), torch.randn(64, 64, 3, 3)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    with torch.no_grad():
        convolution = _best(lambda: torch.conv2d(images, kernel, padding=1))
        product = _best(lambda: left @ right)
    return 2.0 * 32 * 64 * 64 * 9 * 32 * 32 / convolution, 2.0 * 1024**3 / product


def _best(work: Any) -> float:
    times = []
    for _ in range(20):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def floor_seconds(epochs: int) -> dict[str, float]:
    """Seconds that the arithmetic alone would take, and the rates it was computed with."""
    convolution_rate, product_rate = measured_rates()
    # A training step is a forward pass and two of its size backwards, but the first convolution needs no input gradient.
    train_convolutions, train_linears = lenet_flops(TRAIN_SAMPLES * epochs)
    first = 2.0 * 6 * 28 * 28 * 3 * 25 * TRAIN_SAMPLES * epochs
    test_convolutions, test_linears = lenet_flops(TEST_SAMPLES)
    seconds = (3 * train_convolutions - first + test_convolutions) / convolution_rate
    seconds += (3 * train_linears + test_linears) / product_rate
    return {"seconds": seconds, "convolution_flops": convolution_rate, "matmul_flops": product_rate}


def _timed(command: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return time.perf_counter() - began


def compare(data: Path, epochs: int, rounds: int) -> dict[str, Any]:
    """Run both sides in turns and report times, ratios and accuracies."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(rounds):
            result, run = Path(folder) / f"tutorial{index}.json", Path(folder) / f"run{index}"
            here = [sys.executable, str(Path(__file__).resolve()), "--data", str(data), "--epochs", str(epochs)]
            theirs = _timed([*here, "--tutorial", str(result)])
            settings = [f"data={data}", "lr=0.001", "schedule=constant", f"seed={index}"]
            ours = _timed([
                *(str(Path(sys.executable).with_name("shardwise")), "train", "cifar10", "--quiet", "--out", str(run)),
                *("--epochs", str(epochs), "--batch-size", str(BATCH)),
                *("--evaluate-every", "0", "--no-last-checkpoint"),
                *(word for text in settings for word in ("--set", text)),
            ])  # fmt: skip
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            floor = floor_seconds(epochs)
            row = {"tutorial_seconds": theirs, "shardwise_seconds": ours, "floor_seconds": floor["seconds"]}
            row |= {"speedup": theirs / ours, "over_floor": ours / floor["seconds"]}
            row["train_over_floor"] = summary["train_seconds"] / floor["seconds"]
            row |= {"tutorial_accuracy": json.loads(result.read_text(encoding="utf-8"))["accuracy"]}
            row |= {"shardwise_accuracy": summary["metrics"]["accuracy"]}
            rows.append(row)
            print(f"round {index + 1}: " + "  ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    spread = {name: [min(row[name] for row in rows), max(row[name] for row in rows)] for name in rows[0]}
    print("median:  " + "  ".join(f"{name} {value:.3f}" for name, value in medians.items()))
    machine = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "torch": torch.__version__}
    return {"machine": machine, "epochs": epochs, "rounds": rows, "median": medians, "spread": spread, "rates": floor}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tutorial", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tutorial is not None:
        tutorial(arguments.data, arguments.epochs, arguments.tutorial)
        return
    document = compare(arguments.data, arguments.epochs, arguments.rounds)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
