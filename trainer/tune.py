"""Searches hyperparameters: `python -m trainer.tune --study_dir D --num_trials N --parallel P -- [flags of trainer.task]`.

The validation split decides; the test set is looked at once, for the winner. The same command goes on, and may be run by several
processes and machines at once on one folder: together they finish N trials.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from absl import flags

from trainer import cli, cluster, console, dataset, lookup, plan, signals, space, storage, trial, winner
from trainer import flags as task_flags
from trainer.config import Config
from trainer.errors import RequestError, Stopped
from trainer.search import PRUNERS, Search
from trainer.trial import Ending

_log = logging.getLogger("digitfleet")
_LOOK_EVERY_SECS = 0.5
# What a trial needs to end after its grace period, and this process after it.
_END_SECS = 5.0
# What `plan.make_plan` asks for, and a space may vary.
_PLANNED = (
    "global_batch_size",
    "gradient_accumulation_steps",
    "epochs",
    "warmup_steps",
    "max_steps",
    "jit_compile",
    "sync_batch_norm",
    "model",
)


class Runner:
    """Does trials, one after the other or side by side, until the search has as many as it is to have.

    Args:
        search: which trials.
        arguments: flags of trainer.task for all of them.
        max_retries: how often a trial that died is started again.
        stop: asked all the time.
        program: what trains.
    """

    def __init__(
        self,
        search: Search,
        arguments: Sequence[str],
        max_retries: int,
        stop: signals.StopRequest,
        program: Sequence[str] = (sys.executable, "-m", "trainer.task"),
    ) -> None:
        self._search, self._stop, self._max_retries = search, stop, max_retries
        self._command = [*program, *arguments, "--notest", "--noreport"]
        self._failed = False

    def run(self, parallel: int) -> None:
        """Returns when the search has its trials, whoever has done them, or when this process is to stop.

        Raises:
            JobError: trials fail, all of them.
        """
        with concurrent.futures.ThreadPoolExecutor(parallel) as threads:
            places = [threads.submit(self._work, place, parallel) for place in range(parallel)]
            concurrent.futures.wait(places, return_when=concurrent.futures.FIRST_EXCEPTION)
            self._failed = any(place.done() and place.exception() for place in places)
        for place in places:
            place.result()

    def _stopping(self) -> bool:
        return bool(self._stop.name) or self._failed

    def _work(self, place: int, num_places: int) -> None:
        environment = cluster.alone(place, num_places)
        while not self._stopping() and self._search.finished < self._search.num_trials:
            with self._search.next_trial() as taken:
                if taken:
                    self._do(*taken, environment)
            if not taken:
                time.sleep(_LOOK_EVERY_SECS)

    def _do(self, current: optuna.Trial, options: dict[str, Any], environment: dict[str, str]) -> None:
        folder = self._search.folder_of(current.number)
        command = [*self._command, *(f"--{name}={value}" for name, value in options.items()), f"--model_dir={folder}"]
        prune = functools.partial(self._search.report, current)
        verb = "goes on" if (folder / "config.json").exists() else "begins"
        _log.info("trial %d %s: %s; its own log is %s", current.number, verb, self._changed(options), folder / trial.LOG)
        while True:
            grace_secs = self._search.config.grace_period + _END_SECS
            ending = trial.attempt(command, environment, folder, prune, self._stopping, grace_secs)
            if ending.kind == "stopped":
                return
            if ending.kind in ("refused", "died"):
                self._check_storage()
            if ending.kind != "died" or self._search.count_death(current) > self._max_retries:
                break
            console.say(f"trial {current.number:4d}  {ending.reason}: started again")
        self._search.tell(current, ending)
        console.say(self._line(current.number, options, ending))
        winner.update_report(self._search)

    def _check_storage(self) -> None:
        """Of a trial that could not write nothing is known: it is still to be done.

        Raises:
            Stopped: nobody could write there.
        """
        try:
            storage.prepare_folder(self._search.folder, "--study_dir")
        except RequestError as error:
            raise Stopped(f"{error}: finished trials stay; the same command goes on") from error

    def _changed(self, options: dict[str, Any]) -> str:
        changed = [f"{name}={_short(value)}" for name, value in options.items() if value != getattr(self._search.config, name)]
        return " ".join(changed) or "the defaults"

    def _line(self, number: int, options: dict[str, Any], ending: Ending) -> str:
        accuracies = trial.validation_accuracies(self._search.folder_of(number) / "metrics.jsonl")
        values = accuracies if ending.value is None else [ending.value]
        known = f"{values[-1]:8.2%}" if values else "   --   "
        best = self._search.best()
        so_far = f"best {best.value:.2%} (trial {best.number})" if best else "none complete yet"
        reason = f": {ending.reason}" if ending.reason else ""
        return f"trial {number:4d}  {known}  {ending.kind:8}  {so_far}  {self._changed(options)}{reason}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def task_of(arguments: Sequence[str], path: Path) -> tuple[Config, dict[str, Any]]:
    """What is the same for all trials, and the space; both are checked.

    Args:
        arguments: flags of trainer.task.
        path: the file with the space.

    Raises:
        RequestError: one of them cannot be met, or they contradict each other.
    """
    options = task_flags.task_options(arguments, flags.FLAGS)
    config = task_flags.with_options(options)
    trial.check_options(options, config, {}, path)

    def config_with(values: dict[str, Any]) -> Config:
        trials = task_flags.with_options({**options, **values})
        lookup.check_model(trials)
        return trials

    lookup.check_model(config)
    searched = space.read(path, config_with)
    trial.check_options(options, config, searched, path)
    return config, searched


def check_plans(config: Config, searched: space.Space, num_examples: int, num_devices: int) -> None:
    """Whether each choice of a space can be trained with by some trial, before any is started.

    Args:
        config: what is the same for all trials.
        searched: the space.
        num_examples: that trials train on.
        num_devices: of a trial.

    Raises:
        RequestError: one cannot, or none of what is the same for all.
    """
    names = [name for name in _PLANNED if name in searched]
    met: set[tuple[str, Any]] = set()
    refused: dict[tuple[str, Any], RequestError] = {}
    for values in itertools.product(*(space.ends(searched[name]) for name in names)):
        choices = list(zip(names, values, strict=True))
        try:
            plan.make_plan(dataclasses.replace(config, **dict(choices)), num_examples, num_devices)
        except RequestError as error:
            if not choices:
                raise
            refused |= {choice: error for choice in choices if choice not in refused}
        else:
            met.update(choices)
    if never := [error for choice, error in refused.items() if choice not in met]:
        raise never[0]


def define_flags(values: flags.FlagValues) -> None:
    """Adds this command's flags."""
    own: dict[str, Any] = {"flag_values": values, "module_name": sys.argv[0]}
    flags.DEFINE_string("study_dir", None, "Folder of the search; several processes and machines may share it.", **own)
    flags.DEFINE_integer("num_trials", 20, "Trials to finish, by all together.", lower_bound=1, **own)
    flags.DEFINE_integer("parallel", 1, "Trials at once in this process; each has as many GPUs.", lower_bound=1, **own)
    flags.DEFINE_string(
        "space",
        "",
        "YAML file with what is searched: an option a line, with a list of choices or {low, high} with log: true or step. "
        "Empty: the package's own, trainer/space.yaml.",
        **own,
    )
    flags.DEFINE_enum(
        "pruner",
        "median",
        PRUNERS,
        "What ends trials early. median: worse than half of the others at the same epoch. halving: not among the best third "
        "after 1, 3, 9, ... epochs. none: nothing. It may be another one when a search goes on.",
        **own,
    )
    flags.DEFINE_integer("max_retries", 2, "Starts of a trial that dies, after the first.", lower_bound=0, **own)


