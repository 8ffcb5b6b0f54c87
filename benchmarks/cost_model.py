"""What a step costs on more machines than there are here: a model fitted on runs over limited links, and checked on another.

    step = fixed + per_image x images of a replica + sum over all-reduces of (latency + bytes sent x (handling + wire))

The compute part is fitted on one worker at several batches, the rest on all-reduces of two workers whose links are limited
to some bandwidths; `wire` is the link's own rate times a factor, for what protocols add. An all-reduce of n workers sends
2 (n - 1) / n of its bytes (Patarasuk and Yuan, https://doi.org/10.1016/j.jpdc.2008.09.002).
"""

import dataclasses
import io
import math
import os
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import network, scaling
from benchmarks.report import ProgramError, Section, as_typed, table
from benchmarks.throughput import Progress

_BATCHES = (32, 64, 128, 256)
_FITTED_MBITS, _CHECKED_MBITS = (100, 1000), 300
_CHECK_BATCH = 256
_GPUS = tuple(2**power for power in range(3, 11))
_GPU_BATCHES = (64, 256, 1024, 4096, 16384)


@dataclasses.dataclass(frozen=True)
class Model:
    """Times in milliseconds, bytes in bytes.

    Attributes:
        fixed: a step's, whatever its batch.
        per_image: of computing.
        latency: of an all-reduce.
        handling: of a byte sent, on a link without limit.
        overhead: factor of a byte's time on the wire.
    """

    fixed: float
    per_image: float
    latency: float
    handling: float
    overhead: float

    def compute(self, images: float) -> float:
        """A step of one replica, without any exchange."""
        return self.fixed + self.per_image * images

    def exchange(self, sizes: Sequence[int], num_workers: int, mbits: float) -> float:
        """All-reduces of so many bytes each, one after the other."""
        sent = 2 * (num_workers - 1) / num_workers * np.array(sizes)
        return float(np.sum(self.latency + sent * (self.handling + self.overhead * wire(mbits))))

    def step(self, images: float, sizes: Sequence[int], num_workers: int, mbits: float) -> float:
        """A step of several workers."""
        return self.compute(images) + self.exchange(sizes, num_workers, mbits)


def wire(mbits: float) -> float:
    """Milliseconds of a byte on a link of so many megabits a second."""
    return 8e-3 / mbits


def fit(compute: Sequence[tuple[int, float]], exchanges: Sequence[tuple[float, int, float]]) -> Model:
    """Least squares of the relative errors.

    Args:
        compute: images of a step and its milliseconds, on one worker.
        exchanges: megabits a second, bytes and milliseconds of an all-reduce between two workers.
    """
    images, steps = np.array(compute).T
    mbits, sent, times = np.array(exchanges).T
    fixed, per_image = _solve(np.stack([np.ones_like(images), images], axis=1), steps)
    latency, handling, overhead = _solve(np.stack([np.ones_like(sent), sent, sent * wire(mbits)], axis=1), times)
    return Model(*(float(value) for value in (fixed, per_image, latency, handling, overhead)))


