"""The report's parts without a browser, and contents for it; test_report_browser.py opens the pages."""

import base64
import random
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mrla.analysis.comparison.comparing import NOTE
from mrla.analysis.report.command import repeat_comparison
from mrla.analysis.report.explanations import cut_tables, layer_attention_map
from mrla.analysis.report.intervals import track
from mrla.analysis.report.page import write_report
from mrla.analysis.report.pictures import BUDGET, inlined
from mrla.analysis.report.plots import curve_panels
from mrla.analysis.report.tables import comparison_table
from mrla.analysis.statistics import compare_arms, summary
from mrla.cli import main
from mrla.data.sources import Folder
from mrla.train.recipe import Machine, MixerOptions, Optim, as_dict
from mrla.train.recipes import RECIPES, get_recipe

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'>{{ 7 * 7 }}&lt;@arm{safe}$name"

OWN = {"data": {"kind": "loaders"}, "model": "resnet18", "model_args": {}, "pretrained": False, "batch_size": 16}
"""What of the settings tells that a comparison was of a caller's network and loaders."""


def compare_content(
    arms: tuple[str, ...] = ("plain", "light", "base"), *, seeds: int = 3, epochs: int = 12, detection: bool = False
) -> dict[str, Any]:
    """A comparison as ``compare.json`` holds it, made up."""
    rng = np.random.default_rng(len(arms))
    recipe = get_recipe("shapes_mask_rcnn" if detection else "digits_resnet18")
    figure = "val_box_ap" if detection else "val_accuracy"
    scores = [figure, "val_box_ap50", "val_mask_ap"] if detection else ["train_accuracy", "val_loss", figure]

    def row(epoch: int, level: float) -> dict[str, Any]:
        noise = rng.normal(0, 0.004, 4)
        reached = level - 0.8 * np.exp(-0.4 * epoch)
        numbers = {name: float(reached + noise[0] - 0.02 * place) for place, name in enumerate(scores)}
        losses = {"train_loss": float(2.3 * np.exp(-0.3 * epoch) + 0.05 + abs(noise[2]))}
        if not detection:
            losses["val_loss"] = float(losses["train_loss"] + 0.05 + abs(noise[3]))
        return {"epoch": epoch, "lr": 0.1, **numbers, **losses}

    histories = {
        arm: [[row(epoch, 0.93 + 0.01 * place) for epoch in range(1, epochs + 1)] for _ in range(seeds)]
        for place, arm in enumerate(arms)
    }

    def spread(values: list[float]) -> dict[str, Any]:
        mean, sd = summary(values)
        return {"mean": mean, "sd": sd, "values": values}

    table: dict[str, Any] = {}
    for place, (arm, runs) in enumerate(histories.items()):
        best = spread([max(row[figure] for row in run) for run in runs]) | {"epochs": [epochs] * seeds}
        table[arm] = {
            **{name: spread([run[-1][name] for run in runs]) for name in ("train_loss", *scores)},
            f"best_{figure}": best,
            "parameters": {"trainable": 709_674 + 5_816 * place, "with_statistics": 712_202 + 6_000 * place},
            "macs": None if detection else 2_708_736 + 38_464 * place,
            "images_per_second": {
                **{"median": 5278.3 - 600 * place, "p10": 3688.9, "p90": 5927.3},
                **{"rounds": 30, "batch_size": 64, "threads": 1},
            },
            "train_seconds": spread([5.9 + place] * seeds),
        }
    differences = compare_arms({arm: table[arm][figure]["values"] for arm in arms}, baseline=arms[0])
    return {
        "recipe": as_dict(recipe),
        "arms": list(arms),
        "seeds": list(range(seeds)),
        "figure": figure,
        "table": table,
        "differences": {arm: vars(difference) for arm, difference in differences.items()},
        "note": NOTE,
        "notes": [],
        "versions": {"mrla": "0.1.0", "torch": "2.14.1", "machine": "x86_64, 2 CPU cores"},
        "epochs": histories,
        "seconds": 174.477,
    }


