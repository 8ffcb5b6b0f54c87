"""Checks everything that a job needs before it costs anything, and trains nothing: `python -m trainer.doctor [task flags]`.

In a cluster it is started on every worker, like the job: then the workers meet, compare and read what the chief has written.
Every job makes the same checks when it starts.
"""

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from absl import flags

from trainer import cli, cluster, dataset, locks, runs, signals, storage
from trainer import flags as task_flags
from trainer.config import Config
from trainer.errors import EXIT_FINISHED, EXIT_REQUEST, JobError
from trainer.sources import Cluster

T = TypeVar("T")


class Report:
    """The outcome of each check, in order."""

    def __init__(self, show: Callable[[str, str, str, str], None]) -> None:
        self._show = show
        self.checks: list[dict[str, str]] = []

    def add(self, name: str, status: str, text: str, mend: str = "") -> None:
        """Adds one outcome."""
        self.checks.append({"name": name, "status": status, "text": text, "mend": mend})
        self._show(name, status, text, mend)

    def check(self, name: str, look: Callable[[], tuple[str, T]]) -> T | None:
        """Adds what `look` says; what it raises is a failure, whose message has the mend. Returns what it has found."""
        try:
            text, found = look()
        except JobError as error:
            self.add(name, "fail", " ".join(str(error).split()))
            return None
        self.add(name, "ok", text)
        return found

    @property
    def passed(self) -> bool:
        """Whether nothing has failed."""
        return all(check["status"] != "fail" for check in self.checks)


def examine(config: Config, report: Report) -> None:
    """Makes all checks. What depends on a check that has failed is not looked at."""
    workers = report.check("cluster", _look_at_cluster)
    model_dir, begun_with = report.check("model_dir", lambda: _look_at_model_dir(config, workers or Cluster())) or (None, None)
    data = report.check("data", lambda: _look_at_data(config))
    with cli.quiet_start():
        from trainer import machine
        from trainer.topology import choose_layout, configure_tensorflow

    configure_tensorflow(config)
    config = machine.with_precision(config, begun_with)
    for finding in machine.inspect(config, len(cluster.visible_gpus())):
        report.add(**dataclasses.asdict(finding))
    if workers is None or data is None:
        return
    found = data
    if config.data_service:
        report.check("data_service", lambda: _look_at_data_service(config))
    data = report.check("records", lambda: _look_at_records(config, found))
    if data is None:
        return
    layout = report.check("strategy", lambda: ((found := choose_layout(config, workers)).describe(), found))
    if layout is None:
        return
    report.check("model", lambda: _look_at_model(config, data))
    plan = report.check("batch", lambda: _look_at_batch(config, data, layout.num_replicas))
    if plan is None or model_dir is None:
        return
    restarts = report.check("run", lambda: _look_at_run(model_dir, config, data, workers))
    if restarts is not None and len(workers.workers) > 1:
        peers = report.check("peers", lambda: _look_at_peers(config, data, workers, layout))
        if peers is not None:
            report.add(**dataclasses.asdict(machine.check_clocks(peers)))


def _look_at_cluster() -> tuple[str, Cluster]:
    found = cluster.from_environment()
    cluster.take_own_gpus(found)
    if not found.workers:
        return f"{found.source}: this machine alone", found
    return f"{found.source}: worker {found.index} of {', '.join(found.workers)}", found


def _look_at_model_dir(config: Config, workers: Cluster) -> tuple[str, tuple[Path, str | None]]:
    config = task_flags.with_model_dir(config, len(workers.workers))
    folder = Path(config.model_dir)
    free = storage.probe_folder(folder if workers.is_chief else storage.nearest(folder))
    return f"{folder}: can be written, {free / 2**30:.1f} GiB free", (folder, runs.precision(folder))


def _look_at_data(config: Config) -> tuple[str, dataset.Dataset]:
    data = dataset.load_for(config)
    return data.description, data


def _look_at_records(config: Config, data: dataset.Dataset) -> tuple[str, dataset.Dataset]:
    from trainer import loading
    from trainer.records import Records

    found = loading.without_damage(config, data)
    with loading.damage_told(found):
        part = loading.resident(found.train, config, train=True)
    share = "reads its share of the shards" if isinstance(part, Records) else "holds all examples in memory"
    return f"every worker {share}; {found.skipped} damaged examples are left out", found


def _look_at_data_service(config: Config) -> tuple[str, None]:
    from trainer import service

    service.check(config.data_service)
    return f"{config.data_service}: something answers", None


def _look_at_model(config: Config, data: dataset.Dataset) -> tuple[str, None]:
    from trainer import custom
    from trainer.models import inference_model

    model = inference_model(config, data.image_shape, data.num_classes)
    if config.is_custom_model:
        custom.check_call(config.model, model)
    return f"{config.model}: {model.count_params()} parameters", None


def _look_at_batch(config: Config, data: dataset.Dataset, num_replicas: int) -> tuple[str, Any]:
    from trainer.plan import make_plan

    train_set, _ = dataset.split_validation(data.train, config.validation_fraction)
    plan = make_plan(config, len(train_set), num_replicas)
    return plan.describe(), plan


def _look_at_run(model_dir: Path, config: Config, data: dataset.Dataset, workers: Cluster) -> tuple[str, int]:
    from trainer import claim

    restarts = claim.check(model_dir, config, data.sha256, is_chief=workers.is_chief)
    if model_dir.exists():
        with locks.exclusive(model_dir, needed=workers.is_chief):
            pass
    if runs.finished(model_dir):
        return f"the run in {model_dir} has finished: its result stands", restarts
    return f"goes on with the run in {model_dir}" if restarts else f"{model_dir} holds no run yet", restarts


def _look_at_peers(config: Config, data: dataset.Dataset, workers: Cluster, layout: Any) -> tuple[str, Sequence[Any]]:
    from trainer import preflight

    # Peers are told of a stop; until here, nobody but this process has to know.
    stop = signals.StopRequest()
    signals.listen(stop, lambda: config.grace_period)
    model_dir = Path(config.model_dir)
    made = storage.missing(model_dir)
    if workers.is_chief:
        model_dir.mkdir(parents=True, exist_ok=True)
    with (
        locks.exclusive(model_dir, needed=workers.is_chief, made=made),
        preflight.met(config, data.sha256, workers, layout, stop) as (_, watch),
    ):
        watch.end_together()
    text = f"all {len(watch.peers) + 1} workers have met: same versions, configuration and data, one shared folder"
    return text, watch.peers


def main(positional: list[str]) -> None:
    """Prints one line a check; exits with 0 if the job can start, else with 2."""
    config = task_flags.to_config(flags.FLAGS, positional)
    as_json = flags.FLAGS.format == "json"
    report = Report(_show_nothing if as_json else _show)
    if as_json:
        logging.getLogger("digitfleet").setLevel(logging.WARNING)
    examine(config, report)
    if as_json:
        cli.show(json.dumps({"ok": report.passed, "checks": report.checks}))
    sys.exit(EXIT_FINISHED if report.passed else EXIT_REQUEST)


def _show(name: str, status: str, text: str, mend: str) -> None:
    cli.show(f"{status:4}  {name:13}  {text}{f': {mend}' if mend else ''}")


def _show_nothing(*_: str) -> None:
    pass


if __name__ == "__main__":
    task_flags.define(flags.FLAGS)
    flags.DEFINE_enum("format", "text", ["text", "json"], "What to print.", module_name=sys.argv[0])
    cli.run("trainer.doctor", main)
