"""Saving a network so that it can be rebuilt without the code that made it, and loading it again."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .atomic_write import make_folder, written_whole
from .attachment import attach, attach_recipe, detach, is_attached
from .registration import NAMED

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_TORCHVISION = "torchvision/"


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Writes a network's weights and everything that is needed to rebuild it.

    The folder then holds ``model.safetensors`` and ``config.json``, in the form of timm's hub: for a network named in
    timm's registry ``timm.create_model("local-dir:FOLDER")`` reads it too.

    Args:
        model: A network made by `timm.create_model`, attached or not, or one whose `architecture` is given.
        folder: Where to write; other files in it are left alone.
        state_dict: Weights to write in place of the network's own, such as an average or an earlier epoch's.
        architecture: Name to rebuild it by, needed only where timm did not make it: ``"torchvision/resnet18"``.
        model_args: Arguments that the architecture was built with, where timm has not recorded them.
        class_names: Names of the classes, in the order of the logits.
        input_size: Image shape (c, h, w) that the network was trained on.
        mean: Mean of each channel that images are normalised with.
        std: Standard deviation of each channel, likewise.

    Returns:
        The folder.

    Raises:
        ValueError: If the architecture is not known, an argument is not JSON, or the folder is not writable.

    Example:
        >>> import mrla, tempfile, timm
        >>> model = mrla.attach(timm.create_model("resnet18", num_classes=2))
        >>> folder = mrla.save(model, tempfile.mkdtemp(), class_names=["cat", "dog"])
        >>> type(mrla.load(folder)).__name__
        'ResNet'
    """
    weights = model.state_dict() if state_dict is None else state_dict
    config = describe(model, weights, architecture=architecture, model_args=model_args)
    facts = {"label_names": class_names, "input_size": input_size, "mean": mean, "std": std}
    config["pretrained_cfg"].update({name: list(value) for name, value in facts.items() if value is not None})
    try:
        text = json.dumps(config, indent=2)
    except TypeError as error:
        raise ValueError(f"every argument of the network must be writable as JSON: {error}; pass model_args") from error
    folder = make_folder(Path(folder))
    with written_whole(folder / WEIGHTS) as beside:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, beside)
    with written_whole(folder / CONFIG) as beside:
        beside.write_text(text + "\n")
    return folder


