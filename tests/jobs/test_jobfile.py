"""From the text JOB to a Job, and what a user is told when it does not work."""

import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from shardwise.errors import DataError, JobError, UserError
from shardwise.run.jobfile import built_in_names, find_job, load_job
from shardwise.spec.job import Job

HEAD = """
import torch
import shardwise
from shardwise.spec.job import Job

def make(**fields):
    return Job(
        model=lambda: torch.nn.Linear(3, 1),
        data=(torch.zeros(4, 3), torch.zeros(4, 1)),
        loss=torch.nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        **({"batch_size": 2, "epochs": 1} | fields),
    )

"""


@pytest.fixture(autouse=True)
def _leave_no_modules_behind() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith("shardwise"):
            del sys.modules[name]


def write(folder: Path, text: str, name: str = "mine.py", head: str = HEAD) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + dedent(text))
    return str(path)


def refusal(text: str, settings: dict[str, str] | None = None, kind: type[UserError] = JobError) -> str:
    with pytest.raises(UserError) as caught:
        load_job(text, settings or {})
    assert type(caught.value) is kind
    return str(caught.value)


def test_a_built_in_job_is_found_by_name() -> None:
    loaded = load_job("digits", {"lr": "0.5"})
    assert isinstance(loaded.job, Job)
    assert loaded.origin == "digits"
    assert loaded.hyper_parameters["lr"] == (0.5, "command line")
    assert loaded.hyper_parameters["width"] == (16, "default")


def test_the_built_in_jobs_are_the_files_of_their_folder() -> None:
    names = built_in_names()
    assert "digits" in names
    assert all(find_job(name).function.__name__ == name for name in names)


def test_an_unknown_name_lists_the_built_in_jobs() -> None:
    message = refusal("digts")
    assert "'digts'" in message
    assert "did you mean digits?" in message
    assert "file.py:function" in message


def test_a_file_with_one_job_function(tmp_path: Path) -> None:
    text = write(tmp_path, "def first(size: int = 2) -> shardwise.Job:\n    return make(batch_size=size)\n")
    loaded = load_job(text, {"size": "7"})
    assert loaded.job.batch_size == 7
    assert loaded.origin == "mine.py:first"


def test_a_job_without_a_name_gets_its_functions(tmp_path: Path) -> None:
    body = "def first() -> Job: return make()\ndef second() -> Job: return make(name='own')\n"
    text = write(tmp_path, body)
    assert load_job(text + ":first", {}).job.name == "first"
    assert load_job(text + ":second", {}).job.name == "own"
    assert load_job(write(tmp_path, "def job() -> Job: return make()\n", "own.py"), {}).job.name == "own", (
        "a file's, where it says nothing"
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def a() -> Job: return make()\ndef b(): return 1\n", "a"),
        ("def a() -> 'Job': return make()\ndef _b() -> Job: return make()\n", "a"),
        ("from __future__ import annotations\ndef a() -> Job: return make()\ndef b(): return 1\n", "a"),
        ("def a() -> Job: return make()\ndef job() -> Job: return make()\n", "job"),
        ("def job(): return make()\n", "job"),
        ("def a() -> Job: return make()\ndef mine() -> Job: return make()\n", "mine"),
    ],
)
def test_which_function_of_a_file_is_the_job(tmp_path: Path, body: str, expected: str) -> None:
    head = "from __future__ import annotations\n" + HEAD if "__future__" in body else HEAD
    text = write(tmp_path, body.removeprefix("from __future__ import annotations\n"), head=head)
    assert load_job(text, {}).origin == f"mine.py:{expected}"


def test_a_file_may_import_a_job_without_offering_it(tmp_path: Path) -> None:
    body = "from shardwise.jobs.digits import digits\ndef a(lr: float = 0.2) -> Job: return digits(lr=lr)\n"
    assert load_job(write(tmp_path, body), {}).origin == "mine.py:a"


