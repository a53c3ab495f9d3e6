"""The command starts fast because it loads little: what `--help` imports, not how long it takes on this machine."""

import subprocess
import sys

import pytest

# Each costs a noticeable part of the 0.3 s that --help may take.
HEAVY = ("torch", "numpy", "pyarrow", "PIL", "pandas", "safetensors", "http.server")


def start(*arguments: str) -> "subprocess.CompletedProcess[str]":
    code = (
        "import sys\n"
        "from shardwise.cli.main import main\n"
        f"try:\n    main({list(arguments)!r})\n"
        "finally:\n    print('LOADED', *sys.modules, file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def loaded(done: "subprocess.CompletedProcess[str]") -> set[str]:
    lines = [line for line in done.stderr.splitlines() if line.startswith("LOADED ")]
    assert lines, done.stderr
    return set(lines[-1].split()[1:])


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("train", "--help")])
def test_help_answers_without_loading_what_is_heavy(arguments: tuple[str, ...]) -> None:
    done = start(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    modules = loaded(done)
    assert "shardwise.cli.main" in modules
    assert modules.isdisjoint(HEAVY)


def test_the_check_sees_a_heavy_module() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, numpy; print('LOADED', *sys.modules, file=sys.stderr)"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert not loaded(done).isdisjoint(HEAVY)


def test_a_model_with_an_embedding_is_looked_at_without_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from torch import nn\n"
        "from shardwise.run.build import without_memory\n"
        "with without_memory():\n"
        "    layer = nn.Embedding(5, 3)\n"
        "    nn.init.xavier_normal_(layer.weight)\n"
        "    nn.init.normal_(tensor=layer.weight)\n"
        "assert layer.weight.is_meta\n"
        "real = torch.zeros(4)\n"
        "with without_memory():\n"
        "    real.normal_()\n"
        "assert real.abs().sum() > 0, 'what has values gets values'\n"
        "print('LOADED', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch._dynamo" not in loaded(done)


def test_help_lists_the_verbs_with_what_they_answer() -> None:
    text = start("--help").stdout
    assert "train" in text
    assert "Train a model" in text


@pytest.mark.parametrize("arguments", [("trian",), ("--nonsense",), ("train",)])
def test_wrong_words_are_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = start(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.split("LOADED")[0].strip()
