"""The same job on Kubernetes, with kubectl as the way there.

    python -m launch.k8s render --workers 4 -- --preset fast           # the manifests; needs no cluster
    python -m launch.k8s submit --name digits --image REGISTRY/digitfleet:1-gpu --workers 4 --gpus_per_worker 8 -- --preset best
    python -m launch.k8s status --name digits
    python -m launch.k8s logs --name digits --follow
    python -m launch.k8s tensorboard
    python -m launch.k8s delete --name digits

What follows `--` are flags of trainer.task. A job of the same name goes on where the one before has stopped: its folder on the
volume is /data/runs/NAME.
"""

import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch import follow, manifests, status, submission, workload
from launch.kubectl import Kubectl
from launch.rendering import namespace_of, render
from launch.request import COMPONENTS, Request, check_names
from trainer import cli
from trainer.errors import RequestError

_PROGRAM = "launch.k8s"
# Of a ConfigMap, with room for its keys.
_MOST_TRIAL_BYTES = 900_000


def _define(values: flags.FlagValues, command: str) -> None:
    """Adds the flags of a command."""
    own = {"flag_values": values, "module_name": sys.argv[0]}
    if command in ("render", "submit"):
        flags.DEFINE_string(
            "overlay", "multi-worker", f"{', '.join(manifests.overlays())}, or the path of an overlay of yours (./mine).", **own
        )
        flags.DEFINE_list("components", [], f"Further components, separated by commas: {', '.join(COMPONENTS)}.", **own)
        flags.DEFINE_string("image", "", "Image of the job, as the cluster's nodes pull it. Empty: the overlay's.", **own)
        flags.DEFINE_integer("workers", None, "Pods; of a sweep, trials at a time. Unset: the overlay's.", lower_bound=1, **own)
        flags.DEFINE_integer("gpus_per_worker", None, "GPUs of each pod. Unset: the overlay's.", lower_bound=0, **own)
        unset = "Empty: the overlay's, or with --gpus_per_worker"
        flags.DEFINE_string("cpus_per_worker", "", f"Cores of each pod, such as 8 or 500m. {unset} four for each GPU.", **own)
        flags.DEFINE_string("memory_per_worker", "", f"Memory of each pod, such as 16Gi. {unset} 8 GiB for each GPU.", **own)
        flags.DEFINE_string("queue", "", "LocalQueue of Kueue to wait in.", **own)
        flags.DEFINE_string(
            "storage", "", "Existing claim (ReadWriteMany), gs://BUCKET in its place, or s3://BUCKET beside it for data.", **own
        )
        flags.DEFINE_string("trials", "", "Of a sweep: file with the flags of one trial a line.", **own)
    if command == "render":
        flags.DEFINE_string("output", "", "New folder for a file of each object. Empty: standard output.", **own)
    if command == "submit":
        flags.DEFINE_boolean("replace", False, "End a job of this name first (it saves), and go on in its place.", **own)
        flags.DEFINE_boolean("dry_run", False, "Show what would change, and let the cluster check it; change nothing.", **own)
    if command == "status":
        flags.DEFINE_enum("format", "text", ["text", "json"], "text for people, json for programs.", **own)
    if command == "logs":
        flags.DEFINE_boolean("follow", False, "Go on until the job ends, with the pods that come meanwhile.", **own)
        flags.DEFINE_integer("tail", -1, "Lines of each pod to begin with. -1: all.", lower_bound=-1, **own)
    if command == "tensorboard":
        flags.DEFINE_integer("port", 6006, "Port on this machine.", lower_bound=1, upper_bound=65535, **own)
    default = "" if command == "status" else "digitfleet"
    if command != "tensorboard":
        flags.DEFINE_string("name", default, "Name of the job" + ("; empty: all of them." if command == "status" else "."), **own)
    flags.DEFINE_string("namespace", "", "Namespace. Empty: the context's.", short_name="n", **own)
    if command != "render":
        flags.DEFINE_string("context", "", "Context of the kubeconfig. Empty: the current one.", **own)