def test_several_candidates_are_listed(tmp_path: Path) -> None:
    text = write(tmp_path, "def a() -> Job: return make()\ndef b() -> Job: return make()\n")
    message = refusal(text)
    assert "a, b" in message
    assert f"{tmp_path}" not in message
    assert load_job(text + ":b", {}).origin == "mine.py:b"


def test_a_function_that_there_is_not(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "def train_it() -> Job: return make()\n") + ":trainit")
    assert "did you mean train_it?" in message


def test_a_job_that_is_no_function(tmp_path: Path) -> None:
    assert "a job is a function" in refusal(write(tmp_path, "thing = make()\n") + ":thing")
    assert "defines no function" in refusal(write(tmp_path, "thing = 3\n", head=""))


def test_a_missing_file(tmp_path: Path) -> None:
    assert str(tmp_path / "none.py") in refusal(str(tmp_path / "none.py"))


def test_a_module_is_found_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "from .part import SIZE\ndef a() -> Job: return make(batch_size=SIZE)\n", "kitchen/jobs.py")
    write(tmp_path, "SIZE = 5\n", "kitchen/part.py", head="")
    write(tmp_path, "", "kitchen/__init__.py", head="")
    monkeypatch.chdir(tmp_path)
    loaded = load_job("kitchen.jobs:a", {})
    assert (loaded.origin, loaded.job.batch_size) == ("kitchen.jobs:a", 5)
    assert load_job("kitchen.jobs", {}).origin == "kitchen.jobs:a"
    assert "package.module:function" in refusal("kitchen/jobs.py")


def test_a_missing_module_is_not_blamed_on_the_user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal("kitchn.jobs:a")
    assert "there is no module kitchn" in message
    assert "Traceback" not in message


def test_a_module_whose_import_fails_shows_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "import nothing_of_this_name\n", "cellar.py", head="")
    monkeypatch.chdir(tmp_path)
    message = refusal("cellar:a")
    assert "cellar.py" in message
    assert "No module named 'nothing_of_this_name'" in message


def test_neighbours_of_the_file_can_be_imported_now_and_later(tmp_path: Path) -> None:
    write(tmp_path, "SIZE = 3\n", "neighbour.py", head="")
    write(tmp_path, "DEEP = 4\n", "later.py", head="")
    body = """
    from neighbour import SIZE
    def a() -> Job:
        from later import DEEP
        return make(batch_size=SIZE * DEEP)
    """
    assert load_job(write(tmp_path, body), {}).job.batch_size == 12


def test_the_file_is_not_run_as_a_script(tmp_path: Path) -> None:
    body = """
    def a() -> Job: return make()
    if __name__ == "__main__":
        raise AssertionError
    """
    load_job(write(tmp_path, body), {})


def test_editing_a_file_and_loading_it_again(tmp_path: Path) -> None:
    text = write(tmp_path, "def a() -> Job: return make(batch_size=2)\n")
    assert load_job(text, {}).job.batch_size == 2
    write(tmp_path, "def a() -> Job: return make(batch_size=31)\n")
    assert load_job(text, {}).job.batch_size == 31
    other = write(tmp_path / "other", "def a() -> Job: return make(batch_size=4)\n")
    assert load_job(other, {}).job.batch_size == 4


@pytest.mark.parametrize("name", ["json.py", "code.py", "numpy.py", "torch.py"])
def test_a_file_that_would_hide_a_module_is_refused(tmp_path: Path, name: str) -> None:
    message = refusal(write(tmp_path, "def a() -> Job: return make()\n", name))
    assert "give the file another name" in message
    assert str(tmp_path) not in sys.path


def test_a_syntax_error_shows_the_line(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "def a() -> Job:\n    return make(\n", head=""))
    assert "mine.py" in message
    assert "SyntaxError" in message
    assert "return make(" in message


