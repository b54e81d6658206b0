"""What a network's blocks take from one another, whether it matters, and where the network looks."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mrla.data.samples import turns
from mrla.files.atomic_write import write_json, written_folder
from mrla.messages.brief import Brief
from mrla.models import attach_recipe, recording, task_of
from mrla.models.modes import in_eval_mode
from mrla.train.packages import need
from mrla.train.runs import versions

from ..report.page import write_report
from .activation_maps import CamTarget, plain_twin
from .cam_targets import Picture, cam_target_for, draw_cam_overlay
from .effects import (
    Batches,
    Cut,
    Outcomes,
    State,
    changes,
    check_limit,
    cut_records,
    limited,
    outcomes_in,
    possible_cuts,
    without_mixers,
)
from .layer_attention_maps import LayerAttentionStatistics, draw_layer_attention, of_one_image
from .margins import MARGIN, check_margin, judge_first
from .passes import OnProgress, Passes
from .verdicts import verdict_of

EXPLANATION = "explain.json"
MAPS = "retrieval.png"
TERM_IMAGES = 64
"""Over how many images the lengths of light's two terms are taken: each value is made a second time for that."""
NOTE = (
    "Intervals of the accuracy are Tango's for the same images, those of the loss are of paired t tests, both with "
    "Bonferroni's correction over the cuts of one kind; they say nothing of other images, nor of a network trained "
    "with another seed. That nothing is shown does not say that nothing is there. A mixer whose cut changes nothing "
    "may still have helped in training. Cuts are made one at a time: two that are harmless alone need not be so "
    "together."
)


