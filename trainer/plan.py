"""Numbers that follow from the configuration, the data and the topology; computed once, logged at the start."""

import dataclasses
import math
from fractions import Fraction

from trainer.config import Config
from trainer.errors import RequestError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How many examples and steps there are, and how a global batch is divided.

    Training reads one endless stream of positions: epoch after epoch, each in an order of its own. A batch may hold the
    end of one epoch and the start of the next, so that every batch is full and no example is dropped.
    """

    num_examples: int
    global_batch_size: int
    num_replicas: int
    total_steps: int

    @property
    def per_replica_batch_size(self) -> int:
        """Examples of one replica in one step."""
        return self.global_batch_size // self.num_replicas

    def epoch_end(self, epoch: int) -> int:
        """The step after which `epoch` epochs have been seen whole."""
        return -(-epoch * self.num_examples // self.global_batch_size)

    def epochs_at(self, step: int) -> float:
        """Epochs seen after `step` steps."""
        return step * self.global_batch_size / self.num_examples

    def next_epoch_end(self, step: int) -> int:
        """The first end of an epoch after `step`."""
        return self.epoch_end(step * self.global_batch_size // self.num_examples + 1)

    def is_epoch_end(self, step: int) -> bool:
        """Whether an epoch has ended within the step before."""
        return step > 0 and self.next_epoch_end(step - 1) == step

    def describe(self, num_validated: int = 0) -> str:
        """One line for the log; `num_validated` examples are kept for validation."""
        validated = f", validated on {num_validated}" if num_validated else ""
        return (
            f"{self.total_steps} steps of {self.global_batch_size} = {self.num_replicas} x {self.per_replica_batch_size} "
            f"examples, {self.epochs_at(self.total_steps):.2f} epochs of {self.num_examples}{validated}; "
            "a batch may run from one epoch into the next, no example is dropped"
        )


def check_replicas(config: Config, num_replicas: int) -> None:
    """Whether so many replicas can train: what is known before the data is.

    Raises:
        RequestError: the global batch does not divide, or XLA cannot compile what is asked for.
    """
    if config.jit_compile and config.sync_batch_norm and config.model != "cnn" and num_replicas > 1:
        raise RequestError(
            "--jit_compile: XLA cannot compile synchronised batch normalisation over several replicas (tf.distribute's "
            "merge_call fails inside a nested function): add --nosync_batch_norm"
        )
    batch, parts = config.global_batch_size, num_replicas * config.gradient_accumulation_steps
    if batch % parts:
        lower = batch // parts * parts
        fitting = " or ".join(str(size) for size in (lower, lower + parts) if size)
        accumulation = f" x {config.gradient_accumulation_steps} accumulated parts" if parts > num_replicas else ""
        raise RequestError(f"--global_batch_size={batch} does not divide by {num_replicas} replicas{accumulation}: use {fitting}")


def make_plan(config: Config, num_examples: int, num_replicas: int) -> Plan:
    """The plan of a job.

    Raises:
        RequestError: as `check_replicas`; the global batch is larger than the training set; or training ends within the
            warm-up, or before the steps that are to be profiled.
    """
    batch = config.global_batch_size
    if num_replicas > num_examples:
        raise RequestError(f"{num_replicas} replicas are more than the {num_examples} training examples: use fewer")
    check_replicas(config, num_replicas)
    if batch > num_examples:
        raise RequestError(f"--global_batch_size={batch} is more than the {num_examples} training examples: give no more")
    steps = math.ceil(Fraction(str(config.epochs)) * num_examples / batch)
    if config.warmup_steps >= steps:
        raise RequestError(
            f"--warmup_steps={config.warmup_steps}: training ends at step {steps}, before the learning rate is warm: give fewer"
        )
    # May well end within the warm-up: to try out how a job begins.
    if config.max_steps:
        steps = min(steps, config.max_steps)
    if config.profile_range and config.profile_range[0] > steps:
        raise RequestError(f"--profile_steps={config.profile_steps}: training ends at step {steps}: give earlier ones")
    return Plan(num_examples=num_examples, global_batch_size=batch, num_replicas=num_replicas, total_steps=steps)
