"""The networks that a comparison sets against each other, starting from the same weights where they share them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import timm
from torch import nn

from mrla.data.randomness import derive_seed, seeded
from mrla.data.samples import ImageFacts
from mrla.messages.one_line import one_line
from mrla.models import (
    NETWORKS,
    SavedNetwork,
    TimmModel,
    TorchvisionModel,
    attach,
    build,
    initialise_as_notebook,
    is_attached,
    load,
    read_config,
    resolve,
)
from mrla.models.checkpoints.starting_weights import start_from
from mrla.models.dry_run import input_sizes
from mrla.ops import is_method, method_named, options_of

from .arm_names import parse_arm
from .recipe import Recipe


def resolve_defaults(recipe: Recipe) -> Recipe:
    """The recipe with what its images leave to the network filled in, so that a run's record says all of it.

    Args:
        recipe: Any recipe.

    Returns:
        The recipe.

    Raises:
        ValueError: If there is no such network, or it is a folder that cannot be read.
    """
    if recipe.detector is not None:
        return recipe  # it brings images to its size, and normalises them, itself
    source, trained_with = resolve(recipe.model, NETWORKS), None
    if isinstance(source, SavedNetwork):
        trained_with = read_config(source.place).get("pretrained_cfg")
    elif isinstance(source, TimmModel):
        config = timm.models.get_pretrained_cfg(source.name)
        trained_with = config.to_dict() if config is not None else None
    return replace(recipe, data=recipe.data.completed(trained_with))


def build_arm(recipe: Recipe, facts: ImageFacts) -> nn.Module:
    """The network of a recipe's arm, at its start.

    The plain network is made first, from published weights, a folder's or the recipe's seed; every other arm takes its
    weights where it has the same parameter, so that arms of one seed differ at the start only in what the arm adds.

    Args:
        recipe: Says which network, which arm, how it starts and from which seed.
        facts: Channels and classes of the images.

    Returns:
        The network, in train mode.

    Raises:
        ValueError: If there is no such network, it already has mixers, its weights cannot be had, or the images or the
            arm's options do not fit it.
    """
    with seeded(derive_seed(recipe.seed, "weights")):
        plain = _plain(recipe, facts).train()
        if recipe.init == "notebook":
            initialise_as_notebook(plain)
    if recipe.arm == "plain":
        return plain
    if is_method(parse_arm(recipe.arm).network):
        return attach_arm(plain, recipe)
    with seeded(derive_seed(recipe.seed, "weights", recipe.arm)):
        block_args = {**recipe.model_args.get("block_args", {}), "attn_layer": recipe.arm}
        model_args = {**recipe.model_args, "block_args": block_args}
        other = _untrained(replace(recipe, model_args=model_args), facts).train()
        if recipe.init == "notebook":
            initialise_as_notebook(other)
        other.load_state_dict(plain.state_dict(), strict=False)
        return other


def build_detector(recipe: Recipe, facts: ImageFacts) -> nn.Module:
    """The detector of a recipe's arm, at its start: the arm's network, and on it the same parts in every arm.

    Args:
        recipe: Says which network, which arm, which detector, how they start and from which seed.
        facts: Classes of the objects.

    Returns:
        The detector, in train mode.

    Raises:
        ValueError: If the network, the arm's options or the detector's do not fit one another.
    """
    from mrla.dense import detector

    options = recipe.detector
    assert options is not None
    backbone = build_arm(recipe, facts)
    with seeded(derive_seed(recipe.seed, "weights", "detector")):
        try:
            made = detector(
                options.name,
                backbone,
                len(facts.class_names) + 1,  # with the background, as torchvision's detectors count
                min_size=options.min_size,
                max_size=options.max_size,
                freeze_stages=options.freeze_stages,
                norm_eval=options.norm_eval,
                fpn_channels=options.fpn_channels,
                **options.options,
            )
        except TypeError as error:
            raise ValueError(f"detector.options must be arguments of mrla.dense.detector: {error}") from error
    return made.train()


def attach_arm(plain: nn.Module, recipe: Recipe) -> nn.Module:
    """Gives a plain network the mixers of a recipe's arm, drawn from the recipe's seed.

    Args:
        plain: The network, changed in place.
        recipe: Says which method, which mixers, how they start and from which seed.

    Returns:
        `plain` itself.

    Raises:
        ValueError: If it already has mixers, or their options do not fit it.
    """
    if is_attached(plain):
        raise ValueError(
            f"model must be a plain network, for the arm {recipe.arm!r} is attached to it: got {recipe.model!r}, which "
            f"has mixers already; name the plain one, or take the arm 'plain' to train this one as it is"
        )
    with seeded(derive_seed(recipe.seed, "weights", recipe.arm)):
        return attach(plain, **mixer_arguments(recipe))


def added_by(arm: str) -> tuple[str, ...]:
    """Patterns of the parameters that an arm adds to the plain network beside mixers."""
    return ("*.se.*",) if arm in ("eca", "se") else ()  # timm's ResNets call either so


def mixer_arguments(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `attach` for a recipe's arm: what its name says, else the recipe's, where the method has it."""
    arm = parse_arm(recipe.arm)
    accepted = options_of(method_named(arm.network))
    usual = {"init": recipe.init, **vars(recipe.mixer)}
    return {
        "method": arm.network,
        **{name: value for name, value in usual.items() if name in accepted},
        **arm.options,
    }


