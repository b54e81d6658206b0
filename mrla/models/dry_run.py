"""What a network does with an image, found without computing it."""

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass
class Call:
    """One call of a module: what went in and what came out, as tensors with shapes and no numbers."""

    path: str
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    output: Any = field(default=None, repr=False)

    @property
    def given(self) -> Tensor | None:
        """The tensor that went in first."""
        return first_tensor(self.args)

    @property
    def returned(self) -> Tensor | None:
        """The tensor that came out, or the first of several."""
        return first_tensor(self.output)


def dry_run(model: nn.Module, shape: Sequence[int] | None = None) -> list[Call]:
    """Every call of every module when the network sees a batch of images, in the order in which they begin.

    It runs on a copy that shares the weights, under torch's fake tensors: nothing is computed, no hook of the caller's
    runs, and what the network keeps on itself while it runs is kept on the copy.

    Args:
        model: Any network of one input.
        shape: Shape of the input, the batch included; None to try the sizes that the network tells of.

    Returns:
        The calls.

    Raises:
        ValueError: If it runs with none of the shapes.

    Example:
        >>> calls = dry_run(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        >>> [(call.path, tuple(call.returned.shape)) for call in calls][1]
        ('0', (2, 8, 222, 222))
    """
    shapes = [tuple(shape)] if shape is not None else [(2, *size) for size in input_sizes(model)]
    failures: list[Exception] = []
    with _quiet():
        for candidate in shapes:
            twin = _twin(model)
            try:
                return _traced(twin, candidate)
            except Exception as error:  # whatever a foreign network raises at a size that is not its own
                failures.append(error)
    reason = " ".join(str(failures[0]).split())[:200]
    raise ValueError(
        f"{type(model).__name__} does not run on {shapes[0]} ({type(failures[0]).__name__}: {reason}); pass "
        f"example=(batch, ...), the shape of its input"
    ) from failures[0]


def first_tensor(value: Any) -> Tensor | None:
    """The value itself, or the first entry of a tuple or list, if it is a tensor."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def _twin(model: nn.Module) -> nn.Module:
    """A copy without hooks that shares the weights, and whatever else cannot be copied: a lock, a tensor of a graph."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        shared |= {id(hooks): OrderedDict() for hooks in (module._forward_pre_hooks, module._forward_hooks)}
    try:
        return copy.deepcopy(model, dict(shared))
    except Exception:  # whatever a foreign attribute raises
        for module in model.modules():
            for value in [value for name, value in vars(module).items() if name != "_modules"]:
                if not _can_be_copied(value, shared):
                    shared[id(value)] = value
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {str(error)[:200]}), and its chains are "
            f"found on a copy; make copy.deepcopy(model) work"
        ) from error


def _can_be_copied(value: Any, shared: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(shared))
    except Exception:
        return False
    return True


def _traced(twin: nn.Module, shape: tuple[int, ...]) -> list[Call]:
    calls: list[Call] = []
    open_calls: list[Call] = []

    # Not defined for each module: jaxtyping's hook compiles every definition, which was half of the tests' time.
    def begins(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(path, args, kwargs))
        open_calls.append(calls[-1])

    def ends(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        open_calls.pop().output = output

    for path, module in twin.named_modules():
        module.register_forward_pre_hook(partial(begins, path), with_kwargs=True)
        module.register_forward_hook(ends, with_kwargs=True)
    tensors = (*twin.parameters(), *twin.buffers())
    reference = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        twin.eval()(torch.empty(shape, dtype=reference.dtype, device=reference.device))
    return calls


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of torch about the shapes that do not fit; the error says what is needed."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def input_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Input shapes (c, h, w) worth trying on a network, the likeliest first."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    in_chans = getattr(model, "in_chans", None) or (first.in_channels if first is not None else 3)
    told = (getattr(module, name, None) for module in model.modules() for name in ("img_size", "image_size"))
    fixed = next((size for size in told if size), None)
    config = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    sides = [fixed, config and tuple(config[1:]), 224, 256, 384, 32]
    pairs = [(side, side) if isinstance(side, int) else tuple(side) for side in sides if side]
    return [(in_chans, *pair) for pair in dict.fromkeys(pairs)]
