"""Tensors in named groups, kept for backward and given back under their names."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def save_groups(ctx: Any, **groups: Tensor | Sequence[Any] | None) -> None:
    """Keeps tensors for backward: single ones, named tuples and sequences of them.

    Args:
        ctx: Of an autograd function.
        groups: What is kept, by the name under which `saved_groups` gives it back.
    """
    kept: list[Tensor | None] = []
    layout = []
    for name, group in groups.items():
        if group is None or isinstance(group, Tensor):
            layout.append((name, None, 1))
            kept.append(group)
        else:
            layout.append((name, type(group), len(group)))
            kept.extend(group)
    ctx.layout = layout
    ctx.save_for_backward(*kept)


def saved_groups(ctx: Any) -> dict[str, Any]:
    """What `save_groups` has kept, by name; named tuples as such, other sequences as tuples."""
    kept = ctx.saved_tensors
    groups: dict[str, Any] = {}
    at = 0
    for name, kind, count in ctx.layout:
        part = kept[at : at + count]
        groups[name] = part[0] if kind is None else kind(*part) if hasattr(kind, "_fields") else part
        at += count
    return groups
