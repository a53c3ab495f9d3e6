"""`shardwise data`: pack a data set into memory-mappable shards, check it, show it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardwise.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from shardwise.pack.parts import Run
    from shardwise.spec.packed import PackedIndex


@click.group()
def data() -> None:
    """Prepare data in parallel: pack a data set once, train on it from memory-mapped files."""


def _list(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


_FOLDER = click.Path(path_type=Path, file_okay=False)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_WORKERS = click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Processes; by default one a core.")


@data.command()
@click.argument("source")
@click.argument("out", type=_FOLDER)
@click.option("--kind", type=click.Choice(["images", "table", "text"]), help="By default, by the names of the files.")
@click.option("--test", metavar="SOURCE", help="Where the test split of a table or of tar files is.")
@click.option(
    "--size", default=224, show_default=True, type=click.IntRange(min=1), metavar="N", help="Pixels of an image's side."
)
@click.option("--skip-unreadable", is_flag=True, help="Leave out images that cannot be read, and say which.")
@click.option("--target", default="", metavar="COLUMN", help="Column of a table to predict.")
@click.option("--names", metavar="COLUMNS", help="Columns of a CSV file without a header line: id,age,answer.")
@click.option(
    "--categorical", metavar="COLUMNS", help="Columns of numbers that are categories, or classes: zip,answer."
)
@click.option("--drop", metavar="COLUMNS", help="Columns to leave out.")
@click.option("--onehot", is_flag=True, help="One number for each category instead of a code.")
@click.option("--strip-target", default="", metavar="TEXT", help="Characters to take off the end of a target.")
@click.option("--delimiter", default=",", show_default=True, metavar="TEXT", help="Between the values of a CSV file.")
@click.option("--unit", default="char", show_default=True, type=click.Choice(["char", "byte"]), help="Token of a text.")
@click.option("--shard-bytes", default="64MiB", show_default=True, metavar="SIZE", help="Size of a shard to aim at.")
@_WORKERS
@_JSON
def pack(
    source: str,
    out: Path,
    names: str | None,
    categorical: str | None,
    drop: str | None,
    shard_bytes: str,
    workers: int | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Pack SOURCE into the folder OUT, in parallel.

    SOURCE is a folder of images (train/CLASS/IMAGE), tar files of images, CSV or Parquet tables, or texts: a path, or
    an address such as s3://, webhdfs:// or https://. An interrupted packing goes on when it is called again.
    `shardwise.data.packed(OUT)` trains on it.
    """
    from shardwise.pack.pack import pack as pack_source
    from shardwise.pack.parts import PackOptions

    options = PackOptions(
        names=_list(names),
        categorical=_list(categorical),
        drop=_list(drop),
        shard_bytes=parse_bytes(shard_bytes),
        **rest,
    )
    with _pool(workers) as run:
        index = pack_source(source, out, options, run)
    _show(out, index, as_json)


@data.command()
@click.argument("folder", type=_FOLDER)
@_WORKERS
@_JSON
def check(folder: Path, workers: int | None, as_json: bool) -> None:
    """Compare every file of a packed data set with its checksum."""
    from shardwise.pack.pack import check as check_files

    with _pool(workers) as run:
        index = check_files(folder, run)
    click.echo(f"{folder}: all {_files(index)} files are as they were packed", err=True)
    _show(folder, index, as_json)


@data.command()
@click.argument("folder", type=_FOLDER)
@_JSON
def show(folder: Path, as_json: bool) -> None:
    """Say what a packed data set holds."""
    from shardwise.spec.packed import PackedIndex

    _show(folder, PackedIndex.read(folder), as_json)


@contextmanager
def _pool(workers: int | None) -> Iterator[Run]:
    """The task engine, with a line on stderr for each stage and a bar on a terminal."""
    from shardwise.tasks.pool import Pool

    with Pool(workers=workers, preload=["shardwise.pack.pack"]) as pool:

        def run(function: Callable[[Any], Any], items: Sequence[Any], what: str) -> list[Any]:
            if items:
                click.echo(f"{what}: {len(items)} {'part' if len(items) == 1 else 'parts'}", err=True)
            # a worker that is killed loses one part, which is made again
            return list(pool.map(function, items, retries=2, progress=sys.stderr.isatty()))

        yield run


def _files(index: PackedIndex) -> int:
    return sum(len(shard.files) for split in index.splits.values() for shard in split.shards)


def _show(folder: Path, index: PackedIndex, as_json: bool) -> None:
    from shardwise.cli.main import print_json

    if as_json:
        splits = {
            name: {
                "rows": split.rows,
                "shards": len(split.shards),
                "bytes": sum(shard.bytes for shard in split.shards),
                "fields": [asdict(field) for field in split.fields],
            }
            for name, split in index.splits.items()
        }
        record = {key: value for key, value in asdict(index).items() if key != "splits"}
        print_json({"folder": str(folder), "splits": splits, **record})
        return
    for name, split in sorted(index.splits.items(), reverse=True):  # train before test
        fields = ", ".join(f"{field.name} {_form(field.dtype, field.shape)}" for field in split.fields)
        size = format_bytes(sum(shard.bytes for shard in split.shards))
        unit = "tokens" if index.kind == "text" else "samples"
        shards = "1 shard" if len(split.shards) == 1 else f"{len(split.shards)} shards"
        click.echo(f"{name:<6} {split.rows:,} {unit} in {shards}, {size}: {fields}")
    if index.classes:
        word = "vocabulary" if index.kind == "text" else "classes"
        shown = ", ".join(repr(name) if index.kind == "text" else name for name in index.classes[:8])
        click.echo(f"{word} {len(index.classes)}: {shown}{', ...' if len(index.classes) > 8 else ''}")
    if index.kind == "images":
        mean, deviation = (", ".join(f"{value:.4f}" for value in index.statistics[key]) for key in ("mean", "std"))
        click.echo(f"channel means {mean}; deviations {deviation} (of values from 0 to 1)")
    for reason in index.skipped[:10]:
        click.echo(f"left out: {reason}", err=True)
    if len(index.skipped) > 10:
        click.echo(f"... and {len(index.skipped) - 10} more left out", err=True)
    block = ", block=128" if index.kind == "text" else ""
    click.echo(f'train on it with data=shardwise.data.packed("{folder}"{block})')


def _form(dtype: str, shape: tuple[int, ...]) -> str:
    import numpy as np

    return f"{np.dtype(dtype).name}{list(shape) if shape else ''}"
