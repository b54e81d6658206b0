"""Networks made ready to be used: every BatchNorm folded into the layer before it, and the result checked."""

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, Linear
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.ops import FrozenBatchNorm2d

from mrla.messages.one_line import one_line
from mrla.models.dry_run import Call, DryRun, dry_run
from mrla.ops import LayerMixer

# Exact classes: one that inherits may do anything with its weight (timm's StdConv2d standardises it first).
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = {nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear, Conv2dSame, Linear}
_NORMS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d}
_NORMS |= {BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d}
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule", "DataParallel")
# Of the largest output. In float32 the 71 networks of benchmarks/attach_coverage.py that have norms and take its images
# differ by 2e-6 at most, with random norms. In the other precisions, 14 of them: 8e-15, 5e-3, and 1e-2 but for one
# (HardCoRe-NAS, 0.3, which bfloat16 alone puts 0.08 off).
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def fuse(model: nn.Module, example: Sequence[int] | None = None) -> nn.Module:
    r"""A copy of a network for deployment, with every BatchNorm folded into the layer before it where that is possible.

    .. math::
        W' = W \cdot \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
        b' = \beta + (b - \mu) \cdot \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}

    for each output channel of a convolution or linear layer with weight W and bias b, and a norm with weight
    :math:`\gamma`, bias :math:`\beta`, running mean :math:`\mu` and variance :math:`\sigma^2`; taken in float64.
    `foldable` says which pairs those are. `nn.Identity` takes the norm's place, or the activation that timm's
    `BatchNormAct2d` holds; every key that is left keeps its name. Mixers, where there are any, stay as they are.

    The copy is in eval mode and its parameters require no gradient; the network itself stays as it was. Both see the
    same random images before the copy is returned. Hooks are copied too, so they run on these images. `mrla.save`
    refuses the copy, since no name builds it: save the network, and fuse what `mrla.load` gives.

    Args:
        model: A network of one input. It is read in eval mode, whatever mode it is in.
        example: Shape of the input, the batch included, where the network does not tell of it.

    Returns:
        The copy, also where there was nothing to fold.

    Raises:
        ValueError: If the network does not run on the example or tells of no size that it runs on, cannot be copied, is
            wrapped (DDP, compiled, scripted) or on the meta device, or if the copy does not say what the network says.
        TypeError: If `model` is not a module, or `example` not a shape.

    Example:
        >>> import mrla, timm, torch
        >>> model = timm.create_model("test_resnet", num_classes=10).eval()
        >>> fused = mrla.fuse(model)
        >>> any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
        False
        >>> image = torch.randn(1, 3, 160, 160)
        >>> torch.allclose(fused(image), model(image), atol=1e-4)
        True
    """
    with torch.inference_mode(False), torch.no_grad():
        observed = _observe(model, example)
        fused = _copied(model).eval().requires_grad_(False)
        image = _random_image(fused, observed.shape)
        expected = _answer(fused, image)
        for layer, norm in observed.pairs:
            _fold(fused.get_submodule(layer), fused.get_submodule(norm))
            fused.set_submodule(norm, _without_norm(fused.get_submodule(norm)))
        _check_same(fused, image, expected, folded=len(observed.pairs))
    return fused


def foldable(model: nn.Module, example: Sequence[int] | None = None) -> list[tuple[str, str]]:
    """The pairs of a layer and the BatchNorm behind it that `fuse` makes one, found by what a dry run shows.

    The norm (torch's, timm's, or a frozen one) must get just what the layer (a convolution, transposed or not, or a
    linear one) gives, and nobody else may read that: no operator, no caller of the network, no hook. Both are called
    once, registered once, and share no parameter. A norm without running statistics, a layer that computes its weight
    (weight standardisation, parametrisations), a norm in front of its layer, and whatever is inside a mixer, stay.

    Args:
        model: A network of one input.
        example: Shape of the input, the batch included, where the network does not tell of it.

    Returns:
        Paths of layer and norm, in the order in which the norms are called.

    Raises:
        ValueError: As `fuse`, but nothing is compared.
        TypeError: As `fuse`.

    Example:
        >>> foldable(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8)))
        [('0', '1')]
    """
    return _observe(model, example).pairs


