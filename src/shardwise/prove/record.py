"""What a run leaves behind for the comparison: every tensor by the user's own name, whole, from whichever rank holds it.

Keys are `initial/model/<name>`, `gradient/<name>` and `applied/<name>` (of the first step), `last/<name>` (of the last
step), and `final/...` followed by the key of `shardwise.run.state.collect`. Ranks that hold the same value write it once; a
rank that holds another value writes its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from shardwise.data.batch import Batch, tree_leaves
from shardwise.dist.collectives import Group
from shardwise.dist.split import is_dtensor, whole_tensor
from shardwise.run.assemble import Assembly
from shardwise.run.names import named_tensors, own_model, own_name
from shardwise.run.state import collect, settled


@final
@dataclass
class RankReport:
    """What one rank says about its run.

    Attributes:
        rank: global rank.
        pid: its process.
        coordinates: axis -> this rank's index along it, of the axes with a degree above 1.
        losses: mean over the global batch, a step each.
        reported_norms: the gradient norm that clipping found, a step each; None where the job does not clip.
        samples: digest of each sample this rank trained on, a tuple for each step.
        local_elements: parameter elements this rank stores.
        whole_elements: parameter elements of the modules this rank holds, before any was split.
        owners: name of a parameter -> class of the module that holds it.
        aliases: further names of tied tensors, each with the first name.
        buffers: names that are buffers.
        digests: key -> digest of this rank's value.
        recomputed: forward passes that were computed again in backward passes; None where the plan recomputes nothing.
        silenced: dropout functions that were switched off.
        modules: modules whose randomness was switched off.
        random: random functions that were called all the same.
        has_batch_norm: the model has a BatchNorm layer.
        metrics: results of the evaluation, by name.
        evaluation: why its results cannot be compared; "" where they can.
        coupled: names of metrics that are no means over samples.
        resumed_after: steps before the checkpoint that the run went on from; 0 where there was none.
        restored: tensors and numbers that were held against what was saved.
        lost: keys of those that were something else.
    """

    rank: int
    pid: int = field(default_factory=os.getpid)
    coordinates: dict[str, int] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    reported_norms: list[float | None] = field(default_factory=list)
    samples: list[tuple[bytes, ...]] = field(default_factory=list)
    local_elements: int = 0
    whole_elements: int = 0
    owners: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    digests: dict[str, bytes] = field(default_factory=dict)
    recomputed: int | None = None
    silenced: set[str] = field(default_factory=set)
    modules: list[str] = field(default_factory=list)
    random: set[str] = field(default_factory=set)
    has_batch_norm: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    evaluation: str = ""
    coupled: set[str] = field(default_factory=set)
    resumed_after: int = 0
    restored: int = 0
    lost: list[str] = field(default_factory=list)


@final
@dataclass
class Recorder:
    """Collects a rank's tensors during a run and writes them at its end."""

    report: RankReport
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def take_state(self, moment: str, a: Assembly) -> None:
        """Note parameters, buffers, optimizer state and numeric options. Collective where tensors are split."""
        collected = collect(a.model, a.optimizer)
        for key, tensor in collected.tensors.items():
            self.tensors[f"{moment}/{key}"] = whole(tensor)
        optimizer = collected.structure["optimizer"]
        for index, group in enumerate(optimizer["groups"]):
            self.take_numbers(f"{moment}/options/{index}", group["options"])
        for name, state in optimizer["state"].items():
            self.take_numbers(f"{moment}/optimizer/{name}", state)
        self.report.aliases = dict(collected.structure["aliases"])
        self.report.buffers = set(collected.structure["buffers"])

    def take_gradients(self, moment: str, model: nn.Module) -> None:
        """Note the gradient of every parameter that has one. Collective where parameters are split."""
        tensors, _, buffers = named_tensors(own_model(model))
        for name, tensor in tensors.items():
            if name not in buffers and tensor.grad is not None:
                self.tensors[f"{moment}/{name}"] = whole(tensor.grad)

    def take_size(self, model: nn.Module) -> None:
        """Note how much of the parameters this rank stores, and in what kinds of modules they are."""
        for prefix, module in own_model(model).named_modules():
            for name, _ in module.named_parameters(prefix=prefix, recurse=False):
                self.report.owners.setdefault(own_name(name), type(module).__name__.removeprefix("FSDP"))
        tensors, _, buffers = named_tensors(own_model(model))
        for name, tensor in tensors.items():
            if name not in buffers:
                self.report.whole_elements += tensor.numel()
                self.report.local_elements += _local(tensor).numel()

    def take_samples(self, batch: Batch) -> None:
        """Note which samples this rank trains on in a step."""
        self.report.samples.append(sample_digests(batch))

    def write(self, folder: Path, world: Group) -> list[RankReport]:
        """Write what no lower rank has, and return all ranks' reports. Collective."""
        self.report.digests = {key: digest(tensor) for key, tensor in self.tensors.items()}
        reports: list[RankReport] = world.gather_objects(self.report)
        known = {item for report in reports[: world.rank] for item in report.digests.items()}
        mine = {key: tensor for key, tensor in self.tensors.items() if (key, self.report.digests[key]) not in known}
        torch.save(mine, folder / f"rank{world.rank}.pt")
        world.barrier()
        return reports

    def take_numbers(self, path: str, value: Any) -> None:
        """Note the numbers in plain data."""
        for key, number in _numbers(path, value):
            self.tensors[key] = torch.tensor(number, dtype=torch.float64)


