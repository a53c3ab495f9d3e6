"""Readers on small made files, and the error for every way in which a file can be wrong."""

import bz2
import gzip
import lzma
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import shardwise.data as data
from shardwise.data.loader import eval_batches
from shardwise.data.readers.pickled import load_arrays
from shardwise.data.source import Source, Splits
from shardwise.errors import DataError, JobError


def whole(source: Source | None) -> tuple[Any, Any]:
    """Everything in a source, as one batch."""
    assert source is not None
    assert source.length is not None
    batch = next(eval_batches(source, batch_size=source.length))
    return batch.inputs, batch.targets


# CIFAR


def cifar_folder(root: Path, rows: int = 4, protocol: int = 2) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(exist_ok=True)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        count = rows + number  # batches of any length
        batch = {
            b"data": np.full((count, 3072), number, np.uint8),
            b"labels": [number] * count,
            b"filenames": [b"x"] * count,
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return root


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar10(tmp_path: Path, protocol: int) -> None:
    cifar_folder(tmp_path, protocol=protocol)
    splits = data.cifar10(tmp_path)
    images, labels = whole(splits.train)
    assert images.shape == (30, 3, 32, 32)
    assert labels.tolist() == [number for number in range(5) for _ in range(4 + number)]
    torch.testing.assert_close(images[:, 0, 0, 0], (labels / 255 - 0.5) / 0.5)
    assert whole(data.cifar10(tmp_path / "cifar-10-batches-py").test)[1].tolist() == [5] * 9
    assert splits.classes[3] == "cat"


def test_cifar100(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        batch = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [7, 99], b"coarse_labels": [1, 2]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    assert whole(data.cifar100(tmp_path).train)[1].tolist() == [7, 99]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({b"labels": [10] * 5}, "label 10"),
        ({b"labels": [-1] * 5}, "label -1"),
        ({b"labels": [1] * 4}, "5 images with labels"),
        ({b"labels": ["x"] * 5}, "no whole numbers"),
        ({b"data": np.zeros((5, 3000), np.uint8)}, r"shape \(5, 3000\)"),
        ({b"data": np.zeros((5, 3072), np.float32)}, "float32"),
        ({b"data": 3}, "no CIFAR batch"),
    ],
)
def test_wrong_cifar_batches(tmp_path: Path, changes: dict[Any, Any], message: str) -> None:
    splits = data.cifar10(cifar_folder(tmp_path) if not changes else _changed(tmp_path, changes))
    with pytest.raises(DataError, match=message) as caught:
        splits.train  # noqa: B018
    assert "data_batch_2" in str(caught.value)


def _changed(root: Path, changes: dict[Any, Any]) -> Path:
    cifar_folder(root)
    path = root / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), **changes}, protocol=2))
    return root


def test_cut_and_missing_cifar_batches(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)data_batch_1 cannot be read.*kriz/cifar\.html"):
        data.cifar10(tmp_path).train  # noqa: B018
    cifar_folder(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"data_batch_3 is damaged"):
        data.cifar10(tmp_path).train  # noqa: B018


def test_pickles_run_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    path, room = tmp_path / "evil", np.zeros(3_000_000, np.uint8)
    large = np.ones((1000, 2000), np.uint8)
    for content in (Evil(), {b"data": large, b"more": Evil()}):
        path.write_bytes(pickle.dumps(content, protocol=3))
        with pytest.raises(DataError, match=r"asks for posix\.mkdir"):
            load_arrays(path, room)
        assert not (tmp_path / "made").exists()


def test_a_large_array_is_read_in_place(tmp_path: Path) -> None:
    """However it was written, what is read is what a plain unpickling gives."""
    large = np.random.default_rng(0).integers(0, 256, (1200, 1000), np.uint8)
    decoy = b"T" + (1_100_000).to_bytes(4, "little")
    record = {b"before": decoy, b"data": large, b"labels": [1, 2, 3], b"small": np.arange(5.0)}
    contents = {
        f"protocol {number}": (pickle.dumps(record, protocol=number), number in (3, 4)) for number in range(2, 5)
    }
    length = (1_200_000).to_bytes(4, "little")
    old = pickle.dumps(record, protocol=3).replace(b"B" + length, b"T" + length)
    contents["Python 2"] = old, True
    contents["columns first"] = pickle.dumps({b"data": np.asfortranarray(large)}, protocol=3), False
    contents["numbers"] = pickle.dumps({b"data": large.astype(np.int16)}, protocol=3), False
    contents["deeper"] = pickle.dumps({b"in": {b"data": large}}, protocol=3), False
    for name, (content, in_place) in contents.items():
        path, room = tmp_path / "pickle", np.zeros(2_500_000, np.uint8)
        path.write_bytes(content)
        found = load_arrays(path, room)
        assert np.shares_memory(found.get(b"data", 0), room) == in_place, name
        whole = pickle.loads(content, encoding="bytes")
        assert found.keys() == whole.keys(), name
        for key in whole:
            if key != b"in":
                np.testing.assert_array_equal(found[key], whole[key], err_msg=name)
    path.write_bytes(old[:-100])
    with pytest.raises(DataError, match="damaged"):
        load_arrays(path, np.zeros(2_500_000, np.uint8))
    path.write_bytes(old)
    assert not np.shares_memory(load_arrays(path, np.zeros(1000, np.uint8))[b"data"], room)


