"""The benchmarks: what they count, how they read what programs print, what they write, and what they tell of failures."""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import accuracy, cost_model, network, report, run, scaling, throughput
from benchmarks.peers import session
from trainer.console import ConsoleWriter, print_result
from trainer.models import inference_model
from trainer.presets import from_preset


def test_operations_are_those_of_the_networks_layers() -> None:
    model = inference_model(from_preset("article", {}), (28, 28, 1), 10)
    forward, first = 0, None
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            shape = layer.output.shape
            positions = shape[1] * shape[2] if len(shape) == 4 else 1
            multiplications = positions * layer.kernel.shape.num_elements()
            first = first or multiplications
            forward += multiplications
    assert throughput.operations_per_image() == 2 * (3 * forward - first)


def test_table_compares_turn_by_turn_and_names_what_is_missing() -> None:
    plan = [
        throughput.Measurement("digitfleet", "float32", ["ours"], rates=[110, 60, 120, 110, 100, 120]),
        throughput.Measurement("slow", "float32", ["a"], rates=[50, 50, 50], ours=[110, 100, 120]),
        # Half as fast a machine in the second turn: turn by turn we are 1.1, 1.2 and 1.2 times as fast; our median is 1.1 times.
        throughput.Measurement("quick", "float32", ["b"], rates=[100, 50, 100], ours=[110, 60, 120]),
        throughput.Measurement("absent", "float32", ["c"], error="not installed"),
    ]
    lines = throughput._table(plan, "float32", 100 * throughput.operations_per_image() * 2).splitlines()[2:]
    assert lines[0] == "| digitfleet | 110 (60 to 120) |  | 55% | 0 |"
    assert lines[1].startswith("| quick | 100 (50 to 100) | 1.20 |")
    assert [line.split("|")[1].strip() for line in lines] == ["digitfleet", "quick", "slow", "absent"]
    assert "not installed" in lines[3]


PROGRAM = """
import os
from benchmarks.peers import session

epochs = []

def train_epoch():
    open("LOG", "a").write(f"NAME{len(epochs)} ")
    if "NAME" == "bad" and epochs:
        raise SystemExit("it broke")
    epochs.append(os.getpid())
    print("a word of its own")
    return -len(epochs)

open("LOG.pid", "a").write(f"{os.getpid()} ")
session.run(session.parse(""), {}, train_epoch)
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[throughput.Measurement]:
    """Two that write what they do into `log`, and one that breaks in its second epoch."""
    names = ("one", "two", "bad")
    for name in names:
        (tmp_path / f"{name}.py").write_text(PROGRAM.replace("NAME", name).replace("LOG", str(tmp_path / "log")))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return [throughput.Measurement(name, "float32", [name, "--epochs=4"]) for name in names]


def test_two_programs_take_turns(programs: list[throughput.Measurement], tmp_path: Path) -> None:
    one, two, _ = programs
    throughput._compare(one, two, 3)
    assert (tmp_path / "log").read_text().split() == ["one0", "two0", "one1", "two1", "two2", "one2", "one3", "two3"]
    assert (len(two.rates), len(two.ours), one.rates) == (3, 3, two.ours)
    assert two.peak_rss_mib > 1
    throughput._compare(one, programs[2], 3)
    assert len(one.rates) == 6


def test_a_program_that_breaks_is_told_in_its_last_line(programs: list[throughput.Measurement]) -> None:
    one, _, bad = programs
    throughput._compare(one, bad, 3)
    assert (one.error, bad.error) == ("", "bad ended with 1: it broke")
    assert (len(one.rates), bad.rates) == (3, [])
    lines = throughput._table([one, bad], "float32", 1e12).splitlines()
    assert "it broke" in lines[-1]


def test_round_in_which_digitfleet_itself_breaks_says_so_in_the_peers_row(programs: list[throughput.Measurement]) -> None:
    one, two, bad = programs
    bad.rates = [100.0]
    throughput._compare(bad, two, 3)
    assert (bad.error, bad.rates) == ("", [100.0])
    assert two.error == "digitfleet failed beside it: bad ended with 1: it broke"
    assert "digitfleet failed" in throughput._table([one, two], "float32", 1e12).splitlines()[-1]


def test_reason_is_what_the_program_said_and_not_what_tensorflow_logs() -> None:
    logged = "I0000 00:00:1.2 3 cudart_stub.cc:31] Could not find cuda drivers on your machine, GPU will not be used.\n"
    noise = f"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n{logged}"
    assert report.reason_of(["x", "--y"], 1, f"ValueError: no\n{noise}") == "x ended with 1: ValueError: no"
    assert report.reason_of(["x"], -9, f"ValueError: no\n{noise}") == "x ended by SIGKILL"
    assert report.reason_of(["x"], 3, noise) == "x ended with 3"


@pytest.mark.parametrize("moment", ["start", "turn", "end"])
def test_no_program_is_left_behind(
    moment: str, programs: list[throughput.Measurement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(program: throughput._Program) -> None:
        if moment == "start":
            program._wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput._Program, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        throughput._compare(*programs[:2], 3)
    started = [int(pid) for pid in (tmp_path / "log.pid").read_text().split()]
    assert started
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


SECTION = """
import os, tempfile
from benchmarks import report, run

