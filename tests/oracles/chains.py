"""Shared by the tests of this room: random chains, and two ways of computing one thing held against each other."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Hypothesis keeps what it learns of the source in a folder of the checkout, unless told where.
set_hypothesis_home_dir(Path(gettempdir()) / "mrla-hypothesis")
FEW = settings(max_examples=15, derandomize=True, deadline=None, database=None)
# Blocks, channels, heads, (height, width), kernel size and options of a chain: what base and exact are asked alike.
CHAINS = [
    pytest.param(3, 4, 1, (2, 3), 3, {}, id="one-head"),
    pytest.param(3, 4, 2, (2, 3), 3, {}, id="two-heads"),
    pytest.param(3, 3, 3, (2, 2), 3, {}, id="channel-wise"),
    pytest.param(3, 6, 3, (2, 1), 5, {}, id="kernel-of-five"),
    pytest.param(3, 2, 1, (1, 1), 3, {}, id="one-pixel"),
    pytest.param(3, 4, 1, (2, 2), 3, {"weighting": "sigmoid"}, id="sigmoid"),
    pytest.param(3, 4, 4, (2, 2), 3, {"weighting": "sigmoid"}, id="channel-wise-sigmoid"),
    pytest.param(2, 4, 2, (2, 2), 3, {"value_act": "gelu"}, id="gelu"),
    pytest.param(2, 4, 2, (2, 2), 3, {"value_act": "relu"}, id="relu"),
    pytest.param(2, 4, 2, (2, 2), 3, {"value_act": "relu", "weighting": "sigmoid"}, id="relu-sigmoid"),
    pytest.param(3, 4, 2, (2, 2), 3, {"last": 1}, id="last-1"),
    pytest.param(4, 2, 1, (2, 2), 3, {"last": 2}, id="last-2"),
    pytest.param(4, 2, 2, (2, 2), 3, {"last": 3}, id="last-3"),
    pytest.param(3, 2, 1, (2, 2), 3, {"last": 9}, id="last-longer-than-the-chain"),
    pytest.param(4, 2, 1, (2, 1), 3, {"last": 2, "weighting": "sigmoid", "value_act": "gelu"}, id="all-options"),
]


class Chain(NamedTuple):
    """Outputs of the blocks of a chain, and each block's kernels."""

    xs: list[Tensor]
    query_weights: list[Tensor]
    key_weights: list[Tensor]
    value_weights: list[Tensor]

    def to(self, dtype: torch.dtype) -> "Chain":
        return Chain(*([tensor.to(dtype) for tensor in part] for part in self))

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self for tensor in part]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> "Chain":
        length = len(tensors) // 4
        return Chain(*(list(tensors[start : start + length]) for start in range(0, 4 * length, length)))


def random_chain(
    length: int, channels: int, height: int = 2, width: int = 2, kernel_size: int = 3, dtype=torch.float64
) -> Chain:
    shapes = [(2, channels, height, width), (1, 1, kernel_size), (1, 1, kernel_size), (channels, 1, 3, 3)]
    return Chain(*([torch.randn(shape, dtype=dtype) for _ in range(length)] for shape in shapes))


def run_chain(step: Callable[..., tuple[Tensor, Any]], chain: Chain, heads: int, **options: Any) -> list[Tensor]:
    """o_1 to o_T by the operator `step`, which hands its memory on."""
    return run_chain_with_memories(step, chain, heads, **options)[0]


def run_chain_with_memories(
    step: Callable[..., tuple[Tensor, Any]], chain: Chain, heads: int, **options: Any
) -> tuple[list[Tensor], list[Any]]:
    outs, memories = [], [None]
    for x, *kernels in zip(*chain, strict=True):
        out, memory = step(x, memories[-1], *kernels, heads, **options)
        outs.append(out)
        memories.append(memory)
    return outs, memories[1:]


def assert_same_values_and_gradients(
    one: Callable[[list[Tensor]], Sequence[Tensor]], other: Callable[[list[Tensor]], Sequence[Tensor]], *inputs: Tensor
) -> None:
    """Two functions of the same tensors agree, and so do the gradients of one random sum over what they give."""
    results = []
    generator = torch.Generator().manual_seed(1)
    for function in (one, other):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        outs = list(function(leaves))
        if not results:
            cotangents = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outs]
        results.append((outs, torch.autograd.grad(outs, leaves, cotangents, materialize_grads=True)))
    (outs, grads), (other_outs, other_grads) = results
    torch.testing.assert_close(outs, other_outs)
    torch.testing.assert_close(grads, other_grads)
    assert any(grad.abs().max() > 0 for grad in grads)


def maps_saved_for_backward(function: Callable[[], Any], map_bytes: int) -> float:
    """How many maps' worth of distinct memory autograd keeps while `function` runs; what is smaller does not count."""
    kept: dict[int, Tensor] = {}  # the tensors too, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    del result
    return sum(size for size in sizes if 2 * size >= map_bytes) / map_bytes


class ConcatenatedMaps(TorchDispatchMode):
    """Counts the concatenations whose result holds a map or more."""

    def __init__(self, map_numel: int):
        super().__init__()
        self.map_numel = map_numel
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.stack) and result.numel() >= self.map_numel:
            self.count += 1
        return result
