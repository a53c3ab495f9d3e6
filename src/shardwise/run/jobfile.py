"""From the text JOB to a Job: a built-in name, `file.py`, `file.py:function` or `package.module:function`.

A built-in job is found by its name at run time, and not imported: the built-in jobs are examples of what users write,
and nothing depends on any one of them.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, final

from shardwise.errors import JobError
from shardwise.run.blame import readable_failure
from shardwise.run.hyperparameters import HyperParameter, choose_values, hyper_parameters
from shardwise.spec.job import Job

_BUILT_IN = "shardwise.jobs"
_MARK = "__shardwise_job_file__"
_UNNAMED = next(field.default for field in fields(Job) if field.name == "name")
_FORMS = "give a built-in name, file.py, file.py:function or package.module:function"


@final
@dataclass(frozen=True)
class Reference:
    """Where a job comes from, as plain data: pickle it, and calling it in another process loads the same job again.

    Attributes:
        place: the absolute path of a file, or the full name of a module.
        function: name of the job function in it.
        settings: name and text of the hyper-parameters that were given.
        folders: folders that must be importable.
    """

    place: str
    function: str
    settings: tuple[tuple[str, str], ...]
    folders: tuple[str, ...] = ()

    def __call__(self) -> Job:
        for folder in self.folders:
            _make_importable(folder)
        return load_job(f"{self.place}:{self.function}", dict(self.settings)).job


@final
@dataclass(frozen=True)
class JobFunction:
    """A job function that was found, not yet called.

    Attributes:
        origin: what to call it: `digits`, `file.py:function` or `package.module:function`.
        parameters: its hyper-parameters by name.
    """

    origin: str
    function: Callable[..., Any]
    place: str
    parameters: Mapping[str, HyperParameter]

    def call(self, settings: Mapping[str, str]) -> LoadedJob:
        """The job with these hyper-parameters, given as text.

        Raises:
            UserError: an unknown name or a value of the wrong kind.
            JobError: the function fails or does not return a Job.
        """
        chosen = choose_values(self.parameters, settings, self.origin)
        with readable_failure(f"job {self.origin} failed"):
            job = self.function(**{name: value for name, (value, _) in chosen.items()})
        if not isinstance(job, Job):
            raise JobError(f"job {self.origin} returned {_shown(job)}: a job function returns a shardwise.Job")
        if job.name == _UNNAMED:
            job = replace(job, name=self._name())
        folders = () if self.place.startswith(_BUILT_IN) or _is_file(self.place) else (str(Path.cwd()),)
        reference = Reference(self.place, self.function.__name__, tuple(settings.items()), folders)
        return LoadedJob(job=job, origin=self.origin, hyper_parameters=chosen, reference=reference)

    def _name(self) -> str:
        """The function's, or that of its file or module where the function is just called `job`."""
        name = self.function.__name__
        if name != "job":
            return name
        return Path(self.place).stem if _is_file(self.place) else self.place.rpartition(".")[2]


@final
@dataclass(frozen=True, kw_only=True)
class LoadedJob:
    """A job and where it came from.

    Attributes:
        origin: what to call it: `digits`, `file.py:function` or `package.module:function`.
        hyper_parameters: name -> value and source, `command line` or `default`.
        reference: picklable; calling it loads the same job again.
    """

    job: Job
    origin: str
    hyper_parameters: dict[str, tuple[Any, str]]
    reference: Reference


def load_job(text: str, settings: Mapping[str, str]) -> LoadedJob:
    """The job that `text` names, with the hyper-parameters of `settings` as text, such as `{"lr": "0.1"}`.

    A job without a name of its own gets its function's. A file is imported as a module under its own name, never run as
    `__main__`, and its folder stays importable.

    Raises:
        JobError: there is no such job, or its file or function fails; the message holds the user's part of the traceback.
        UserError: a hyper-parameter that there is not, or a value of the wrong kind.
    """
    return find_job(text).call(settings)


def find_job(text: str) -> JobFunction:
    """The job function that `text` names, without calling it.

    Raises:
        JobError: there is no such job, or its file cannot be imported.
    """
    place, colon, name = text.rpartition(":") if ":" in text else (text, "", "")
    if colon and not (place and name):
        raise JobError(f"job {text!r}: {_FORMS}")
    if _is_file(place):
        path = Path(place).expanduser().absolute()
        module = _import_file(path)
        function = _job_function(module, name, path.name)
        return JobFunction(f"{path.name}:{function.__name__}", function, str(path), hyper_parameters(function))
    if not colon and place in built_in_names():
        place, name, origin = f"{_BUILT_IN}.{place}", place, place
    elif not colon and "." not in place:
        raise JobError(_unknown_job(place))
    else:
        origin = ""
    function = _job_function(_import_module(place), name, place)
    origin = origin or f"{place}:{function.__name__}"
    return JobFunction(origin, function, place, hyper_parameters(function))


