"""Data that is larger than memory: written, read and trained on, beside the usual ways to read the same examples."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import Section, as_typed, run_json, run_program, run_timed, table
from benchmarks.throughput import Progress

_READER = "benchmarks.peers.reading"
_BATCH = 256
_PART = 10


def _prepare(folder: Path, count: int) -> tuple[float, list[str]]:
    """Writes so many synthetic digits; gives the seconds and the command."""
    command = ["trainer.prepare", "--source=synthetic", f"--num_examples={count}", f"--num_shards={max(8, count // 100_000)}"]
    started = time.perf_counter()
    run_program([*command, f"--output={folder}"])
    return time.perf_counter() - started, [*command, f"--output={folder.name}"]


def _train(folder: Path, data_dir: Path | None, *flags: str) -> dict[str, Any]:
    """The result of a job, and its peak of memory."""
    data = [f"--data_dir={data_dir}", "--input_pipeline=stream"] if data_dir else []
    _, peak = run_timed(["trainer.task", "--preset=fast", *data, *flags, f"--model_dir={folder}"])
    return {**json.loads((folder / "result.json").read_text()), "peak_rss_mib": peak}


def measure(quick: bool, progress: Progress) -> Section:
    """Ten million examples, a hundred thousand with `quick`; all on one disk, in a temporary folder (9 GB)."""
    count = 100_000 if quick else 10_000_000
    batches = 200 if quick else 2000
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        large, small, pictures = folder / "large", folder / "small", folder / "pictures"
        seconds, command = _prepare(large, count)
        _prepare(small, count // _PART)
        picture_batches = min(count // _PART, 25_600) // _BATCH
        run_program([_READER, "write_pictures", str(small), f"--pictures={pictures}", f"--batches={picture_batches}"])
        late = int(count * 0.9) // _BATCH
        rows = [
            ("digitfleet", f"{count:,} records", ["digitfleet", str(large), f"--batches={batches}"]),
            ("digitfleet", f"{count // _PART:,} records", ["digitfleet", str(small), f"--batches={batches}"]),
            (f"digitfleet, from step {late:,}", f"{count:,} records",
             ["digitfleet", str(large), f"--batches={batches}", f"--first_step={late}"]),
            ("`TFRecordDataset`", f"{count:,} records", ["tfrecords", str(large), f"--batches={batches}"]),
            (f"`TFRecordDataset`, from step {late:,}", f"{count:,} records",
             ["tfrecords", str(large), f"--batches={batches}", f"--first_step={late}"]),
            ("`image_dataset_from_directory`", f"{picture_batches * _BATCH:,} PNG files",
             ["directory", str(pictures), f"--batches={picture_batches - 10}"]),
        ]  # fmt: skip
        figures: dict[str, Any] = {"written_per_second": count / seconds}
        cells = []
        for name, what, arguments in progress(rows):
            found = run_json([_READER, *arguments])
            figures[f"{name}, {what}"] = found
            cells.append([name, what, f"{found['images_per_second']:,.0f}", f"{found['first_batch_seconds']:.2f}",
                          f"{found['peak_rss_mib']:,.0f}"])  # fmt: skip
        figures["streamed"] = _train(folder / "streamed", large, "--epochs=1")
        figures["memory"] = _train(folder / "memory", None)
    streamed, memory = figures["streamed"], figures["memory"]
    text = (
        f"{count:,} synthetic digits (elastic and affine deformations of MNIST's) were made and written in {seconds:,.0f} s: "
        f"{count / seconds:,.0f} a second. Reading them, in batches of {_BATCH} "
        "(`image_dataset_from_directory` gives float32, the others uint8):\n\n"
        + table(["reader", "of", "images/s", "seconds to the first batch", "peak RSS, MiB"], cells)
        + f"\n\nOne epoch of them, streamed, with `--preset fast`: {streamed['steps']:,} steps at "
        f"{streamed['images_per_second']:,.0f} images/s; MNIST from memory: {memory['images_per_second']:,.0f}. Test accuracy "
        f"on MNIST's own test set {streamed['test_accuracy']:.2%}; after {memory['epochs']:.1f} epochs of MNIST "
        f"{memory['test_accuracy']:.2%}. The job that streamed had "
        f"at most {streamed['peak_rss_mib']:,.0f} MiB, the other {memory['peak_rss_mib']:,.0f}."
    )
    commands = [
        as_typed(command),
        as_typed([_READER, "digitfleet", "large", f"--batches={batches}"]),
        as_typed(["trainer.task", "--preset=fast", "--data_dir=large", "--input_pipeline=stream", "--epochs=1"]),
    ]
    return Section(title="Data larger than memory", text=text, figures=figures, commands=commands)
