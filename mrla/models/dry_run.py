"""What a network does with an image, found without computing it."""

import copy
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mrla.messages.one_line import one_line
from mrla.ops.torch_internals import FakeTensorMode

from .grids import GridFromPatches
from .mixed_blocks import MixedBlock, mixed, unmix_block
from .modes import random_states_kept
from .wiring import wiring_of


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


class DryRun(NamedTuple):
    """What a network did.

    Attributes:
        shape: Shape of the input that it ran with.
        calls: Every call of every module, in the order in which they began.
        network: The copy that ran.
    """

    shape: tuple[int, ...]
    calls: list[Call]
    network: nn.Module


def dry_run(model: nn.Module, shape: Sequence[int] | None = None, *, plain: bool = False, within: Any = None) -> DryRun:
    """Every call of every module when the network sees a batch of images, in the order in which they begin.

    It runs on a copy under torch's fake tensors: nothing is computed, no hook of the caller's runs, and what the
    network writes to itself while it runs is written to the copy. Weights are fake there, buffers are copied, since
    some networks ask for their values. Random states and autocast's cache stay as they are.

    Args:
        model: Any network of one input.
        shape: Shape of the input, the batch included; None to try the sizes that the network tells of.
        plain: Whether the copy runs without the mixers that the network has.
        within: A context for the copy's forward pass alone, such as a mode that sees its operators.

    Returns:
        The calls, the shape and the copy.

    Raises:
        ValueError: If it runs with none of the shapes.

    Example:
        >>> calls = dry_run(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())).calls
        >>> [(call.path, tuple(call.returned.shape)) for call in calls][1]
        ('0', (2, 8, 222, 222))
    """
    shapes = [tuple(shape)] if shape is not None else [(2, *size) for size in input_sizes(model)]
    failures: list[Exception] = []
    with _quiet(), random_states_kept(), _without_global_hooks():
        for candidate in shapes:
            try:
                return _run(model, candidate, plain, within or nullcontext())
            except CannotBeCopied:
                raise
            except Exception as error:  # whatever a foreign network raises at a size that is not its own
                failures.append(error)
    reason = one_line(failures[0], 400)
    raise ValueError(
        f"{type(model).__name__} does not run on {shapes[0]} ({type(failures[0]).__name__}: {reason}); pass "
        f"example=(batch, ...), the shape of its input"
    ) from failures[0]


def first_tensor(value: Any) -> Tensor | None:
    """The value itself, or the first entry of a tuple or list, if it is a tensor."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


class CannotBeCopied(ValueError):
    """A network of which `copy.deepcopy` fails."""


def _twin(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A copy without the caller's hooks, of fake weights and own buffers.

    What cannot be copied, such as a lock or a tensor of a graph, is shared.
    """
    replaced: dict[int, Any] = {}
    for module in model.modules():
        replaced |= {id(hooks): OrderedDict() for hooks in (module._forward_pre_hooks, module._forward_hooks)}
    device = _device_of(model)
    for parameter in model.parameters():
        # Not by deepcopy, which keeps what a quantised or sharded parameter keeps on itself.
        replaced[id(parameter)] = _fake(parameter, fake, device)
    for buffer in model.buffers():
        replaced[id(buffer)] = _fake(buffer, fake, device) if buffer.is_meta else buffer.detach().to(device, copy=True)
    replaced |= _whole_twins(model, replaced)
    try:
        return copy.deepcopy(model, dict(replaced))
    except Exception:  # whatever a foreign attribute raises
        for module in model.modules():
            for value in [value for name, value in vars(module).items() if name != "_modules"]:
                if not _can_be_copied(value, replaced):
                    replaced[id(value)] = value
    try:
        return copy.deepcopy(model, replaced)
    except Exception as error:
        raise CannotBeCopied(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {str(error)[:200]}), and its chains are "
            f"found on a copy; make copy.deepcopy(model) work"
        ) from error


def _device_of(model: nn.Module) -> torch.device:
    """One device for the whole copy: a network may be spread over several, or have weights on the meta device alone."""
    devices = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
    return next((device for device in devices if device.type != "meta"), devices[0] if devices else torch.device("cpu"))


def _fake(tensor: Tensor, fake: FakeTensorMode, device: torch.device) -> Tensor:
    """The same without numbers, a parameter where it was one; a sharded or quantised one whole and in plain form."""
    if type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.device == device:
        return fake.from_tensor(tensor, static_shapes=True)
    with fake:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(whole, requires_grad=False) if isinstance(tensor, nn.Parameter) else whole


def _whole_twins(model: nn.Module, replaced: dict[int, Any]) -> dict[int, nn.Module]:
    """Copies of modules that FSDP2 has sharded, which refuse `copy.deepcopy`, of the classes that they had before."""
    sharded = [module for module in model.modules() if _class_before_sharding(module) is not type(module)]
    twins: dict[int, nn.Module] = {id(module): object.__new__(_class_before_sharding(module)) for module in sharded}
    memo = {**replaced, **twins}
    for module in sharded:
        for name, value in vars(module).items():
            copied = copy.deepcopy(value, memo) if _can_be_copied(value, memo) else value
            twins[id(module)].__dict__[name] = copied
    return twins


def _class_before_sharding(module: nn.Module) -> type[nn.Module]:
    kind = type(module)
    if isinstance(module, MixedBlock) and kind is mixed(module.plain_class):  # attached after sharding
        before = _without_sharding(module.plain_class)
        return kind if before is module.plain_class else mixed(before)
    return _without_sharding(kind)


def _without_sharding(kind: type[nn.Module]) -> type[nn.Module]:
    """`fully_shard` makes a class of its own FSDPModule and the module's class, in this order."""
    return kind.__bases__[1] if len(kind.__bases__) == 2 and kind.__bases__[0].__name__ == "FSDPModule" else kind


def _can_be_copied(value: Any, shared: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(shared))
    except Exception:
        return False
    return True


def _run(model: nn.Module, shape: tuple[int, ...], plain: bool, within: Any) -> DryRun:
    calls: list[Call] = []
    open_calls: list[Call] = []
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _twin(model, fake)
    if plain:
        for block in [module for module in twin.modules() if isinstance(module, MixedBlock)]:
            unmix_block(block)
    for source in _grid_sources(twin):
        source.watch()  # its hook was left behind with the caller's

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
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    device = _device_of(model)
    lowered = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    with fake, torch.no_grad(), torch.autocast(device.type, enabled=False) if lowered else nullcontext():
        image = torch.empty(shape, dtype=dtype, device=device)
        with within:
            twin.eval()(image)
    return DryRun(shape, calls, twin)


def _grid_sources(model: nn.Module) -> list[GridFromPatches]:
    sources = [wiring.grid_source for module in model.modules() if (wiring := wiring_of(module)) is not None]
    return list({id(source): source for source in sources if isinstance(source, GridFromPatches)}.values())


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """No hook that the caller has set on all modules at once; torch has no public way to leave them out."""
    everywhere: Any = torch.nn.modules.module
    names = ("_global_forward_pre_hooks", "_global_forward_hooks")
    before = {name: getattr(everywhere, name) for name in names}
    try:
        for name in names:
            setattr(everywhere, name, OrderedDict())
        yield
    finally:
        for name, hooks in before.items():
            setattr(everywhere, name, hooks)


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
