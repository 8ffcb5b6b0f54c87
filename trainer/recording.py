"""Everything that a run leaves to look at: metrics, TensorBoard, the Prometheus endpoint, the report. Only the chief has any."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainer import storage
from trainer.checkpoint import WRITE_ERRORS
from trainer.config import Config
from trainer.console import ConsoleWriter
from trainer.dashboard import Dashboard
from trainer.dataset import Dataset, Part
from trainer.endpoint import Endpoint
from trainer.errors import RequestError
from trainer.metrics import JsonLines, Record, Writer
from trainer.steps import State

_log = logging.getLogger("digitfleet")


class Recording:
    """The chief's writers as one; on the other workers it writes nothing.

    Args:
        config: the job's.
        total_steps: the last step of the plan.
        first_step: where this process goes on.
        restarts: how often the run was started before.
        is_chief: whether this worker writes.
        unvalidated: whether it begins with the validation of that step.

    Raises:
        RequestError: `--metrics_port` cannot be had, or the folder of event files cannot be written.
    """

    def __init__(
        self, config: Config, total_steps: int, first_step: int, restarts: int, *, is_chief: bool, unvalidated: bool = False
    ) -> None:
        self._config, self._writers = config, list[Writer]()
        self._dashboard: Dashboard | None = None
        self._endpoint: Endpoint | None = None
        if not is_chief:
            return
        if config.metrics_port:
            self._endpoint = Endpoint(config.metrics_host, config.metrics_port, restarts, total_steps)
            self._writers.append(self._endpoint)
        model_dir = Path(config.model_dir)
        # Of an end before, where a job that had finished is exported anew.
        for name in ("report.html", "report.md"):
            (model_dir / name).unlink(missing_ok=True)
        run = storage.read_json(model_dir / "config.json") or {}
        try:
            self._dashboard = Dashboard(
                model_dir / "tensorboard",
                config=dataclasses.asdict(config),
                compared={"preset": config.preset, **config.result_fields()},
                environment={**run.get("versions", {}), **run.get("topology", {})},
                restarts=restarts,
                first_step=first_step,
            )
        except (tf.errors.FailedPreconditionError, tf.errors.PermissionDeniedError) as error:
            raise RequestError(f"{model_dir / 'tensorboard'} cannot be written: {storage.reason_of(error)}") from error
        self._writers += [
            JsonLines(model_dir / "metrics.jsonl", first_step, unvalidated=unvalidated),
            self._dashboard,
            ConsoleWriter(total_steps, first_step),
        ]

    def write(self, record: Record) -> None:
        """Hands the record to each writer."""
        for writer in self._writers:
            writer.write(record)

    def observe(self, seconds: np.ndarray) -> None:
        """Takes the durations of steps, in seconds."""
        if self._endpoint:
            self._endpoint.observe(seconds)

    def write_histograms(self, state: State, step: int) -> None:
        """Writes how weights and gradients are distributed."""
        if self._dashboard:
            variables = state.model.trainable_variables
            values = {f"weights/{variable.path}": variable.numpy() for variable in variables}
            pairs = zip(variables, state.gradients, strict=True)
            values |= {f"weights_gradients/{variable.path}": gradient.numpy() for variable, gradient in pairs}
            self._dashboard.write_histograms(values, step)

    def report(
        self,
        model: keras.Model,
        dataset: Dataset,
        train_set: Part,
        split: str,
        shown: Part,
        result: dict[str, Any],
        moved: Callable[[], object],
    ) -> None:
        """Draws what the model knows, for TensorBoard and for the report.

        Args:
            model: the selected weights, outside of any strategy.
            dataset: for the names of classes.
            train_set: what it was trained on.
            split: the name of the part that it is shown on: "test" or "validation".
            shown: that part.
            result: the content of result.json.
            moved: is called now and then.
        """
        if not self._dashboard:
            return
        with _nothing_lost():
            # It tells where it keeps its fonts when its folder is read-only, as in a container.
            logging.getLogger("matplotlib").setLevel(logging.ERROR)
            # Only now: drawing takes a second to import, and a job that only trains needs none of it.
            from trainer import gallery, predictions, report

            model_dir = Path(self._config.model_dir)
            # It takes seconds, or ten on a core that is shared, of which nothing else is said.
            _log.info("writing the report: %s", model_dir / "report.html")
            try:
                answers = predictions.predict(model, shown, split, dataset.class_names, moved, self._config.test_time_augment)
            except tf.errors.ResourceExhaustedError as error:
                # Of memory; the writers' is of the disk.
                raise MemoryError(error.message) from error
            drawn = gallery.draw(self._config, model, answers, train_set)
            moved()
            gallery.show(drawn, model, answers, self._dashboard, model_dir / "tensorboard", result["steps"])
            moved()
            report.write(model_dir, self._config, result, drawn, answers)

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.ExitStack() as closing:
                for writer in self._writers:
                    closing.callback(writer.close)
        except (OSError, tf.errors.OpError) as error:
            # What ends the job is its own story; a disk that is full now was so before.
            _log.warning("not all that is to look at could be written: %s", storage.reason_of(error))


@contextlib.contextmanager
def _nothing_lost() -> Iterator[None]:
    """Hours of training are not to be lost by what a picture cannot show; a full disk is the job's affair."""
    try:
        yield
    except (OSError, *WRITE_ERRORS):
        raise
    except Exception:
        _log.exception("the report could not be drawn; the model is not affected")