def measure(quick, progress):
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
        print(folder, flush=True)
        report.RUN(["sleeper"])

run.SECTIONS = {"throughput": measure}
run.main()
"""


@pytest.mark.parametrize("way", ["run_program", "run_timed"])
def test_sigterm_leaves_no_program_and_no_folder(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text("import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    command = [sys.executable, "-c", SECTION.replace("RUN", way)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        folder = Path(next(line for line in process.stdout if line.startswith("/")).strip())
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(30) == 143
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()
    assert not folder.exists()


@pytest.mark.usefixtures("programs")
def test_a_program_ends_when_nobody_gives_it_turns() -> None:
    command = [sys.executable, "-m", "one", "--turns"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "nobody gives turns any more\n"


def test_the_wait_for_a_turn_is_not_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    now = 0.0

    class Waiting:
        def readline(self) -> str:
            nonlocal now
            now += 100
            return "\n"

    monkeypatch.setattr(session, "time", types.SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(sys, "stdin", Waiting())
    clock = session.Clock(argparse.Namespace(turns=True, steps=10, batch=20), {})
    for seconds, loss in ((5, 3.0), (2, 2.0), (4, 1.0)):
        now += seconds
        clock.epoch(loss)
    clock.report()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["first_epoch_seconds"], found["images_per_second"]) == (5, [100, 50])


def test_nothing_is_measured_in_a_precision_without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(ours: throughput.Measurement, peer: throughput.Measurement, _: int) -> None:
        ours.rates = peer.rates = peer.ours = [100.0, 100.0]

    def limit(arguments: list[str]) -> dict[str, object]:
        return {"operations_per_second": 1e12, "has_instructions": "bfloat16" not in arguments[1]}

    monkeypatch.setattr(throughput, "_compare", compare)
    monkeypatch.setattr(throughput, "run_json", limit)
    section = throughput.measure(True, lambda items: items)
    assert {row["precision"] for row in section.figures["rows"]} == {"float32"}
    assert section.text.endswith("Nothing in bfloat16: this machine has no instructions for it.")


@pytest.mark.e2e
def test_a_program_that_does_not_start_is_told_in_its_last_line(programs: list[throughput.Measurement]) -> None:
    peer = throughput.Measurement("x", "float32", ["benchmarks.peers.keras_fit", "--variant=unknown"])
    throughput._compare(programs[0], peer, 3)
    assert "invalid choice" in peer.error
    assert not peer.rates


@pytest.mark.e2e
@pytest.mark.parametrize("program", ["keras_fit", "digitfleet"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_programs_really_train(program: str, precision: str) -> None:
    command = [f"benchmarks.peers.{program}", f"--precision={precision}", "--steps=8", "--epochs=3", "--batch=64"]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert min(found["images_per_second"]) > 0
    assert found["losses"][-1] < found["losses"][0]
    assert found["peak_rss_mib"] > 100


@pytest.mark.e2e
def test_digitfleet_takes_turns_as_a_whole_job() -> None:
    arguments = ["benchmarks.peers.digitfleet", "--steps=8", "--epochs=3", "--batch=64"]
    first, second = (throughput.Measurement(name, "float32", arguments) for name in ("a", "b"))
    throughput._compare(first, second, 2)
    assert (first.error, second.error) == ("", "")
    assert (len(first.rates), len(second.rates)) == (2, 2)


def test_what_a_job_prints_is_understood(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = {"test_accuracy": 0.9912, "test_examples": 10_000, "validation_accuracy": None, "steps": 469, "epochs": 2,
              "train_seconds": 12.3, "images_per_second": 9876.5, "num_replicas": 1, "strategy": "x"}  # fmt: skip
    print_result(result, "run[/1]")
    assert "model          removed;" in capsys.readouterr().out
    Path("run[/1]/export").mkdir(parents=True)
    Path("run[/1]/model.keras").touch()
    writer = ConsoleWriter(469, 0)
    writer.write({"step": 469, "epoch": 2.0, "split": "test", "loss": 0.03, "accuracy": 0.9912})
    print_result(result, "run[/1]")
    out = capsys.readouterr().out
    assert "run[/1]/export, run[/1]/model.keras" in out
    assert not [line for line in out.splitlines() if line != line.rstrip()], "blanks at the ends of lines"
    lines = [(0.5, line) for line in out.splitlines()]
    ((_, test),) = accuracy._find(accuracy._OURS, lines)
    ((_, trained),) = accuracy._find(accuracy._TRAINED, lines)
    assert (float(test[1]), float(trained[1])) == (99.12, 12.3)


@pytest.mark.e2e
def test_recipe_is_timed_to_its_target_without_the_looks_at_the_test_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of all of MNIST in Keras."""
    monkeypatch.setattr(accuracy, "TARGET", 0.5)
    found = accuracy.run_recipe(0)
    assert found.accuracy >= 0.5
    assert 1 < found.first < found.seconds


