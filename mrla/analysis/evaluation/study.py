"""A trained network and the images that it is shown: what evaluation, explanation and pruning begin with."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from mrla.data.samples import KeyedSamples, loader
from mrla.data.sampling import SampleKey
from mrla.data.sources import DataSource, Split, kinds_for
from mrla.dense import count_objects, finds_masks
from mrla.deploy import ExportedNetwork, is_exported, open_exported
from mrla.models import is_attached, task_of
from mrla.models.dry_run import input_sizes
from mrla.train.fitting import count_classes
from mrla.train.recipe import Recipe
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
    samples: KeyedSamples
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
    data: DataSource | None = None,
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
        kinds = kinds_for(task_of(model).name)
        own = next(kind for kind, source in kinds.items() if source.own_images)
        raise ValueError(
            f"{checkpoint} does not say what images it was trained with: name them, such as --data.kind {own} "
            f"--data.root DIR (kinds: {', '.join(kinds)})"
        )
    if images_of is not None:
        images_of = images_of if root is None else images_of.moved(root)
        images_of = images_of if workers is None else replace(images_of, workers=workers)
        read += images_of.paths()
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


def _opened(
    model: Any,
    known: tuple[str, ...] | None,
    images_of: DataSource,
    split: Split,
    batch_size: int,
    by_turns: bool,
) -> StudyImages:
    """The images, which are of the task, the classes and the channels that the network takes."""
    if images_of.task != task_of(model).name:
        kinds = ", ".join(kinds_for(task_of(model).name))
        raise ValueError(f"the images must be of {kinds} for this network: got {images_of.kind}")
    images_of = images_of.completed(getattr(model, "pretrained_cfg", None))
    facts = images_of.facts()
    _check_classes(known, facts.class_names)
    if _is_detector(model):
        _check_number(count_objects(model), facts.class_names)
    samples = images_of.open(split)
    samples = samples.by_turns() if by_turns else samples
    if not _is_detector(model):
        channels = input_sizes(model)[0][0]
        if channels != facts.in_chans:
            raise ValueError(
                f"the images must have the {channels} channels that the network takes: they have {facts.in_chans}"
            )
        if known is None:  # else their number is the network's
            _check_number(count_classes(model, samples[SampleKey(0, 0)][0][None]), facts.class_names)
    return StudyImages(
        batches=loader(samples, batch_size=min(batch_size, len(samples)), workers=images_of.workers),
        samples=samples,
        class_names=facts.class_names,
        masks=images_of.has_masks and _is_detector(model) and finds_masks(model),
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
