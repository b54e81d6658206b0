"""Which blocks of a network follow one another, and what their outputs look like."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Blocks of one container that may hand memory to one another.

    Attributes:
        name: Path of the container in the network, such as ``layer1``.
        blocks: Names of the blocks in their container, in the order in which they run.
        channels: Channels of every block's output.
    """

    name: str
    blocks: tuple[str, ...]
    channels: int


def find_chains(model: nn.Module) -> list[Chain]:
    """The chains of residual blocks in a ResNet of timm or torchvision, in the order of the network.

    Args:
        model: A network made of `BasicBlock` or `Bottleneck` (ResNet, ResNeXt, Wide ResNet, their SE and ECA forms).

    Returns:
        One chain for each stage.

    Raises:
        ValueError: If there is none.

    Example:
        >>> import timm
        >>> [(chain.name, len(chain.blocks), chain.channels) for chain in find_chains(timm.create_model("resnet18"))]
        [('layer1', 2, 64), ('layer2', 2, 128), ('layer3', 2, 256), ('layer4', 2, 512)]
    """
    chains = []
    for name, container in model.named_modules():
        blocks = list(container.named_children())
        if isinstance(container, nn.Sequential) and blocks and all(_is_residual_block(block) for _, block in blocks):
            channels = {_out_channels(block) for _, block in blocks}
            assert len(channels) == 1, channels
            chains.append(Chain(name=name, blocks=tuple(key for key, _ in blocks), channels=channels.pop()))
    if not chains:
        children = (
            ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children()) or "no children"
        )
        raise ValueError(
            f"attach knows the ResNet family of timm and torchvision (stages of BasicBlock or Bottleneck) so far: "
            f"{type(model).__name__} has {children}; give it such a network"
        )
    return chains


def _is_residual_block(module: nn.Module) -> bool:
    # Imported here: torchvision's classification models are not needed to import mrla.
    from timm.models import resnet as timm_resnet
    from torchvision.models import resnet as torchvision_resnet

    known = (
        timm_resnet.BasicBlock,
        timm_resnet.Bottleneck,
        torchvision_resnet.BasicBlock,
        torchvision_resnet.Bottleneck,
    )
    return type(module) in known


def _out_channels(block: nn.Module) -> int:
    last = getattr(block, "conv3", None) or block.get_submodule("conv2")
    assert isinstance(last, nn.Conv2d)
    return last.out_channels