def test_ratio_to_a_recipe_that_was_stopped_on_the_way_is_a_lower_bound() -> None:
    fast = [accuracy.Run(seed, 20, 0.992, 13) for seed in range(3)]
    recipe = [accuracy.Run(0, 200, 0.991, 19), accuracy.Run(1, 300, 0.989, 19), accuracy.Run(2, 400, 0.989, 19)]
    section = accuracy.describe({"fast": fast, "recipe": recipe})
    assert "at least 15.0 times as soon (median of 3 seeds; in 2 of them the recipe was stopped on the way)" in section.text
    assert section.figures["ratios"] == [10, 15, 20]
    assert "there 10.0 times as soon (median of 1 seeds)" in accuracy.describe({"fast": fast[:1], "recipe": recipe[:1]}).text


def test_cost_model_finds_what_the_times_were_made_of() -> None:
    truth = cost_model.Model(fixed=2.0, per_image=0.3, latency=0.6, handling=1e-6, overhead=1.1)
    compute = [(batch, truth.compute(batch)) for batch in (32, 64, 128)]
    exchanges = [(mbits, size, truth.exchange([size], 2, mbits)) for mbits in (100, 1000) for size in (256, 1_000_000, 1_700_000)]
    found = cost_model.fit(compute, exchanges)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(truth), rel=1e-6)
    assert found.step(128, [256, 1_700_000], 2, 300) == pytest.approx(truth.step(128, [256, 1_700_000], 2, 300), rel=1e-6)
    # Ideal: both all-reduces' latency, and 2 (n - 1) / n of the bytes.
    assert truth.exchange([1000, 1000], 4, 1000) == pytest.approx(2 * (0.6 + 1500 * (1e-6 + 1.1 * 8e-6)))


