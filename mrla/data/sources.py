"""Data descriptions: what the images are and where they lie, as frozen data; `open_split` opens them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from operator import getitem
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mrla.messages.one_line import one_line

from .images import class_names_in, labelled_files, read_indexed
from .samples import IGNORE_LABEL as IGNORE_LABEL
from .samples import Samples as Samples
from .samples import TensorSamples as TensorSamples
from .samples import loader as loader

Split = Literal["train", "val", "test"]
MOST_PROCESSES = 1024
"""Of workers, devices, machines, threads or runs at once: a slip of the pen would start them all."""


@dataclass(frozen=True, kw_only=True)
class Digits:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, grey: real images that come with the installation.

    Split once, fixed and stratified: half for training, a quarter for validation, a quarter (``test``) for a last look
    that is never used to choose anything.

    Attributes:
        kind: ``digits``.
        workers: Processes that load images; the images are in memory, so none is fastest.
    """

    kind: Literal["digits"] = "digits"
    workers: int = 0

    def __post_init__(self):
        check_workers(self.workers)


@dataclass(frozen=True, kw_only=True)
class Cifar10:
    """CIFAR-10 from its standard archive, with the Paddle notebook's transforms.

    The archive has two parts. The notebook validates on the second, and so does ``val``; there is no third, so ``test``
    is the same 10,000 images.

    Attributes:
        kind: ``cifar10``.
        root: Folder that holds ``cifar-10-python.tar.gz`` or the folder unpacked from it, or one of the two itself.
        download: Whether to fetch the archive into `root` if it is not there.
        workers: Processes that load images.
    """

    kind: Literal["cifar10"] = "cifar10"
    root: str = "data"
    download: bool = False
    workers: int = 4

    def __post_init__(self):
        check_workers(self.workers)


