"""A job of digitfleet on a cluster whose pods run: how far it is, and what it costs to disturb it."""

import dataclasses
import json
import re
import time
from collections.abc import Callable

from namespaces import Namespace, wait_for

# Enough steps that whatever disturbs a job comes before its end, and several checkpoints before that.
STEPS = 800
FLAGS = (
    "--preset=fast", "--precision=float32", "--deterministic", "--global_batch_size=32", "--steps_per_loop=10",
    "--checkpoint_every_steps=50", f"--max_steps={STEPS}",
)  # fmt: skip
_INDEX = "batch.kubernetes.io/job-completion-index"
_GOING_ON = re.compile(r"going on from step (\d+)\n(?:.*\n)*step +\d+ .*train")
_WITHIN_SECS = 300
# Looking costs a second of a core, which the workers may need.
_LOOK_EVERY_SECS = 3


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What a disturbance has cost.

    Attributes:
        seconds: until the first steps after it.
        lost: steps that were made again.
    """

    seconds: float
    lost: int

    def row(self, what: str) -> str:
        """As a row of the table in docs/kubernetes.md."""
        return f"| {what} | {self.seconds:.0f} s | {self.lost} |"


class Job:
    """A job in a namespace.

    Args:
        namespace: where TensorBoard runs, too: the volume is read through its pod.
        name: of the job.
        image: for its nodes.
    """

    def __init__(self, namespace: Namespace, name: str, image: str) -> None:
        self.namespace, self.name, self._image = namespace, name, image

    def submit(self, *flags: str, options: tuple[str, ...] = ("--overlay=cpu",)) -> None:
        self.namespace.works("submit", f"--name={self.name}", f"--image={self._image}", *options, "--", *flags)

    def delete(self) -> None:
        self.namespace.works("delete", f"--name={self.name}")

    def report(self) -> dict:
        return self.namespace.report(self.name)

    def wait_for_state(self, state: str) -> dict:
        """The report, once it is that; a job that ends otherwise is a failure at once."""

        def look() -> dict | None:
            report = self.report()
            usual = report["state"] in (state, "waiting", "running") and time.monotonic() < deadline
            assert usual, f"{report}\n{self.logs()}"
            return report if report["state"] == state else None

        deadline = time.monotonic() + _WITHIN_SECS
        return wait_for(look, 2 * _WITHIN_SECS, _LOOK_EVERY_SECS)

    def pod(self, index: int) -> dict | None:
        """The newest pod of a worker."""
        pods = [pod for pod in self.namespace.pods(self.name) if pod["metadata"]["labels"][_INDEX] == str(index)]
        return pods[-1] if pods else None

    def logs(self) -> str:
        return self.namespace.run("logs", f"--name={self.name}").stdout

    def read(self, file: str) -> str:
        """A file of the run; empty if there is none yet, or nobody who could read it now."""
        path = f"/data/runs/{self.name}/{file}"
        done = self.namespace.kubectl("exec", "deployment/digitfleet-tensorboard", "--", "cat", path, check=False)
        return done if done.startswith("{") else ""

    def result(self) -> dict:
        return json.loads(wait_for(lambda: self.read("result.json")))

    def step(self) -> int:
        """The last one in metrics.jsonl, whose last line may be half written."""
        found = re.findall(r'^{"step": (\d+), .*"split": "train"', self.read("metrics.jsonl"), re.MULTILINE)
        return int(found[-1]) if found else 0

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: self.step() >= step, _WITHIN_SECS, 1)

    def recovery(self, disturb: Callable[[], object], resume: Callable[[], object] | None = None) -> Recovery:
        """Disturbs the job in the middle of its training, and waits until it goes on.

        Args:
            disturb: what happens to it.
            resume: what lets it go on, where that takes a hand: then the seconds count from there.
        """
        self.wait_for_step(120)
        before = {pod["metadata"]["uid"] for pod in self.namespace.pods(self.name)}
        reached, started = self.step(), time.monotonic()
        disturb()
        if resume:
            reached, started = max(reached, self.step()), time.monotonic()
            resume()
        deadline = started + _WITHIN_SECS
        while True:
            chief = self.pod(0)
            if chief is None or chief["metadata"]["uid"] in before:
                # No other chief writes yet.
                reached = max(reached, self.step())
            elif found := _GOING_ON.search(self.namespace.kubectl("logs", chief["metadata"]["name"], check=False)):
                return Recovery(time.monotonic() - started, max(reached - int(found[1]), 0))
            assert time.monotonic() < deadline, f"{self.report()}\n{self.logs()}"
            time.sleep(0.5)
