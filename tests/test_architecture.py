"""The floor plan, enforced: who imports whom, where torch may appear, and how long files and functions get.

Each rule is a function from a package folder to a list of sentences, one per violation. It runs on the package itself
and, to show that it can fail, on small made packages with a planted violation.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "shardwise"
SOURCE = Path(__file__).resolve().parent.parent / "src" / PACKAGE

MODULES = {"errors", "units", "metrics"}
"""Single-file modules: every room may import them; they import only each other."""

ROOMS: dict[str, set[str]] = {
    "spec": set(),
    "planner": {"spec"},
    "monitor": {"spec"},
    "data": {"spec"},
    # A probe starts its processes as a training does, and counts the operations of the step that a training takes.
    # Operations are timed with the kernels that trainings compute with.
    "probe": {"spec", "dist", "kernels", "nn", "parallel", "data", "run"},
    "dist": {"spec"},
    # Layers that are made to be split; trained serially, they need no room above them.
    "nn": {"spec", "dist"},
    # Compiled loops that take the place of slow ones of torch, bit for bit.
    "kernels": set(),
    "parallel": {"spec", "dist", "nn"},
    # What a run finds out about itself (stragglers, stalls) is worked out by the same functions that watch it.
    "run": {"spec", "dist", "kernels", "nn", "parallel", "data", "monitor"},
    # A trial divides its data into folds; an ensemble is assembled like any other model.
    "tasks": {"spec", "run", "data", "dist"},
    # Advice on a job needs what was counted (probe), the arithmetic (planner) and the checks and trials of a run. `run`
    # itself stays below: it is handed a function that chooses a plan.
    "advise": {"spec", "planner", "probe", "data", "dist", "parallel", "run"},
    # A proof walks over the same batches, meshes and composed models as a training, and looks into all of them.
    "prove": {"spec", "dist", "parallel", "data", "run"},
    # Public and a single file, but on top of a room: what users' own tests call.
    "testing": {"spec", "prove"},
    # Operations of a step and the peak rate of the machine are what `probe` counts and measures.
    "bench": {"spec", "planner", "data", "run", "monitor", "probe"},
    "jobs": {"spec", "data", "nn"},
    # Prepares data for training; its processes need no torch, so it imports torch-free files of `data` only.
    "pack": {"spec", "data"},
    "cli": {
        "spec",
        "planner",
        "advise",
        "monitor",
        "data",
        "probe",
        "dist",
        "parallel",
        "run",
        "tasks",
        "prove",
        "bench",
        "jobs",
        "pack",
    },
}
"""Room -> the rooms it may import besides itself."""

TORCH_FREE = {"errors", "units", "spec", "planner", "monitor"}
FACADES = {"data", "nn", "tasks"}
"""Rooms whose `__init__` may resolve public names lazily."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

ROOT = "__init__"


@dataclass(frozen=True)
class Import:
    """One imported module, with where and when it is imported."""

    module: str
    line: int
    types_only: bool
    at_start: bool
    """Runs when the importing module is first imported: not in a function and not for types only."""
    relative: bool = False


