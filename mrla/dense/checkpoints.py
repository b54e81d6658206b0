"""Detectors and segmenters in a folder: saved so that they can be rebuilt, and loaded again."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mrla.models import read_config
from mrla.models.checkpoints.config_files import DENSE, WEIGHTS
from mrla.models.checkpoints.descriptions import build_from, differences, mixer_record, network_arguments
from mrla.models.checkpoints.network_structure import new_ties, structure_difference
from mrla.models.checkpoints.store import check_size, put_weights, read_saved, write

from .detectors import detector
from .segmenters import segmenter

_MAKERS: dict[str, Callable[..., nn.Module]] = {"detector": detector, "segmenter": segmenter}


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Writes a detector's or segmenter's weights and everything that is needed to rebuild it.

    The folder then holds ``model.safetensors`` and ``config.json``, as of `mrla.save`, with one more entry under
    ``mrla``: which detector, and what `detector` was told.

    Args:
        model: What `detector` or `segmenter` made, on a network of timm's registry.
        folder: Where to write; other files in it are left alone.
        state_dict: Weights to write in place of the network's own, such as an average or an earlier epoch's.
        class_names: Names of the classes without the background; that of label n is at n - 1.

    Returns:
        The folder.

    Raises:
        ValueError: If it is not rebuilt by what is known of it, an argument is not JSON, or the folder is not writable.

    Example:
        >>> import tempfile
        >>> from mrla.dense import detector, load, save
        >>> model = detector("retinanet", "test_resnet", 2, min_size=64, fpn_channels=16)
        >>> folder = save(model, tempfile.mkdtemp(), class_names=["cat"])
        >>> type(load(folder)).__name__
        'RetinaNet'
    """
    weights = model.state_dict() if state_dict is None else state_dict
    config = describe(model, weights)
    if class_names is not None:
        config["pretrained_cfg"]["label_names"] = list(class_names)
    return write(Path(folder), config, weights)


def load(folder: str | Path, *, allow_nan: bool = False) -> nn.Module:
    """Rebuilds a detector or segmenter that `save` has written, in eval mode; no code from there is run.

    Args:
        folder: A folder with ``model.safetensors`` and ``config.json``.
        allow_nan: Whether weights may be NaN, as after a training that diverged.

    Returns:
        The network; its attribute `class_names` holds the names of the classes, None where they are not known.

    Raises:
        ValueError: If the folder or a file is missing, damaged, or of another kind of network.
    """
    built_as = (read_config(folder).get("mrla") or {}).get(DENSE)
    if not built_as:
        raise ValueError(f"{folder} holds no detector or segmenter: load a classifier with mrla.load")
    config, weights = read_saved(folder)
    built_as = config["mrla"][DENSE]
    check_size(config, weights, Path(folder))
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten below
        model = _rebuilt(config, built_as)
    put_weights(model, weights, Path(folder) / WEIGHTS, built_as["name"], allow_nan=allow_nan)
    names = (config.get("pretrained_cfg") or {}).get("label_names")
    model.__dict__["class_names"] = tuple(names) if names else None
    return model.eval()


def describe(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `load` needs to make such a network again, as config.json holds it.

    Args:
        model: The network.
        weights: Its weights, or those to be saved in their place.

    Returns:
        The content of config.json; that it rebuilds the network is checked.

    Raises:
        ValueError: If it was not made by `detector` or `segmenter`, timm did not make its backbone, or what is known of
            it makes another network.
    """
    built_as = getattr(model, "built_as", None)
    if built_as is None:
        raise ValueError(f"only what mrla.dense.detector or segmenter made can be saved: got a {type(model).__name__}")
    backbone: Any = model.backbone
    body: nn.Module = backbone.body
    known = getattr(body, "pretrained_cfg", None) or {}
    if known.get("architecture") is None:
        raise ValueError(
            f"timm did not make this backbone, so the name of the {type(body).__name__} is not known and it cannot be "
            f"rebuilt: build it by timm.create_model, or keep its state_dict yourself"
        )
    config = {
        "architecture": known["architecture"],
        "model_args": network_arguments(body),
        "pretrained_cfg": {name: known[name] for name in ("input_size", "mean", "std") if known.get(name) is not None},
        "mrla": {**mixer_record(body), DENSE: built_as},
    }
    try:
        kept = json.loads(json.dumps(config))
    except TypeError as error:
        raise ValueError(f"every argument of the network must be writable as JSON: {error}") from error
    with torch.device("meta"):  # nothing is drawn or copied
        twin = _rebuilt(kept, kept["mrla"][DENSE])
    found = differences(twin.state_dict(), weights) or structure_difference(model, twin)
    if shared := {place: first for kind in new_ties(model, twin) for place, first in kind.items()}:
        found = "; ".join(f"{place} is shared with {first}" for place, first in list(shared.items())[:5])
    if found:
        raise ValueError(
            f"{built_as['name']} on {known['architecture']} with {config['model_args']} does not rebuild this network "
            f"({found}); build its backbone by timm.create_model and leave the parts as they are"
        )
    return config


def _rebuilt(config: Mapping[str, Any], built_as: Mapping[str, Any]) -> nn.Module:
    body = build_from(config)
    try:
        return _MAKERS[built_as["made_by"]](built_as["name"], body, **built_as["arguments"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the description of the network is not of this version ({error}); save it again") from error
