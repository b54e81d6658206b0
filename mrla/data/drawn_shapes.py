"""Images of overlapping coloured shapes, drawn when they are read: boxes and masks with no download."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .randomness import derive_seed

SHAPE_NAMES = ("ellipse", "ring", "rectangle", "triangle", "star")
"""The classes of drawn shapes, in the order of their labels, which begin at 1."""

LEAST_VISIBLE = 0.25
"""The part of a shape that is never covered or outside the image: what shows less could not be told apart."""

_TRIES = 20  # places tried for a shape before the image goes without it
_SMALLEST_RADIUS = 3.0  # pixels: below, a star is a blob
_RADII = 0.09, 0.27  # of the shorter side of the image
_LEAST_CONTRAST = 60.0  # Euclidean distance of colours, 0 to 255 a channel, from what lies beneath


class DrawnShapes:
    """One stream of drawn images, by index; what is drawn is a function of (seed, split, index) alone.

    Args:
        images: How many there are.
        height: Height of an image, in pixels.
        width: Its width, in pixels.
        max_objects: The most shapes in an image; their number is drawn from 1 to this.
        seed: Decides the images, together with split and index.
        split: Name of the stream.

    Example:
        >>> image, target = DrawnShapes(images=1, height=48, width=64, max_objects=3, seed=0, split="train")[0]
        >>> image.shape, target["masks"].shape[1:]
        (torch.Size([3, 48, 64]), torch.Size([48, 64]))
    """

    def __init__(self, *, images: int, height: int, width: int, max_objects: int, seed: int, split: str):
        self.images, self.height, self.width = images, height, width
        self.max_objects, self.seed, self.split = max_objects, seed, split

    def __len__(self) -> int:
        return self.images

    def fingerprint(self) -> None:
        """None: the images are always the same."""

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        random = np.random.default_rng(derive_seed(self.seed, "shapes", self.split, index))
        image, labels, masks = _draw(random, self.height, self.width, self.max_objects)
        target = {
            "boxes": torch.from_numpy(tight_boxes(masks)),
            "labels": torch.from_numpy(labels),
            "masks": torch.from_numpy(masks),
            "image_id": index + 1,  # as COCO tools, which take an id of 0 for none
            "area": torch.from_numpy(masks.sum((1, 2), dtype=np.float32)),
            "iscrowd": torch.zeros(len(labels), dtype=torch.int64),
        }
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), target


def tight_boxes(masks: np.ndarray) -> np.ndarray:
    """The smallest boxes around masks, none of which is empty.

    Args:
        masks: (n, h, w), what is not zero belongs to the object.

    Returns:
        (n, 4) float32, x1, y1, x2, y2 in pixels; x2 and y2 are the far edges of the last pixels.

    Example:
        >>> tight_boxes(np.array([[[0, 1, 1], [0, 1, 0]]])).tolist()
        [[1.0, 0.0, 3.0, 2.0]]
    """
    height, width = masks.shape[1:]
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)
    far_x, far_y = width - columns[:, ::-1].argmax(1), height - rows[:, ::-1].argmax(1)
    return np.stack([columns.argmax(1), rows.argmax(1), far_x, far_y], 1).astype(np.float32)


def _draw(
    random: np.random.Generator, height: int, width: int, max_objects: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The image (h, w, 3) uint8, the labels (n,) int64 and the visible masks (n, h, w) uint8."""
    image = _ground(random, height, width)
    owner = np.zeros((height, width), np.uint8)  # which shape shows in a pixel; 0 is the ground
    whole, visible, labels = [0], [height * width], []  # pixels of each owner
    for _ in range(random.integers(1, max_objects + 1)):
        label = int(random.integers(len(SHAPE_NAMES)))
        for _ in range(_TRIES):
            stamp, window, pixels = _placed(random, label, height, width)
            covered = np.bincount(owner[window][stamp], minlength=len(whole))
            left = [*(np.array(visible) - covered), stamp.sum()]
            if all(n >= LEAST_VISIBLE * m for n, m in zip(left[1:], [*whole[1:], pixels], strict=True)):
                _paint(random, image[window], stamp)
                visible, whole = left, [*whole, pixels]
                labels.append(label + 1)
                owner[window][stamp] = len(labels)
                break
    image += random.uniform(4, 12) * random.standard_normal(image.shape, dtype=np.float32)
    masks = owner == np.arange(1, len(labels) + 1, dtype=np.uint8)[:, None, None]
    return image.clip(0, 255).astype(np.uint8), np.array(labels, np.int64), masks.astype(np.uint8)


