"""shardwise.tasks: many trainings and many jobs at once, on the resources there are."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwise.errors import TaskFailed
    from shardwise.tasks.graph import Graph
    from shardwise.tasks.handle import Handle
    from shardwise.tasks.joblib_backend import register_joblib
    from shardwise.tasks.options import Options
    from shardwise.tasks.outcome import Outcome, TaskFailure
    from shardwise.tasks.pool import Pool
    from shardwise.tasks.results import Results
    from shardwise.tasks.results import map_items as map
    from shardwise.tasks.source import live

_WHERE = {
    "Graph": "tasks.graph:Graph",
    "Handle": "tasks.handle:Handle",
    "Options": "tasks.options:Options",
    "Outcome": "tasks.outcome:Outcome",
    "Pool": "tasks.pool:Pool",
    "Results": "tasks.results:Results",
    "TaskFailed": "errors:TaskFailed",
    "TaskFailure": "tasks.outcome:TaskFailure",
    "live": "tasks.source:live",
    "map": "tasks.results:map_items",
    "register_joblib": "tasks.joblib_backend:register_joblib",
}

__all__ = [
    "Graph",
    "Handle",
    "Options",
    "Outcome",
    "Pool",
    "Results",
    "TaskFailed",
    "TaskFailure",
    "live",
    "map",
    "register_joblib",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"shardwise.tasks has no {name!r}: it has {', '.join(__all__)}")
    module, _, attribute = _WHERE[name].partition(":")
    value: object = getattr(import_module(f"shardwise.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return __all__