def load(folder: str | Path) -> nn.Module:
    """Rebuilds a network that `save` has written, in eval mode; no code of the folder is run.

    Args:
        folder: A folder with ``model.safetensors`` and ``config.json``.

    Returns:
        The network, with its mixers if it had any.

    Raises:
        ValueError: If the folder or a file is missing or damaged, or the weights are of another network.

    Example:
        >>> import mrla, tempfile, timm
        >>> folder = mrla.save(timm.create_model("resnet18"), tempfile.mkdtemp())
        >>> mrla.load(folder).training
        False
    """
    config = read_config(folder)
    model = build(config["architecture"], config.get("model_args") or {}, (config.get("mrla") or {}).get("attach"))
    try:
        weights = load_file(Path(folder) / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{Path(folder) / WEIGHTS} is missing or damaged ({error}); save the network again") from error
    if found := differences(model.state_dict(), weights):
        raise ValueError(
            f"{Path(folder) / WEIGHTS} is of another network than {config['architecture']} ({found}); "
            f"keep it with the config.json that it was saved with"
        )
    model.load_state_dict(weights)
    return model.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a saved network.

    Args:
        folder: A folder that `save` has written.

    Returns:
        Its content; ``architecture`` is there.

    Raises:
        ValueError: If the folder or the file is missing or cannot be read.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(
            f"a saved network is a folder with {CONFIG} and {WEIGHTS}: got {folder}, which has no {CONFIG}"
        )
    try:
        config = json.loads(path.read_text())
        if not isinstance(config["architecture"], str):
            raise TypeError("architecture must be a name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); save the network again") from error
    return config


def describe(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `build` needs to make such a network again, as config.json holds it.

    Args:
        model: The network.
        weights: Its weights, or those to be saved in their place.
        architecture: Its name, where timm did not make it.
        model_args: Arguments that it was built with, where timm has not recorded them.

    Returns:
        The content of config.json; that it rebuilds the network is checked.

    Raises:
        ValueError: If the name is not known, or name and arguments make another network.
    """
    known = getattr(model, "pretrained_cfg", None) or {}
    architecture = architecture or known.get("architecture")
    if architecture is None:
        raise ValueError(
            f"timm did not make this {type(model).__name__}, so its name is not known: "
            f"pass architecture='torchvision/resnet18' (or timm's name) and the model_args it was built with"
        )
    arguments = {**network_arguments(model), **(model_args or {})}
    recipe = attach_recipe(model)
    if recipe and architecture in NAMED:  # timm's "local-dir:" builds it as for plain weights, unless it is told
        arguments.setdefault("init", recipe["init"])
    with torch.device("meta"):  # nothing is drawn or copied
        twin = build(architecture, arguments, recipe)
        if (pool := _global_pool(model)) != _global_pool(twin):  # reset_classifier may have changed it
            arguments["global_pool"] = pool
            twin = build(architecture, arguments, recipe)
    if found := differences(twin.state_dict(), weights):
        raise ValueError(
            f"{architecture} with {arguments} does not rebuild this {type(model).__name__} ({found}); "
            f"pass the model_args that it was built with"
        )
    kept = (
        "input_size",
        "mean",
        "std",
        "interpolation",
        "crop_pct",
        "first_conv",
        "classifier",
        "label_names",
        "license",
    )
    return {
        "architecture": architecture,
        **({"num_classes": model.num_classes} if isinstance(getattr(model, "num_classes", None), int) else {}),
        "model_args": arguments,
        "pretrained_cfg": {name: known[name] for name in kept if known.get(name) is not None},
        "mrla": {"version": version("mrla"), "attach": recipe},
    }


def network_arguments(model: nn.Module) -> dict[str, Any]:
    """What timm built a network with, as it records it; the number of classes is that of today.

    Args:
        model: A network made by `timm.create_model`.

    Returns:
        Keyword arguments; none for a network that timm did not make.

    Example:
        >>> network_arguments(timm.create_model("resnet18", num_classes=3))
        {'num_classes': 3}
    """
    arguments = dict(getattr(model, "_model_args", {}))
    classes = getattr(model, "num_classes", None)
    built_for = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if isinstance(classes, int) and ("num_classes" in arguments or built_for not in (None, classes)):
        arguments["num_classes"] = classes  # reset_classifier may have changed them
    return arguments


def _global_pool(model: nn.Module) -> str | None:
    """How timm's network pools its last features, which no weight's name or shape shows."""
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    return pool if isinstance(pool, str) else None


def build(architecture: str, model_args: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> nn.Module:
    """Makes a network from its name, its arguments and the arguments of `attach`.

    Args:
        architecture: A name of timm's registry, or torchvision's after ``torchvision/``.
        model_args: Arguments of the architecture.
        recipe: Arguments of `attach`, or None for a network without mixers.

    Returns:
        The network, at its random start.

    Raises:
        ValueError: If there is no such architecture, or it does not take an argument.
    """
    try:
        if architecture.startswith(_TORCHVISION):
            from torchvision.models import get_model

            model = get_model(architecture.removeprefix(_TORCHVISION), **model_args)
        else:
            model = timm.create_model(architecture, **model_args)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{architecture} cannot be built with {dict(model_args)}: {error}") from error
    if attach_recipe(model) != (dict(recipe) if recipe else None):
        if is_attached(model):
            detach(model)
        if recipe:
            attach(model, **recipe)
    return model


def differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """How many names and shapes of `weights` are not those of the network's `own`, and the first five; "" for none."""
    differences = [
        *(f"{name} is missing" for name in own if name not in weights),
        *(f"{name} is not in the network" for name in weights if name not in own),
        *(
            f"{name} is {tuple(weights[name].shape)}, the network's is {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ),
    ]
    return f"{len(differences)} differences: {'; '.join(differences[:5])}" if differences else ""