def built_in_names() -> list[str]:
    """The names of the built-in jobs, in alphabetical order. Imports none of them."""
    spec = importlib.util.find_spec(_BUILT_IN)
    folders = spec.submodule_search_locations if spec is not None else None
    return sorted(module.name for module in pkgutil.iter_modules(folders))


def _unknown_job(name: str) -> str:
    known = built_in_names()
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no job {name!r}: {hint}the built-in jobs are {', '.join(known)}; for one of your own, {_FORMS}"


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place


def _make_importable(folder: str) -> bool:
    """Puts a folder first on the path, as Python does for a script; whether it was not there before."""
    if folder in sys.path:
        return False
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    return True


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise JobError(f"there is no job file {path}: {_FORMS}")
    name = path.stem.replace(".", "_")
    old = sys.modules.get(name)
    if old is not None and _MARK not in old.__dict__ and getattr(old, "__file__", None) == str(path):
        return old  # the calling program imported it itself
    _check_name_is_free(name, path)
    added = _make_importable(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise JobError(f"{path} is no Python file: a job file ends in .py")
    module = importlib.util.module_from_spec(spec)
    module.__dict__[_MARK] = str(path)
    sys.modules[name] = module  # so that what it defines can be pickled by name
    try:
        with readable_failure(f"job file {path} failed while it was imported"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if added:
            sys.path.remove(str(path.parent))
        raise
    return module


def _check_name_is_free(name: str, path: Path) -> None:
    """Refuses a file that would hide another module: workers and pickles find its classes by the module's name."""
    old = sys.modules.get(name)
    if old is not None and _MARK in old.__dict__:
        return
    taken = old is not None or name in sys.stdlib_module_names
    if not taken:
        spec = importlib.util.find_spec(name)
        taken = spec is not None and spec.origin is not None and Path(spec.origin).absolute() != path
    if taken:
        raise JobError(f"job file {path} has the name of another Python module, {name}: give the file another name")


def _import_module(name: str) -> ModuleType:
    if not name.startswith(_BUILT_IN + "."):
        _make_importable(str(Path.cwd()))
    try:
        with readable_failure(f"module {name} failed while it was imported"):
            return importlib.import_module(name)
    except JobError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name and f"{name}.".startswith(f"{cause.name}."):
            raise JobError(
                f"there is no module {cause.name} in {Path.cwd()} or among the installed: {_FORMS}"
            ) from None
        raise


def _job_function(module: ModuleType, name: str, place: str) -> Callable[..., Any]:
    if name:
        found = module.__dict__.get(name)
        if inspect.isfunction(found):
            return found
        if found is not None:
            raise JobError(f"{place}:{name} is {_shown(found)}: a job is a function that returns a shardwise.Job")
    own = {
        key: value
        for key, value in module.__dict__.items()
        if not key.startswith("_") and inspect.isfunction(value) and value.__module__ == module.__name__
    }
    declared = {key: value for key, value in own.items() if _returns_job(value)}
    if name:
        near = difflib.get_close_matches(name, declared or own, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise JobError(f"{place} has no function {name!r}: {hint}it has {', '.join(declared or own) or 'none'}")
    candidates = declared or own
    for preferred in ("job", module.__name__.rpartition(".")[2]):
        if preferred in candidates:
            return candidates[preferred]
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    if not candidates:
        raise JobError(
            f"{place} defines no function: write one that returns a shardwise.Job; a script with a training loop of its own uses "
            "shardwise.start() and is started as it is"
        )
    names = ", ".join(candidates)
    raise JobError(
        f"{place} has {len(candidates)} functions that may be the job: {names}. Name one, {place}:{next(iter(candidates))}, "
        "or call one of them job, or declare it with -> Job"
    )


def _returns_job(function: Callable[..., Any]) -> bool:
    annotation = inspect.signature(function).return_annotation
    return annotation is Job or (isinstance(annotation, str) and annotation.strip("'\"").rpartition(".")[2] == "Job")


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"
