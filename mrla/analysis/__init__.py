"""Analysis: comparing arms, what networks cost, statistics and curves."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import Comparison as Comparison
    from .comparison import compare as compare


def __getattr__(name: str) -> Any:
    if name not in ("Comparison", "compare"):
        raise AttributeError(f"module 'mrla.analysis' has no attribute {name!r}")
    from . import comparison

    return getattr(comparison, name)
