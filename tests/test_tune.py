"""The search of hyperparameters: mistakes are told before anything starts, and trials end in every way that they can.

Most tests have a stand-in for the trial's process: what it does follows from its learning rate. The last one trains.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import ROOT, TINY, arguments, children_of
from optuna.trial import TrialState

from trainer import cluster, search_report, space, trial, tune, winner
from trainer.config import Config
from trainer.errors import JobError, RequestError
from trainer.presets import from_preset
from trainer.search import Search
from trainer.signals import StopRequest

FLAGS = ["--preset=fast", "--validation_fraction=0.2", "--epochs=3", "--grace_period=5"]
# An accuracy in each of three epochs: 1 - learning rate, more or less. Rates above 1 are ways to end.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
from typing import Any

flags = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
folder, rate = Path(flags["model_dir"]), float(flags["learning_rate"])
before = json.loads((folder / "config.json").read_text())["starts"] if (folder / "config.json").exists() else []
start = {}

def write_config():
    (folder / "config.json").write_text(json.dumps({"restarts": len(before), "starts": [*before, start]}))

write_config()
(folder / "checkpoints").mkdir(exist_ok=True)
if rate == 2:
    start.update(error="DivergedError", ended="the loss is nan at step 7")
    write_config()
    sys.exit(1)
if rate == 3:
    print("trainer.task: no such batch")
    sys.exit(2)
if rate == 4 and not before or rate == 5:
    os.kill(os.getpid(), signal.SIGKILL)
with open(folder / "metrics.jsonl", "w") as file:
    for epoch in (1, 2, 3):
        accuracy = (1 - rate) * (1 - 0.1 / epoch) if rate < 1 else 0.5
        print(json.dumps({"split": "train", "accuracy": 0.1}), file=file)
        print(json.dumps({"split": "validation", "accuracy": accuracy}), file=file, flush=True)
        # Nothing but a signal ends it.
        while epoch == 1 and rate in (0.9, 6):
            time.sleep(0.05)
(folder / "result.json").write_text(json.dumps({"validation_accuracy": accuracy}))
"""
CHOICES = [0.01, 0.1, 0.2, 0.5, 0.9, 2.0, 3.0, 4.0, 5.0, 6.0]


def space_file(folder: Path, text: str) -> Path:
    (folder / "space.yaml").write_text(text)
    return folder / "space.yaml"


@pytest.fixture
def search_in(tmp_path: Path):
    """A search in `study`; its first trials have the learning rates given."""

    def make(*rates: float, num_trials: int = 0, pruner: str = "none", flags: list[str] | None = None) -> Search:
        config, searched = tune.task_of(flags or FLAGS, space_file(tmp_path, f"learning_rate: {CHOICES}"))
        (tmp_path / "study").mkdir(exist_ok=True)
        search = Search(tmp_path / "study", searched, config, "sha", num_trials or len(rates), pruner)
        if rates:
            # The default is the first: as if it had been done, badly.
            first = search.study.ask()
            assert space.draw(first, searched) == {"learning_rate": 0.01}
            search.study.tell(first, 0.0)
            search.num_trials += 1
            for rate in rates:
                search.study.enqueue_trial({"learning_rate": rate})
        return search

    return make


