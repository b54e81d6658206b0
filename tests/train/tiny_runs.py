"""Runs of a second, and what two of them have in common."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mrla.data.sources import Shapes
from mrla.train import Machine, Optim, Recipe, get_recipe
from mrla.train.recipe import DetectorOptions

OPTIM = Optim(lr=0.1, weight_decay=5e-4, warmup_epochs=1)
CPU = Machine(accelerator="cpu", threads=1)
WEIGHTS = ("model.safetensors", "best/model.safetensors")

SMALL = DetectorOptions(
    name="mask_rcnn",
    min_size=64,
    max_size=64,
    freeze_stages=-1,
    norm_eval=False,
    fpn_channels=16,
    options={"box_head_dim": 16, "mask_head_dim": 8, "mask_head_layers": 1, "detections_per_image": 10},
)


def tiny(**changes: Any) -> Recipe:
    """The digits recipe, narrower and shorter; one thread."""
    tiniest = {"model_args": {"channels": [8, 8, 8, 8]}, "epochs": 3, "optim": OPTIM}
    return replace(get_recipe("digits_resnet18"), **{**tiniest, **changes})


def tiny_detection(**changes: Any) -> Recipe:
    """Mask R-CNN on 12 drawn images."""
    recipe = Recipe(
        recipe="shapes_mask_rcnn",
        model="test_resnet",
        init="identity",
        data=Shapes(images=12, val_images=6, image_size=64, max_objects=3),
        detector=SMALL,
        optim=Optim(name="adamw", lr=2e-3),
        epochs=2,
        batch_size=4,
        machine=CPU,
    )
    return replace(recipe, **changes)


def rows(path: Path) -> list[dict[str, float]]:
    """A CSV file's rows, as numbers."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def result(folder: Path) -> dict[str, Any]:
    """A run's result.json, without the seconds it took."""
    content = json.loads((folder / "result.json").read_text())
    assert content.pop("seconds") > 0
    return content


def assert_same_run(one: Path, other: Path) -> None:
    """Every number and every weight, bit for bit."""
    for name in ("history.csv", "steps.csv", "config.json", "best/config.json"):
        assert (one / name).read_text() == (other / name).read_text(), name
    assert result(one) == result(other)
    for name in WEIGHTS:
        weights, others = load_file(one / name), load_file(other / name)
        assert list(weights) == list(others)
        assert [key for key in weights if not torch.equal(weights[key], others[key])] == [], name


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
