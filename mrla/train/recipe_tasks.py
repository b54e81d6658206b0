"""The task of a recipe: classification, or detection where it names a detector."""

from typing import Any

from torch import nn

from mrla.data.samples import ImageFacts

from .arms import added_by, build_arm, build_detector
from .recipe import Recipe
from .task import Classification, Task


def packages_of(recipe: Recipe) -> tuple[str, ...]:
    """The outside packages that training and validating a recipe takes, beside those that `fitting` imports."""
    metric = ("pycocotools",) if recipe.detector is not None else ()
    return ("tensorboard", *recipe.data.packages, *metric)


def make_task(recipe: Recipe) -> Task:
    """The task of a recipe, its network at its start.

    Args:
        recipe: Any recipe, `resolve_defaults`.

    Returns:
        The task.

    Raises:
        ValueError: If the data or the network do not fit the recipe.
    """
    facts = recipe.data.facts()
    common: dict[str, Any] = {"optim": recipe.optim, "epochs": recipe.epochs, "seed": recipe.seed}
    if recipe.detector is not None:
        from .detection_task import Detection

        return Detection(
            build_detector(recipe, facts),
            masks=recipe.detector.has_masks,
            class_names=facts.class_names,
            new=added_by(recipe.arm),
            **common,
        )
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
        "mean": facts.mean or None,
        "std": facts.std or None,
        "input_size": None if facts.size is None else (facts.in_chans, facts.size, facts.size),
    }


def build_network(recipe: Recipe) -> nn.Module:
    """The network of a recipe at its start, as `make_task` has it."""
    return (build_arm if recipe.detector is None else build_detector)(recipe, recipe.data.facts())
