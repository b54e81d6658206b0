"""What a trained network scores and costs."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

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
from mrla.train.fitting import evaluate, evaluate_detector
from mrla.train.recipes import Machine
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
    machine: Machine | None = None,
) -> dict[str, Any]:
    """Scores and costs of a trained network.

    Args:
        checkpoint: A run's folder, a folder of `mrla.save`, or a ``.ckpt``.
        data: The images; those that it was trained with if not given.
        root: Where those images are, if they have moved.
        split: Which part of them.
        batch_size: Images in one batch.
        machine: Where it is computed.

    Returns:
        ``accuracy``, ``accuracy_top5``, ``loss``, ``images``, ``split``, ``parameters``, ``macs`` and
        ``images_per_second``; of a detector ``box_ap`` and so on in place of accuracies, loss and MACs.

    Raises:
        ValueError: If the checkpoint is missing, damaged or of another network, or the images do not fit it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive: got {batch_size}")
    machine = machine or Machine()
    model, recipe, class_names = load_trained(checkpoint)
    if data is None and recipe is None:
        raise ValueError(f"{checkpoint} does not say what images it was trained with: say --data.kind and --data.root")
    images_of = data if data is not None else recipe.data  # type: ignore[union-attr]
    if root is not None:
        if "root" not in {field.name for field in fields(images_of)}:
            raise ValueError(f"{images_of.kind} lie in no folder: got data.root={root}; leave it out")
        images_of = replace(images_of, root=root)  # type: ignore[call-arg]
    finds_objects = hasattr(model, "built_as")
    if finds_objects == isinstance(images_of, Data):
        kinds = DETECTION_KINDS if finds_objects else DATA_KINDS
        raise ValueError(f"the images must be of {', '.join(kinds)} for this network: got {images_of.kind}")
    if not isinstance(images_of, Data):
        return _detection_report(model, images_of, class_names, split, batch_size, machine)
    images_of = completed(images_of, getattr(model, "pretrained_cfg", None))
    facts = image_facts(images_of)
    _check_classes(class_names, facts.class_names)
    samples = open_split(images_of, split)
    batches = loader(samples, batch_size=min(batch_size, len(samples)), workers=images_of.workers)
    channels = input_sizes(model)[0][0]
    if channels != facts.in_chans:
        raise ValueError(
            f"the images must have the {channels} channels that the network takes: they have {facts.in_chans}"
        )
    smoothing = recipe.label_smoothing if recipe is not None and recipe.smooth_validation else 0.0
    scores = evaluate(model, batches, label_smoothing=smoothing, machine=machine)
    images, _ = next(iter(batches))
    device = timing_device(machine.accelerator)
    with thread_limit(machine.threads):
        rates = measure_throughput({"network": model.to(device)}, images.to(device))
    return {
        **scores,
        "images": int(scores["images"]),
        "split": split,
        "parameters": count_parameters(model),
        "macs": count_macs(model, (facts.in_chans, facts.size, facts.size)),
        "images_per_second": asdict(rates["network"]),
    }


def _detection_report(
    model: nn.Module,
    data: DetectionData,
    class_names: tuple[str, ...] | None,
    split: Split,
    batch_size: int,
    machine: Machine,
) -> dict[str, Any]:
    facts = detection_facts(data)
    _check_classes(class_names, facts.class_names)
    samples = open_detection_split(data, split)
    batches = loader(samples, batch_size=min(batch_size, len(samples)), workers=data.workers, collate=collate_detection)
    masks = facts.has_masks and model.built_as["name"] == "mask_rcnn"  # type: ignore[index]
    scores = evaluate_detector(model, batches, masks=masks, machine=machine)
    first, _ = samples[SampleKey(0, 0)]
    device = timing_device(machine.accelerator)
    with thread_limit(machine.threads):
        rates = measure_throughput({"network": model.to(device)}, first[None].to(device), rounds=10)
    return {
        **scores,
        "images": len(samples),
        "split": split,
        "parameters": count_parameters(model),
        "images_per_second": asdict(rates["network"]),
    }


def _check_classes(known: tuple[str, ...] | None, given: tuple[str, ...]) -> None:
    if known is not None and known != given:
        raise ValueError(
            f"the images must have the classes that the network was trained on: it knows {_shown(known)}, they have "
            f"{_shown(given)}"
        )


def _shown(names: tuple[str, ...]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
