"""Plans that were decided before, kept by model, batch and machine."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shardwise.errors import ShardwiseError
from shardwise.probe.place import cache_folder
from shardwise.run.build import build_model, without_memory
from shardwise.spec.job import Job
from shardwise.spec.plan import Plan

MOST_KEPT = 200
AGAIN = "decided before for this model, batch and machine"
VERSION = 2
"""Of what a signature is made of and of how plans are chosen: another one forgets what was kept."""


def signature(job: Job, *, workers: int | None, threads: int | None, place: Mapping[str, str]) -> str | None:
    """Equal for jobs that take the same time: same modules and shapes, batch, precision, length class, machine and wishes.

    None where the model cannot be looked at without memory: then nothing is kept.
    """
    parts: list[Any] = [VERSION, job.batch_size, job.micro_batch, job.precision, job.batch_norm, job.epochs, job.steps]
    parts += [workers, threads, sorted(place.items()), job.name, job.clip_norm is None]
    try:
        with torch.random.fork_rng(devices=[]), without_memory():
            model = build_model(job, None)
        parts += [(name, type(module).__name__) for name, module in model.named_modules()]
        parts += [(name, list(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    except Exception:  # noqa: BLE001  # a model may do anything in its constructor; check_job says what is wrong
        return None
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


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
