"""Draws the pictures of "How it works" into docs/pictures/: `python docs/figures.py`, or with names for some of them.

Equal versions of matplotlib and numpy give files that are equal byte for byte. The background is white, so that a
picture reads alike on a light and on a dark page.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from mrla.analysis.curves import STYLE
from mrla.analysis.statistics import PairedDifference, compare_arms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = Path(__file__).resolve().parent / "pictures"

# Okabe and Ito's palette for colour-blind readers, one colour a block.
BLOCKS = ("#0072B2", "#D55E00", "#009E73", "#A8568A")
INK, PALE = "#222222", "#8a8a8a"
BETTER, UNRESOLVED = BLOCKS[0], BLOCKS[1]

TRUE_DIFFERENCE, SPREAD, RANDOM_SEED = 0.3, 0.5, 0
"""Of the simulated comparisons, in points; the page that shows them gives the same numbers."""


def attention_exact() -> Figure:
    """Every block makes the keys and values of all blocks anew."""
    return _attention_to_all("exact", maker=lambda source, target: target)


def attention_base() -> Figure:
    """Every block makes one key and one value, and later blocks read them."""
    return _attention_to_all("base", maker=lambda source, target: source)


def attention_light() -> Figure:
    """Every block takes its own value through a gate, and what the block before it hands on times lambda."""
    figure, axes = _four_blocks("light")
    for block in range(4):
        _own(axes, block, BLOCKS[block])
        if block:
            _arrow(axes, (block - 1 + 0.3, 0.0), (block - 0.3, 0.0), INK, "arc3,rad=0")
            axes.text(block - 0.5, 0.4, f"$\\lambda_{block + 1}$", ha="center", color=INK, size=12)
    _legend(axes, "coloured: own value, gated\nblack: the carried map")
    return figure


def beta() -> Figure:
    """The weight of light's recurrence over the distance between two blocks."""
    figure = Figure(figsize=(5.0, 3.1), layout="constrained")
    axes = figure.subplots()
    distance = np.arange(9)
    lines = ((1.0, "o", "-"), (0.8, "s", "-"), (0.5, "^", "-"), (-0.7, "D", "--"))
    for (decay, marker, dashes), colour in zip(lines, BLOCKS, strict=True):
        weights = decay**distance
        axes.plot(distance, weights, dashes, color=colour, marker=marker, markersize=5, label=f"$\\lambda = {decay:g}$")
    axes.axhline(0, color=PALE, linewidth=1)
    axes.set(xlabel="distance l: block t takes from block t - l", ylabel="$\\beta_l$", ylim=(-0.85, 1.15))
    figure.legend(loc="outside upper center", ncols=4, frameon=False, handlelength=1.6, columnspacing=1.2)
    return figure


def stage() -> Figure:
    """A stage of a ResNet with mixers: what is called, what is handed on."""
    figure = Figure(figsize=(5.0, 4.9))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, 10), ylim=(0, 9.8), aspect="equal")
    axes.axis("off")
    _box(axes, 0.25, 0.75, 9.5, 7.95, "#f6f6f6", PALE, linestyle="--", linewidth=1.0)
    axes.text(9.4, 8.33, "layer1", ha="right", va="center", family="monospace", color=INK)
    bottoms = (6.0, 3.5, 1.0)
    for index, bottom in enumerate(bottoms):
        middle = bottom + 0.78
        _box(axes, 1.8, bottom, 7.4, 1.9, "white", INK)
        axes.text(9.02, bottom + 1.6, f"layer1.{index}", ha="right", va="center", family="monospace", size=10)
        _box(axes, 2.1, bottom + 0.2, 2.9, 1.15, "#dcebf5", BLOCKS[0])
        axes.text(3.55, middle, "the block's\nown forward", ha="center", va="center", size=10)
        _box(axes, 6.0, bottom + 0.2, 2.9, 1.15, "#fbe5d6", BLOCKS[1])
        axes.text(7.45, middle, f"the mixer\nlayer1.{index}.mrla", ha="center", va="center", size=10)
        _arrow(axes, (5.05, middle), (5.95, middle), INK, "arc3,rad=0")
        axes.text(5.45, middle + 0.12, "$x_t$", ha="center", va="bottom", size=11)
        if index:
            between, before = bottom + 2.2, bottoms[index - 1] + 0.78
            axes.plot([8.95, 9.5, 9.5, 0.8, 0.8], [before, before, between, between, middle], color=INK, linewidth=1.4)
            _box(axes, 4.6, between - 0.19, 1.7, 0.38, BLOCKS[2], BLOCKS[2], zorder=3)
            axes.text(5.45, between - 0.01, "memory", color="white", ha="center", va="center", size=10, zorder=4)
        else:
            axes.plot([0.8, 0.8], [9.6, middle], color=INK, linewidth=1.4)
            axes.text(1.05, 9.3, "output of the stem", va="center", size=10)
        _arrow(axes, (0.8, middle), (2.05, middle), INK, "arc3,rad=0")
    last = bottoms[-1] + 0.78
    axes.plot([8.95, 9.5, 9.5], [last, last, 0.5], color=INK, linewidth=1.4)
    _arrow(axes, (9.5, 0.5), (9.5, 0.1), INK, "arc3,rad=0")
    axes.text(9.25, 0.32, "to layer2", ha="right", va="center", size=10)
    return figure


