"""Run: a finished training, read back from its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from shardwise.data.batch import tree_leaves, tree_map
from shardwise.data.loader import eval_batches
from shardwise.data.source import Source
from shardwise.errors import FolderError, JobError
from shardwise.run.build import build_model
from shardwise.run.export import load_weights
from shardwise.run.folder import RunFolder
from shardwise.run.progress import tell
from shardwise.run.tryout import call_model
from shardwise.spec.events import StepsEvent, read_events
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan


@final
@dataclass(frozen=True, repr=False)
class Run:
    """A finished training.

    Attributes:
        job: what was trained.
        folder: where everything of the run is kept.
        plan: how it ran.
        summary: the closing numbers, as `shardwise train --json` prints them.
    """

    job: Job
    folder: RunFolder
    plan: Plan
    summary: dict[str, Any]

    @classmethod
    def open(cls, path: Path | str, job: Job | Callable[..., Job]) -> Run:
        """A finished training from its folder, also one of the command line.

        Args:
            path: the run folder.
            job: what was trained, as it was; or its job function, which is called with the hyper-parameters of the run.

        Raises:
            FolderError: there is no run, or it is not finished.
        """
        folder = RunFolder.open(path)
        try:
            summary = json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))
            plan = Plan.from_dict(json.loads(folder.plan_path.read_text(encoding="utf-8")))
            settings = json.loads(folder.settings_path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FolderError(
                f"run folder {folder.path} has no {Path(error.filename).name}: the training is not finished; go on with --resume"
            ) from None
        if not isinstance(job, Job):
            job = job(**{name[4:]: item["value"] for name, item in settings.items() if name.startswith("set.")})
        return cls(job=job, folder=folder, plan=plan, summary={**summary, "run": str(folder.path)})

    def __repr__(self) -> str:
        numbers = "".join(f", test {name} {value:.4f}" for name, value in self.summary["metrics"].items())
        done = f"{self.summary['steps']} steps, last loss {self.summary['loss']:.4f}"
        return f"Run({self.folder.path}: {self.plan}, {done}{numbers})"

    @property
    def metrics(self) -> dict[str, float]:
        """Name -> value of the last evaluation of the test split; the mean loss is `loss`."""
        return dict(self.summary["metrics"])

    @cached_property
    def history(self) -> list[float]:
        """Mean loss over the global batch of every step, in order. A step that was repeated after a restart counts once."""
        losses: dict[int, float] = {}
        for event in read_events(self.folder.events_path):
            if isinstance(event, StepsEvent):
                losses.update(enumerate(event.losses, start=event.first_step))
        return [losses[step] for step in sorted(losses)]

    @cached_property
    def histories(self) -> dict[str, list[float]]:
        """Of a job with several objectives, name -> its mean loss in every step that took it, in order. Else empty."""
        losses: dict[str, dict[int, float]] = {}
        for event in read_events(self.folder.events_path):
            if isinstance(event, StepsEvent):
                for name, each in event.objectives.items():
                    taken = {event.first_step + place: loss for place, loss in enumerate(each) if loss is not None}
                    losses.setdefault(name, {}).update(taken)
        return {name: [each[step] for step in sorted(each)] for name, each in losses.items()}

    @cached_property
    def model(self) -> nn.Module:
        """The job's module with the final weights, on CPU, in evaluation mode."""
        model = build_model(self.job, torch.device("cpu"))
        load_weights(model, self.folder.weights_path)
        return model.eval()


@torch.no_grad()
def predict(run: Run, inputs: Any, *, batch_size: int | None = None) -> Any:
    """Outputs of the trained model for `inputs`.

    Args:
        run: a finished training.
        inputs: a tensor or array (or tuple or dict of them) whose first dim runs over samples, as the model takes
            them after the data's transforms; or a data source, whose own transforms are applied.
        batch_size: samples per forward pass; the job's evaluation batch size by default.

    Returns:
        The model's outputs joined along the first dim, in the order of the inputs. What cannot be joined in a tuple or
        dict (a cache, a single number) is None there, with a warning.

    Raises:
        JobError: the inputs have no samples, or first dims that differ; the outputs have no tensors, or shapes that differ.
    """
    size = batch_size or run.job.eval_batch_size or run.job.batch_size
    outputs = [call_model(run.model, part) for part in _parts(inputs, size)]
    if not outputs:
        raise JobError("predict was given no samples")
    left_out: dict[str, str] = {}
    joined = _join(outputs, "", left_out)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(joined)):
        raise JobError(
            f"predict: the model returned no tensor with a row for each sample, but a {type(outputs[0]).__name__}: let it "
            "return a tensor, or a tuple or dict of tensors, or call run.model on your batches"
        )
    if left_out:
        named = ", ".join(f"{place} ({kind})" for place, kind in left_out.items())
        tell(f"warning: predict gives None for what has no row for each sample in the model's output: {named}")
    return joined


def _parts(inputs: Any, size: int) -> Iterator[Any]:
    if isinstance(inputs, Source):
        for batch in eval_batches(inputs, batch_size=size):
            yield batch.inputs
        return
    tree = tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, inputs)
    lengths = {len(leaf) for leaf in tree_leaves(tree)}
    if len(lengths) != 1:
        raise JobError(f"predict: the inputs have first dims {sorted(lengths)}; all must have one entry a sample")
    for start in range(0, lengths.pop(), size):
        yield tree_map(lambda leaf: leaf[start : start + size], tree)  # noqa: B023  # used before the next turn


def _join(outputs: list[Any], place: str, left_out: dict[str, str]) -> Any:
    """The outputs of all batches as one; what has no rows of samples is None, and noted in `left_out`."""
    first = outputs[0]
    if isinstance(first, Tensor) and first.dim():
        if len({output.shape[1:] for output in outputs}) > 1:
            shapes = sorted({tuple(output.shape) for output in outputs})
            raise JobError(
                f"predict: output{place} has shapes {shapes} in different batches, which cannot be joined: "
                "call predict for one batch (batch_size=...), or let the model return one shape"
            )
        return torch.cat(outputs)
    if isinstance(first, dict):
        return {key: _join([output[key] for output in outputs], f"{place}[{key!r}]", left_out) for key in first}
    if isinstance(first, (tuple, list)):
        items = range(len(first))
        return tuple(_join([output[item] for output in outputs], f"{place}[{item}]", left_out) for item in items)
    if first is not None:
        left_out[place] = "a single number" if isinstance(first, Tensor) else type(first).__name__
    return None
