"""A folder of class folders."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ..images import class_names_in, labelled_files, read_indexed
from ..samples import ImageFacts, Samples
from .contract import Split, register_source
from .resized import ResizedImages


@register_source
@dataclass(frozen=True, kw_only=True)
class Folder(ResizedImages):
    """Your own images: ``root/train/CLASS/*`` and ``root/val/CLASS/*``, and ``root/test/CLASS/*`` if there is one.

    Further as of `ResizedImages`.

    Attributes:
        kind: ``folder``.
    """

    kind: Literal["folder"] = "folder"

    def facts(self) -> ImageFacts:
        names, completed = self._class_folders("train"), self.completed()
        assert completed.mean is not None
        assert completed.std is not None
        return ImageFacts(in_chans=3, size=completed.size, mean=completed.mean, std=completed.std, class_names=names)

    def _open(self, split: Split, *, seed: int, augment: bool) -> Samples:
        names = self._class_folders(split)
        if split != "train" and (wrong := set(names) ^ set(trained := self._class_folders("train"))):
            where = {name: "train" if name in trained else split for name in wrong}
            shown = ", ".join(f"{name!r} is only in {where[name]}" for name in sorted(wrong)[:5])
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"{split} must have the classes of train: in {self.root} {shown}{more}")
        files = labelled_files(Path(self.root) / split, names)
        transform, paths = self.make_transform(augment=augment), [path for path, _ in files]
        return Samples(partial(read_indexed, paths), [label for _, label in files], transform, names, seed, files=paths)

    def _class_folders(self, split: str) -> tuple[str, ...]:
        root, folder = Path(self.root), Path(self.root) / split
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