def seeds() -> Figure:
    """Simulated comparisons of 5 to 40 seeds: the differences, their mean and its interval."""
    figure = Figure(figsize=(5.0, 3.9), layout="constrained")
    axes = figure.subplots()
    counts = (5, 10, 20, 40)
    for row, (points, result) in enumerate(simulated_comparisons(counts)):
        colour = UNRESOLVED if result.verdict == "not resolved" else BETTER
        assert result.low is not None
        assert result.high is not None
        axes.scatter(points, np.full(len(points), row - 0.17), s=13, color=PALE, linewidths=0)
        axes.plot([100 * result.low, 100 * result.high], [row + 0.12] * 2, color=colour, linewidth=3.5)
        axes.plot([100 * result.mean], [row + 0.12], "o", color=colour, markersize=8)
        axes.text(1.55, row + 0.12, result.verdict, ha="right", va="center", color=colour, size=10)
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.axvline(TRUE_DIFFERENCE, color=BLOCKS[2], linewidth=1.2, linestyle="--")
    axes.text(TRUE_DIFFERENCE + 0.03, -0.62, "true difference", color=BLOCKS[2], ha="left", va="center", size=9.5)
    axes.text(-0.03, -0.62, "no difference", color=INK, ha="right", va="center", size=9.5)
    axes.set_yticks(range(len(counts)), [f"{count} seeds" for count in counts])
    axes.set(ylim=(len(counts) - 0.4, -0.85), xlim=(-1.25, 1.6), xlabel="light minus plain (points), simulated")
    axes.grid(visible=False, axis="y")
    return figure


def simulated_comparisons(counts: tuple[int, ...]) -> list[tuple[np.ndarray, PairedDifference]]:
    """Differences drawn from a normal distribution, in points, and what a comparison makes of them.

    Args:
        counts: How many seeds each comparison has; all are drawn one after the other, by one generator.
    """
    draw = np.random.default_rng(RANDOM_SEED)
    found = []
    for count in counts:
        points = draw.normal(TRUE_DIFFERENCE, SPREAD, count)
        scores = {"plain": np.full(count, 0.9), "light": 0.9 + points / 100}
        found.append((points, compare_arms(scores, baseline="plain")["light"]))
    return found


def _four_blocks(method: str) -> tuple[Figure, "Axes"]:
    figure = Figure(figsize=(2.1, 1.87))  # three stand in a row where the page is wide
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(-0.45, 3.45), ylim=(-1.3, 2.173), aspect="equal")
    axes.axis("off")
    axes.text(1.5, 1.88, method, ha="center", va="center", size=11, color=INK, weight="bold")
    for block in range(4):
        _box(axes, block - 0.28, -0.28, 0.56, 0.56, "white", BLOCKS[block])
        axes.text(block, -0.02, str(block + 1), ha="center", va="center", size=12, color=INK)
    return figure, axes


def _attention_to_all(method: str, maker: Callable[[int, int], int]) -> Figure:
    """Arrows from every block to every later one, in the colour of the block that makes key and value."""
    figure, axes = _four_blocks(method)
    for target in range(4):
        for source in range(target):
            _arc(axes, source, target, BLOCKS[maker(source, target)])
        _own(axes, target, BLOCKS[target])
    _legend(axes, "colour: the block whose kernels\nmake key and value")
    return figure


def _arc(axes: "Axes", source: int, target: int, colour: str) -> None:
    # Ends side by side, so that arrows of different sources do not meet in one point.
    start, end = source - 0.1 + 0.1 * (target - source), target - 0.2 + 0.14 * source
    bend = 0.72 - 0.07 * (target - source)
    _arrow(axes, (start, 0.31), (end, 0.31), colour, f"arc3,rad=-{bend}")


def _own(axes: "Axes", block: int, colour: str) -> None:
    _arrow(axes, (block - 0.14, -0.31), (block + 0.14, -0.31), colour, "arc3,rad=1.6")


def _arrow(axes: "Axes", start: tuple[float, float], end: tuple[float, float], colour: str, bend: str) -> None:
    head: dict[str, Any] = {"arrowstyle": "-|>,head_length=4.5,head_width=2.2", "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=bend, color=colour, linewidth=1.4, **head))


def _box(axes: "Axes", x: float, y: float, width: float, height: float, face: str, edge: str, **options: Any) -> None:
    line = {"linewidth": 1.4, "boxstyle": "round,pad=0,rounding_size=0.12", **options}
    axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=face, edgecolor=edge, **line))


def _legend(axes: "Axes", text: str) -> None:
    axes.text(1.5, -0.98, text, ha="center", va="center", size=8.5, color=INK)


FIGURES: dict[str, Callable[[], Figure]] = {
    "attention_exact": attention_exact,
    "attention_base": attention_base,
    "attention_light": attention_light,
    "beta": beta,
    "stage": stage,
    "seeds": seeds,
}
"""The pictures by the names of their files."""


def main(names: list[str]) -> None:
    """Draws the pictures of these names, or all."""
    PICTURES.mkdir(exist_ok=True)
    style = {**STYLE, "text.parse_math": True, "mathtext.fontset": "dejavusans", "font.family": "DejaVu Sans"}
    for name in names or FIGURES:
        with matplotlib.rc_context(style):
            path = PICTURES / f"{name}.svg"
            FIGURES[name]().savefig(path, facecolor="white", metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
