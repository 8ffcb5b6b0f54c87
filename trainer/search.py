"""A hyperparameter search in a folder that threads, processes and machines share: who does which trial, and what came of it.

Optuna's journal holds what is known. That a trial is somebody's is said by a lock, which the system lets go when that process
dies, however it dies: a trial that is running and that nobody holds is taken up by whoever comes next.
"""

import contextlib
import copy
import errno
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from trainer import cluster, locks, space, storage, trial
from trainer.config import Config
from trainer.errors import JobError, RequestError
from trainer.space import Space

_log = logging.getLogger("digitfleet")
PRUNERS = ("median", "halving", "none")
_IDENTITY = "identity"
_SPACE_OF = "space of "
# A killed search's trials end with it, but not in the same instant.
_PROCESS_ENDS_WITHIN_SECS = 30.0
# So many failures more than successes, and the next trial would not be the first to succeed.
_MOST_FAILURES = 3
# For a trial that is not like any before: by the sampler, and then by chance.
_MOST_GUIDED_DRAWS, _MOST_DRAWS = 10, 500


class Search:
    """One process's view of a search.

    Args:
        folder: the search's, which exists.
        options: the space.
        config: what is the same for all trials.
        data_sha256: of the data set.
        num_trials: how many are to be finished, by all processes together.
        pruner: one of `PRUNERS`.

    Raises:
        RequestError: the folder holds another search, or a run.
    """

    def __init__(self, folder: Path, options: Space, config: Config, data_sha256: str, num_trials: int, pruner: str) -> None:
        self.folder, self.options, self.config, self.num_trials = folder, options, config, num_trials
        if (folder / "config.json").exists():
            raise RequestError(f"--study_dir={folder} holds a run of trainer.task: give another folder")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal = str(folder / storage.JOURNAL)
        (folder / "trials").mkdir(exist_ok=True)
        known: dict[str, Any] = {
            "storage": JournalStorage(JournalFileBackend(journal, lock_obj=_JournalLock(journal))),
            "study_name": "digitfleet",
            "pruner": _make_pruner(pruner),
        }
        with self._alone():
            try:
                self.study = optuna.load_study(**known)
            except KeyError:
                self.study = optuna.create_study(**known, direction="maximize")
            self._identify(data_sha256)
        self._failed_before = len(self._of(TrialState.FAIL))

    def _identify(self, data_sha256: str) -> None:
        varied = {name: values for name, values in self.config.result_fields().items() if name not in self.options}
        identity = {
            **varied,
            "data_sha256": data_sha256,
            **{f"{_SPACE_OF}{k}": v for k, v in space.as_json(self.options).items()},
        }
        before = self.study.user_attrs.get(_IDENTITY)
        if before is None:
            self._enqueue_defaults()
            self.study.set_user_attr(_IDENTITY, identity)
            return
        names = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
        if names:
            # What one of two spaces searches is in the other a value, or the default.
            names = [name for name in names if f"{_SPACE_OF}{name}" not in names]
            changed = "; ".join(f"{name} {_words(before.get(name))} -> {_words(identity.get(name))}" for name in names)
            raise RequestError(f"--study_dir={self.folder} holds another search: {changed}: give another folder")

    def _enqueue_defaults(self) -> None:
        """What one would have trained without a search is the first trial, if the space has it: so none ends worse."""
        usual = {name: getattr(self.config, name) for name in self.options}
        if all(space.contains(self.options[name], value) for name, value in usual.items()):
            self.study.enqueue_trial(usual, skip_if_exists=True)

    @property
    def finished(self) -> int:
        """How many trials count: complete, or ended because they were worse."""
        return len(self._of(TrialState.COMPLETE, TrialState.PRUNED))

    @contextlib.contextmanager
    def next_trial(self) -> Iterator[tuple[optuna.Trial, dict[str, Any]] | None]:
        """A trial that is this thread's within the context, with its options; None: there is none to do, for now.

        It is one that a dead process has left, or else a new one while fewer than `num_trials` are finished or under way.

        Raises:
            JobError: so many have failed that it is no accident.
        """
        with contextlib.ExitStack() as held:
            with self._alone():
                taken = self._take(held)
                found = (taken, space.draw(taken, self.options)) if taken else None
            if taken:
                with locks.exclusive(
                    self.folder_of(taken.number),
                    needed=True,
                    patience=max(cluster.lock_patience(), _PROCESS_ENDS_WITHIN_SECS),
                    flag="--study_dir",
                ):
                    pass  # The process of the one before has ended.
            yield found

    def _take(self, held: contextlib.ExitStack) -> optuna.Trial | None:
        trials = self.study.get_trials(deepcopy=False)
        started = [known for known in trials if known.state != TrialState.WAITING]
        running = [known for known in started if known.state == TrialState.RUNNING]
        for known in running:
            if self._hold(held, known.number):
                still = self.study.get_trials(deepcopy=False)[known.number]
                return optuna.Trial(self.study, known._trial_id) if still.state == TrialState.RUNNING else None
        self._check_failures()
        if self.finished + len(running) >= self.num_trials:
            return None
        if len(trials) == len(started):
            options = self._draw(started)
            if options is None:
                # What has failed is not tried again: there are fewer trials than were asked for.
                self.num_trials = self.finished + len(running)
                _log.info("note: no other choice is left in the space: the search ends with %d trials", self.num_trials)
                return None
            self.study.enqueue_trial(options)
        new = self.study.ask()
        return new if self._hold(held, new.number) else None

    def _draw(self, started: Sequence[FrozenTrial]) -> dict[str, Any] | None:
        """The options of the next trial: none that has been tried, as they would train the same weights again, or fail again.

        Where the sampler knows no other, as in a space of few choices, chance is asked. None: it found none either.
        """
        tried = [found.params for found in started]
        for attempt in range(_MOST_DRAWS):
            # By number: a search that is resumed draws what it would have drawn.
            sequence = np.random.SeedSequence([self.config.seed, len(started), attempt])
            seed = int(sequence.generate_state(1)[0])
            study = optuna.create_study(
                direction="maximize",
                sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
                if attempt < _MOST_GUIDED_DRAWS
                else optuna.samplers.RandomSampler(seed),
            )
            study.add_trials([_as_the_sampler_sees(found) for found in started])
            values = space.draw(study.ask(), self.options)
            if values not in tried:
                return values
        return None

    def _hold(self, held: contextlib.ExitStack, number: int) -> bool:
        self.folder_of(number).mkdir(exist_ok=True)
        return held.enter_context(locks.lock_file(self.folder_of(number) / ".search.lock"))

    def _check_failures(self) -> None:
        failed = self._of(TrialState.FAIL)
        if (recent := len(failed) - self._failed_before) >= max(_MOST_FAILURES, self.finished + 1):
            last = failed[-1]
            log = self.folder_of(last.number) / trial.LOG
            raise JobError(f"{recent} trials have failed, the last one: {last.user_attrs.get('reason', '')}; see {log}")

    def report(self, current: optuna.Trial, accuracies: Sequence[float]) -> bool:
        """Notes the validation accuracy of each epoch so far; whether the trial should end because others were better."""
        known = self.study.get_trials(deepcopy=False)[current.number].intermediate_values
        for epoch, accuracy in enumerate(accuracies, start=1):
            if epoch not in known:
                current.report(accuracy, epoch)
        return current.should_prune()

    def count_death(self, current: optuna.Trial) -> int:
        """Notes that a process of this trial has died; returns how many have."""
        deaths = int(current.user_attrs.get("deaths", 0)) + 1
        current.set_user_attr("deaths", deaths)
        return deaths

    def tell(self, current: optuna.Trial, ending: trial.Ending) -> None:
        """Notes how a trial has ended for good.

        One that diverged counts as pruned, and to the sampler as the worst.
        """
        folder = self.folder_of(current.number)
        current.set_user_attr("ended", ending.kind if ending.kind in ("complete", "pruned", "diverged") else "failed")
        current.set_user_attr("reason", ending.reason)
        current.set_user_attr("restarts", trial.restarts(folder))
        if ending.kind == "complete":
            self.study.tell(current, ending.value)
        elif ending.kind in ("pruned", "diverged"):
            self.study.tell(current, state=TrialState.PRUNED)
            trial.discard_checkpoints(folder)
        else:
            self.study.tell(current, state=TrialState.FAIL)

    def best(self) -> FrozenTrial | None:
        """The complete trial with the best validation accuracy, the first of equals; None before there is one."""
        return max(self._of(TrialState.COMPLETE), key=lambda found: found.value or 0.0, default=None)

    def trials(self) -> list[FrozenTrial]:
        """All that have been started."""
        return [found for found in self.study.get_trials() if found.state != TrialState.WAITING]

    def folder_of(self, number: int) -> Path:
        """The `model_dir` of a trial."""
        return self.folder / "trials" / f"{number:04d}"

    def _of(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else takes a trial in the meantime."""
        with locks.lock_file(self.folder / ".search.lock", wait=True):
            yield


def _as_the_sampler_sees(found: FrozenTrial) -> FrozenTrial:
    """One that diverged is worse than all others, whatever it had reached before.

    Optuna 5.0 orders pruned trials by their last step first (`_get_pruned_trial_score`), and has those of no step last.
    """
    if found.user_attrs.get("ended") == "diverged":
        found = copy.copy(found)
        found.intermediate_values = {}
    return found


class _JournalLock(JournalFileOpenLock):
    """Keeps others from appending. Optuna 5.0's own stays behind when its process is killed, and is waited for for 30 s.

    The kill may have come in the middle of a line, which Optuna would refuse to read: that half is cut off.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = Path(path)
        self._held = contextlib.ExitStack()

    def acquire(self) -> bool:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locks.lock_file(Path(f"{self._path}.lock"), wait=True, must=True))
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    raise
                raise RequestError(
                    f"--study_dir={self._path.parent}: its file system has no locks ({error.strerror}), which a search needs: "
                    "give a folder on another, or mount this one with locks"
                ) from error
            with open(self._path, "rb+") as journal:
                if journal.seek(0, os.SEEK_END) and (journal.seek(-1, os.SEEK_CUR), journal.read())[1] != b"\n":
                    journal.seek(0)
                    journal.truncate(journal.read().rfind(b"\n") + 1)
            self._held = held.pop_all()
        return True

    def release(self) -> None:
        self._held.close()


def _words(value: Any) -> str:
    """Of what makes a search: the value of an option, or its space."""
    if not isinstance(value, dict):
        return "none" if value is None else str(value)
    if "choices" in value:
        return str(list(value["choices"]))
    step = f" in steps of {value['step']}" if value.get("step") else ""
    return f"{value['low']} to {value['high']}{step}{', log' if value.get('log') else ''}"


def _make_pruner(name: str) -> optuna.pruners.BasePruner:
    if name == "halving":
        # Asks for less at the start than the median does, and is harder: good for many trials.
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if name == "none":
        return optuna.pruners.NopPruner()
    # The default: it compares trials at the same epoch and needs no budget, so that it works whatever --epochs is, with few
    # trials, and when a search goes on. Hyperband would have to know the last epoch, and to spread trials over brackets first.
    return optuna.pruners.MedianPruner(n_startup_trials=4)
