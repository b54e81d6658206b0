"""Reading weights from the files that others publish, whichever framework wrote them, without running their code."""

import argparse
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mrla.messages.one_line import one_line

from .paddle_pickles import STATE_ENTRIES, read_pdparams, tensor_from_array
from .pickle_check import DamagedPickle, HarmfulPickle, check_torch_file


def read_state_dict(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads a network's weights from a file, or finds them in a checkpoint that is in memory.

    An entry ``state_dict``, ``model`` or ``model_state_dict`` (the first of these that holds tensors) is taken out of
    the checkpoint, and ``module.``, which data-parallel training puts before names, is removed where all have it.

    Args:
        checkpoint: A file of torch (``.pth``, ``.pt``, ``.tar``, ``.bin``, ``.ckpt``), ``.safetensors`` or Paddle's
            ``.pdparams``; or a mapping of names to tensors or numpy arrays, or one with an entry as above.

    Returns:
        Tensors by name, in the checkpoint's order, on the CPU where a file was read. Those of a mapping share its
        memory; arrays are copied, uint16 as the bits of bfloat16, a type that numpy does not have.

    Raises:
        ValueError: If the file is missing, damaged, of another kind or would run code (none is run), or something
            beside tensors is among the weights.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "net.pth.tar"
        >>> torch.save({"epoch": 3, "state_dict": {"module.fc.bias": torch.zeros(2)}}, path)
        >>> read_state_dict(path)
        {'fc.bias': tensor([0., 0.])}
    """
    if isinstance(checkpoint, Mapping):
        weights = _weights(checkpoint, "the mapping")
        check_tensors(weights, "the mapping", whole=False)
        return weights
    path = Path(checkpoint)
    _check_is_data(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"a checkpoint ends in one of {', '.join(_READERS)}: got {path}; rename or convert it")
    weights = _weights(reader(path), str(path))
    check_tensors(weights, str(path))
    return weights


def check_tensors(weights: Mapping[str, Any], source: str, *, whole: bool = True) -> None:
    """Raises where weights are no dense tensors of real numbers, or say to be larger than they are.

    Args:
        weights: What a file or mapping has under names.
        source: What the message calls it.
        whole: Whether each must have memory for all its numbers, as those of a file: there an expanded tensor of one
            number may say to be of any size.

    Raises:
        ValueError: If one of them is no such tensor.
    """
    for name, tensor in weights.items():
        if found := _unusual(tensor):
            raise ValueError(
                f"{source} must hold weights as dense tensors of real numbers: {name!r} is {found}; convert it before "
                f"it is saved"
            )
        if whole and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{source}: {name!r} says the shape {tuple(tensor.shape)} and has fewer numbers; save the state_dict() "
                f"of the network again"
            )


def check_values(weights: Mapping[str, Tensor], source: str | Path, *, allow_nan: bool = False) -> None:
    """Raises where weights are no numbers, as after a training that diverged.

    Args:
        weights: Tensors by name.
        source: What the message calls where they are from.
        allow_nan: Whether they may be NaN.

    Raises:
        ValueError: If a weight is NaN, and that is not allowed.
    """
    if allow_nan:
        return
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ValueError(
                f"{source} has weights that are NaN, the first {name}, as after a training that diverged; take an "
                f"earlier checkpoint, or in Python pass allow_nan=True"
            )


def _check_is_data(path: Path) -> None:
    """Raises where `path` is no file, or is one of the texts that failed downloads leave in a file's place."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of the file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file; give the path of a file")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the path of a file that is there") from error
    if not start:
        raise ValueError(f"{path} is empty; download or save it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is git-LFS's pointer to the weights, not the weights; run `git lfs pull` to get them")
    if start.lstrip(b"\xef\xbb\xbf\r\n\t ").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not weights; download the file that the page links to")


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, without running what the file asks for, in memory of the file's size.

    Args:
        path: The file.

    Returns:
        Its content, on the CPU.

    Raises:
        ValueError: If it cannot be read, is damaged, or asks for something that may do harm.
    """
    try:
        check_torch_file(path)
    except HarmfulPickle as error:
        raise ValueError(f"{path} {error}; do not load it, or have its state dict saved alone") from None
    except DamagedPickle as error:
        raise ValueError(
            f"{path} is damaged or not a checkpoint of torch ({error}); download it or save its state dict again"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); give the path of a file") from error
    try:
        # Released DeiT checkpoints hold a Namespace of their training arguments. torch's warnings say in many words
        # what the error then says in one line.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes are damaged instructions, which fail in every way there is
        # torch's message fills a page and advises to load the file without a check.
        text = one_line(error)
        if found := re.search(r"GLOBAL (\S+)", text):
            raise ValueError(
                f"{path} asks for {found[1]}, which is not among what weights need and may do harm; "
                f"nothing was run: do not load it, or have its state dict saved alone"
            ) from None
        text = text.rpartition("WeightsUnpickler error: ")[2].removeprefix("Cannot use ``weights_only=True`` with ")
        reason = re.split(r"\. | Check the documentation", text)[0].rstrip(". ") or type(error).__name__
        raise ValueError(
            f"{path} is damaged or not a checkpoint of torch ({reason}); download it or save its state dict again"
        ) from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file.

    Args:
        path: The file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ValueError: If it is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; download or save it again")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = one_line(error)
        raise ValueError(f"{path} is damaged or no safetensors file ({reason}); download or save it again") from error


_TORCH = (".pth", ".pt", ".tar", ".bin", ".ckpt")
_READERS: dict[str, Callable[[Path], Any]] = {
    **dict.fromkeys(_TORCH, read_torch),
    ".safetensors": read_safetensors,
    ".pdparams": read_pdparams,
}


def _weights(content: Any, source: str) -> dict[str, Tensor]:
    """Unwraps, converts, and strips `module.`; `source` is what messages call the checkpoint."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{source} must hold names and tensors: it holds a {type(content).__name__}; save the state_dict() alone"
        )
    state = next((content[name] for name in STATE_ENTRIES if _has_tensors(content.get(name))), content)
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor | np.ndarray):
            raise ValueError(
                f"{source} must hold names and tensors alone, or have them as its entry {' or '.join(STATE_ENTRIES)}: "
                f"{name!r} is a {type(value).__name__}; pass the state_dict() alone"
            )
        if isinstance(value, Tensor):
            tensors[name] = value.detach()  # parameters, too, are saved by some
        else:
            try:
                tensors[name] = tensor_from_array(value)
            except ValueError as error:
                raise ValueError(f"{source}, {name!r}: {error}") from error
    if not tensors:
        raise ValueError(f"{source} holds no tensors; pass a network's state_dict()")
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _unusual(tensor: Any) -> str | None:
    """What a value is that weights are not; None for a dense tensor of real numbers."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return f"a {type(tensor).__name__}"
    kinds = {"quantised": tensor.is_quantized, "meta": tensor.is_meta, "complex": tensor.is_complex()}
    return next((kind for kind, holds in kinds.items() if holds), "nested" if tensor.is_nested else None)


def _has_tensors(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(isinstance(value, Tensor | np.ndarray) for value in entry.values())