# MNIST


def idx(magic: int, content: np.ndarray[Any, Any]) -> bytes:
    return np.array([magic, *content.shape], ">i4").tobytes() + content.astype(np.uint8).tobytes()


def mnist_folder(root: Path, packed: bool) -> Path:
    for prefix, count in (("train", 6), ("t10k", 3)):
        images = np.arange(count * 28 * 28).reshape(count, 28, 28) % 256
        for name, content in (
            (f"{prefix}-images-idx3-ubyte", idx(2051, images)),
            (f"{prefix}-labels-idx1-ubyte", idx(2049, np.arange(count))),
        ):
            if packed:
                (root / (name + ".gz")).write_bytes(gzip.compress(content))
            else:
                (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(tmp_path: Path, packed: bool) -> None:
    splits = data.mnist(mnist_folder(tmp_path, packed), transform=data.ToFloat())
    images, labels = whole(splits.train)
    assert images.shape == (6, 1, 28, 28)
    assert images.flatten()[255:258].mul(255).round().tolist() == [255.0, 0.0, 1.0]
    assert labels.tolist() == list(range(6))
    assert whole(splits.test)[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda content: content[:50], "damaged or cut short"),
        ("train-images-idx3-ubyte.gz", lambda content: b"no gzip at all", "damaged or cut short"),
        ("train-images-idx3-ubyte.gz", lambda _: gzip.compress(idx(2049, np.zeros(30))), "with 2051"),
        ("train-images-idx3-ubyte.gz", lambda _: gzip.compress(idx(2051, np.zeros((6, 28, 28)))[:-1]), "6 x 28 x 28"),
        ("train-images-idx3-ubyte.gz", lambda _: gzip.compress(b"abc"), "3 bytes"),
        ("train-images-idx3-ubyte.gz", lambda _: gzip.compress(idx(2051, np.zeros((5, 28, 28)))), "5 images and .* 6"),
        ("train-labels-idx1-ubyte.gz", lambda _: gzip.compress(idx(2049, np.full(6, 10))), "label 10"),
    ],
)
def test_damaged_mnist(tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str) -> None:
    path = mnist_folder(tmp_path, packed=True) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        data.mnist(tmp_path).train  # noqa: B018
    assert name in str(caught.value)


def test_missing_mnist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)train-images-idx3-ubyte.gz cannot be read.*download=True"):
        data.mnist(tmp_path / "nowhere").train  # noqa: B018


# image folders


def image_root(root: Path) -> Path:
    for split, count in (("train", 3), ("val", 1)):
        for number, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for place in range(count):
                color = (100 * number, 10 * place, 7)
                Image.new("RGB", (40, 20) if place else (16, 16), color).save(folder / f"{place}.png")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    return root


@pytest.mark.parametrize("how", [{}, {"cache_images": True}, {"loader_workers": 1}])
def test_image_folder(tmp_path: Path, how: dict[str, Any]) -> None:
    splits = data.image_folder(image_root(tmp_path), size=16, transform=lambda inputs: inputs.int(), **how)
    assert splits.classes == ("cat", "dog")
    images, labels = whole(splits.train)
    assert images.shape == (6, 3, 16, 16)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images[:, :, 5, 5].tolist() == [[100 * n, 10 * p, 7] for n in range(2) for p in range(3)]
    assert whole(splits.test)[1].tolist() == [0, 1]