@pytest.fixture
def runner(tmp_path: Path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def make(search: Search, stop: StopRequest | None = None, max_retries: int = 2) -> tune.Runner:
        program = (sys.executable, str(tmp_path / "stand_in.py"))
        return tune.Runner(search, FLAGS, max_retries, stop or StopRequest(), program)

    return make


@pytest.mark.parametrize("given", [["--parallel=0"], ["--num_trials=0"], ["--pruner=some"], ["--", "--dropout_rate=0.2"], []])
def test_process_with_wrong_command_line_exits_2_with_one_line_and_leaves_nothing(given: list[str], tmp_path: Path) -> None:
    folder = [f"--study_dir={tmp_path / 'study'}"] if given else []
    command = [sys.executable, "-m", "trainer.tune", *folder, *given]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert not (tmp_path / "study").exists()


def test_line_that_is_being_written_is_left_for_the_next_look(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert trial.validation_accuracies(path) == []
    lines = [json.dumps({"split": split, "accuracy": accuracy}) for split, accuracy in (("train", 0.1), ("validation", 0.2))]
    path.write_text("\n".join([*lines, '{"split": "validation", "accu']))
    assert trial.validation_accuracies(path) == [0.2]


def test_trial_trains_alone_and_has_its_share_of_the_gpus(tmp_path: Path) -> None:
    job = {"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}', "SLURM_PROCID": "1"}
    environment = cluster.alone(0, 2, job, tmp_path)
    assert cluster.from_environment(environment).workers == ()
    assert "CUDA_VISIBLE_DEVICES" not in environment
    for number in range(3):
        (tmp_path / f"nvidia{number}").touch()
    shares = [cluster.alone(place, 2, job, tmp_path)["CUDA_VISIBLE_DEVICES"] for place in range(2)]
    # As many each, so that no result depends on the place.
    assert shares == ["0", "1"]
    assert [cluster.alone(place, 4, job, tmp_path)["CUDA_VISIBLE_DEVICES"] for place in range(4)] == ["0", "1", "2", "0"]


def test_trials_end_in_every_way_and_only_the_dead_are_repeated(search_in, runner, capsys) -> None:
    # The order of the trials: good, pruned (it would never end), diverged, refused, killed once.
    search = search_in(0.1, 0.9, 2.0, 3.0, 4.0, num_trials=4, pruner="halving")
    runner(search).run(parallel=1)
    ends = {found.params["learning_rate"]: found for found in search.trials()[1:]}
    states = {rate: (found.state.name, found.user_attrs["ended"]) for rate, found in ends.items()}
    assert states == {
        0.1: ("COMPLETE", "complete"), 0.9: ("PRUNED", "pruned"), 2.0: ("PRUNED", "diverged"), 3.0: ("FAIL", "failed"),
        4.0: ("COMPLETE", "complete"),
    }  # fmt: skip
    assert [found.user_attrs["restarts"] for found in ends.values()] == [0, 0, 0, 0, 1]
    assert ends[0.1].value == pytest.approx(0.9 * (1 - 0.1 / 3))
    assert len(ends[0.1].intermediate_values) == 3
    assert len(ends[0.9].intermediate_values) == 1
    assert (search.folder_of(1) / "checkpoints").exists()
    assert not (search.folder_of(2) / "checkpoints").exists()
    assert search.best().number == 1
    out = capsys.readouterr().out
    assert "trial    2     9.00%  pruned    best 87.00% (trial 1)  learning_rate=0.9" in out
    assert "diverged" in out
    assert "the loss is nan at step 7" in out
    assert "refused" in out
    assert "no such batch" in out
    assert "ended by SIGKILL: started again" in out
    page = (search.folder / "report.html").read_text()
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>|<!DOCTYPE[^>]*>', "", page, flags=re.DOTALL)
    assert all(words in page for words in ("<td>pruned</td>", "<td>diverged</td>", "<td>failed</td>", "no such batch", "<svg"))


def test_trial_that_dies_again_and_again_is_given_up_and_then_the_search(search_in, runner) -> None:
    search = search_in(5.0, 5.0, 5.0, 5.0)
    # What an earlier process has seen fail may have been mended since.
    search.study.tell(search.study.ask(), state=TrialState.FAIL)
    with pytest.raises(JobError, match=r"3 trials have failed, .*ended by SIGKILL; see .*trial\.log"):
        runner(search_in(num_trials=10), max_retries=1).run(parallel=1)
    failed = search.study.get_trials(states=(TrialState.FAIL,))
    assert [found.user_attrs.get("restarts") for found in failed] == [None, 1, 1, 1]


def test_search_that_is_stopped_ends_its_trials_and_goes_on_with_them(search_in, runner) -> None:
    stop = StopRequest()
    search = search_in(6.0, 6.0)
    thread = threading.Thread(target=runner(search, stop).run, args=(2,))
    thread.start()
    while not all((search.folder_of(number) / "metrics.jsonl").exists() for number in (1, 2)):
        assert thread.is_alive(), "the search ended before its trials had begun"
        time.sleep(0.02)
    assert len(children_of(os.getpid())) >= 2
    stop.set("SIGTERM")
    thread.join(20)
    assert not thread.is_alive()
    assert not [line for line in children_of(os.getpid()).values() if "stand_in" in line]
    assert [found.state for found in search.trials()[1:]] == [TrialState.RUNNING] * 2
    again = search_in(num_trials=3)
    with again.next_trial() as taken, again.next_trial() as other, again.next_trial() as none:
        assert [taken[0].number, other[0].number] == [1, 2]
        assert taken[1] == {"learning_rate": 6.0}
        assert none is None


def test_trial_is_its_holders_until_that_one_is_gone(search_in) -> None:
    one, two = search_in(num_trials=1), search_in(num_trials=1)
    with one.next_trial() as (held, options):
        with two.next_trial() as taken:
            assert taken is None
        assert options == {"learning_rate": 0.01}
    with two.next_trial() as (again, options):
        assert (again.number, options) == (held.number, {"learning_rate": 0.01})


def test_several_share_a_search_and_finish_exactly_its_trials(search_in, runner) -> None:
    searches = [search_in(num_trials=7) for _ in range(2)]
    for search in searches:
        # Without the ends that are failures: any number of those would be right.
        search.options = {"learning_rate": optuna.distributions.FloatDistribution(0.01, 0.5)}
        search._enqueue_defaults()
    threads = [threading.Thread(target=runner(search).run, args=(3,)) for search in searches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    trials = searches[0].trials()
    assert [found.state for found in trials] == [TrialState.COMPLETE] * 7
    assert {found.user_attrs["restarts"] for found in trials} == {0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*FLAGS, "--epochs=4"], "epochs 3.0 -> 4.0"),
        ([*FLAGS, "--dropout_rate=0.1"], "dropout_rate 0.2 -> 0.1"),
    ],
)
def test_other_flags_in_the_same_folder_are_refused_with_the_difference(flags: list[str], words: str, search_in) -> None:
    search_in(num_trials=1)
    with pytest.raises(RequestError, match=rf"study holds another search: {re.escape(words)}: give another folder$"):
        search_in(num_trials=1, flags=flags)


def test_other_space_or_data_in_the_same_folder_is_refused_with_the_difference(search_in, tmp_path: Path) -> None:
    search = search_in(num_trials=1)
    config, searched = tune.task_of(FLAGS, space_file(tmp_path, "learning_rate: [0.01, 0.1]"))
    with pytest.raises(RequestError, match=r"space of learning_rate .*0\.9.* -> .*\[0\.01, 0\.1\]"):
        Search(search.folder, searched, config, "sha", 1, "none")
    with pytest.raises(RequestError, match="data_sha256 sha -> other"):
        Search(search.folder, search.options, search.config, "other", 1, "none")


def test_search_without_a_complete_trial_says_so(search_in, runner) -> None:
    search = search_in(2.0)
    only = Search.best
    search.best = lambda: None if only(search).number == 0 else only(search)
    runner(search).run(parallel=1)
    with pytest.raises(JobError, match="no trial has come to its end"):
        winner.result_of(search)


def test_last_report_of_a_search_stays(search_in, runner, monkeypatch) -> None:
    """Another process may come to draw the report of its last trial after the result is there, or while it is drawn."""
    monkeypatch.setattr(winner.evaluate, "evaluate", lambda *_: {"test_accuracy": 0.9, "test_loss": 0.1, "test_examples": 7})
    search = search_in(0.5)
    runner(search).run(parallel=1)
    drawing, ended, found, may_go_on = [], [], [], threading.Event()
    write = search_report.write

    def slowly(search: Search, result: dict[str, Any] | None) -> None:
        drawing.append(result)
        assert result or may_go_on.wait(20)
        write(search, result)
        ended.append(result)

    monkeypatch.setattr(search_report, "write", slowly)
    earlier = threading.Thread(target=winner.update_report, args=[search])
    earlier.start()
    while not drawing:
        assert earlier.is_alive()
        time.sleep(0.01)
    last = threading.Thread(target=lambda: found.append(winner.result_of(search)))
    last.start()
    last.join(1.5)
    assert drawing == [None]
    may_go_on.set()
    earlier.join(20)
    last.join(20)
    winner.update_report(search)
    assert drawing == ended == [None, *found]
    assert len(found) == 1


@pytest.mark.e2e
def test_winner_is_tested_once_whoever_comes_first_and_again_only_if_it_is_another(search_in, runner, monkeypatch) -> None:
    tested = []

    def evaluate(model_dir: str, _: str) -> dict[str, float]:
        tested.append(Path(model_dir).name)
        time.sleep(0.3)
        return {"test_accuracy": 0.9, "test_loss": 0.1, "test_examples": 7}

    monkeypatch.setattr(winner.evaluate, "evaluate", evaluate)
    search, results = search_in(0.5, 0.2), []
    runner(search).run(parallel=2)

    def finish() -> None:
        while not (result := winner.result_of(search)):
            time.sleep(0.02)
        results.append(result)

    threads = [threading.Thread(target=finish) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert tested == ["0002"]
    assert results == [{
        "best_trial": 2, "best_validation_accuracy": pytest.approx(0.8 * (1 - 0.1 / 3)), "best_options": {"learning_rate": 0.2},
        "test_accuracy": 0.9, "test_loss": 0.1, "test_examples": 7, "num_finished": 3, "num_pruned": 0, "num_failed": 0,
        "preset": str(search.folder / "best.yaml"),
        "command": f"python -m trainer.task --preset={search.folder / 'best.yaml'}", "model_dir": str(search.folder_of(2)),
    }] * 3  # fmt: skip
    for rate, winners in ((0.5, ["0002"]), (0.01, ["0002", "0004"])):
        search.num_trials += 1
        search.study.enqueue_trial({"learning_rate": rate})
        runner(search).run(parallel=1)
        assert winner.result_of(search)["num_finished"] == search.num_trials
        assert tested == winners


@pytest.mark.e2e
def test_search_ends_with_a_preset_a_result_and_one_look_at_the_test_set(tiny_data: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    options = {**TINY, "data_dir": tiny_data, "epochs": 1}
    del options["report"]
    path = space_file(tmp_path, "learning_rate: [0.01, 0.001]\nglobal_batch_size: [32, 64]")
    command = [sys.executable, "-m", "trainer.tune", f"--study_dir={study}", f"--space={path}", "--num_trials=2", "--parallel=2"]
    command += ["--", *arguments({name: value for name, value in options.items() if name != "global_batch_size"})]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^trial +\d ", done.stdout, re.MULTILINE)) == 2
    result = json.loads((study / "result.json").read_text())
    assert (result["num_finished"], result["num_failed"], result["test_examples"]) == (2, 0, 203)
    best = study / "trials" / f"{result['best_trial']:04d}"
    trained = json.loads((best / "result.json").read_text())
    assert trained["test_accuracy"] is None
    assert trained["validation_accuracy"] == result["best_validation_accuracy"]
    written = yaml.safe_load((study / "best.yaml").read_text())
    assert written["epochs"] == 1.0
    # Complete, so that another version with other defaults trains the same.
    assert set(written) == set(Config().result_fields())
    found = from_preset(str(study / "best.yaml"), {})
    assert {name: getattr(found, name) for name in result["best_options"]} == result["best_options"]
    assert found.validation_fraction == 0.2
    assert f"--preset={study / 'best.yaml'} --data_dir={tiny_data}" in done.stdout
    assert f"--preset={study / 'best.yaml'} --data_dir={tiny_data}" in (study / "best.yaml").read_text()

    before = {name: (study / name).stat().st_mtime_ns for name in ("result.json", "best.yaml", "report.html", "journal.log")}
    again = run()
    assert again.returncode == 0, again.stderr
    assert again.stdout == "\n".join(line for line in done.stdout.splitlines() if not line.startswith("trial ")) + "\n"
    assert {name: (study / name).stat().st_mtime_ns for name in before} == before
    other = run("--dropout_rate=0.3")
    assert other.returncode == 2
    assert "dropout_rate 0.2 -> 0.3" in other.stderr
