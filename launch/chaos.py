"""Faults on purpose: `kill:1@step=200,stop:0@step=350,term:*@step=500`, for users to see for themselves what a job survives."""

import dataclasses
import re
import signal

from trainer.errors import RequestError

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A signal for one worker, or for all with None, once training has come to `step`."""

    action: str
    worker: int | None
    step: int

    def __str__(self) -> str:
        return f"{self.action}:{'*' if self.worker is None else self.worker}@step={self.step}"


def parse(text: str, num_workers: int) -> list[Fault]:
    """The faults in the order of their steps.

    Raises:
        RequestError: the text is malformed, or there is no such worker.
    """
    faults = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(rf"\s*({'|'.join(SIGNALS)}):(\d+|\*)@step=(\d+)\s*", part)
        if not match:
            raise RequestError(
                f"--chaos={part}: expected ACTION:WORKER@step=N, such as kill:1@step=200, with {', '.join(SIGNALS)}"
            )
        worker = None if match[2] == "*" else int(match[2])
        if worker is not None and worker >= num_workers:
            raise RequestError(f"--chaos={part}: there is no worker {worker}, the last one is {num_workers - 1}")
        faults.append(Fault(match[1], worker, int(match[3])))
    return sorted(faults, key=lambda fault: fault.step)
