"""Two processes on a CPU give the numbers of one with the same global batch."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import CPU, SMALL, result, rows, tiny, tiny_detection

from mrla.data.samples import loader
from mrla.data.sources import Shapes
from mrla.dense import load
from mrla.train import Machine, MixerOptions, Optim
from mrla.train.fitting import evaluate_detector, train
from mrla.train.recipe import as_dict

# Without BatchNorm, whose statistics are of one process's images; SyncBatchNorm does not run on a CPU.
RECIPE = tiny(
    model_args={"channels": [8, 8, 8, 8], "norm_layer": "groupnorm1"},
    mixer=MixerOptions(norm="layer"),
    # With larger rates this narrow network blows up the rounding of a sum over two halves. The first of two epochs
    # trains what is new alone: one process does not compute the other gradients, two drop them.
    optim=Optim(lr=0.01, frozen_epochs=1, old_lr_scale=0.5),
    label_smoothing=0.1,
    ema_decay=0.9,
    epochs=2,
)
TWO = Machine(accelerator="cpu", devices=2, strategy="ddp", threads=1)
SCRIPT = """
import json, sys
import torch
from mrla.train import task
from mrla.train.fitting import train
from mrla.train.recipe import from_dict

{prelude}
if __name__ == "__main__":
    recipe = from_dict(json.loads(sys.argv[1]))
    train(recipe, sys.argv[2], progress=False)
"""
POISON = """
step, entropy = -1, task.cross_entropy
def poisoned(logits, labels, **options):
    global step
    loss = entropy(logits, labels, **options)
    if logits.requires_grad:
        step += 1
        if step == 13 and torch.distributed.get_rank() == 1:  # the last of the epoch, in one process alone
            return loss * float("nan")
    return loss
task.cross_entropy = poisoned
"""


def run_two(recipe, folder: Path, *, prelude: str = "") -> subprocess.CompletedProcess:
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT.format(prelude=prelude))
    settings = json.dumps(as_dict(replace(recipe, machine=TWO)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(script), settings, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train(RECIPE, folder, progress=False)
    return folder


def test_two_processes_give_the_losses_of_one(one, tmp_path):
    two = tmp_path / "two"
    done = run_two(RECIPE, two)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    for name in ("history.csv", "steps.csv"):
        rows_of_two, rows_of_one = rows(two / name), rows(one / name)
        assert len(rows_of_two) == len(rows_of_one) > 0
        for row, expected in zip(rows_of_two, rows_of_one, strict=True):
            assert row == pytest.approx(expected, abs=1e-5), name
    assert result(two)["epochs"] == rows(two / "history.csv")
    # 449 images, an odd number: each is counted once.
    hits = result(two)["last"]["val_accuracy"] * 449
    assert hits == pytest.approx(round(hits), abs=1e-6)
    weights, expected = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    assert all(torch.allclose(weights[name], expected[name], atol=1e-4) for name in expected)


@pytest.mark.sweep
def test_a_loss_that_becomes_nan_in_one_process_stops_both(tmp_path):
    done = run_two(RECIPE, tmp_path / "two", prelude=POISON)
    assert done.returncode != 0
    assert "DivergedError: the loss became NaN or infinite at step 13; stopped" in done.stderr
    assert not (tmp_path / "two" / "model.safetensors").exists()


# Each process draws its proposals, so two do not take the steps of one: what must agree is how they count.
DETECTION = tiny_detection(
    arm="light",
    # Every guess counts, else a network that has seen so little finds nothing to compare.
    detector=replace(SMALL, options=SMALL.options | {"score_thresh": 0.0, "detections_per_image": 100}),
    # 7 images for two processes: one of them gets a filler, which must not count.
    data=Shapes(images=24, val_images=7, image_size=64, max_objects=3),
    ema_decay=0.9,
)


@pytest.mark.sweep
def test_two_processes_count_a_detectors_hits_as_one(tmp_path):
    two = tmp_path / "two"
    done = run_two(DETECTION, two)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    samples = DETECTION.data.open("val")
    batches = loader(samples, batch_size=3)
    found = evaluate_detector(load(two), batches, masks=True, machine=CPU)
    last = result(two)["last"]
    assert found["box_ap"] > 0
    for name, value in found.items():
        assert last[f"val_{name}"] == pytest.approx(value, rel=1e-5), name