@dataclass(frozen=True)
class _Observation:
    shape: tuple[int, ...]
    pairs: list[tuple[str, str]]


def _observe(model: nn.Module, example: Sequence[int] | None) -> _Observation:
    _check_fusable(model, example)
    readings = _Readings()
    seen = dry_run(model, example, within=readings)
    return _Observation(seen.shape, _pairs(model, seen, readings))


def _check_fusable(model: Any, example: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse needs a torch.nn.Module: got {type(model).__name__}")
    if isinstance(example, Tensor):
        raise TypeError(f"example is the shape of an input: got a tensor; pass example={tuple(example.shape)}")
    if isinstance(model, torch.jit.ScriptModule) or type(model).__name__ in WRAPPERS:
        raise ValueError(f"fuse before wrapping: {type(model).__name__} hides the layers; fuse first, then wrap")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"weights on the meta device have no numbers to fold: load those of this {type(model).__name__} first"
        )


class _Readings(TorchFunctionMode):
    """Keeps every tensor that an operator reads, once for each time; being kept, no two of them have one id."""

    def __init__(self):
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # What gives no tensor asks for a shape or the like; but writing into a slice gives None.
        if tensors_in(result) or result is None:
            self.tensors.extend(tensors_in((args, kwargs)))
        return result


def _pairs(model: nn.Module, run: DryRun, readings: _Readings) -> list[tuple[str, str]]:
    calls, copied = run.calls, run.network  # whose tensors were read; the caller's hooks are the model's
    reads = Counter(map(id, readings.tensors))
    alone = _standing_alone(copied, reads)
    seen = _seen_by_others(model, calls)
    layers = {id(call.output): call for call in calls if type(model.get_submodule(call.path)) in _LAYERS}
    pairs = []
    for call in calls:
        norm, between = model.get_submodule(call.path), call.given
        made = layers.get(id(between))
        if type(norm) not in _NORMS or not _has_statistics(norm) or between is None or made is None:
            continue
        layer = copied.get_submodule(made.path)
        # A linear layer's channels come last, a norm's second; and a norm may take an image alone for a batch.
        fits = between.ndim == layer.weight.ndim and getattr(call.output, "shape", None) == between.shape
        if (
            fits
            and reads[id(between)] == 1
            and id(between) not in seen
            and alone(layer)
            and alone(copied.get_submodule(call.path))
        ):
            pairs.append((made.path, call.path))
    return pairs


def _standing_alone(model: nn.Module, reads: Counter[int]) -> Callable[[nn.Module], bool]:
    """A test of a module: it has one place, its tensors are read once and by no other, and no mixer holds it."""
    modules = list(model.modules())
    registered = Counter(id(child) for module in modules for child in module._modules.values())
    owned = Counter(id(tensor) for module in modules for tensor in _own_tensors(module))
    in_mixers = {id(part) for module in modules if isinstance(module, LayerMixer) for part in module.modules()}

    def stands_alone(module: nn.Module) -> bool:
        return (
            registered[id(module)] == 1
            # A module that is called twice reads its tensors twice.
            and all(owned[id(tensor)] == 1 and reads[id(tensor)] <= 1 for tensor in _own_tensors(module))
            and id(module) not in in_mixers
        )

    return stands_alone


def _own_tensors(module: nn.Module) -> list[Tensor]:
    owned = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in owned if tensor is not None]


def _seen_by_others(model: nn.Module, calls: list[Call]) -> set[int]:
    """Ids of the tensors that are given to the caller of the network, or to hooks."""
    seen = {id(tensor) for tensor in tensors_in(calls[0].output)}
    for call in calls:
        module = model.get_submodule(call.path)
        if module._forward_hooks or module._forward_pre_hooks:
            seen |= {id(tensor) for tensor in tensors_in((call.args, call.kwargs, call.output))}
    return seen


def _has_statistics(norm: nn.Module) -> bool:
    return norm.running_mean is not None and norm.running_var is not None