def test_a_failing_function_shows_the_users_frames_only(tmp_path: Path) -> None:
    body = """
    def helper():
        try:
            {}["lost"]
        except KeyError as error:
            raise RuntimeError("the helper broke") from error
    def a() -> Job:
        helper()
        return make()
    """
    message = refusal(write(tmp_path, body))
    assert "RuntimeError: the helper broke" in message
    assert "KeyError: 'lost'" in message
    assert message.count("in helper") == 2
    assert message.count("in a\n") == 1
    assert "jobfile" not in message
    assert "importlib" not in message


def test_a_failing_import_leaves_nothing_behind(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "1 / 0\n"))
    assert "ZeroDivisionError" in message
    assert "jobfile" not in message
    assert "importlib" not in message
    assert "mine" not in sys.modules
    assert str(tmp_path) not in sys.path


def test_a_script_that_ends_the_program_is_told_how_not_to(tmp_path: Path) -> None:
    assert '__name__ == "__main__"' in refusal(write(tmp_path, "import sys\nsys.exit(3)\n"))


def test_errors_about_the_job_say_where(tmp_path: Path) -> None:
    text = write(tmp_path, "def a() -> Job:\n    return make(batch_size=0)\n")
    message = refusal(text)
    assert "Job.batch_size is 0" in message
    assert re.search(r"mine\.py, line \d+", message)
    body = "from shardwise.errors import DataError\ndef a() -> Job:\n    raise DataError('no such data')\n"
    assert "no such data" in refusal(write(tmp_path, body), kind=DataError)


def test_a_function_that_returns_something_else(tmp_path: Path) -> None:
    assert "returned 3 of type int" in refusal(write(tmp_path, "def job(): return 3\n"))


def test_unknown_hyper_parameters_list_the_known_ones(tmp_path: Path) -> None:
    text = write(tmp_path, "def a(rate: float = 0.1, name: str = 'x') -> Job: return make()\n")
    message = refusal(text, {"rat": "1"}, UserError)
    assert "did you mean rate?" in message
    assert "rate=0.1, name='x'" in message
    bare = write(tmp_path, "def a() -> Job: return make()\n", "bare.py")
    assert "has no hyper-parameters" in refusal(bare, {"rate": "1"}, UserError)


def test_a_hyper_parameter_without_a_default_must_be_given(tmp_path: Path) -> None:
    text = write(tmp_path, "def a(size: int) -> Job: return make(batch_size=size)\n")
    assert "--set size=VALUE" in refusal(text, {}, UserError)
    assert load_job(text, {"size": "3"}).job.batch_size == 3


def test_nameless_arguments_are_refused(tmp_path: Path) -> None:
    assert "**rest" in refusal(write(tmp_path, "def a(**rest) -> Job: return make()\n"))


def test_another_process_loads_the_same_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "def a(size: int = 2) -> Job: return make(batch_size=size)\n")
    write(tmp_path / "place", "def b(size: int = 2) -> Job: return make(batch_size=size)\n", "kit/jobs.py")
    monkeypatch.chdir(tmp_path / "place")
    loaded = [
        load_job(text, {name: "9"}) for text, name in [(file, "size"), ("kit.jobs:b", "size"), ("digits", "width")]
    ]
    assert loaded[2].hyper_parameters["width"] == (9, "command line")
    pickled = pickle.dumps([one.reference for one in loaded])
    code = (
        "import pickle, sys\n"
        "jobs = [reference() for reference in pickle.loads(sys.stdin.buffer.read())]\n"
        "print(jobs[0].batch_size, jobs[1].batch_size, jobs[2].model().conv1.out_channels)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickled, capture_output=True, cwd="/", check=False, timeout=60
    )
    assert done.stdout.split() == [b"9", b"9", b"9"], done.stderr.decode()


def test_objects_of_the_users_classes_can_be_pickled(tmp_path: Path) -> None:
    body = """
    class Net(torch.nn.Linear):
        pass
    def a() -> Job:
        job = make()
        object.__setattr__(job, "model", lambda: Net(3, 1))
        return job
    """
    model = load_job(write(tmp_path, body), {}).job.model()
    assert type(pickle.loads(pickle.dumps(model))) is type(model)