def _ground(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise with stripes over it, (h, w, 3) float32."""
    from PIL import Image

    low, high = sorted(random.integers(20, 236, 2))
    coarse = random.integers(low, high + 1, (*random.integers(2, 7, 2), 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    angle, period = random.uniform(0, math.pi), random.uniform(4, 24)
    across = 2 * math.pi / period * np.float32(math.cos(angle)) * np.arange(width, dtype=np.float32)
    down = 2 * math.pi / period * np.float32(math.sin(angle)) * np.arange(height, dtype=np.float32)
    stripes = np.sin(across + down[:, None] + np.float32(random.uniform(0, 2 * math.pi)))
    return np.asarray(smooth, np.float32) + stripes[..., None] * random.uniform(0, 30, 3).astype(np.float32)


def _placed(random: np.random.Generator, label: int, height: int, width: int) -> tuple[np.ndarray, Any, int]:
    """A shape's pixels inside the image, the part of the image that they are cut from, and all its pixels' number."""
    short = min(height, width)
    smallest, largest = (max(_SMALLEST_RADIUS, part * short) for part in _RADII)
    radius = math.exp(random.uniform(math.log(smallest), math.log(largest)))
    stamp = _stamp(random, label, radius)
    reach = stamp.shape[0] // 2
    margin = radius / 2  # so that most shapes are more than half inside
    top, left = (round(random.uniform(margin, size - margin)) - reach for size in (height, width))
    inside = stamp[max(0, -top) : height - top, max(0, -left) : width - left]
    rows, columns = max(0, top), max(0, left)
    window = slice(rows, rows + inside.shape[0]), slice(columns, columns + inside.shape[1])
    return inside, window, int(stamp.sum())


def _stamp(random: np.random.Generator, label: int, radius: float) -> np.ndarray:
    """A shape in any rotation on a square just large enough for it, as a mask."""
    from PIL import Image, ImageDraw

    angle, aspect, hole = random.uniform(0, 2 * math.pi), random.uniform(0.65, 1.0), random.uniform(0.45, 0.65)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    centre = math.ceil(radius)
    corners = (_OUTLINES[SHAPE_NAMES[label]] * (1.0, aspect)) @ turn * radius
    image = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    pencil = ImageDraw.Draw(image)
    pencil.polygon((corners + centre).ravel().tolist(), fill=1)
    if SHAPE_NAMES[label] == "ring":
        pencil.polygon((corners * hole + centre).ravel().tolist(), fill=0)
    return np.asarray(image).astype(bool)


def _paint(random: np.random.Generator, window: np.ndarray, stamp: np.ndarray) -> None:
    """Fills the mask in this part of the image with a shaded colour that says nothing about the class."""
    colours = random.integers(0, 256, (12, 3)).astype(np.float32)
    contrast = np.linalg.norm(colours - window[stamp].mean(0), axis=1)
    enough = contrast >= _LEAST_CONTRAST
    colour = colours[enough.argmax() if enough.any() else contrast.argmax()]
    angle, depth = random.uniform(0, 2 * math.pi), random.uniform(0, 0.5)
    rows, columns = (np.linspace(-0.5, 0.5, size, dtype=np.float32) for size in stamp.shape)
    shade = 1 + depth * (math.sin(angle) * rows[:, None] + math.cos(angle) * columns)
    window[stamp] = shade[stamp][:, None] * colour


def _regular(points: int) -> np.ndarray:
    angles = np.arange(points) * (2 * math.pi / points)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


# Corners (k, 2) in the unit disc.
_OUTLINES = {
    "ellipse": _regular(40),
    "ring": _regular(40),
    "rectangle": _regular(4) @ np.array([[1.0, 1.0], [-1.0, 1.0]]) / math.sqrt(2),
    "triangle": _regular(3),
    "star": _regular(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None],
}
