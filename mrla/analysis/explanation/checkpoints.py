"""The explanation of a trained network from its checkpoint and image files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mrla.data.images import read_image
from mrla.data.sources import DataSource, Split
from mrla.train.packages import need
from mrla.train.recipe import Machine
from mrla.train.threads import thread_limit

from ..evaluation.image_files import checked_files, classifier_input, preparation
from ..evaluation.study import Study, open_study
from ..measure import single_device
from .cam_targets import Picture
from .explaining import Explanation, Origin, explain
from .margins import MARGIN


def explain_checkpoint(
    checkpoint: str | Path,
    images: Sequence[str | Path] = (),
    *,
    out: str | Path | None = None,
    data: DataSource | None = None,
    root: str | None = None,
    split: Split = "val",
    batch_size: int = 64,
    workers: int | None = None,
    cuts: Sequence[str] | None = None,
    margin: float = MARGIN,
    max_images: int | None = 1000,
    machine: Machine | None = None,
    overwrite: bool = False,
    command: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Explanation:
    """Explains a trained network on the images that it was validated on, and on image files.

    Args:
        checkpoint: A run's folder, a folder of `mrla.save` or `mrla.dense.save`, or a ``.ckpt``.
        images: Image files to look at one by one; without any, four of the others, of as many classes
            as there are.
        out: Folder of the explanation; ``runs/explain-NAME`` if not given.
        data: The images over which means and effects are taken; those that it was trained with if not given. Where
            nothing is known of them, the files alone are looked at.
        root: Where those images are, if they have moved.
        split: Which part of them.
        batch_size: Images in one batch.
        workers: Processes that load them; as many as the data say if not given.
        cuts: What is cut, see `mrla.explain`; if not given, mixers and links of a classifier whose images are known.
        margin: How many points of accuracy pruning would let be lost, see `mrla.explain`.
        max_images: How many images at most; None for all.
        machine: Where it is computed.
        overwrite: Whether a folder that `explain` wrote before is replaced, all of it.
        command: The command line, for the record.
        on_progress: Called with the passes over a batch done and those in all.

    Returns:
        The explanation.

    Raises:
        ValueError: If the checkpoint or an image cannot be read, the network has no mixers, it is not known what images
            to look at, or an argument is not as described.
    """
    need("scipy", "matplotlib", "jinja2", "captum")
    machine = machine or Machine()
    device = single_device(machine)
    files = checked_files(images)
    study = open_study(
        checkpoint,
        data=data,
        root=root,
        split=split,
        batch_size=batch_size,
        workers=workers,
        by_turns=True,
        images_needed=bool(cuts) or not files,
        mixers_needed=True,
    )
    model, shown = study.model, study.images
    origin = Origin(
        checkpoint=str(checkpoint),
        command=command,
        source=f"{len(files)} image files" if shown is None else shown.source,
        read=(*study.read, *map(str, files)),
    )
    if cuts is None:
        cuts = () if shown is None or study.is_detector else ("mixers", "links")
    prepare = _input_of(study)
    model.to(device)
    with thread_limit(machine.threads):
        return explain(
            model,
            None if shown is None else shown.batches,
            pictures=[Picture(name=str(file), input=prepare(read_image(file))) for file in files],
            cuts=cuts,
            margin=margin,
            max_images=max_images,
            class_names=study.class_names,
            out=out if out is not None else Path("runs") / f"explain-{_name_of(Path(checkpoint))}",
            overwrite=overwrite,
            origin=origin,
            on_progress=on_progress,
        )


def _input_of(study: Study) -> Callable[[Any], Any]:
    if not study.is_detector:
        return classifier_input(preparation(study.model, study.recipe))
    from torchvision.transforms.v2.functional import pil_to_tensor

    return lambda picture: pil_to_tensor(picture).float() / 255


def _name_of(checkpoint: Path) -> str:
    """The run's name: of a ``.ckpt`` that of the folder in which its checkpoints lie."""
    return checkpoint.parent.parent.name if checkpoint.suffix == ".ckpt" else checkpoint.name
