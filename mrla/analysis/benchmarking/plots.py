"""A benchmark as a picture: ratios with their spread, and over a sweep milliseconds beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..curves import STYLE, arm_looks, save_figure
from ..fonts import matplotlib_fonts
from .tables import SWEPT, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TIMES = {"inference": "inference", "training": "training step"}
_KEPT = "kept for backward"


def draw_benchmark(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws ``bench.png`` and ``bench.svg``.

    Without a sweep a dot for each arm's ratio, with its 10 to 90 % over rounds. Over a sweep a line for each arm, with
    that as a band: ratios on the left, milliseconds (megabytes) on the right.

    Args:
        content: The content of ``bench.json``.
        folder: Where the pictures go; made if missing.

    Returns:
        The two files.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    asked = content["configuration"]["quantities"]
    quantities: list[str] = [name for name in asked if _has(content, name)] or asked[:1]
    arms = list(content["points"][0]["results"])
    looks = arm_looks(arms, arms[0])
    swept = content["configuration"]["sweep"] is not None
    size = (9.0, 0.6 + 3.1 * len(quantities)) if swept else (1.6 + 3.3 * len(quantities), 1.7 + 0.45 * len(arms))
    with matplotlib.rc_context({**STYLE, **matplotlib_fonts([title(content)])}):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08))
        (_draw_sweep if swept else _draw_ratios)(figure, content, quantities, looks)
        return [
            save_figure(figure, folder / "bench.png", dpi=150),
            save_figure(figure, folder / "bench.svg", metadata={"Date": None}),
        ]


def _has(content: Mapping[str, Any], quantity: str) -> bool:
    """Whether there are ratios to draw: of any arm but the baseline, where there is another."""
    entries = [entry for point in content["points"] for entry in list(point["results"].values())[1:]]
    entries = entries or [entry for point in content["points"] for entry in point["results"].values()]
    return any(_spread(entry, quantity, "ratio") for entry in entries)


def _spread(entry: Mapping[str, Any], quantity: str, what: str) -> tuple[float, float, float] | None:
    """10 %, median and 90 % of an arm's ``ratio``, or of its ``amount``: milliseconds or megabytes."""
    taken = entry[quantity]
    if not taken:
        return None
    if quantity == "memory":
        value = taken["saved_for_backward_ratio" if what == "ratio" else "saved_for_backward_mb"]
        return None if value is None else (value, value, value)
    spread = taken["ratio" if what == "ratio" else "ms"]
    return None if spread is None else (spread["p10"], spread["median"], spread["p90"])


def _draw_ratios(
    figure: "Figure", content: Mapping[str, Any], quantities: Sequence[str], looks: Mapping[str, dict[str, Any]]
) -> None:
    results = content["points"][0]["results"]
    panels = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        axes.axvline(1.0, color="#999999", linewidth=1.0, zorder=1)
        for row, (arm, entry) in enumerate(results.items()):
            _draw_dot(axes, row, _spread(entry, quantity, "ratio"), looks[arm])
        axes.set_xlabel(f"{_TIMES.get(quantity, _KEPT)}, relative to {next(iter(results))}")
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.18)
    panels[0].set_yticks(range(len(results)), list(results))
    panels[0].set_ylim(len(results) - 0.5, -0.6)
    _add_heading(figure, content, "dot: median of the ratios, bar: 10 to 90 % of the rounds")


def _draw_dot(axes: "Axes", row: int, spread: tuple[float, float, float] | None, look: Mapping[str, Any]) -> None:
    if spread is None:
        axes.annotate(
            "none", (1.0, row), (5, 0), textcoords="offset points", va="center", color="#777777", fontsize=9.5
        )
        return
    low, middle, high = spread
    axes.plot([low, high], [row, row], color=look["color"], linewidth=2.2, solid_capstyle="butt")
    axes.plot([middle], [row], color=look["color"], marker="o", markersize=7, linestyle="")
    axes.annotate(f"{middle:.2f}", (middle, row), (0, 7), textcoords="offset points", ha="center", fontsize=9.5)


def _draw_sweep(
    figure: "Figure", content: Mapping[str, Any], quantities: Sequence[str], looks: Mapping[str, dict[str, Any]]
) -> None:
    points = content["points"]
    sweep, values = content["configuration"]["sweep"], [point["value"] for point in points]
    panels = figure.subplots(len(quantities), 2, sharex=True, squeeze=False)
    for row, quantity in zip(panels, quantities, strict=True):
        name = _TIMES.get(quantity, _KEPT)
        for axes, what in zip(row, ("ratio", "amount"), strict=True):
            for arm, look in looks.items():
                spreads = [_spread(point["results"][arm], quantity, what) for point in points]
                _draw_line(axes, values, spreads, look)
            _space(axes, values, logarithmic=what == "amount")
        row[0].set_ylabel(f"{name}\nrelative to {next(iter(looks))}")
        row[1].set_ylabel(f"{name}\n{'MB' if quantity == 'memory' else 'ms'}")
    for axes in panels[-1]:
        axes.set_xlabel(SWEPT[sweep])
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=2.2, **{**look, "marker": "o"}) for look in looks.values()]
    _add_heading(figure, content, "line: median, band: 10 to 90 % of the rounds", handles, list(looks))


def _draw_line(
    axes: "Axes",
    values: Sequence[int],
    spreads: Sequence[tuple[float, float, float] | None],
    look: Mapping[str, Any],
) -> None:
    there = [(value, spread) for value, spread in zip(values, spreads, strict=True) if spread is not None]
    if not there:
        return
    there.sort()
    at = [value for value, _ in there]
    low, middle, high = zip(*(spread for _, spread in there), strict=True)
    axes.fill_between(at, low, high, color=look["color"], alpha=0.18, linewidth=0)
    axes.plot(at, middle, color=look["color"], marker="o", markersize=5, linewidth=1.8)


def _space(axes: "Axes", values: Sequence[int], *, logarithmic: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if min(values) > 0 and max(values) >= 4 * min(values):
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(values), [str(value) for value in sorted(values)])
    low, high = axes.get_ylim()
    if logarithmic and low > 0 and high > 8 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _add_heading(
    figure: "Figure",
    content: Mapping[str, Any],
    explanation: str,
    handles: Sequence[Any] = (),
    labels: Sequence[str] = (),
) -> None:
    from matplotlib.patches import Patch

    # The title is a legend's: a suptitle and a legend outside the axes would be laid over each other.
    nothing = Patch(alpha=0)
    figure.legend(
        list(handles) or [nothing],
        list(labels) or [""],
        title=title(content),
        title_fontsize=11,
        loc="outside upper center",
        ncols=min(max(len(labels), 1), 5),
        frameon=False,
    )
    figure.legend([nothing], [explanation], loc="outside lower center", frameon=False, handlelength=0)
