"""Image files as a trained classifier takes them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mrla.data.images import files_in
from mrla.deploy.export_facts import preprocessing_of
from mrla.train.recipe import Recipe


def checked_files(images: Sequence[str | Path]) -> list[Path]:
    """Image files as paths, those of folders in their place.

    Args:
        images: Files, and folders of files.

    Returns:
        Their paths, each once.

    Raises:
        ValueError: If one does not exist or is no regular file, or a folder has no image.
    """
    files: list[Path] = []
    for image in map(Path, images):
        if image.is_dir():
            files += map(Path, files_in(image))
        elif image.is_file():
            files.append(image)
        else:
            what = "is no regular file" if image.exists() else "does not exist"
            raise ValueError(f"images must be files or folders: {image} {what}")
    return list(dict.fromkeys(files))


def preparation(model: nn.Module, recipe: Recipe | None) -> dict[str, Any]:
    """How images are prepared for a trained classifier.

    Args:
        model: The network.
        recipe: What trained it, if known: images are cropped as in its validation.

    Returns:
        The arguments of `timm.data.create_transform`.

    Example:
        >>> import timm
        >>> preparation(timm.create_model("test_resnet"), None)["input_size"]
        (3, 160, 160)
    """
    return preprocessing_of(getattr(model, "pretrained_cfg", None), **validation_crop(recipe))


def validation_crop(recipe: Recipe | None) -> dict[str, Any]:
    """How a recipe's validation crops its images, where it says so."""
    return {} if recipe is None else recipe.data.validation_crop()


def classifier_input(prepared: Mapping[str, Any]) -> Callable[[Any], Tensor]:
    """A function from a PIL image in three colours to a classifier's input (c, h, w).

    Args:
        prepared: As `preparation` gives it, or an exported file's facts.
    """
    from timm.data import create_transform

    transform: Any = create_transform(**prepared)
    grey = prepared["input_size"][0] == 1
    return lambda picture: transform(picture.convert("L") if grey else picture)
