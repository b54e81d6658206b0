"""The control: MRLA-light's value and norm, with no attention and no memory."""

from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..checks import check_map
from ..projections import ACTIVATIONS, Activation, depthwise_value
from .branch import BranchMixer, BranchOptions, factory_of, one_of
from .contract import Init
from .projection_kernels import reset_depthwise_kernel
from .registry import register_method


@register_method("dw")
class DepthwiseMixer(BranchMixer):
    """The control arm: MRLA-light's value and norm with no attention and no memory, x_t + BN(v_t).

    If MRLA gains nothing over this, what helped was one more depthwise 3x3 convolution a block.

    Args:
        channels: Channels c of the block's output.
        place: Accepted like every mixer's, not used.
        has_shortcut: Accepted like every mixer's, not used.
        layout: As in `MRLALight`, like the arguments that follow.
        num_prefix_tokens: Tokens in front of the patches.
        norm: ``"batch"``, ``"layer"`` or ``"pre_layer"``.
        value_act: Activation on the value.
        out_act: Activation after the norm.
        drop_path: Probability of leaving the branch out for an image, in training.
        init: As in `MRLALight`.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        ValueError: If an option is not one of those named.

    Example:
        >>> x = torch.randn(2, 16, 8, 8)
        >>> torch.equal(DepthwiseMixer(16)(x)[0], x)
        True
    """

    def __init__(self, channels: int, *, value_act: Activation | None = None, **options: Unpack[BranchOptions]):
        super().__init__(channels, **options)
        self.value_act: Activation | None = one_of("value_act", value_act, (None, *ACTIVATIONS))
        self.value_weight = nn.Parameter(torch.empty(channels, 1, 3, 3, **factory_of(options)))
        self.reset_parameters()

    def update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """v_t, and no memory."""
        check_map(x)
        return depthwise_value(x, self.value_weight, self.value_act), None

    @torch.no_grad()
    def reset_kernels(self, init: Init) -> None:
        """Draws the value's kernel."""
        reset_depthwise_kernel(self.value_weight)
