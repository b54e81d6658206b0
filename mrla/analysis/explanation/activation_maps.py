"""Where a classifier looks: class activation maps of its last chain of blocks, computed by captum, and a picture."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import RmsNorm, RmsNorm2d
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mrla.models import Chain, attach_recipe, detach, find_chains, is_attached
from mrla.models.dry_run import Call, dry_run
from mrla.models.grids import GridFromArgument, GridFromPatches, is_grid
from mrla.models.modes import in_eval_mode
from mrla.ops import Grid, to_map

from ..curves import STYLE, save_figure
from ..fonts import matplotlib_fonts

_NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNorm2d)
"""What gives the same for features of any size, place by place."""
_ROUNDING = 1e-3
"""Of what share of its terms a sum may be rounding, with the small number that norms add."""


@dataclass(frozen=True)
class CamTarget:
    """Where in a network is looked at, for images of one size.

    Attributes:
        chain: The chain of blocks behind which that is.
        path: The module that gives or takes what is looked at.
        at_input: Whether it is the one that takes it.
        grid: The grid of its tokens, where a block is told it.
    """

    chain: Chain
    path: str
    at_input: bool
    grid: Grid | None


def activation_maps(
    model: nn.Module,
    images: Tensor,
    targets: int | Sequence[int] | Tensor | None = None,
    *,
    chain: Chain | None = None,
) -> Tensor:
    r"""Which parts of each image speak for a class, by HiResCAM on what the last chain of blocks gives.

    :math:`\mathrm{relu}(\sum_c A_c \odot \partial y / \partial A_c)` with the class's logit y and the features A behind
    the chain's last mixer (arXiv:2011.08891), enlarged bilinearly and divided by its maximum. Before a global average
    pooling and one linear layer it is Grad-CAM, and CAM.

    Where a LayerNorm or RMSNorm takes the features in, A is what it gives of them: what it is given has at every place
    a gradient orthogonal to it, and the sum would be rounding. Where only the class token of the last block is read,
    the patches have no gradient behind it, and A is what goes into that block, or its norm.

    The network is looked at in eval mode and left as it was: modes, gradients, `requires_grad`, hooks.

    Args:
        model: A classifier, with mixers or without.
        images: (b, c, h, w), prepared as for the network.
        targets: The class of every image, or one for all; None for the class with the largest logit.
        chain: Whose output is looked at, one of `mrla.chains`; None for the last.

    Returns:
        (b, h, w) from 0 to 1, float32; 1 at the place of each image that speaks most, 0 everywhere if none does. Two
        maps tell where, and not which of two networks is surer.

    Raises:
        ValueError: If the images are not four-dimensional, a target is none of the classes, no chain is found or no
            module gives or takes its output, a norm takes its output in that is not found, the network is no
            classifier, or this is called in inference mode.
        TypeError: If the images or targets are of a wrong type.

    Example:
        >>> import mrla, timm
        >>> model = mrla.attach(timm.create_model("resnet18", channels=(16, 16, 32, 32), num_classes=5))
        >>> activation_maps(model, torch.randn(2, 3, 64, 64), targets=[0, 3]).shape
        torch.Size([2, 64, 64])
    """
    _check_images(images)
    plain = plain_twin(model)
    if chain is None:
        recipe = attach_recipe(model) or {}
        chain = find_chains(plain, recipe.get("blocks"), (2, *images.shape[1:]))[-1]
    return maps_at(cam_target_of(plain, chain, images.shape[1:]), model, images, targets)


def cam_target_of(plain: nn.Module, chain: Chain, shape: Sequence[int]) -> CamTarget:
    """Where to look at what a chain of blocks gives; it takes a dry run, and serves all images of this size.

    Args:
        plain: The network without mixers, see `plain_twin`.
        chain: One of its chains.
        shape: Of an image, (c, h, w).

    Returns:
        The place, in the network with its mixers too.

    Raises:
        ValueError: If the network has no such chain, or no module that gives or takes what it gives.
    """
    calls = dry_run(plain, (2, *shape)).calls
    path, at_input = _module_to_look_at(plain, chain, calls)
    return CamTarget(chain, path, at_input, None if chain.patch_embed else _grid_from_call(chain, calls))


def maps_at(
    place: CamTarget, model: nn.Module, images: Tensor, targets: int | Sequence[int] | Tensor | None = None
) -> Tensor:
    """`activation_maps` at a place that is known."""
    from captum.attr import LayerGradientXActivation

    _check_images(images)
    images = images.detach().clone()  # no part of the caller's graph, and no tensor of inference mode
    chain = place.chain
    patches = None
    if chain.patch_embed:
        patches = GridFromPatches(model.get_submodule(chain.patch_embed), chain.num_prefix_tokens)
    try:
        with in_eval_mode(model):
            with torch.no_grad():
                logits = model(images)
            classes = _checked_targets(targets, _checked_logits(logits, len(images)))
            grid = patches.grid(images) if patches else place.grid
            found = LayerGradientXActivation(model, model.get_submodule(place.path)).attribute(
                images,
                target=classes,
                attribute_to_layer_input=place.at_input,
                grad_kwargs={"materialize_grads": True},  # zeros where the class does not depend on the place
            )
    finally:
        if patches is not None:
            patches.detach()
    assert isinstance(found, Tensor)
    spoken = to_map(found.detach().float(), chain.layout, num_prefix_tokens=chain.num_prefix_tokens, grid=grid)
    _check_spoken(spoken, chain)
    maps = interpolate(spoken.sum(1, keepdim=True).relu(), images.shape[2:], mode="bilinear")[:, 0]
    largest = maps.amax((1, 2), keepdim=True)
    return torch.where(largest > 0, maps / largest, 0.0)


def draw_activation_maps(
    picture: Tensor, maps: Mapping[str, Tensor], path: Path, *, captions: Mapping[str, str] | None = None
) -> Path:
    """Draws an image and its maps side by side as a PNG, each map laid over the image in grey.

    Args:
        picture: (3, h, w) or (1, h, w), whole numbers to 255 or fractions to 1, not normalised.
        maps: Maps (h, w) from 0 to 1 by what they are called, such as ``"with mixers"``, from left to right.
        path: The file, ``.png``; its folder is made if need be.
        captions: A line below a map by its name, such as what the network says; ``"image"`` names the image.

    Returns:
        `path`.

    Raises:
        ValueError: If there is no map, one is not of the picture's size or not from 0 to 1, or the picture, the path or
            a caption does not fit.

    Example:
        >>> import tempfile
        >>> looked = {"with mixers": torch.rand(32, 32), "without": torch.rand(32, 32)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     drawn = draw_activation_maps(torch.rand(3, 32, 32), looked, Path(folder) / "maps.png")
        ...     drawn.name
        'maps.png'
    """
    import matplotlib
    from matplotlib.figure import Figure

    captions = captions or {}
    shown = _checked_picture(picture)
    _check_drawing(shown, maps, path, captions)
    rows, columns = shown.shape[:2]
    grey = shown.mean(2)
    width = 3.2
    height = min(max(width * rows / columns, 1.6), 3 * width)
    with matplotlib.rc_context({**STYLE, **matplotlib_fonts(list(captions.values())), "axes.grid": False}):
        figure = Figure(figsize=(width * (1 + len(maps)) + 0.9, height + 0.9), layout="constrained")
        panels = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
        panels[0].imshow(shown, interpolation="nearest")
        colours: Any = None
        for axes, looked in zip(panels[1:], maps.values(), strict=True):
            axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            colours = axes.imshow(
                looked.detach().cpu().float().numpy(),
                cmap="inferno",
                vmin=0,
                vmax=1,
                alpha=0.6,
                interpolation="nearest",
            )
        for axes, name in zip(panels, ("image", *maps), strict=True):
            axes.set(title=name, xlabel=captions.get(name, ""), xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        bar = figure.colorbar(colours, ax=list(panels), shrink=0.9, pad=0.02, ticks=[0, 0.5, 1])
        bar.set_label("share of its maximum")
        return save_figure(figure, path, dpi=150)


def _check_images(images: Tensor) -> None:
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "activation maps need gradients, which inference mode forbids: call activation_maps outside "
            "torch.inference_mode(); torch.no_grad() is fine"
        )
    if not isinstance(images, Tensor) or not images.is_floating_point():
        what = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a tensor of floating-point numbers, prepared as for the network: got {what}")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"images must be (b, c, h, w), none of them 0: got shape {tuple(images.shape)}; give one image as "
            f"image[None]"
        )


def plain_twin(model: nn.Module) -> nn.Module:
    """The plain network, whose chains are found as before `attach`; a copy that shares the weights."""
    if not is_attached(model):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return detach(copy.deepcopy(model, shared))


def _module_to_look_at(plain: nn.Module, chain: Chain, calls: Sequence[Call]) -> tuple[str, bool]:
    """The module that gives or takes what is looked at, and whether it is the one that takes it."""
    by_path: dict[str, list[Call]] = {}
    for call in calls:
        by_path.setdefault(call.path, []).append(call)
    last_path = f"{chain.name}.{chain.blocks[-1]}"
    if len(by_path.get(last_path, [])) != 1:
        raise ValueError(f"chain must be one of the network's, see mrla.chains: got {last_path}, which is not called")
    last = by_path[last_path][0]
    features = last.given if chain.patches_unread else last.returned
    # Found on the plain network: in one with mixers all of these get or give what the mixer before has made of it.
    takers = [
        call for call in calls if len(call.args) == 1 and call.args[0] is features and len(by_path[call.path]) == 1
    ]
    for call in takers:
        if isinstance(plain.get_submodule(call.path), _NORMS):
            return call.path, False
    container = by_path.get(chain.name, [])
    if len(container) == 1 and container[0].output is features:
        return chain.name, False
    if takers:
        return takers[0].path, True
    raise ValueError(
        f"an activation map needs a module that gives or takes the output of {chain.name} and nothing else: this "
        f"network has none; look at another chain of mrla.chains(model), with chain=..."
    )


def _check_spoken(spoken: Tensor, chain: Chain) -> None:
    most = spoken.abs().sum(1).amax()
    if most > 0 and spoken.sum(1).abs().amax() < _ROUNDING * most:
        raise ValueError(
            f"the features behind {chain.name} and their gradients must not cancel at every place: here a norm takes "
            f"them in that was not found, so their size says nothing; look at another chain of mrla.chains(model), "
            f"with chain=..."
        )


def _grid_from_call(chain: Chain, calls: Sequence[Call]) -> Grid | None:
    if not chain.takes_grid:
        return None
    last = next(call for call in calls if call.path == f"{chain.name}.{chain.blocks[-1]}")
    if isinstance(last.output, (tuple, list)) and len(last.output) > 1 and is_grid(last.output[1]):
        return tuple(last.output[1])  # type: ignore[return-value]
    return GridFromArgument().grid(last.args[1:], last.kwargs)


def _checked_logits(logits: Any, images: int) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != images:
        given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"activation maps are of a classifier, which gives logits (b, classes): this network gives {given} for "
            f"{images} images"
        )
    if not logits.isfinite().all():
        raise ValueError("activation maps need finite logits: this network gives others too; look at its weights")
    return logits


def _checked_targets(targets: int | Sequence[int] | Tensor | None, logits: Tensor) -> Tensor:
    if targets is None:
        return logits.argmax(1)
    given = torch.as_tensor(targets)
    if given.is_floating_point() or given.dtype == torch.bool:
        raise TypeError(f"targets must be whole numbers, the classes: got {given.dtype}")
    if given.shape not in ((), (len(logits),)):
        raise ValueError(
            f"targets must be one class, or one for each of {len(logits)} images: got shape {tuple(given.shape)}"
        )
    if wrong := [target for target in given.reshape(-1).tolist() if not 0 <= target < logits.shape[1]]:
        raise ValueError(f"targets must be from 0 to {logits.shape[1] - 1}, the network's classes: got {wrong[0]}")
    return given.to(logits.device, torch.int64).expand(len(logits))


def _checked_picture(picture: Tensor) -> Any:
    """The picture as an array (h, w, 3) of fractions."""
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"picture must be (3, h, w) or (1, h, w): got shape {tuple(picture.shape)}")
    fractions = picture.detach().cpu().float() / (1 if picture.is_floating_point() else 255)
    if not ((fractions >= 0) & (fractions <= 1)).all():
        raise ValueError(
            f"picture must be whole numbers to 255 or fractions to 1: got {picture.min()} to {picture.max()}; undo the "
            f"network's normalisation"
        )
    return fractions.expand(3, -1, -1).permute(1, 2, 0).numpy()


def _check_drawing(shown: Any, maps: Mapping[str, Tensor], path: Path, captions: Mapping[str, str]) -> None:
    if not maps or "image" in maps:
        raise ValueError(f"maps must be at least one, none called 'image': got {', '.join(maps) or 'none'}")
    if unknown := sorted(set(captions) - {"image", *maps}):
        raise ValueError(
            f"captions must be of 'image' or a map: got {unknown[0]!r}; choose from image, {', '.join(maps)}"
        )
    if path.suffix != ".png":
        raise ValueError(f"path must end in .png: got {path.name}")
    for name, looked in maps.items():
        if looked.shape != shown.shape[:2]:
            raise ValueError(
                f"a map must have the picture's size {shown.shape[:2]}: got {tuple(looked.shape)} for {name!r}; give "
                f"the picture as it was cut for the network"
            )
        if not ((looked >= 0) & (looked <= 1)).all():
            raise ValueError(f"a map must be from 0 to 1: got {looked.min()} to {looked.max()} for {name!r}")
