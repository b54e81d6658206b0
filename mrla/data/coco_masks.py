"""Masks in COCO's form, polygons and run lengths, by pycocotools."""

import warnings
from typing import Any

import numpy as np


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A mask from COCO's polygons or run lengths, which were checked before, exactly as pycocotools makes it.

    Args:
        segmentation: A list of polygons, or ``size`` and ``counts``, a list or a string.
        height: Height of the image, in pixels.
        width: Its width, in pixels.

    Returns:
        (h, w) uint8, 1 where the object is.

    Example:
        >>> int(decode_mask({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3).sum())
        2
    """
    tools = _mask_tools()
    compressed = segmentation
    if isinstance(segmentation, list):
        compressed = tools.merge(tools.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        compressed = tools.frPyObjects(segmentation, height, width)
    with warnings.catch_warnings():
        # Each call of pycocotools 2.0.11 makes numpy 2 warn of how it hands over an array.
        warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
        return tools.decode(compressed)


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask as compressed run lengths, fit for JSON.

    Args:
        mask: (h, w) uint8.

    Returns:
        ``size`` and ``counts``.

    Example:
        >>> encode_mask(np.ones((2, 3), np.uint8))
        {'size': [2, 3], 'counts': '06'}
    """
    encoded = _mask_tools().encode(np.asfortranarray(mask))
    return {"size": list(map(int, encoded["size"])), "counts": encoded["counts"].decode("ascii")}


def run_lengths(counts: str) -> list[int]:
    """The run lengths in COCO's compressed string, for a check: pycocotools leaves what they do not reach unset.

    Five bits a character, lowest first, 32 says that more follow, and the sign is in the last; from the fourth on a
    length is told as its difference from the one two before.

    Args:
        counts: The string.

    Returns:
        The lengths, of what does not belong to the object first.

    Raises:
        ValueError: If it is no such string.

    Example:
        >>> run_lengths("06")
        [0, 6]
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError(f"{character!r} is not expected")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("it ends within a number")
    return lengths


def _mask_tools() -> Any:
    try:
        from pycocotools import mask
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "masks in COCO's form need pycocotools, which is not installed: pip install 'mrla[dense]'", name=error.name
        ) from error
    return mask
