"""Measures digitfleet, beside its peers where there are any: writes a report (Markdown), its figures (JSON) and a chart (PNG).

    python -m benchmarks.run --output results
    python -m benchmarks.run --output results --quick                     # a short turn or two of everything
    python -m benchmarks.run --output results --only throughput,accuracy

Each program is a process of its own, on CPUs. What is compared in throughput, time to accuracy and scaling takes turns, so that a
machine whose speed drifts does not decide. Frameworks that are not installed are named as such: pip install -e '.[bench]'.
"""

import argparse
import datetime
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks import accuracy, cost_model, costs, data, report, scaling, throughput

SECTIONS: dict[str, Callable[[bool, throughput.Progress], report.Section]] = {
    "throughput": throughput.measure,
    "accuracy": accuracy.measure,
    "costs": costs.measure,
    "data": data.measure,
    "scaling": scaling.measure,
    "cost_model": cost_model.measure,
}


def _write(folder: Path, sections: dict[str, report.Section], heading: str) -> str:
    """Writes report.md, report.json and the charts; returns the report."""
    parts = [heading]
    for section in sections.values():
        commands = "\n".join(f"    {command}" for command in dict.fromkeys(section.commands))
        parts.append(f"## {section.title}\n\n{section.text}\n\n<details><summary>Commands</summary>\n\n{commands}\n\n</details>")
        for name, content in section.charts.items():
            (folder / name).write_bytes(content)
    text = "\n\n".join(parts) + "\n"
    figures = {name: {**section.figures, "commands": section.commands} for name, section in sections.items()}
    (folder / "report.json").write_text(json.dumps({"machine": heading, **figures}, indent=1) + "\n")
    (folder / "report.md").write_text(text)
    return text


def main() -> None:
    """Measures and writes; what is done is written after each section, so that an interrupted run is not lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for report.md, report.json and scaling.png")
    parser.add_argument("--quick", action="store_true", help="a short turn or two of everything: under an hour, and noisy")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas; default: %(default)s")
    options = parser.parse_args()
    chosen = list(dict.fromkeys(options.only.split(",")))
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"--only={unknown[0]}: expected some of {', '.join(SECTIONS)}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        # Before an hour is spent on what could not be written then.
        with tempfile.TemporaryFile(dir=options.output):
            pass
    except OSError as error:
        parser.error(f"--output={options.output}: cannot be written: {error.strerror}")
    if (options.output / "report.json").exists():
        parser.error(f"--output={options.output}: holds a report already: give another folder")
    # What is measured ends, and its temporary folder goes, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    heading = f"{report.machine()}; {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    sections: dict[str, report.Section] = {}
    text = ""
    for name in chosen:

        def progress(items: list[Any], name: str = name) -> Iterable[Any]:
            return track(items, description=name)

        try:
            sections[name] = SECTIONS[name](options.quick, progress)
        except report.ProgramError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        text = _write(options.output, sections, heading)
    print(text)
    if len(sections) < len(chosen):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
