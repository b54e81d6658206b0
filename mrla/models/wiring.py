"""What a block has to know to run its mixer."""

from typing import Any, Literal, NamedTuple

from torch import nn

from .grids import GridFromArgument, GridFromPatches

ShortcutSource = Literal["input", "downsample"]

_ATTRIBUTE = "mrla_wiring"


class Wiring(NamedTuple):
    """What a block has to know to run its mixer.

    Attributes:
        path: The block's path in its network, for errors.
        chain: Path of the first block of its chain, by which the memory of another chain is told apart.
        shortcut: Where the block's shortcut comes from: its input, or its `downsample`; None where it is not known.
        grid_source: Where the grid of the tokens comes from; None for maps.
    """

    path: str
    chain: str
    shortcut: ShortcutSource | None = "input"
    grid_source: GridFromArgument | GridFromPatches | None = None


def wiring_of(module: nn.Module) -> Wiring | None:
    """What a block knows to run its mixer; None of a module that `attach` has not changed."""
    return module.__dict__.get(_ATTRIBUTE)


def set_wiring(block: nn.Module, wiring: Wiring | None) -> None:
    """Notes on a block what it has to know, or takes it off again."""
    block.__dict__.pop(_ATTRIBUTE, None)
    if wiring is not None:
        block.__dict__[_ATTRIBUTE] = wiring


def attach_recipe(model: nn.Module) -> dict[str, Any] | None:
    """The arguments that `attach` was called with, or None for a plain network.

    Args:
        model: Any network.

    Returns:
        The arguments by name; `attach` with them makes the same mixers on the plain network.

    Example:
        >>> import mrla, timm
        >>> attach_recipe(mrla.attach(timm.create_model("resnet18_cifar"), "base", last=3))["method"]
        'base'
    """
    recipe = getattr(model, "mrla_recipe", None)
    return dict(recipe) if isinstance(recipe, dict) else None
