"""What a trained network says of images: drawn boxes and masks, or the most likely classes."""

import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrla.data.images import UndecodableImageError, read_image
from mrla.deploy import is_exported, open_exported
from mrla.files.atomic_write import write_json, written_whole
from mrla.files.one_writer import alone_in
from mrla.models import task_of
from mrla.train.packages import need
from mrla.train.recipe import Machine
from mrla.train.threads import thread_limit
from mrla.train.trained import load_trained

from ..fonts import drawable
from ..measure import single_device
from .image_files import checked_files, classifier_input, preparation

PREDICTIONS = "predictions.json"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442", "#999999")
"""Okabe and Ito's palette, by class; it begins anew after eight."""


def predict(
    checkpoint: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    score_thresh: float = 0.5,
    top: int = 5,
    machine: Machine | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs a trained network on image files and draws what it finds.

    Of a detector every box and mask above a score, with names; of a classifier the most likely classes under the image.
    An image that lies on its side by its EXIF entry is turned upright first.

    Args:
        checkpoint: A run's folder, a folder of `mrla.save` or `mrla.dense.save`, a ``.ckpt``, or a classifier's file of
            `mrla.deploy.export` (``.onnx``, ``.pt2``, ``.xml``), which runs on the CPU.
        images: Image files, and folders of them.
        out: Folder for ``NAME.png`` of each and ``predictions.json``. A file there that no earlier prediction has drawn
            is never replaced: the drawing gets a number behind its name.
        score_thresh: Below what score a detection is left out.
        top: How many classes are given.
        machine: Where it is computed.
        on_progress: Called with the images done and the images in all.

    Returns:
        What ``predictions.json`` holds, one entry an image: ``file``, ``drawing`` and ``boxes``, ``labels``, ``names``,
        ``scores`` of a detector, or ``names`` and ``scores`` of a classifier. Of an image that cannot be read: ``file``
        and ``error``.

    Raises:
        ValueError: If the checkpoint or every image cannot be read, a number is out of range, or another process writes
            into the folder.
    """
    need("matplotlib")
    machine = machine or Machine()
    device, detects = single_device(machine), False
    if not images:
        raise ValueError("images must be at least one file: got none")
    if not 0 <= score_thresh <= 1:
        raise ValueError(f"score_thresh must be from 0 to 1: got {score_thresh}")
    if top < 1:
        raise ValueError(f"top must be at least 1: got {top}")
    files = checked_files(images)
    if is_exported(checkpoint):
        if machine.accelerator not in ("auto", "cpu"):
            raise ValueError(f"an exported file runs on the CPU: got machine.accelerator={machine.accelerator}")
        model, device = open_exported(checkpoint, threads=machine.threads), torch.device("cpu")
        class_names, prepared = model.facts.class_names, model.facts.preprocessing()
    else:
        network, recipe, class_names = load_trained(checkpoint)
        detects = task_of(network).name == "detection"
        model, prepared = network.to(device).eval(), preparation(network, recipe)
    folder, found = Path(out), []
    # Asked of all classes at once, so that it is said once what cannot be drawn.
    font, drawn_names = drawable(class_names or (), [f"class {label}" for label in range(len(class_names or ()))])
    with alone_in(folder), thread_limit(machine.threads), torch.inference_mode():
        for index, (file, name) in enumerate(zip(files, _drawing_names(files, folder), strict=True)):
            if on_progress is not None:
                on_progress(index, len(files))
            try:
                picture = read_image(file)
            except UndecodableImageError as error:
                found.append({"file": str(file), "error": str(error)})
                continue
            if detects:
                entry, drawn = _found_objects(model, picture, class_names, drawn_names, font, score_thresh, device)
            else:
                entry, drawn = _most_likely(model, picture, class_names, drawn_names, font, prepared, top, device)
            with written_whole(folder / name) as beside:
                drawn.save(beside, format="PNG")
            found.append({"file": str(file), "drawing": name, **entry})
        if all("error" in entry for entry in found):
            raise ValueError(f"no image can be read: {found[0]['error']}")
        if on_progress is not None:
            on_progress(len(files), len(files))
        write_json(folder / PREDICTIONS, {"checkpoint": str(checkpoint), "images": found})
    return found


def _found_objects(
    model: Callable[[Any], Any],
    picture: Any,
    class_names: Sequence[str] | None,
    drawn_names: Sequence[str],
    font: str,
    score_thresh: float,
    device: torch.device,
) -> tuple[dict[str, Any], Any]:
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    image = pil_to_tensor(picture)
    predicted = model([image.to(device).float() / 255])
    kept = {name: entry[predicted[0]["scores"] >= score_thresh].cpu() for name, entry in predicted[0].items()}
    labels, scores = kept["labels"].tolist(), kept["scores"].tolist()
    # RetinaNet and FCOS have an output for label 0 too.
    names = [class_names[label - 1] if class_names and label > 0 else f"label {label}" for label in labels]
    colours = [_COLOURS[label % len(_COLOURS)] for label in labels]
    if "masks" in kept and len(labels):
        image = draw_segmentation_masks(image, kept["masks"][:, 0] >= 0.5, alpha=0.45, colors=colours)
    if len(labels):
        drawn = [drawn_names[label - 1] if class_names and label > 0 else f"label {label}" for label in labels]
        text = [f"{name} {100 * score:.0f} %" for name, score in zip(drawn, scores, strict=True)]
        width = max(1, round(min(image.shape[1:]) / 160))
        image = draw_bounding_boxes(
            _enlarged(image),
            kept["boxes"] * _scale(image),
            text,
            colors=colours,
            width=width,
            font=font,
            font_size=_font_size(image.shape[2] * _scale(image), image.shape[1] * _scale(image)),
            label_colors="white",
            label_background_colors=colours,
            fill_labels=True,
        )
    entry = {"boxes": kept["boxes"].tolist(), "labels": labels, "names": names, "scores": scores}
    return entry, to_pil_image(image)


def _most_likely(
    model: Callable[[Tensor], Any],
    picture: Any,
    class_names: Sequence[str] | None,
    drawn_names: Sequence[str],
    font: str,
    prepared: dict[str, Any],
    top: int,
    device: torch.device,
) -> tuple[dict[str, Any], Any]:
    from PIL import Image, ImageDraw, ImageFont

    logits = model(classifier_input(prepared)(picture)[None].to(device))[0]
    scores, labels = logits.float().softmax(-1).cpu().topk(min(top, logits.numel()))
    names = [class_names[label] if class_names else f"class {label}" for label in labels.tolist()]
    drawn = [drawn_names[label] for label in labels.tolist()] if class_names else names
    lines = [f"{100 * score:5.1f} %  {name}" for score, name in zip(scores.tolist(), drawn, strict=True)]
    shown = picture.resize([side * _scale(picture) for side in picture.size], Image.Resampling.NEAREST)
    size = _font_size(*shown.size)
    letters, margin, line = ImageFont.truetype(font, size), 8, size + size // 3
    canvas = Image.new("RGB", (max(shown.width, 20 * size), shown.height + 2 * margin + line * len(lines)), "white")
    canvas.paste(shown, (0, 0))
    pen = ImageDraw.Draw(canvas)
    for at, words in enumerate(lines):
        pen.text((margin, shown.height + margin + at * line), words, fill="black", font=letters)
    return {"names": names, "scores": scores.tolist()}, canvas


def _font_size(width: int, height: int) -> int:
    """So that names can be read where a large picture is shown small."""
    return max(11, min(width, height) // 40)


def _scale(picture: Any) -> int:
    """By how much a small picture is enlarged, so that names beside its boxes can be read."""
    size = picture.shape[1:] if isinstance(picture, Tensor) else picture.size
    return max(1, round(320 / max(size)))


def _enlarged(image: Tensor) -> Tensor:
    scale = _scale(image)
    return image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def _drawing_names(files: Sequence[Path], folder: Path) -> list[str]:
    """``NAME.png`` for each file, with a number where that is taken by another or by a file that is not ours."""
    # Not all file systems tell large letters from small ones.
    inputs = {file.name for file in files if file.resolve().parent == folder.resolve()}
    replaced = {name.casefold() for name in _drawn_before(folder) - inputs}
    taken = {name.casefold() for name in os.listdir(folder)} - replaced
    names = []
    for file in files:
        candidates = (f"{file.stem}{f'-{count}' if count > 1 else ''}.png" for count in itertools.count(1))
        names.append(next(name for name in candidates if name.casefold() not in taken))
        taken.add(names[-1].casefold())
    return names


def _drawn_before(folder: Path) -> set[str]:
    """The drawings of an earlier prediction in a folder."""
    try:
        images = json.loads((folder / PREDICTIONS).read_bytes())["images"]
        return {entry["drawing"] for entry in images if isinstance(entry.get("drawing"), str)}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return set()  # no prediction, or one that cannot be read: then nothing there is replaced
