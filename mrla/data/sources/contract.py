"""What every kind of images says of itself, and the registry by which a kind is found."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

from mrla.messages.registering import IMPORTED, register
from mrla.messages.suggestions import nearest

from ..samples import ImageFacts, KeyedSamples

Split = Literal["train", "val", "test"]
MOST_WORKERS = 1024
"""A slip of the pen would start them all."""


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """A kind of images and where they lie, as frozen data.

    A new kind is a frozen dataclass below this one: `kind` and every other field has a default, `task` is set, `facts`
    and `_open` are written, and `register_source` stands above it. The fields are flags (``--data.NAME``, with the help
    of the docstring's ``Attributes``) and the ``data`` of a run's ``run.json``. What else is asked of a kind has an
    answer here that most kinds keep.

    Attributes:
        kind: Name of the kind; in a subclass a `Literal` with one value, its default.
        workers: Processes that load images.
    """

    kind: str = ""
    workers: int = 0

    task: ClassVar[str]
    """What the images are annotated for: ``classification`` or ``detection``."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Outside packages of the extras without which they cannot be opened."""
    own_images: ClassVar[bool] = False
    """Whether these are files of a user's own, which a message may propose."""

    def __post_init__(self):
        if not 0 <= self.workers <= MOST_WORKERS:
            raise ValueError(f"data.workers must be zero to {MOST_WORKERS} processes: got {self.workers}")

    @abstractmethod
    def facts(self) -> ImageFacts:
        """What a network must know of these images; no image is opened.

        Returns:
            Class names, channels, size and normalisation.

        Raises:
            ValueError: If the images are not there or not as described.
        """

    @abstractmethod
    def _open(self, split: Split, *, seed: int, augment: bool) -> KeyedSamples:
        """`open`, after its checks, of a source that is `completed`."""

    def open(self, split: Split, *, seed: int = 0, augment: bool | None = None) -> KeyedSamples:
        """Opens one part of the images.

        Args:
            split: ``train``, ``val`` or ``test``.
            seed: Decides what is drawn for a sample, together with its key.
            augment: Whether images are changed at random as in training; None means so for ``train`` alone.

        Returns:
            The samples, read by `SampleKey`.

        Raises:
            ValueError: If the images are not there or not as described: the message names the file or folder.

        Example:
            >>> from mrla.data import Digits
            >>> [len(Digits().open(split)) for split in ("train", "val", "test")]
            [898, 449, 450]
        """
        if split not in get_args(Split):
            raise ValueError(f"split must be 'train', 'val' or 'test': got {split!r}")
        return self.completed()._open(split, seed=seed, augment=split == "train" if augment is None else augment)

    def completed(self, network: Mapping[str, Any] | None = None) -> Self:
        """The source with nothing left to the network.

        Args:
            network: What the network was trained with, as timm's `pretrained_cfg` and a saved ``config.json`` have it:
                ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, each where it is known.

        Returns:
            The source; most kinds leave nothing to the network.
        """
        return self

    @property
    def size_from_network(self) -> bool:
        """Whether images are brought to the size that the network was trained with."""
        return False

    @property
    def has_masks(self) -> bool:
        """Whether the images say of each pixel what it belongs to."""
        return False

    def validation_crop(self) -> dict[str, Any]:
        """How validation crops images, as arguments of `timm.data.create_transform`; empty where it does not."""
        return {}

    def moved(self, root: str) -> Self:
        """The same images in another folder.

        Args:
            root: The folder.

        Returns:
            The source.

        Raises:
            ValueError: If they lie in no folder.
        """
        if "root" not in {field.name for field in dataclasses.fields(self)}:
            raise ValueError(f"{self.kind} lie in no folder: got data.root={root}; leave it out")
        return dataclasses.replace(self, root=root)  # type: ignore[call-arg]

    def paths(self) -> tuple[str, ...]:
        """The files and folders that are read, which no output may replace."""
        root = getattr(self, "root", None)
        return () if root is None else (root,)


DATA_KINDS: dict[str, type[DataSource]] = {}
"""Every registered class by its kind, in the order of registration."""

_Source = TypeVar("_Source", bound=type[DataSource])


def register_source(source: _Source) -> _Source:
    """Makes a class of images known to recipes, to ``--data.kind`` and to the reading of runs; a decorator.

    Args:
        source: A frozen dataclass below `DataSource`.

    Returns:
        `source` itself.

    Raises:
        TypeError: If it is no such class, or a field has no default.
        ValueError: If its kind is taken.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from mrla.data import DataSource, ImageFacts, TensorSamples
        >>> @register_source
        ... @dataclass(frozen=True, kw_only=True)
        ... class Noise(DataSource):
        ...     kind: Literal["noise"] = "noise"
        ...     images: int = 8
        ...     task = "classification"
        ...
        ...     def facts(self):
        ...         return ImageFacts(class_names=("a", "b"), size=4, mean=(0.0,) * 3, std=(1.0,) * 3)
        ...
        ...     def _open(self, split, *, seed, augment):
        ...         return TensorSamples(torch.randn(self.images, 3, 4, 4), torch.arange(self.images) % 2, ("a", "b"))
        >>> len(source_class("noise")(images=6).open("val"))
        6
        >>> del DATA_KINDS["noise"]
    """
    if not (isinstance(source, type) and issubclass(source, DataSource)):
        raise TypeError(f"a source of images must be a class below mrla.data.DataSource: got {source!r}")
    if "__dataclass_params__" not in vars(source):
        raise TypeError(f"{source.__name__} must be a dataclass: put @dataclass(frozen=True, kw_only=True) above it")
    missing = dataclasses.MISSING
    for field in dataclasses.fields(source):
        if field.default is missing and field.default_factory is missing:
            raise TypeError(f"every field must have a default: {source.__name__}.{field.name} has none")
    if not source.kind or not isinstance(getattr(source, "task", None), str):
        raise TypeError(f"{source.__name__} must have a kind and a task, such as task = 'classification'")
    register(DATA_KINDS, source.kind, source, "a kind of images")
    return source


def source_class(kind: str) -> type[DataSource]:
    """The class of a kind of images.

    Args:
        kind: One of `DATA_KINDS`.

    Returns:
        The class.

    Raises:
        ValueError: If there is none, with the nearest kind.

    Example:
        >>> source_class("digits")()
        Digits(kind='digits', workers=0)
    """
    if kind not in DATA_KINDS:
        known = f"{', '.join(DATA_KINDS)}, or a kind of your own, {IMPORTED}"
        raise ValueError(f"data.kind must be one of {known}: got {kind!r}{nearest(kind, DATA_KINDS)}")
    return DATA_KINDS[kind]


def kinds_for(task: str) -> dict[str, type[DataSource]]:
    """The registered classes whose images are annotated for a task, by their kind.

    Args:
        task: Such as ``detection``.

    Returns:
        The classes, in the order of registration.

    Example:
        >>> list(kinds_for("detection"))
        ['coco', 'voc', 'shapes']
    """
    return {kind: source for kind, source in DATA_KINDS.items() if source.task == task}
