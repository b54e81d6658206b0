"""What a trained network scores and costs."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mrla.data.sampling import SampleKey
from mrla.data.sources import DataSource, Split
from mrla.deploy import ExportedNetwork
from mrla.train.arms import count_parameters
from mrla.train.fitting import evaluate, evaluate_detector
from mrla.train.recipe import Machine
from mrla.train.threads import thread_limit

from ..measure import count_macs, measure_throughput, timing_device
from .study import StudyImages, open_study


def evaluate_checkpoint(
    checkpoint: str | Path,
    *,
    data: DataSource | None = None,
    root: str | None = None,
    split: Split = "val",
    batch_size: int = 64,
    workers: int | None = None,
    speed: bool = False,
    machine: Machine | None = None,
) -> dict[str, Any]:
    """Scores and costs of a trained network.

    Args:
        checkpoint: A run's folder, a folder of `mrla.save`, a ``.ckpt``, or a classifier's file of `mrla.export`, which
            runs on the CPU.
        data: The images; those that it was trained with if not given.
        root: Where those images are, if they have moved.
        split: Which part of them.
        batch_size: Images in one batch.
        workers: Processes that load them; as many as the data say if not given.
        speed: Whether images a second are measured, which takes 33 passes over a batch.
        machine: Where it is computed.

    Returns:
        ``accuracy``, ``accuracy_top5`` (where there are more than five classes), ``loss``, ``images``, ``split``,
        ``parameters``, ``macs`` (neither of an exported file) and, where asked for, ``images_per_second``; of a
        detector ``box_ap`` and so on in place of accuracies, loss and MACs.

    Raises:
        ValueError: If the checkpoint is missing, damaged or of another network, or the images do not fit it.
    """
    study = open_study(
        checkpoint, data=data, root=root, split=split, batch_size=batch_size, workers=workers, exported_too=True
    )
    assert study.images is not None  # they are needed
    machine, model, images = machine or Machine(), study.model, study.images
    if study.is_detector:
        return _detection_report(model, images, split, machine, speed)
    recipe = study.recipe
    smoothing = recipe.label_smoothing if recipe is not None and recipe.smooth_validation else 0.0
    scores = evaluate(model, images.batches, label_smoothing=smoothing, machine=machine)
    first, _ = images.samples[SampleKey(0, 0)]
    measured = _speed(model, next(iter(images.batches))[0], machine) if speed else {}
    costs: dict[str, Any] = {}
    if not isinstance(model, ExportedNetwork):
        costs = {"parameters": count_parameters(model), "macs": count_macs(model, tuple(first.shape))}
    return {**scores, "images": int(scores["images"]), "split": split, **costs, **measured}


def _detection_report(
    model: nn.Module, images: StudyImages, split: Split, machine: Machine, speed: bool
) -> dict[str, Any]:
    samples = images.samples
    scores = evaluate_detector(model, images.batches, masks=images.masks, machine=machine)
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
