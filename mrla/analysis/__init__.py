"""Analysis: comparing arms, explaining and pruning networks, what they cost, statistics and pictures."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmarking.measuring import Benchmark as Benchmark
    from .benchmarking.measuring import benchmark as benchmark
    from .comparison.comparing import Comparison as Comparison
    from .comparison.comparing import compare as compare
    from .explanation.cam_targets import Picture as Picture
    from .explanation.explaining import Explanation as Explanation
    from .explanation.explaining import explain as explain
    from .explanation.pruning import Pruning as Pruning
    from .explanation.pruning import prune as prune

_LATER = {
    "Benchmark": "benchmarking.measuring",
    "benchmark": "benchmarking.measuring",
    "Comparison": "comparison.comparing",
    "compare": "comparison.comparing",
    "Explanation": "explanation.explaining",
    "explain": "explanation.explaining",
    "Picture": "explanation.cam_targets",
    "Pruning": "explanation.pruning",
    "prune": "explanation.pruning",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'mrla.analysis' has no attribute {name!r}")
    return getattr(import_module(f"mrla.analysis.{_LATER[name]}"), name)
