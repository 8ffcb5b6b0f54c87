"""What goes on while a user watches: the logs of all workers, and the way to TensorBoard."""

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

from launch import status
from launch.kubectl import Kubectl, KubectlError, Object, explain
from trainer.errors import JobError

_LOOK_EVERY_SECS = 2.0
# Of looks that fail one after the other: an API server that is started anew does not end the watch.
_MOST_FAILURES = 15
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


class _Log:
    """What one pod prints, shown while it comes, from the line after `last` on.

    Attributes:
        last: when the last line that was shown was written, by the node's clock; empty before there is one.
        of_ended: whether the pod had ended when it was opened, so that nothing comes after it.
    """

    def __init__(self, command: list[str], index: int, show: Callable[[str], None], last: str, *, of_ended: bool) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        self.last, self.of_ended, self.has_ended = last, of_ended, False
        self._thread = threading.Thread(target=self._read, args=(index, show), daemon=True)
        self._thread.start()

    def _read(self, index: int, show: Callable[[str], None]) -> None:
        with self.process:
            for line in self.process.stdout or ():
                written, _, text = line.rstrip().partition(" ")
                if not _TIME.match(written):
                    show(f"[{index}] {line.rstrip()}")  # kubectl's own.
                elif _as_sorted(written) > _as_sorted(self.last):
                    self.last = written
                    show(f"[{index}] {text}")
        self.has_ended = True

    def join(self) -> None:
        self._thread.join()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class _Logs:
    """The logs of a job's pods, by the pods' uids: some operators give a new pod the name of the old one."""

    def __init__(self, cluster: Kubectl, container: str, tail: int, *, follow: bool, show: Callable[[str], None]) -> None:
        self._cluster, self._follow, self._show = cluster, follow, show
        self._options = [f"--container={container}", "--timestamps", *(["--follow"] if follow else [])]
        self._tail = tail
        self._logs: dict[str, _Log] = {}

    def look(self, pods: list[Object]) -> None:
        """Opens what there is to read by now, and again what has broken off before its pod had ended."""
        for pod in pods:
            phase, uid = pod.get("status", {}).get("phase"), pod["metadata"]["uid"]
            log = self._logs.get(uid)
            if phase not in ("Running", "Succeeded", "Failed"):
                continue
            if log and (not log.has_ended or log.of_ended):
                continue
            last = log.last if log else ""
            since = f"--since-time={last}" if last else f"--tail={self._tail}"
            command = self._cluster.command("logs", pod["metadata"]["name"], *self._options, since)
            self._logs[uid] = _Log(command, status.index_of(pod), self._show, last, of_ended=phase != "Running")
            if not self._follow:
                self._logs[uid].join()

    @property
    def any(self) -> bool:
        """Whether there was anything to read."""
        return bool(self._logs)

    def join(self) -> None:
        for log in self._logs.values():
            log.join()

    def end(self) -> None:
        for log in self._logs.values():
            log.end()


def _as_sorted(written: str) -> tuple[str, str]:
    """A time of `kubectl logs --timestamps`, whose fractions have as many digits as they need."""
    whole, _, fraction = written.rstrip("Z").partition(".")
    return whole, fraction.ljust(9, "0")


def logs(
    cluster: Kubectl, job: Object, *, follow: bool, tail: int, show: Callable[[str], None], say: Callable[[str], None]
) -> None:
    """Shows what all workers print, each line with its worker's number in front, as launch.local does.

    Args:
        cluster: where the job is.
        job: what trains.
        follow: go on until the job ends, and with pods that come later, which `kubectl logs --follow` does not.
        tail: lines of each pod to begin with; -1: all.
        show: takes a line.
        say: takes a word about the job itself, such as why its pods do not run.

    Raises:
        JobError: the job that was followed has failed, or is gone.
    """
    name = job["metadata"]["name"]
    opened = _Logs(cluster, status.container_name(job), tail, follow=follow, show=show)
    failures, told = 0, ""
    with _stopped_by_ctrl_c(opened.end):
        while True:
            try:
                pods = status.pods_of(cluster, job)
                opened.look(pods)
                report = status.look(cluster, job, pods)
                failures = 0
                if not follow or report.state in ("complete", "failed"):
                    break
                if report.state == "waiting" and report.why != told:
                    told = report.why
                    say(f"{name} waits: {told}")
                time.sleep(_LOOK_EVERY_SECS)
                job = status.refresh(cluster, job)
            except KubectlError:
                failures += 1
                if failures > (_MOST_FAILURES if follow else 0):
                    raise
                time.sleep(_LOOK_EVERY_SECS)
            if not job:
                raise JobError(f"{name} is gone")
        opened.join()
    if not follow and not opened.any and report.state == "waiting":
        say(f"{name} waits, and has printed nothing: {report.why}")
    if follow and report.state == "failed":
        raise JobError(f"{name} failed: {report.why}")


def forward(cluster: Kubectl, service: str, port: int, say: Callable[[str], None]) -> None:
    """Keeps a port of this machine connected with a service, until Ctrl-C.

    Raises:
        KubectlError: the connection cannot be made, or has ended.
    """
    command = cluster.command("port-forward", f"service/{service}", f"{port}:6006")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = []
    with _stopped_by_ctrl_c(process.kill):
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("Forwarding from 127.0.0.1"):
                say(f"TensorBoard: http://localhost:{port} (Ctrl-C ends the connection, not TensorBoard)")
        process.wait()
    raise explain("".join(line for line in lines if not line.startswith("Forwarding")))


@contextlib.contextmanager
def _stopped_by_ctrl_c(end: Callable[[], None]) -> Iterator[None]:
    """Calls `end` however the block ends; Ctrl-C is no defect."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        end()
