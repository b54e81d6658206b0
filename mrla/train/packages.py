"""Packages of the extras, asked for before anything is read, computed or written."""

from importlib.util import find_spec

_EXTRAS = {"pycocotools": "dense"}
"""Which extra brings a package, where it is not ``train``."""


def need(*packages: str) -> None:
    """Refuses to begin what could not be ended.

    Args:
        packages: What will be imported.

    Raises:
        ModuleNotFoundError: If one is not installed, with the extra that brings it.

    Example:
        >>> need("torch")
    """
    for package in packages:
        if find_spec(package) is None:
            extra = _EXTRAS.get(package, "train")
            raise ModuleNotFoundError(
                f"{package} is not installed, and this needs it: pip install 'mrla[{extra}]'", name=package
            )
