"""Tables that a decorator fills: one name, one holder."""

import inspect
from collections.abc import Collection, MutableMapping
from typing import TypeVar

Held = TypeVar("Held")


def register(
    table: MutableMapping[str, Held], name: str, value: Held, what: str, reserved: Collection[str] = ()
) -> None:
    """Puts a value into a table under a name that must be free.

    The same class defined once more, as by a notebook's cell that runs again, takes the place of the old one.

    Args:
        table: The table, changed in place.
        name: The name.
        value: What is to be found under it; a class, or an object of one.
        what: What the table holds, for the error, such as ``"a format of export"``.
        reserved: Names that mean something else.

    Raises:
        ValueError: If the name is no text or taken; the error names the class that holds it and that class's file.

    Example:
        >>> table = {}
        >>> register(table, "fraction", str, "a kind of number")
        >>> table
        {'fraction': <class 'str'>}
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{what} must have a name, a text that is not empty: got {name!r} for {place_of(value)}")
    if name in reserved:
        raise ValueError(f"{what} must have a name of its own: {name!r} means something else; choose another name")
    if name in table and not _is_defined_anew(table[name], value):
        raise ValueError(
            f"{what} must have a name of its own: {name!r} is that of {place_of(table[name])}; choose another name for "
            f"{place_of(value)}"
        )
    table[name] = value


def _is_defined_anew(known: object, value: object) -> bool:
    if not (isinstance(known, type) and isinstance(value, type)):
        return False
    return (known.__module__, known.__qualname__) == (value.__module__, value.__qualname__)


def place_of(value: object) -> str:
    """Where a class, or the class of an object, is written: ``CLASS in FILE``."""
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__qualname__} in {file_of(kind)}"


IMPORTED = "whose file is imported by a command's --plugins FILE.py"
"""Of what is registered by a user, for the error of a name that is not known."""


def is_ours(kind: type) -> bool:
    """Whether a class is one of `mrla`'s, which every process knows."""
    return kind.__module__.partition(".")[0] == "mrla"


def plugin_of(kind: type) -> str | None:
    """What ``--plugins`` takes to have a user's class: a package's module by its name, any other by its file.

    A module of a package may import its siblings, which it could not as a file.

    Args:
        kind: The class.

    Returns:
        The name; None for a class that no other process can import.
    """
    module = kind.__module__
    if module == "__main__":
        return None
    name = module if "." in module else file_of(kind)
    return name if "." in module or name.endswith(".py") else None


def file_of(kind: type) -> str:
    """The file that defines a class, or its module where there is no file."""
    try:
        return inspect.getfile(kind)
    except (OSError, TypeError):  # typed into an interpreter, or built in
        return kind.__module__