@dataclass(frozen=True, kw_only=True, repr=False)
class Explanation(Brief):
    """What was found out about a network.

    Attributes:
        folder: Where it was written; None where it was not.
        content: What ``explain.json`` holds; docs/reference/json_keys.md lists its keys.
    """

    folder: Path | None
    content: dict[str, Any]

    def _brief(self) -> dict[str, object]:
        return {
            "folder": None if self.folder is None else str(self.folder),
            "model": self.content["model"],
            "images": self.content["images"]["count"],
            "verdict": " ".join(self.content["verdict"]),
        }


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a network and its images come from, for the record.

    Attributes:
        checkpoint: What it was loaded from.
        command: The command line that does the same again.
        source: The images, in words.
        read: Files and folders that are read, which no output may replace.
    """

    checkpoint: str | None = None
    command: str | None = None
    source: str = "the caller's loader"
    read: tuple[str, ...] = ()


def explain(
    model: nn.Module,
    loader: Batches | None = None,
    *,
    pictures: Sequence[Picture] = (),
    cuts: Sequence[str] = ("mixers", "links"),
    margin: float = MARGIN,
    max_images: int | None = 1000,
    class_names: Sequence[str] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    origin: Origin | None = None,
    on_progress: OnProgress | None = None,
) -> Explanation:
    """Records what each block of a network takes from the others, ablates it part by part, and maps where it looks.

    - Attention over layers: for each chain how much block t takes from block s, by `mrla.ops.attention_over_layers`, in
      the mean over images with its spread, by head, and for each picture.
    - Effect: loss and accuracy with one mixer, link or head cut, and with all mixers, on the same images.
    - Terms: how long the attention term and the lambda term of light's updates are.
    - Class activation maps of each picture, with the mixers and without, by captum.

    Args:
        model: A network with mixers; a classifier for all but the first.
        loader: Batches of images (b, c, h, w) and labels (b,); of a detector lists of images. Each batch is taken once,
            for the whole network and all cuts. May be left out where there are pictures.
        pictures: Images to look at one by one, `mrla.analysis.Picture`. Without any, the loader's
            first four, of its first batch those of as many classes as there are.
        cuts: What is cut, of ``mixers``, ``links`` and ``heads``; each is a pass over the images. Empty for nothing.
        margin: How many points of accuracy `mrla.prune` would let be lost; the explanation says of the mixer whose cut
            costs least whether the network without it is shown to lose less, which is where pruning begins.
        max_images: How many of the loader's images are used; None for all.
        class_names: Names of the classes.
        out: A new or empty folder for ``explain.json``, ``report.html`` and pictures; None to write nothing.
        overwrite: Whether a folder that `explain` wrote before is replaced, all of it.
        origin: Where it all comes from, for the record.
        on_progress: Called with the passes over a batch done and those in all.

    Returns:
        The explanation.

    Raises:
        ValueError: If the network has no mixers, there is neither loader nor picture, or an argument is not as
            described.

    Example:
        >>> import mrla, timm
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> model = mrla.attach(timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=3), "base")
        >>> data = TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)
        >>> found = mrla.explain(model, DataLoader(data, batch_size=3), cuts=["mixers"])
        >>> [chain["name"] for chain in found.content["chains"]]
        ['layer1', 'layer2', 'layer3', 'layer4']
        >>> len(found.content["cuts"]["mixers"])
        8
    """
    start = time.monotonic()
    need(*(["scipy"] if cuts else []), *(["matplotlib", "jinja2", "captum"] if out is not None else []))
    _check(model, loader, pictures, cuts, max_images)
    check_margin(margin)
    chosen = {kind: possible_cuts(model, [kind]) for kind in dict.fromkeys(cuts)}
    origin = origin or Origin()
    with (
        nullcontext()
        if out is None
        else written_folder(Path(out), record=EXPLANATION, overwrite=overwrite, inputs=origin.read) as folder
    ):
        statistics, effect, terms, whole, images = LayerAttentionStatistics(), None, None, None, len(pictures)
        if loader is not None:
            passes = Passes(loader, max_images, 2 + sum(map(len, chosen.values())) if chosen else 1, on_progress)
            if _detects(model):
                images = _detected(model, loader, max_images, statistics, passes)
            else:
                whole, effect = _classified(model, loader, chosen, margin, max_images, statistics, passes)
                terms, images = _terms(model, loader), len(whole.labels)
            passes.end()
        cam_targets = list(pictures) or _first_pictures(model, loader, class_names)
        found = _look(model, cam_targets, statistics if loader is None else None, class_names, folder)
        recipe, options = _recipe_of(model), {"cuts": list(chosen), "margin": margin, "max_images": max_images}
        content: dict[str, Any] = {
            "checkpoint": origin.checkpoint,
            "model": task_of(model).title(model),
            "method": recipe.get("method"),
            "attach": recipe,
            "task": task_of(model).name,
            "images": {"count": images, "source": origin.source},
            "baseline": None if whole is None else whole.scores(),
            "chains": statistics.records(model),
            "terms": terms,
            "cuts": effect,
            "pictures": found,
            "configuration": {**options, "device": str(_device(model)), "threads": torch.get_num_threads()},
            "versions": versions(),
            "command": origin.command
            or f"mrla.explain(model, loader, {', '.join(f'{name}={value!r}' for name, value in options.items())})",
            "note": NOTE,
        }
        content["verdict"] = verdict_of(content)
        content["seconds"] = time.monotonic() - start
        if folder is not None:
            _write(folder, content)
    return Explanation(folder=None if out is None else Path(out), content=content)


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    if content["chains"]:
        title = f"{content['model']}, {content['method']}: {content['images']['count']} images"
        draw_layer_attention(content["chains"], folder / MAPS, title=title)
    write_json(folder / EXPLANATION, content)
    write_report(folder, content, kind="explain")


def _check(
    model: nn.Module, loader: Any, pictures: Sequence[Picture], cuts: Sequence[str], max_images: int | None
) -> None:
    if loader is None and not pictures:
        raise ValueError("there must be images to look at: got neither a loader nor pictures; give one of them")
    check_limit(max_images)
    task = task_of(model)
    if task.name not in ("classification", "detection"):
        raise ValueError(f"only classifiers and detectors are explained so far: got a {task.noun}, {task.title(model)}")
    if cuts and (_detects(model) or loader is None):
        what = (
            "of this detector the attention over layers is recorded" if _detects(model) else "there are pictures alone"
        )
        raise ValueError(
            f"cuts are measured on classifiers, over a loader's images and labels: {what}; leave the cuts out (cuts=[])"
        )


def _classified(
    model: nn.Module,
    loader: Batches,
    chosen: Mapping[str, Sequence[Cut]],
    margin: float,
    max_images: int | None,
    statistics: LayerAttentionStatistics,
    passes: Passes,
) -> tuple[Outcomes, dict[str, Any] | None]:
    """A classifier's outputs and attention over layers, and what is lost with each ablation and with all."""

    @contextmanager
    def recorded_whole() -> Iterator[None]:
        with recording(model) as recorded:
            yield
            statistics.add(recorded.attention_over_layers())

    cuts = [one for of_kind in chosen.values() for one in of_kind]
    states: list[State] = [recorded_whole]
    if chosen:
        states += [partial(without_mixers, model), *(one.of(model) for one in cuts)]
    whole, *found = outcomes_in(model, loader, states, images=max_images, on_pass=passes.step)
    if not chosen:
        return whole, None
    bare, *cut_out = found
    effect: dict[str, Any] = {"images": len(whole.labels), "all": {"block": "all mixers", **changes(whole, bare)}}
    for kind, of_kind in chosen.items():
        of_these, cut_out = cut_out[: len(of_kind)], cut_out[len(of_kind) :]
        effect[kind] = cut_records(whole, of_these, of_kind)
        if kind == "mixers":
            effect["least"] = judge_first(whole, of_these, effect[kind], margin=margin).record()
    return whole, effect