def test_images_are_scaled_and_cut_in_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    (tmp_path / "only").mkdir()
    Image.fromarray(pixels).save(tmp_path / "only" / "a.png")
    splits = data.image_folder(tmp_path, size=10, transform=lambda inputs: inputs.int())
    assert whole(splits.train)[0].unique().tolist() == [200]
    assert splits.test is None
    assert whole(data.image_folder(tmp_path, size=20).train)[0].shape == (1, 3, 20, 20)


@pytest.mark.parametrize("cache_images", [False, True])
def test_unreadable_images_are_named(tmp_path: Path, cache_images: bool) -> None:
    image_root(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    for content in (b"not an image", path.read_bytes()[:60], b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"dog/1\.png is no readable image"):
            whole(data.image_folder(tmp_path, size=16, cache_images=cache_images).train)
    with pytest.raises(DataError, match=r"dog/1\.png is no readable image") as told:
        whole(data.image_folder(tmp_path, size=16, cache_images=cache_images, loader_workers=1).train)
    assert "Traceback" not in str(told.value), "a worker process tells no more than the process itself"


def test_wrong_image_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="CLASS/IMAGE"):
        data.image_folder(tmp_path / "nowhere").train  # noqa: B018
    with pytest.raises(DataError, match="no class folders"):
        data.image_folder(tmp_path).train  # noqa: B018
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="no images"):
        data.image_folder(tmp_path).train  # noqa: B018
    (tmp_path / "val" / "cow").mkdir(parents=True)
    with pytest.raises(DataError, match="'cow'"):
        data.image_folder(tmp_path).test  # noqa: B018
    with pytest.raises(JobError, match="size"):
        data.image_folder(tmp_path, size=0)


# arrays


def test_npy_is_mapped_and_never_written(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(3, 2))
    np.save(tmp_path / "y.npy", np.arange(3))
    before = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").chmod(0o444)
    splits = data.npy((tmp_path / "x.npy", tmp_path / "y.npy"), test=(tmp_path / "x.npy", None))
    inputs, targets = whole(splits.train)
    assert (inputs.tolist(), targets.tolist()) == ([[0, 1], [2, 3], [4, 5]], [0, 1, 2])
    assert whole(splits.test)[1] is None
    assert (tmp_path / "x.npy").read_bytes() == before


def test_wrong_npy(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(100))
    for content in (path.read_bytes()[:500], b"abc", b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npy"):
            data.npy(path).train  # noqa: B018
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"x\.npy"):
        data.npy(path).train  # noqa: B018
    with pytest.raises(DataError, match="cannot be read"):
        data.npy(tmp_path / "none.npy").train  # noqa: B018


def test_arrays_reader() -> None:
    splits = data.arrays((np.ones((4, 2)), np.arange(4)), test=torch.zeros(3), classes=["a", "b"], about="ones")
    assert whole(splits.train)[1].tolist() == [0, 1, 2, 3]
    assert whole(splits.test)[0].tolist() == [0, 0, 0]
    assert splits.classes == ("a", "b")


# text