def test_larger_batches_pay_on_more_gpus() -> None:
    gpus, sizes = cost_model.Gpus(), [256, 1_700_000]
    for count in (8, 1024):
        batch = gpus.batch_for(0.9, count, sizes)
        assert gpus.efficiency(count, batch, sizes) >= 0.9 > gpus.efficiency(count, batch // 2, sizes)
    assert gpus.efficiency(8, 256, sizes) > gpus.efficiency(1024, 256, sizes)
    assert cost_model.chart(gpus, sizes).startswith(b"\x89PNG")


def test_scaling_is_told_against_as_many_cores_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "CORES", [0, 1])
    rows = [{"bytes": 1_000_000, "milliseconds": 2.0}, {"bytes": 500_000, "milliseconds": 0.5}]
    measured = [
        scaling.Point("workers", 1, 256, step_ms=[80.0]),
        scaling.Point("workers", 1, 128, step_ms=[40.0]),
        scaling.Point("workers", 2, 256, step_ms=[50.0, 49.0, 60.0], collectives=rows),
        scaling.Point("workers", 4, 512, step_ms=[100.0], collectives=rows),
    ]
    found = [(row[0], row[1], row[6], row[7], row[9]) for row in scaling.rows_of(measured)]
    assert found == [
        ("strong", "1 workers", "100%", "", ""),
        ("strong", "2 workers", "80%", "1.50", "2.5"),
        ("weak", "1 workers", "100%", "", ""),
        ("weak", "2 workers", "80%", "1.50", "2.5"),
        ("weak", "4 workers", "80%", "2.25", "2.5"),
    ]


def test_a_section_that_fails_is_told_and_the_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def section(name: str) -> report.Section:
        return report.Section(title=name, text="| a |", figures={"x": 1}, commands=["python -m this"], charts={"c.png": b"png"})

    def fail(quick: bool, progress: throughput.Progress) -> report.Section:
        raise report.ProgramError("no")

    monkeypatch.setattr(run, "SECTIONS", {"bad": fail, "good": lambda quick, progress: section("Good")})
    monkeypatch.setattr(sys, "argv", ["run", "--quick", f"--output={tmp_path}/new"])
    with pytest.raises(SystemExit, match="1"):
        run.main()
    assert "bad: no" in capsys.readouterr().err
    text = (tmp_path / "new" / "report.md").read_text()
    assert "tensorflow" in text.splitlines()[0]
    assert "## Good\n\n| a |" in text
    assert "    python -m this" in text
    assert json.loads((tmp_path / "new" / "report.json").read_text())["good"] == {"x": 1, "commands": ["python -m this"]}
    assert (tmp_path / "new" / "c.png").read_bytes() == b"png"


def test_report_is_not_replaced_and_what_cannot_be_written_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "report.json").write_text("{}")
    for folder, words in ((tmp_path, "holds a report already"), (tmp_path / "report.json", "cannot be written: File exists")):
        monkeypatch.setattr(sys, "argv", ["run", f"--output={folder}"])
        with pytest.raises(SystemExit, match="2"):
            run.main()
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--steps=235"], ["--steps=0"], ["--epochs=1"]])
def test_epoch_that_cannot_be_timed_is_refused(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["peer", *flags])
    with pytest.raises(SystemExit, match="2"):
        session.parse("")
    assert "peer: error: --" in capsys.readouterr().err


def test_network_that_is_not_allowed_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ip").write_text("#!/bin/sh\necho 'mount --make-shared /run/netns failed: Operation not permitted' >&2; exit 1\n")
    (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(report.ProgramError, match=r"ip netns add df.*hub: mount .* not permitted"), network.machines(2):
        pass


def test_unknown_section_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--only=speed"])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert "--only=speed: expected some of throughput" in capsys.readouterr().err


@pytest.mark.e2e
def test_worker_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(report.ProgramError, match="global_batch_size=0"):
        scaling.run_pinned(["--global_batch_size=0"], 2)
    # Should it wait for all, it fails after this, not after ten minutes.
    monkeypatch.setattr(scaling, "_TIMEOUT_SECS", 20)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    failed = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    scaling._wait([sleeper, failed])
    assert sleeper.poll() is None
    scaling._end(sleeper)
    assert sleeper.returncode == -9