@dataclass(frozen=True, kw_only=True)
class Cifar100:
    """CIFAR-100 from its standard archive, with the Paddle notebook's transforms for CIFAR-10; parts as in `Cifar10`.

    Attributes:
        kind: ``cifar100``.
        root: Folder that holds ``cifar-100-python.tar.gz`` or the folder unpacked from it, or one of the two itself.
        download: Whether to fetch the archive into `root` if it is not there.
        workers: Processes that load images.
    """

    kind: Literal["cifar100"] = "cifar100"
    root: str = "data"
    download: bool = False
    workers: int = 4

    def __post_init__(self):
        check_workers(self.workers)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Your own images: ``root/train/CLASS/*`` and ``root/val/CLASS/*``, and ``root/test/CLASS/*`` if there is one.

    What is None is as the network was trained, where that is known, else 224 pixels, ImageNet's mean and standard
    deviation, ``bilinear`` and 0.875.

    Attributes:
        kind: ``folder``.
        root: The folder.
        size: Height and width that images are brought to, in pixels.
        mean: Mean of each channel, for normalisation.
        std: Standard deviation of each channel, likewise.
        interpolation: How images are resized, ``bilinear`` or ``bicubic``.
        crop_pct: Part of the resized image that validation looks at.
        auto_augment: timm's name of a further augmentation, such as ``rand-m9-mstd0.5-inc1``, or None.
        workers: Processes that load images.
    """

    kind: Literal["folder"] = "folder"
    root: str = "data"
    size: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    crop_pct: float | None = None
    auto_augment: str | None = None
    workers: int = 4

    def __post_init__(self):
        check_workers(self.workers)
        if self.size is not None and self.size < 1:
            raise ValueError(f"data.size must be a positive number of pixels: got {self.size}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"data.crop_pct must be in (0, 1]: got {self.crop_pct}")
        if any(channels is not None and len(channels) != 3 for channels in (self.mean, self.std)):
            raise ValueError(f"data.mean and data.std must have 3 channels: got {self.mean} and {self.std}")
        if self.std is not None and not all(std > 0 for std in self.std):
            raise ValueError(f"data.std must be positive for every channel: got {self.std}")
        if self.interpolation not in ("bilinear", "bicubic", None):
            raise ValueError(f"data.interpolation must be 'bilinear' or 'bicubic': got {self.interpolation!r}")


Data = Digits | Cifar10 | Cifar100 | Folder
DATA_KINDS: dict[str, type[Data]] = {"digits": Digits, "cifar10": Cifar10, "cifar100": Cifar100, "folder": Folder}


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_AS_USUAL = {
    "size": 224,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "interpolation": "bilinear",
    "crop_pct": 0.875,
}


def completed(data: Data, network: Mapping[str, Any] | None = None) -> Data:
    """The description with nothing left to the network.

    Args:
        data: Any description; of a `Folder` each field that is None is filled in.
        network: What the network was trained with, as timm's `pretrained_cfg` and a saved ``config.json`` have it:
            ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, each where it is known.

    Returns:
        The description.

    Example:
        >>> completed(Folder(size=64), {"mean": (0.5, 0.5, 0.5), "crop_pct": 1.0})
        Folder(kind='folder', root='data', size=64, mean=(0.5, 0.5, 0.5), std=(0.229, 0.224, 0.225), \
interpolation='bilinear', crop_pct=1.0, auto_augment=None, workers=4)
    """
    if not isinstance(data, Folder):
        return data
    network = network or {}
    known: dict[str, Any] = {"crop_pct": network["crop_pct"]} if network.get("crop_pct") else {}
    for name in ("mean", "std"):
        if len(network.get(name) or ()) == 3:  # a network of grey images has one
            known[name] = tuple(network[name])
    if network.get("interpolation") in ("bilinear", "bicubic"):  # a few of timm's have others
        known["interpolation"] = network["interpolation"]
    if network.get("input_size"):
        known["size"] = network["input_size"][-1]
    return replace(
        data, **{name: known.get(name, usual) for name, usual in _AS_USUAL.items() if getattr(data, name) is None}
    )


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What a network must know of its images.

    Attributes:
        in_chans: Channels of an image.
        size: Its height and width, in pixels.
        mean: Mean of each channel that it is normalised with.
        std: Standard deviation, likewise.
        class_names: Names of the classes, in the order of the labels.
    """

    in_chans: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]


def image_facts(data: Data) -> ImageFacts:
    """What a network must know of these images; of a `Folder` no image is opened.

    Args:
        data: The description.

    Returns:
        Channels, size, normalisation and class names.

    Raises:
        ValueError: If the data are not there or not as described.

    Example:
        >>> image_facts(Digits()).class_names[:3]
        ('0', '1', '2')
    """
    if isinstance(data, Digits):
        names = tuple(map(str, range(10)))
        return ImageFacts(in_chans=1, size=8, mean=(_DIGITS_MEAN,), std=(_DIGITS_STD,), class_names=names)
    data = completed(data)
    if isinstance(data, Folder):
        names = _class_folders(data, "train")
        assert data.size is not None
        assert data.mean is not None
        assert data.std is not None
        return ImageFacts(in_chans=3, size=data.size, mean=data.mean, std=data.std, class_names=names)
    names = tuple(_cifar(data, train=False).classes)
    return ImageFacts(in_chans=3, size=32, mean=(0.5,) * 3, std=(0.5,) * 3, class_names=names)


def open_split(data: Data, split: Split, *, seed: int = 0, augment: bool | None = None) -> Samples:
    """Opens one part of the data.

    Args:
        data: The description.
        split: ``train``, ``val`` or ``test``.
        seed: Decides the augmentations, together with epoch and index.
        augment: Whether images are changed at random as in training; None means so for ``train`` alone. `Digits` has
            no such changes.

    Returns:
        The samples, asked by `SampleKey`.

    Raises:
        ValueError: If the data are not there or not as described: the message names the file or folder.

    Example:
        >>> [len(open_split(Digits(), split)) for split in ("train", "val", "test")]
        [898, 449, 450]
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split must be 'train', 'val' or 'test': got {split!r}")
    augment = split == "train" if augment is None else augment
    data = completed(data)
    if isinstance(data, Digits):
        return _open_digits(split)
    if isinstance(data, Folder):
        return _open_folder(data, split, seed, augment)
    return _open_cifar(data, split, seed, augment)


def check_workers(workers: int) -> None:
    """Raises ``ValueError`` unless ``workers`` is a number of processes."""
    if not 0 <= workers <= MOST_PROCESSES:
        raise ValueError(f"data.workers must be zero to {MOST_PROCESSES} processes: got {workers}")


# Mean and standard deviation of the training half, grey values from 0 to 1; a test measures them again.
_DIGITS_MEAN, _DIGITS_STD = 0.3056, 0.3765
_DIGITS_SPLIT_SEED = 2302_03985


def _open_digits(split: Split) -> TensorSamples:
    images, labels, parts = _digits()
    index = torch.tensor(parts[split])
    return TensorSamples(images[index], labels[index], list(map(str, range(10))))


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor, dict[str, list[int]]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    everything: Any = list(range(len(digits.target)))
    train, rest = train_test_split(everything, train_size=0.5, stratify=digits.target, random_state=_DIGITS_SPLIT_SEED)
    val, test = train_test_split(rest, train_size=0.5, stratify=digits.target[rest], random_state=_DIGITS_SPLIT_SEED)
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    parts: dict[str, Any] = {"train": train, "val": val, "test": test}
    return (images - _DIGITS_MEAN) / _DIGITS_STD, torch.tensor(digits.target), parts


def _open_cifar(data: Cifar10 | Cifar100, split: Split, seed: int, augment: bool) -> Samples:
    from torchvision import transforms

    archive = _cifar(data, train=split == "train")
    change = (
        [transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip()] if augment else [transforms.Resize(32)]
    )
    finish = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    transform = transforms.Compose([transforms.ToPILImage(), *change, *finish])
    return Samples(partial(getitem, archive.data), archive.targets, transform, archive.classes, seed)


@lru_cache(maxsize=4)
def _cifar(data: Cifar10 | Cifar100, *, train: bool) -> Any:
    """CIFAR by torchvision from the unpacked folder in root, or from the archive, unpacked for the while.

    Root may be the archive itself.
    """
    import tarfile
    import tempfile

    from torchvision import datasets
    from torchvision.datasets.utils import calculate_md5

    dataset = datasets.CIFAR10 if data.kind == "cifar10" else datasets.CIFAR100
    root = Path(data.root)
    if root.name == dataset.base_folder and (root / dataset.meta["filename"]).is_file():
        root = root.parent  # the unpacked folder itself
    is_archive = root.is_file()
    archive, unpacked = root if is_archive else root / dataset.filename, root / dataset.base_folder
    if data.download and not is_archive:
        try:
            return dataset(str(root), train=train, download=True)
        except (RuntimeError, OSError, EOFError) as error:
            raise ValueError(
                f"{dataset.filename} could not be fetched into {root} ({one_line(error)}); fetch {dataset.url} by hand"
            ) from error
    if unpacked.is_dir():
        _check_unpacked(unpacked, dataset)
        return dataset(str(root), train=train)
    if not archive.is_file():
        raise ValueError(
            f"data.root must hold {dataset.filename} or {dataset.base_folder}: {root} has neither; "
            f"put the archive there, or say --data.download true"
        )
    if (found := calculate_md5(str(archive))) != dataset.tgz_md5:
        raise ValueError(
            f"{archive} is truncated or not the standard archive: its MD5 is {found}, not {dataset.tgz_md5}; "
            f"fetch it again"
        )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        return dataset(folder, train=train)


def _check_unpacked(unpacked: Path, dataset: Any) -> None:
    from torchvision.datasets.utils import calculate_md5

    meta = (dataset.meta["filename"], dataset.meta["md5"])
    for name, expected in [*dataset.train_list, *dataset.test_list, meta]:
        found = calculate_md5(str(unpacked / name)) if (unpacked / name).is_file() else None
        if found != expected:
            wrong = f"its MD5 is {found}, not {expected}" if found else "it is missing"
            raise ValueError(f"{unpacked / name} must be the standard file: {wrong}; unpack {dataset.filename} again")


def _open_folder(data: Folder, split: Split, seed: int, augment: bool) -> Samples:
    from timm.data.transforms_factory import create_transform

    names = _class_folders(data, split)
    if split != "train" and (wrong := set(names) ^ set(trained := _class_folders(data, "train"))):
        where = {name: "train" if name in trained else split for name in wrong}
        shown = ", ".join(f"{name!r} is only in {where[name]}" for name in sorted(wrong)[:5])
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{split} must have the classes of train: in {data.root} {shown}{more}")
    files = labelled_files(Path(data.root) / split, names)
    options: dict[str, Any] = {"mean": data.mean, "std": data.std, "interpolation": data.interpolation}
    if augment:
        options |= {"is_training": True, "color_jitter": 0.0, "auto_augment": data.auto_augment}
    else:
        options |= {"crop_pct": data.crop_pct}
    assert data.size is not None
    try:
        transform: Any = create_transform(data.size, **options)
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"data.auto_augment must be a name that timm reads, such as rand-m9-mstd0.5-inc1: got "
            f"{data.auto_augment!r} ({one_line(error)})"
        ) from error
    paths = [path for path, _ in files]
    return Samples(partial(read_indexed, paths), [label for _, label in files], transform, names, seed, files=paths)


def _class_folders(data: Folder, split: str) -> tuple[str, ...]:
    root, folder = Path(data.root), Path(data.root) / split
    rule = "data.root must be a folder with train/ and val/, each with a folder of images for every class"
    if not root.is_dir():
        raise ValueError(f"{rule}: there is no folder {root}")
    if not folder.is_dir():
        there = [f"{name}/" for name in ("train", "val", "test") if (root / name).is_dir()]
        if split == "test":
            raise ValueError(
                f"{root} has no test/, only {' and '.join(there) or 'neither train/ nor val/'}: use another"
            )
        raise ValueError(f"{rule}: {root} has {' and '.join(there) or 'neither'}, {split}/ is needed")
    names = class_names_in(folder)
    if not names:
        raise ValueError(f"{folder} must have a folder of images for every class: it has none")
    return names
