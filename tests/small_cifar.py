"""CIFAR archives of a few random images, which torchvision takes for the standard ones for as long as a test runs."""

import hashlib
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from mrla.data.sources.cifar import _read

PER_FILE = 3
"""Images in each file of a made-up CIFAR archive."""


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def make_cifar(root: Path, dataset: Any, monkeypatch: pytest.MonkeyPatch, per_file: int = PER_FILE) -> None:
    """The folder and the archive of a CIFAR of a few random images, with torchvision's table of checksums to match."""
    classes = 10 if dataset is datasets.CIFAR10 else 100
    labels = "labels" if classes == 10 else "fine_labels"
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return md5((folder / name).read_bytes())

    for part in ("train_list", "test_list"):
        table = []
        for name, _ in getattr(dataset, part):
            pixels = draw.integers(0, 256, (per_file, 3072), dtype=np.uint8)
            table.append([name, write(name, {"data": pixels, labels: draw.integers(0, classes, per_file).tolist()})])
        monkeypatch.setattr(dataset, part, table)
    names = [f"class{number}" for number in range(classes)]
    meta = {**dataset.meta, "md5": write(dataset.meta["filename"], {dataset.meta["key"]: names})}
    monkeypatch.setattr(dataset, "meta", meta)
    archive = root / dataset.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, dataset.base_folder)
    monkeypatch.setattr(dataset, "tgz_md5", md5(archive.read_bytes()))
    _read.cache_clear()  # it knows an archive by its path alone, which another one may have had
