"""The networks that a comparison sets against each other, starting from the same weights where they share them."""

from typing import Any

import timm
from torch import nn

from mrla.models import attach, initialise_as_notebook, is_attached
from mrla.ops import METHODS

from .data import ImageFacts
from .randomness import derive_seed, seeded
from .recipes import MixerOptions, Recipe, nearest


def build_arm(recipe: Recipe, facts: ImageFacts) -> nn.Module:
    """The network of a recipe's arm, at its start.

    The plain network is drawn first, from the recipe's seed; every other arm takes its weights where it has the same
    parameter, so that arms of one seed differ at the start only in what the arm adds.

    Args:
        recipe: Says which network, which arm, how it starts and from which seed.
        facts: Channels and classes of the images.

    Returns:
        The network, in train mode.

    Raises:
        ValueError: If there is no such network, it already has mixers, or the arm's options do not fit it.
    """
    arguments = {**recipe.model_args, "num_classes": len(facts.class_names), "in_chans": facts.in_chans}
    with seeded(derive_seed(recipe.seed, "weights")):
        plain = _create(recipe, arguments)
        if recipe.init == "notebook":
            initialise_as_notebook(plain)
    if recipe.arm == "plain":
        return plain
    with seeded(derive_seed(recipe.seed, "weights", recipe.arm)):
        if recipe.arm in METHODS:
            return _attached(plain, recipe)
        block_args = {**recipe.model_args.get("block_args", {}), "attn_layer": recipe.arm}
        other = _create(recipe, {**arguments, "block_args": block_args})
        if recipe.init == "notebook":
            initialise_as_notebook(other)
        other.load_state_dict(plain.state_dict(), strict=False)
        return other


def mixer_arguments(options: MixerOptions, arm: str) -> dict[str, Any]:
    """The arguments of `attach` that say how an arm's mixers are built; the control has neither heads nor memory."""
    arguments: dict[str, Any] = {"norm": options.norm, "drop_path": options.drop_path}
    if arm != "dw":
        arguments.update(head_dim=options.head_dim, heads=options.heads)
    if arm == "light":
        arguments["carry"] = options.carry
    return arguments


def _attached(plain: nn.Module, recipe: Recipe) -> nn.Module:
    if is_attached(plain):
        raise ValueError(
            f"model must be a plain network, for the arm {recipe.arm!r} is attached to it: got {recipe.model!r}, which "
            f"has mixers already; name the plain one, or take the arm 'plain' to train this one as it is"
        )
    return attach(plain, recipe.arm, init=recipe.init, **mixer_arguments(recipe.mixer, recipe.arm))


def _create(recipe: Recipe, arguments: dict[str, Any]) -> nn.Module:
    if not timm.is_model(recipe.model.split(".")[0]):
        hint = nearest(recipe.model, timm.list_models())
        raise ValueError(f"model must be a name that `mrla models` or timm lists: got {recipe.model!r}{hint}")
    try:
        return timm.create_model(recipe.model, pretrained=recipe.pretrained, **arguments)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{recipe.model} cannot be built with {arguments}: {error}") from error


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Trainable parameters, and those with BatchNorm's running statistics, as the notebook counts.

    Args:
        model: Any network.

    Returns:
        ``trainable`` and ``with_statistics``.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     count_parameters(timm.create_model("resnet18_cifar", num_classes=10))
        {'trainable': 11173962, 'with_statistics': 11183562}
    """
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    statistics = sum(b.numel() for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var")))
    return {"trainable": trainable, "with_statistics": trainable + statistics}