def sources(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def module_name(package: Path, path: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join([PACKAGE, *(part for part in parts if part != "__init__")])


def room_of(package: Path, path: Path) -> str:
    """The room, the single-file module, or `__init__` for the package root."""
    return path.relative_to(package).with_suffix("").parts[0]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(package: Path, path: Path) -> Iterator[Import]:
    """All imports of a file, those inside functions and under `TYPE_CHECKING` too."""
    yield from _walk(package, parse(path), types_only=False, inside_function=False)


def _walk(package: Path, node: ast.AST, *, types_only: bool, inside_function: bool) -> Iterator[Import]:
    at_start = not types_only and not inside_function
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, types_only, at_start)
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        for name in sorted({_origin(package, module, alias.name) for alias in node.names}):
            yield Import(name, node.lineno, types_only, at_start, relative=node.level > 0)
    elif isinstance(node, ast.If) and _is_type_checking(node.test):
        for statement in node.body:
            yield from _walk(package, statement, types_only=True, inside_function=inside_function)
        for statement in node.orelse:
            yield from _walk(package, statement, types_only=types_only, inside_function=inside_function)
    else:
        inside = inside_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _walk(package, child, types_only=types_only, inside_function=inside)


def _origin(package: Path, module: str, name: str) -> str:
    """`from shardwise.spec import job` imports the module shardwise.spec.job."""
    return f"{module}.{name}" if is_module_file(package, f"{module}.{name}") else module


def is_module_file(package: Path, module: str) -> bool:
    return own(module) and package.parent.joinpath(*module.split(".")).with_suffix(".py").is_file()


def own(module: str) -> bool:
    return module == PACKAGE or module.startswith(PACKAGE + ".")


def where(package: Path, path: Path, line: int) -> str:
    return f"{path.relative_to(package.parent)}:{line}"


# The rules


def wrong_directions(package: Path) -> list[str]:
    """A room imports itself, the rooms listed for it and the single-file modules; the package root imports anything."""
    found = []
    for path in sources(package):
        room = room_of(package, path)
        if room == ROOT:
            continue
        if room not in ROOMS and room not in MODULES:
            found.append(f"{path.relative_to(package.parent)}: {room} is not on the floor plan")
            continue
        allowed = MODULES if room in MODULES else ROOMS[room] | MODULES | {room}
        for item in imports(package, path):
            target = item.module.split(".")[1] if item.module.startswith(PACKAGE + ".") else None
            if own(item.module) and target not in allowed:
                found.append(f"{where(package, path, item.line)}: {room} may not import {item.module}")
    return found


def short_paths(package: Path) -> list[str]:
    """Imports name the module that defines the thing: no relative imports, none from a room as a whole.

    The package root is the one place that shows rooms as a whole.
    """
    found = []
    for path in sources(package):
        if room_of(package, path) == ROOT:
            continue
        for item in imports(package, path):
            if item.relative:
                found.append(f"{where(package, path, item.line)}: relative import")
            elif own(item.module) and not package.parent.joinpath(*item.module.split(".")).with_suffix(".py").is_file():
                found.append(
                    f"{where(package, path, item.line)}: {item.module} is not a module file: import by full path"
                )
    return found


def import_cycles(package: Path) -> list[str]:
    """No circle among the imports that run when a module is first imported."""
    graph = start_graph(package)
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            circle = [*trail[trail.index(module) :], module]
            found.append("import cycle: " + " -> ".join(circle))
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def start_graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules it imports when it is first imported."""
    return {
        module_name(package, path): {
            item.module for item in imports(package, path) if item.at_start and not item.relative
        }
        for path in sources(package)
    }


def full_room_inits(package: Path) -> list[str]:
    """Room `__init__` files are empty; a facade's may hold what resolves names lazily, and imports no room at start."""
    found = []
    for path in sorted(package.glob("*/__init__.py")):
        name = path.relative_to(package.parent)
        if path.parent.name not in FACADES:
            if parse(path).body:
                found.append(f"{name}: a room's __init__ is empty")
            continue
        found += [
            f"{name}:{item.line}: a facade imports {item.module} only when a name is asked for"
            for item in imports(package, path)
            if item.at_start and (own(item.module) or is_torch(item.module))
        ]
    return found


def long_files(package: Path) -> list[str]:
    found = []
    for path in sources(package):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            found.append(f"{path.relative_to(package.parent)}: {lines} lines, at most {MAX_FILE_LINES}")
    return found


def long_functions(package: Path) -> list[str]:
    found = []
    for path in sources(package):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    place = where(package, path, node.lineno)
                    found.append(f"{place}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}")
    return found


def is_torch(module: str) -> bool:
    return module.split(".")[0] == "torch"


def torch_in_torch_free_rooms(package: Path) -> list[str]:
    """Not even inside a function: these rooms work where torch is not installed."""
    return [
        f"{where(package, path, item.line)}: {room_of(package, path)} needs no torch, but imports {item.module}"
        for path in sources(package)
        if room_of(package, path) in TORCH_FREE
        for item in imports(package, path)
        if is_torch(item.module) and not item.types_only
    ]


def torch_at_start(package: Path) -> list[str]:
    """Importing the root, the command line or a torch-free room reaches no module-level import of torch."""
    graph = start_graph(package)
    found = []
    for path in sources(package):
        if room_of(package, path) not in TORCH_FREE | {ROOT, "cli"}:
            continue
        start = module_name(package, path)
        trails, seen = [[start]], {start}
        while trails:
            trail = trails.pop()
            for target in sorted(graph.get(trail[-1], ())):
                if is_torch(target):
                    found.append("torch is loaded by " + " -> ".join([*trail, target]))
                elif target not in seen:
                    seen.add(target)
                    trails.append([*trail, target])
    return found


RULES = [
    wrong_directions,
    short_paths,
    import_cycles,
    full_room_inits,
    long_files,
    long_functions,
    torch_in_torch_free_rooms,
    torch_at_start,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert len(sources(SOURCE)) > 10, f"found no package at {SOURCE}"
    violations = rule(SOURCE)
    assert not violations, "\n".join(violations)


# The rules can fail


def plant(folder: Path, files: dict[str, str]) -> Path:
    """A small sound package, with `files` written over it."""
    sound = {
        "__init__.py": "def __getattr__(name):\n    import torch\n    return torch\n",
        "errors.py": "",
        "units.py": "from shardwise.errors import A\n",
        "metrics.py": "import torch\n",
        "spec/__init__.py": "",
        "spec/job.py": "from typing import TYPE_CHECKING\nfrom shardwise.errors import A\n"
        "if TYPE_CHECKING:\n    import torch\n    from shardwise.spec.plan import Plan\n",
        "spec/plan.py": "from shardwise.spec.job import Job\n",
        "data/__init__.py": "def __getattr__(name):\n    import shardwise.data.source\n",
        "data/source.py": "import torch\nimport shardwise.spec.job\n",
        "run/__init__.py": "",
        "run/loop.py": "from torch import nn\nfrom shardwise.data.source import b\nfrom shardwise.spec import plan\n",
        "cli/__init__.py": "",
        "cli/train.py": "def train():\n    from shardwise.run.loop import c\n",
    }
    package = folder / PACKAGE
    for name, text in (sound | files).items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_package_passes(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert rule(plant(tmp_path, {})) == []


LONG_BODY = "    x = 1\n" * MAX_FUNCTION_LINES
TYPES_ONLY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "

PLANTED: list[tuple[Callable[[Path], list[str]], str, str]] = [
    (wrong_directions, "spec/wrong.py", "from shardwise.run.loop import x\n"),
    (wrong_directions, "spec/wrong.py", "import shardwise.data.source\n"),
    (wrong_directions, "data/wrong.py", "def f():\n    from shardwise.run.loop import x\n"),
    (wrong_directions, "data/wrong.py", TYPES_ONLY + "from shardwise.run.loop import x\n"),
    (wrong_directions, "data/wrong.py", "try:\n    import shardwise.run.loop\nexcept ImportError:\n    pass\n"),
    (wrong_directions, "run/wrong.py", "import shardwise\n"),
    (wrong_directions, "run/wrong.py", "from shardwise import data\n"),
    (wrong_directions, "spec/wrong.py", "from shardwise.run import loop\n"),
    (wrong_directions, "errors.py", "from shardwise.spec.job import Job\n"),
    (wrong_directions, "cellar/__init__.py", ""),
    (wrong_directions, "helpers.py", ""),
    (short_paths, "run/wrong.py", "from shardwise.data import Splits\n"),
    (short_paths, "run/wrong.py", "from shardwise import Job\n"),
    (short_paths, "run/wrong.py", "def f():\n    import shardwise.data\n"),
    (short_paths, "run/wrong.py", "from .loop import x\n"),
    (short_paths, "run/wrong.py", "from . import loop\n"),
    (import_cycles, "spec/job.py", "from shardwise.spec.plan import Plan\n"),
    (import_cycles, "spec/job.py", "import shardwise.spec.job\n"),
    (import_cycles, "spec/job.py", "from shardwise.spec import plan\n"),
    (import_cycles, "spec/job.py", "if True:\n    import shardwise.spec.plan\n"),
    (full_room_inits, "run/__init__.py", "from shardwise.run.loop import c\n"),
    (full_room_inits, "run/__init__.py", '"""A docstring."""\n'),
    (full_room_inits, "data/__init__.py", "import shardwise.data.source\n"),
    (full_room_inits, "data/__init__.py", "import torch\n"),
    (long_files, "spec/wrong.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
    (long_functions, "spec/wrong.py", "def f():\n" + LONG_BODY),
    (long_functions, "spec/wrong.py", "class A:\n    async def f():\n" + LONG_BODY.replace("    ", "        ")),
    (torch_in_torch_free_rooms, "spec/wrong.py", "import torch\n"),
    (torch_in_torch_free_rooms, "planner/wrong.py", "def f():\n    from torch.nn import Linear\n"),
    (torch_in_torch_free_rooms, "units.py", "import torch.nn\n"),
    (torch_in_torch_free_rooms, "monitor/wrong.py", TYPES_ONLY + "pass\nelse:\n    import torch\n"),
    (torch_at_start, "__init__.py", "from shardwise.data.source import b\n"),
    (torch_at_start, "cli/wrong.py", "import torch\n"),
    (torch_at_start, "cli/wrong.py", "from shardwise.run.loop import c\n"),
    (torch_at_start, "spec/plan.py", "import shardwise.metrics\n"),
]


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_violation_is_found(rule: Callable[[Path], list[str]], name: str, text: str, tmp_path: Path) -> None:
    violations = rule(plant(tmp_path, {name: text}))
    assert violations
    assert all(len(sentence) > 20 for sentence in violations)


def test_the_longest_allowed_file_and_function_pass(tmp_path: Path) -> None:
    longest = "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    package = plant(tmp_path, {"spec/fine.py": longest + "x = 1\n" * (MAX_FILE_LINES - MAX_FUNCTION_LINES)})
    assert long_files(package) == []
    assert long_functions(package) == []


# What really happens in a fresh interpreter


def torch_modules_after(code: str) -> list[str]:
    """Runs `code` in a new interpreter; which torch modules it loaded."""
    report = "import sys\nprint('LOADED', *sorted(m for m in sys.modules if m.split('.')[0] == 'torch'))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "LOADED"
    return last[1:]


def test_the_fresh_interpreter_check_sees_torch() -> None:
    assert "torch" in torch_modules_after("import torch")


def test_torch_free_modules_load_no_torch() -> None:
    names = [module_name(SOURCE, path) for path in sources(SOURCE) if room_of(SOURCE, path) in TORCH_FREE | {ROOT}]
    assert PACKAGE in names
    assert f"{PACKAGE}.spec.job" in names
    assert torch_modules_after("\n".join(f"import {name}" for name in names)) == []


def test_help_loads_no_torch() -> None:
    if not (SOURCE / "cli" / "main.py").is_file():
        pytest.skip("shardwise.cli.main does not exist yet")
    code = (
        "import runpy, sys\n"
        "sys.argv = ['shardwise', '--help']\n"
        "try:\n"
        "    runpy.run_module('shardwise.cli.main', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code in (0, None), end.code\n"
        "else:\n"
        "    raise AssertionError('--help did not end the program')"
    )
    assert torch_modules_after(code) == []