def explain_content(
    folder: Path, *, lengths: tuple[int, ...] = (2, 3), heads: int = 4, name: str = "", signed: bool = False
) -> dict[str, Any]:
    """An explanation as ``explain.json`` holds it, made up; `name` goes into every name, the pictures into `folder`."""
    draw = random.Random(1)

    def grid(blocks: int) -> list[list[float | None]]:
        low = -0.6 if signed else 0.02
        return [[draw.uniform(low, 0.9) if at <= row else None for at in range(blocks + 1)] for row in range(blocks)]

    chains = []
    for place, length in enumerate(lengths, start=1):
        blocks = [f"layer{place}.{index}{name}" for index in range(length)]
        chains.append(
            {
                **{"name": f"layer{place}{name}", "blocks": blocks, "heads": heads, "head_dim": 8},
                "quantity": f"weight of the source in the softmax{name}",
                "sources": ["input", *blocks],
                "mean": grid(length),
                "sd": [[None if value is None else value / 9 for value in row] for row in grid(length)],
                "by_head": [grid(length) for _ in range(heads)],
            }
        )
    blocks = [block for chain in chains for block in chain["blocks"]]

    def cut(block: str, **more: Any) -> dict[str, Any]:
        loss, accuracy = draw.uniform(-0.02, 0.3), draw.uniform(-0.08, 0.01)
        return {
            **{"block": block, "accuracy": 0.95 + accuracy, "loss": 0.2 + loss, **more},
            "accuracy_change": {"mean": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01},
            "loss_change": {"mean": loss, "low": loss - 0.03, "high": loss + 0.03},
            "shown": {
                "accuracy": "worse" if accuracy < -0.01 else "not resolved",
                "loss": "worse" if loss > 0.03 else "not resolved",
            },
        }

    drawing = Image.fromarray(np.random.default_rng(0).integers(0, 90, (120, 260, 3), dtype=np.uint8))
    drawing.save(folder / "zero.png")
    return {
        **{"checkpoint": f"runs/mine{name}", "model": f"resnet18_cifar{name}", "method": "light", "attach": {}},
        "task": "classification",
        "verdict": [
            f"The mixers are of use: without all of them the loss grows by 0.41{name}.",
            "layer2.1 counts most.",
        ],
        "images": {"count": 449, "source": f"validation part of digits{name}"},
        "baseline": {"accuracy": 0.9822, "loss": 0.1234},
        "chains": chains,
        "terms": [
            {"block": block, "attention": draw.uniform(1, 9), "carried": 4.2, "share": draw.random(), "share_sd": 0.04}
            for block in blocks
        ],
        "cuts": {
            "images": 449,
            "all": cut(f"all mixers{name}"),
            "mixers": [cut(block) for block in blocks],
            "links": [cut(block, source="input") for block in blocks],
            "heads": [cut(block, head=head) for block in blocks for head in range(heads)],
        },
        "pictures": [
            {
                **{"file": f"photos/zero{name}.png", "drawing": "zero.png", "caption": f"A zero{name}, read as 0."},
                "retrieval": [chain["mean"] for chain in chains],
            }
        ],
        "configuration": {"batch_size": 64, "device": f"cpu{name}", "nested": {"seed": 0, "values": [1, 2]}},
        "versions": {"mrla": "0.1.0", "torch": "2.14.1"},
        "command": f"mrla explain 'runs/mine{name}' --images 449",
        "seconds": 12.5,
        "note": "Intervals are over images.",
    }


