"""What a trained network scores and costs."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from mrla.models.dry_run import input_sizes
from mrla.train.arms import count_parameters
from mrla.train.data import DATA_KINDS, Data, Split, completed, image_facts, loader, open_split
from mrla.train.detection_data import (
    DETECTION_KINDS,
    DetectionData,
    collate_detection,
    detection_facts,
    open_detection_split,
)
from mrla.train.engine import thread_limit
from mrla.train.fitting import count_classes, evaluate, evaluate_detector
from mrla.train.recipes import Machine, Recipe
from mrla.train.sampling import SampleKey
from mrla.train.trained import load_trained

from .measure import count_macs, measure_throughput, timing_device


def evaluate_checkpoint(
    checkpoint: str | Path,
    *,
    data: Data | DetectionData | None = None,
    root: str | None = None,
    split: Split = "val",
    batch_size: int = 64,
    workers: int | None = None,
    speed: bool = False,
    machine: Machine | None = None,
) -> dict[str, Any]:
    """Scores and costs of a trained network.

    Args:
        checkpoint: A run's folder, a folder of `mrla.save`, or a ``.ckpt``.
        data: The images; those that it was trained with if not given.
        root: Where those images are, if they have moved.
        split: Which part of them.
        batch_size: Images in one batch.
        workers: Processes that load them; as many as the data say if not given.
        speed: Whether images a second are measured, which takes 33 passes over a batch.
        machine: Where it is computed.

    Returns:
        ``accuracy``, ``accuracy_top5`` (where there are more than five classes), ``loss``, ``images``, ``split``,
        ``parameters``, ``macs`` and, where asked for, ``images_per_second``; of a detector ``box_ap`` and so on in
        place of accuracies, loss and MACs.

    Raises:
        ValueError: If the checkpoint is missing, damaged or of another network, or the images do not fit it.
    """
    machine = machine or Machine()
    model, recipe, class_names = load_trained(checkpoint)
    shown = shown_images(
        checkpoint,
        model,
        recipe,
        class_names,
        data=data,
        root=root,
        split=split,
        batch_size=batch_size,
        workers=workers,
    )
    if shown.detection:
        return _detection_report(model, shown, split, machine, speed)
    smoothing = recipe.label_smoothing if recipe is not None and recipe.smooth_validation else 0.0
    scores = evaluate(model, shown.batches, label_smoothing=smoothing, machine=machine)
    first, _ = shown.samples[SampleKey(0, 0)]
    measured = _speed(model, next(iter(shown.batches))[0], machine) if speed else {}
    return {
        **scores,
        "images": int(scores["images"]),
        "split": split,
        "parameters": count_parameters(model),
        "macs": count_macs(model, tuple(first.shape)),
        **measured,
    }


@dataclass(frozen=True, kw_only=True)
class ShownImages:
    """Annotated images that a trained network is shown.

    Attributes:
        batches: Batches of them, in their order.
        samples: Them one by one.
        class_names: The names of their classes.
        detection: Whether objects are to be found in them.
        masks: Whether the objects have masks that the network finds too.
        words: What they are.
    """

    batches: DataLoader
    samples: Any
    class_names: tuple[str, ...]
    detection: bool
    masks: bool
    words: str


def places_read(
    checkpoint: str | Path, recipe: Recipe | None, data: Data | DetectionData | None, root: str | None
) -> tuple[str, ...]:
    """The checkpoint and the folder of the images that `shown_images` opens, which no output may replace."""
    images_of = data if data is not None or recipe is None else recipe.data
    folder = root if root is not None else getattr(images_of, "root", None)
    return (str(checkpoint),) if folder is None else (str(checkpoint), folder)


def shown_images(
    checkpoint: str | Path,
    model: nn.Module,
    recipe: Recipe | None,
    class_names: tuple[str, ...] | None,
    *,
    data: Data | DetectionData | None = None,
    root: str | None = None,
    split: Split = "val",
    batch_size: int = 64,
    workers: int | None = None,
    by_turns: bool = False,
) -> ShownImages:
    """Opens the images for a trained network, and checks that they are for it.

    Args:
        checkpoint: What it was loaded from, for messages.
        model: The network.
        recipe: What trained it, where that is known.
        class_names: The classes that it was trained on, where they are known.
        data: The images; those that it was trained with if not given.
        root: Where those images are, if they have moved.
        split: Which part of them.
        batch_size: Images in one batch.
        workers: Processes that load them; as many as `data` says if not given.
        by_turns: Whether the classes come in turn, for who looks at the first images alone.

    Returns:
        The images.

    Raises:
        ValueError: If it is not known what they are, they do not fit the network, or a number is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive: got {batch_size}")
    if data is None and recipe is None:
        kinds = ", ".join(DETECTION_KINDS if hasattr(model, "built_as") else DATA_KINDS)
        raise ValueError(
            f"{checkpoint} does not say what images it was trained with: name them, such as --data.kind "
            f"{'coco' if hasattr(model, 'built_as') else 'folder'} --data.root DIR (kinds: {kinds})"
        )
    images_of = data if data is not None else recipe.data  # type: ignore[union-attr]
    if root is not None:
        if "root" not in {field.name for field in fields(images_of)}:
            raise ValueError(f"{images_of.kind} lie in no folder: got data.root={root}; leave it out")
        images_of = replace(images_of, root=root)  # type: ignore[call-arg]
    if workers is not None:
        images_of = replace(images_of, workers=workers)
    detection = hasattr(model, "built_as")
    if detection == isinstance(images_of, Data):
        kinds = DETECTION_KINDS if detection else DATA_KINDS
        raise ValueError(f"the images must be of {', '.join(kinds)} for this network: got {images_of.kind}")
    masks, collate = False, None
    if isinstance(images_of, Data):
        images_of = completed(images_of, getattr(model, "pretrained_cfg", None))
        facts: Any = image_facts(images_of)
        _check_classes(class_names, facts.class_names)
        samples: Any = open_split(images_of, split)
        samples = samples.by_turns() if by_turns else samples
        channels = input_sizes(model)[0][0]
        if channels != facts.in_chans:
            raise ValueError(
                f"the images must have the {channels} channels that the network takes: they have {facts.in_chans}"
            )
        if class_names is None:  # else their number is the network's
            _check_number(count_classes(model, samples[SampleKey(0, 0)][0][None]), facts.class_names)
    else:
        facts = detection_facts(images_of)
        _check_classes(class_names, facts.class_names)
        built_with: Any = model.built_as["arguments"]  # type: ignore[index]
        _check_number(built_with["num_classes"] - 1, facts.class_names)
        samples, collate = open_detection_split(images_of, split), collate_detection
        masks = facts.has_masks and model.built_as["name"] == "mask_rcnn"  # type: ignore[index]
    return ShownImages(
        batches=loader(samples, batch_size=min(batch_size, len(samples)), workers=images_of.workers, collate=collate),
        samples=samples,
        class_names=facts.class_names,
        detection=detection,
        masks=masks,
        words=f"{images_of.kind}, {split} part",
    )


