"""What a mixer needs of the memory that it is called with."""

from typing import Any

from ..base import LayerMemory
from ..exact import OutputMemory
from .contract import ChainPlace, LayerMixer


def expected_memory(memory: Any, kind: type, mixer: LayerMixer) -> Any:
    """`memory`, if it is of the kind that mixers like this one return."""
    if memory is None or isinstance(memory, kind):
        return memory
    raise ValueError(
        f"memory must be what a {type(mixer).__name__} before this one returned, or None at the head of a chain: "
        f"got {type(memory).__name__}"
    )


def fitting_memory(memory: LayerMemory | OutputMemory | None, place: ChainPlace | None) -> Any:
    """`memory`, unless it holds more blocks than stand before this one."""
    if memory is not None and place is not None and len(memory[0]) > place.index:
        raise ValueError(
            f"the memory is from another chain: it holds {len(memory[0])} blocks, and {place.index} stand before this "
            f"one in its chain of {place.length}; pass what the mixer before returned, or None at the head"
        )
    return memory
