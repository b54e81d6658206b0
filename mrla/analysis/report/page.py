"""The report: what a comparison or an explanation found, as one page for a browser."""

import base64
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mrla.files.atomic_write import written_whole

from ..curves import SCORES, arm_looks, draw_curves
from .command import repeat_comparison
from .explanations import SHOWN, cut_tables, layer_attention_map, term_rows
from .intervals import track
from .pictures import inlined
from .plots import bokeh_script, curve_panels
from .tables import comparison_table, flat, told

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT = "report.html"
_TEMPLATES = Path(__file__).with_name("templates")
_KEYS = {
    "compare": (
        *(
            "recipe",
            "arms",
            "seeds",
            "figure",
            "table",
            "differences",
            "note",
            "notes",
            "versions",
            "epochs",
            "seconds",
        ),
    ),
    "explain": (
        *("checkpoint", "model", "method", "attach", "verdict", "images", "baseline", "chains", "terms", "cuts"),
        *("task", "pictures", "configuration", "versions", "command", "seconds", "note"),
    ),
}


def write_report(folder: Path, content: Mapping[str, Any], *, kind: Literal["compare", "explain"]) -> Path:
    """Writes ``report.html``: one file that needs no network, for a screen, a phone or paper, light or dark.

    Names and paths in the content are shown as text, whatever they hold: the page lets no other script run than its
    own. Equal content gives a page equal byte for byte.

    Args:
        folder: Where it goes, and where the pictures are that an explanation names; made if missing.
        content: The content of ``compare.json`` or ``explain.json``.
        kind: Which of the two.

    Returns:
        The page.

    Raises:
        ValueError: If `kind` is neither, the content lacks something, or a picture is not in `folder`.

    Example:
        The content of a comparison takes a minute to make, so this is not run with the tests::

            result = mrla.compare("digits_resnet18", seeds=3)
            write_report(result.folder, result.content, kind="compare")
    """
    if kind not in _KEYS:
        raise ValueError(f"kind must be one of {', '.join(_KEYS)}: got {kind!r}")
    if missing := [key for key in _KEYS[kind] if key not in content]:
        raise ValueError(f"content must be that of {kind}.json: it lacks {', '.join(missing)}; make it anew")
    view = _compared(content) if kind == "compare" else _explained(content, folder)
    scripts = [*view.pop("scripts"), (_TEMPLATES / "report.js").read_text(encoding="utf-8")]
    page = (
        _environment()
        .get_template(f"{kind}.html.j2")
        .render(
            view,
            content=content,
            style=(_TEMPLATES / "report.css").read_text(encoding="utf-8"),
            scripts=scripts,
            # No other script than these can run, and nothing can be fetched, even if something slipped through.
            hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
            versions=list(flat(content["versions"])),
            seconds=f"{content['seconds']:,.0f}",
        )
    )
    path = folder / REPORT
    with written_whole(path) as beside:
        beside.write_text(page, encoding="utf-8", errors="backslashreplace", newline="\n")  # half letters in file names
    return path


def _compared(content: Mapping[str, Any]) -> dict[str, Any]:
    recipe, arms = content["recipe"], content["arms"]
    looks = arm_looks(arms, arms[0])
    headings, rows = comparison_table(content)
    differences = content["differences"]
    return {
        "title": f"{recipe['recipe']}: {recipe['model']}",
        "colours": {arm: None if arm == arms[0] else looks[arm]["color"] for arm in arms},
        "score": SCORES[content["figure"]],
        "headings": headings,
        "rows": rows,
        "told": {arm: told(entry) for arm, entry in differences.items()},
        "scale": track(list(differences.values()), unit=0.01),
        "panels": curve_panels(content["epochs"], baseline=arms[0], score=content["figure"]),
        "still": _still(content),
        "repeat": repeat_comparison(content),
        "configuration": list(flat(recipe)),
        "scripts": [bokeh_script()],
    }


def _explained(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    pictures = content["pictures"]
    drawn = [picture for picture in pictures if picture["drawing"] is not None]
    images = inlined(folder, [picture["drawing"] for picture in drawn])
    return {
        "title": f"{content['model']} with {content['method'] or 'mixers'}",
        "maps": [
            layer_attention_map(
                chain, {f"image {picture['file']}": picture["retrieval"][place] for picture in pictures}
            )
            for place, chain in enumerate(content["chains"])
        ],
        "terms": None if content["terms"] is None else term_rows(content["terms"]),
        "cuts": None if content["cuts"] is None else cut_tables(content["cuts"]),
        "shown": SHOWN,
        "pictures": [{**picture, "image": image} for picture, image in zip(drawn, images, strict=True)],
        "undrawn": [picture for picture in pictures if picture["drawing"] is None and picture["caption"]],
        "repeat": content["command"],
        "configuration": list(flat({**content["configuration"], "attach": content["attach"]})),
        "scripts": [],
    }


def _still(content: Mapping[str, Any]) -> str:
    """The curves for paper, and for browsers without scripts."""
    title = f"{content['recipe']['recipe']}: {content['recipe']['model']}"
    with tempfile.TemporaryDirectory() as folder:
        _, drawing = draw_curves(
            content["epochs"], Path(folder), title=title, baseline=content["arms"][0], score=content["figure"]
        )
        return f"data:image/svg+xml;base64,{base64.b64encode(drawing.read_bytes()).decode()}"


def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # BokehJS reads a document in order: what is referred to has to come first.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters["signed"] = lambda value, digits: f"{value:+.{digits}f}"
    environment.filters["chance"] = lambda value: f"{value:.3f}" if value >= 0.001 else "below 0.001"
    environment.filters["fixed"] = lambda value, digits: f"{value:.{digits}f}"
    return environment


def _digest(script: str) -> str:
    return base64.b64encode(sha256(script.encode()).digest()).decode()