def _solve(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(columns / values[:, np.newaxis], np.ones_like(values), rcond=None)[0]


@dataclasses.dataclass(frozen=True)
class Gpus:
    """What is assumed of a cluster of GPUs. None of it was measured here.

    Attributes:
        images_per_second: of one GPU with a large batch.
        fixed_ms: a step's launches of kernels.
        base_us, hop_us: latency of an all-reduce over n: base + 2 log2(n) hops, as NCCL's trees need.
        gigabytes_per_second: that a GPU sends in an all-reduce.
    """

    images_per_second: float = 1e6
    fixed_ms: float = 0.5
    base_us: float = 20.0
    hop_us: float = 5.0
    gigabytes_per_second: float = 25.0

    def efficiency(self, num_gpus: int, batch: int, sizes: Sequence[int]) -> float:
        """Share of `num_gpus` times a GPU's best speed, with so many images a GPU."""
        best = 1e3 * batch / self.images_per_second
        latency = len(sizes) * (self.base_us + 2 * math.log2(num_gpus) * self.hop_us) / 1e3
        transfer = 2 * (num_gpus - 1) / num_gpus * sum(sizes) / self.gigabytes_per_second / 1e6
        return best / (best + self.fixed_ms + latency + transfer)

    def batch_for(self, share: float, num_gpus: int, sizes: Sequence[int]) -> int:
        """The smallest power of two of images a GPU that reaches a share of the ideal."""
        batch = 1
        while self.efficiency(num_gpus, batch, sizes) < share:
            batch *= 2
        return batch


def chart(gpus: Gpus, sizes: Sequence[int]) -> bytes:
    """PNG: share of the best speed over the number of GPUs, a line for each batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for batch in _GPU_BATCHES:
        shares = [100 * gpus.efficiency(count, batch, sizes) for count in _GPUS]
        axes.plot(_GPUS, shares, marker="o", markersize=3)
        axes.annotate(f" {batch:,} images a GPU", (_GPUS[-1], shares[-1]), va="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xlim(_GPUS[0], _GPUS[-1] * 4)
    axes.set_xticks(_GPUS, [str(count) for count in _GPUS])
    axes.set_ylim(0, 100)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("share of so many times a GPU's best speed, %")
    axes.set_title("The article's network on assumed GPUs: which batch makes more of them pay", fontsize=10)
    axes.grid(alpha=0.3)
    with io.BytesIO() as file:
        figure.savefig(file, dpi=130)
        return file.getvalue()


def measure(quick: bool, progress: Progress) -> Section:
    """Fits, checks, extrapolates.

    Raises:
        ProgramError: what it needs is not there.
    """
    if os.geteuid() or not (shutil.which("tc") and shutil.which("ip")):
        raise ProgramError("limited links need root and iproute2: leave this section out with --only")
    task = [*scaling.TASK, "--precision=float32"]

    def over(mbits: float) -> dict[str, Any]:
        with network.machines(2, mbits) as hosts:
            return scaling.run_pinned([*task, f"--global_batch_size={_CHECK_BATCH}"], 2, hosts=hosts)

    batches = _BATCHES[-2:] if quick else _BATCHES
    jobs: list[tuple[str, float]] = [("batch", batch) for batch in batches]
    jobs += [("link", mbits) for mbits in (*_FITTED_MBITS, _CHECKED_MBITS)]
    found = {}
    for kind, value in progress(jobs):
        if kind == "batch":
            # Both cores are busy, as they are with two workers: they share the way to memory.
            found[kind, value] = scaling.run_pinned([*task, f"--global_batch_size={value}"], 2, together=False)
        else:
            found[kind, value] = over(value)
    compute = [(int(batch), found["batch", batch]["step_ms"]) for batch in batches]
    exchanges = [
        (mbits, row["bytes"], row["milliseconds"]) for mbits in _FITTED_MBITS for row in found["link", mbits]["collectives"]
    ]
    model = fit(compute, exchanges)
    checked = found["link", _CHECKED_MBITS]
    sizes = [row["bytes"] for row in checked["collectives"]]
    rows, steps = [], {}
    for mbits in sorted((*_FITTED_MBITS, _CHECKED_MBITS)):
        measured = found["link", mbits]["step_ms"]
        predicted = model.step(_CHECK_BATCH / 2, sizes, 2, mbits)
        kind = "check: nothing of it was fitted" if mbits == _CHECKED_MBITS else "its all-reduces were fitted, its steps not"
        steps[mbits] = {"measured_ms": measured, "predicted_ms": predicted}
        rows.append([f"{mbits:,}", kind, f"{measured:.1f}", f"{predicted:.1f}", f"{predicted / measured - 1:+.0%}"])
    gpus = Gpus()
    needed = [[str(count), f"{gpus.batch_for(0.5, count, sizes):,}", f"{gpus.batch_for(0.9, count, sizes):,}"] for count in _GPUS]
    sent = f"{len(sizes)} all-reduces of {sum(sizes) / 1e6:.2f} MB together"
    text = [
        f"step = {model.fixed:.1f} ms + {model.per_image:.3f} ms x images of a replica + for each all-reduce "
        f"{model.latency:.2f} ms + {1e6 * model.handling:.2f} ms a MB sent + {model.overhead:.2f} x the link's time.", "",
        f"Two workers of one core each, in network namespaces, links limited with `tc`, global batch {_CHECK_BATCH}, float32, "
        f"{sent}:", "",
        table(["Mbit/s", "", "ms a step, measured", "predicted", "error"], rows), "",
        f"Extrapolated to GPUs. **Assumed, not measured**: {gpus.images_per_second:,.0f} images/s and {gpus.fixed_ms} ms of "
        f"launches a GPU, {gpus.gigabytes_per_second:.0f} GB/s, {gpus.base_us:.0f} us + 2 log2(n) x {gpus.hop_us:.0f} us an "
        f"all-reduce. What is sent is as measured.", "",
        table(["GPUs", "images a GPU for 50 % of so many times its best speed", "for 90 %"], needed), "",
        "![Share of the best speed over the number of GPUs](scaling.png)",
    ]  # fmt: skip
    return Section(
        title="What more machines would bring",
        text="\n".join(text),
        figures={
            "model": dataclasses.asdict(model),
            "compute": compute,
            "exchanges": exchanges,
            "steps": steps,
            "checked_mbits": _CHECKED_MBITS,
            "assumed_gpus": dataclasses.asdict(gpus),
        },
        commands=[f"ip netns exec MACHINE {as_typed(['benchmarks.probe', *task])}"],
        charts={"scaling.png": chart(gpus, sizes)},
    )
