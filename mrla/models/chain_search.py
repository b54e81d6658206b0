"""Which blocks of a network follow one another, and what their outputs look like."""

from dataclasses import dataclass

from timm.models import _efficientnet_blocks as efficientnet_blocks
from timm.models import pvt_v2, vision_transformer
from timm.models import resnet as timm_resnet
from torch import nn

from mrla.ops import Layout


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Blocks of one container that may hand memory to one another.

    Attributes:
        name: Path of the container in the network, such as ``layer1``.
        blocks: Names of the blocks in their container that can have a mixer, in the order in which they run.
        channels: Channels of every block's output.
        layout: How the blocks' outputs are laid out: ``"NCHW"``, ``"NHWC"`` or ``"NLC"``.
        num_prefix_tokens: Tokens in front of the patches.
        patch_embed: Path of the module that makes the patches and knows their grid; "" where there is none.
        takes_grid: Whether the blocks are called with the grid of their tokens.
        patches_unread: Whether the network reads only the prefix tokens of the last block's output.
    """

    name: str
    blocks: tuple[str, ...]
    channels: int
    layout: Layout = "NCHW"
    num_prefix_tokens: int = 0
    patch_embed: str = ""
    takes_grid: bool = False
    patches_unread: bool = False


def find_chains(model: nn.Module) -> list[Chain]:
    """The chains of residual blocks in a network of a known family, in the order of the network.

    Args:
        model: A ResNet of timm or torchvision (ResNeXt, Wide ResNet, SE and ECA forms included), or timm's
            `VisionTransformer` (DeiT), `EfficientNet` (its blocks with a residual) or `PyramidVisionTransformerV2`.

    Returns:
        One chain for each stage.

    Raises:
        ValueError: If there is none.

    Example:
        >>> import timm
        >>> [(chain.name, len(chain.blocks), chain.channels) for chain in find_chains(timm.create_model("resnet18"))]
        [('layer1', 2, 64), ('layer2', 2, 128), ('layer3', 2, 256), ('layer4', 2, 512)]
    """
    found = [_read(name, module) for name, module in model.named_modules()]
    chains = [chain for chain in found if chain is not None]
    if not chains:
        children = (
            ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children()) or "no children"
        )
        raise ValueError(
            f"attach knows the ResNet family of timm and torchvision, and timm's VisionTransformer, EfficientNet and "
            f"PyramidVisionTransformerV2 so far: {type(model).__name__} has {children}; give it such a network"
        )
    return chains


def _read(name: str, module: nn.Module) -> Chain | None:
    """The chain that `module` holds if it is a stage of a known family."""
    if isinstance(module, vision_transformer.VisionTransformer):
        return _read_vision_transformer(name, module)
    if isinstance(module, pvt_v2.PyramidVisionTransformerStage):
        blocks = module.blocks
        return Chain(
            name=_join(name, "blocks"),
            blocks=tuple(key for key, _ in blocks.named_children()),
            channels=blocks[0].mlp.fc2.out_features,  # type: ignore[union-attr]
            layout="NLC",
            takes_grid=True,
        )
    blocks = list(module.named_children())
    if not isinstance(module, nn.Sequential) or not blocks:
        return None
    if all(type(block) in _residual_blocks() for _, block in blocks):
        return Chain(name=name, blocks=tuple(key for key, _ in blocks), channels=_out_channels(blocks[0][1]))
    if all(isinstance(block, _EFFICIENTNET_BLOCKS) for _, block in blocks):
        residual = [(key, block) for key, block in blocks if block.has_skip]
        if residual:
            channels = residual[0][1].feature_info("bottleneck")["num_chs"]  # type: ignore[operator]
            return Chain(name=name, blocks=tuple(key for key, _ in residual), channels=channels)
    return None


_EFFICIENTNET_BLOCKS = (
    efficientnet_blocks.ConvBnAct,
    efficientnet_blocks.DepthwiseSeparableConv,
    efficientnet_blocks.EdgeResidual,
    efficientnet_blocks.InvertedResidual,
)


def _read_vision_transformer(name: str, model: vision_transformer.VisionTransformer) -> Chain | None:
    blocks = list(model.blocks.named_children())
    if not all(type(block) is vision_transformer.Block for _, block in blocks):
        return None
    return Chain(
        name=_join(name, "blocks"),
        blocks=tuple(key for key, _ in blocks),
        channels=model.embed_dim,
        layout="NLC",
        num_prefix_tokens=model.num_prefix_tokens,
        patch_embed=_join(name, "patch_embed"),
        patches_unread=model.global_pool == "token",
    )


def _residual_blocks() -> tuple[type[nn.Module], ...]:
    # Imported here: torchvision's classification models are not needed to import mrla.
    from torchvision.models import resnet as torchvision_resnet

    return (
        timm_resnet.BasicBlock,
        timm_resnet.Bottleneck,
        torchvision_resnet.BasicBlock,
        torchvision_resnet.Bottleneck,
    )


def _out_channels(block: nn.Module) -> int:
    last = getattr(block, "conv3", None) or block.get_submodule("conv2")
    assert isinstance(last, nn.Conv2d)
    return last.out_channels


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
