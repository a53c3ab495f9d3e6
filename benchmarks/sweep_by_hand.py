"""The sweep of benchmarks/sweep.py as one writes it by hand for joblib, Optuna or Ray Tune: run by that script.

    python benchmarks/sweep_by_hand.py joblib|optuna|ray JOB DATA EPOCHS WORKERS LR,LR,...

The training is a plain PyTorch loop over tensors in memory, one thread each, with the model, batches, optimizer, schedule
and evaluation after each epoch that the built-in job has. Prints one JSON document: learning rate -> test accuracy.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def train(job: str, data: str, epochs: int, lr: float) -> float:
    import torch
    from torch import nn

    from shardwise.jobs.cifar10 import LeNet
    from shardwise.jobs.digits import DigitNet, digit_arrays

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if job == "digits":
        (inputs, targets), test, batch, momentum = digit_arrays("train"), digit_arrays("test"), 64, 0.9
        model: Any = DigitNet(8)
        scale = None
    else:
        from shardwise.data.readers.cifar import cifar10

        splits: Any = cifar10(data)
        (inputs, targets), batch, momentum = (splits.train.inputs, splits.train.targets), 100, 0.9
        test = (splits.test.inputs, splits.test.targets)
        model = LeNet()
        scale = (255.0, 0.5, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    steps = epochs * -(-len(inputs) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if job != "digits" else None

    def prepared(part: Any) -> Any:
        return part if scale is None else (part.float() / scale[0] - scale[1]) / scale[2]

    accuracy = 0.0
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs), batch):
            rows = order[start : start + batch]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(prepared(inputs[rows])), targets[rows]).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        model.eval()
        with torch.no_grad():
            right = sum(
                int((model(prepared(test[0][at : at + 500])).argmax(1) == test[1][at : at + 500]).sum())
                for at in range(0, len(test[0]), 500)
            )
        accuracy = right / len(test[0])
    return accuracy


def _joblib(job: str, data: str, epochs: int, workers: int, rates: list[float]) -> dict[float, float]:
    import joblib

    found = joblib.Parallel(n_jobs=workers)(joblib.delayed(train)(job, data, epochs, lr) for lr in rates)
    return dict(zip(rates, found, strict=True))


def _optuna(job: str, data: str, epochs: int, workers: int, rates: list[float]) -> dict[float, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study: Any = optuna.create_study(sampler=optuna.samplers.GridSampler({"lr": rates}), direction="maximize")
    study.optimize(
        lambda trial: train(job, data, epochs, trial.suggest_categorical("lr", rates)),
        n_trials=len(rates),
        n_jobs=workers,
    )
    return {trial.params["lr"]: trial.value for trial in study.trials}


def _ray(job: str, data: str, epochs: int, workers: int, rates: list[float]) -> dict[float, float]:
    import tempfile

    import ray
    from ray import tune

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
    tuner = tune.Tuner(
        lambda config: {"accuracy": train(job, data, epochs, config["lr"])},
        param_space={"lr": tune.grid_search(rates)},
        run_config=tune.RunConfig(storage_path=tempfile.mkdtemp(), verbose=0),
    )
    results = tuner.fit()
    return {result.config["lr"]: result.metrics["accuracy"] for result in results if result.config and result.metrics}


if __name__ == "__main__":
    side, job_name, folder, count, cores, texts = sys.argv[1:]
    run = {"joblib": _joblib, "optuna": _optuna, "ray": _ray}[side]
    answer = run(job_name, folder, int(count), int(cores), [float(text) for text in texts.split(",")])
    print(json.dumps({str(lr): value for lr, value in answer.items()}))
