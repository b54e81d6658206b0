"""One image: where a classifier looks in it, with its mixers and without."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mrla.messages.brief import Brief
from mrla.models import Chain, attach_recipe, find_chains
from mrla.models.modes import in_eval_mode

from ..fonts import drawable
from .activation_maps import CamTarget, cam_target_of, draw_activation_maps, maps_at

_ROOM = 4


@dataclass(frozen=True, kw_only=True, repr=False)
class Picture(Brief):
    """An image to look at.

    Attributes:
        name: What it is called.
        input: (c, h, w), as the network takes it.
    """

    name: str
    input: Tensor

    def _brief(self) -> dict[str, object]:
        return {"name": self.name, "shape": tuple(self.input.shape)}


def cam_target_for(model: nn.Module, plain: nn.Module, shape: Sequence[int]) -> CamTarget:
    """Where class activation maps of images of a size are taken: behind the last chain with room for one.

    Args:
        model: A classifier with mixers.
        plain: The same without.
        shape: Of an image, (c, h, w).

    Returns:
        The place; looking for it runs the network twice without computing anything.

    Raises:
        ValueError: If there is none.
    """
    recipe = attach_recipe(model) or {}
    chains = find_chains(plain, recipe.get("blocks"), (2, *shape))
    return cam_target_of(plain, _chain_with_room(chains), shape)


def draw_cam_overlay(
    model: nn.Module,
    plain: nn.Module,
    picture: Picture,
    place: CamTarget,
    class_names: Sequence[str] | None,
    path: Path,
) -> str:
    """Draws the class activation maps of an image, for the class that the network with mixers says.

    Args:
        model: A classifier with mixers.
        plain: The same without.
        picture: The image.
        place: Where is looked, `cam_target_for` of images of its size.
        class_names: Names of the classes.
        path: The PNG.

    Returns:
        What both say and where the maps are taken, in words.

    Raises:
        ValueError: If the networks are no classifiers, or what is found there tells nothing.
    """
    device = next(model.parameters()).device
    image = picture.input[None].to(device)
    said = []
    with in_eval_mode(model, plain), torch.no_grad():
        for network in (model, plain):
            chances = network(image)[0].float().softmax(-1)
            label = int(chances.argmax())
            said.append((label, f"{100 * float(chances[label]):.0f} %"))
    with_mixers, without = (f"{_named(label, class_names)} ({chance})" for label, chance in said)
    label = said[0][0]
    maps = {
        name: maps_at(place, network, image, label)[0].cpu()
        for name, network in (("with mixers", model), ("without", plain))
    }
    # Asked of all classes, so that it is said once what cannot be drawn.
    _, names = drawable(class_names or (), [f"class {one}" for one in range(len(class_names or ()))])
    words = {
        name: f"{_named(one, names)} ({chance})"
        for name, (one, chance) in zip(("with mixers", "without"), said, strict=True)
    }
    # Dollars would begin a formula in matplotlib.
    captions = {name: _shortened(text).replace("$", r"\$") for name, text in words.items()}
    draw_activation_maps(_shown(picture.input), maps, path, captions=captions)
    named = _named(label, class_names)
    return f"{with_mixers} with mixers, {without} without; both maps are for {named}, behind {place.chain.name}"


def _chain_with_room(chains: Sequence[Chain]) -> Chain:
    """The last chain whose maps have at least four rows and columns; a map of one pixel tells no place."""

    def side(chain: Chain) -> int:
        if chain.layout == "NLC":
            return _ROOM
        return min(chain.shape[2:] if chain.layout == "NCHW" else chain.shape[1:3])

    roomy = [chain for chain in chains if side(chain) >= _ROOM]
    return roomy[-1] if roomy else max(chains, key=side)


def _named(label: int, class_names: Sequence[str] | None) -> str:
    return class_names[label] if class_names and label < len(class_names) else f"class {label}"


def _shortened(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _shown(image: Tensor) -> Tensor:
    """The image as it is looked at: its smallest number black, its largest white, whatever it was normalised with."""
    image = image.detach().cpu().float()
    if image.shape[0] not in (1, 3):
        image = image.mean(0, keepdim=True)
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high > low else torch.zeros_like(image)
