"""What EXIF's orientation means, for stored pixels, boxes and masks."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Orientation(NamedTuple):
    """How a stored image is brought upright: rows and columns are reversed first, then exchanged.

    Attributes:
        rows_reversed: Whether the last stored row comes first.
        columns_reversed: Whether the last stored column comes first.
        transposed: Whether rows become columns: the image lies on its side.
        transpose: PIL's name of all that together, a member of `PIL.Image.Transpose`; None where nothing is to be done.
    """

    rows_reversed: bool
    columns_reversed: bool
    transposed: bool
    transpose: str | None


ORIENTATIONS = {
    1: Orientation(False, False, False, None),
    2: Orientation(False, True, False, "FLIP_LEFT_RIGHT"),
    3: Orientation(True, True, False, "ROTATE_180"),
    4: Orientation(True, False, False, "FLIP_TOP_BOTTOM"),
    5: Orientation(False, False, True, "TRANSPOSE"),
    6: Orientation(True, False, True, "ROTATE_270"),
    7: Orientation(True, True, True, "TRANSVERSE"),
    8: Orientation(False, True, True, "ROTATE_90"),
}
"""By EXIF's number; PIL's rotations are counterclockwise."""

_TAG = 0x0112  # EXIF's


def orientation_of(image: Any) -> int:
    """EXIF's orientation of an image of PIL's, 1 to 8; 1 where there is none."""
    try:
        found = image.getexif().get(_TAG, 1)
        return found if found in ORIENTATIONS else 1
    except Exception:  # EXIF that is broken says nothing; what shows photos shows them as they are stored
        return 1


def swapped_if_lying(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height of the upright image from those of the stored one, and the other way round.

    Args:
        size: Width and height of one of them.
        orientation: EXIF's.

    Returns:
        Width and height of the other.

    Example:
        >>> swapped_if_lying((6, 4), 3), swapped_if_lying((6, 4), 8)
        ((6, 4), (4, 6))
    """
    width, height = size
    return (height, width) if ORIENTATIONS[orientation].transposed else (width, height)


def upright_image(image: Any, orientation: int) -> Any:
    """A stored image of PIL's, upright."""
    from PIL.Image import Transpose

    name = ORIENTATIONS[orientation].transpose
    return image if name is None else image.transpose(Transpose[name])


def upright_boxes(boxes: Tensor, size: tuple[int, int], orientation: int) -> Tensor:
    """Boxes on a stored image, on the upright one.

    Args:
        boxes: (n, 4): x1, y1, x2, y2 in pixels of the stored image.
        size: Its width and height.
        orientation: EXIF's; 1 changes nothing.

    Returns:
        (n, 4), x1, y1, x2, y2 in pixels of the upright image.

    Example:
        >>> upright_boxes(torch.tensor([[0.0, 0.0, 2.0, 1.0]]), (6, 4), 6)  # the top edge becomes the right one
        tensor([[3., 0., 4., 2.]])
    """
    turn, (width, height) = ORIENTATIONS[orientation], size
    x1, y1, x2, y2 = boxes.unbind(1)
    if turn.rows_reversed:
        y1, y2 = height - y2, height - y1
    if turn.columns_reversed:
        x1, x2 = width - x2, width - x1
    return torch.stack((y1, x1, y2, x2) if turn.transposed else (x1, y1, x2, y2), 1)


def upright_masks(masks: np.ndarray, orientation: int) -> np.ndarray:
    """Masks of a stored image, as those of the upright one.

    Args:
        masks: (n, h, w).
        orientation: EXIF's; 1 changes nothing.

    Returns:
        (n, h, w) of the upright image, contiguous.

    Example:
        >>> upright_masks(np.array([[[1, 2, 3]]]), 8).tolist()
        [[[3], [2], [1]]]
    """
    turn = ORIENTATIONS[orientation]
    masks = masks[:, :: -1 if turn.rows_reversed else 1, :: -1 if turn.columns_reversed else 1]
    return np.ascontiguousarray(masks.transpose(0, 2, 1) if turn.transposed else masks)
