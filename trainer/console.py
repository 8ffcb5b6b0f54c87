"""What a person sees: a progress bar on a terminal, plain lines at an interval elsewhere, and the result as a table.

It is there for convenience: where it cannot be written, as on a full disk or when the reader has gone, work goes on.
"""

import io
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_log = logging.getLogger("digitfleet")
_LINE_EVERY_SECS = 10.0


def say(line: str) -> None:
    """Prints a line; if nobody can read it, says so once and prints no more."""
    try:
        # In one piece: threads print, too.
        print(f"{line}\n", end="", flush=True)
    except OSError as error:
        # Python would try again at its end.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        _log.warning("stdout cannot be written (%s): nothing more is shown there", error.strerror)


def say_table(table: Table) -> None:
    """Prints a table as `say` does."""
    on_terminal, text = sys.stdout.isatty(), io.StringIO()
    # Wide where there is no terminal: a path that is broken in two cannot be copied from a log.
    console = RichConsole(file=text, force_terminal=on_terminal, width=None if on_terminal else 200)
    console.print(table, soft_wrap=True)
    # rich fills a column with blanks, the last one of a line, too.
    say("\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n")))


class ConsoleWriter:
    """A `metrics.Writer` for people. Writes to stdout."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._console = RichConsole(file=sys.stdout)
        self._total, self._first = total_steps, first_step
        self._started = time.monotonic()
        self._last_line = -float("inf")
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("compiling", total=total_steps, completed=first_step)
            self._progress.start()

    def write(self, record: dict[str, Any]) -> None:
        """Moves the bar, or prints a line."""
        line = f"step {record['step']:6d}  epoch {record['epoch']:5.2f}  {record['split']:10s}  {_scores(record)}"
        if record["split"] != "train":
            self._print(line)
            return
        # The call that compiles says nothing about the speed of later ones.
        compiling = not record.get("images_per_second")
        if compiling:
            self._started, self._first = time.monotonic(), record["step"]
        speed = "compiling" if compiling else f"{record['images_per_second']:.0f} images/s"
        if self._progress:
            self._progress.update(self._task, completed=record["step"], description=f"{_scores(record)}  {speed}")
        elif time.monotonic() - self._last_line >= _LINE_EVERY_SECS or record["step"] == self._total:
            self._last_line = time.monotonic()
            left = "" if compiling else f"  {self._seconds_left(record['step']):.0f} s left"
            self._print(f"{line}  {speed}{left}")

    def close(self) -> None:
        """Takes the bar away."""
        if self._progress:
            self._progress.stop()

    def _seconds_left(self, step: int) -> float:
        done = max(step - self._first, 1)
        return (time.monotonic() - self._started) / done * (self._total - step)

    def _print(self, line: str) -> None:
        # Not through rich where there is no terminal: it would break lines at 80 columns.
        if self._progress:
            self._console.print(line, highlight=False)
        else:
            say(line)


def _scores(record: dict[str, Any]) -> str:
    return f"loss {record['loss']:.4f}  accuracy {record['accuracy']:.2%}{views_of(record)}"


def views_of(result: Mapping[str, Any]) -> str:
    """What to add to accuracies that are not of the network alone; results of versions before always are."""
    views = result.get("test_time_augment", "none")
    return "" if views == "none" else f" (--test_time_augment={views})"


def print_result(result: dict[str, Any], model_dir: str) -> None:
    """The short table at the end."""
    table = Table(show_header=False, box=None, pad_edge=False)
    if result["test_accuracy"] is not None:
        accuracy = f"{result['test_accuracy']:.2%} of {result['test_examples']} examples{views_of(result)}"
        table.add_row("test accuracy", f"[bold green]{accuracy}[/]")
    if result["validation_accuracy"] is not None:
        table.add_row("validation accuracy", f"{result['validation_accuracy']:.2%}{views_of(result)}")
    table.add_row("training", f"{result['steps']} steps, {result['epochs']:.2f} epochs, {result['train_seconds']:.1f} s")
    table.add_row("speed", f"{result['images_per_second']:.0f} images/s on {result['num_replicas']} x {result['strategy']}")
    found = [path for path in (f"{model_dir}/export", f"{model_dir}/model.keras") if Path(path).exists()]
    table.add_row("model", escape(", ".join(found) or "removed; without result.json, the same command exports it again"))
    if (Path(model_dir) / "report.html").exists():
        table.add_row("report", escape(f"{model_dir}/report.html"))
    say_table(table)
