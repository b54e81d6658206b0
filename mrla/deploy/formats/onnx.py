"""ONNX files, which ONNX Runtime runs."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..engine_form import engine_form
from ..export_facts import DYNAMIC, KEY, Facts
from .contract import INPUT, OUTPUT, ExportFormat, Opened, register_format
from .programs import not_written, quiet

_SCOPES = "pkg.torch.onnx.name_scopes"
_LARGEST = 2**31 - 2**24
"""A model with all its outputs goes to ONNX Runtime as one message, which protobuf limits to 2 GB."""


@register_format
class OnnxFormat(ExportFormat):
    """ONNX by torch's exporter; the facts are metadata, weights above 2 GB lie beside the file."""

    name = "onnx"
    suffix = ".onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def prepare(self, model: nn.Module) -> nn.Module:
        """Light mixers in operators that ONNX Runtime keeps in its blocked layout."""
        return engine_form(model)

    def write(self, program: ExportedProgram, path: Path, facts: Facts) -> None:
        """Converts and writes the program."""
        outputs = len(program.graph_signature.user_outputs)
        names = [OUTPUT, *(f"{OUTPUT}_{index}" for index in range(1, outputs))]
        axes = {DYNAMIC[name]: name for name in facts.dynamic}
        try:
            with quiet():
                made: Any = torch.onnx.export(
                    program, input_names=[INPUT], output_names=names, dynamic_shapes=(axes,), dynamo=True, verbose=False
                )
        except Exception as error:  # whatever the exporter raises
            raise not_written(self.name, program, error) from error
        made.model.metadata_props[KEY] = facts.to_json()
        made.save(path)  # torch puts the weights beside the file where they are larger than protobuf's 2 GB

    def open(self, path: Path, *, threads: int, dtype: torch.dtype = torch.float32) -> Opened:
        """A session of ONNX Runtime on the CPU; `threads` work inside an operator."""
        session = _session(str(path), threads=threads)
        return Opened(session.get_modelmeta().custom_metadata_map.get(KEY), session)

    def values(self, session: Any, images: Tensor) -> list[Tensor]:
        """One pass."""
        name = session.get_inputs()[0].name
        return [torch.from_numpy(output) for output in session.run(None, {name: images.contiguous().numpy()})]

    def layer_values(self, path: Path, image: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every value of a copy of the file in which all are outputs, by the module that torch's exporter noted."""
        if sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) > _LARGEST:
            return
        onnx = import_module("onnx")
        content = onnx.load(str(path))
        modules: dict[str, str] = {}
        for node in content.graph.node:
            scopes = next((one.value for one in node.metadata_props if one.key == _SCOPES), "[]")
            levels = ast.literal_eval(scopes)  # the last is the operator itself
            if len(levels) > 1:
                modules |= {name: levels[-2] for name in node.output if name}
        given = [output.name for output in content.graph.output]
        content.graph.output.extend(onnx.ValueInfoProto(name=name) for name in modules if name not in given)
        session = _session(content.SerializeToString(), optimised=False)
        values = session.run(list(modules), {session.get_inputs()[0].name: image.contiguous().numpy()})
        for name, value in zip(modules, values, strict=True):
            if getattr(value, "dtype", None) == "float32":
                yield modules[name], torch.from_numpy(value)


def _session(model: str | bytes, *, threads: int | None = None, optimised: bool = True) -> Any:
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimised:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
