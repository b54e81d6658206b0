"""What later blocks of a chain need, carried on a block's output tensor."""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mrla.ops import Grid

_ATTRIBUTE = "mrla_carried"


class Carried(NamedTuple):
    """What rides on the output tensor of a block.

    Attributes:
        chain: The chain that `memory` belongs to.
        memory: What the mixer left for the next one of its chain; None where it leaves nothing.
        grid: Rows and columns of the patch tokens, where they can differ from image to image.
        with_grad: Whether gradients were recorded when the tensor was made.
    """

    chain: str
    memory: Any
    grid: Grid | None
    with_grad: bool

    def __reduce__(self) -> Any:
        # A saved or sent tensor is its numbers alone; weights_only=True reads this class.
        return OrderedDict, ()


class _Geometry(NamedTuple):
    """How a tensor lies in its storage."""

    shape: tuple[int | torch.SymInt, ...]
    stride: tuple[int | torch.SymInt, ...]
    offset: int | torch.SymInt


class _OnStorage(NamedTuple):
    geometry: _Geometry
    is_leaf: bool
    requires_grad: bool
    carried: Carried


def store(tensor: Tensor, carried: Carried) -> Tensor:
    """Puts what is carried on a tensor.

    It also goes on the tensor's storage, since full backward hooks, FSDP2 and nested checkpoints hand a block an alias
    of its input instead of the input itself.

    Args:
        tensor: A block's output.
        carried: What rides on it.

    Returns:
        The tensor to hand on; in a compiled graph a view of the one given.
    """
    if torch.compiler.is_dynamo_compiling():
        tensor = tensor.view_as(tensor)  # dynamo sets no attribute on an element of a custom operator's outputs
    setattr(tensor, _ATTRIBUTE, carried)
    if torch.compiler.is_compiling():
        return tensor
    if (storage := _storage(tensor)) is not None:
        known = _OnStorage(_geometry(tensor), tensor.is_leaf, tensor.requires_grad, carried)
        setattr(storage, _ATTRIBUTE, known)
    return tensor


def carried_by(tensor: Any) -> Carried | None:
    """What rides on a tensor, or on the one that it is an alias of.

    Args:
        tensor: A block's input.

    Returns:
        What is carried; None of a new tensor, a detached one, or one that only shares a part of the memory.
    """
    found, known = _found(tensor)
    if known is not None and (known.requires_grad != tensor.requires_grad or known.is_leaf != tensor.is_leaf):
        return None
    return found


def grid_carried_by(tensor: Any) -> Grid | None:
    """The grid that rides on a tensor or an alias of it, a detached one too: its numbers are the same tokens."""
    found, _ = _found(tensor)
    return None if found is None else found.grid


def _found(tensor: Any) -> tuple[Carried | None, _OnStorage | None]:
    """What rides on a tensor; where it was found on the storage alone, how the tensor it was put on was made too."""
    carried = getattr(tensor, _ATTRIBUTE, None)
    if isinstance(carried, Carried):
        return carried, None
    known = None if torch.compiler.is_compiling() else _on_storage(tensor)
    return (None, None) if known is None else (known.carried, known)


def _on_storage(tensor: Any) -> _OnStorage | None:
    if not isinstance(tensor, Tensor) or (storage := _storage(tensor)) is None:
        return None
    known = getattr(storage, _ATTRIBUTE, None)
    return known if isinstance(known, _OnStorage) and known.geometry == _geometry(tensor) else None


def _geometry(tensor: Tensor) -> _Geometry:
    return _Geometry(tuple(tensor.shape), tensor.stride(), tensor.storage_offset())


def _storage(tensor: Tensor) -> Any:
    """The storage of an ordinary tensor; None of those that have none to speak of, as inside `torch.func.vmap`."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return None
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None