def _fold(layer: Any, norm: Any) -> None:
    """Puts what the norm does into the weight and bias of the layer, in place."""
    old = layer.weight
    mean, variance = _exact(norm.running_mean), _exact(norm.running_var)
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * _exact(norm.weight)
    bias = -mean if layer.bias is None else _exact(layer.bias) - mean
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + _exact(norm.bias)
    weight = _exact(old) * _along_weight(scale, layer)
    layer.weight = nn.Parameter(weight.to(old), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(old), requires_grad=False)


def _exact(tensor: Any) -> Tensor:
    return tensor.detach().cpu().double()  # on the CPU, since not every device has float64


def _along_weight(scale: Tensor, layer: Any) -> Tensor:
    """One number for each output channel, laid out so that it multiplies the layer's weight."""
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, ...), the groups one after another along the input channels
        scale = scale.view(layer.groups, -1).repeat_interleave(layer.in_channels // layer.groups, dim=0)
    return scale.reshape(*scale.shape, *[1] * (layer.weight.ndim - scale.ndim))


def _without_norm(norm: nn.Module) -> nn.Module:
    """What is left to do where a folded norm was: nothing, or the activation that it holds, under the same key."""
    held = [(name, norm._modules.get(name)) for name in ("drop", "act")]
    rest = OrderedDict((name, part) for name, part in held if part is not None and type(part) is not nn.Identity)
    return (nn.Sequential(rest) if rest else nn.Identity()).eval()


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a foreign attribute raises
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {str(error)[:200]}), and fuse gives a "
            f"copy back; make copy.deepcopy(model) work"
        ) from error


def _random_image(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensors = (*model.parameters(), *model.buffers())
    return image.to(next((tensor for tensor in tensors if tensor.is_floating_point()), image))


def _answer(model: nn.Module, image: Tensor) -> list[Tensor]:
    # A network that draws random numbers in eval mode draws the same ones each time, and leaves no trace.
    with torch.random.fork_rng([image.device] if image.device.type == "cuda" else []):
        try:
            answer = tensors_in(model(image.clone()))
        except Exception as error:  # whatever a foreign network raises
            reason = one_line(error, 200)
            raise ValueError(
                f"what fuse returns must run on random images: this {type(model).__name__} does not on "
                f"{tuple(image.shape)} ({type(error).__name__}: {reason}); pass example=(batch, ...), the shape of its "
                f"input, and see mrla.deploy.foldable for the norms that are folded, if it misses one"
            ) from error
    if not answer or any(value.numel() and not value.isfinite().any() for value in answer):
        raise ValueError(
            f"a copy is checked by its outputs for random images: this {type(model).__name__} gives "
            f"{'nothing finite' if answer else 'no tensor'}; fuse it in float32, or without what comes after"
        )
    return answer


def _check_same(fused: nn.Module, image: Tensor, expected: list[Tensor], folded: int) -> None:
    found = _answer(fused, image)
    same_kind = [value.shape for value in found] == [value.shape for value in expected]
    difference = max(map(largest_difference, found, expected)) if same_kind else float("inf")
    floating = (tensor.dtype for tensor in (*fused.parameters(), *found) if tensor.is_floating_point())
    tolerance = max(_TOLERANCES.get(dtype, 0.0) for dtype in (*floating, torch.float64))
    if image.device.type != "cpu":  # convolutions in float32 may run in TF32 there, which rounds as float16 does
        tolerance = max(tolerance, _TOLERANCES[torch.float16])
    if difference > tolerance:
        raise ValueError(
            f"fusing must not change what a network says: with {folded} norms folded this {type(fused).__name__} "
            f"differs by {difference:.1e} of its largest output, and {tolerance:.0e} is allowed; fuse it in a higher "
            f"precision and cast the copy, or use the network as it is (mrla.deploy.foldable lists the folded norms)"
        )


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest number expected; what is infinite or not a number must be so in both."""
    a, b = (value.detach().cpu().to(torch.complex128) for value in (found, expected))  # it holds every dtype
    other = ~((a == b) | (a.isnan() & b.isnan()))
    if not other.any():
        return 0.0
    largest = b[b.isfinite()].abs().max()
    difference = (a - b)[other].abs()
    return float("inf") if not difference.isfinite().all() else float(difference.max() / largest)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a structure of tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (tuple, list)):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
    return [tensor for part in parts for tensor in tensors_in(part)]
