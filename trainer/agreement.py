"""Do all replicas still hold the same weights? Each puts a checksum into its own place of a vector that is summed anyway."""

import zlib
from collections import Counter

import numpy as np

from trainer.errors import InconsistentError, Stopped
from trainer.sources import Cluster
from trainer.steps import State


class Agreement:
    """Checksums of this worker's replicas, and the comparison of all replicas'.

    Args:
        state: the variables.
        num_replicas: over all workers.
        cluster: the workers; replicas are numbered worker after worker.
    """

    def __init__(self, state: State, num_replicas: int, cluster: Cluster) -> None:
        self._state, self._num_replicas = state, num_replicas
        self._workers = cluster.workers or ("this machine",)
        self._per_worker = num_replicas // len(self._workers)
        self._first = cluster.index * self._per_worker

    def own_places(self, values: list[int] | int) -> np.ndarray:
        """Values of this worker's replicas, or one for all of them, in their places, float64 [replicas]; the sum has all."""
        places = np.zeros([self._num_replicas])
        places[self._first : self._first + self._per_worker] = values
        return places

    def checksums(self) -> np.ndarray:
        """CRC-32 of each replica's variables, optimizer's included, in its place; whole numbers below 2**32, exact in float64."""
        checksums = [0] * self._per_worker
        for variable in (*self._state.model.variables, *self._state.optimizer.variables, *self._state.inference.variables):
            replicas = getattr(variable.value, "values", [variable.value])
            for index, replica in enumerate(replicas):
                # A view of a tensor is not always contiguous, and bfloat16 has no buffer; to copy takes longer than the sum.
                content = np.ascontiguousarray(replica.numpy()).view(np.uint8).data
                checksums[index] = zlib.crc32(content, checksums[index])
        return self.own_places(checksums)

    def check_checksums(self, checksums: np.ndarray, step: int) -> None:
        """Raises `InconsistentError` where a replica differs from most.

        Args:
            checksums: float64 [replicas], of all.
            step: for the message.
        """
        values = [int(value) for value in np.rint(checksums)]
        usual, count = Counter(values).most_common(1)[0]
        if 2 * count <= len(values):
            groups = {value: [self._place(index) for index, found in enumerate(values) if found == value] for value in values}
            told = "; ".join(f"{value:08x} on {', '.join(places)}" for value, places in groups.items())
            raise InconsistentError(
                f"at step {step} the replicas have different weights, no more than half of them the same (checksum {told}): "
                "a fault of memory or of the network; nothing of this step is saved, look at these machines, then start again"
            )
        other = [index for index, value in enumerate(values) if value != usual]
        if other:
            places = ", ".join(self._place(index) for index in other)
            raise InconsistentError(
                f"at step {step} the weights of {places} are not those of the other replicas (checksum {values[other[0]]:08x}, "
                f"others {usual:08x}): a fault of memory or of the network; nothing of this step is saved, look at that machine, "
                "then start again"
            )

    def check_steps(self, steps: np.ndarray, model_dir: str) -> None:
        """Raises `Stopped` if the workers have not restored the same step: a shared folder may show new files late.

        Args:
            steps: float64 [replicas], of all.
            model_dir: for the message.
        """
        values = [int(value) for value in np.rint(steps)]
        for index, value in enumerate(values):
            if value != values[0]:
                raise Stopped(
                    f"{self._place(index)} found the checkpoint of step {value} in --model_dir={model_dir}, {self._place(0)} "
                    f"that of step {values[0]}: the folder does not show all workers the same, start again"
                )

    def _place(self, replica: int) -> str:
        worker = replica // self._per_worker
        name = f"worker {worker} ({self._workers[worker]})"
        return name if self._per_worker == 1 else f"replica {replica} on {name}"
