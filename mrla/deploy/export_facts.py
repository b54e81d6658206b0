"""What an exported file says of itself: classes, how an image is prepared for it, which sizes it takes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from timm.data import resolve_data_config

KEY = "mrla"
"""Under which the facts stand in a file, as JSON: metadata of ONNX, extra file of torch's, rt_info of OpenVINO."""
DYNAMIC = {"batch": 0, "height": 2, "width": 3}
"""The dimensions of an input that may be left open."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What travels inside an exported file.

    Attributes:
        input_size: Shape of one image, (c, h, w); what the network was trained on where height and width are dynamic.
        dynamic: Dimensions that may have any size, of ``batch``, ``height`` and ``width``.
        class_names: Names of the classes, in the order of the logits.
        mean: Mean of each channel that images are normalised with, where known.
        std: Standard deviation of each channel, by which they are divided after that; where known.
        crop_pct: Part of an image's side that is cut out and fills the input.
        crop_mode: How it is cut out, in timm's words.
        interpolation: How an image is resized, in timm's words.
    """

    input_size: tuple[int, ...]
    dynamic: tuple[str, ...] = ("batch",)
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    def preprocessing(self) -> dict[str, Any]:
        """The arguments of `timm.data.create_transform`.

        Raises:
            ValueError: If the file is not of a network of pictures.
        """
        if len(self.input_size) != 3 or self.input_size[0] not in (1, 3) or self.mean is None or self.std is None:
            raise ValueError(
                f"pictures have one or three channels, with a mean and std each: this network takes inputs of "
                f"{self.input_size} and knows of mean={self.mean}, std={self.std}; call it with tensors, see "
                f"mrla.deploy.open_exported"
            )
        names = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        """The facts as they stand in a file."""
        return json.dumps(asdict(self), allow_nan=False)


def facts_from_json(text: str, place: str) -> Facts:
    """What `Facts.to_json` wrote.

    Args:
        text: The JSON.
        place: The file's name, for the error.

    Returns:
        The facts. What a later version has added is left out.

    Raises:
        ValueError: If it is not of `mrla.deploy.export`, or damaged.

    Example:
        >>> facts = Facts(input_size=(3, 32, 32), class_names=("cat", "dog"))
        >>> facts_from_json(facts.to_json(), "net.onnx") == facts
        True
    """
    try:
        content = json.loads(text)
        known = {field.name for field in fields(Facts)}
        given: dict[str, Any] = {name: value for name, value in content.items() if name in known}
        given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        return Facts(**given)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place} must tell of its input and classes as mrla.deploy.export writes it ({error}); export it again"
        ) from error


def preprocessing_of(pretrained_cfg: Mapping[str, Any] | None, **given: Any) -> dict[str, Any]:
    """How images are prepared for a network, in the words of `timm.data.create_transform`.

    Args:
        pretrained_cfg: What the network says of itself, in timm's form.
        **given: Entries that count more, None for those that are not given.

    Returns:
        ``input_size``, ``mean``, ``std``, ``crop_pct``, ``crop_mode``, ``interpolation``.

    Example:
        >>> preprocessing_of({"input_size": (1, 32, 32), "mean": (0.4, 0.5, 0.6)})["mean"]
        (0.5,)
    """
    told = {name: value for name, value in given.items() if value is not None}
    # timm wants at least one entry.
    known = {"input_size": (3, 224, 224), **(pretrained_cfg or {}), **told}
    config: Any = resolve_data_config(pretrained_cfg=known, verbose=False)
    if config["input_size"][0] == 1:  # what is not told of grey is told of three colours
        config |= {name: (sum(config[name]) / len(config[name]),) for name in ("mean", "std")}
    return config


def collect_facts(
    pretrained_cfg: Mapping[str, Any] | None,
    input_size: tuple[int, ...],
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> Facts:
    """The facts of a network: those given, the others from its own configuration.

    Args:
        pretrained_cfg: What the network says of itself, in timm's form; `mrla.load` leaves the trained network's there.
        input_size: Shape of one input.
        class_names: Names of the classes; an empty sequence for none.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        crop_pct: See `Facts`.
        interpolation: See `Facts`.

    Returns:
        The facts, with the batch alone dynamic.

    Raises:
        ValueError: If mean and std are not one number for each channel, or a std is not above 0.
    """
    for name, numbers in (("mean", mean), ("std", std)):
        if numbers is not None and len(numbers) != input_size[0]:
            raise ValueError(
                f"{name} must have one number for each channel: got {len(numbers)} for inputs of {input_size}"
            )
    if std is not None and min(std) <= 0:
        raise ValueError(f"std must be above 0 in each channel: got {list(std)}")
    known = pretrained_cfg or {}
    names = known.get("label_names") if class_names is None else class_names
    of_images = len(input_size) == 3
    config = preprocessing_of(
        known,
        input_size=input_size if of_images else None,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        interpolation=interpolation,
    )
    told = of_images and len(config["mean"]) == input_size[0] == len(config["std"])
    return Facts(
        input_size=input_size,
        class_names=tuple(map(str, names)) if names else None,
        mean=tuple(map(float, config["mean"])) if told else None,
        std=tuple(map(float, config["std"])) if told else None,
        crop_pct=float(config["crop_pct"]),
        crop_mode=str(config["crop_mode"]),
        interpolation=str(config["interpolation"]),
    )
