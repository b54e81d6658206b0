"""Saving a network so that it can be rebuilt without the code that made it, and loading it again."""

import copy
import hashlib
import json
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mrla.files.atomic_write import make_folder, room_for, sweep, unfinished, written_together
from mrla.messages.one_line import one_line

from ..attachment import attach, detach, is_attached
from ..mixed_blocks import MIXER
from ..wiring import attach_recipe
from ..zoo.registration import NAMED
from .hub_transfer import download, hub_name
from .network_structure import Ties, new_ties, structure_difference, tie
from .tensor_files import check_values, read_safetensors

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
DENSE = "dense"
"""The key under which config.json says what is built on the network, see `mrla.dense.save`."""
WEIGHTS_HASH = "weights_sha256"
"""The key under which config.json has the hash of the weights that it was written with."""
TORCHVISION = "torchvision/"
"""What an architecture's name begins with where it is torchvision's."""

# What was last asked about a network, and the answer: a training describes the same network at its start and its end.
_REBUILT: WeakKeyDictionary[nn.Module, tuple[str, dict[str, Any], nn.Module]] = WeakKeyDictionary()


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
    timm's registry ``timm.create_model("local-dir:FOLDER")`` reads it too. If it fails or is interrupted, what the
    folder held before is still there. Of weights that have several names each gets a copy.

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
        ValueError: If the architecture is not known or does not rebuild the network (its modules, what they show of
            themselves and their eps and rates are compared, too), an argument is not JSON, weights are on the meta
            device, or the folder is not writable.

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
    _check_label_names(config, model, Path(folder) / CONFIG)
    return write(Path(folder), config, weights)


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """Writes ``config.json`` and ``model.safetensors``, both or neither.

    Args:
        folder: Where; other files in it are left alone.
        config: What `build` needs, and what else is known of the network.
        weights: The weights.

    Returns:
        The folder.

    Raises:
        ValueError: If the description is not JSON, weights are on the meta device, or the folder is not writable.
    """
    try:
        json.dumps(config)
    except TypeError as error:
        raise ValueError(
            f"class_names, input_size, mean and std must be writable as JSON: {error}; pass plain strings and numbers"
        ) from error
    if empty := next((name for name, tensor in weights.items() if tensor.is_meta), None):
        raise ValueError(f"weights must have values to be saved: {empty} is on the meta device; load weights first")
    make_folder(folder)
    _finish(folder)
    sweep(folder)
    # The weights take their place first: whoever has read a config.json finds weights that are as new, and sees by the
    # hash whether they are newer. If the process is killed between the two, the config.json lies ready beside.
    with written_together(folder / WEIGHTS, folder / CONFIG) as (weights_beside, config_beside):
        with room_for(folder / WEIGHTS):
            save_file(_apart(weights), weights_beside)
        tied = {**config["mrla"], WEIGHTS_HASH: _sha256(weights_beside)}
        config_beside.write_text(json.dumps({**config, "mrla": tied}, indent=2) + "\n")
    return folder


def _finish(folder: Path) -> None:
    """Puts the config.json in its place whose weights have taken theirs before their process was killed."""
    if not (folder / WEIGHTS).is_file():
        return
    for path in unfinished(folder / CONFIG):
        with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            if json.loads(path.read_text())["mrla"][WEIGHTS_HASH] == _sha256(folder / WEIGHTS):
                path.replace(folder / CONFIG)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(folder: str | Path, *, allow_nan: bool = False) -> nn.Module:
    """Rebuilds a network that `save` or `mrla.push` has written, in eval mode; no code from there is run.

    Args:
        folder: A folder with ``model.safetensors`` and ``config.json``, or a repository on the Hugging Face Hub as timm
            spells it: ``"hf-hub:owner/name"``, ``"hf-hub:owner/name@revision"``. One that is private is read with the
            token of ``hf auth login`` or ``HF_TOKEN``.
        allow_nan: Whether weights may be NaN, as after a training that diverged.

    Returns:
        The network, with its mixers if it had any, on the CPU and in float32; weights that were saved in lower
        precision keep their values.

    Raises:
        ValueError: If the folder or a file is missing or damaged, the weights are of another network or another save
            than the config.json, a weight is NaN, or the hub cannot be reached, has no such repository or does not
            allow it.

    Example:
        >>> import mrla, tempfile, timm
        >>> folder = mrla.save(timm.create_model("resnet18"), tempfile.mkdtemp())
        >>> mrla.load(folder).training
        False
    """
    if (on_hub := hub_name(folder)) is not None:
        folder = download(*on_hub, (CONFIG, WEIGHTS))
    config, weights = read_saved(folder)
    if is_dense(config):
        raise ValueError(f"{folder} holds a detector or segmenter: load it with mrla.dense.load")
    check_size(config, weights, Path(folder))
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten below
        model = build_from(config)
    put_weights(model, weights, Path(folder) / WEIGHTS, config["architecture"], allow_nan=allow_nan)
    _check_label_names(config, model, Path(folder) / CONFIG)
    # So that the class names and the normalisation are there for whoever saves the network again.
    known = getattr(model, "pretrained_cfg", None) or {}
    model.__dict__["pretrained_cfg"] = {**known, **(config.get("pretrained_cfg") or {})}
    return model.eval()


