"""Converts a data set to sharded TFRecords: `python -m trainer.prepare --source images --input D --output E --num_shards 64`.

What it writes is described in `records.py`; `python -m trainer.task --data_dir E` trains on it.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image, ImageDraw
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trainer import cli, dataset, formats, locks, pictures, storage, synthetic
from trainer.collection import Collection
from trainer.console import say, say_table
from trainer.convert import convert, with_test_split
from trainer.errors import RequestError
from trainer.options import parse_size
from trainer.shards import Request

_SOURCES = ("auto", "idx", "npz", "images", "csv", "synthetic")
_SHEET_COLUMNS, _SHEET_ROWS, _SHEET_SIDE, _SHEET_MARGIN = 10, 40, 56, 4
_TABLE_ROWS = 40


def prepare(source: str, path: Path, channels: int, num_examples: int, request: Request) -> Collection:
    """The data set to convert, with a training and a test split.

    Raises:
        RequestError: it is not there, damaged, or does not fit together.
    """
    if source == "synthetic":
        collection = formats.collect("auto", path, channels)
        collection = synthetic.deformed(collection, num_examples, request.seed)
    else:
        if num_examples:
            raise RequestError("--num_examples: only for --source=synthetic, which makes as many as you want")
        collection = formats.collect(source, path, channels)
    return with_test_split(collection, request)


def contact_sheet(collection: Collection, path: Path) -> None:
    """Draws the first examples of each class, a class a row, with its name; the first classes where there are many."""
    split = collection.splits["train"]
    names = collection.class_names[:_SHEET_ROWS]
    side, left = _SHEET_SIDE + _SHEET_MARGIN, 120
    sheet = Image.new("RGB", (left + _SHEET_COLUMNS * side, len(names) * side + _SHEET_MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        top = row * side + _SHEET_MARGIN
        draw.text((_SHEET_MARGIN, top + _SHEET_SIDE // 2 - 6), name[:18], fill="black")
        indices = np.flatnonzero(split.labels == row)[:_SHEET_COLUMNS]
        for column, pixels in enumerate(split.images.read(indices)):
            if not isinstance(pixels, RequestError):
                small = pictures.resize(pixels, (_SHEET_SIDE, _SHEET_SIDE))
                picture = Image.fromarray(small[..., 0] if small.shape[2] == 1 else small)
                sheet.paste(picture, (left + column * side, top))
    storage.write_file(path, lambda partial: sheet.save(partial))


def define_flags(values: flags.FlagValues) -> None:
    """Adds this command's flags."""
    own: dict[str, Any] = {"flag_values": values, "module_name": sys.argv[0]}
    flags.DEFINE_enum(
        "source", "auto", _SOURCES,
        "What --input is. idx: folder with MNIST's four files. npz: as keras.datasets has it. images: a folder of pictures for "
        "each class, or train/ and test/ with such folders. csv: columns path, label, and split for both sets in one file. "
        "synthetic: --num_examples deformed images of an IDX or npz data set, empty for MNIST. auto: by what is there.", **own,
    )  # fmt: skip
    flags.DEFINE_string("input", None, "File or folder to convert.", **own)
    flags.DEFINE_string("output", None, "Folder to write to: a new or empty one, or one where a conversion was stopped.", **own)
    flags.DEFINE_integer("num_shards", 16, "Files of the training set; the test set gets files of about their size.", 1, **own)
    flags.DEFINE_enum("encoding", "raw", ("raw", "png"), "raw: pixels, quick to read. png: smaller, any sizes.", **own)
    flags.DEFINE_string("image_size", "", "HEIGHTxWIDTH, or one number: images are scaled to it. Empty: their own size.", **own)
    flags.DEFINE_enum(
        "pictures", "auto", ("auto", "digits", "photos"),
        "What trainer.predict does with other pictures. digits: finds the one digit, makes it light on dark, centred. photos: "
        "only scales. auto: digits for gray IDX and npz data.", **own,
    )  # fmt: skip
    flags.DEFINE_integer("channels", 0, "1 for gray, 3 for colour. 0: by a look at some of the pictures.", 0, 3, **own)
    flags.DEFINE_float(
        "test_fraction", 0.0, "Share of the training set that becomes the test set, where there is none.", 0, 0.9, **own
    )
    flags.DEFINE_integer("num_examples", 0, "Training images of --source=synthetic.", 0, 10**8, **own)
    flags.DEFINE_integer("seed", 0, "Seed of the order of examples, and of synthetic images.", 0, 2**32 - 1, **own)
    flags.DEFINE_enum("on_error", "fail", ("fail", "skip"), "What to do about a damaged picture. skip: list it, go on.", **own)
    flags.DEFINE_integer("num_processes", 0, "Processes that write. 0: as many as there are cores.", 0, **own)


