"""Layer attention for any vision backbone: `attach` adds it, `detach` removes it, `compare` says whether it helped."""

from typing import TYPE_CHECKING, Any

from . import ops as ops
from .models import attach as attach
from .models import detach as detach
from .models import find_chains as chains  # noqa: F401
from .models import load as load
from .models import load_reference as load_reference
from .models import param_groups as param_groups
from .models import push as push
from .models import save as save
from .ops import register_method as register_method

if TYPE_CHECKING:
    from .analysis import benchmark as benchmark
    from .analysis import compare as compare
    from .analysis import explain as explain
    from .analysis import prune as prune
    from .deploy import export as export
    from .deploy import fuse as fuse
    from .train import evaluate as evaluate
    from .train import fit as fit

    __version__: str

# Loaded when first used: they bring Lightning, scikit-learn and matplotlib.
_LATER = {
    **dict.fromkeys(("fit", "evaluate"), "train"),
    **dict.fromkeys(("compare", "benchmark", "explain", "prune"), "analysis"),
    **dict.fromkeys(("fuse", "export"), "deploy"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mrla")
    if name not in _LATER:
        raise AttributeError(f"module 'mrla' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f"mrla.{_LATER[name]}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"mrla.{name} needs {error.name}, which is not installed: pip install 'mrla[train]'", name=error.name
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, "__version__"})
