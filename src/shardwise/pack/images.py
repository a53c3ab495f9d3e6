"""Packing images: folders of classes, or tar files of samples, as uint8 squares with int64 labels."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, final

import numpy as np

from shardwise.data.readers.decode import SUFFIXES, load_pillow, square_image
from shardwise.errors import DataError, JobError
from shardwise.pack.files import BLOCK_BYTES, Piece, canonical, find_files, open_file, read_range
from shardwise.pack.parts import Made, Maker, PackOptions, Part, Prepared, Run, balanced, fingerprint, numbered

TEST_NAMES = ("val", "test", "validation")


def prepare_images(source: str, options: PackOptions, run: Run) -> Prepared:
    """Look through an image folder (`train/CLASS/IMAGE`, or `CLASS/IMAGE`), or tar files of images with a class each.

    Raises:
        DataError: no images, no classes, or a class that the training images have not.
        JobError: options that contradict each other.
    """
    load_pillow()  # told here where it is missing, and not once a shard
    if options.size < 1:
        raise JobError(f"size is {options.size}: give the side of the square images in pixels, at least 1")
    files = find_files(source)
    tars = [(url, size) for url, size in files if url.endswith(".tar")]
    if tars:
        test_tars = (
            [] if options.test is None else [file for file in find_files(options.test) if file[0].endswith(".tar")]
        )
        splits = {"train": _tar_samples(tars, run), "test": _tar_samples(test_tars, run)}
        files = [*tars, *test_tars]
    else:
        if options.test is not None:
            raise JobError("an image folder divides itself (train/, val/): leave the test source out")
        splits, files = _folder_samples(source, files)
    names = {name for name, _ in splits["train"]}
    if not names:
        raise DataError(f"{source} has no training images")
    classes = tuple(sorted(names))
    if tars and all(name.isdecimal() for name in names):  # KEY.cls holds the class's number, gaps included
        classes = tuple(str(number) for number in range(max(map(int, names)) + 1))
    numbers = {name: place for place, name in enumerate(classes)}
    image_bytes = 3 * options.size * options.size
    parts: list[Part] = []
    for split, samples in splits.items():
        unknown = sorted({name for name, _ in samples if name not in numbers})
        if unknown:
            raise DataError(f"{source}: the {split} images have the class {unknown[0]!r}, the training images have not")
        pieces = [_labelled(piece, numbers[name]) for name, piece in samples]
        groups = max(1, round(len(pieces) * image_bytes / options.shard_bytes))
        parts.extend(numbered(split, balanced(pieces, groups) if pieces else []))
    return Prepared(
        kind="images",
        settings={"size": options.size, "shard_bytes": options.shard_bytes, "skip_unreadable": options.skip_unreadable},
        source=fingerprint(canonical(source), files),
        parts=tuple(parts),
        maker=_ImageMaker(size=options.size, skip=options.skip_unreadable, classes=len(classes)),
        classes=classes,
    )


Sample = tuple[str, Piece]
"""Name of the class, and where the image is."""


def _folder_samples(
    source: str, files: Sequence[tuple[str, int]]
) -> tuple[dict[str, list[Sample]], list[tuple[str, int]]]:
    """In the order of `shardwise.data.image_folder`: by class, then by path. With the files that were used."""
    root = canonical(source)
    images = [
        (PurePosixPath(url.removeprefix(root).lstrip("/")).parts, url, size)
        for url, size in files
        if PurePosixPath(url).suffix.lower() in SUFFIXES
    ]
    tops = {parts[0] for parts, _, _ in images}
    divided = "train" in tops
    test = next((name for name in TEST_NAMES if name in tops), None) if divided else None
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    used = []
    for parts, url, size in images:
        place = parts[1:] if divided else parts
        if len(place) < 2 or (divided and parts[0] not in ("train", test)):
            continue
        split = "test" if divided and parts[0] == test else "train"
        splits[split].append((place[0], Piece(url=url, start=0, bytes=size, name=url)))
        used.append((url, size))
    for samples in splits.values():
        samples.sort(key=lambda sample: (sample[0], PurePosixPath(sample[1].url)))
    if not splits["train"]:
        raise DataError(
            f"{source} has no images in class folders: expected train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE, with "
            f"IMAGE ending in {', '.join(sorted(SUFFIXES))}; or tar files"
        )
    return splits, used


def _labelled(piece: Piece, label: int) -> Piece:
    return Piece(url=piece.url, start=piece.start, bytes=piece.bytes, label=label, name=piece.name)


def _tar_samples(tars: Sequence[tuple[str, int]], run: Run) -> list[Sample]:
    found: list[Sample] = []
    for result in run(_scan_tar, [url for url, _ in tars], "looking through tar files"):
        if isinstance(result, str):
            raise DataError(result)
        found.extend(result)
    return found


def _scan_tar(url: str) -> list[Sample] | str:
    """The samples of an uncompressed tar file: `KEY.jpg` beside `KEY.cls` (a number), or images in folders of classes."""
    images: list[tuple[str, Piece]] = []
    labels: dict[str, str] = {}
    try:
        with open_file(url) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                path = PurePosixPath(member.name)
                key = str(path.with_name(path.name.split(".", 1)[0]))
                if path.suffix.lower() in SUFFIXES:
                    name = f"{url}:{member.name}"
                    images.append((key, Piece(url=url, start=member.offset_data, bytes=member.size, name=name)))
                elif path.suffix.lower() == ".cls":
                    content = tar.extractfile(member)
                    labels[key] = "" if content is None else content.read(64).decode("ascii", "replace").strip()
            wrong = _wrong_end(opened, tar.offset)
    except tarfile.TarError as error:
        return f"{url} is no uncompressed tar file, or is damaged ({error}); unpack a .tar.gz first"
    except (OSError, DataError) as error:
        return f"{url} cannot be read: {error}"
    if wrong:
        return f"{url} {wrong}"
    samples = []
    seen: set[str] = set()
    for key, piece in images:
        # With one class in a file, all are: the folder of an image whose file is missing is no class of its own.
        label = labels.get(key, "") if labels else PurePosixPath(key).parent.name
        if not label or (labels and not label.isdecimal()):
            return f"{piece.name} has no class: put a number in {PurePosixPath(key).name}.cls, or the image in a folder"
        if labels and key in seen:
            return f"{piece.name} is a second image of the sample {key}, such as a mask: leave one image a sample in the file"
        seen.add(key)
        samples.append((str(int(label)) if labels else label, piece))
    return samples


def _wrong_end(file: IO[bytes], end: int) -> str:
    """What is wrong after the last member of a tar file; "" where it ends as it should, with blocks of zeros.

    `tarfile` takes both for the end of the archive, and the samples behind it would be missing without a word.
    """
    file.seek(end)
    if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        return "is cut short: it has no end mark; get it again, or write it again"
    while block := file.read(BLOCK_BYTES):
        if block.strip(b"\0"):
            return "holds more behind its end mark, such as another tar file: give these as files of their own"
    return ""


@final
@dataclass(frozen=True, kw_only=True)
class _ImageMaker(Maker):
    size: int
    skip: bool
    classes: int

    def make(self, part: Part) -> Made:
        images = np.empty((len(part.pieces), 3, self.size, self.size), np.uint8)
        labels = np.empty(len(part.pieces), np.int64)
        rows, skipped = 0, []
        for piece in part.pieces:
            try:
                content = io.BytesIO(read_range(piece.url, piece.start, piece.bytes))
                images[rows] = square_image(content, self.size, piece.name)
            except DataError as error:
                if not self.skip:
                    raise DataError(f"{error}; --skip-unreadable leaves such images out") from error
                skipped.append(str(error))
                continue
            labels[rows] = piece.label
            rows += 1
        images, labels = images[:rows], labels[:rows]
        # Whole numbers add up to the same in any order, so the statistics do not depend on the division into shards.
        values = np.arange(256, dtype=np.int64)
        counts = [np.bincount(images[:, channel].ravel(), minlength=256).astype(np.int64) for channel in range(3)]
        notes = {
            "sum": [int((count * values).sum()) for count in counts],
            "squares": [int((count * values * values).sum()) for count in counts],
            "pixels": rows * self.size * self.size,
            "class_counts": np.bincount(labels, minlength=self.classes).tolist(),
        }
        return Made(arrays={"inputs": images, "targets": labels} if rows else {}, notes=notes, skipped=tuple(skipped))

    def statistics(self, notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Channel means and deviations in units of [0, 1], and the images of each class."""
        pixels = sum(note["pixels"] for note in notes)
        if not pixels:
            raise DataError("no training image could be read: there is nothing to pack")
        means = [sum(note["sum"][channel] for note in notes) / pixels for channel in range(3)]
        squares = [sum(note["squares"][channel] for note in notes) / pixels for channel in range(3)]
        deviations = [max(0.0, square - mean * mean) ** 0.5 for mean, square in zip(means, squares, strict=True)]
        counts = np.array([note["class_counts"] for note in notes], np.int64).sum(0)
        return {
            "mean": [mean / 255 for mean in means],
            "std": [deviation / 255 for deviation in deviations],
            "class_counts": counts.tolist(),
        }
