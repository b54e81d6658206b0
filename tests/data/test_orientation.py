"""The one table of EXIF's orientations, against Pillow's own way to bring an image upright."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mrla.data.orientation import (
    ORIENTATIONS,
    orientation_of,
    swapped_if_lying,
    upright_boxes,
    upright_image,
    upright_masks,
)


def stored(orientation: object) -> Image.Image:
    """An image of 5x3 pixels, all different, that says how it lies."""
    image = Image.fromarray(np.arange(15, dtype=np.uint8).reshape(3, 5))
    image.getexif()[274] = orientation
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_masks_boxes_and_sizes_are_turned_alike(orientation):
    image = stored(orientation)
    assert orientation_of(image) == orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.asarray(upright_image(image, orientation)), expected)
    assert np.array_equal(upright_masks(np.asarray(image)[None], orientation)[0], expected)
    assert swapped_if_lying(image.size, orientation) == expected.shape[::-1]
    assert swapped_if_lying(expected.shape[::-1], orientation) == image.size
    # The box around each pixel goes where the pixel goes.
    for row, column in np.ndindex(3, 5):
        box = upright_boxes(torch.tensor([[column, row, column + 1, row + 1]]), image.size, orientation)
        left, top, right, bottom = map(int, box[0])
        assert (right - left, bottom - top) == (1, 1)
        assert expected[top, left] == np.asarray(image)[row, column]


@pytest.mark.parametrize("said", [0, 9, "6", 255])
def test_what_exif_does_not_define_is_upright(said):
    class Said:
        def getexif(self):
            return {274: said}

    assert orientation_of(Said()) == 1
    assert list(ORIENTATIONS) == list(range(1, 9))


def test_exif_that_is_broken_says_nothing():
    class Broken:
        def getexif(self):
            raise SyntaxError("not a TIFF file")

    class Unhashable:
        def getexif(self):
            return {274: [6]}

    assert orientation_of(Broken()) == orientation_of(Unhashable()) == 1
