"""Where a step's time goes, and what to do about it."""

import dataclasses

import numpy as np

from trainer.steps import INPUT_SECS, STEP_SECS

# Shares of a step from which on it is worth doing something.
_MUCH_INPUT = 0.1
_MUCH_EXCHANGE = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Means over steps and workers, in milliseconds.

    Attributes:
        step_ms: from the end of one step to the end of the next.
        input_wait_ms: until its batch was there; None where that was not measured (`--deterministic`).
        all_reduce_ms: what exchanging gradients and statistics takes by itself, as it was timed at the start.
    """

    step_ms: float
    input_wait_ms: float | None
    all_reduce_ms: float

    @classmethod
    def of(cls, rows: np.ndarray, exchange_secs: float) -> "StepTimes":
        """The times in rows of `steps.make_train_loop`, float64 [steps, TRAIN_COLUMNS], added up over workers."""
        step, wait = rows[:, STEP_SECS].mean(), rows[:, INPUT_SECS].mean()
        # Timed alone, an exchange may seem to take longer than the rest of a step that overlaps with it.
        exchange = min(exchange_secs, step - np.nan_to_num(wait))
        return cls(step_ms=1e3 * step, input_wait_ms=None if np.isnan(wait) else 1e3 * wait, all_reduce_ms=1e3 * exchange)

    @property
    def compute_ms(self) -> float:
        """The rest: forward and backward pass, and the update."""
        return self.step_ms - (self.input_wait_ms or 0) - self.all_reduce_ms

    def record(self) -> dict[str, float | None]:
        """All of them, by name."""
        return {**dataclasses.asdict(self), "compute_ms": self.compute_ms}

    def verdict(self) -> str:
        """A few sentences for people."""
        wait, exchange = (self.input_wait_ms or 0) / self.step_ms, self.all_reduce_ms / self.step_ms
        unknown = self.input_wait_ms is None
        parts = [] if unknown else [f"{wait:.1%} of the step waits for input"]
        if self.all_reduce_ms:
            parts.append(f"about {exchange:.1%} exchanges gradients (timed alone at the start)")
        rest = "computes or waits for input, which --deterministic does not tell apart" if unknown else "computes"
        text = f"{self.step_ms:.1f} ms a step: {', '.join([*parts, f'{self.compute_ms / self.step_ms:.1%} {rest}'])}."
        if wait > _MUCH_INPUT:
            advice = (
                "Input is too slow. Steps of a few milliseconds: a larger --global_batch_size. Records on disk: trainer.prepare "
                "--encoding raw, --input_pipeline memory if they fit, or --data_service. In any case: more cores."
            )
        elif exchange > _MUCH_EXCHANGE:
            advice = "Exchanging takes much of it: a larger --global_batch_size or fewer replicas would use the devices better."
        elif unknown:
            advice = ""
        else:
            advice = "Input keeps up; the rest is up to the network, --precision=auto, --jit_compile and --global_batch_size."
        return f"{text} {advice}".strip()
