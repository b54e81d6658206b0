"""Learning curves of several arms over seeds, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mrla.files.atomic_write import written_whole

from .fonts import matplotlib_fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Checkers at run time do not take an int for a float, and epochs are ints.
History = Sequence[Mapping[str, float | int]]

# Okabe and Ito's palette for colour-blind readers, without its yellow, which is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_BASELINE_COLOUR = "#333333"
_MARKERS = ("", "o", "s", "^", "D", "v")
_DASHES = (0, (3, 1.5))
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "mrla",
    "text.parse_math": False,  # a name with dollars is no formula
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
}
"""What all pictures of this room have in common, for matplotlib's `rc_context`."""


SCORES = {"val_accuracy": "accuracy", "val_box_ap": "box AP"}
"""The numbers of validation that runs are judged by, in words."""


class Scale(NamedTuple):
    """What an axis shows.

    Attributes:
        low: Its lower end.
        high: Its upper end.
        log: Whether it is logarithmic.
    """

    low: float
    high: float
    log: bool


def draw_curves(
    histories: Mapping[str, Sequence[History]],
    folder: Path,
    *,
    title: str,
    baseline: str,
    score: str = "val_accuracy",
) -> list[Path]:
    """Draw loss and score against the epoch, for training and validation, as ``curves.png`` and ``curves.svg``.

    A line is the mean over an arm's seeds, its band reaches from the smallest to the largest seed. The axes show the
    later part of training well; early epochs may run off them. Equal input gives an SVG equal byte for byte.

    Args:
        histories: Per arm and seed the rows of its epochs, with the keys ``epoch`` (from 1), ``train_loss``,
            ``train_accuracy``, ``val_loss`` and ``val_accuracy`` (accuracies as fractions); with another `score` that
            and ``train_loss``.
        folder: Where the pictures go; made if missing.
        title: Heading of the figure.
        baseline: The arm drawn in dark grey.
        score: One of `SCORES`.

    Returns:
        The two files.

    Raises:
        ValueError: If the baseline is unknown, an arm or run is empty, a row lacks a key, or the seeds of an arm have
            different epochs.

    Example:
        >>> import tempfile
        >>> row = dict(epoch=1, train_loss=1.2, train_accuracy=0.6, val_loss=1.1, val_accuracy=0.7)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in draw_curves({"plain": [[row]]}, Path(folder), title="One", baseline="plain")]
        ['curves.png', 'curves.svg']
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if baseline not in histories:
        given = ", ".join(histories) or "none"
        raise ValueError(f"baseline must be one of the arms: got {baseline!r}; choose from {given}")
    needed = {"train_loss", score, *(("train_accuracy", "val_loss") if score == "val_accuracy" else ())}
    epochs = {arm: _epochs(arm, runs, {"epoch", *needed}) for arm, runs in histories.items()}
    looks = arm_looks(list(histories), baseline)
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**STYLE, **matplotlib_fonts([title])}):
        figure = Figure(figsize=(9.0, 4.7), layout=ConstrainedLayoutEngine(w_pad=0.08))
        panels = figure.subplots(1, 2)
        quantities = ("loss", score.removeprefix("val_"))
        for axes, quantity, scale in zip(panels, quantities, (1.0, 100.0), strict=True):
            values = {
                (arm, part): scale * _stack(runs, f"{part}_{quantity}")
                for arm, runs in histories.items()
                for part in ("train", "val")
                if f"{part}_{quantity}" in needed
            }
            _draw_panel(axes, values, epochs, looks)
            name = "loss" if quantity == "loss" else f"{SCORES[score]} (%)"
            axis, label = scaled(quantity, name, list(values.values()))
            _apply(axis, axes)
            axes.set_ylabel(label)
        seeds = sorted({len(runs) for runs in histories.values()})
        _add_legend(figure, looks, seeds, title=title, single_epoch=any(len(at) == 1 for at in epochs.values()))
        return [
            save_figure(figure, folder / "curves.png", dpi=150),
            save_figure(figure, folder / "curves.svg", metadata={"Date": None}),
        ]


def arm_looks(arms: Sequence[str], baseline: str) -> dict[str, dict[str, Any]]:
    """The colour and marker of every arm.

    Args:
        arms: Their names.
        baseline: The one in dark grey.

    Returns:
        Arguments of matplotlib's ``plot`` by arm, in the order of `arms`.

    Example:
        >>> arm_looks(["plain", "light"], "plain")["plain"]
        {'color': '#333333', 'marker': ''}
    """
    looks: dict[str, dict[str, Any]] = {baseline: {"color": _BASELINE_COLOUR, "marker": ""}}
    for index, arm in enumerate(arm for arm in arms if arm != baseline):
        round_, colour = divmod(index, len(_COLOURS))
        looks[arm] = {"color": _COLOURS[colour], "marker": _MARKERS[round_ % len(_MARKERS)]}
    return {arm: looks[arm] for arm in arms}


def score_scale(tables: Sequence[np.ndarray]) -> Scale | None:
    """The part of the axis that shows late scores well, in percent.

    Args:
        tables: Scores in percent, seeds by epochs.

    Returns:
        The axis, or None if no score is finite.
    """
    late = _late(tables)
    if not len(late):
        return None
    # A quantile, not the minimum: one epoch that went wrong must not squeeze all others into a line.
    low, high = float(np.quantile(late, 0.03)), float(late.max())
    span = max(high - low, 1.0)
    return Scale(max(0.0, low - 0.5 * span), min(high + 0.08 * span, 100.0 + 0.02 * span), log=False)


def loss_scale(tables: Sequence[np.ndarray]) -> Scale | None:
    """The part of the axis that shows late losses well; logarithmic where they span much.

    Args:
        tables: Losses, seeds by epochs.

    Returns:
        The axis, or None if no loss is finite.
    """
    late = _late(tables)
    if not len(late):
        return None
    low, high = float(late.min()), float(np.quantile(late, 0.97))
    if low > 0 and high > 8 * low:
        return Scale(low / 1.15, high * 3, log=True)
    span = max(high - low, 0.01)
    return Scale(low - 0.08 * span, high + 0.5 * span, log=False)


def scaled(quantity: str, name: str, tables: Sequence[np.ndarray]) -> tuple[Scale | None, str]:
    """The axis of a loss or a score, and its label.

    Args:
        quantity: ``loss``, or a score's name.
        name: How the axis is called.
        tables: Its values, seeds by epochs.

    Returns:
        The axis, None if no value is finite; and the name with what the axis is like and what it leaves out.

    Example:
        >>> scaled("loss", "loss", [np.array([[4.0, 1.0, 0.9]])])[1]
        'loss; above 1.05 not shown'
    """
    axis = (loss_scale if quantity == "loss" else score_scale)(tables)
    log = " (log scale)" if axis is not None and axis.log else ""
    return axis, f"{name}{log}{not_shown(axis, tables)}"


def not_shown(axis: Scale | None, tables: Sequence[np.ndarray]) -> str:
    """Which values lie beyond an axis, as the end of its label; nothing where none do.

    Args:
        axis: As `loss_scale` or `score_scale` gives it.
        tables: The values that it was made for.

    Example:
        >>> not_shown(Scale(0.1, 1.5, log=False), [np.array([[2.0, 1.0, 0.5]])])
        '; above 1.5 not shown'
    """
    if axis is None:
        return ""
    values = np.concatenate([table.ravel() for table in tables])
    above = [f"above {axis.high:.3g}"] if (values > axis.high).any() else []
    below = [f"below {axis.low:.3g}"] if (values < axis.low).any() else []
    return f"; {' and '.join([*below, *above])} not shown" if above or below else ""


def save_figure(figure: "Figure", path: Path, **options: Any) -> Path:
    """Writes a figure whole or not at all.

    Args:
        figure: The figure.
        path: The file; its suffix names the format.
        options: Further arguments of matplotlib's ``savefig``.

    Returns:
        `path`.
    """
    with written_whole(path) as beside:
        figure.savefig(beside, format=path.suffix[1:], **options)
    return path


def _epochs(arm: str, runs: Sequence[History], needed: set[str]) -> np.ndarray:
    if not runs or not all(len(run) for run in runs):
        raise ValueError(f"an arm needs at least one run and a run one epoch: got none for {arm!r}; leave the arm out")
    for run in runs:
        for row in run:
            missing = needed - row.keys()
            if missing:
                raise ValueError(f"a row lacks {', '.join(sorted(missing))}: got {', '.join(row)} for {arm!r}; add it")
    epochs = [[int(row["epoch"]) for row in run] for run in runs]
    for other in epochs:
        if other != epochs[0]:
            raise ValueError(
                f"the seeds of an arm must have the same epochs: got {len(epochs[0])} and {len(other)} of them, last "
                f"{epochs[0][-1]} and {other[-1]}, for {arm!r}; finish its runs or leave the unfinished seeds out"
            )
    return np.asarray(epochs[0])


def _stack(runs: Sequence[History], key: str) -> np.ndarray:
    return np.asarray([[row[key] for row in run] for run in runs], dtype=np.float64)


def _draw_panel(
    axes: "Axes",
    values: Mapping[tuple[str, str], np.ndarray],
    epochs: Mapping[str, np.ndarray],
    looks: Mapping[str, dict[str, Any]],
) -> None:
    from matplotlib.ticker import MaxNLocator

    for (arm, part), table in values.items():
        at, look = epochs[arm], dict(looks[arm])
        if len(at) == 1:
            look["marker"] = look["marker"] or "o"
        validation = part == "val"
        if len(table) > 1:
            axes.fill_between(
                at, table.min(0), table.max(0), color=look["color"], alpha=0.16 if validation else 0.08, linewidth=0
            )
        axes.plot(
            at,
            table.mean(0),
            linestyle="-" if validation else _DASHES,
            linewidth=1.8 if validation else 1.2,
            markersize=5,
            markevery=max(1, len(at) // 8),
            markerfacecolor=look["color"] if validation else "white",
            zorder=3 if validation else 2.5,
            **look,
        )
    first, last = min(at[0] for at in epochs.values()), max(at[-1] for at in epochs.values())
    axes.set_xlim((first, last) if last > first else (first - 0.5, first + 0.5))
    if last > first:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    else:
        axes.set_xticks([first])
    axes.set_xlabel("epoch")


def _late(tables: Sequence[np.ndarray]) -> np.ndarray:
    values = np.concatenate([table[:, table.shape[1] // 3 :].ravel() for table in tables])
    return values[np.isfinite(values)]


def _apply(scale: Scale | None, axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if scale is None:
        return
    if scale.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(scale.low, scale.high)


def _add_legend(
    figure: "Figure", looks: Mapping[str, dict[str, Any]], seeds: Sequence[int], *, title: str, single_epoch: bool
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    # The title is the legend's: a suptitle and a legend outside the axes would be laid over each other.
    figure.legend(
        [Line2D([], [], linewidth=3, **look) for look in looks.values()],
        list(looks),
        title=title,
        title_fontsize=13,
        loc="outside upper center",
        ncols=min(len(looks), 6),
        frameon=False,
    )
    grey, marker = "#777777", "o" if single_epoch else ""
    dashed = {"linewidth": 1.2, "linestyle": _DASHES, "marker": marker, "markerfacecolor": "white"}
    styles: list[tuple[Any, str]] = [
        (Line2D([], [], color=grey, linewidth=1.8, marker=marker), "validation"),
        (Line2D([], [], color=grey, **dashed), "training"),
    ]
    if seeds[-1] > 1:
        over = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seeds"
        styles.append((Patch(color=grey, alpha=0.25, linewidth=0), f"line: mean, band: minimum to maximum of {over}"))
    else:
        styles.append((Patch(alpha=0), "one seed, so no band"))
    handles, labels = zip(*styles, strict=True)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(styles), frameon=False)
