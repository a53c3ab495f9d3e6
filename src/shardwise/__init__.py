"""shardwise trains any PyTorch model in parallel: the same run, only faster.

Public names are loaded when they are first used, so that `import shardwise` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwise import data, metrics, nn, tasks, testing
    from shardwise.advise.train import train
    from shardwise.errors import ShardwiseError
    from shardwise.run.live import LiveRun
    from shardwise.run.result import Run, predict
    from shardwise.run.start import start
    from shardwise.spec.job import Job
    from shardwise.spec.layout import Layout
    from shardwise.spec.plan import Plan

__version__ = "0.1.0"

_WHERE = {
    "Job": "spec.job",
    "Layout": "spec.layout",
    "Plan": "spec.plan",
    "ShardwiseError": "errors",
    "train": "advise.train",
    "start": "run.start",
    "LiveRun": "run.live",
    "Run": "run.result",
    "predict": "run.result",
}
_ROOMS = ("data", "metrics", "nn", "tasks", "testing")

__all__ = [
    "Job",
    "Layout",
    "LiveRun",
    "Plan",
    "Run",
    "ShardwiseError",
    "__version__",
    "data",
    "metrics",
    "nn",
    "predict",
    "start",
    "tasks",
    "testing",
    "train",
]


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return import_module(f"shardwise.{name}")
    if name in _WHERE:
        value: object = getattr(import_module(f"shardwise.{_WHERE[name]}"), name)
        return value
    raise AttributeError(f"shardwise has no {name!r}: it has {', '.join(sorted([*_WHERE, *_ROOMS]))}")


def __dir__() -> list[str]:
    return __all__
