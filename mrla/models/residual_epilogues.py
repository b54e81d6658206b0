"""Residual blocks that leave their last norm, add and ReLU to the mixer behind them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mrla.ops import LayerMixer, ResidualEpilogue, chosen_path, unobserved


class EpilogueNames(NamedTuple):
    """What a kind of block calls the last parts of its branch, and what must not stand between norm and add."""

    conv: str
    norm: str
    act: str
    absent: tuple[str, ...] = ()


EPILOGUES = {
    ("timm.models.resnet", "BasicBlock"): EpilogueNames("conv2", "bn2", "act2", ("se", "drop_path")),
    ("timm.models.resnet", "Bottleneck"): EpilogueNames("conv3", "bn3", "act3", ("se", "drop_path")),
    ("torchvision.models.resnet", "BasicBlock"): EpilogueNames("conv2", "bn2", "relu"),
    ("torchvision.models.resnet", "Bottleneck"): EpilogueNames("conv3", "bn3", "relu"),
}
"""The blocks whose forward ends in ``x = norm(conv(x)); x += shortcut; return act(x)``, by module and class."""


def epilogue_overrides(block: nn.Module, mixer: LayerMixer) -> dict[str, Callable[[Any], Any]]:
    """Stand-ins for a block's last norm and activation, with which its forward returns a `ResidualEpilogue`.

    None where the end of `block` may not be left to `mixer` without anybody noticing.
    """
    kind = type(block)
    names = EPILOGUES.get((kind.__module__, kind.__qualname__))
    if names is None or not mixer.fuses_epilogue or chosen_path() == "reference" or torch.compiler.is_compiling():
        return {}
    parts: Any = block._modules
    conv, norm, act = parts.get(names.conv), parts.get(names.norm), parts.get(names.act)
    if type(conv) is not nn.Conv2d or type(norm) not in (nn.BatchNorm2d, nn.Identity) or type(act) is not nn.ReLU:
        return {}
    own = getattr(kind, "plain_class", kind).forward
    if own.__qualname__ != f"{kind.__qualname__}.forward" or own.__module__ != kind.__module__:
        return {}  # another has been put in its place
    if any(getattr(block, name, None) is not None for name in names.absent):
        return {}
    if not unobserved(block, norm, act, mixer):
        return {}
    # Not closures: jaxtyping's hook compiles every definition, here at each call of a block.
    return {names.norm: partial(_hold, norm, conv), names.act: partial(_release, act)}


def _hold(norm: nn.Module, conv: nn.Module, branch: Tensor) -> "_Held":
    return _Held(ResidualEpilogue(branch, norm, branch, owned=unobserved(conv)))


def _release(act: nn.Module, x: Any) -> Any:  # one ReLU may serve the whole block
    return x.epilogue if isinstance(x, _Held) else act(x)


class _Held:
    """A branch that waits for its shortcut to be added."""

    def __init__(self, epilogue: ResidualEpilogue):
        self.epilogue = epilogue

    def __iadd__(self, shortcut: Tensor) -> "_Held":
        self.epilogue = self.epilogue._replace(shortcut=shortcut)
        return self