def test_table_holds_the_numbers():
    content = compare_content()
    headings, rows = comparison_table(content)
    assert headings == [
        *("train acc. (%)", "val acc. (%), last epoch", "val acc. (%), best epoch"),
        *("params", "MACs (M)", "images/s (10 to 90 %)"),
    ]
    for arm, cells in rows.items():
        entry = content["table"][arm]
        for cell in cells[:3]:
            mean, sd = cell.text.split(" ± ")
            assert cell.value == entry[cell.key]["mean"]
            assert float(mean) == pytest.approx(100 * cell.value, abs=0.00501)
            assert float(sd) == pytest.approx(100 * entry[cell.key]["sd"], abs=0.00501)
        assert [cell.value for cell in cells[3:]] == [
            *(entry["parameters"]["trainable"], entry["macs"], entry["images_per_second"]["median"])
        ]
        assert cells[3].text.replace(",", "") == str(entry["parameters"]["trainable"])


def test_table_of_detectors_has_no_macs():
    headings, rows = comparison_table(compare_content(("plain", "light"), detection=True))
    assert headings[:4] == ["box AP (%), last epoch", "box AP (%), best epoch", "box AP50 (%)", "mask AP (%)"]
    assert (rows["light"][5].value, rows["light"][5].text) == (None, "-")


CHANGES: list[dict[str, Any]] = [
    {},
    {"epochs": 7, "batch_size": 3, "seed": 11, "label_smoothing": 0.25, "ema_decay": 0.9},
    {"model_args": {"num_classes": 3}, "optim": Optim(milestones=(4, 5), clip_grad_norm=2.5, decay_vectors=False)},
    {"mixer": MixerOptions(heads=2, carry="output", norm="layer"), "machine": Machine(devices="auto", threads=2)},
    {"model": "a folder/with 'quotes' and --flags", "pretrained": True, "optim": Optim(name="adamw", lr=1e-05)},
]


class _SeenError(ValueError):
    """Raised in place of a comparison."""


