"""The config.json of a saved network, which others may have written: read, checked, and nothing fetched or run."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrla.ops import is_method

from .hub_transfer import download, hub_name
from .names import TORCHVISION
from .network_structure import Ties

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
WEIGHTS_HASH = "weights_sha256"
"""The key under which config.json has the hash of the weights that it was written with."""


def is_saved(place: str | Path) -> bool:
    """Whether a place is a folder, or one on the hub, so that `load` and `read_config` can read it.

    Args:
        place: A path, or ``hf-hub:owner/name``.

    Returns:
        Whether it is; nothing is fetched.

    Example:
        >>> is_saved("hf-hub:me/resnet50_mrla"), is_saved("no_such_folder")
        (True, False)
    """
    return hub_name(place) is not None or Path(place).is_dir()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a saved network.

    Args:
        folder: A folder that `save` has written, or a repository on the hub as for `load`.

    Returns:
        Its content; ``architecture`` is there.

    Raises:
        ValueError: If the folder or the file is missing or cannot be read, or would have something fetched or opened;
            see `checked_config`.

    Example:
        >>> import tempfile, mrla, timm
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     place = mrla.save(timm.create_model("test_resnet", num_classes=2), folder)
        ...     config = read_config(folder)
        >>> config["architecture"], config["num_classes"]
        ('test_resnet', 2)
    """
    if (on_hub := hub_name(folder)) is not None:
        folder = download(*on_hub, (CONFIG,))
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(
            f"a saved network is a folder with {CONFIG} and {WEIGHTS}: got {folder}, which has no {CONFIG}"
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); save the network again") from error
    return checked_config(config, path)


# What timm's and torchvision's makers of networks do with these is fetch, open or run something.
_LOADING = frozenset(
    {
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "pretrained_filter_fn"),
        *("pretrained_model_args", "checkpoint_path", "cache_dir", "kwargs_filter", "scriptable", "exportable"),
        *("no_jit", "progress", "device", "dtype"),
    }
)
_LOADING_PREFIXES = ("pretrained", "weights")
# What a config.json may name: no network of timm's has a tenth of it, and more would be built for hours.
_MOST_PIXELS = 16384  # of a side
_MOST_BLOCKS = 2000  # of a stage
_MOST = 2**20  # of anything else


def checked_config(config: Any, path: str | Path) -> dict[str, Any]:
    """A description of a network that others may have written, from which nothing is fetched, opened or run.

    Args:
        config: Content of a config.json.
        path: Where it is from, for errors.

    Returns:
        The same, its ``model_args`` without those of `timm.create_model` itself that are unset.

    Raises:
        ValueError: If the architecture is no plain name of timm's or torchvision's classifiers, an argument would have
            weights fetched or a file opened, or a field is of another kind than `save` writes.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"{path} is damaged or made to do harm: {what}; take it from whoever saved the network")

    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise refuse("it must be a JSON object whose architecture is a name")
    name = config["architecture"]
    if not re.fullmatch(r"[\w.+-]+", name.removeprefix(TORCHVISION), re.ASCII):
        raise refuse(f"architecture must be a name of timm's registry or {TORCHVISION}NAME, got {name[:100]!r}")
    if name.startswith(TORCHVISION) and not _is_classifier_of_torchvision(name.removeprefix(TORCHVISION)):
        raise refuse(f"architecture must be one of torchvision's classifiers, got {name!r}")
    arguments, extra, known = (config.get(field) or {} for field in ("model_args", "mrla", "pretrained_cfg"))
    if not all(isinstance(one, dict) for one in (arguments, extra, known)):
        raise refuse("model_args, mrla and pretrained_cfg must be JSON objects")
    if not isinstance(extra.get("attach") or {}, dict):
        raise refuse("mrla.attach must be a JSON object")
    _check_method(extra, path)
    if "ties" in extra and not _are_ties(extra["ties"]):
        raise refuse("mrla.ties must name modules and parameters and the first of the same")
    if wrong := [argument for argument, value in arguments.items() if _would_load(argument) and value]:
        raise refuse(f"model_args must not have weights fetched, files opened or code chosen, got {wrong[0]!r}")
    labels, size = known.get("label_names"), known.get("input_size")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise refuse("label_names must be a list of strings")
    if size is not None and not _is_image_size(size):
        raise refuse(f"input_size must be channels, height and width, up to {_MOST_PIXELS} pixels a side, got {size!r}")
    for argument, value in arguments.items():
        most = _MOST_BLOCKS if re.search(r"layer|depth|block|repeat", argument) else _MOST
        if (number := _largest(value)) > most:
            raise refuse(f"model_args must be of a network that can be built: {argument} has {number}, {most} at most")
    kept = {argument: value for argument, value in arguments.items() if not _would_load(argument)}
    return {**config, "model_args": kept}


def _check_method(extra: Mapping[str, Any], path: str | Path) -> None:
    """Raises ValueError where the mixers are of a method that is not registered; a plugin is named, never imported."""
    method, plugin = (extra.get("attach") or {}).get("method"), extra.get("plugin")
    if not isinstance(method, str) or is_method(method):
        return
    whose = f" of the plugin {plugin[:100]!r}" if isinstance(plugin, str) else ""
    raise ValueError(
        f"the method of a saved network's mixers must be registered: {path} names {method[:100]!r}{whose}; import the "
        f"file that registers it first, or name it to a command with --plugins FILE.py"
    )


def _would_load(argument: str) -> bool:
    return argument in _LOADING or argument.startswith(_LOADING_PREFIXES)


def _largest(value: Any) -> Any:
    """The largest number in a value of JSON."""
    if isinstance(value, (int, float)):
        return abs(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max(map(_largest, parts), default=0)


def _are_ties(ties: Any) -> bool:
    if not isinstance(ties, dict) or set(ties) != set(Ties._fields):
        return False
    pairs = [pair for kind in ties.values() if isinstance(kind, dict) for pair in kind.items()]
    return all(isinstance(kind, dict) for kind in ties.values()) and all(isinstance(first, str) for _, first in pairs)


def _is_classifier_of_torchvision(name: str) -> bool:
    from torchvision import models

    return name in models.list_models(module=models)


def _is_image_size(size: Any) -> bool:
    is_list = isinstance(size, list) and len(size) == 3 and all(type(one) is int for one in size)
    return is_list and all(1 <= one <= _MOST_PIXELS for one in size)
