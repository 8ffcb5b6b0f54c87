"""The outer loop: runs inner loops of steps and, between them, logs, evaluates, saves, and decides to stop.

It knows time; what a step computes is `steps.py`'s business, and how many devices there are nobody's here.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer import machine, storage
from trainer.agreement import Agreement
from trainer.checkpoint import Checkpoints, Progress
from trainer.config import Config
from trainer.errors import DivergedError, Stopped
from trainer.evaluations import Evaluation
from trainer.metrics import Record
from trainer.pace import Pace
from trainer.plan import Plan
from trainer.profiler import Profiler
from trainer.recording import Recording
from trainer.signals import StopRequest
from trainer.step_times import StepTimes
from trainer.steps import CORRECT, EXAMPLES, GRADIENT_NORM, LOSS, STEP_SECS, TRAIN_COLUMNS, State, TrainLoop
from trainer.watch import Watch

_log = logging.getLogger("digitfleet")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """The functions that the loop drives. All workers call them in the same order: most of them are collective."""

    train: TrainLoop
    iterator: Any
    sum_over_workers: Callable[[tf.Tensor], tf.Tensor]
    copy_weights: Callable[[], None]
    average_statistics: Callable[[], None]
    compute_statistics: Callable[[], None]
    advise: Callable[[float], None]
    validate: Evaluation | None
    exchange_secs: float
    profile_dir: Path


class Loop:
    """Trains from `progress` on to the end of the plan, or to an earlier end that the configuration asks for."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        state: State,
        work: Work,
        agreement: Agreement,
        checkpoints: Checkpoints,
        progress: Progress,
        recording: Recording,
        stop: StopRequest,
        watch: Watch,
    ) -> None:
        self._config, self._plan, self._state, self._work = config, plan, state, work
        self._checkpoints, self._progress, self._recording = checkpoints, progress, recording
        self._agreement, self._stop, self._watch = agreement, stop, watch
        self._profiler = Profiler(config.profile_range, work.profile_dir)
        self._warm = self._validated = False
        self._pace = Pace(config)
        self._inference_step = -1

    def run(self) -> int:
        """Trains to the end; `progress.finished` is then saved, and the inference weights are the selected ones.

        Returns:
            The step whose weights those are.

        Raises:
            Stopped: a signal asked for it, or the disk is full; the state is saved.
            DivergedError: the loss is not finite.
            InconsistentError: the replicas do not hold the same weights.
        """
        progress, total, validate = self._progress, self._plan.total_steps, self._work.validate
        with self._profiler:
            while not progress.finished:
                self._profiler.at(progress.step)
                asked = False
                if not progress.unvalidated:
                    asked = self._train_until(self._next_boundary(progress.step))
                    progress.unvalidated = validate is not None and self._is_epoch_end(progress.step)
                if validate and progress.unvalidated and (progress.step == total or not asked):
                    # It may take longer than a job that is to end is given; the next start validates then.
                    self._save()
                    self._end_epoch(validate)
                progress.finished |= progress.step >= total
                if progress.finished or asked or self._is_due(progress.step):
                    self._save()
                if asked and not progress.finished:
                    self._watch.feed("waiting for the others to stop")
                    self._watch.end_together()
                    raise Stopped(f"stopped at step {progress.step} of {total}: {self._checkpoints.describe()}")
        # From now on the job is finished rather than stopped.
        self._stop.trained = True
        return self._select_weights()

    def _next_boundary(self, step: int) -> int:
        """The first step after `step` at which Python has something to do."""
        multiples = (self._pace.steps, self._config.checkpoint_every_steps, self._config.histograms_every)
        boundaries = [(step // multiple + 1) * multiple for multiple in multiples if multiple]
        return min(*boundaries, self._plan.next_epoch_end(step), self._plan.total_steps, *self._profiler.edges(step))

    def _save(self) -> None:
        self._watch.feed(f"saving step {self._progress.step}")
        self._checkpoints.save(self._progress)

    def _is_due(self, step: int) -> bool:
        return step % self._config.checkpoint_every_steps == 0

    def _is_epoch_end(self, step: int) -> bool:
        # The end is validated too: it may lie within an epoch, and early stopping must know of it.
        return self._plan.is_epoch_end(step) or step == self._plan.total_steps

    def _train_until(self, boundary: int) -> bool:
        """Trains up to `boundary`, writes a record, and returns whether any worker was asked to stop."""
        progress, started = self._progress, time.perf_counter()
        self._watch.feed(f"training from step {progress.step}", compiles=not self._warm)
        num_steps = boundary - progress.step
        first_step = tf.constant(progress.step, tf.int64)
        local = self._work.train(self._work.iterator, first_step, tf.constant(num_steps, tf.int64))
        rows = local.numpy()
        wish = self._pace.wish(rows[:, STEP_SECS], time.perf_counter() - started, compiled=not self._warm)
        # A layer of a user's may have statistics of its own, which each replica has of its part of the batch.
        if not self._config.sync_batch_norm or self._config.is_custom_model:
            self._work.average_statistics()
        # What all workers must know travels in one sum: each step's numbers, who is asked to stop, the checksums.
        compared = self._is_due(boundary) or self._is_epoch_end(boundary)  # What is saved then is good.
        checksums = self._agreement.checksums() if compared else np.zeros([0])
        parts = [np.ravel(rows), np.array([float(bool(self._stop.name))]), wish, checksums]
        totals = self._work.sum_over_workers(tf.constant(np.concatenate(parts))).numpy()
        seconds = time.perf_counter() - started
        numbers, (asked,), wishes, checksums = np.split(totals, np.cumsum([len(part) for part in parts])[:-1])
        steps = numbers.reshape(-1, TRAIN_COLUMNS)
        self._pace.agree(wishes)
        # By the wall clock where TensorFlow tells no time.
        steps[:, STEP_SECS] = np.where(np.isnan(steps[:, STEP_SECS]), seconds / num_steps, steps[:, STEP_SECS])
        self._check_finite(steps)
        if asked and not compared:
            checksums = self._work.sum_over_workers(tf.constant(self._agreement.checksums())).numpy()
        if asked or compared:
            self._agreement.check_checksums(checksums, boundary)
        progress.step = boundary
        progress.train_seconds += seconds
        speed: dict[str, float | None] = {"images_per_second": None}
        if self._warm:  # The first call compiles.
            progress.timed_images += num_steps * self._config.global_batch_size
            progress.timed_seconds += seconds
            times = StepTimes.of(steps, self._work.exchange_secs)
            speed = {"images_per_second": num_steps * self._config.global_batch_size / seconds, **times.record()}
            self._work.advise(seconds / num_steps)
            self._recording.observe(steps[:, STEP_SECS])
            self._profiler.observe(steps, self._work.exchange_secs)
        self._warm = True
        self._write("train", steps.sum(axis=0), **self._optimizer_values(steps[:, GRADIENT_NORM]), **speed, **machine.memory())
        if self._config.histograms_every and boundary % self._config.histograms_every == 0:
            with storage.stop_when_full("histograms", self._checkpoints.describe, tf.errors.OpError):
                self._recording.write_histograms(self._state, boundary)
        return bool(asked)

    def _check_finite(self, steps: np.ndarray) -> None:
        self._refuse_infinite("the loss", steps[:, LOSS])
        # Its step has spoiled the weights, which no loss shows before the next; float16's loss scale leaves such steps out.
        if not hasattr(self._state.optimizer, "dynamic_scale"):
            self._refuse_infinite("the gradient's norm", steps[:, GRADIENT_NORM])

    def _refuse_infinite(self, what: str, values: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise DivergedError(
                f"{what} is {values[bad[0]]} at step {self._progress.step + bad[0] + 1}: begin again in another "
                f"--model_dir with a lower --learning_rate or with --clip_norm; {self._checkpoints.describe()}"
            )

    def _optimizer_values(self, norms: np.ndarray) -> dict[str, float | None]:
        optimizer = self._state.optimizer
        # Steps that overflowed in float16 were not taken.
        finite = norms[np.isfinite(norms)]
        values: dict[str, float | None] = {
            "learning_rate": float(self._state.schedule(optimizer.iterations.numpy() - 1)),
            "gradient_norm": float(finite.mean()) if len(finite) else None,
        }
        if hasattr(optimizer, "dynamic_scale"):
            values["loss_scale"] = float(optimizer.dynamic_scale.numpy())
        return values

    def _end_epoch(self, validate: Evaluation) -> None:
        progress, config = self._progress, self._config
        self._make_inference_weights()
        self._watch.feed(f"validating step {progress.step}", compiles=not self._validated)
        totals = validate()
        self._validated, progress.unvalidated = True, False
        self._write("validation", totals)
        accuracy, loss = totals[CORRECT] / totals[EXAMPLES], totals[LOSS] / totals[EXAMPLES]
        if (accuracy, -loss) > (progress.best_accuracy, -progress.best_loss):
            progress.best_accuracy, progress.best_loss, progress.best_step = accuracy, loss, progress.step
            progress.epochs_without_gain = 0
            self._checkpoints.save_best(progress.step)
        else:
            progress.epochs_without_gain += 1
        if config.early_stopping_patience and progress.epochs_without_gain >= config.early_stopping_patience:
            count = progress.epochs_without_gain
            validations = "1 validation was" if count == 1 else f"{count} validations in a row were"
            self._end(f"{validations} no better than that of step {progress.best_step}")
        elif config.target_accuracy and accuracy >= config.target_accuracy:
            self._end(f"--target_accuracy={config.target_accuracy:g} is reached")

    def _end(self, reason: str) -> None:
        self._progress.finished = True
        _log.info("training ends at step %d of %d: %s", self._progress.step, self._plan.total_steps, reason)

    def _select_weights(self) -> int:
        """Gives the inference weights their final values: the best ones with early stopping, else the last ones."""
        progress = self._progress
        if not self._config.early_stopping_patience or progress.best_step < 0:
            self._make_inference_weights()
            return progress.step
        # All wait here for the chief, who may be writing just now what all are to read.
        self._work.sum_over_workers(tf.zeros([1], tf.float64))
        self._checkpoints.restore_best(progress.best_step)
        _log.info("the weights are those of step %d, which validated best", progress.best_step)
        return progress.best_step

    def _make_inference_weights(self) -> None:
        """Makes the inference weights those of this step, if they are not."""
        if self._inference_step == self._progress.step:
            return
        self._watch.feed(f"making the weights of step {self._progress.step} for inference", compiles=self._inference_step < 0)
        if not self._config.ema_decay:
            self._work.copy_weights()
        self._work.compute_statistics()
        self._inference_step = self._progress.step

    def _write(self, split: str, totals: np.ndarray, **values: Any) -> None:
        step = self._progress.step
        record: Record = {
            "step": step,
            "epoch": round(self._plan.epochs_at(step), 4),
            "split": split,
            "loss": float(totals[LOSS] / totals[EXAMPLES]),
            "accuracy": float(totals[CORRECT] / totals[EXAMPLES]),
            **values,
        }
        with storage.stop_when_full("the metrics", self._checkpoints.describe, tf.errors.OpError):
            self._recording.write(record)
