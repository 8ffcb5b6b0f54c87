"""The job's numbers for Prometheus: `--metrics_port`. Without authentication, so on this machine alone unless asked otherwise."""

import numpy as np
from prometheus_client import CollectorRegistry, Gauge, Histogram, start_http_server

from trainer.errors import RequestError
from trainer.metrics import Record

_PREFIX = "digitfleet_"
# Seconds: from a small network on a large GPU to a large one on a small CPU.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_GAUGES = {
    "loss": "Mean loss of the examples of the last record, in nats.",
    "accuracy": "Share of right answers in the last record, from 0 to 1.",
    "learning_rate": "Learning rate of the last step.",
    "gradient_norm": "Norm of the gradient, mean over the last steps.",
    "images_per_second": "Examples trained in a second, over all replicas.",
    "memory_mib": "Memory of the chief, in MiB.",
}


class Endpoint:
    """A `metrics.Writer` that answers to `GET /metrics` until it is closed.

    Args:
        host: address to listen on.
        port: port to listen on.
        restarts: how often the run was started before.
        total_steps: the last step.

    Raises:
        RequestError: the port cannot be had.
    """

    def __init__(self, host: str, port: int, restarts: int, total_steps: int) -> None:
        registry = CollectorRegistry()
        self._step = Gauge(f"{_PREFIX}step", "The last step.", registry=registry)
        self._epoch = Gauge(f"{_PREFIX}epoch", "Passes over the training examples.", registry=registry)
        self._gauges = {name: Gauge(_PREFIX + name, text, ["split"], registry=registry) for name, text in _GAUGES.items()}
        self._seconds = Histogram(f"{_PREFIX}step_seconds", "Duration of a step.", buckets=_BUCKETS, registry=registry)
        Gauge(f"{_PREFIX}restarts", "How often the run was started before.", registry=registry).set(restarts)
        Gauge(f"{_PREFIX}total_steps", "The step that training ends at.", registry=registry).set(total_steps)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except (OSError, UnicodeError) as error:
            given, reason = f"--metrics_port={port}, --metrics_host={host}", getattr(error, "strerror", None) or error
            raise RequestError(f"{given}: cannot listen there ({reason}): give others") from error

    def write(self, record: Record) -> None:
        """Shows the record's numbers."""
        # The weights that are tested may be older ones.
        if record["split"] != "test":
            self._step.set(record["step"])
            self._epoch.set(record["epoch"])
        for name, gauge in self._gauges.items():
            if record.get(name) is not None:
                gauge.labels(record["split"]).set(record[name])

    def observe(self, seconds: np.ndarray) -> None:
        """Counts the durations of steps, in seconds."""
        for value in seconds.tolist():
            self._seconds.observe(value)

    def close(self) -> None:
        """Stops answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
