"""A run's folder: what is in it, whose it is, and how far it has come."""

import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mrla.files.atomic_write import make_folder, read_json, write_json
from mrla.messages.brief import Brief
from mrla.models import load

CONFIG, RESULT, CHECKPOINTS, BEST = "run.json", "result.json", "checkpoints", "best"


@dataclass(frozen=True, kw_only=True, repr=False)
class Run(Brief):
    """A finished run.

    Attributes:
        folder: Where it is: the last weights as `mrla.save` writes them, the best ones in ``best/``, ``history.csv``,
            ``steps.csv`` and ``result.json``.
        epochs: One row for each epoch: learning rate, training and validation loss and accuracy.
        result: The last epoch's scores, the best epoch's and the seconds it took.
        is_main_process: False in all but one of the processes that trained it together.
        was_finished: Whether it was finished before, so that nothing was trained now.
    """

    folder: Path
    epochs: list[dict[str, float]]
    result: dict[str, Any]

    is_main_process: bool = True
    was_finished: bool = False

    def _brief(self) -> dict[str, object]:
        last, best = self.result["last"], self.result["best"]
        scores = {name: round(value, 4) for name, value in last.items() if name.startswith("val_")}
        return {"folder": str(self.folder), "epochs": len(self.epochs), "best_epoch": best["epoch"], **scores}

    @property
    def model(self) -> nn.Module:
        """The network with its last weights, in eval mode."""
        return load(self.folder)


def finished_run(
    folder: Path, settings: Mapping[str, Any], contents: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Finds out whether a run is finished; nothing is written.

    Args:
        folder: Its folder.
        settings: What decides the run.
        contents: What the images are: their number and a hash, by part; None where that is not known.

    Returns:
        The result if the run is finished, else None.

    Raises:
        ValueError: If the folder belongs to a run with other settings or images, or holds another network.
    """
    if not (folder / CONFIG).is_file():
        if _has_trained(folder):
            raise ValueError(f"{folder} holds another network and no {CONFIG}; choose another --out")
        return None
    record = read_json(folder / CONFIG)
    if not _has_begun(folder):
        return None
    if differences := list(_differences(record.get("settings"), json.loads(json.dumps(settings)))):
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"{folder} belongs to a run with other settings ({'; '.join(differences[:3])}{more}); "
            f"choose another --out, or give the settings that it has"
        )
    _check_contents(folder, record.get("images"), contents)
    result = folder / RESULT
    return read_json(result) if result.is_file() else None


def _has_begun(folder: Path) -> bool:
    """Whether a run has finished an epoch, or one of a comparison's runs has: there is something to go on with."""
    return _has_trained(folder) or any(_has_trained(run) for run in folder.glob("runs/*"))


def _has_trained(folder: Path) -> bool:
    """Whether a folder holds a trained network, or a state of its training."""
    return any(True for name in (RESULT, "model.safetensors", f"{CHECKPOINTS}/*") for _ in folder.glob(name))


def _check_contents(folder: Path, earlier: Any, contents: Mapping[str, Any] | None) -> None:
    """Raises where the images are known to have changed; runs of older versions have not written them down."""
    if contents is None or not isinstance(earlier, dict):
        return
    for part, found in contents.items():
        if (before := earlier.get(part, found)) != found:
            then, now = before.get("images"), found["images"]
            what = f"{then} then, {now} now" if then != now else f"{now}, of which names, labels or sizes differ"
            raise ValueError(
                f"{folder} belongs to a run on other images (the {part} part has {what}); choose another --out, or put "
                f"the images back"
            )


def open_run(
    folder: Path, settings: Mapping[str, Any], contents: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Makes a run's folder, or finds out how far an earlier run in it has come.

    Args:
        folder: The folder.
        settings: What decides the run.
        contents: What the images are, as for `finished_run`.

    Returns:
        The result if the run is finished, else None.

    Raises:
        ValueError: If the folder belongs to a run with other settings or images, or is not writable.
    """
    result = finished_run(folder, settings, contents)
    if not (folder / CONFIG).is_file() or not _has_begun(folder):
        make_folder(folder)
        known = {} if contents is None else {"images": contents}
        write_json(folder / CONFIG, {"settings": settings, **known, "versions": versions()})
    return result


def versions() -> dict[str, str]:
    """Versions and hardware that numbers depend on."""
    packages = ("mrla", "torch", "torchvision", "timm", "lightning")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    }


def _differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield f"{path} is {one} there, {other} here"
