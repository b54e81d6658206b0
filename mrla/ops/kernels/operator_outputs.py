"""What an operator of torch's registry may return."""

from torch import Tensor


def own(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where it is a part of another: what an operator returns may share no memory."""
    return tensor.clone() if tensor._is_view() else tensor
