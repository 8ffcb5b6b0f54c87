"""Training state on disk: enough to go on from the exact step. The only module that knows who writes what.

    checkpoints/step-00000200/    everything: model, optimizer with loss scale, moving average, and loop.json
    checkpoints/best-00000186/    the weights with the best validation accuracy so far

A checkpoint is a folder that appears by one rename, so a crash while saving leaves the ones before it. Weights live in
TensorFlow's own format, whose checksums find damage. There is no other random state: whatever is random in training
follows from seed and position.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from trainer import storage
from trainer.config import Config
from trainer.errors import RequestError, Stopped
from trainer.steps import State
from trainer.tracing import graph

_log = logging.getLogger("digitfleet")
# What TensorFlow and JSON raise for files that are cut, changed or missing: of a short index a bare OpError.
_DAMAGE = (tf.errors.OpError, OSError, ValueError, TypeError, AssertionError, LookupError, RuntimeError)
# What TensorFlow raises where files could not be read this time, whatever is in them.
_FAILED = (tf.errors.UnknownError, tf.errors.UnavailableError, tf.errors.DeadlineExceededError, tf.errors.AbortedError,
           tf.errors.ResourceExhaustedError, tf.errors.PermissionDeniedError)  # fmt: skip
# What TensorFlow raises where files cannot be written. Others are a defect of what was to be computed or traced.
WRITE_ERRORS = (*_FAILED, tf.errors.FailedPreconditionError, tf.errors.NotFoundError, tf.errors.DataLossError)
# Of TensorFlow's variables, and of Keras's on several replicas.
_OTHER_SHAPE = ("incompatible tensor", "`variable.assign(value)` must match")


@dataclasses.dataclass
class Progress:
    """Where training is: the part of its state that is no variable.

    `unvalidated`: this step is still to be validated, which comes before the next.
    """

    step: int = 0
    unvalidated: bool = False
    train_seconds: float = 0.0
    timed_images: int = 0
    timed_seconds: float = 0.0
    best_step: int = -1
    best_accuracy: float = -1.0
    best_loss: float = float("inf")
    epochs_without_gain: int = 0
    finished: bool = False


class Checkpoints:
    """Saves and restores one job's state in `model_dir`/checkpoints.

    Args:
        model_dir: the run's folder.
        state: what is saved.
        config: how many checkpoints are kept, and whether the job ends with the best weights or the last.
        is_chief: whether this worker writes.
        check: raises where the folder is not this job's any more.
    """

    def __init__(
        self, model_dir: Path, state: State, config: Config, *, is_chief: bool, check: Callable[[], object] = lambda: None
    ) -> None:
        self._folder = model_dir / "checkpoints"
        if is_chief:
            with storage.stop_when_full(str(self._folder), self.describe):
                try:
                    self._folder.mkdir(exist_ok=True)
                except FileExistsError as error:
                    raise RequestError(f"{self._folder} is a file, and checkpoints want a folder: remove it") from error
        self._state = state
        self._keep, self._needs_best = config.keep_checkpoints, bool(config.early_stopping_patience)
        self._is_chief = is_chief
        self._check = check
        # What layers of a user's draw numbers from, which Keras 3.15 keeps where TensorFlow's checkpoints do not look.
        seeds = [variable.value for variable in state.model.variables if variable.name == "seed_generator_state"]
        more = {"seeds": seeds} if seeds else {}
        self._everything = tf.train.Checkpoint(model=state.model, optimizer=state.optimizer, inference=state.inference, **more)
        self._best = tf.train.Checkpoint(inference=state.inference)
        self._write_everything, self._write_best = (
            _make_write(checkpoint, state) for checkpoint in (self._everything, self._best)
        )

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        steps = self._steps("step")
        return steps[-1] if steps else None

    def describe(self) -> str:
        """What is safe, for messages."""
        try:
            step = self.latest_step()
        except OSError as error:
            return f"which checkpoints there are cannot be seen ({storage.reason_of(error)})"
        return "no checkpoint yet" if step is None else f"the last good checkpoint is {self._path('step', step)}"

    def save(self, progress: Progress) -> None:
        """Saves everything, then removes what is older than the newest ones kept. Only the chief writes: all hold the same."""
        if not self._is_chief:
            return

        def fill(folder: Path) -> None:
            self._write_everything(str(folder / "state"))
            (folder / "loop.json").write_text(json.dumps(dataclasses.asdict(progress)))

        self._write(self._path("step", progress.step), fill)
        # What stays, as on NFS where somebody reads it, goes the next time: no job ends for that.
        with contextlib.suppress(OSError):
            self._prune()

    def save_best(self, step: int) -> None:
        """Saves the inference weights as the best so far."""
        if self._is_chief:
            self._write(self._path("best", step), lambda folder: self._write_best(str(folder / "state")))

    def restore_best(self, step: int) -> None:
        """Gives the inference weights the values they had at `step`.

        Raises:
            Stopped: they are damaged; the next start goes on from a checkpoint whose best weights are not.
        """
        path = self._path("best", step)
        try:
            self._read_best(step)
        except _DAMAGE as error:
            raise Stopped(f"{path} is damaged ({storage.reason_of(error)}): start again to go on from before it") from error

    def _look_at_best(self, step: int) -> None:
        """Damage in them would otherwise show after the last step. The inference weights of the checkpoint come next.

        Raises:
            BestLostError: they are damaged, or gone.
            RequestError, Stopped: they could not be read this time.
        """
        path = self._path("best", step)
        try:
            if not (path / "state.index").exists():
                raise FileNotFoundError("gone")
            self._read_best(step)
        except AssertionError:  # Of another network.
            raise
        except _DAMAGE as error:
            _refuse_failure(path, error, "")
            raise BestLostError(f"its best weights, {path.name}: {storage.reason_of(error)}") from error

    def _read_best(self, step: int) -> None:
        self._best.read(str(self._path("best", step) / "state")).assert_consumed()

    def restore_latest(self) -> Progress | None:
        """Restores the newest checkpoint that is whole; says which ones are not. None if there has never been one.

        Raises:
            RequestError: the newest that is whole has other variables than this job, or must not be read.
                Or all are damaged: no new start changes that.
            Stopped: the storage has failed: what it does not give this time may be whole.
        """
        self._recover()
        damage: BaseException | None = None
        for step in reversed(self._steps("step")):
            path = self._path("step", step)
            try:
                progress = _progress_in(path / "loop.json", step)
                if self._needs_best and progress.best_step >= 0:
                    self._look_at_best(progress.best_step)
                self._everything.read(str(path / "state")).assert_consumed()
            except _DAMAGE as error:
                first_line = (str(error).splitlines() or [""])[0]
                # The options are the run's own: what they name has become another network since.
                if isinstance(error, AssertionError) or any(words in first_line for words in _OTHER_SHAPE):
                    raise RequestError(
                        f"checkpoint {path} is of another network ({first_line[:200]}): undo what has changed in the code of "
                        "--model or in the versions of config.json, or give another --model_dir"
                    ) from error
                _refuse_failure(path, error, ": where that stays so, move it elsewhere to go on from the one before it")
                _log.warning("checkpoint %s is damaged (%s): trying the one before it", path, storage.reason_of(error))
                damage = error
                continue
            return progress
        if damage is None:
            return None
        best = ", or its best weights are" if isinstance(damage, BestLostError) else ""
        raise RequestError(
            f"every checkpoint in {self._folder} is damaged{best}: bring one back, or give another --model_dir to start again"
        ) from damage

    def remove_newer(self, step: int) -> None:
        """Removes checkpoints after `step`, damaged ones that training passes again, and what a crash left half written."""
        for rest in self._folder.glob(".*"):
            if self._is_chief:
                shutil.rmtree(rest, ignore_errors=True)
        for newer in self._steps("step"):
            if newer > step and self._is_chief:
                shutil.rmtree(self._path("step", newer), ignore_errors=True)

    def _recover(self) -> None:
        """Brings back what a crash between the two renames of `storage.write_folder` has left aside."""
        for old in self._folder.glob(".*.old"):
            target = old.with_name(old.name[1 : -len(".old")])
            if self._is_chief and not target.exists():
                _log.warning("%s was being replaced when the job ended: taking it as it was", target)
                old.rename(target)

    def _write(self, path: Path, fill: Callable[[Path], None]) -> None:
        with storage.stop_when_full(f"checkpoint {path.name}", self.describe, tf.errors.OpError):
            self._check()
            try:
                storage.write_folder(path, fill)
            except (OSError, tf.errors.OpError):
                # A folder that goes while it is written to is another story than a full disk.
                self._check()
                raise

    def _prune(self) -> None:
        steps = self._steps("step")
        for step in steps[: -self._keep]:
            shutil.rmtree(self._path("step", step), ignore_errors=True)
        loops = [storage.read_json(self._path("step", step) / "loop.json") or {} for step in steps[-self._keep :]]
        used = {loop.get("best_step") for loop in loops}
        for step in self._steps("best"):
            if step not in used:
                shutil.rmtree(self._path("best", step), ignore_errors=True)

    def _path(self, kind: str, step: int) -> Path:
        return self._folder / f"{kind}-{step:08d}"

    def _steps(self, kind: str) -> list[int]:
        names = (path.name.removeprefix(f"{kind}-") for path in self._folder.glob(f"{kind}-*"))
        # Somebody may have put a copy beside them.
        return sorted(int(name) for name in names if name.isdecimal())


def _progress_in(path: Path, step: int) -> Progress:
    """Where training was at a step, as its file says it.

    Raises:
        ValueError: it says something else.
        OSError: it cannot be read.
    """
    usual = dataclasses.asdict(Progress())
    try:
        content = json.loads(path.read_text())
        fits = content["step"] == step and all(
            type(value) is type(usual[name]) or (type(usual[name]) is float and type(value) is int)
            for name, value in content.items()
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path.name} has no progress in it") from error
    if not fits:
        raise ValueError(f"{path.name} is not of step {step}")
    return Progress(**content)


class BestLostError(RuntimeError):
    """Of a checkpoint that is whole, the best weights are not."""


def _refuse_failure(path: Path, error: Exception, hint: str) -> None:
    """Tells damage from files that could not be read this time, whatever is in them.

    Raises:
        RequestError: they must not be read: no new start changes that.
        Stopped: the storage has failed.
    """
    lost = FileNotFoundError, NotADirectoryError, IsADirectoryError
    if isinstance(error, _FAILED) or (isinstance(error, OSError) and not isinstance(error, lost)):
        refused = isinstance(error, PermissionError | tf.errors.PermissionDeniedError)
        kind = RequestError if refused else Stopped
        raise kind(f"checkpoint {path} cannot be read ({storage.reason_of(error)}){hint}") from error


def _make_write(checkpoint: tf.train.Checkpoint, state: State) -> Callable[[str], None]:
    """`checkpoint.write`, traced once: walking over the objects takes several times as long as writing them."""
    # One file, not one for the weights and one for the objects' names: TensorFlow 2.21 makes one for each task it finds named.
    device = tf.DeviceSpec.from_string(state.optimizer.iterations.value.device)
    task = tf.DeviceSpec(job=device.job, replica=device.replica, task=device.task)

    @graph
    def write_to(prefix: tf.Tensor) -> None:
        with tf.device(task):
            checkpoint.write(prefix)

    def write(prefix: str) -> None:
        write_to(tf.constant(prefix))

    return write
