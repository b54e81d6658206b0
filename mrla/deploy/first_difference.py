"""Where an exported file begins to differ from the network: the first layer whose output is another."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mrla.ops
from mrla.ops import LayerMixer

from .fusing import largest_difference, tensors_in

_SCOPES = "pkg.torch.onnx.name_scopes"
_LARGEST = 2**31 - 2**24
"""A model with all its outputs goes to ONNX Runtime as one message, which protobuf limits to 2 GB."""


def first_difference(path: Path, format: str, model: nn.Module, image: Tensor, bound: float) -> str | None:
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
    if format not in _VALUES:
        return None
    layers = _layer_outputs(model, image)
    mixers = [path for path, module in model.named_modules() if isinstance(module, LayerMixer)]
    inside: dict[str, list[Tensor]] = defaultdict(list)
    for module, value in _VALUES[format](path, image):
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


def _values_in_onnx(path: Path, image: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every value of a file with the path of its module; a copy of it runs in which they all are outputs."""
    if sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) > _LARGEST:
        return
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    content = onnx.load(str(path))
    modules: dict[str, str] = {}
    for node in content.graph.node:
        scopes = next((one.value for one in node.metadata_props if one.key == _SCOPES), "[]")
        levels = ast.literal_eval(scopes)  # the last is the operator itself
        if len(levels) > 1:
            modules |= {name: levels[-2] for name in node.output if name}
    given = [output.name for output in content.graph.output]
    content.graph.output.extend(onnx.ValueInfoProto(name=name) for name in modules if name not in given)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(content.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(list(modules), {session.get_inputs()[0].name: image.contiguous().numpy()})
    for name, value in zip(modules, values, strict=True):
        if getattr(value, "dtype", None) == "float32":
            yield modules[name], torch.from_numpy(value)


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule):
        super().__init__(module)
        self.values: list[tuple[str, Tensor]] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        stack = list((n.meta.get("nn_module_stack") or {}).values())
        if stack and isinstance(result, Tensor) and result.is_floating_point():
            self.values.append((stack[-1][0], result.clone()))
        return result


def _values_in_torch(path: Path, image: Tensor) -> Iterator[tuple[str, Tensor]]:
    module: Any = torch.export.load(path).module()
    recorder = _Recorder(module)
    with torch.inference_mode():
        recorder.run(image)
    yield from recorder.values


_VALUES = {"onnx": _values_in_onnx, "torch_export": _values_in_torch}
