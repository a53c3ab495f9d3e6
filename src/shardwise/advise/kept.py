"""Plans that were decided before, kept by model, batch and machine."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise.data.batch import tree_leaves
from shardwise.data.source import Arrays, Source, as_splits
from shardwise.errors import ShardwiseError
from shardwise.probe.place import cache_folder
from shardwise.run.build import build_model, without_memory
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan

MOST_KEPT = 200
AGAIN = "decided before for this model, batch and machine"
DOUBTFUL = "this machine was measured while other programs used its cores: predictions may be off"
"""Of a plan that is not kept, so that the next run measures again."""

VERSION = 3
"""Of what a signature is made of and of how plans are chosen: another one forgets what was kept."""


def signature(job: Job, *, workers: int | None, threads: int | None, place: Mapping[str, str]) -> str | None:
    """Equal for jobs that take the same time: same code, modules and shapes, data, batch, precision, length class, machine and
    wishes.

    None where the model cannot be looked at without memory: then nothing is kept.
    """
    parts: list[Any] = [VERSION, job.batch_size, job.micro_batch, job.precision, job.batch_norm, job.epochs, job.steps]
    parts += [workers, threads, sorted(place.items()), job.name, job.clip_norm is None]
    try:
        with torch.random.fork_rng(devices=[]), without_memory():
            model = build_model(job, None)
        parts += [(name, type(module).__name__, _settings(module)) for name, module in model.named_modules()]
        parts += [(name, list(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
        source = as_splits(job.data).train
        parts.append(_shapes(source))
        given = [job.model, job.loss, job.objective, job.optimizer, job.weight, *map(type, model.modules())]
        parts += sorted(code_of([*given, type(getattr(source, "dataset", source))]))
    except Exception:  # noqa: BLE001  # a model may do anything in its constructor; check_job says what is wrong
        return None
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


def code_of(given: Iterable[Any]) -> set[str]:
    """What tells whether these functions and classes were changed: of the files that they are in, else of their own code.

    A file counts as a whole, because what they call is mostly beside them. torch is told by its version.
    """
    found = set()
    for one in given:
        while isinstance(one, functools.partial):
            found.add(repr((_plain(one.args), _plain(one.keywords))))
            one = one.func
        function = inspect.unwrap(one) if inspect.isroutine(one) else one if isinstance(one, type) else type(one)
        if one is None or (getattr(function, "__module__", None) or "").partition(".")[0] == "torch":
            continue
        for cell in getattr(function, "__closure__", None) or ():
            with suppress(ValueError):  # an empty one
                found.add(repr(_plain(cell.cell_contents)))
        try:
            text = Path(inspect.getfile(function)).read_bytes()
        except (OSError, TypeError):  # of a notebook or a prompt
            codes = [
                getattr(item, "__code__", None) for item in (function, *getattr(function, "__dict__", {}).values())
            ]
            text = repr([(code.co_code, code.co_names, _plain(code.co_consts)) for code in codes if code]).encode()
        found.add(hashlib.blake2b(text, digest_size=16).hexdigest())
    return found


def _settings(owner: object) -> list[tuple[str, Any]]:
    """Whole numbers, words and tuples among the attributes: strides, repetitions, sizes of images."""
    return [(name, _plain(value)) for name, value in sorted(vars(owner).items()) if _plain(value) is not None]


def _plain(value: Any) -> Any:
    """A value that says the same in another process; None for others."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return [(str(name), _plain(item)) for name, item in value.items()]
    return value if isinstance(value, int | str) else None


def _shapes(source: Source) -> list[Any]:
    """What is known of samples without reading any: the shapes of arrays, the settings of a data set."""
    if isinstance(source, Arrays):
        leaves = [*tree_leaves(source.inputs), *tree_leaves(source.targets)]
        return [(list(leaf.shape[1:]), str(leaf.dtype)) if isinstance(leaf, Tensor) else _row(leaf) for leaf in leaves]
    dataset = getattr(source, "dataset", None)
    return [type(source).__name__, type(dataset).__name__, _settings(dataset) if hasattr(dataset, "__dict__") else []]


def _row(leaf: Any) -> Any:
    return getattr(leaf, "row_bytes", type(leaf).__name__)


def recall(key: str | None) -> Plan | None:
    """The plan kept under a signature; None where there is none that can be read."""
    if key is None:
        return None
    record = _read().get(key)
    if not isinstance(record, dict):
        return None
    try:
        plan = Plan.from_dict(record)
    except (ShardwiseError, TypeError):
        return None
    return replace(plan, reasons=(*plan.reasons, AGAIN))


def remember(key: str | None, plan: Plan) -> None:
    """Keep a plan; a disk that does not want it is no reason to stop."""
    if key is None:
        return
    kept = {name: value for name, value in _read().items() if name != key}
    kept[key] = plan.to_dict()
    kept = dict(list(kept.items())[-MOST_KEPT:])
    path = plans_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(kept, file)
        Path(file.name).replace(path)
    except OSError:
        return


def plans_path() -> Path:
    """Where decided plans are kept; the file may be removed at any time."""
    return cache_folder() / "plans.json"


def _read() -> dict[str, Any]:
    try:
        kept = json.loads(plans_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