def test_text_as_characters(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("añb€añb€añb€ab", encoding="utf-8")
    splits = data.text(path, block=3, test_fraction=0.0)
    assert splits.classes == ("a", "b", "ñ", "€")
    assert splits.test is None
    inputs, targets = whole(splits.train)
    assert inputs.tolist() == [[0, 2, 1], [3, 0, 2], [1, 3, 0], [2, 1, 3]]
    assert targets.tolist() == [[2, 1, 3], [0, 2, 1], [3, 0, 2], [1, 3, 0]]
    assert inputs.dtype == torch.int64
    assert len(whole(data.text(path, block=3, stride=1, test_fraction=0.0).train)[0]) == 11


def test_text_as_bytes_and_its_splits(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"
    path.write_bytes(bytes(range(250)))
    splits = data.text(path, unit="byte", block=4, test_fraction=0.2)
    inputs, targets = whole(splits.train)
    assert inputs.flatten().tolist() == list(range(196))
    assert torch.equal(targets, inputs + 1)
    assert whole(splits.test)[0][0].tolist() == [200, 201, 202, 203]
    assert len(splits.classes) == 256


def test_wrong_text(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="byte 3"):
        data.text(path).train  # noqa: B018
    for unit in ("char", "byte"):
        path.write_bytes(b"")
        with pytest.raises(DataError, match="is empty"):
            data.text(path, unit=unit).train  # noqa: B018
        path.write_bytes(b"short")
        with pytest.raises(DataError, match="block"):
            data.text(path, unit=unit).train  # noqa: B018
        with pytest.raises(DataError, match="cannot be read"):
            data.text(tmp_path / "none", unit=unit).train  # noqa: B018
    for wrong in ({"unit": "word"}, {"block": 0}, {"stride": 0}, {"test_fraction": 1.0}):
        with pytest.raises(JobError):
            data.text(path, **wrong)


# tables

ROWS = "age, job, zip, pay\n20, a, 1, low\n40, ?, 2, high\n\n?, b, 2, low\n"
TEST_ROWS = "age,job,zip,pay\n30, c, 9, low.\n 50 ,a,1,high.\n"


def table(tmp_path: Path, **more: Any) -> Splits:
    (tmp_path / "train.csv").write_text(ROWS)
    (tmp_path / "test.csv").write_text(TEST_ROWS)
    splits: Splits = data.csv(
        tmp_path / "train.csv", tmp_path / "test.csv", **{"target": "pay", "strip_target": ".", **more}
    )
    return splits


def test_csv(tmp_path: Path) -> None:
    splits = table(tmp_path, categorical=["zip"])
    (numbers, codes), targets = whole(splits.train)
    assert numbers.tolist() == [[-1.0], [1.0], [0.0]]  # mean 30, deviation 10, the missing one is the mean
    assert codes.tolist() == [[1, 1], [0, 2], [2, 2]]
    assert splits.classes == ("high", "low")
    assert targets.tolist() == [1, 0, 1]
    (numbers, codes), targets = whole(splits.test)
    assert (numbers.tolist(), codes.tolist(), targets.tolist()) == ([[0.0], [2.0]], [[0, 0], [1, 1]], [1, 0])


def test_csv_onehot_and_numbers_alone(tmp_path: Path) -> None:
    inputs, _ = whole(table(tmp_path, drop=["zip"], onehot=True).train)
    assert inputs.tolist() == [[-1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    inputs, targets = whole(table(tmp_path, drop=["job"], target="zip", categorical=["pay"], onehot=True).train)
    assert inputs.shape == (3, 3)
    assert targets.tolist() == [1.0, 2.0, 2.0]
    assert targets.dtype == torch.float32
    assert table(tmp_path, target="zip", categorical=["zip"]).classes == ("1", "2")


def test_csv_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("1;2\n3;4\n")
    splits = data.csv(tmp_path / "t.csv", target="y", names=["x", "y"], delimiter=";")
    inputs, targets = whole(splits.train)
    assert (inputs.tolist(), targets.tolist()) == ([[-1.0], [1.0]], [2.0, 4.0])


def test_wrong_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for content, error, message in (
        (b"a,y\n1,2\n1,2,3\n", DataError, r"t\.csv, line 3: 3 values"),
        (b"a,y\n", DataError, "no rows"),
        (b"", DataError, "no rows"),
        (b"a,a,y\n1,2,3\n", DataError, "same name"),
        (b"a,b\n1,2\n", JobError, "no column 'y'"),
        (b"y\n1\n", JobError, "no column is left"),
        (b"a,y\n1,\n2,3\n", DataError, "row 1 has no target"),
        (b"a,y\n\xff,3\n", DataError, "no readable table"),
    ):
        path.write_bytes(content)
        with pytest.raises(error, match=message):
            data.csv(path, target="y").train  # noqa: B018
    with pytest.raises(DataError, match="cannot be read"):
        data.csv(tmp_path / "none.csv", target="y").train  # noqa: B018
    with pytest.raises(DataError, match=r"row 1 has the target 'low\.'"):
        table(tmp_path, strip_target="").test  # noqa: B018
    path.write_text("age,job,pay\nx,a,low\n")
    with pytest.raises(DataError, match="no column 'zip'"):
        data.csv(tmp_path / "train.csv", path, target="pay").test  # noqa: B018
    with pytest.raises(DataError, match="'age' holds text"):
        data.csv(tmp_path / "train.csv", path, target="pay", drop=["zip"]).test  # noqa: B018


def test_parquet(tmp_path: Path) -> None:
    pyarrow, pyarrow_parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    columns = {
        "age": pyarrow.array([20, 40, None]),
        "job": pyarrow.array(["a", None, "b"]).dictionary_encode(),
        "pay": ["low", "high", "low"],
    }
    pyarrow_parquet.write_table(pyarrow.table(columns), path)
    splits = data.parquet(path, target="pay")
    (numbers, codes), targets = whole(splits.train)
    assert (numbers.tolist(), codes.tolist(), targets.tolist()) == ([[-1.0], [1.0], [0.0]], [[1], [0], [2]], [1, 0, 1])
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(DataError, match=r"t\.parquet"):
        data.parquet(path, target="pay").train  # noqa: B018
    with pytest.raises(DataError, match="cannot be read"):
        data.parquet(tmp_path / "none.parquet", target="pay").train  # noqa: B018
    pyarrow_parquet.write_table(pyarrow.table({"x": [[1, 2]], "y": [1]}), path)
    with pytest.raises(DataError, match="'x' holds list"):
        data.parquet(path, target="y").train  # noqa: B018


@pytest.mark.parametrize(("module", "extra"), [("PIL", "images"), ("pyarrow", "tables")])
def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "cat").mkdir()
    splits = data.image_folder(tmp_path) if module == "PIL" else data.parquet(tmp_path / "x", target="y")
    with pytest.raises(DataError, match=rf"shardwise\[{extra}\]"):
        splits.train  # noqa: B018


def test_the_facade_is_lazy() -> None:
    code = (
        "import sys, shardwise.data as d; assert 'torch' not in sys.modules and 'numpy' not in sys.modules;"
        "d.text; assert 'PIL' not in sys.modules and 'pyarrow' not in sys.modules;"
        "[getattr(d, name) for name in d._MODULE]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(AttributeError, match="cifar10"):
        data.imagenet  # noqa: B018


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_csv(suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    text = "a,y\n" + "".join(f"{row % 7},{'yes' if row % 3 else 'no'}\n" for row in range(50))
    (tmp_path / "t.csv").write_text(text)
    path = tmp_path / f"t.csv{suffix}"
    path.write_bytes(pack(text.encode()))
    plain, read = (_arrays(data.csv(where, target="y").train) for where in (tmp_path / "t.csv", path))
    assert torch.equal(plain.inputs, read.inputs)
    assert torch.equal(plain.targets, read.targets)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is damaged or not complete"):
        _ = data.csv(path, target="y").train


def _arrays(source: Source) -> Any:
    return source


def test_infinity_and_numbers_too_large_are_refused(tmp_path: Path) -> None:
    """They would make a whole column infinite, or all its values equal."""
    path, good = tmp_path / "t.csv", tmp_path / "good.csv"
    good.write_text("a,y\n1,2\n3,4\n")
    for content, message in (
        ("a,y\n1,2\ninf,3\n", r"t\.csv: column 'a' holds infinity"),
        ("a,y\n1,2\n1e200,3\n", r"t\.csv: column 'a' holds infinity, or numbers too large to square"),
        ("a,y\n1,2\n2,-inf\n", r"t\.csv: row 2 has the target -inf, too large"),
        ("a,y\n1,2\n2,1e39\n", r"t\.csv: row 2 has the target 1e\+39, too large"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            _ = data.csv(path, target="y").train
    path.write_text("a,y\n1,2\ninf,3\n")
    with pytest.raises(DataError, match=r"t\.csv: row 2, column 'a': inf is too large"):
        _ = data.csv(good, path, target="y").test
    assert data.csv(path, target="y", missing=["inf"]).train.length == 2


def test_numbers_of_many_digits_are_no_categories(tmp_path: Path) -> None:
    """A float holds 15 digits: longer numbers that are close would become one class."""
    path = tmp_path / "t.csv"
    path.write_text("".join(["a,y\n", *(f"{row},{10**17 + row % 3}\n" for row in range(9))]))
    with pytest.raises(DataError, match=r"column 'y' is to be categories, .* such as 100000000000000000: close ones"):
        _ = data.csv(path, target="y", categorical=["y"]).train
    path.write_text("".join(["a,y\n", *(f"{row},{10**14 + row % 3}\n" for row in range(9))]))
    assert len(data.csv(path, target="y", categorical=["y"]).classes) == 3


def test_a_word_among_numbers_is_no_category(tmp_path: Path) -> None:
    """Every number would become a category of its own, and nobody would be told."""
    path = tmp_path / "t.csv"
    path.write_text("a,y\n" + "".join(f"{'n/a' if row == 9 else row / 10},{row % 2}\n" for row in range(30)))
    with pytest.raises(DataError, match=r"column 'a' holds 29 different numbers, but also 'n/a'\. Correct these rows"):
        _ = data.csv(path, target="y").train
    assert data.csv(path, target="y", missing=["n/a"]).train.length == 30
    assert data.csv(path, target="y", categorical=["a"]).train.length == 30
