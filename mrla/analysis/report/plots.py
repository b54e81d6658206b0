"""Learning curves that can be zoomed and hovered over, for a page without a network."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..curves import SCORES, History, Scale, arm_looks, scaled

if TYPE_CHECKING:
    from bokeh.plotting import figure

PARTS = {"train": "training", "val": "validation"}
"""The two parts of the data, by how their numbers' names begin; the later one is drawn on top."""
_DASHES = {"val": "solid", "train": "dashed"}
_HEIGHT = 340


class Panel(NamedTuple):
    """One plot.

    Attributes:
        heading: What it shows.
        item: What BokehJS's ``embed_item`` takes.
    """

    heading: str
    item: dict[str, Any]


def curve_panels(histories: Mapping[str, Sequence[History]], *, baseline: str, score: str) -> list[Panel]:
    """Loss and score against the epoch, each as a plot for the browser.

    A line is the mean over an arm's seeds, its band reaches from the smallest to the largest seed. Every renderer has
    the tags ``[arm, part]``, by which the page switches arms off. Equal input gives equal plots.

    Args:
        histories: Per arm and seed the rows of its epochs.
        baseline: The arm in the colour of text, which the page decides about.
        score: One of `SCORES`.

    Returns:
        Two panels.
    """
    panels = []
    for quantity, scale, name in (("loss", 1.0, "Loss"), (score.removeprefix("val_"), 100.0, SCORES[score] + " (%)")):
        values = {
            (arm, part): scale * np.asarray([[row[f"{part}_{quantity}"] for row in run] for run in runs], dtype=float)
            for arm, runs in histories.items()
            for part in PARTS
            if f"{part}_{quantity}" in runs[0][0]
        }
        epochs = {arm: [int(row["epoch"]) for row in runs[0]] for arm, runs in histories.items()}
        axis, heading = scaled(quantity, name[0].upper() + name[1:], list(values.values()))
        plot = _figure(values, epochs, arm_looks(list(histories), baseline), baseline, axis)
        panels.append(Panel(heading, _item(plot, quantity)))
    return panels


def bokeh_script() -> str:
    """The part of BokehJS that plots need, as one script."""
    from bokeh.resources import Resources

    resources = Resources(mode="inline", components=["bokeh"], minified=True, log_level="error")
    return "\n".join(resources.js_raw)


def _figure(
    values: Mapping[tuple[str, str], np.ndarray],
    epochs: Mapping[str, Sequence[int]],
    looks: Mapping[str, Mapping[str, Any]],
    baseline: str,
    axis: Scale | None,
) -> "figure":
    from bokeh.models import AdaptiveTicker, BasicTickFormatter, BoxZoomTool, FixedTicker, Range1d
    from bokeh.plotting import figure

    first, last = min(at[0] for at in epochs.values()), max(at[-1] for at in epochs.values())
    margin = 0.02 * (last - first) or 0.5
    plot = figure(
        height=_HEIGHT,
        sizing_mode="stretch_width",
        x_range=Range1d(start=first - margin, end=last + margin),
        y_axis_type="log" if axis is not None and axis.log else "linear",
        tools="pan,wheel_zoom,box_zoom,reset",
        active_drag=None,
        active_scroll=None,
        x_axis_label="epoch",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    plot.toolbar.logo = None
    plot.toolbar.active_drag = next(tool for tool in plot.tools if isinstance(tool, BoxZoomTool))
    plot.xaxis.ticker = AdaptiveTicker(min_interval=1, mantissas=[1, 2, 5])
    if axis is not None:
        plot.y_range = Range1d(start=axis.low, end=axis.high)
        if axis.log:
            # BokehJS's own ticks of a logarithmic axis are those of a linear one below two decades.
            mantissas = (1, 2, 5) if axis.high > 30 * axis.low else (1, 1.5, 2, 3, 5, 7)
            plot.yaxis.ticker = FixedTicker(ticks=[one * 10.0**power for power in range(-9, 6) for one in mantissas])
    plot.yaxis.formatter = BasicTickFormatter(use_scientific=False)
    for which in (plot.xaxis, plot.yaxis):
        which.axis_line_color = which.major_tick_line_color = which.minor_tick_line_color = None
        which.axis_label_text_font_style = "normal"
    plot.xgrid.grid_line_color = None
    for (arm, part), table in values.items():
        _draw(plot, arm, part, table, epochs[arm], looks[arm]["color"], arm == baseline)
    return plot


def _draw(
    plot: "figure", arm: str, part: str, table: np.ndarray, epochs: Sequence[int], colour: str, is_baseline: bool
) -> None:
    from bokeh.models import ColumnDataSource, HoverTool

    low, high, count = table.min(0), table.max(0), len(epochs)
    columns: dict[str, Any] = {
        "epoch": list(epochs),
        "mean": table.mean(0).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        # Names go into hover texts as data, which BokehJS escapes; in a template they would be markup.
        "arm": [arm] * count,
        "part": [PARTS[part]] * count,
    }
    source = ColumnDataSource(columns)
    validation, drawn = part == "val", len(plot.renderers)
    if len(table) > 1:
        alpha = 0.18 if validation else 0.09
        plot.varea("epoch", "low", "high", source=source, fill_color=colour, fill_alpha=alpha)
    width = 2.2 if validation else 1.4
    line = plot.line("epoch", "mean", source=source, line_color=colour, line_dash=_DASHES[part], line_width=width)
    if count == 1:
        line = plot.scatter("epoch", "mean", source=source, color=colour, fill_alpha=float(validation), size=9)
    for renderer in plot.renderers[drawn:]:
        renderer.tags = [arm, part, "baseline" if is_baseline else "arm"]
    shown = "@mean{0.0000}" + (" (@low{0.0000} to @high{0.0000})" if len(table) > 1 else "")
    tooltips = [("arm", "@arm"), ("part", "@part"), ("epoch", "@epoch"), ("mean", shown)]
    plot.add_tools(HoverTool(renderers=[line], tooltips=tooltips, line_policy="nearest", visible=False))


def _item(plot: "figure", name: str) -> dict[str, Any]:
    """The plot as BokehJS takes it, its numbering begun anew: Bokeh counts through the life of a process.

    The name goes before each number, for two plots of a page must not share any.
    """
    from bokeh.embed import json_item

    item = json.loads(json.dumps(json_item(plot)))
    numbers: dict[str, str] = {}

    def find(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("id"), str):
                numbers.setdefault(value["id"], f"{name}-{len(numbers)}")
            for entry in value.values():
                find(entry)
        elif isinstance(value, list):
            for entry in value:
                find(entry)

    def renumber(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: numbers[entry] if key in ("id", "root_id") and isinstance(entry, str) else renumber(entry)
                for key, entry in value.items()
            }
        return [renumber(entry) for entry in value] if isinstance(value, list) else value

    find(item)
    return renumber(item) | {"target_id": None}
