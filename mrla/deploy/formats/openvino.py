"""OpenVINO's files, which OpenVINO runs."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..export_facts import KEY, Facts
from .contract import INPUT, OUTPUT, ExportFormat, Opened, register_format
from .programs import not_written, quiet


@register_format
class OpenVinoFormat(ExportFormat):
    """OpenVINO's form, not compressed to float16; the facts are rt_info, the weights lie beside in ``.bin``.

    There is no `prepare`: the engine form of light is slower here than the network as it is (benchmarks/notes.md).
    """

    name = "openvino"
    suffix = ".xml"
    packages = ("openvino",)
    extra = "openvino"

    def files(self, path: Path) -> tuple[Path, ...]:
        """The file, and its weights."""
        return (path, path.with_suffix(".bin"))

    def write(self, program: ExportedProgram, path: Path, facts: Facts) -> None:
        """Converts and writes the program."""
        openvino = import_module("openvino")
        try:
            with quiet():
                made = openvino.convert_model(program)
        except Exception as error:  # whatever the converter raises
            raise not_written(self.name, program, error) from error
        made.inputs[0].get_tensor().set_names({INPUT})
        for index, output in enumerate(made.outputs):
            output.get_tensor().set_names({f"{OUTPUT}_{index}" if index else OUTPUT})
        made.set_rt_info(facts.to_json(), [KEY])
        try:
            openvino.save_model(made, str(path), compress_to_fp16=False)
        except RuntimeError:
            # It does not say why, and has taken its files away: if that is since the disk is full, this raises.
            weights = sum(tensor.nbytes for tensor in program.state_dict.values())
            path.with_suffix(".bin").write_bytes(bytes(weights + (1 << 20)))
            raise

    def open(self, path: Path, *, threads: int, dtype: torch.dtype = torch.float32) -> Opened:
        """A request on the CPU, also of an ONNX file. A CPU that has bfloat16 would take that unless it is told."""
        core = import_module("openvino").Core()
        model = core.read_model(str(path))
        facts = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None
        precision = "f16" if dtype == torch.float16 else "f32"
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
        return Opened(facts, core.compile_model(model, "CPU", settings).create_infer_request())

    def values(self, session: Any, images: Tensor) -> list[Tensor]:
        """One pass."""
        # The engine writes the next answer where this one is.
        outputs = session.infer([images.contiguous().numpy()], share_inputs=True)
        return [torch.from_numpy(output.copy()) for output in outputs.to_tuple()]