@pytest.fixture
def calls(monkeypatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What `compare` is called with, in place of comparing."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def compare(*given: Any, **options: Any) -> None:
        seen.append((given, options))
        raise _SeenError("seen")

    monkeypatch.setattr("mrla.analysis.compare", compare, raising=False)
    monkeypatch.setattr("mrla.compare", compare, raising=False)
    return seen


@pytest.mark.parametrize("changes", CHANGES, ids=range(len(CHANGES)))
@pytest.mark.parametrize("name", RECIPES)
def test_command_gives_the_same_recipe(calls, capsys, name, changes):
    recipe = replace(get_recipe(name), arm="plain", **changes)
    if name == "digits_resnet18" and "model_args" in changes:
        recipe = replace(recipe, data=Folder(root="my photos", size=48, mean=(0.1, 0.2, 0.3)))
    seeds = [recipe.seed, recipe.seed + 1]
    line = repeat_comparison({"recipe": as_dict(recipe), "arms": ["plain", "base"], "seeds": seeds})
    assert main(shlex.split(line)[1:]) == 2
    assert capsys.readouterr().err == "mrla: error: seen\n"
    ((given,), options) = calls[0]
    assert given == recipe
    assert (options["arms"], options["seeds"], options["out"]) == (["plain", "base"], 2, "runs/again")


@pytest.mark.parametrize("changes", CHANGES[:4], ids=range(4))
@pytest.mark.parametrize("name", ["finetune", "not_ours"])
def test_call_gives_the_same_recipe(calls, name, changes):
    usual = get_recipe("finetune")
    recipe = replace(usual, recipe=name, **changes)
    code = repeat_comparison(
        {"recipe": as_dict(recipe) | ({} if name == "not_ours" else OWN), "arms": ["plain", "light"], "seeds": [4, 5]}
    )
    scope = {"model": "m", "train_loader": "t", "val_loader": "v"}
    with pytest.raises(_SeenError):
        exec(code, scope)
    ((given,), options) = calls[0]
    if name == "not_ours":
        assert given == replace(recipe, seed=4)
        assert set(options) == {"arms", "seeds", "out"}
    else:
        # Network and images are the caller's, so the recipe keeps its own, which do not count.
        own = {field: getattr(usual, field) for field in ("data", "batch_size", "model", "model_args", "pretrained")}
        assert given == replace(recipe, seed=4, **own)
        assert (options["model"], options["train_loader"], options["val_loader"]) == ("m", "t", "v")


def test_call_of_a_hostile_name_is_one_comment():
    settings = as_dict(get_recipe("finetune")) | OWN | {"model": "x\nimport os"}
    code = repeat_comparison({"recipe": settings, "arms": ["plain", "light"], "seeds": [0]})
    assert not [line for line in code.splitlines() if line.startswith("import os")]


@pytest.mark.parametrize("size", [1e-6, 0.3, 1.0, 77.0, 1e5])
@pytest.mark.parametrize("sign", [1, -1])
def test_positions_keep_proportions(size, sign):
    low, mean, high = sorted((sign * size, 3 * sign * size, -0.5 * sign * size))
    scale = track([{"mean": mean, "low": low, "high": high}, {"mean": 0.0, "low": None, "high": None}], unit=0.01)
    first, second = scale.marks
    assert first.start is not None
    assert first.width is not None
    assert 0 < first.start < first.at < first.start + first.width < 100
    assert (first.at - first.start) / first.width == pytest.approx((mean - low) / (high - low), abs=1e-3)
    assert second == (scale.zero, None, None)
    at = {float(label): position for position, label in scale.ticks}
    assert 3 <= len(at) <= 9
    assert at[0.0] == scale.zero
    for label, position in at.items():
        share = (100 * mean - label) / (100 * (high - low))
        assert first.at - position == pytest.approx(share * first.width, abs=0.01)


def test_no_interval_is_refused():
    with pytest.raises(ValueError, match="a scale needs an interval: got none"):
        track([])


def test_curves_are_means_and_extremes():
    content = compare_content(epochs=5)
    loss, accuracy = curve_panels(content["epochs"], baseline="plain", score="val_accuracy")
    assert (loss.heading[:4], accuracy.heading) == ("Loss", "Accuracy (%); below 37.6 not shown")
    drawn = {}
    for node in nodes(accuracy.item):
        if node.get("name") == "ColumnDataSource":
            columns = dict(node["attributes"]["data"]["entries"])
            drawn[columns["arm"][0], columns["part"][0]] = columns
    assert len(drawn) == 6
    for arm, runs in content["epochs"].items():
        for part, name in {"training": "train_accuracy", "validation": "val_accuracy"}.items():
            values = 100 * np.array([[row[name] for row in run] for run in runs])
            assert drawn[arm, part]["epoch"] == [1, 2, 3, 4, 5]
            np.testing.assert_allclose(drawn[arm, part]["mean"], values.mean(0))
            np.testing.assert_array_equal(drawn[arm, part]["low"], values.min(0))
            np.testing.assert_array_equal(drawn[arm, part]["high"], values.max(0))


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(child)


def test_map_is_scaled_by_what_can_be_shown(tmp_path):
    content = explain_content(tmp_path, signed=True)
    chain = content["chains"][1] | {"heads": 2}
    chain["by_head"] = [chain["mean"], [[-1.5, None, None, None], *chain["mean"][1:]]]
    found = layer_attention_map(chain, {"image zero": chain["mean"]})
    assert (found["scale"], found["signed"], found["digits"]) == (1.5, True, 2)
    assert [other["label"] for other in found["others"]] == ["head 0", "head 1", "image zero"]
    assert [[cell["value"] for cell in row["cells"]] for row in found["rows"]] == chain["mean"]
    assert layer_attention_map(chain | {"heads": 1}, {})["others"] == []
    nothing = {"mean": [[0.0, None]], "sd": [[None, None]], "blocks": ["a"], "sources": ["input", "a"], "heads": 1}
    assert layer_attention_map(chain | nothing, {})["scale"] == 0.0


def test_cuts_are_sorted_by_what_they_cost(tmp_path):
    content = explain_content(tmp_path)
    content["cuts"]["links"] = None
    tables = cut_tables(content["cuts"])
    assert [table["kind"] for table in tables] == ["all", "mixers", "heads"]
    for table in tables:
        changes = [row["accuracy_change"]["mean"] for row in table["rows"]]
        assert changes == sorted(changes)
        for row in table["rows"]:
            assert row["apart"] == (row["accuracy_change"]["low"] > 0 or row["accuracy_change"]["high"] < 0)
    assert re.fullmatch(r"layer\d\.\d, head \d", tables[2]["rows"][0]["name"])
    for cut, loss in zip(content["cuts"]["mixers"], (0.1, 0.3, 0.2, 0.0, 0.4), strict=True):
        cut["accuracy_change"]["mean"], cut["loss_change"]["mean"] = 0.0, loss
    (mixers,) = (table for table in cut_tables(content["cuts"]) if table["kind"] == "mixers")
    assert [row["loss_change"]["mean"] for row in mixers["rows"]] == [0.4, 0.3, 0.2, 0.1, 0.0]


def test_pictures_stay_within_the_budget(tmp_path):
    noise = np.random.default_rng(0)
    names = [f"{index}.png" for index in range(3)]
    for name in names:
        Image.fromarray(noise.integers(0, 255, (900, 1100, 3), dtype=np.uint8)).save(tmp_path / name)
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(tmp_path / "small.png")
    found = [picture for picture in inlined(tmp_path, [*names, "small.png"]) if picture is not None]
    assert sum((tmp_path / name).stat().st_size for name in names) > 2 * BUDGET
    sizes = [len(base64.b64decode(uri.partition(",")[2])) for uri, _, _ in found]
    assert BUDGET / 4 < sum(sizes) <= BUDGET
    assert found[3][1:] == (40, 20)
    assert base64.b64decode(found[3][0].partition(",")[2]) == (tmp_path / "small.png").read_bytes()
    for uri, width, height in found[:3]:
        with Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
            assert image.size == (width, height)
            assert width / height == pytest.approx(1100 / 900, rel=0.01)


@pytest.mark.parametrize("name", ["../outside.png", "missing.png", "link.png", "text.png", "", "..", "picture.gif"])
def test_other_files_are_refused(tmp_path, name):
    folder = tmp_path / "report"
    folder.mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "outside.png")
    Image.new("L", (4, 4)).save(folder / "picture.gif")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "text.png").write_text("<svg/>")
    content = explain_content(folder)
    content["pictures"][0]["drawing"] = name
    with pytest.raises(ValueError, match=r"^drawing must "):
        write_report(folder, content, kind="explain")
    assert not (folder / "report.html").exists()


