"""Packed data sets hold what the readers give, whatever the division into shards, and survive what can happen to them."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

import shardwise
from shardwise.data.batch import tree_leaves
from shardwise.data.loader import batches
from shardwise.data.source import Source, Splits
from shardwise.errors import DataError, FolderError, JobError
from shardwise.pack.files import Piece
from shardwise.pack.pack import check, guess_kind, pack
from shardwise.pack.parts import PackOptions, balanced, cut, run_here
from shardwise.spec.packed import PackedIndex

SIZE = 8


def image_bytes(seed: int, width: int = 11, height: int = 9, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Classes of 7, 4 and 1 training images, and 3 test images of one class."""
    root = tmp_path / "images"
    for split, counts in {"train": {"cat": 7, "dog": 4, "owl": 1}, "val": {"dog": 3}}.items():
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number}.png").write_bytes(image_bytes(10 * len(split) + number, 9 + number))
    return root


def all_rows(source: Source) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    found = list(batches(source, batch_size=5, seed=3, epoch=1, prefetch=0))
    inputs = [leaf for batch in found for leaf in tree_leaves(batch.inputs)]
    return inputs, [leaf for batch in found for leaf in tree_leaves(batch.targets)]


def assert_same(packed: Splits, direct: Splits, tolerance: float = 0.0) -> None:
    for one, other in ((packed.train, direct.train), (packed.test, direct.test)):
        if other is None or one is None:
            assert one is other
            continue
        assert one.length == other.length
        for mine, theirs in zip(all_rows(one), all_rows(other), strict=True):
            assert len(mine) == len(theirs) > 0
            for a, b in zip(mine, theirs, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert packed.classes == direct.classes


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def identity(inputs: torch.Tensor) -> torch.Tensor:
    return inputs


@pytest.mark.parametrize("shard_images", [1, 3, 100])
def test_images_equal_the_reader(images: Path, tmp_path: Path, shard_images: int) -> None:
    out = tmp_path / "out"
    index = pack(str(images), out, PackOptions(size=SIZE, shard_bytes=3 * SIZE * SIZE * shard_images))
    assert len(index.splits["train"].shards) == {1: 12, 3: 4, 100: 1}[shard_images]
    direct = shardwise.data.image_folder(images, size=SIZE, cache_images=True, transform=identity)
    assert_same(shardwise.data.packed(out, identity), direct)
    values = torch.cat(all_rows(direct.train)[0]).double() / 255
    assert index.statistics["class_counts"] == [7, 4, 1]
    assert index.statistics["mean"] == pytest.approx(values.mean((0, 2, 3)).tolist())
    assert index.statistics["std"] == pytest.approx(values.std((0, 2, 3), correction=0).tolist())
    normal = torch.cat(all_rows(shardwise.data.packed(out).train)[0])
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def tar_file(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_tar_shards(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    labels = [2, 0, 10, 2, 0]
    for tar in range(2):
        members: dict[str, bytes] = {}
        for key in range(tar * 3, min(5, tar * 3 + 3)):
            members[f"{key:04d}.png"] = image_bytes(key, SIZE, SIZE)
            members[f"{key:04d}.cls"] = str(labels[key]).encode()
        tar_file(tmp_path / "tars" / f"{tar}.tar", members)
    out = tmp_path / "out"
    index = pack(str(tmp_path / "tars"), out, PackOptions(size=SIZE))
    assert index.classes == tuple(str(number) for number in range(11))
    batch = next(
        iter(batches(shardwise.data.packed(out, identity).train, batch_size=5, seed=0, epoch=0, shuffle=False))
    )
    assert isinstance(batch.targets, torch.Tensor) and isinstance(batch.inputs, torch.Tensor)
    assert batch.targets.tolist() == labels
    expected = np.asarray(Image.open(io.BytesIO(image_bytes(4, SIZE, SIZE)))).transpose(2, 0, 1)
    np.testing.assert_array_equal(batch.inputs[4].numpy(), expected)
    tar_file(tmp_path / "bad.tar", {"a.png": image_bytes(0), "a.cls": b"cat"})
    with pytest.raises(DataError, match=r"a\.png has no class"):
        pack(str(tmp_path / "bad.tar"), tmp_path / "other", PackOptions(size=SIZE))
    for extra, message in (("train/2.png", r"2\.png has no class"), ("train/1.mask.png", "second image of the sample")):
        members = {"train/1.png": image_bytes(0), "train/1.cls": b"3", extra: image_bytes(1)}
        tar_file(tmp_path / "odd.tar", members)
        with pytest.raises(DataError, match=message):
            pack(str(tmp_path / "odd.tar"), tmp_path / "other1", PackOptions(size=SIZE))
    shard = (tmp_path / "tars" / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "tars" / "0.tar") as opened:
        boundary = opened.getmembers()[2].offset  # a sample ends here, and `tarfile` would take it for the end
    for content, message in (
        (shard[:boundary], "cut short: it has no end mark"),
        (shard + shard, "more behind its end"),
    ):
        (tmp_path / "end.tar").write_bytes(content)
        with pytest.raises(DataError, match=message):
            pack(str(tmp_path / "end.tar"), tmp_path / "other3", PackOptions(size=SIZE))
    (tmp_path / "cut.tar").write_bytes((tmp_path / "bad.tar").read_bytes()[:300])
    with pytest.raises(DataError, match="no uncompressed tar file"):
        pack(str(tmp_path / "cut.tar"), tmp_path / "other2", PackOptions(size=SIZE))


ROWS = [
    *(f"{n},{n * 0.5 if n % 5 else '?'}, {'abc'[n % 3]}, {'yes' if n % 7 else 'no'}." for n in range(60)),
    "60,1.5, d, yes.",
]
HEADER = "id,rate,letter,answer"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "train.csv"
    path.write_text("\n".join([HEADER, *ROWS]))  # the last line has no end
    (tmp_path / "test.csv").write_text("\r\n".join([HEADER, "3,,z,no", "4,1.0,b,yes"]) + "\r\n")
    return path


@pytest.mark.parametrize("shard_bytes", [1, 40, 101, 10_000])
@pytest.mark.parametrize("onehot", [False, True])
def test_tables_equal_the_reader(table: Path, tmp_path: Path, shard_bytes: int, onehot: bool) -> None:
    shared = {"target": "answer", "strip_target": ".", "onehot": onehot}
    test = table.with_name("test.csv")
    options = PackOptions(test=str(test), shard_bytes=shard_bytes, drop=("id",), **shared)  # type: ignore[arg-type]
    index = pack(str(table), tmp_path / "out", options)
    assert index.splits["train"].rows == 61 and index.splits["test"].rows == 2
    direct = shardwise.data.csv(table, test, drop=["id"], **shared)
    assert_same(shardwise.data.packed(tmp_path / "out"), direct, tolerance=1e-6)


def test_a_column_that_looks_like_numbers_in_one_part(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("code,y\n" + "".join(f"{n:03d},{n}\n" for n in range(50)) + "x7,1\n")
    index = pack(str(path), tmp_path / "out", PackOptions(target="y", categorical=("code",), shard_bytes=50))
    assert len(index.splits["train"].shards) > 3
    assert index.statistics["categories"]["code"][:2] == ["000", "001"]  # as written, not as the number 0
    assert_same(
        shardwise.data.packed(tmp_path / "out"),
        shardwise.data.csv(path, target="y", categorical=["code"]),
        tolerance=1e-6,
    )


def test_names_and_a_quoted_line_break(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("1,2\n3,4\n")
    index = pack(str(path), tmp_path / "out", PackOptions(target="y", names=("x", "y")))
    assert index.splits["train"].rows == 2
    path.write_text('text,y\n"two\nlines",1\n')
    with pytest.raises(DataError, match="quoted value runs over several lines"):
        pack(str(path), tmp_path / "other", PackOptions(target="y"))


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"x": [float(n) for n in range(20)], "letter": list("abcd") * 5, "y": [n % 2 for n in range(20)]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet", row_group_size=6)
    index = pack(str(tmp_path / "t.parquet"), tmp_path / "out", PackOptions(target="y", categorical=("y",)))
    assert [shard.rows for shard in index.splits["train"].shards] == [6, 6, 6, 2]
    direct = shardwise.data.parquet(tmp_path / "t.parquet", target="y", categorical=["y"])
    assert_same(shardwise.data.packed(tmp_path / "out"), direct, tolerance=1e-6)


TEXT = "Grüße, 世界! 😀 the quick brown fox\n" * 9


@pytest.mark.parametrize("shard_bytes", [1, 7, 64, 10_000])
@pytest.mark.parametrize("unit", ["char", "byte"])
def test_texts_equal_the_reader(tmp_path: Path, shard_bytes: int, unit: Any) -> None:
    path = tmp_path / "t.txt"
    path.write_text(TEXT, encoding="utf-8")
    index = pack(str(path), tmp_path / "out", PackOptions(unit=unit, shard_bytes=shard_bytes))
    assert index.splits["all"].rows == (len(TEXT) if unit == "char" else len(TEXT.encode()))
    form = {"block": 6, "stride": 4, "test_fraction": 0.2}
    packed = shardwise.data.packed(tmp_path / "out", **form)
    assert_same(packed, shardwise.data.text(path, unit=unit, **form))


def test_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"abc\xff\xfedef")
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 3"):
        pack(str(tmp_path / "t.txt"), tmp_path / "out", PackOptions(shard_bytes=2))


class Interrupted(Exception):
    pass


def stops_after(count: int) -> Callable[[Callable[[Any], Any], Sequence[Any], str], list[Any]]:
    def run(function: Callable[[Any], Any], items: Sequence[Any], what: str) -> list[Any]:
        if what != "packing":
            return run_here(function, items, what)
        for item in items[:count]:
            function(item)
        raise Interrupted

    return run


def test_an_interrupted_packing_goes_on_to_the_same_bytes(images: Path, tmp_path: Path) -> None:
    options = PackOptions(size=SIZE, shard_bytes=3 * SIZE * SIZE * 2)
    pack(str(images), tmp_path / "whole", options)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        pack(str(images), out, options, stops_after(3))
    with pytest.raises(DataError, match="packing was not finished"):
        _ = shardwise.data.packed(out).train
    first = sorted(out.glob("*.npy"))[0]
    (out / f"{first.name}.part-999").write_bytes(b"half")
    first.write_bytes(first.read_bytes()[:-1])  # a shard that lost its end is made again
    made: list[str] = []

    def counting(function: Callable[[Any], Any], items: Sequence[Any], what: str) -> list[Any]:
        if what == "packing":
            made.extend(item.name for item in items)
        return run_here(function, items, what)

    pack(str(images), out, options, counting)
    total = sum(len(split.shards) for split in PackedIndex.read(out).splits.values())
    assert len(made) == total - 2
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    made.clear()
    pack(str(images), out, options, counting)  # finished: nothing is done again
    assert not made
    check(out)


def test_what_does_not_fit_together(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(str(images), out, PackOptions(size=SIZE))
    with pytest.raises(FolderError, match="another source or with other options"):
        pack(str(images), out, PackOptions(size=SIZE + 1))
    with pytest.raises(FolderError, match="no packed data set"):
        pack(str(images), images, PackOptions(size=SIZE))
    with pytest.raises(JobError, match="--target"):
        pack(str(images), tmp_path / "a", PackOptions(kind="table"))
    with pytest.raises(DataError, match="does not exist"):
        pack(str(tmp_path / "nowhere"), tmp_path / "b", PackOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--kind"):
        pack(str(tmp_path / "empty"), tmp_path / "c", PackOptions())
    with pytest.raises(DataError, match="cannot be opened"):
        pack("nosuchprotocol://host/x.csv", tmp_path / "d", PackOptions(target="y"))


def test_an_unreadable_image(images: Path, tmp_path: Path) -> None:
    broken = images / "train" / "cat" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError, match=r"3\.png is no readable image.*--skip-unreadable leaves such images out"):
        pack(str(images), tmp_path / "out", PackOptions(size=SIZE))
    index = pack(str(images), tmp_path / "skipped", PackOptions(size=SIZE, skip_unreadable=True))
    assert index.splits["train"].rows == 11 and index.statistics["class_counts"] == [6, 4, 1]
    assert len(index.skipped) == 1 and "3.png" in index.skipped[0]
    pack(str(images), tmp_path / "out", PackOptions(size=SIZE, skip_unreadable=True))  # the one that failed goes on
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "skipped")
    with pytest.raises(Interrupted):
        pack(
            str(images), tmp_path / "half", PackOptions(size=SIZE, skip_unreadable=True, shard_bytes=1), stops_after(1)
        )
    with pytest.raises(FolderError, match="unfinished"):  # what was skipped there must not be missing here
        pack(str(images), tmp_path / "half", PackOptions(size=SIZE, shard_bytes=1))


def test_damage_is_found(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = pack(str(images), out, PackOptions(size=SIZE, shard_bytes=1))
    victim = out / index.splits["train"].shards[4].files["inputs"]
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(bytes(content))
    with pytest.raises(DataError, match=rf"{victim.name} has other bytes"):
        check(out)
    victim.write_bytes(bytes(content[:-1]))
    with pytest.raises(DataError, match=f"{victim.name} cannot be mapped"):
        _ = shardwise.data.packed(out).train
    (out / "index.json").write_text("{}")
    with pytest.raises(DataError, match="not the index"):
        _ = shardwise.data.packed(out).train


def test_a_source_that_is_not_on_this_machine(images: Path, tmp_path: Path) -> None:
    remote = fsspec.filesystem("memory")
    for path in images.rglob("*.png"):
        remote.pipe_file(f"/bucket/images/{path.relative_to(images)}", path.read_bytes())
    try:
        options = PackOptions(size=SIZE, shard_bytes=500)
        pack("memory://bucket/images", tmp_path / "remote", options)
        pack(str(images), tmp_path / "local", options)
        assert bytes_of(tmp_path / "remote") == bytes_of(tmp_path / "local")
    finally:
        remote.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("kind", "name", "line"), [("table", "part-0.csv", "1,2\n"), ("text", "part-0", "some words\n")]
)
def test_what_spark_leaves_beside_the_data_is_not_data(kind: Any, name: str, line: str, tmp_path: Path) -> None:
    text = "x,y\n" * (kind == "table") + line * 3
    found = []
    for place in ("clean", "spark"):
        root = tmp_path / place
        root.mkdir()
        (root / name).write_text(text)
        if place == "spark":
            (root / "_temporary" / "0").mkdir(parents=True)
            (root / "_temporary" / "0" / name.replace("0", "1")).write_text(text)
            (root / f".{name}.crc").write_text("crc")
            (root / "_SUCCESS").touch()
            (root / name.replace("0", "2")).touch()  # a reducer that was given nothing
        found.append(pack(str(root), tmp_path / f"packed {place}", PackOptions(kind=kind, target="y")))
    assert found[0].splits == found[1].splits


def test_a_table_with_a_column_in_the_names_of_folders_is_refused(tmp_path: Path) -> None:
    for value in ("1", "2"):
        place = tmp_path / "size=3" / "table" / f"x={value}"  # what lies above the source is no part of it
        place.mkdir(parents=True)
        (place / "part-0.csv").write_text("z,y\n1,2\n3,4\n")
    source = tmp_path / "size=3" / "table"
    with pytest.raises(DataError, match=r"the column x of .*table is in the names of its folders \(x=1\)"):
        pack(str(source), tmp_path / "out", PackOptions(target="y"))
    pack(str(source / "x=1"), tmp_path / "out", PackOptions(target="y"))


def test_a_mark_of_utf8_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_text('"age",y\n31,1\n32,0\n', encoding="utf-8-sig")
    direct = shardwise.data.csv(path, target="y", categorical=("age",))
    assert direct.train.length == 2
    pack(str(path), tmp_path / "out", PackOptions(target="y", categorical=("age",)))
    assert_same(shardwise.data.packed(tmp_path / "out"), direct)
    path.write_text("31,1\n32,0\n", encoding="utf-8-sig")
    named = PackOptions(target="y", names=("age", "y"))
    pack(str(path), tmp_path / "named", named)
    assert_same(
        shardwise.data.packed(tmp_path / "named"), shardwise.data.csv(path, target="y", names=["age", "y"]), 1e-6
    )


def test_a_value_that_was_corrected_in_place_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("x,y\n1,yes\n2,no\n")
    options = PackOptions(target="y", shard_bytes=8)
    pack(str(path), tmp_path / "out", options)
    with pytest.raises(Interrupted):
        pack(str(path), tmp_path / "half", options, stops_after(1))
    pack(str(path), tmp_path / "out", options)
    later = (tmp_path / "out" / "index.json").stat().st_mtime + 10
    path.write_text("x,y\n1,yes\n3,no\n")
    os.utime(path, (later, later))
    for name in ("out", "half"):
        with pytest.raises(FolderError, match=r"t\.csv was written after it was packed"):
            pack(str(path), tmp_path / name, options)


def test_parts_are_balanced_by_bytes() -> None:
    pieces = [Piece(url=str(n), start=0, bytes=size) for n, size in enumerate([1] * 90 + [30, 30, 30])]
    sizes = [sum(piece.bytes for piece in group) for group in balanced(pieces, 6)]
    assert sizes == [30] * 6
    spans = cut([("a", 100), ("b", 5)], 30)
    assert [(piece.url, piece.start, piece.bytes) for piece in spans] == [
        ("a", 0, 33), ("a", 33, 33), ("a", 66, 34), ("b", 0, 5),
    ]  # fmt: skip


def test_compressed_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv.gz").write_bytes(b"")
    with pytest.raises(DataError, match="is compressed, and is packed from parts of its bytes: unpack it first"):
        guess_kind(str(tmp_path / "t.csv.gz"))