def _detection_report(
    model: nn.Module, shown: ShownImages, split: Split, machine: Machine, speed: bool
) -> dict[str, Any]:
    samples = shown.samples
    scores = evaluate_detector(model, shown.batches, masks=shown.masks, machine=machine)
    first, _ = samples[SampleKey(0, 0)]
    measured = _speed(model, first[None], machine, rounds=10) if speed else {}
    return {
        **scores,
        "images": len(samples),
        "split": split,
        "parameters": count_parameters(model),
        **measured,
    }


def _speed(model: nn.Module, images: Tensor, machine: Machine, *, rounds: int = 30) -> dict[str, Any]:
    device = timing_device(machine.accelerator)
    with thread_limit(machine.threads):
        rates = measure_throughput({"network": model.to(device)}, images.to(device), rounds=rounds)
    return {"images_per_second": asdict(rates["network"])}


def _check_classes(known: tuple[str, ...] | None, given: tuple[str, ...]) -> None:
    if known is not None and known != given:
        raise ValueError(
            f"the images must have the classes that the network was trained on: it knows {_shown(known)}, they have "
            f"{_shown(given)}"
        )


def _check_number(outputs: int, given: tuple[str, ...]) -> None:
    if outputs != len(given):
        raise ValueError(
            f"the images must have the classes that the network was trained on: it knows {outputs}, they have "
            f"{_shown(given)}"
        )


def _shown(names: tuple[str, ...]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