def _request(task: Sequence[str], namespace: str) -> Request:
    values = flags.FLAGS
    return Request(
        name=values.name,
        namespace=namespace,
        image=values.image,
        workers=values.workers,
        gpus_per_worker=values.gpus_per_worker,
        cpus_per_worker=values.cpus_per_worker,
        memory_per_worker=values.memory_per_worker,
        overlay=values.overlay,
        components=tuple(filter(None, values.components)),
        queue=values.queue,
        storage=values.storage,
        trials=_trials(values.trials),
        task=tuple(task),
    )


def _tell_of_example() -> None:
    """The overlay that is here has trials that show what a trial is."""
    if flags.FLAGS.overlay == "sweep" and not flags.FLAGS.trials:
        _say("no --trials: these are the example's four learning rates; give a file with the flags of a trial a line")


def _trials(path: str) -> tuple[tuple[str, ...], ...]:
    if not path:
        return ()
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise RequestError(f"--trials={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"--trials={path} is no text: expected flags of trainer.task, one trial a line") from error
    trials = tuple(tuple(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if sum(map(len, lines)) > _MOST_TRIAL_BYTES:
        raise RequestError(
            f"--trials={path} is longer than {_MOST_TRIAL_BYTES} characters, which Kubernetes takes at once: split it"
        )
    if not trials:
        raise RequestError(f"--trials={path} has no trial: expected flags of trainer.task, one trial a line")
    return trials


def _cluster(namespace: str = "") -> Kubectl:
    values = flags.FLAGS
    check_names(values.name if "name" in values else "", values.namespace)
    cluster = Kubectl(values.context, values.namespace or namespace, _say)
    cluster.check()
    return cluster


def _render(task: list[str]) -> None:
    objects = render(_request(task, flags.FLAGS.namespace))
    _tell_of_example()
    if not flags.FLAGS.output:
        cli.show(manifests.dump(objects).rstrip("\n"))
        return
    folder = Path(flags.FLAGS.output)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise RequestError(f"--output={folder} is not empty: give a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        for found in objects:
            (folder / f"{found['kind'].lower()}-{found['metadata']['name']}.yaml").write_text(manifests.dump([found]))
    except OSError as error:
        raise RequestError(f"--output={folder} cannot be written: {error}") from error
    _say(f"{len(objects)} objects in {folder}; kubectl apply -f {folder}")


def _submit(task: list[str]) -> None:
    values = flags.FLAGS
    # Before the cluster is asked: a mistake is told at once, and without one.
    cluster = _cluster(namespace_of(render(_request(task, values.namespace))))
    _tell_of_example()
    request = _request(task, cluster.namespace)
    made = submission.submit(cluster, request, replace=values.replace, dry_run=values.dry_run, show=cli.show, say=_say)
    for found in made:
        _say(f"created {found['kind']} {found['metadata']['name']}")
    if not made:
        return
    # Without one, a TrainJob has its runtime's.
    image = workload.main_container(workload.find_workload(made)).get("image", "digitfleet:gpu")
    if "/" not in image:
        _say(f"the image {image} names no registry: it has to be on the nodes already; see --image")
    where = f"--name {values.name} --namespace {cluster.namespace}"
    _say(f"see: python -m launch.k8s status {where}; python -m launch.k8s logs {where} --follow")


def _status(task: list[str]) -> None:
    _expect_no_task(task)
    cluster = _cluster()
    found = [status.find(cluster, flags.FLAGS.name)] if flags.FLAGS.name else status.find_all(cluster)
    reports = [status.read(cluster, one) for one in found]
    if flags.FLAGS.format == "json":
        cli.show(json.dumps([dataclasses.asdict(report) for report in reports]))
        return
    if not reports:
        cli.show(f"no jobs in the namespace {cluster.namespace}")
    for report in reports:
        _print_status(report)


def _print_status(report: status.Status) -> None:
    running = sum(worker.phase == "Running" for worker in report.workers)
    why = f": {report.why}" if report.why else ""
    again = f", {report.restarts} times started again" if report.restarts else ""
    done = f", {report.done} done" if report.done else ""
    cli.show(f"{report.name}: {report.kind}, {report.state}, {running} of {report.num_workers} workers running{done}{again}{why}")
    console = Console(width=None if sys.stdout.isatty() else 240)
    table = Table(box=None, pad_edge=False)
    for heading in ("worker", "phase", "restarts", "node", "why"):
        table.add_column(heading)
    for worker in report.workers:
        table.add_row(str(worker.index), worker.phase, str(worker.restarts), worker.node or "-", escape(worker.why))
    if report.workers:
        with console.capture() as drawn:
            console.print(table)
        cli.show(drawn.get().rstrip("\n"))
    if report.progress:
        progress = report.progress
        speed = "{images_per_second:.0f} images/s  {seconds_left:.0f} s left" if progress["images_per_second"] else "compiling"
        cli.show(f"step {progress['step']:.0f}  epoch {progress['epoch']:.2f}  {speed.format(**progress)}")
    if report.result:
        cli.show(report.result)


def _logs(task: list[str]) -> None:
    _expect_no_task(task)
    cluster, values = _cluster(), flags.FLAGS
    found = status.find(cluster, values.name)
    follow.logs(cluster, found, follow=values.follow, tail=values.tail, show=_show, say=_say)


def _show(line: str) -> None:
    with _printing:
        print(line, flush=True)


def _tensorboard(task: list[str]) -> None:
    _expect_no_task(task)
    cluster = _cluster()
    service = "digitfleet-tensorboard"
    if not cluster.get("deployments.apps", service):
        raise RequestError(
            f"there is no TensorBoard in the namespace {cluster.namespace}: submit with --components tensorboard, or python -m "
            f"launch.k8s render --overlay tensorboard --namespace {cluster.namespace} --image IMAGE | kubectl apply -f -"
        )
    follow.forward(cluster, service, flags.FLAGS.port, _say)


def _delete(task: list[str]) -> None:
    _expect_no_task(task)
    cluster, name = _cluster(), flags.FLAGS.name
    leftovers = submission.belonging(cluster, name)
    try:
        found = [status.find(cluster, name)]
    except RequestError:
        # A job that was deleted by other means, or after its week, leaves what guarded it.
        if not leftovers:
            raise
        found = []
    if found:
        _say(f"ending {name}: its pods save their state")
    submission.end(cluster, [*found, *leftovers])
    place = submission.place_of(found[0]) if found else ""
    _say(f"deleted {name}" + (f"; its run stays: {place}" if place else ""))


def _expect_no_task(task: list[str]) -> None:
    if task:
        name = "" if task[0].startswith("-") else f"; a job's name goes as --name {task[0]}"
        raise RequestError(f"unexpected argument {task[0]!r}: flags of the task go with render and submit{name}")


def _say(text: str) -> None:
    with _printing:
        print(f"{_PROGRAM}: {text}", file=sys.stderr, flush=True)


_printing = threading.Lock()


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "render": _render,
    "submit": _submit,
    "status": _status,
    "logs": _logs,
    "tensorboard": _tensorboard,
    "delete": _delete,
}


def _command(arguments: list[str]) -> str:
    """Takes the command off the arguments."""
    command = arguments.pop(1) if len(arguments) > 1 else ""
    if command in ("-h", "--help", "--helpfull", "--helpshort", "help"):
        print(f"{__doc__}\nFlags of a command: python -m launch.k8s COMMAND --help")
        sys.exit(0)
    if command not in _COMMANDS:
        _say(f"expected a command, got {command!r}: {', '.join(_COMMANDS)}")
        sys.exit(2)
    return command


if __name__ == "__main__":
    chosen = _command(sys.argv)
    _define(flags.FLAGS, chosen)
    cli.run(f"{_PROGRAM} {chosen}", _COMMANDS[chosen], example="launch.k8s submit --name digits -- --preset fast")
