"""What the name of an arm says: the plain network, a method with options, or timm's attention inside the blocks."""

import json
from typing import Any, NamedTuple

from mrla.messages.suggestions import nearest
from mrla.ops import METHODS, NO_METHODS, OWN_METHOD, is_method, method_named, options_of

OF_ATTACH = ("chain_length",)
"""Arguments of `mrla.attach` that are no option of a method and may stand in an arm's name."""


class ArmName(NamedTuple):
    """A read name.

    Attributes:
        network: ``plain``, a method, or timm's ``eca`` or ``se``.
        options: Arguments of `mrla.attach` that the name gives.
    """

    network: str
    options: dict[str, Any]


def known_arms() -> tuple[str, ...]:
    """The names of all arms without options: those of `mrla`, and of every method that is registered.

    Returns:
        The names, ``plain`` first.

    Example:
        >>> known_arms()[:3]
        ('plain', 'light', 'base')
    """
    plain, *inside_blocks = NO_METHODS
    return plain, *METHODS, *inside_blocks


def parse_arm(text: str) -> ArmName:
    """Reads ``NAME[:OPTION=VALUE...]``, such as ``base:last=3:weighting=sigmoid``.

    Args:
        text: The name. Values are written as in JSON; what is no JSON is a text.

    Returns:
        What it says.

    Raises:
        ValueError: If there is no such arm, or its method has no such option.

    Example:
        >>> parse_arm("base:last=3")
        ArmName(network='base', options={'last': 3})
    """
    network, *parts = text.split(":")
    if network not in NO_METHODS and not is_method(network):
        known = known_arms()
        hint = nearest(network, known) or OWN_METHOD
        raise ValueError(f"arm must be one of {', '.join(known)}: got {network!r}{hint}")
    if not parts:
        return ArmName(network, {})
    if network in NO_METHODS:
        raise ValueError(f"the arm {network!r} takes no options, which are those of a method: got {text!r}")
    accepted = sorted({*options_of(method_named(network)), *OF_ATTACH})
    options: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name not in accepted or name in options:
            raise ValueError(
                f"the options of the arm {network!r} must be written {network}:NAME=VALUE, each once, with names of "
                f"{', '.join(accepted)}: got {part!r} in {text!r}{nearest(name, accepted)}"
            )
        options[name] = _value(value)
    return ArmName(network, options)


def folder_name(arm: str) -> str:
    """An arm's name as part of a folder's; a colon is not allowed on every file system."""
    return arm.replace(":", ",").replace("/", "_")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