def _plain(recipe: Recipe, facts: ImageFacts) -> nn.Module:
    """The network before what the arm adds, with its starting weights and a classifier for the images' classes."""
    source = resolve(recipe.model, NETWORKS)
    if isinstance(source, SavedNetwork):
        model, trained = _untrained(recipe, facts), load(source.place)
        names = trained.pretrained_cfg.get("label_names")  # type: ignore[union-attr, operator]
        kept = names is None or tuple(names) == facts.class_names
        return start_from(model, trained.state_dict(), keep_classifier=kept)
    if recipe.pretrained and isinstance(source, TorchvisionModel):
        model = _untrained(recipe, facts)
        with _fetching(recipe):
            trained = build(recipe.model, {**recipe.model_args, "weights": "DEFAULT"}, None)
        return start_from(model, trained.state_dict(), keep_classifier=True)  # as timm does, for as many classes
    with _fetching(recipe):
        return _untrained(recipe, facts, pretrained=recipe.pretrained)


def _untrained(recipe: Recipe, facts: ImageFacts, *, pretrained: bool = False) -> nn.Module:
    """The recipe's network at random weights, or with those that timm publishes."""
    arguments = {**recipe.model_args, "num_classes": len(facts.class_names)}
    source = resolve(recipe.model, NETWORKS)
    if isinstance(source, SavedNetwork):
        config = read_config(source.place)
        arguments = {**(config.get("model_args") or {}), **arguments}
        model = build(config["architecture"], arguments, (config.get("mrla") or {}).get("attach"))
        _check_channels(recipe, input_sizes(model)[0][0], facts)
        return model
    if isinstance(source, TorchvisionModel):
        _check_channels(recipe, 3, facts)
        return build(recipe.model, arguments, None)
    arguments["in_chans"] = facts.in_chans
    try:
        return timm.create_model(source.name, pretrained=pretrained, **arguments)
    except (TypeError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError):  # huggingface_hub's are both
            raise
        raise ValueError(f"{recipe.model} cannot be built with {arguments}: {error}") from error


def _check_channels(recipe: Recipe, channels: int, facts: ImageFacts) -> None:
    if channels != facts.in_chans:
        raise ValueError(
            f"the images must have the {channels} channels that {recipe.model} takes: they have {facts.in_chans} "
            f"({recipe.data.kind}); name others, such as --recipe finetune --data.root DIR"
        )


@contextmanager
def _fetching(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the weights of {recipe.model} cannot be fetched ({one_line(error, 200)}); try again with a "
            f"connection, name a folder of mrla.save as model, or take pretrained=false"
        ) from error


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