def main(_: list[str]) -> None:
    """Converts, and shows what there is."""
    values = flags.FLAGS
    if not values.output or (not values.input and values.source != "synthetic"):
        raise RequestError(f"--{'input' if values.output else 'output'} must be given: see --helpfull")
    for flag in ("input", "output"):
        if "://" in (getattr(values, flag) or ""):
            raise RequestError(
                f"--{flag}={getattr(values, flag)}: mount it, or copy what is written: only jobs read gs:// directly"
            )
    if math.isnan(values.test_fraction):  # Which absl lets through.
        raise RequestError("--test_fraction=nan: expected a number from 0 to 0.9")
    if values.channels == 2:
        raise RequestError("--channels=2: expected 1, 3, or 0 to find out")
    if values.source == "synthetic" and not values.num_examples:
        raise RequestError("--source=synthetic: say how many with --num_examples")
    request = Request(
        num_shards=values.num_shards,
        encoding=values.encoding,
        image_size=parse_size("image_size", values.image_size),
        test_fraction=values.test_fraction,
        seed=values.seed,
        on_error=values.on_error,
    )
    source = Path(values.input or dataset.EMBEDDED)
    collection = prepare(values.source, source, values.channels, values.num_examples, request)
    if values.pictures != "auto":
        collection = dataclasses.replace(collection, pictures=values.pictures)
    output = Path(values.output)
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise RequestError(f"--output={output} is within --input={source}: give another folder")
    made = storage.missing(output)
    storage.prepare_folder(output, "--output")
    console = Console()
    with locks.exclusive(output, needed=True, flag="--output", made=made):
        total = sum(len(split) for split in collection.splits.values())
        with _progress(console, total) as done:
            content = convert(collection, output, request, values.num_processes or len(os.sched_getaffinity(0)), done)
        with storage.stop_when_full("examples.png", lambda: "the data set is complete"):
            contact_sheet(collection, output / "examples.png")
    _show(content, output)


@contextlib.contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere nothing, as the summary says it all."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("examples"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing", total=total)
        yield lambda count: progress.advance(task, count)


def _show(content: dict[str, Any], output: Path) -> None:
    table = Table("class", *content["splits"], "share")
    total = max(1, sum(content["splits"]["train"]["class_counts"]))
    counts = list(zip(*(split["class_counts"] for split in content["splits"].values()), strict=True))
    for name, row in list(zip(content["class_names"], counts, strict=True))[:_TABLE_ROWS]:
        table.add_row(escape(name), *map(str, row), f"{row[0] / total:.1%}")
    if len(counts) > _TABLE_ROWS:
        table.add_row(f"and {len(counts) - _TABLE_ROWS} more")
    say_table(table)
    for line in content["left_out"]:
        print(f"left out: {line}", file=sys.stderr)
    shape = "x".join(map(str, content["image_shape"])) if content["image_shape"] else "several sizes"
    sizes = ", ".join(f"{split['num_examples']} {name}" for name, split in content["splits"].items())
    num_bytes = sum(shard["bytes"] for split in content["splits"].values() for shard in split["shards"])
    say(f"{output}: {sizes} examples of {shape}, {len(content['class_names'])} classes, {num_bytes / 2**20:.1f} MiB")
    scaled = "" if content["image_shape"] else " --image_size HEIGHTxWIDTH"
    say(f"train on it with: python -m trainer.task --data_dir {shlex.quote(str(output))}{scaled}")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run("trainer.prepare", main, flags_only=True)
