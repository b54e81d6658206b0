"""What the name of a network stands for: a folder, a place on the hub, a file, a model of timm or torchvision."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import timm

from mrla.messages.suggestions import nearest

from .hub_transfer import hub_name

TORCHVISION = "torchvision/"
"""What an architecture's name begins with where it is torchvision's."""


@dataclass(frozen=True)
class TimmModel:
    """A model in timm's registry, ours included; `name` may end in the tag of published weights, after a dot."""

    name: str


@dataclass(frozen=True)
class TorchvisionModel:
    """A model of torchvision's; `name` is without ``torchvision/``."""

    name: str


@dataclass(frozen=True)
class SavedNetwork:
    """What `mrla.save` or `mrla.push` wrote; `place` is a folder or ``hf-hub:owner/name``, as `mrla.load` takes it."""

    place: str


@dataclass(frozen=True)
class CheckpointFile:
    """A file, such as a run's ``.ckpt``."""

    path: Path


_CALLED: dict[type, str] = {
    TimmModel: "a name that `mrla models` or timm lists",
    TorchvisionModel: "torchvision/NAME",
    SavedNetwork: "a folder of mrla.save or hf-hub:owner/name",
    CheckpointFile: "a run's .ckpt",
}
NETWORKS = (TimmModel, TorchvisionModel, SavedNetwork)
"""What a network that is to be trained or measured may be named by."""

Kind = TypeVar("Kind")


def resolve(name: str | Path, kinds: Sequence[type[Kind]], *, what: str = "model", known: Sequence[str] = ()) -> Kind:
    """What a name stands for, of the kinds that may be meant.

    The first of these that it is, of those in `kinds`:

    1. ``hf-hub:owner/name``: a network on the hub;
    2. a path: an absolute one, one that begins with a dot or ends with a slash, or a `Path`;
    3. ``torchvision/NAME``: torchvision's model;
    4. a name in timm's registry, with or without the tag of published weights;
    5. any other folder or file that exists.

    So a model's name stays one where a folder happens to be called alike. Then a warning says that there are both, and
    that ``./NAME`` is the folder.

    Args:
        name: The name.
        kinds: What it may be: `NETWORKS`, or others of this file's records.
        what: What the name is given for, for the error.
        known: Other names that would have been right, for the error.

    Returns:
        A record of one of `kinds`.

    Raises:
        ValueError: If it is none of them, with the nearest name.

    Example:
        >>> resolve("resnet50.a1_in1k", NETWORKS), resolve("torchvision/resnet18", NETWORKS)
        (TimmModel(name='resnet50.a1_in1k'), TorchvisionModel(name='resnet18'))
        >>> resolve("hf-hub:me/resnet18_mrla", NETWORKS)
        SavedNetwork(place='hf-hub:me/resnet18_mrla')
    """
    if hub_name(name) is not None:
        found: object = SavedNetwork(str(name))
    elif _is_path(name):
        found = _at(name)
    else:
        found = _model(str(name), kinds) or _at(name)
    if isinstance(found, tuple(kinds)):
        if isinstance(found, (TimmModel, TorchvisionModel)) and SavedNetwork in kinds and Path(name).is_dir():
            warnings.warn(
                f"{name} is the name of a model and of a folder here: the model is taken; ./{name} is the folder",
                stacklevel=1,  # here, so that it is said once however often a name is resolved
            )
        return found
    raise ValueError(_unknown(str(name), kinds, what, known))


def _is_path(name: str | Path) -> bool:
    text = str(name)
    return isinstance(name, Path) or Path(text).is_absolute() or text.startswith(".") or text.endswith("/")


def _at(name: str | Path) -> SavedNetwork | CheckpointFile | None:
    path = Path(name)
    if path.is_dir():
        return SavedNetwork(str(name))
    return CheckpointFile(path) if path.is_file() else None


def _model(name: str, kinds: Sequence[type]) -> TimmModel | TorchvisionModel | None:
    if name.startswith(TORCHVISION) and TorchvisionModel in kinds:
        return TorchvisionModel(name.removeprefix(TORCHVISION))
    return TimmModel(name) if TimmModel in kinds and _is_timm_name(name) else None


def _is_timm_name(name: str) -> bool:
    """Whether timm's registry has a model of this name and, where it ends in one, published weights of this tag."""
    if not timm.is_model(name):
        return False
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # it has no such tag
        return False
    return True


def _unknown(name: str, kinds: Sequence[type], what: str, known: Sequence[str]) -> str:
    rule = f"{what} must be {_listed([*known, *(_CALLED[kind] for kind in kinds)])}"
    names = list(known)
    if TimmModel in kinds:
        names += timm.list_pretrained(f"{name.partition('.')[0]}.*") if "." in name else timm.list_models()
    if TorchvisionModel in kinds:
        from torchvision.models import list_models

        names += [f"{TORCHVISION}{model}" for model in list_models()]
    if not names:
        return f"{rule}: {name} does not exist"
    from .released import REFERENCES  # what it stands on stands on this

    if name in REFERENCES:
        return (
            f"{rule}: got {name!r}, as the released code calls {REFERENCES[name].network}; name that, or write its "
            f"checkpoint as a folder by mrla convert CHECKPOINT FOLDER --arch {name}"
        )
    return f"{rule}: got {name!r}{nearest(name, names)}"


def _listed(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} or {last}" if first else last