def _detected(
    model: nn.Module, loader: Batches, max_images: int | None, statistics: LayerAttentionStatistics, passes: Passes
) -> int:
    """Records one pass of a detector; returns over how many images."""
    images = 0
    with recording(model) as recorded, in_eval_mode(model), torch.inference_mode():
        for shown, _ in limited(loader, max_images):
            model([image.to(_device(model)) for image in shown])
            statistics.add(recorded.attention_over_layers())
            images += len(shown)
            recorded.clear()
            passes.step()
    return images


def _detects(model: nn.Module) -> bool:
    return task_of(model).name == "detection"


def _recipe_of(model: nn.Module) -> dict[str, Any]:
    """How the mixers were attached; of a detector to its backbone."""
    return next((recipe for module in model.modules() if (recipe := attach_recipe(module))), {})


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _terms(model: nn.Module, loader: Batches) -> list[dict[str, Any]] | None:
    """The two terms of each light mixer's update over the first images; None of other methods."""
    with recording(model, update_norms=True) as recorded, in_eval_mode(model), torch.inference_mode():
        for shown, _ in limited(loader, TERM_IMAGES):
            model(shown.to(_device(model)))
    records = []
    for block, terms in recorded.update_norms().items():
        attention, carried = terms.attention.double(), terms.carried.double()
        share = attention / (attention + carried).clamp_min(1e-300)
        records.append(
            {
                "block": block,
                "attention": float(attention.mean()),
                "carried": float(carried.mean()),
                "share": float(share.mean()),
                "share_sd": float(share.std()) if len(share) > 1 else None,
            }
        )
    return records or None


def _first_pictures(model: nn.Module, loader: Batches | None, class_names: Sequence[str] | None) -> list[Picture]:
    if loader is None or _detects(model):
        return []
    shown: list[Any] = []
    labels: list[int] = []
    for images, right in limited(loader, None):
        shown, labels = [*shown, *images], [*labels, *right.tolist()]
        if len(labels) >= 4:
            break
    found = []
    for place in sorted(turns(labels)[:4]):
        name = class_names[labels[place]] if class_names else f"class {labels[place]}"
        found.append(Picture(name=f"image {place + 1} ({name})", input=shown[place]))
    return found


def _look(
    model: nn.Module,
    pictures: Sequence[Picture],
    statistics: LayerAttentionStatistics | None,
    class_names: Sequence[str] | None,
    folder: Path | None,
) -> list[dict[str, Any]]:
    """The attention over layers of each picture, and where the network looks; without a loader pictures are counted."""
    if not pictures:
        return []
    plain = None if folder is None or _detects(model) else plain_twin(model)
    places: dict[torch.Size, CamTarget] = {}
    records = []
    for index, picture in enumerate(pictures):
        with recording(model) as recorded, in_eval_mode(model), torch.inference_mode():
            image = picture.input.to(_device(model))
            model([image] if _detects(model) else image[None])
        if statistics is not None:
            statistics.add(recorded.attention_over_layers())
        record = {"file": picture.name, "drawing": None, "caption": None, "retrieval": of_one_image(recorded)}
        if folder is not None and plain is not None:
            name = f"looked-at-{index + 1}.png"
            try:
                shape = picture.input.shape
                if shape not in places:
                    places[shape] = cam_target_for(model, plain, shape)
                said = draw_cam_overlay(model, plain, picture, places[shape], class_names, folder / name)
                record |= {"caption": said, "drawing": name}
            except ValueError as error:  # not every network has a place to look at
                record["caption"] = f"no activation maps: {error}"
        records.append(record)
    return records
