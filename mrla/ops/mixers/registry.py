"""The methods by name, and how one of a user's own becomes one of them."""

import inspect
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar, Unpack, get_args, get_origin

from mrla.messages.one_line import one_line
from mrla.messages.registering import place_of, register
from mrla.messages.suggestions import nearest

from .contract import ChainSite, LayerMixer

MixerT = TypeVar("MixerT", bound=type[LayerMixer])

METHODS: dict[str, type[LayerMixer]] = {}
"""The registered methods: the class of a method's mixers by the method's name."""
ENTRY_POINTS = "mrla.methods"
"""The group of entry points under which an installed package names modules that register methods."""
NO_METHODS = ("plain", "eca", "se")
"""Names of arms that are no methods: the network without mixers, and timm's attention inside blocks."""

OWN_METHOD = "; a method of your own is known once its file is imported, by a command's --plugins FILE.py"
"""What is said of an unknown name that is near to none."""


def register_method(name: str) -> Callable[[MixerT], MixerT]:
    """Makes a class of mixers a method that `mrla.attach` and every command know by name.

    A class is registered where its file is imported: by a program's own ``import``, by ``--plugins my_file.py`` of a
    command, or by an installed package that names its module in the entry-point group ``mrla.methods``.

    Args:
        name: Lower-case letters, digits and underscores.

    Returns:
        A decorator, which returns the class as it is.

    Raises:
        ValueError: If the name is no such word, or taken.
        TypeError: If the class is no `LayerMixer`, or lacks a part of the contract.

    Example:
        >>> import mrla
        >>> from mrla.ops import BranchMixer
        >>> @mrla.register_method("mean")
        ... class MeanMixer(BranchMixer):
        ...     def update(self, x, shortcut, memory):
        ...         return x.mean((2, 3), keepdim=True).expand_as(x), None
        ...     def reset_kernels(self, init):
        ...         pass
        >>> import timm
        >>> type(mrla.attach(timm.create_model("resnet18"), "mean").layer1[0].mrla).__name__
        'MeanMixer'
        >>> del mrla.ops.METHODS["mean"]
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"a method's name must be lower-case letters, digits and underscores: got {name!r}")

    def decorate(mixer: MixerT) -> MixerT:
        _check_contract(mixer)
        register(METHODS, name, mixer, "a method", NO_METHODS)
        return mixer

    return decorate


def method_named(name: str) -> type[LayerMixer]:
    """The class of a method's mixers.

    Args:
        name: A registered name.

    Returns:
        The class.

    Raises:
        ValueError: If no method is registered under the name.

    Example:
        >>> method_named("base").__name__
        'MRLABase'
    """
    if name not in METHODS:
        _load_entry_points()
    if name not in METHODS:
        hint = nearest(name, METHODS) or OWN_METHOD
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}: got {name!r}{hint}")
    return METHODS[name]


def is_method(name: str) -> bool:
    """Whether a method is registered under a name, here or by an installed package.

    Args:
        name: The name.

    Returns:
        Whether it is.

    Example:
        >>> is_method("light"), is_method("plain")
        (True, False)
    """
    if name not in METHODS and name not in NO_METHODS:
        _load_entry_points()
    return name in METHODS


def options_of(mixer: type[LayerMixer]) -> frozenset[str]:
    """The names of the options that a method takes: what its `build_chain` and its constructor accept.

    What `attach` finds out itself (`ChainSite`, the type of the parameters) is not among them.

    Args:
        mixer: The method's class.

    Returns:
        The names.

    Example:
        >>> "last" in options_of(method_named("base"))
        True
    """
    names = _keywords(mixer.build_chain) - {"sites"}
    for owner in mixer.__mro__:
        if "__init__" not in owner.__dict__:
            continue
        found = inspect.signature(owner.__init__).parameters.values()
        names |= _keywords(owner.__init__) - {"self"}
        if not any(_is_open(parameter) for parameter in found):
            break
    return frozenset(names - {*ChainSite._fields, "dtype", "uses_shortcut"})  # the last is a class's own to say


def _keywords(function: Callable[..., Any]) -> set[str]:
    """Names of a function's parameters, those of a `TypedDict` that it unpacks among them."""
    names: set[str] = set()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            names.add(parameter.name)
        elif get_origin(parameter.annotation) is Unpack:
            (options,) = get_args(parameter.annotation)
            names |= set(options.__annotations__)
    return names


def _is_open(parameter: inspect.Parameter) -> bool:
    """Whether a parameter hands on keywords that the next constructor names."""
    return parameter.kind is parameter.VAR_KEYWORD and get_origin(parameter.annotation) is not Unpack


def _check_contract(mixer: Any) -> None:
    if not (isinstance(mixer, type) and issubclass(mixer, LayerMixer)):
        name = getattr(mixer, "__qualname__", repr(mixer))
        raise TypeError(f"a method must be a class made of mrla.ops.LayerMixer or BranchMixer: got {name}")
    if missing := sorted(getattr(mixer, "__abstractmethods__", ())):
        raise TypeError(
            f"a method must have every part of the contract: {place_of(mixer)} has no "
            f"{', '.join(missing)}; define them as mrla.ops.LayerMixer and BranchMixer say"
        )


_entry_points_loaded = False


def _load_entry_points() -> None:
    global _entry_points_loaded
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # whatever a package raises while it is imported
            package = entry.dist.name if entry.dist is not None else entry.value
            raise ValueError(
                f"the package {package} names {entry.value} in the entry points {ENTRY_POINTS!r}, which does not "
                f"import ({type(error).__name__}: {one_line(error)}); mend or remove the package"
            ) from error
