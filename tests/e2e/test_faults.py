"""Jobs that are killed again and again end as if nothing had happened. Slow: every restart starts TensorFlow."""

import random
import signal
import time
from pathlib import Path

import pytest
from conftest import lines_of

pytestmark = pytest.mark.e2e

KILLS = 5


@pytest.mark.parametrize(
    "topology",
    [
        {"strategy": "one_device", "input_pipeline": "stream"},
        {"strategy": "mirrored", "num_devices": 2},
    ],
    ids=str,
)
def test_job_killed_five_times_and_stopped_once_ends_in_the_same_weights(
    topology: dict, start_job, tmp_path: Path, tiny_data: Path, tiny_records: Path
) -> None:
    options = {
        **topology, "data_dir": tiny_records if "input_pipeline" in topology else tiny_data,
        "deterministic": True, "epochs": 25, "augment": "affine", "dropout_rate": 0.4, "early_stopping_patience": 20,
        "ema_decay": 0.99, "checkpoint_every_steps": 7, "steps_per_loop": 5, "lr_schedule": "cosine",
    }  # fmt: skip
    whole = start_job(**options, model_dir=tmp_path / "whole").finish()
    seed = random.SystemRandom().randrange(10**6)
    print(f"random seed {seed}")
    chance = random.Random(seed)
    targets = sorted(chance.sample(range(5, 340), KILLS + 1))
    stopped_by_term = chance.randrange(KILLS + 1)
    for number, target in enumerate(targets):
        job = start_job(**options)
        # Its predecessor may have come past the target: what is killed before it began does not count as a restart.
        job.wait_for(lambda job=job, number=number: job.restarts() == number, f"start {number}")
        job.wait_for(lambda job=job, target=target: job.step() >= target, f"step {target}")
        time.sleep(chance.random() / 20)  # Anywhere within a step or a save.
        if number == stopped_by_term:
            job.process.send_signal(signal.SIGTERM)
            assert job.wait() == 75, job.log.read_text()
        else:
            job.kill()
        assert not (job.model_dir / "result.json").exists()
    result = start_job(**options).finish()
    assert result["weights_sha256"] == whole["weights_sha256"]
    assert result["restarts"] == KILLS + 1
    for split in ("train", "validation"):
        steps = [line["step"] for line in lines_of(tmp_path / "run", split)]
        assert steps == sorted(set(steps))
    (whole_validation, validation) = (lines_of(tmp_path / name, "validation") for name in ("whole", "run"))
    assert [line["loss"] for line in validation] == [line["loss"] for line in whole_validation]
