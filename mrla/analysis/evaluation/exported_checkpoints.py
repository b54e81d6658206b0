"""A trained network written from its checkpoint as a file for another engine."""

from pathlib import Path
from typing import Any

from mrla.deploy import Export, export
from mrla.deploy.formats import checked_format
from mrla.train.trained import load_trained

from .image_files import validation_crop


def export_checkpoint(checkpoint: str | Path, path: str | Path, **options: Any) -> Export:
    """Exports a trained network with its class names and the way its images are prepared.

    Args:
        checkpoint: A run's folder, a folder of `mrla.save`, or a ``.ckpt``.
        path: The file to write.
        options: Further arguments of `mrla.export`.

    Returns:
        What was written and compared.

    Raises:
        ExportMismatch: If the file says something else than the network.
        ValueError: If the checkpoint cannot be read, or as `mrla.export` says.
    """
    checked_format(options.get("format", "onnx"), Path(path))  # before the network is read
    model, recipe, class_names = load_trained(checkpoint)
    return export(model, path, class_names=class_names, **{**validation_crop(recipe), **options})
