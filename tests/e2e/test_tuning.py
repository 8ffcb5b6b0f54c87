"""Searches whose processes, and trials, are really killed: they go on, and end with as many trials as they were to have."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, arguments, children_of
from optuna.trial import TrialState

from trainer import dataset, tune
from trainer.search import Search

pytestmark = pytest.mark.e2e

SPACE = "learning_rate: [0.01, 0.003, 0.00000001]\n"


class Tuning:
    """A search on the tiny data, and the processes that do it."""

    def __init__(self, folder: Path, data: Path, epochs: int, num_trials: int, *own: str) -> None:
        self.study, self.space, self.num_trials = folder / "study", folder / "space.yaml", num_trials
        self.space.write_text(SPACE)
        options = {name: value for name, value in TINY.items() if name != "report"}
        self.task = arguments({**options, "data_dir": data, "epochs": epochs})
        self.own = [f"--study_dir={self.study}", f"--num_trials={num_trials}", f"--space={self.space}", *own]
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *own: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "trainer.tune", *self.own, *own, "--", *self.task]
        self.processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return self.processes[-1]

    def finish(self, process: subprocess.Popen[str]) -> str:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def search(self) -> Search:
        config, searched = tune.task_of(self.task, self.space)
        self.study.mkdir(exist_ok=True)
        return Search(self.study, searched, config, dataset.load_for(config).sha256, self.num_trials, "none")

    def result(self) -> dict:
        return json.loads((self.study / "result.json").read_text())

    def folder(self, number: int) -> Path:
        return self.study / "trials" / f"{number:04d}"

    def has_checkpoint(self, number: int) -> bool:
        return any((self.folder(number) / "checkpoints").glob("step-*"))

    def trials_running(self) -> list[int]:
        """The processes that train in this search, whoever has started them."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().decode().split("\0")
            except OSError:
                continue
            if "trainer.task" in line and any(word.startswith(f"--model_dir={self.study}") for word in line):
                found.append(int(path.parent.name))
        return found


@pytest.fixture
def tuning(tmp_path: Path, tiny_data: Path):
    made: list[Tuning] = []

    def make(*given) -> Tuning:
        made.append(Tuning(tmp_path, tiny_data, *given))
        return made[-1]

    yield make
    for one in made:
        for process in one.processes:
            process.kill()
            process.wait()
            process.stdout.close()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None, what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"ended before {what}: {process.stdout.read()}"
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.02)


def test_search_that_is_killed_goes_on_and_ends_with_its_trials(tuning) -> None:
    tuning = tuning(30, 3, "--parallel=2", "--pruner=none")
    first = tuning.start()
    wait_for(lambda: tuning.has_checkpoint(0) and tuning.has_checkpoint(1), first, "checkpoints")
    assert len(tuning.trials_running()) == 2
    first.kill()
    first.wait()
    wait_for(lambda: tuning.trials_running() == [], None, "end of the trials", 10)
    assert not (tuning.study / "result.json").exists()

    output = tuning.finish(tuning.start())
    trials = tuning.search().trials()
    assert [found.state for found in trials] == [TrialState.COMPLETE] * 3
    assert [found.user_attrs["restarts"] for found in trials] == [1, 1, 0]
    assert all(" going on from step " in log(tuning, number) for number in (0, 1))
    assert tuning.result()["num_finished"] == 3
    assert len(re.findall(r"^trial ", output, re.MULTILINE)) == 3


def log(tuning: Tuning, number: int) -> str:
    path = tuning.folder(number) / "trial.log"
    return path.read_text() if path.exists() else ""


def test_two_processes_share_a_search_and_the_second_takes_over_what_the_first_leaves(tuning) -> None:
    tuning = tuning(16, 3, "--pruner=none")
    first, second = tuning.start(), tuning.start()
    wait_for(lambda: len(tuning.trials_running()) == 2, first, "a trial of each")
    (trial,) = children_of(first.pid)
    line = children_of(first.pid)[trial]
    number = int(re.search(r"--model_dir=\S*/trials/(\d+)", line).group(1))
    wait_for(lambda: tuning.has_checkpoint(number), first, "checkpoint")
    first.kill()
    third = tuning.start()
    outputs = [tuning.finish(process) for process in (second, third)]
    first.wait()
    trials = tuning.search().trials()
    assert [found.state for found in trials] == [TrialState.COMPLETE] * 3
    assert trials[number].user_attrs["restarts"] == 1
    lines = [re.findall(r"^trial +(\d+)  ", output, re.MULTILINE) for output in outputs]
    assert sorted(lines[0] + lines[1]) == ["0", "1", "2"]
    ends = [[line for line in output.splitlines() if not re.match("(trainer.tune: )?trial ", line)] for output in outputs]
    assert ends[0] == ends[1]


def test_trial_goes_on_after_its_own_end_and_the_searchs_and_one_that_is_worse_ends_early(tuning, tmp_path: Path) -> None:
    tuning = tuning(16, 2, "--pruner=halving")
    search = tuning.search()
    search.study.enqueue_trial({"learning_rate": 0.00000001})
    process = tuning.start()
    wait_for(lambda: tuning.has_checkpoint(0), process, "checkpoint")
    (trial,) = children_of(process.pid)
    os.kill(trial, signal.SIGKILL)
    wait_for(lambda: " going on from step " in log(tuning, 0), process, "second attempt")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert "trial    0  ended by SIGKILL: started again" in output
    assert re.search(r"SIGTERM: 0 of 2 trials are finished; go on with: python -m trainer\.tune --study_dir=", output)
    assert tuning.trials_running() == []

    output = tuning.finish(tuning.start())
    assert re.search(r"^trial +1 +[\d.]+%  pruned ", output, re.MULTILINE)
    good, bad = search.trials()
    assert (good.state, good.user_attrs["restarts"], len(good.intermediate_values)) == (TrialState.COMPLETE, 2, 16)
    assert bad.state == TrialState.PRUNED
    assert len(bad.intermediate_values) < 16
    assert "SIGTERM: saving the state" in log(tuning, 1)
    assert not (tuning.folder(1) / "checkpoints").exists()
    result = tuning.result()
    assert (result["best_trial"], result["num_finished"], result["num_pruned"]) == (0, 2, 1)

    best = tuning.study / "best.yaml"
    data = next(word for word in tuning.task if word.startswith("--data_dir"))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "trainer.task", f"--preset={best}", data, f"--model_dir={run}"]
    subprocess.run([*command, "--max_steps=20", "--noreport"], cwd=ROOT, check=True, capture_output=True)
    trained = json.loads((run / "result.json").read_text())
    assert (trained["preset"], trained["steps"], trained["global_batch_size"]) == (str(best), 20, 32)
