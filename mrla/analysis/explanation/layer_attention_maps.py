"""How much each block of a network takes from each other: mean and spread over images, and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mrla.models import MixedChain, Recording
from mrla.models.mixed_blocks import MIXER
from mrla.ops import MRLALight

from ..curves import STYLE, save_figure
from ..fonts import matplotlib_fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WEIGHT = "weight of attention"
MAGNITUDE = "factor before the source, |lambda ... lambda| times the gate"
_LETTERED_CELLS = 12
"""More columns than this, and the cells of a picture are too small for their numbers."""


class LayerAttentionStatistics:
    """Mean and spread of retrieval maps over images, batch by batch."""

    def __init__(self):
        self._sums: dict[MixedChain, tuple[int, Tensor, Tensor, Tensor]] = {}

    def add(self, maps: Sequence[tuple[MixedChain, Tensor]]) -> None:
        """Takes in the maps (b, g, t, s) of each chain, as `Recording.attention_over_layers` gives them."""
        for chain, weights in maps:
            weights = weights.detach().cpu().double()
            over_heads = weights.mean(1)
            parts = len(weights), weights.sum(0), over_heads.sum(0), over_heads.square().sum(0)
            if chain in self._sums:
                parts = tuple(old + new for old, new in zip(self._sums[chain], parts, strict=True))
            self._sums[chain] = parts  # type: ignore[assignment]

    def records(self, model: nn.Module) -> list[dict[str, Any]]:
        """What is known, one entry a chain: docs/reference/json_keys.md lists the keys."""
        return [self._record(model, chain, *sums) for chain, sums in self._sums.items()]

    def _record(
        self, model: nn.Module, chain: MixedChain, images: int, by_head: Tensor, total: Tensor, squares: Tensor
    ) -> dict[str, Any]:
        mixer: Any = model.get_submodule(f"{chain.mixers[0]}.{MIXER}")
        mean = total / images
        # What rounding makes of a spread of zero may be below it.
        variance = ((squares - images * mean.square()) / max(1, images - 1)).clamp_min(0)
        spread = variance.sqrt() if images > 1 else torch.full_like(mean, torch.nan)
        return {
            "name": chain.name,
            "blocks": list(chain.blocks),
            "mixers": list(chain.mixers),
            "sources": ["input", *chain.blocks],
            "heads": mixer.num_heads,
            "head_dim": mixer.channels // mixer.num_heads,
            "quantity": MAGNITUDE if isinstance(mixer, MRLALight) else WEIGHT,
            "mean": nested(mean),
            "sd": nested(spread),
            "by_head": nested(by_head / images),
        }


def of_one_image(recording: Recording) -> list[Any]:
    """The map of each chain for the one image seen, in the mean over heads; None where a block reads no such source."""
    return [nested(weights.detach().cpu().mean(1)[0]) for _, weights in recording.attention_over_layers()]


def nested(values: Tensor) -> Any:
    """Numbers as lists in lists, to six digits, None in place of NaN."""
    return _plain(values.tolist())


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if value != value else float(f"{value:.6g}")


def draw_layer_attention(chains: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> Path:
    """Draws the maps of all chains as one PNG: rows are blocks, columns what they hear, with the spread over images.

    Args:
        chains: As `LayerAttentionStatistics.records` gives them.
        path: The file.
        title: Heading.

    Returns:
        The file.

    Example:
        >>> import tempfile
        >>> chain = {"name": "layer1", "blocks": ["layer1.0"], "sources": ["input", "layer1.0"], "quantity": WEIGHT,
        ...          "mean": [[None, 1.0]], "sd": [[None, 0.0]]}
        >>> draw_layer_attention([chain], Path(tempfile.mkdtemp()) / "map.png", title="One").name
        'map.png'
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(2, len(chains))
    lines = -(-len(chains) // columns)
    heights = [max(len(chain["blocks"]) for chain in chains[at * columns : (at + 1) * columns]) for at in range(lines)]
    with matplotlib.rc_context({**STYLE, **matplotlib_fonts([title]), "axes.grid": False}):
        figure = Figure(
            figsize=(6.4 * columns, 0.6 + sum(1.7 + 0.55 * height for height in heights)),
            layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12),
        )
        figure.suptitle(f"{title}; mean ± standard deviation over images", fontsize=12)
        ratios = [1.2 + 0.55 * height for height in heights]
        panels = figure.subplots(lines, columns, squeeze=False, gridspec_kw={"height_ratios": ratios})
        for axes, chain in zip(panels.flat, chains, strict=False):
            _draw_map(axes, chain)
        for axes in panels.flat[len(chains) :]:
            axes.set_axis_off()
        return save_figure(figure, path, dpi=110)


def _draw_map(axes: "Axes", chain: Mapping[str, Any]) -> None:
    mean, spread = (np.array(chain[name], dtype=float) for name in ("mean", "sd"))
    present = np.isfinite(mean).any(axis=0)
    shown = np.flatnonzero(present | (np.arange(mean.shape[1]) > 0))  # a form that never reads the input has no column
    mean, spread = mean[:, shown], spread[:, shown]
    top = max(1.0, float(np.nanmax(mean))) if chain["quantity"] == WEIGHT else float(np.nanmax(mean)) or 1.0
    picture = axes.imshow(mean, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    axes.set_facecolor("#f0f0f0")
    axes.figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02)
    axes.set_xticks(range(len(shown)), [_short(chain["sources"][at], chain["name"]) for at in shown])
    axes.set_yticks(range(len(mean)), [_short(block, chain["name"]) for block in chain["blocks"]])
    axes.set_xlabel("takes from")
    axes.set_ylabel("block")
    axes.set_title(f"{chain['name'] or 'network'}: {chain['quantity']}", fontsize=9.5)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    if len(shown) > _LETTERED_CELLS:
        return
    for row, column in np.argwhere(np.isfinite(mean)):
        value, sd = mean[row, column], spread[row, column]
        text = f"{value:.2f}" + ("" if np.isnan(sd) else f"\n± {sd:.2f}")
        dark = value < 0.6 * top
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def _short(path: str, container: str) -> str:
    return path.removeprefix(f"{container}.")
