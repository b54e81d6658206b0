"""What every operator needs of its arguments, in one place."""

from collections.abc import Iterable, Sequence

from torch import Tensor


def check_map(x: Tensor) -> None:
    """Raises ValueError unless `x` is a batch of maps with at least one pixel."""
    if x.ndim != 4 or 0 in x.shape[2:]:
        raise ValueError(
            f"x must be a batch of maps (b, c, h, w) with h, w at least 1: got shape {tuple(x.shape)}; "
            f"lay tokens out with mrla.ops.to_map"
        )


def check_kernels(
    channels: int,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    heads: int,
    decay: Tensor | None = None,
) -> None:
    """Raises ValueError unless the kernels are those of maps with so many channels and heads."""
    shape = tuple(query_weight.shape)
    if len(shape) != 3 or shape[:2] != (1, 1) or shape[2] % 2 == 0 or tuple(key_weight.shape) != shape:
        raise ValueError(
            f"query_weight and key_weight must both be (1, 1, k) with k odd: got {shape} and {tuple(key_weight.shape)}"
        )
    if tuple(value_weight.shape) != (channels, 1, 3, 3):
        raise ValueError(
            f"value_weight must be (c, 1, 3, 3) for x with c = {channels} channels: got {tuple(value_weight.shape)}"
        )
    if heads < 1 or channels % heads:
        raise ValueError(f"heads must divide the channels: got heads={heads}, channels={channels}")
    if decay is not None and tuple(decay.shape) != (channels,):
        raise ValueError(f"decay must be (c,) for x with c = {channels} channels: got {tuple(decay.shape)}")


def check_like(name: str, tensors: Iterable[Tensor], x: Tensor) -> None:
    """Raises ValueError unless every tensor has the shape of `x`."""
    for tensor in tensors:
        if tensor.shape != x.shape:
            raise ValueError(
                f"{name} must have the shape of x, {tuple(x.shape)}: got {tuple(tensor.shape)}; "
                f"pass what the blocks before left in the same chain, or None at its head"
            )


def check_pairs(name: str, memory: Sequence[Sequence[Tensor]]) -> None:
    """Raises ValueError unless both parts of a memory hold the same number of blocks."""
    if len(memory[0]) != len(memory[1]):
        raise ValueError(
            f"a memory holds as many {name}, one of each for every block: got {len(memory[0])} and {len(memory[1])}; "
            f"pass what the block before returned"
        )


def check_window(last: int | None) -> None:
    """Raises ValueError unless `last` is a number of blocks, or None for all of them."""
    if last is not None and last < 1:
        raise ValueError(f"last must be at least 1 block, the block itself counted, or None for all: got {last}")
