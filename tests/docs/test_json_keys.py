"""docs/reference/json_keys.md has every key of the files that commands write."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scenes

import mrla
from mrla.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "json_keys.md").read_text()
SECTIONS = {
    title: {key for word in re.findall(r"`([\w.]+)`", text) for key in (word, word.removesuffix(".ARM"))}
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
CPU = ["--machine.accelerator", "cpu", "--machine.threads", "1"]


def read(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def written() -> Iterator[tuple[str, dict[str, Any]]]:
    """The section of the page and the content of a file, for everything that commands write."""
    scenes.run("run")
    yield "config.json", {**read("run/config.json"), **{f"mrla.{key}": 0 for key in read("run/config.json")["mrla"]}}
    yield "run.json and result.json", read("run/run.json")
    yield "run.json and result.json", read("run/result.json")
    scenes.picture("image.png", 16)
    assert main(["predict", "run", "image.png", "--out", "drawn", *CPU]) == 0
    yield "predictions.json", read("drawn/predictions.json")
    yield "predictions.json", read("drawn/predictions.json")["images"][0]
    assert main(["explain", "run", "--out", "explained", "--max_images", "24", *CPU]) == 0
    yield "explain.json", read("explained/explain.json")
    yield "explain.json", read("explained/explain.json")["cuts"]["least"]
    yield "explain.json", read("explained/explain.json")["chains"][0]
    assert main(["prune", "run", "--out", "pruned", "--margin", "99", "--max_images", "24", *CPU]) == 0
    yield "prune.json", read("pruned/prune.json")
    yield "prune.json", read("pruned/prune.json")["before"]
    mrla.benchmark("resnet18_cifar", ("plain", "light"), batch_size=2, rounds=2, warmup=0, out="bench")
    yield "bench.json", read("bench/bench.json")
    yield "bench.json", read("bench/bench.json")["points"][0]["results"]["light"]
    mrla.compare(scenes.short_recipe(), seeds=2, out="compared")
    yield "compare.json", read("compared/compare.json")
    yield "compare.json", read("compared/compare.json")["table"]["light"]
    yield "compare.json", read("compared/compare.json")["differences"]["light"]


@pytest.mark.sweep
def test_every_key_is_there(in_an_empty_folder, runs_in_one_process):
    lacking = [
        f"{section}: {key}"
        for section, content in written()
        for key in content
        if key not in SECTIONS[section] and key not in ("mrla",)
    ]
    assert not lacking, "; ".join(lacking)
