"""CIFAR-10 and CIFAR-100 from their standard archives."""

import tarfile
import tempfile
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import getitem
from pathlib import Path
from typing import Any, ClassVar, Literal

from mrla.messages.one_line import one_line

from ..samples import ImageFacts, Samples
from .contract import DataSource, Split, register_source

_MEAN = _STD = (0.5,) * 3


@dataclass(frozen=True, kw_only=True)
class Cifar(DataSource):
    """What the two CIFARs share.

    The archive has two parts. The Paddle notebook validates on the second, and so does ``val``; there is no third, so
    ``test`` is the same 10,000 images.

    Attributes:
        kind: ``cifar10`` or ``cifar100``.
        root: Folder that holds the archive or the folder unpacked from it, or one of the two itself.
        download: Whether to fetch the archive into `root` if it is not there.
    """

    root: str = "data"
    download: bool = False
    workers: int = 4

    task = "classification"
    dataset_name: ClassVar[str]
    """Torchvision's name of the class that reads it."""

    def facts(self) -> ImageFacts:
        names = tuple(_read(self, train=False).classes)
        return ImageFacts(in_chans=3, size=32, mean=_MEAN, std=_STD, class_names=names)

    def _open(self, split: Split, *, seed: int, augment: bool) -> Samples:
        from torchvision import transforms

        archive = _read(self, train=split == "train")
        change = (
            [transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip()]
            if augment
            else [transforms.Resize(32)]
        )
        finish = [transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)]
        transform = transforms.Compose([transforms.ToPILImage(), *change, *finish])
        return Samples(partial(getitem, archive.data), archive.targets, transform, archive.classes, seed)


@register_source
@dataclass(frozen=True, kw_only=True)
class Cifar10(Cifar):
    """CIFAR-10 from its standard archive, with the Paddle notebook's transforms.

    Further as of `Cifar`.

    Attributes:
        kind: ``cifar10``.
        root: Folder that holds ``cifar-10-python.tar.gz`` or the folder unpacked from it, or one of the two itself.
    """

    kind: Literal["cifar10"] = "cifar10"
    dataset_name = "CIFAR10"


@register_source
@dataclass(frozen=True, kw_only=True)
class Cifar100(Cifar):
    """CIFAR-100 from its standard archive, with the Paddle notebook's transforms for CIFAR-10.

    Further as of `Cifar`.

    Attributes:
        kind: ``cifar100``.
        root: Folder that holds ``cifar-100-python.tar.gz`` or the folder unpacked from it, or one of the two itself.
    """

    kind: Literal["cifar100"] = "cifar100"
    dataset_name = "CIFAR100"


@lru_cache(maxsize=4)
def _read(source: Cifar, *, train: bool) -> Any:
    """CIFAR by torchvision from the unpacked folder in root, or from the archive, unpacked for the while.

    Root may be the archive itself.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import calculate_md5

    dataset: Any = getattr(datasets, source.dataset_name)
    root = Path(source.root)
    if root.name == dataset.base_folder and (root / dataset.meta["filename"]).is_file():
        root = root.parent  # the unpacked folder itself
    is_archive = root.is_file()
    archive, unpacked = root if is_archive else root / dataset.filename, root / dataset.base_folder
    if source.download and not is_archive:
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
