"""digitfleet itself, as a job of `trainer.task`; its speed is that of `result.json`: training, without writing checkpoints.

Those have a row of their own in the section on costs, and none of the peers writes any.
"""

import json
import resource
import tempfile
from pathlib import Path

from benchmarks.peers import session
from trainer import dataset, job
from trainer.presets import from_preset
from trainer.signals import StopRequest
from trainer.sources import Cluster

_COMPILING_STEPS = 50


def main() -> None:
    """Prints JSON."""
    options = session.parse(__doc__)
    precision = {"bfloat16": "mixed_bfloat16"}.get(options.precision, options.precision)
    with tempfile.TemporaryDirectory() as folder:
        config = from_preset("article", {
            "model_dir": folder, "precision": precision, "global_batch_size": options.batch, "validation_fraction": 0.0,
            "early_stopping_patience": 0, "steps_per_loop": _COMPILING_STEPS,
            "max_steps": _COMPILING_STEPS + (options.epochs - 1) * options.steps,
        })  # fmt: skip
        result = job.run(config, dataset.load("", 0), Cluster(), StopRequest())
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["split"] == "train"]
    if not losses[-1] < losses[0]:
        raise SystemExit(f"the loss went from {losses[0]} to {losses[-1]}")
    print(json.dumps({
        "images_per_second": [result["images_per_second"]],
        "losses": losses,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": {},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
