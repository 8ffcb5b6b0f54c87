"""Starts N workers of one job on this machine and keeps them going.

    python -m launch.local --num_workers 2 -- --preset fast
    python -m launch.local --num_workers 2 --chaos "kill:1@step=100" -- --preset fast --model_dir runs/chaos

What follows `--` are flags of trainer.task. Every worker's output is shown with its number and kept in `model_dir`/logs.
"""

import os
import shlex
import shutil
import sys
import threading
from pathlib import Path

from absl import flags

from launch import chaos, isolation
from launch.arguments import check_topology, task_config
from launch.supervisor import Job, Supervisor
from trainer import cli, cluster, console, dataset, lookup, runs, storage
from trainer import flags as task_flags
from trainer.errors import EXIT_REQUEST, EXIT_STOPPED, RequestError

_PROGRAM = "launch.local"
# The least that a worker holds.
_WORKER_BYTES = 600 * 2**20


def define(flag_values: flags.FlagValues) -> None:
    """Adds the launcher's flags."""
    module = {"flag_values": flag_values, "module_name": sys.argv[0]}
    flags.DEFINE_integer("num_workers", 2, "Workers, each a process of this machine.", lower_bound=1, **module)
    flags.DEFINE_integer(
        "devices_per_worker",
        0,
        "GPUs of each worker or, where there is none, logical devices to split its CPU into. 0: all GPUs shared out, or one CPU.",
        lower_bound=0,
        **module,
    )
    flags.DEFINE_integer(
        "data_workers",
        0,
        "Processes that read and decode a prepared data set for the workers (tf.data service). 0: they do so themselves.",
        lower_bound=0,
        **module,
    )
    flags.DEFINE_integer(
        "max_restarts", 3, "Times all workers are started again after one was lost or stopped.", lower_bound=0, **module
    )
    flags.DEFINE_string(
        "chaos",
        "",
        "Faults: kill, term or stop, a worker or *, and a step, such as kill:1@step=200,stop:0@step=350,term:*@step=500. "
        "A stopped worker is found after --step_timeout of the job.",
        **module,
    )
    flags.DEFINE_boolean(
        "isolate",
        True,
        "Keep the workers' ports, which have no authentication, in a network namespace of their own. They then reach no network.",
        **module,
    )


def main(task_arguments: list[str]) -> None:
    """Runs the job; exits with its code."""
    values = flags.FLAGS
    config = task_config(task_arguments)
    if values.data_workers and (not config.data_dir or config.data_service):
        raise RequestError(
            "--data_workers prepare the records of --data_dir, a data set of trainer.prepare; and --data_service is theirs"
        )
    fit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _WORKER_BYTES
    if values.num_workers > max(fit, 2):
        raise RequestError(
            f"--num_workers={values.num_workers}: this machine has memory for {fit} at most: each loads TensorFlow"
        )
    faults = chaos.parse(values.chaos, values.num_workers)
    model_dir = config.model_dir or task_flags.new_model_dir(config)
    devices = values.devices_per_worker or config.num_devices
    if config.num_devices not in (0, devices):
        raise RequestError(f"--devices_per_worker={devices} and --num_devices={config.num_devices}: give one of them")
    environments, num_devices = _share_devices(values.num_workers, devices, cluster.visible_gpus())
    check_topology(config, values.num_workers, num_devices or 1)
    extra = [] if config.model_dir else [f"--model_dir={model_dir}"]
    extra += [f"--num_devices={num_devices}"] if num_devices else []
    outside = config.data_service or next((path for path in (config.data_dir, model_dir) if "://" in path), "")
    if values.isolate and outside:
        raise RequestError(f"{outside} is out of reach of workers that are kept to this machine: add --noisolate before the `--`")
    # What every worker would find out, at seconds each, is told by the launcher.
    if not runs.finished(Path(model_dir)):
        lookup.check_model(config)
    if "://" not in config.data_dir:
        dataset.find(config.data_dir)
    runs.check(Path(model_dir), config, None, is_chief=True)
    if values.isolate and (reason := isolation.isolate()):
        _say(
            f"warning: other machines may reach the workers' ports, which have no authentication (no network namespace: {reason})"
        )
    elif values.isolate and config.metrics_port:
        _say("--metrics_port is reached from within the workers' network namespace alone; add --noisolate to reach it")
    job = Job(
        command=[sys.executable, "-m", "trainer.task", *task_arguments, *extra],
        environments=[{cluster.LAUNCHER: _PROGRAM, **environment} for environment in environments],
        model_dir=Path(model_dir),
        max_restarts=values.max_restarts,
        grace_period_secs=config.grace_period,
        step_timeout_secs=config.step_timeout,
        faults=faults,
        data_workers=values.data_workers,
    )
    made = storage.missing(Path(model_dir))
    storage.prepare_folder(Path(model_dir))
    code = Supervisor(job, _say, _show).run()
    if code == EXIT_REQUEST and made:
        _remove_if_only_logs(Path(model_dir))
        storage.remove_if_empty(made[1:])
    if code == EXIT_STOPPED:
        again = [*extra[: 0 if config.model_dir else 1], *([] if config.resume else ["--resume"])]
        _say(f"go on with: {_command(task_arguments, again)}")
    sys.exit(code)


def _remove_if_only_logs(model_dir: Path) -> None:
    """Takes a folder away in which a refused job has left nothing but its output, which has been shown."""
    if {path.name for path in model_dir.iterdir()} <= {"logs", ".lock"}:
        shutil.rmtree(model_dir)


def _share_devices(num_workers: int, num_devices: int, gpus: list[str]) -> tuple[list[dict[str, str]], int]:
    """Each worker's share of the GPUs, as its environment, and the number of devices of each."""
    if not gpus:
        return [{} for _ in range(num_workers)], num_devices
    share = num_devices or len(gpus) // num_workers
    if not share or share * num_workers > len(gpus):
        raise RequestError(
            f"--num_workers={num_workers} x {share or 1} GPUs: this machine has {len(gpus)}; start fewer, or set "
            "CUDA_VISIBLE_DEVICES=-1 to use the CPU"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[n * share : (n + 1) * share])} for n in range(num_workers)], share


def _command(task_arguments: list[str], extra: list[str]) -> str:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    return shlex.join(["python", "-m", _PROGRAM, *own, "--", *task_arguments, *extra])


_printing = threading.Lock()


def _say(text: str) -> None:
    with _printing:
        print(f"{_PROGRAM}: {text}", file=sys.stderr, flush=True)


def _show(worker: int, line: str) -> None:
    with _printing:
        console.say(f"[{worker}] {line}")


if __name__ == "__main__":
    define(flags.FLAGS)
    cli.run(_PROGRAM, main, example="launch.local --num_workers 2 -- --preset fast")
