"""A trained network pruned from its checkpoint, and saved with the record of what that did."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mrla.data.sources import DataSource, Split
from mrla.files.atomic_write import write_json, written_folder
from mrla.models import save
from mrla.models.checkpoints.hub_transfer import hub_name
from mrla.train.packages import need
from mrla.train.recipe import Machine, as_dict
from mrla.train.recipe_tasks import saved_facts
from mrla.train.runs import versions
from mrla.train.threads import thread_limit
from mrla.train.trained import PRUNED

from ..evaluation.study import Study, open_study
from ..measure import single_device
from .margins import MARGIN
from .pruning import Pruning, prune


class _NothingTakenOffError(Exception):
    """Nothing is to be written."""


def prune_checkpoint(
    checkpoint: str | Path,
    *,
    keep: int | Sequence[str] | None = None,
    margin: float = MARGIN,
    out: str | Path | None = None,
    data: DataSource | None = None,
    root: str | None = None,
    split: Split = "val",
    batch_size: int = 64,
    workers: int | None = None,
    max_images: int | None = 1000,
    machine: Machine | None = None,
    overwrite: bool = False,
    command: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Path | None, Pruning]:
    """Takes mixers off a trained classifier as `mrla.prune` does, and saves what is left with ``prune.json``.

    Args:
        checkpoint: A run's folder, a folder of `mrla.save`, ``hf-hub:owner/name``, or a ``.ckpt``.
        keep: How many mixers stay, or the paths of their blocks; None for those that are needed, see `mrla.prune`.
        margin: How many points of accuracy may be lost.
        out: Folder of the pruned network; ``pruned`` in the run's or network's own folder if not given, where `mrla
            eval` finds the images that it was trained with.
        data: The images by which is chosen; those that it was trained with if not given.
        root: Where those images are, if they have moved.
        split: Which part of them.
        batch_size: Images in one batch.
        workers: Processes that load them; as many as the data say if not given.
        max_images: How many images at most; None for all.
        machine: Where it is computed.
        overwrite: Whether a folder that pruning wrote before is replaced, all of it.
        command: The command line, for the record.
        on_progress: Called with the passes over the images done and those in all.

    Returns:
        The folder, and what was kept and removed. Where nothing is shown that can be taken off, no folder is written,
        and None stands in its place.

    Raises:
        ValueError: If the checkpoint cannot be read or is a detector's, the network has no mixers, it is not known what
            images to choose by, an argument is not as described, or the network that `keep` asks for is not shown to
            lose less than the margin.
    """
    need("scipy")
    start, machine = time.monotonic(), machine or Machine()
    device = single_device(machine)
    folder = Path(out) if out is not None else _beside(checkpoint)
    study = open_study(
        checkpoint,
        data=data,
        root=root,
        split=split,
        batch_size=batch_size,
        workers=workers,
        by_turns=True,
        mixers_needed=True,
        classifiers_only=True,
    )
    model, images = study.model, study.images
    assert images is not None  # they are needed
    try:
        # before the work: the folder may be refused
        with written_folder(folder, record=PRUNED, overwrite=overwrite, inputs=study.read) as beside:
            model.to(device)
            with thread_limit(machine.threads):
                pruned = prune(
                    model, images.batches, keep=keep, margin=margin, max_images=max_images, on_progress=on_progress
                )
            if keep is None and not pruned.removed:
                raise _NothingTakenOffError
            save(model, beside, **_facts(checkpoint, study))
            content = {
                "checkpoint": str(checkpoint),
                "settings": None if study.recipe is None else as_dict(study.recipe),
                "images": {"max_images": max_images, "source": images.source},
                "keep": keep if keep is None or isinstance(keep, int) else list(keep),
                **asdict(pruned),
                "versions": versions(),
                "command": command,
                "seconds": time.monotonic() - start,
            }
            write_json(beside / PRUNED, content)
    except _NothingTakenOffError:
        return None, pruned
    return folder, pruned


def _beside(checkpoint: str | Path) -> Path:
    if hub_name(checkpoint) is not None:
        raise ValueError(f"out must be given for a network on the hub: {checkpoint} is no folder of this machine")
    path = Path(checkpoint)
    return (path.parent.parent if path.suffix == ".ckpt" else path) / "pruned"


def _facts(checkpoint: str | Path, study: Study) -> dict[str, Any]:
    """What a ``.ckpt`` does not say of the images and a saved folder does."""
    recipe = study.recipe
    if Path(checkpoint).suffix == ".ckpt" and recipe is not None:
        return saved_facts(recipe.data.facts())
    return {"class_names": study.class_names}
