"""A trained network and the images that it is shown: what evaluation, explanation and pruning begin with."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from mrla.data.detection_sources import (
    DETECTION_KINDS,
    DetectionData,
    collate_detection,
    detection_facts,
    open_detection_split,
)
from mrla.data.sampling import SampleKey
from mrla.data.sources import DATA_KINDS, Data, Split, completed, image_facts, loader, open_split
from mrla.dense import count_objects, finds_masks
from mrla.deploy import ExportedNetwork, is_exported, open_exported
from mrla.models import is_attached, task_of
from mrla.models.dry_run import input_sizes
from mrla.train.fitting import count_classes
from mrla.train.recipes import Recipe
from mrla.train.trained import load_trained


@dataclass(frozen=True, kw_only=True)
class StudyImages:
    """Annotated images that a trained network is shown.

    Attributes:
        batches: Batches of them, in their order.
        samples: Them one by one.
        class_names: The names of their classes.
        masks: Whether they hold objects with masks, and the network finds masks.
        source: What they are, in words.
    """

    batches: DataLoader
    samples: Any
    class_names: tuple[str, ...]
    masks: bool
    source: str


@dataclass(frozen=True, kw_only=True)
class Study:
    """A trained network, and the images that it is shown.

    Attributes:
        model: The network, in eval mode.
        recipe: What trained it, where that is known.
        class_names: Names of its classes, where they are known: its own, or those of the images.
        images: The images; None where nothing is known of them and none are needed.
        read: The checkpoint and the folder of the images, which no output may replace.
    """

    model: nn.Module
    recipe: Recipe | None
    class_names: tuple[str, ...] | None
    images: StudyImages | None
    read: tuple[str, ...]

    @property
    def is_detector(self) -> bool:
        """Whether the network finds objects; else it is a classifier."""
        return _is_detector(self.model)


def open_study(
    checkpoint: str | Path,
    *,
    data: Data | DetectionData | None = None,
    root: str | None = None,
    split: Split = "val",
    batch_size: int = 64,
    workers: int | None = None,
    by_turns: bool = False,
    images_needed: bool = True,
    mixers_needed: bool = False,
    classifiers_only: bool = False,
    exported_too: bool = False,
) -> Study:
    """Loads a trained network, opens images for it, and checks that they fit one another.

    Args:
        checkpoint: A run's folder, a folder of `mrla.save` or `mrla.dense.save`, ``hf-hub:owner/name``, a ``.ckpt``, or
            a file of `mrla.export`.
        data: The images; those that it was trained with if not given.
        root: Where those images are, if they have moved.
        split: Which part of them.
        batch_size: Images in one batch.
        workers: Processes that load them; as many as the data say if not given.
        by_turns: Whether the classes come in turn, for who looks at the first images alone.
        images_needed: Whether it is an error that nothing is known of the images.
        mixers_needed: Whether it is an error that the network has no mixers.
        classifiers_only: Whether it is an error that the network is a detector.
        exported_too: Whether it is no error that the network is a file of `mrla.export`.

    Returns:
        The network and its images.

    Raises:
        ValueError: If the checkpoint is missing, damaged, of another network or of a kind that is not wanted, it is not
            known what the images are, they do not fit the network, or a number is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive: got {batch_size}")
    model, recipe, class_names = _network(checkpoint, exported_too)
    if classifiers_only and _is_detector(model):
        raise ValueError(
            f"the network must be a classifier: {checkpoint} is a detector; to take mixers off it by hand: "
            f"mrla.attach(..., without=[...])"
        )
    if mixers_needed and not is_attached(model):
        raise ValueError(
            f"the network must have mixers: {checkpoint} has none; mrla.attach(mrla.load({str(checkpoint)!r})) "
            f"adds them, mrla train --model {checkpoint} trains with them"
        )
    images_of = data if data is not None or recipe is None else recipe.data
    read, images = [str(checkpoint)], None
    if images_of is None and images_needed:
        kinds = ", ".join(DETECTION_KINDS if _is_detector(model) else DATA_KINDS)
        raise ValueError(
            f"{checkpoint} does not say what images it was trained with: name them, such as --data.kind "
            f"{'coco' if _is_detector(model) else 'folder'} --data.root DIR (kinds: {kinds})"
        )
    if images_of is not None:
        images_of = _placed(images_of, root, workers)
        read += [images_of.root] if getattr(images_of, "root", None) is not None else []
        images = _opened(model, class_names, images_of, split, batch_size, by_turns)
        class_names = class_names or images.class_names
    return Study(model=model, recipe=recipe, class_names=class_names, images=images, read=tuple(read))


def _network(checkpoint: str | Path, exported_too: bool) -> tuple[nn.Module, Recipe | None, tuple[str, ...] | None]:
    if not is_exported(checkpoint):
        return load_trained(checkpoint)
    if not exported_too:
        raise ValueError(
            f"a checkpoint must hold a network's weights here: {checkpoint} is an exported file, which mrla eval and "
            f"mrla predict take; name what it was exported from"
        )
    exported = open_exported(checkpoint)
    return ExportedNetwork(exported), None, exported.facts.class_names


def _is_detector(model: nn.Module) -> bool:
    return task_of(model).name == "detection"


def _placed(images_of: Data | DetectionData, root: str | None, workers: int | None) -> Any:
    """The images at another place, with another number of processes."""
    if root is not None:
        if "root" not in {field.name for field in fields(images_of)}:
            raise ValueError(f"{images_of.kind} lie in no folder: got data.root={root}; leave it out")
        images_of = replace(images_of, root=root)  # type: ignore[call-arg]
    return images_of if workers is None else replace(images_of, workers=workers)


def _opened(
    model: Any,
    known: tuple[str, ...] | None,
    images_of: Data | DetectionData,
    split: Split,
    batch_size: int,
    by_turns: bool,
) -> StudyImages:
    """The images, which are of the kind, the classes and the channels that the network takes."""
    detects = _is_detector(model)
    if detects == isinstance(images_of, Data):
        kinds = DETECTION_KINDS if detects else DATA_KINDS
        raise ValueError(f"the images must be of {', '.join(kinds)} for this network: got {images_of.kind}")
    masks, collate = False, None
    if isinstance(images_of, Data):
        images_of = completed(images_of, getattr(model, "pretrained_cfg", None))
        facts: Any = image_facts(images_of)
        _check_classes(known, facts.class_names)
        samples: Any = open_split(images_of, split)
        samples = samples.by_turns() if by_turns else samples
        channels = input_sizes(model)[0][0]
        if channels != facts.in_chans:
            raise ValueError(
                f"the images must have the {channels} channels that the network takes: they have {facts.in_chans}"
            )
        if known is None:  # else their number is the network's
            _check_number(count_classes(model, samples[SampleKey(0, 0)][0][None]), facts.class_names)
    else:
        facts = detection_facts(images_of)
        _check_classes(known, facts.class_names)
        _check_number(count_objects(model), facts.class_names)
        samples, collate = open_detection_split(images_of, split), collate_detection
        masks = facts.has_masks and finds_masks(model)
    return StudyImages(
        batches=loader(samples, batch_size=min(batch_size, len(samples)), workers=images_of.workers, collate=collate),
        samples=samples,
        class_names=facts.class_names,
        masks=masks,
        source=f"{images_of.kind}, {split} part",
    )


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