def test_same_content_same_bytes(tmp_path):
    pages = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        write_report(folder, compare_content(epochs=3), kind="compare")
        pages.append((folder / "report.html").read_bytes())
        write_report(folder, explain_content(folder), kind="explain")
        pages.append((folder / "report.html").read_bytes())
        assert sorted(path.name for path in folder.iterdir()) == ["report.html", "zero.png"]
    assert pages[:2] == pages[2:]
    assert len(pages[0]) < 5_000_000
    assert len(pages[1]) < 2_000_000


def test_an_explanation_stays_small_with_large_pictures(tmp_path):
    content = explain_content(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (1500, 3000, 3), dtype=np.uint8)).save(
        tmp_path / "zero.png"
    )
    content["pictures"] *= 6
    assert write_report(tmp_path, content, kind="explain").stat().st_size < 2_000_000


def test_what_cannot_be_shown_is_refused_and_the_old_page_stays(tmp_path):
    page = write_report(tmp_path, explain_content(tmp_path), kind="explain")
    before = page.read_bytes()
    with pytest.raises(ValueError, match="kind must be one of compare, explain: got 'bench'"):
        write_report(tmp_path, {}, kind="bench")
    with pytest.raises(ValueError, match=r"content must be that of compare\.json: it lacks recipe, arms"):
        write_report(tmp_path, explain_content(tmp_path), kind="compare")
    broken = explain_content(tmp_path)
    del broken["chains"][0]["quantity"]
    with pytest.raises(KeyError):
        write_report(tmp_path, broken, kind="explain")
    assert page.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "zero.png"]
