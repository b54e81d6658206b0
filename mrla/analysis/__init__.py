"""Analysis: comparing arms, what networks cost, statistics and curves."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmarking import Benchmark as Benchmark
    from .benchmarking import benchmark as benchmark
    from .comparison import Comparison as Comparison
    from .comparison import compare as compare

_LATER = {
    "Benchmark": "benchmarking",
    "benchmark": "benchmarking",
    "Comparison": "comparison",
    "compare": "comparison",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'mrla.analysis' has no attribute {name!r}")
    return getattr(import_module(f"mrla.analysis.{_LATER[name]}"), name)
