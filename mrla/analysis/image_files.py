"""Image files as a trained classifier takes them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mrla.train.data import Folder, open_image


def checked_files(images: Sequence[str | Path]) -> list[Path]:
    """Image files as paths.

    Args:
        images: The files.

    Returns:
        Their paths.

    Raises:
        ValueError: If one does not exist or is a folder.
    """
    files = [Path(image) for image in images]
    if missing := [file for file in files if not file.is_file()]:
        what = "is a folder" if missing[0].is_dir() else "does not exist"
        raise ValueError(f"images must be files: {missing[0]} {what}")
    return files


def upright_image(file: Path) -> Any:
    """The picture in a file in three colours; one that lies on its side by its EXIF entry is turned.

    Args:
        file: The file.

    Returns:
        A PIL image.

    Raises:
        ValueError: If it cannot be decoded.
    """
    from PIL import ImageOps

    return ImageOps.exif_transpose(open_image([str(file)], 0))


def classifier_input(facts: Mapping[str, Any], prepared: Folder | None = None) -> Callable[[Any], Tensor]:
    """How a classifier's images are prepared: size, crop, mean and std, and colours.

    Args:
        facts: What is known of the network, as timm's `pretrained_cfg`: ``input_size``, ``mean``, ``std`` and so on.
        prepared: The data that it was trained with, where they tell how its validation crops.

    Returns:
        A function from a PIL image in three colours to a tensor (c, h, w).
    """
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(pretrained_cfg=dict(facts), verbose=False)
    grey = config["input_size"][0] == 1
    if prepared is not None:  # cropped as in its validation
        config |= {"crop_pct": prepared.crop_pct, "interpolation": prepared.interpolation}
    if grey:  # what is not told of it is told of three colours
        config |= {name: (sum(config[name]) / len(config[name]),) for name in ("mean", "std")}
    transform: Any = create_transform(**config)
    return lambda picture: transform(picture.convert("L") if grey else picture)
