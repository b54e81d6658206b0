import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from mrla.analysis.curves import draw_curves


def make_run(epochs: int, rng: np.random.Generator, floor: float = 0.5) -> list[dict[str, float]]:
    rows = []
    for epoch in range(1, epochs + 1):
        accuracy, noise = 0.97 - 0.8 * np.exp(-0.25 * epoch), rng.normal(0, 0.003)
        loss = floor + 1.8 * np.exp(-0.25 * epoch)
        rows.append(
            {
                "epoch": epoch,
                "train_loss": float(loss),
                "train_accuracy": float(accuracy + 0.02),
                "val_loss": float(loss + 0.1 + abs(noise)),
                "val_accuracy": float(accuracy + noise),
            }
        )
    return rows


def make_histories(arms: list[str], seeds: int, epochs: int, floor: float = 0.5):
    rng = np.random.default_rng(0)
    return {arm: [make_run(epochs, rng, floor) for _ in range(seeds)] for arm in arms}


@pytest.mark.parametrize(
    ("arms", "seeds", "epochs", "floor"),
    [
        (["plain", "light"], 5, 24, 0.5),
        (["light", "plain", "dw", "eca", "se"], 3, 6, 0.001),
        (["plain", "light"], 1, 1, 0.5),
        (["plain"], 1, 2, 0.5),
        (["plain", *(f"arm{index}" for index in range(13))], 1, 3, 0.5),
    ],
)
def test_files(tmp_path, arms, seeds, epochs, floor):
    folder = tmp_path / "new" / "run"
    paths = draw_curves(make_histories(arms, seeds, epochs, floor), folder, title="Two", baseline="plain")
    assert paths == [folder / "curves.png", folder / "curves.svg"]
    assert sorted(os.listdir(folder)) == ["curves.png", "curves.svg"]
    header = paths[0].read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1350, 705)
    text = paths[1].read_text()
    assert "<svg" in text
    assert text.rstrip().endswith("</svg>")


def test_svg_is_the_same_twice(tmp_path):
    histories = make_histories(["plain", "light"], 3, 5)
    first, second = (
        draw_curves(histories, tmp_path / name, title="t", baseline="plain")[1].read_bytes() for name in "ab"
    )
    assert first == second
    assert draw_curves(histories, tmp_path / "a", title="other", baseline="plain")[1].read_bytes() != first


def svg_text(folder) -> str:
    return (folder / "curves.svg").read_text()


def test_says_what_the_band_is(tmp_path):
    # Text in the SVG is drawn as shapes; matplotlib keeps the words in a comment beside each.
    draw_curves(make_histories(["plain", "light"], 4, 3), tmp_path, title="The title", baseline="plain")
    text = svg_text(tmp_path)
    for words in (
        "line: mean, band: minimum to maximum of 4 seeds",
        "accuracy (%); below 41.8 not shown",  # the axis begins above the first epoch's
        "The title",
        "plain",
        "light",
        "training",
        "validation",
    ):
        assert f"<!-- {words} -->" in text
    draw_curves(make_histories(["plain", "light"], 1, 3), tmp_path, title="The title", baseline="plain")
    assert "<!-- one seed, so no band -->" in svg_text(tmp_path)


def test_baseline_is_grey_wherever_it_stands(tmp_path):
    draw_curves(make_histories(["light", "plain"], 1, 3), tmp_path, title="t", baseline="plain")
    text = svg_text(tmp_path)
    assert "stroke: #333333" in text
    assert "stroke: #0072b2" in text
    draw_curves(make_histories(["plain"], 1, 3), tmp_path, title="t", baseline="plain")
    assert "stroke: #0072b2" not in svg_text(tmp_path)


def test_one_bad_epoch_leaves_the_axis_readable(tmp_path):
    histories = make_histories(["plain", "light"], 5, 24)
    histories["light"][0][20]["val_accuracy"] = 0.1
    draw_curves(histories, tmp_path, title="t", baseline="plain")
    text = svg_text(tmp_path)
    assert "<!-- 94 -->" in text
    assert "<!-- 20 -->" not in text


def test_values_that_are_not_finite_are_gaps(tmp_path):
    histories = make_histories(["plain", "light"], 2, 4)
    histories["light"][0][3]["val_loss"] = float("nan")
    assert len(draw_curves(histories, tmp_path, title="t", baseline="plain")) == 2
    for run in histories["plain"] + histories["light"]:
        for row in run:
            row["val_loss"] = row["train_loss"] = float("nan")
    assert len(draw_curves(histories, tmp_path, title="t", baseline="plain")) == 2


def test_a_failure_leaves_the_old_picture_and_no_leftovers(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    histories = make_histories(["plain"], 1, 2)
    draw_curves(histories, tmp_path, title="t", baseline="plain")
    before = (tmp_path / "curves.png").read_bytes()

    def fail(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_curves(histories, tmp_path, title="t", baseline="plain")
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "curves.svg"]
    assert (tmp_path / "curves.png").read_bytes() == before


def test_bad_input(tmp_path):
    histories = make_histories(["plain", "light"], 2, 3)
    with pytest.raises(ValueError, match="baseline must be one of the arms: got 'base'; choose from plain, light"):
        draw_curves(histories, tmp_path, title="t", baseline="base")
    with pytest.raises(ValueError, match="at least one run and a run one epoch: got none for 'light'"):
        draw_curves({**histories, "light": []}, tmp_path, title="t", baseline="plain")
    shorter = [histories["light"][0], histories["light"][1][:2]]
    with pytest.raises(ValueError, match="the same epochs: got 3 and 2 of them, last 3 and 2, for 'light'"):
        draw_curves({**histories, "light": shorter}, tmp_path, title="t", baseline="plain")
    del histories["light"][1][2]["val_loss"]
    with pytest.raises(ValueError, match=r"a row lacks val_loss: got epoch, .* for 'light'"):
        draw_curves(histories, tmp_path, title="t", baseline="plain")
    assert os.listdir(tmp_path) == []


def test_leaves_pyplot_and_settings_alone(tmp_path):
    code = f"""
import sys
from pathlib import Path
from mrla.analysis import curves
if "matplotlib" in sys.modules or "scipy" in sys.modules: sys.exit("loaded at import")
import matplotlib
names = [name for name in matplotlib.rcParams if name != "backend"]  # to look up the backend imports pyplot
before = [matplotlib.rcParams[name] for name in names]
row = dict(epoch=1, train_loss=1.0, train_accuracy=0.5, val_loss=1.0, val_accuracy=0.5)
curves.draw_curves({{"plain": [[row]]}}, Path({str(tmp_path)!r}), title="t", baseline="plain")
if "matplotlib.pyplot" in sys.modules: sys.exit("pyplot")
if [matplotlib.rcParams[name] for name in names] != before: sys.exit("settings")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
