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


CallFields = dict[str, Tensor | float | int | None]
"""Some fields of a kernel's call, by name."""


def image_fields(x: Tensor, heads: int, chunks: int, kernel_size: int) -> CallFields:
    """The fields `records.IMAGES` of a call."""
    _, c, h, w = x.shape
    return {"channels": c, "height": h, "width": w, "heads": heads, "chunks": chunks, "kernel_size": kernel_size}


def plane_number_fields(x: Tensor, heads: int, kernel_size: int) -> CallFields:
    """The fields `records.PLANE_NUMBERS` of a call."""
    b, c, h, w = x.shape
    return {"images": b, "channels": c, "pixels": h * w, "heads": heads, "kernel_size": kernel_size, "parts": PARTS}


def update_norm_fields(
    weight: Tensor, bias: Tensor, statistics: tuple[Tensor, Tensor] | None, eps: float
) -> CallFields:
    """The fields `records.UPDATE_NORM` of a call; without statistics where it goes before them."""
    mean, variance = statistics or (None, None)
    return {"norm_weight": weight, "norm_bias": bias, "norm_mean": mean, "norm_variance": variance, "norm_eps": eps}


def epilogue_fields(norm: ResidualNorm | None) -> CallFields:
    """The fields `records.EPILOGUE` of a call: what is left of a residual epilogue with this norm; None for nothing."""
    from .records import ADD_ALONE, BATCH_NORM, NO_EPILOGUE, RUNNING_NORM

    if norm is None:
        epilogue, norm = NO_EPILOGUE, ResidualNorm()
    else:
        epilogue = ADD_ALONE if norm.mean is None else BATCH_NORM if norm.training else RUNNING_NORM
    return {
        "epilogue": epilogue,
        "branch_weight": norm.weight,
        "branch_bias": norm.bias,
        "branch_mean": norm.mean,
        "branch_spread": norm.spread,
        "branch_eps": norm.eps,
    }


def norm_gradients(
    norm: ResidualNorm | None, branch: Tensor, grad_branch: Tensor, sums: Tensor, images: CallFields, items: int
) -> tuple[Tensor, Tensor] | None:
    """Gradients of weight and bias of the norm behind a branch.

    With batch statistics, corrects the gradient of the branch in place.

    Args:
        norm: The norm; None where there is no residual epilogue.
        branch: The branch.
        grad_branch: The gradient behind the norm.
        sums: For each plane the sums of that gradient, and of its product with branch - mean.
        images: `image_fields`.
        items: Pieces of work.
    """
    from . import launch, norms

    if norm is None or norm.mean is None or norm.spread is None:
        return None
    rstd = norm.spread if norm.training else (norm.spread + norm.eps).rsqrt()
    grad_bias, centred = sums.double().sum(0).unbind(-1)
    grad_weight, count = centred * rstd, branch.numel() // branch.shape[1]
    if norm.training:
        launch.run(
            norms.branch_gradients(kind_of(branch)),
            items=items,
            work=branch.numel(),
            **images,
            branch=branch,
            grad=grad_branch,
            incoming=rstd if norm.weight is None else norm.weight * rstd,
            constant=(grad_bias / count).float(),
            slope=(grad_weight * rstd / count).float(),
            mean=norm.mean,
        )
    return grad_weight.float(), grad_bias.float()
