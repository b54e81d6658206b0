"""What a state dict does not show of a network: the kinds and settings of its modules, and which places share one."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..mixed_blocks import MixedBlock


class Ties(NamedTuple):
    """The places of a network that share a module or a parameter.

    Attributes:
        modules: Path of a place, and the first path of the module there.
        parameters: Name of a parameter, and its first name; without those within a shared module.
    """

    modules: dict[str, str]
    parameters: dict[str, str]


def ties_of(model: nn.Module) -> Ties:
    """The places of a network that share a module or a parameter.

    Args:
        model: The network.

    Returns:
        Each place that is not the first, with the first.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> ties_of(nn.Sequential(layer, nn.ReLU(), layer)).modules
        {'2': '0'}
    """
    modules = _repeated(model.named_modules(remove_duplicate=False))
    outer = {path: first for path, first in modules.items() if path.rpartition(".")[0] not in modules}
    parameters = _repeated(model.named_parameters(remove_duplicate=False))
    within = {name: first for name, first in parameters.items() if name.rpartition(".")[0] not in modules}
    return Ties(outer, within)


def tie(model: nn.Module, ties: Ties) -> None:
    """Has places of a network share a module or a parameter.

    Args:
        model: A network, changed in place.
        ties: As `ties_of` gives them.

    Raises:
        ValueError: If a place is not there, or would hold itself.
    """
    try:
        for path, first in ties.modules.items():
            if not path or f"{first}.".startswith(f"{path}.") or f"{path}.".startswith(f"{first}."):
                raise ValueError(f"a module cannot hold itself: {first!r} at {path!r}")
            shared = model.get_submodule(first)
            model.get_submodule(path)
            model.set_submodule(path, shared)
        for name, first in ties.parameters.items():
            shared_parameter = model.get_parameter(first)
            model.get_parameter(name)
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, shared_parameter)
    except AttributeError as error:
        raise ValueError(f"a place that is shared is not in the network: {error}") from error


def new_ties(model: nn.Module, twin: nn.Module) -> Ties:
    """The places that share something in a network, and not yet in the one that its description builds."""
    own, built = ties_of(model), ties_of(twin)
    return Ties(
        {path: first for path, first in own.modules.items() if built.modules.get(path) != first},
        {name: first for name, first in own.parameters.items() if built.parameters.get(name) != first},
    )


def structure_difference(model: nn.Module, twin: nn.Module) -> str:
    """The first thing in which two networks with weights of the same names differ beside them.

    Args:
        model: A network.
        twin: The one that its description builds.

    Returns:
        The place, and what it is in each; "" where there is none. Kinds of modules, what these show of themselves, and
        their plain settings are compared; a function that somebody has put in the place of a method is not seen.

    Example:
        >>> structure_difference(nn.Sequential(nn.BatchNorm2d(2, eps=0.01)), nn.Sequential(nn.BatchNorm2d(2)))
        '0.eps is 0.01, and 1e-05 in the network that it would build'
    """
    own = dict(model.named_modules(remove_duplicate=False))
    built = dict(twin.named_modules(remove_duplicate=False))
    for path in [*built, *(path for path in own if path not in built)]:
        if found := _difference(own.get(path), built.get(path)):
            what, here, there = found
            place = ".".join(filter(None, (path, what))) or "the network"
            return f"{place} is {here}, and {there} in the network that it would build"
    first, second = ties_of(model), ties_of(twin)
    for kind in Ties._fields:
        here, there = getattr(first, kind), getattr(second, kind)
        if apart := next((path for path in there if here.get(path) != there[path]), None):
            return f"{apart} is apart from {there[apart]}, and shared with it in the network that it would build"
    return ""


def _difference(own: nn.Module | None, built: nn.Module | None) -> tuple[str, str, str] | None:
    if own is None or built is None:
        return "", "missing" if own is None else _kind(own), "missing" if built is None else _kind(built)
    if not isinstance(own, type(built)):
        return "", _kind(own), _kind(built)
    here, there = _settings(own), _settings(built)
    for name in there:
        if here.get(name, there[name]) != there[name]:
            return name, repr(here[name]), repr(there[name])
    shown, expected = _shown(own), _shown(built)
    if shown != expected:
        return "", f"{_kind(own)}({shown})", f"{_kind(built)}({expected})"
    return None


def _shown(module: nn.Module) -> str:
    """What a module shows of itself, without what changes no output: working in place, and BatchNorm's momentum."""
    return re.sub(r"(, )?\b(inplace(=\w+)?|momentum=[\w.e+-]+)", "", module.extra_repr())


def _kind(module: nn.Module) -> str:
    return (module.plain_class if isinstance(module, MixedBlock) else type(module)).__name__


def _settings(module: nn.Module) -> Mapping[str, Any]:
    """The plain numbers by which a norm or a dropout computes; what else is a module's own affair changes nothing."""
    names = ("eps", "p", "drop_prob", "scale_by_keep", "negative_slope", "approximate")
    known = {name: vars(module)[name] for name in names if name in vars(module)}
    return {name: value for name, value in known.items() if value is None or isinstance(value, (int, float, str))}


def _repeated(named: Iterable[tuple[str, Any]]) -> dict[str, str]:
    first: dict[int, str] = {}
    repeated = {}
    for name, value in named:
        if id(value) in first:
            repeated[name] = first[id(value)]
        else:
            first[id(value)] = name
    return repeated
