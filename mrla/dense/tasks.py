"""Detection and segmentation as tasks of the store: how their networks are written down, and made again."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import mrla.models
from mrla.models import network_arguments, read_config
from mrla.models.checkpoints.descriptions import build_from, differences, mixer_record
from mrla.models.checkpoints.network_structure import new_ties, structure_difference
from mrla.models.checkpoints.tasks import NetworkTask, register_task, task_of, task_of_config

from .detectors import detector
from .segmenters import segmenter

KEY = "dense"
"""The key below ``mrla`` under which config.json says what is built on the network."""


class Built(NamedTuple):
    """How a detector or segmenter was made.

    Attributes:
        made_by: ``"detector"`` or ``"segmenter"``.
        name: Its name, as that function takes it.
        arguments: What that function was told besides.
    """

    made_by: str
    name: str
    arguments: Mapping[str, Any]


def built_as(model: nn.Module) -> Built | None:
    """How a network was made by `detector` or `segmenter`.

    Args:
        model: Any network.

    Returns:
        What they noted on it; None of any other network.

    Example:
        >>> built_as(detector("fcos", "test_resnet", 2, fpn_channels=32)).name
        'fcos'
    """
    noted = getattr(model, "built_as", None)
    return None if noted is None else Built(**noted)


def count_objects(model: nn.Module) -> int:
    """How many classes a detector or segmenter tells apart, the background not included.

    Args:
        model: A network of `detector` or `segmenter`.

    Returns:
        The number of classes.

    Example:
        >>> import timm
        >>> from mrla.dense import detector
        >>> count_objects(detector("fcos", timm.create_model("test_resnet"), num_classes=4))
        3
    """
    return _built(model).arguments["num_classes"] - 1


def finds_masks(model: nn.Module) -> bool:
    """Whether a detector finds the masks of objects.

    Args:
        model: A network of `detector`.

    Returns:
        True of a Mask R-CNN.

    Example:
        >>> import timm
        >>> from mrla.dense import detector
        >>> finds_masks(detector("faster_rcnn", timm.create_model("test_resnet"), num_classes=4))
        False
    """
    return _built(model).name == "mask_rcnn"


def _built(model: nn.Module) -> Built:
    built = built_as(model)
    assert built is not None
    return built


class _DenseTask(NetworkTask):
    """What the two have in common: the backbone as it is written down by itself, and below `KEY` how they were made."""

    made_by: ClassVar[str]

    def make(self) -> Callable[..., nn.Module]:
        """The function that makes a network of this task."""
        raise NotImplementedError

    def owns(self, model: nn.Module) -> bool:
        built = built_as(model)
        return built is not None and built.made_by == self.made_by

    def describe(self, model: nn.Module, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
        built = _built(model)
        backbone: Any = model.backbone
        body: nn.Module = backbone.body
        known = getattr(body, "pretrained_cfg", None) or {}
        if known.get("architecture") is None:
            raise ValueError(
                f"timm did not make this backbone, so the name of the {type(body).__name__} is not known and it cannot "
                f"be rebuilt: build it by timm.create_model, or keep its state_dict yourself"
            )
        kept = ("input_size", "mean", "std")
        config = {
            "architecture": known["architecture"],
            "model_args": network_arguments(body),
            "pretrained_cfg": {name: known[name] for name in kept if known.get(name) is not None},
            "mrla": {**mixer_record(body), KEY: built._asdict()},
        }
        try:
            as_read = json.loads(json.dumps(config))
        except TypeError as error:
            raise ValueError(f"every argument of the network must be writable as JSON: {error}") from error
        with torch.device("meta"):  # nothing is drawn or copied
            twin = self.rebuild(as_read)
        found = differences(twin.state_dict(), weights) or structure_difference(model, twin)
        if shared := {place: first for kind in new_ties(model, twin) for place, first in kind.items()}:
            found = "; ".join(f"{place} is shared with {first}" for place, first in list(shared.items())[:5])
        if found:
            raise ValueError(
                f"{built.name} on {known['architecture']} with {config['model_args']} does not rebuild this network "
                f"({found}); build its backbone by timm.create_model and leave the parts as they are"
            )
        if "class_names" in facts:
            config["pretrained_cfg"]["label_names"] = list(facts["class_names"])
        return config

    def rebuild(self, config: Mapping[str, Any]) -> nn.Module:
        body = build_from(config)
        try:
            built = Built(**config["mrla"][KEY])
            if built.made_by != self.made_by:
                raise KeyError(built.made_by)
            return self.make()(built.name, body, **built.arguments)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the description of the network is not of this version ({error}); save it again"
            ) from error

    def title(self, model: nn.Module) -> str:
        return f"{_built(model).name} on {mrla.models.TASKS['classification'].title(model)}"

    def config_title(self, config: Mapping[str, Any]) -> str:
        return config["mrla"][KEY]["name"]

    def check(self, config: Mapping[str, Any], model: nn.Module, path: Path) -> None:
        pass  # folders of 0.1.0 may hold any number of names

    def restore(self, config: Mapping[str, Any], model: nn.Module) -> None:
        names = (config.get("pretrained_cfg") or {}).get("label_names")
        model.__dict__["class_names"] = tuple(names) if names else None


@register_task
class DetectionTask(_DenseTask):
    """Networks that find objects: what `detector` makes."""

    name = "detection"
    noun = "detector"
    pipeline_tag = "object-detection"
    made_by = "detector"

    def make(self) -> Callable[..., nn.Module]:
        return detector

    def owns_config(self, config: Mapping[str, Any]) -> bool:
        return KEY in (config.get("mrla") or {}) and not _is_segmenter(config)


@register_task
class SegmentationTask(_DenseTask):
    """Networks that name each pixel: what `segmenter` makes."""

    name = "segmentation"
    noun = "segmenter"
    pipeline_tag = "image-segmentation"
    made_by = "segmenter"

    def make(self) -> Callable[..., nn.Module]:
        return segmenter

    def owns_config(self, config: Mapping[str, Any]) -> bool:
        return _is_segmenter(config)


def _is_segmenter(config: Mapping[str, Any]) -> bool:
    built = (config.get("mrla") or {}).get(KEY)
    return isinstance(built, dict) and built.get("made_by") == SegmentationTask.made_by


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """`mrla.save` for detectors and segmenters alone.

    Args:
        model: What `detector` or `segmenter` made, on a network of timm's registry.
        folder: Where to write; other files in it are left alone.
        state_dict: Weights to write in place of the network's own, such as an average or an earlier epoch's.
        class_names: Names of the classes without the background; that of label n is at n - 1.

    Returns:
        The folder.

    Raises:
        ValueError: If it is another network, is not rebuilt by what is known of it, an argument is not JSON, or the
            folder is not writable.

    Example:
        >>> import tempfile
        >>> from mrla.dense import detector, load, save
        >>> model = detector("retinanet", "test_resnet", 2, min_size=64, fpn_channels=16)
        >>> folder = save(model, tempfile.mkdtemp(), class_names=["cat"])
        >>> type(load(folder)).__name__
        'RetinaNet'
    """
    if not isinstance(task_of(model), _DenseTask):
        raise ValueError(f"only what mrla.dense.detector or segmenter made can be saved: got a {type(model).__name__}")
    return mrla.models.save(model, folder, state_dict=state_dict, class_names=class_names)


def load(folder: str | Path, *, allow_nan: bool = False) -> nn.Module:
    """`mrla.load` for detectors and segmenters alone.

    Args:
        folder: A folder with ``model.safetensors`` and ``config.json``, or ``hf-hub:owner/name``.
        allow_nan: Whether weights may be NaN, as after a training that diverged.

    Returns:
        The network; its attribute `class_names` holds the names of the classes, None where they are not known.

    Raises:
        ValueError: If the folder or a file is missing, damaged, or of another kind of network.

    Example:
        >>> import tempfile, mrla, timm
        >>> from mrla.dense import detector
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     place = mrla.save(detector("fcos", timm.create_model("test_resnet"), num_classes=4), folder)
        ...     model = load(folder)
        >>> type(model).__name__
        'FCOS'
    """
    if not isinstance(task_of_config(read_config(folder)), _DenseTask):
        raise ValueError(f"{folder} holds no detector or segmenter: load a classifier with mrla.load")
    return mrla.models.load(folder, allow_nan=allow_nan)