@final
@dataclass(frozen=True)
class Record:
    """A whole run.

    Attributes:
        reports: of all ranks.
        tensors: key -> rank -> value; only ranks whose value differs from those of lower ranks.
    """

    reports: list[RankReport]
    tensors: Mapping[str, Mapping[int, Tensor]]

    @property
    def losses(self) -> list[float]:
        return self.reports[0].losses

    @property
    def aliases(self) -> dict[str, str]:
        merged: dict[str, str] = {}
        for report in self.reports:
            merged.update(report.aliases)
        return merged

    @property
    def buffers(self) -> set[str]:
        return set().union(*(report.buffers for report in self.reports))

    @property
    def owners(self) -> dict[str, str]:
        merged: dict[str, str] = {}
        for report in self.reports:
            merged.update(report.owners)
        return merged

    def at(self, key: str, rank: int) -> Tensor | None:
        """The value on one rank; None where it holds none."""
        wanted = self.reports[rank].digests.get(key)
        if wanted is None:
            return None
        for holder, value in self.tensors.get(key, {}).items():
            if self.reports[holder].digests[key] == wanted:
                return value
        raise AssertionError(f"no rank wrote {key} of rank {rank}")

    def first(self, key: str) -> Tensor | None:
        """The value of the lowest rank that holds it."""
        values = self.tensors.get(key)
        return values[min(values)] if values else None

    def starting_with(self, prefix: str) -> Iterator[tuple[str, Mapping[int, Tensor]]]:
        """(rest of the key, values by rank)."""
        for key, values in self.tensors.items():
            if key.startswith(prefix):
                yield key[len(prefix) :], values


def read_record(folder: Path, reports: list[RankReport]) -> Record:
    """What `Recorder.write` left in a folder; the files go, and their memory stays mapped as long as the record lives."""
    tensors: dict[str, dict[int, Tensor]] = {}
    for report in reports:
        path = folder / f"rank{report.rank}.pt"
        part = torch.load(path, mmap=True, weights_only=True)
        path.unlink()
        for key, tensor in part.items():
            tensors.setdefault(key, {})[report.rank] = tensor
    return Record(reports, tensors)


def whole(tensor: Tensor) -> Tensor:
    """The tensor as one dense copy on the CPU. Collective where it is split."""
    tensor = whole_tensor(settled(tensor.detach()))
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def digest(tensor: Tensor) -> bytes:
    """Equal for tensors of equal bits."""
    flat = tensor.reshape(-1)
    content = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return hashlib.blake2b(content, digest_size=16).digest()


def sample_digests(batch: Batch) -> tuple[bytes, ...]:
    """A digest of the content of each sample of a rank's part of a batch, in order."""
    leaves = [leaf.cpu() for leaf in tree_leaves(batch.inputs) + tree_leaves(batch.targets)]
    found = []
    for index in range(batch.count):
        hashed = hashlib.blake2b(digest_size=8)
        for leaf in leaves:
            row = leaf[index] if leaf.dim() else leaf
            hashed.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        found.append(hashed.digest())
    return tuple(found)


def _local(tensor: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, tensor).to_local()) if is_dtensor(tensor) else tensor


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in encoded data, by path."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(f"{path}/{index}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "$":
                yield from _numbers(f"{path}/{key}", item)
