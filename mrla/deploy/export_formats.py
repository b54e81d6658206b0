"""The forms in which a network is written: what each is called, what writes it, and which operators it lacks."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from mrla.messages.one_line import one_line

from .export_facts import DYNAMIC, KEY, Facts

Format = Literal["onnx", "torch_export", "openvino"]
INPUT, OUTPUT = "images", "logits"
"""What the first input and output are called in a file; further outputs get ``logits_1`` and so on."""
FACTS_FILE = f"{KEY}.json"
"""What the facts are called inside torch's file."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form: its suffix, the outside packages that write and run it, the extra that brings them, and the writer."""

    suffix: str
    packages: tuple[str, ...]
    extra: str
    write: Callable[[ExportedProgram, Path, Facts], None]


def check_format(format: str, path: Path) -> Form:
    """The form of a name, once it is known that it can be written to a path.

    Args:
        format: Its name.
        path: The file to be written.

    Returns:
        The form.

    Raises:
        ValueError: If there is no such form, the path has another suffix, or a package is missing.
    """
    if format not in FORMS:
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}: got {format!r}")
    form = FORMS[format]
    if path.suffix != form.suffix:
        other = next((name for name, one in FORMS.items() if one.suffix == path.suffix), None)
        remedy = f"or pass format={other!r}" if other else "or another format"
        raise ValueError(f"a file of {format} must end in {form.suffix}: got {path}; call it so, {remedy}")
    check_packages(format, form)
    return form


def check_packages(format: str, form: Form) -> None:
    """Raises a ValueError that names the extra if a package of a form is not installed."""
    if missing := [package for package in form.packages if find_spec(package) is None]:
        raise ValueError(f"{format} needs {', '.join(missing)}, not installed here: pip install 'mrla[{form.extra}]'")


def trace(model: nn.Module, shape: tuple[int, ...], dynamic: tuple[str, ...]) -> ExportedProgram:
    """What a network computes, as a graph of torch's operators.

    Args:
        model: A network of one input, in eval mode on the CPU.
        shape: Shape of an input. Its batch is set to 2: torch takes a dimension of 1 for one that is always 1.
        dynamic: The dimensions that are to be left open.

    Returns:
        The program.

    Raises:
        ValueError: If torch cannot follow it, or it fixes one of those dimensions.
    """
    image = torch.zeros(2, *shape[1:])
    sizes = {DYNAMIC[name]: Dim.DYNAMIC for name in dynamic}
    try:
        # mrla.ops leaves its compiled kernels out of what is exported by itself.
        with _quiet(), torch.no_grad():
            return torch.export.export(model, (image,), dynamic_shapes=(sizes,))
    except Exception as error:  # whatever torch or a foreign network raises
        place = _module_of_error(error, model)
        raise ValueError(
            f"torch.export must be able to follow a network: it does not follow this {type(model).__name__}{place} "
            f"({one_line(error)}); rewrite that part without branches on values, or leave it out of the network"
        ) from error


def _write_onnx(program: ExportedProgram, path: Path, facts: Facts) -> None:
    names = [OUTPUT, *(f"{OUTPUT}_{index}" for index in range(1, _outputs(program)))]
    axes = {DYNAMIC[name]: name for name in facts.dynamic}
    try:
        with _quiet():
            made: Any = torch.onnx.export(
                program, input_names=[INPUT], output_names=names, dynamic_shapes=(axes,), dynamo=True, verbose=False
            )
    except Exception as error:  # whatever the exporter raises
        raise _not_written("onnx", program, error) from error
    made.model.metadata_props[KEY] = facts.to_json()
    made.save(path)  # torch puts the weights beside the file where they are larger than protobuf's 2 GB


def _write_torch(program: ExportedProgram, path: Path, facts: Facts) -> None:
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims", "prim"):
            raise _lacking("torch_export", str(node.target), _path_of_node(node))
    # Into memory first: where a disk is full, torch's writer ends the process.
    whole = io.BytesIO()
    torch.export.save(program, whole, extra_files={FACTS_FILE: facts.to_json()})
    path.write_bytes(whole.getbuffer())


def _write_openvino(program: ExportedProgram, path: Path, facts: Facts) -> None:
    openvino = import_module("openvino")
    try:
        with _quiet():
            made = openvino.convert_model(program)
    except Exception as error:  # whatever the converter raises
        raise _not_written("openvino", program, error) from error
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


FORMS: dict[str, Form] = {
    "onnx": Form(suffix=".onnx", packages=("onnx", "onnxscript", "onnxruntime"), extra="export", write=_write_onnx),
    "torch_export": Form(suffix=".pt2", packages=(), extra="export", write=_write_torch),
    "openvino": Form(suffix=".xml", packages=("openvino",), extra="openvino", write=_write_openvino),
}


def _lacking(format: str, operator: str, module: str | None) -> ValueError:
    place = f"it comes from {module!r}" if module else "it comes from the network's own forward"
    place = place if module is not None else "which module it comes from was not found"
    return ValueError(
        f"{format} has no operator {operator}, which this network uses: {place}; compute it with other operators, or "
        f"choose another format ({', '.join(name for name in FORMS if name != format)})"
    )


def _not_written(format: str, program: ExportedProgram, error: Exception) -> ValueError:
    """What is to be raised for an exporter's error: the operator by name where it is that."""
    text = " ".join(str(one) for one in _causes(error))
    if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text):
        return _lacking(format, found[1], _module_in_frames(error))
    if found := re.search(r"No conversion rule found for operations: ([\w.:]+)", text):
        return _lacking(format, found[1], _module_of_operator(program, found[1]))
    return ValueError(
        f"{format} must be able to express a network: its exporter says {one_line(_causes(error)[-1])}; "
        f"choose another format ({', '.join(name for name in FORMS if name != format)})"
    )


def _module_of_operator(program: ExportedProgram, operator: str) -> str | None:
    """The first module that uses an operator, ``aten.add`` or ``aten.add.Tensor``; exporters change the overload."""
    wanted = operator.replace("::", ".").split(".")[:2]
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target).replace("::", ".").split(".")[:2] == wanted:
            return _path_of_node(node)
    return None


def _module_in_frames(error: BaseException) -> str | None:
    """The module of the node at which an exporter stopped.

    Its message names the node after decomposition, where an operator may have another name than in the program.
    """
    for one in reversed(_causes(error)):
        trail = one.__traceback__
        nodes = []
        while trail is not None:
            nodes += [value for value in trail.tb_frame.f_locals.values() if isinstance(value, torch.fx.Node)]
            trail = trail.tb_next
        if found := [path for node in nodes if (path := _path_of_node(node)) is not None]:
            return found[-1]
    return None


def _module_of_error(error: BaseException, model: nn.Module) -> str:
    """`` at PATH`` of the innermost module that was being called when an error was raised, or nothing."""
    paths = {id(module): path for path, module in model.named_modules() if path}
    found = None
    for one in _causes(error):
        trail = one.__traceback__
        while trail is not None:
            found = paths.get(id(trail.tb_frame.f_locals.get("self")), found)
            trail = trail.tb_next
    return f" at {found!r}" if found else ""


def _path_of_node(node: torch.fx.Node) -> str | None:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else None


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _outputs(program: ExportedProgram) -> int:
    return len(program.graph_signature.user_outputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and log lines of the exporters: what they warn of is found by the check of the file, or raised."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.onnx", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
