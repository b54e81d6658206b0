"""What the fused methods share: how maps reach the kernels, and the gradients around them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...calls import ResidualNorm

PARTS = 16
"""How many parts the channels are cut into where only numbers are worked on: a fixed number, for the same sums."""


def kind_of(x: Tensor) -> Any:
    """The type that kernels know a map's elements by; bfloat16 goes by its bits."""
    return np.uint16 if x.dtype == torch.bfloat16 else np.float32


def packed(weights: Any) -> Any:
    """Weights whose numbers lie one after the other, as kernels read them."""
    return type(weights)(*(None if one is None else one.contiguous() for one in weights))


def as_read(map: Tensor) -> Tensor:
    """A map whose numbers lie one after the other with their signs applied, as kernels read it."""
    return (map.resolve_neg() if map.is_neg() else map).contiguous()


def chunks_of(batch: int, heads: int) -> int:
    """How many parts the heads of an image are cut into, so that there is work for every thread."""
    wanted = 4 * torch.get_num_threads()
    return 1 if batch >= wanted else min(heads, -(-wanted // batch))


def addresses(tensors: Sequence[Tensor | None]) -> Tensor:
    """Where tensors are, as a kernel reads them; 0 for None. The tensors must outlive the kernel's run."""
    return torch.tensor([0 if one is None else one.data_ptr() for one in tensors], dtype=torch.int64, device="cpu")


def norm_gradients(
    tail: ResidualNorm | None, branch: Tensor, of_branch: Tensor, sums: Tensor, header: Sequence[int], items: int
) -> tuple[Tensor, Tensor] | None:
    """Gradients of weight and bias of a tail's norm; with batch statistics, corrects that of its branch in place.

    `sums` holds for each plane the sums of the gradient behind the norm, and of its product with branch - mean.
    """
    from . import launch, norms

    if tail is None or tail.mean is None or tail.spread is None:
        return None
    rstd = tail.spread if tail.training else (tail.spread + tail.eps).rsqrt()
    of_bias, centred = sums.double().sum(0).unbind(-1)
    of_weight, count = centred * rstd, branch.numel() // branch.shape[1]
    if tail.training:
        launch.run(
            norms.branch_gradients(kind_of(branch)), items, branch.numel(), *header,
            branch, of_branch, rstd if tail.weight is None else tail.weight * rstd, (of_bias / count).float(),
            (of_weight * rstd / count).float(), tail.mean,
        )  # fmt: skip
    return of_weight.float(), of_bias.float()
