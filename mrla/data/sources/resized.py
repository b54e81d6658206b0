"""Photographs of any size that are brought to one, and normalised, as the network was trained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from mrla.messages.one_line import one_line

from .contract import DataSource

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_AS_USUAL = {
    "size": 224,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "interpolation": "bilinear",
    "crop_pct": 0.875,
}


@dataclass(frozen=True, kw_only=True)
class ResizedImages(DataSource):
    """What all classification of images in files shares: their size, normalisation and augmentation, by timm.

    What is None is as the network was trained, where that is known, else 224 pixels, ImageNet's mean and standard
    deviation, ``bilinear`` and 0.875.

    Attributes:
        kind: As of `DataSource`.
        root: The folder.
        size: Height and width that images are brought to, in pixels.
        mean: Mean of each channel, for normalisation.
        std: Standard deviation of each channel, for normalisation.
        interpolation: How images are resized, ``bilinear`` or ``bicubic``.
        crop_pct: Part of the resized image that validation looks at.
        auto_augment: timm's name of a further augmentation, such as ``rand-m9-mstd0.5-inc1``, or None.
        workers: Processes that load images.
    """

    root: str = "data"
    size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    crop_pct: float | None = None
    auto_augment: str | None = None
    workers: int = 4

    task = "classification"
    own_images = True

    def __post_init__(self):
        super().__post_init__()
        if self.size is not None and self.size < 1:
            raise ValueError(f"data.size must be a positive number of pixels: got {self.size}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"data.crop_pct must be in (0, 1]: got {self.crop_pct}")
        if any(channels is not None and len(channels) != 3 for channels in (self.mean, self.std)):
            raise ValueError(f"data.mean and data.std must have 3 channels: got {self.mean} and {self.std}")
        if self.std is not None and not all(std > 0 for std in self.std):
            raise ValueError(f"data.std must be positive for every channel: got {self.std}")
        if self.interpolation not in ("bilinear", "bicubic", None):
            raise ValueError(f"data.interpolation must be 'bilinear' or 'bicubic': got {self.interpolation!r}")

    def completed(self, network: Mapping[str, Any] | None = None) -> Self:
        """As of `DataSource`: each field that is None is filled in.

        Example:
            >>> from mrla.data import Folder
            >>> found = Folder(size=64).completed({"mean": (0.5, 0.5, 0.5), "crop_pct": 1.0})
            >>> found.size, found.mean, found.std, found.interpolation, found.crop_pct
            (64, (0.5, 0.5, 0.5), (0.229, 0.224, 0.225), 'bilinear', 1.0)
        """
        network = network or {}
        known: dict[str, Any] = {"crop_pct": network["crop_pct"]} if network.get("crop_pct") else {}
        for name in ("mean", "std"):
            if len(network.get(name) or ()) == 3:  # a network of grey images has one
                known[name] = tuple(network[name])
        if network.get("interpolation") in ("bilinear", "bicubic"):  # a few of timm's have others
            known["interpolation"] = network["interpolation"]
        if network.get("input_size"):
            known["size"] = network["input_size"][-1]
        return replace(
            self, **{name: known.get(name, usual) for name, usual in _AS_USUAL.items() if getattr(self, name) is None}
        )

    @property
    def size_from_network(self) -> bool:
        return self.size is None

    def validation_crop(self) -> dict[str, Any]:
        return {"crop_pct": self.crop_pct, "interpolation": self.interpolation}

    def make_transform(self, *, augment: bool) -> Any:
        """Timm's function from an opened image to a tensor, of a source that is `completed`.

        Args:
            augment: Whether images are changed at random as in training.

        Returns:
            The function.

        Raises:
            ValueError: If timm does not read `auto_augment`.
        """
        from timm.data.transforms_factory import create_transform

        assert self.size is not None
        options: dict[str, Any] = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation}
        if augment:
            options |= {"is_training": True, "color_jitter": 0.0, "auto_augment": self.auto_augment}
        else:
            options |= {"crop_pct": self.crop_pct}
        try:
            return create_transform(self.size, **options)
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"data.auto_augment must be a name that timm reads, such as rand-m9-mstd0.5-inc1: got "
                f"{self.auto_augment!r} ({one_line(error)})"
            ) from error
