"""Where an exported file begins to differ from the network: the first layer whose output is another."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mrla.ops
from mrla.ops import LayerMixer

from .formats import ExportFormat
from .fusing import largest_difference, tensors_in


def first_difference(path: Path, format: ExportFormat, model: nn.Module, image: Tensor, bound: float) -> str | None:
    """The first layer, in the order in which the network calls them, whose output an exported file does not have.

    Layers are mixers, and modules without children outside of them. A file knows from which module each of its values
    comes. A layer differs if it has values of its shape in the file, and none of them is what it gives. Any layer's
    output will do but for a mixer: where a norm is folded into the convolution before it, one value stands for both.

    Args:
        path: The file.
        format: Its format.
        model: The network, in eval mode on the CPU.
        image: An input on which they differ.
        bound: What may differ, of the largest number of each output.

    Returns:
        The layer's path; None if no layer differs, or the format does not tell of its values.
    """
    found = format.layer_values(path, image)
    if found is None:
        return None
    layers = _layer_outputs(model, image)
    mixers = [path for path, module in model.named_modules() if isinstance(module, LayerMixer)]
    inside: dict[str, list[Tensor]] = defaultdict(list)
    for module, value in found:
        inside[next((mixer for mixer in mixers if f"{module}.".startswith(f"{mixer}.")), module)].append(value)
    by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    own: dict[str, list[Tensor]] = defaultdict(list)
    for layer, output in layers:
        by_shape[tuple(output.shape)].append(output)
        own[layer].append(output)
    for layer, output in layers:
        values = [value for value in inside[layer] if value.shape == output.shape]
        # A mixer has values in it that are what it was given.
        outputs = own[layer] if layer in mixers else by_shape[tuple(output.shape)]
        if values and not any(_known(value, outputs, bound) for value in values):
            return layer
    return None


def _known(value: Tensor, outputs: Iterable[Tensor], bound: float) -> bool:
    return any(largest_difference(value, output) <= bound for output in outputs)


def _layer_outputs(model: nn.Module, image: Tensor) -> list[tuple[str, Tensor]]:
    """The first output of every layer, in the order in which they are done."""
    found: list[tuple[str, Tensor]] = []
    handles = []
    in_mixers = {id(part) for mixer in model.modules() if isinstance(mixer, LayerMixer) for part in mixer.children()}
    for path, module in model.named_modules():
        is_leaf = next(module.children(), None) is None and id(module) not in in_mixers
        if is_leaf or isinstance(module, LayerMixer):

            def note(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                first = next((value for value in tensors_in(output) if value.is_floating_point()), None)
                if first is not None:  # copied, for an activation in place writes over it
                    found.append((path, first.clone()))
                    if isinstance(module, LayerMixer):  # in the form for engines it has added what it was given
                        found.append((path, args[0] + first))

            handles.append(module.register_forward_hook(note))
    try:
        with mrla.ops.use("reference"), torch.inference_mode():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return found