def read_saved(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json of a saved network and the weights that it was written with.

    Args:
        folder: A folder on this machine.

    Returns:
        The content of both.

    Raises:
        ValueError: As `read_config`, or if the weights are missing, damaged or not those of that config.json. A writer
            that is at work is waited for, a second at most.
    """
    path = Path(folder) / WEIGHTS
    for attempt in range(_ATTEMPTS):
        time.sleep(0.2 if attempt else 0)
        config = read_config(folder)
        weights = read_safetensors(path)
        known = (config.get("mrla") or {}).get(WEIGHTS_HASH)
        if known is None or _sha256(path) == known:
            return config, weights
        with suppress(OSError):  # a folder that can only be read
            _finish(Path(folder))
    raise ValueError(
        f"{path} is not what {Path(folder) / CONFIG} was written with: writing was broken off, or one of them was "
        f"changed; save the network again, or, if it was changed on purpose, remove {WEIGHTS_HASH} from {CONFIG}"
    )


_ATTEMPTS = 6


def build_from(config: Mapping[str, Any]) -> nn.Module:
    """Makes the classifier or backbone that a config.json describes, at its random start.

    Args:
        config: As `read_config` gives it.

    Returns:
        The network.

    Raises:
        ValueError: If there is no such architecture, or it does not take an argument.
    """
    extra = config.get("mrla") or {}
    model = build(config["architecture"], config.get("model_args") or {}, extra.get("attach"))
    if extra.get("ties"):
        tie(model, Ties(**extra["ties"]))
    return model


def check_size(config: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raises where the network that is described is larger than its weights, before memory is taken for it.

    Args:
        config: As `read_config` gives it.
        weights: What was read beside it.
        folder: Where both are from, for errors.

    Raises:
        ValueError: If the plain network has more numbers than there are weights, or cannot be built.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = _create(config["architecture"], config.get("model_args") or {})
    # A name can bring mixers that were taken off again.
    own = {name: tensor for name, tensor in plain.state_dict().items() if MIXER not in name.split(".")}
    wanted, found = (sum(tensor.numel() for tensor in state.values()) for state in (own, weights))
    if wanted > found:
        missing = differences(own, weights)
        raise ValueError(
            f"{folder / WEIGHTS} is of another network than {config['architecture']}: {CONFIG} describes {wanted} "
            f"numbers, it has {found} ({missing}); keep it with the config.json that it was saved with"
        )


def put_weights(
    model: nn.Module, weights: Mapping[str, Tensor], path: Path, name: str, *, allow_nan: bool = False
) -> None:
    """Gives a network weights that were read from a file.

    Args:
        model: The network, which gets them.
        weights: Tensors by name.
        path: The file, for errors.
        name: What the network is called in an error.
        allow_nan: Whether weights may be NaN.

    Raises:
        ValueError: If they are of another network, or one is NaN.
    """
    if found := differences(model.state_dict(), weights):
        raise ValueError(
            f"{path} is of another network than {name} ({found}); keep it with the config.json that it was saved with"
        )
    check_values(weights, path, allow_nan=allow_nan)
    model.load_state_dict(weights)


def is_saved(place: str | Path) -> bool:
    """Whether a place is a folder, or one on the hub, so that `load` and `read_config` can be asked of it."""
    return hub_name(place) is not None or Path(place).is_dir()


def is_dense(config: Mapping[str, Any]) -> bool:
    """Whether a config.json, as `read_config` gives it, is a detector's or segmenter's."""
    return DENSE in (config.get("mrla") or {})


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a saved network.

    Args:
        folder: A folder that `save` has written, or a repository on the hub as for `load`.

    Returns:
        Its content; ``architecture`` is there.

    Raises:
        ValueError: If the folder or the file is missing or cannot be read, or would have something fetched or opened;
            see `checked_config`.
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


def _check_label_names(config: Mapping[str, Any], model: nn.Module, path: Path) -> None:
    labels, classes = (config.get("pretrained_cfg") or {}).get("label_names"), getattr(model, "num_classes", None)
    if labels is not None and isinstance(classes, int) and len(labels) != classes:
        raise ValueError(
            f"class_names must name every class: {path} has label_names of {len(labels)} for {classes} outputs; save "
            f"the network with all its class_names"
        )


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
        ValueError: If the name is not known, name and arguments make another network, or one of them is not JSON.
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
    arguments, twin = _rebuilt(model, architecture, arguments, recipe)
    rebuilt = twin.state_dict()
    ties = new_ties(model, twin)
    if any(ties):
        twin = copy.deepcopy(twin)
        tie(twin, ties)
    if found := differences(rebuilt, weights) or structure_difference(model, twin):
        strange = set(rebuilt) ^ set(weights)
        remedy = "pass the model_args that it was built with"
        if recipe and strange and all(MIXER in name.split(".") for name in strange):
            # As after reset_classifier with another pooling, which decides whether the last block gets a mixer.
            remedy = "detach it, change what is to be changed, and attach again"
        raise ValueError(
            f"{architecture} with {arguments} does not rebuild this {type(model).__name__} ({found}); {remedy}"
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
        "mrla": {"version": version("mrla"), "attach": recipe, **({"ties": ties._asdict()} if any(ties) else {})},
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


def _rebuilt(
    model: nn.Module, architecture: str, arguments: Mapping[str, Any], recipe: Mapping[str, Any] | None
) -> tuple[dict[str, Any], nn.Module]:
    """The arguments that rebuild a network, its pooling with them where that was changed; and what they build."""
    try:
        question = json.dumps([architecture, arguments, recipe, _global_pool(model)])
    except TypeError as error:
        raise ValueError(f"every argument of the network must be writable as JSON: {error}; pass model_args") from error
    asked, made_with, twin = _REBUILT.get(model, ("", {}, model))
    if asked != question:
        _, made_with, made_recipe, pool = json.loads(question)  # as config.json will give them back
        with torch.device("meta"):  # nothing is drawn or copied
            twin = _create(architecture, made_with)
            if pool != _global_pool(twin):  # reset_classifier may have changed it
                made_with["global_pool"] = pool
                twin = _create(architecture, made_with)
            twin = _attach_as(twin, made_recipe)  # the dear part: a dry run
        _REBUILT[model] = (question, made_with, twin)
    return dict(made_with), twin


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
    return _attach_as(_create(architecture, model_args), recipe)


def timm_builds_it(config: Mapping[str, Any]) -> bool:
    """Whether `timm.create_model` makes a saved network by itself, its mixers with it.

    Args:
        config: Content of config.json.

    Returns:
        Whether ``"local-dir:FOLDER"`` and ``"hf-hub:owner/name"`` give the network in timm, after ``import mrla``.
    """
    architecture, recipe = config["architecture"], config["mrla"]["attach"]
    if architecture.startswith(TORCHVISION) or config["model_args"].get("features_only"):
        return False  # timm reads weights into whole classifiers only
    if architecture not in NAMED:
        return recipe is None
    with torch.device("meta"):
        return attach_recipe(_create(architecture, config["model_args"])) == recipe


def _create(architecture: str, model_args: Mapping[str, Any]) -> nn.Module:
    try:
        if architecture.startswith(TORCHVISION):
            from torchvision.models import get_model

            model = get_model(architecture.removeprefix(TORCHVISION), **model_args)
            # As timm leaves on its own, so that the network can be saved again without being told what it is.
            built_with = {name: value for name, value in model_args.items() if name != "weights"}
            model.__dict__.update(pretrained_cfg={"architecture": architecture}, _model_args=built_with)
            return model
        return timm.create_model(architecture, **model_args)
    # of arguments that are not as they should be networks raise whatever they stumble over
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = one_line(error)
        raise ValueError(f"{architecture} cannot be built with {dict(model_args)}: {said}") from error


def _attach_as(model: nn.Module, recipe: Mapping[str, Any] | None) -> nn.Module:
    """Gives a network the mixers that a recipe says, in place of those that its name has given it."""
    if attach_recipe(model) != (dict(recipe) if recipe else None):
        if is_attached(model):
            detach(model)
        if recipe:
            try:
                attach(model, **recipe)
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
                said = one_line(error)
                raise ValueError(f"mixers cannot be attached as {dict(recipe)} says: {said}") from error
    return model


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the file takes them: dense, and none in the memory of another, as two names of one parameter are."""
    taken: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        memory = tensor.untyped_storage().data_ptr()
        shared, tensor = memory in taken, tensor.contiguous()
        apart[name] = tensor.clone() if shared else tensor
        taken.add(memory)
    return apart


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
        *(
            f"{name} holds {str(weights[name].dtype).removeprefix('torch.')}, no weights"
            for name in own
            if name in weights and own[name].is_floating_point() and not weights[name].is_floating_point()
        ),
    ]
    return f"{len(differences)} differences: {'; '.join(differences[:5])}" if differences else ""
