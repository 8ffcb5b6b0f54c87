"""Keeps a job of several workers going: one failed worker ends all, and what can go on is started again."""

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from launch.chaos import SIGNALS, Fault
from launch.progress import LostTime, last_step
from launch.workers import Workers
from trainer.errors import EXIT_DEFECT, EXIT_FINISHED, EXIT_REQUEST, EXIT_STOPPED
from trainer.ports import free_ports
from trainer.signals import ONE_REQUEST_SECS

_LOOK_EVERY_SECS = 0.05
# Workers notice a lost peer within ten seconds.
_END_TOGETHER_SECS = 10.0
_SAME_END_SECS = 2.0
_FIRST_BACKOFF_SECS, _LONGEST_BACKOFF_SECS = 1.0, 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What to supervise.

    Attributes:
        command: what every worker runs.
        environments: what each worker's environment has beside TF_CONFIG.
        model_dir: the job's folder.
        max_restarts: how often all workers are started again.
        grace_period_secs: what workers take to save after a signal.
        step_timeout_secs: how long a worker may be stopped (SIGSTOP) when no other is left to notice; 0 for ever.
        faults: signals to send, by step.
        data_workers: how many processes prepare input for the workers; 0 for none.
    """

    command: Sequence[str]
    environments: Sequence[Mapping[str, str]]
    model_dir: Path
    max_restarts: int
    grace_period_secs: float
    step_timeout_secs: float
    faults: Sequence[Fault] = ()
    data_workers: int = 0


class Supervisor:
    """Runs a job to its end.

    Args:
        job: what to run.
        say: takes a line for the user.
        show: takes a worker's index and a line of its output.
    """

    def __init__(self, job: Job, say: Callable[[str], None], show: Callable[[int, str], None]) -> None:
        self._job, self._say, self._show = job, say, show
        self._faults = list(job.faults)
        self._lost = LostTime(say)
        self._asked: list[signal.Signals] = []
        self._asked_at = self._running = 0.0
        self._restarts = self._found = 0

    def run(self) -> int:
        """Starts the workers, again and again as far as allowed; returns the exit code. Call it in the main thread."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self._ask(signal.Signals(number)))
        backoff = _FIRST_BACKOFF_SECS
        self._found = last_step(self._job.model_dir)
        while True:
            before = last_step(self._job.model_dir)
            code = self._attempt()
            if code != EXIT_STOPPED or self._asked:
                break
            if self._restarts == self._job.max_restarts:
                self._say(f"stopped after {self._restarts} restarts (--max_restarts)")
                break
            self._restarts += 1
            # Who comes further each time is no crash loop.
            backoff = _FIRST_BACKOFF_SECS if last_step(self._job.model_dir) > before else min(2 * backoff, _LONGEST_BACKOFF_SECS)
            self._lost.restart()
            self._say(f"restart {self._restarts} of at most {self._job.max_restarts} in {backoff:g} s")
            self._sleep(backoff)
            if self._asked:
                break
        if summary := self._lost.summary():
            self._say(summary)
        if self._faults:
            self._say(f"chaos: did not happen, as no step was seen that far: {', '.join(map(str, self._faults))}")
        # Python gives a signal its default back before it ends: one that comes then would decide on the exit code.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        return code

    def _ask(self, number: signal.Signals) -> None:
        if not self._asked or time.monotonic() - self._asked_at > ONE_REQUEST_SECS:
            self._asked.append(number)
            self._asked_at = time.monotonic()

    def _attempt(self) -> int:
        """One start of all workers; returns the exit code of the job."""
        with self._start_data_servers() as (address, servers), self._start(address) as workers:
            while not any(workers.codes()) and None in workers.codes() and not self._asked:
                if servers and any(code is not None for code in servers.codes()):
                    self._end_without_data(workers, servers)
                    break
                self._inject(workers)
                self._end_if_all_stopped(workers)
                time.sleep(_LOOK_EVERY_SECS)
            if self._asked:
                self._pass_on(workers)
            elif any(workers.codes()):
                self._end(workers)
            self._lost.at(last_step(self._job.model_dir))
            codes = [code if code is not None else -signal.SIGKILL for code in workers.codes()]
        return _job_code(codes)

    @contextlib.contextmanager
    def _start_data_servers(self) -> Iterator[tuple[str, Workers | None]]:
        """The dispatcher and the data workers of one attempt, and the dispatcher's address; nothing where none are wanted."""
        if not self._job.data_workers:
            yield "", None
            return
        dispatcher, *ports = free_ports(1 + self._job.data_workers)
        address = f"grpc://127.0.0.1:{dispatcher}"
        server = [sys.executable, "-m", "trainer.data_server"]
        commands = [[*server, f"--port={dispatcher}"]]
        commands += [[*server, f"--port={port}", f"--dispatcher={address}", "--address=127.0.0.1"] for port in ports]
        environments: list[dict[str, str]] = [{} for _ in commands]
        with Workers(commands, environments, self._job.model_dir / "logs", lambda *_: None, "data") as servers:
            yield address, servers

    def _end_without_data(self, workers: Workers, servers: Workers) -> None:
        """A data server has ended: what it had prepared is lost, and the workers would wait for it."""
        ended = [(index, code) for index, code in enumerate(servers.codes()) if code is not None]
        self._lost.fault()
        self._say("; ".join(f"data server {index} {_words(code)}" for index, code in ended) + ": ending all")
        workers.signal(signal.SIGTERM)
        workers.wait(self._job.grace_period_secs + _END_TOGETHER_SECS, lambda: len(self._asked) > 1)

    def _start(self, data_service: str) -> Workers:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(len(self._job.environments))]
        environments = [
            {
                **environment,
                "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}),
            }
            for index, environment in enumerate(self._job.environments)
        ]
        # The run in the folder is then this job's own, whatever it was to be.
        again = ["--resume"] if self._restarts else []
        command = [*self._job.command, *([f"--data_service={data_service}"] if data_service else []), *again]
        return Workers([command] * len(environments), environments, self._job.model_dir / "logs", self._show)

    def _inject(self, workers: Workers) -> None:
        step = last_step(self._job.model_dir)
        self._lost.at(step)
        # A finished job, of which nothing is done again, stands at its last step.
        if self._faults and step >= self._faults[0].step and step != self._found:
            fault = self._faults.pop(0)
            self._say(f"chaos: {fault}, at step {step}")
            self._lost.fault()
            workers.signal(SIGNALS[fault.action], fault.worker)

    def _end_if_all_stopped(self, workers: Workers) -> None:
        """Who is stopped cannot notice that the others are."""
        if not workers.all_stopped():
            self._running = time.monotonic()
        elif self._job.step_timeout_secs and time.monotonic() - self._running > self._job.step_timeout_secs:
            self._say(f"all workers have been stopped (SIGSTOP) for {self._job.step_timeout_secs:g} s: killed")
            workers.signal(signal.SIGKILL)

    def _end(self, workers: Workers) -> None:
        """One has failed: the others end by themselves, or are ended."""
        failed = [(index, code) for index, code in enumerate(workers.codes()) if code]
        self._lost.fault()
        self._say("; ".join(f"worker {index} {_words(code)}" for index, code in failed) + ": ending all")
        refused = next((index for index, code in failed if code == EXIT_REQUEST), None)
        if refused is not None:
            self._say(f"worker {refused} says: {workers.last_line(refused)}")
        # What one refuses the others mostly do, too, and then there is nothing to save.
        if any(code in (EXIT_DEFECT, EXIT_REQUEST) for _, code in failed) and not workers.wait(_SAME_END_SECS):
            workers.signal(signal.SIGTERM)
        if not workers.wait(_END_TOGETHER_SECS, lambda: len(self._asked) > 1):
            running = [str(index) for index, code in enumerate(workers.codes()) if code is None]
            self._say(f"worker {', '.join(running)} did not end within {_END_TOGETHER_SECS:g} s: killed")

    def _pass_on(self, workers: Workers) -> None:
        """The user's signal goes to all workers; a second one, too, and ends them at once."""
        first = self._asked[0]
        self._say(f"{first.name}: passed on to the workers; a second one stops them without saving")
        workers.signal(first)
        if workers.wait(self._job.grace_period_secs + _END_TOGETHER_SECS, lambda: len(self._asked) > 1):
            workers.signal(signal.SIGTERM)
            workers.wait(1.0)

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._asked:
            time.sleep(_LOOK_EVERY_SECS)


def _words(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def _job_code(codes: Sequence[int]) -> int:
    """What the job's end is, given each worker's: what cannot be mended by a restart counts first."""
    for final in (EXIT_REQUEST, EXIT_DEFECT):
        if final in codes:
            return final
    if not any(codes):
        return EXIT_FINISHED
    # Ended by a signal, or because of a peer that was.
    return EXIT_STOPPED if all(code <= 0 or code == EXIT_STOPPED for code in codes) else EXIT_DEFECT
