"""Runs of a second, and what two of them have in common."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mrla.train import Optim, Recipe, get_recipe

OPTIM = Optim(lr=0.1, weight_decay=5e-4, warmup_epochs=1)
WEIGHTS = ("model.safetensors", "best/model.safetensors")


def tiny(**changes: Any) -> Recipe:
    """The digits recipe, narrower and shorter; one thread."""
    tiniest = {"model_args": {"channels": [8, 8, 8, 8]}, "epochs": 3, "optim": OPTIM}
    return replace(get_recipe("digits_resnet18"), **{**tiniest, **changes})


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
