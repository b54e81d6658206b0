"""Exported files run by their engines: ONNX Runtime, torch, OpenVINO."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mrla.messages.one_line import one_line
from mrla.models import is_saved

from .export_facts import KEY, Facts, facts_from_json
from .export_formats import FACTS_FILE, FORMS, check_packages
from .fusing import tensors_in

Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """A file that `mrla.deploy.export` wrote, ready to be called with a batch.

    Attributes:
        path: The file.
        format: Its format.
        facts: What it says of itself.
        run: One pass, which gives every output in a list.
    """

    path: Path
    format: str
    facts: Facts
    run: Run

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The network's output on a batch of float32 on the CPU, or a tuple where it has several."""
        outputs = self.run(images)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def is_exported(path: str | Path) -> bool:
    """Whether a file's name says that `mrla.deploy.export` wrote it: ``.onnx``, ``.pt2`` or ``.xml``."""
    return Path(path).suffix in {form.suffix for form in FORMS.values()} and not is_saved(path)


def open_exported(path: str | Path, *, threads: int | None = None) -> Exported:
    """Reads an exported file, to run it on the CPU.

    Args:
        path: A file that `mrla.deploy.export` wrote. Torch may unpickle what is in a ``.pt2``: open your own files
            only.
        threads: Threads that the engine takes; None for as many as torch takes.

    Returns:
        The file, to be called.

    Raises:
        ValueError: If it is missing or damaged, tells nothing of itself, or a package that runs it is not installed.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from mrla.deploy import export
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> path = f"{tempfile.mkdtemp()}/net.pt2"
        >>> made = export(model, path, format="torch_export", class_names=["cat", "dog"])
        >>> exported = open_exported(path)
        >>> exported.facts.class_names, tuple(exported(torch.randn(3, 3, 96, 64)).shape)
        (('cat', 'dog'), (3, 2))
    """
    path = Path(path)
    format = next((name for name, form in FORMS.items() if form.suffix == path.suffix), None)
    if format is None:
        suffixes = ", ".join(form.suffix for form in FORMS.values())
        raise ValueError(f"an exported file must end in one of {suffixes}: got {path}")
    if not path.is_file():
        raise ValueError(f"an exported file must exist: {path} {'is a folder' if path.is_dir() else 'does not'}")
    check_packages(format, FORMS[format])
    try:
        text, run = _OPENERS[format](path, threads or torch.get_num_threads())
    except Exception as error:  # each engine has errors of its own
        reason = one_line(error, 200)
        raise ValueError(
            f"{path} is damaged or not a file of {format} ({type(error).__name__}: {reason}); export it again"
        ) from error
    if text is None:
        raise ValueError(f"{path} tells nothing of its input and classes; write it with mrla.deploy.export")
    return Exported(path, format, facts_from_json(text, str(path)), run)


def run_in_onnxruntime(path: Path, threads: int) -> tuple[str | None, Run]:
    """A file in ONNX Runtime on the CPU.

    Args:
        path: The file.
        threads: Threads inside an operator.

    Returns:
        The facts as they stand in it, and one pass.
    """
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {name: images.contiguous().numpy()})]

    return session.get_modelmeta().custom_metadata_map.get(KEY), run


def run_in_openvino(path: Path, threads: int, precision: str = "f32") -> tuple[str | None, Run]:
    """A file, of OpenVINO's or ONNX, in OpenVINO on the CPU.

    Args:
        path: The file.
        threads: Threads.
        precision: What is computed in. Without it a CPU that has bfloat16 would take that.

    Returns:
        The facts as they stand in it, and one pass.
    """
    core = import_module("openvino").Core()
    model = core.read_model(str(path))
    text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(images: Tensor) -> list[Tensor]:
        # The engine writes the next answer where this one is.
        outputs = request.infer([images.contiguous().numpy()], share_inputs=True)
        return [torch.from_numpy(output.copy()) for output in outputs.to_tuple()]

    return text, run


def _run_in_torch(path: Path, threads: int) -> tuple[str | None, Run]:
    """A file of torch's; its threads are those that torch has."""
    held: dict[str, Any] = {FACTS_FILE: ""}
    network = torch.export.load(path, extra_files=held).module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            return tensors_in(network(images))

    return held[FACTS_FILE] or None, run


_OPENERS: dict[str, Callable[[Path, int], tuple[str | None, Run]]] = {
    "onnx": run_in_onnxruntime,
    "torch_export": _run_in_torch,
    "openvino": run_in_openvino,
}
