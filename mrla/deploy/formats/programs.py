"""A network as a graph of torch's operators, and what exporters' failures on it mean."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from mrla.messages.one_line import one_line

from ..export_facts import DYNAMIC
from .contract import FORMATS


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
        with quiet(), torch.no_grad():
            return torch.export.export(model, (image,), dynamic_shapes=(sizes,))
    except Exception as error:  # whatever torch or a foreign network raises
        place = _module_of_error(error, model)
        raise ValueError(
            f"torch.export must be able to follow a network: it does not follow this {type(model).__name__}{place} "
            f"({one_line(error)}); rewrite that part without branches on values, or leave it out of the network"
        ) from error


def lacking(format: str, operator: str, module: str | None) -> ValueError:
    """What is to be raised for an operator that a format lacks.

    Args:
        format: The format's name.
        operator: The operator's name.
        module: Path of the module that uses it, "" for the network itself; None where that was not found.

    Returns:
        The error.
    """
    place = f"it comes from {module!r}" if module else "it comes from the network's own forward"
    place = place if module is not None else "which module it comes from was not found"
    return ValueError(
        f"{format} has no operator {operator}, which this network uses: {place}; compute it with other operators, or "
        f"choose another format ({', '.join(name for name in FORMATS if name != format)})"
    )


def not_written(format: str, program: ExportedProgram, error: Exception) -> ValueError:
    """What is to be raised for an exporter's error: the operator by name where it is that.

    Args:
        format: The format's name.
        program: What was to be exported.
        error: What the exporter raised.

    Returns:
        The error.
    """
    text = " ".join(str(one) for one in _causes(error))
    if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text):
        return lacking(format, found[1], _module_in_frames(error))
    if found := re.search(r"No conversion rule found for operations: ([\w.:]+)", text):
        return lacking(format, found[1], _module_of_operator(program, found[1]))
    return ValueError(
        f"{format} must be able to express a network: its exporter says {one_line(_causes(error)[-1])}; "
        f"choose another format ({', '.join(name for name in FORMATS if name != format)})"
    )


def _module_of_operator(program: ExportedProgram, operator: str) -> str | None:
    """The first module that uses an operator, ``aten.add`` or ``aten.add.Tensor``; exporters change the overload."""
    wanted = operator.replace("::", ".").split(".")[:2]
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target).replace("::", ".").split(".")[:2] == wanted:
            return module_of_node(node)
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
        if found := [path for node in nodes if (path := module_of_node(node)) is not None]:
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


def module_of_node(node: torch.fx.Node) -> str | None:
    """Path of the module in whose forward a node of a program stands; None where torch has not noted it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else None


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


@contextmanager
def quiet() -> Iterator[None]:
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
