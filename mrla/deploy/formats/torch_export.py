"""Files of `torch.export`, which torch runs."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from mrla.ops.torch_internals import OpOverload

from ..export_facts import KEY, Facts
from ..fusing import tensors_in
from .contract import ExportFormat, Opened, register_format
from .programs import lacking, module_of_node

FACTS_FILE = f"{KEY}.json"
"""What the facts are called inside the file."""


@register_format
class TorchExportFormat(ExportFormat):
    """`torch.export.save` with torch's own operators alone; the facts are an extra file."""

    name = "torch_export"
    suffix = ".pt2"

    def write(self, program: ExportedProgram, path: Path, facts: Facts) -> None:
        """Writes the program, once it is known that torch alone can run it."""
        for node in program.graph.nodes:
            operator = node.target
            if isinstance(operator, OpOverload) and operator.namespace not in ("aten", "prims", "prim"):
                raise lacking(self.name, str(operator), module_of_node(node))
        # Into memory first: where a disk is full, torch's writer ends the process.
        whole = io.BytesIO()
        torch.export.save(program, whole, extra_files={FACTS_FILE: facts.to_json()})
        path.write_bytes(whole.getbuffer())

    def open(self, path: Path, *, threads: int, dtype: torch.dtype = torch.float32) -> Opened:
        """A module of torch; its threads are those that torch has."""
        held: dict[str, Any] = {FACTS_FILE: ""}
        network = torch.export.load(path, extra_files=held).module()
        return Opened(held[FACTS_FILE] or None, network)

    def values(self, session: Any, images: Tensor) -> list[Tensor]:
        """One pass."""
        with torch.inference_mode():
            return tensors_in(session(images))

    def layer_values(self, path: Path, image: Tensor) -> Iterable[tuple[str, Tensor]]:
        """Every value of the graph, by the module that torch noted."""
        module: Any = torch.export.load(path).module()
        recorder = _Recorder(module)
        with torch.inference_mode():
            recorder.run(image)
        return recorder.values


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule):
        super().__init__(module)
        self.values: list[tuple[str, Tensor]] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        module = module_of_node(n)
        if module is not None and isinstance(result, Tensor) and result.is_floating_point():
            self.values.append((module, result.clone()))
        return result
