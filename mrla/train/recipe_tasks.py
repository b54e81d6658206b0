"""The task of a recipe: classification, or detection where it names a detector."""

from typing import Any

from torch import nn

from mrla.data.detection_sources import DetectionData, detection_facts
from mrla.data.sources import Data, Digits, ImageFacts, image_facts

from .arms import added_by, build_arm, build_detector
from .recipes import Recipe
from .task import Classification, Task


def packages_of(recipe: Recipe) -> tuple[str, ...]:
    """The outside packages that training and validating a recipe takes, beside those that `fitting` imports."""
    digits = ("sklearn",) if isinstance(recipe.data, Digits) else ()
    return ("tensorboard", *digits, *(("pycocotools",) if recipe.detector is not None else ()))


def make_task(recipe: Recipe) -> Task:
    """The task of a recipe, its network at its start.

    Args:
        recipe: Any recipe, `settled`.

    Returns:
        The task.

    Raises:
        ValueError: If the data or the network do not fit the recipe.
    """
    common: dict[str, Any] = {"optim": recipe.optim, "epochs": recipe.epochs, "seed": recipe.seed}
    if recipe.detector is not None:
        from .detection_task import Detection

        assert isinstance(recipe.data, DetectionData)
        of_objects = detection_facts(recipe.data)
        return Detection(
            build_detector(recipe, of_objects),
            masks=recipe.detector.has_masks,
            class_names=of_objects.class_names,
            new=added_by(recipe.arm),
            **common,
        )
    assert isinstance(recipe.data, Data)
    facts = image_facts(recipe.data)
    return Classification(
        build_arm(recipe, facts),
        classes=len(facts.class_names),
        label_smoothing=recipe.label_smoothing,
        smooth_validation=recipe.smooth_validation,
        new=added_by(recipe.arm),
        saved=saved_facts(facts),
        **common,
    )


def saved_facts(facts: ImageFacts) -> dict[str, Any]:
    """What `mrla.save` is told of the images that a classifier was trained on."""
    return {
        "class_names": facts.class_names,
        "mean": facts.mean,
        "std": facts.std,
        "input_size": (facts.in_chans, facts.size, facts.size),
    }


def build_network(recipe: Recipe) -> nn.Module:
    """The network of a recipe at its start, as `make_task` has it."""
    if recipe.detector is not None:
        assert isinstance(recipe.data, DetectionData)
        return build_detector(recipe, detection_facts(recipe.data))
    assert isinstance(recipe.data, Data)
    return build_arm(recipe, image_facts(recipe.data))


def class_names_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of the classes of a recipe's images, without a background."""
    if isinstance(recipe.data, Data):
        return image_facts(recipe.data).class_names
    return detection_facts(recipe.data).class_names
