"""Gradients of earlier values that a block does not make itself but leaves at the earlier block's node of the graph.

Every map is then read once in backward, and one map a block is written, the gradient of its y. Where this torch does
not tell what is needed (`torch_internals.can_defer_gradients`), each block makes the gradients of all values that it
has read, as autograd has it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import torch_internals
from ..calls import DeferredGrad

_VALUE = 2
"""The number of the value among what the function of a block returns."""


class Plan(NamedTuple):
    """What one block does in one backward pass.

    Attributes:
        receivers: The earlier blocks that a `DeferredGrad` is left to: their places among the values, and their nodes.
        wanted: For which earlier values a gradient is made here.
        pending: What later blocks have left to this one.
        backward_pass: Which pass it is.
    """

    receivers: list[tuple[int, Any]]
    wanted: list[bool]
    pending: Sequence[DeferredGrad]
    backward_pass: int


def begin_forward(ctx: Any, first_value: int, num_values: int) -> None:
    """Notes, in a block's forward, which of its inputs are values of earlier blocks."""
    ctx.first_value, ctx.num_values = first_value, num_values
    ctx.pending = {}
    # Whoever has set a hook on what is saved may hold it.
    ctx.own_place = torch_internals.can_defer_gradients() and not torch_internals.has_saved_tensor_hooks()


def plan(ctx: Any) -> Plan:
    """What a block does in the running backward pass."""
    nodes = ctx.next_functions[ctx.first_value : ctx.first_value + ctx.num_values]
    if not torch_internals.can_defer_gradients():
        return Plan([], [node is not None for node, _ in nodes], (), 0)
    takes = [isinstance(node, type(ctx)) and output == _VALUE for node, output in nodes]
    receivers = [
        (block, node)
        for block, ((node, _), defers) in enumerate(zip(nodes, takes, strict=True))
        if defers and torch_internals.will_run(node)
    ]
    wanted = [node is not None and not defers for (node, _), defers in zip(nodes, takes, strict=True)]
    number = torch_internals.backward_pass()
    return Plan(receivers, wanted, ctx.pending.pop(number, ()), number)


def room_for_update(ctx: Any, plan: Plan, value: Tensor, like: Tensor) -> Tensor | None:
    """Where the gradient of y goes for `leave`: the place of the block's own value, if nobody needs that any more."""
    if not plan.receivers:
        return None
    return value if ctx.own_place and _is_done_with(value) else torch.empty_like(like)


def leave(plan: Plan, grad_update: Tensor | None, attn: Tensor) -> None:
    """Leaves the gradient of y and what the heads took at each receiver's node."""
    for block, node in plan.receivers:
        assert grad_update is not None
        node.pending.setdefault(plan.backward_pass, []).append(DeferredGrad(grad_update, attn, block))


def _is_done_with(value: Tensor) -> bool:
    """Whether a saved output may be overwritten: no second pass is to come, and nobody else holds what it lies in."""
    return not torch_internals.graph_is_kept() and torch_internals.storage_users(value) == _users_of_an_output()


@functools.cache
def _users_of_an_output() -> int:
    """How often torch itself holds an output that its function has saved and takes out in backward."""
    found = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            out = x.clone()
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            (out,) = ctx.saved_tensors
            found.append(torch_internals.storage_users(out))
            return gradient

    with torch.enable_grad():
        Probe.apply(torch.zeros(1, dtype=torch.float32, device="cpu", requires_grad=True)).sum().backward()
    return found[0]