def main(positional: list[str]) -> None:
    """Runs the search, or its rest, or this process's share of it; prints the winner."""
    # First: the folder may stand among the flags of trainer.task.
    config, searched = task_of(positional, Path(flags.FLAGS.space or trial.DEFAULT_SPACE))
    if not flags.FLAGS.study_dir:
        raise RequestError("--study_dir must be given: the folder of the search")
    folder = Path(flags.FLAGS.study_dir)
    stop = signals.StopRequest()
    signals.listen(stop, lambda: config.grace_period + 2 * _END_SECS)
    data = dataset.load_for(config)
    train_set, _ = dataset.split_validation(data.train, config.validation_fraction)
    gpus = cluster.visible_gpus(cluster.alone(0, flags.FLAGS.parallel))
    check_plans(config, searched, len(train_set), 1 if config.strategy == "one_device" else config.num_devices or len(gpus) or 1)
    num_trials = flags.FLAGS.num_trials
    if (different := space.size(searched)) < num_trials:
        _log.warning("note: --num_trials=%d: the space has no more than %d different trials", num_trials, different)
        num_trials = int(different)
    storage.prepare_folder(folder, "--study_dir")
    with storage.stop_when_full(f"--study_dir={folder}", lambda: "finished trials stay; the same command goes on"):
        search = Search(folder, searched, config, data.sha256, num_trials, flags.FLAGS.pruner)
        Runner(search, positional, flags.FLAGS.max_retries, stop).run(flags.FLAGS.parallel)
        while not stop.name:
            if result := winner.result_of(search):
                winner.show(search, result)
                return
            time.sleep(_LOOK_EVERY_SECS)
    command = shlex.join(["python", "-m", "trainer.tune", *sys.argv[1:]])
    raise Stopped(f"{stop.name}: {search.finished} of {search.num_trials} trials are finished; go on with: {command}")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    cli.run("trainer.tune", main, example="trainer.tune --study_dir studies/first -- --epochs 5")
