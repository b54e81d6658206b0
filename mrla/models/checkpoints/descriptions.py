"""Networks as descriptions: from a network to its name and arguments, and back."""

import copy
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import timm
import torch
from torch import Tensor, nn

from mrla.messages.one_line import one_line
from mrla.messages.registering import file_of, is_ours, plugin_of
from mrla.ops import method_named

from ..attachment import attach, detach, is_attached
from ..mixed_blocks import MIXER
from ..wiring import attach_recipe
from ..zoo.registration import NAMED
from .names import TORCHVISION, TimmModel, TorchvisionModel, resolve
from .network_structure import Ties, new_ties, structure_difference, tie

# The last question about a network, and its answer: a training describes the same network at its start and its end.
_REBUILT: WeakKeyDictionary[nn.Module, tuple[str, dict[str, Any], nn.Module]] = WeakKeyDictionary()


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
    classes = getattr(model, "num_classes", None)
    names = known.get("label_names")
    if names is not None and isinstance(classes, int) and len(names) != classes:
        # Those of a classifier that reset_classifier has replaced.
        known = {**known, "label_names": None}
    return {
        "architecture": architecture,
        **({"num_classes": classes} if isinstance(classes, int) else {}),
        "model_args": arguments,
        "pretrained_cfg": {name: known[name] for name in kept if known.get(name) is not None},
        "mrla": {**mixer_record(model), **({"ties": ties._asdict()} if any(ties) else {})},
    }


def mixer_record(model: nn.Module) -> dict[str, Any]:
    """What config.json says of a network's mixers: this version, the arguments of `attach`, whose method it is."""
    recipe = attach_recipe(model)
    record: dict[str, Any] = {"version": version("mrla"), "attach": recipe}
    if recipe and not is_ours(mixer := method_named(recipe["method"])):
        plugin = plugin_of(mixer) or file_of(mixer)
        record["plugin"] = Path(plugin).name if plugin.endswith(".py") else plugin
    return record


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
    answered, made_with, twin = _REBUILT.get(model, ("", {}, model))
    if answered != question:
        _, made_with, made_recipe, pool = json.loads(question)  # as config.json will give them back
        twin = create_empty(architecture, made_with)
        if pool != _global_pool(twin):  # reset_classifier may have changed it
            made_with["global_pool"] = pool
            twin = create_empty(architecture, made_with)
        with torch.device("meta"):
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

    Example:
        >>> model = build("test_resnet", {"num_classes": 2}, {"method": "light"})
        >>> model.num_classes
        2
    """
    return _attach_as(create(architecture, model_args), recipe)


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
    return attach_recipe(create_empty(architecture, config["model_args"])) == recipe


def create(architecture: str, model_args: Mapping[str, Any]) -> nn.Module:
    """The plain network of a name and its arguments; what it stumbles over is a `ValueError`."""
    try:
        source = resolve(architecture, (TimmModel, TorchvisionModel), what="an architecture")
        if isinstance(source, TorchvisionModel):
            from torchvision.models import get_model

            model = get_model(source.name, **model_args)
            # As timm leaves on its own, so that the network can be saved again without being told what it is.
            built_with = {name: value for name, value in model_args.items() if name != "weights"}
            model.__dict__.update(pretrained_cfg={"architecture": architecture}, _model_args=built_with)
            return model
        return timm.create_model(source.name, **model_args)
    # of arguments that are not as they should be networks raise whatever they stumble over
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = one_line(error)
        raise ValueError(f"{architecture} cannot be built with {dict(model_args)}: {said}") from error


def create_empty(architecture: str, model_args: Mapping[str, Any]) -> nn.Module:
    """The plain network of a name and its arguments on the meta device: as `create`, but no weight is kept or drawn."""
    try:
        with torch.device("meta"):
            return create(architecture, model_args)
    except ValueError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
    # Its constructor reads numbers of tensors, as torchvision's RegNets do for the widths of their blocks.
    with torch.random.fork_rng(devices=[]):
        return create(architecture, model_args).to("meta")


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
