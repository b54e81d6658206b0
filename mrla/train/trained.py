"""Trained networks as commands take them: a folder that `mrla.save` wrote, or a run's ``.ckpt``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mrla.files.atomic_write import read_json
from mrla.models import CheckpointFile, SavedNetwork, load, read_config, resolve, task_of
from mrla.models.checkpoints.config_files import checked_config
from mrla.models.checkpoints.descriptions import build_from, differences
from mrla.models.checkpoints.tensor_files import check_tensors, check_values, read_torch

from .recipe import Recipe, from_dict
from .recipe_tasks import build_network
from .runs import CONFIG

PRUNED = "prune.json"
"""What `mrla prune` writes beside a network; its ``settings`` are those of the run that trained it."""


def load_trained(checkpoint: str | Path) -> tuple[nn.Module, Recipe | None, tuple[str, ...] | None]:
    """The network of a checkpoint; no code in it is run.

    Args:
        checkpoint: A folder with ``model.safetensors`` and ``config.json``, ``hf-hub:owner/name``, or a ``.ckpt`` in a
            run's ``checkpoints/``.

    Returns:
        The network in eval mode; the recipe that trained it, where one did; and its classes' names, where known.

    Raises:
        ValueError: If it is missing, damaged, or of another network than its run.json says.
    """
    path = Path(checkpoint)
    source = resolve(checkpoint, (SavedNetwork, CheckpointFile), what="a checkpoint")
    if isinstance(source, SavedNetwork):
        model = load(source.place)
        if task_of(model).name == "segmentation":
            raise ValueError(
                f"a checkpoint must be of a classifier or a detector here: {checkpoint} is a segmenter's; load it with "
                f"mrla.dense.load and call it"
            )
        names = (read_config(checkpoint).get("pretrained_cfg") or {}).get("label_names")
        return model, _recipe_of(path), tuple(names) if names else None
    weights = network_weights(read_checkpoint(path))
    run = path.parent.parent
    settings = read_json(run / CONFIG).get("settings")
    if not isinstance(settings, dict):
        raise ValueError(
            f"{run / CONFIG} is damaged: it holds no settings; keep the checkpoint in the folder of its run"
        )
    if "network" in settings:  # a run of mrla.fit
        recipe, names = None, None
        model = build_from(checked_config(settings["network"], run / CONFIG))
    else:
        recipe = from_dict(settings)
        model, names = build_network(recipe), recipe.data.facts().class_names
    if found := differences(model.state_dict(), weights):
        raise ValueError(f"{path} is of another network than {run / CONFIG} says ({found}); take it from its own run")
    check_values(weights, path)
    model.load_state_dict(weights)
    return model.eval(), recipe, names


def read_checkpoint(path: Path) -> dict:
    """A ``.ckpt`` of Lightning, read without executing code.

    Args:
        path: The file.

    Returns:
        Its content; ``state_dict`` is there.

    Raises:
        ValueError: If it is damaged or would execute something.
    """
    try:
        content = read_torch(path)
        weights = content.get("state_dict") if isinstance(content, dict) else None
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
            raise ValueError(f"{path} is damaged: it holds no weights by name")
        check_tensors(weights, str(path))
    except ValueError as error:
        what, _, _ = str(error).partition(";")  # its remedy is for weights of others
        raise ValueError(
            f"{what}; put an intact copy there, or move {path.parent} aside to start its run anew"
        ) from error
    return content


def network_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a network in a checkpoint, under the network's own names.

    Args:
        checkpoint: As `read_checkpoint` gives it.

    Returns:
        The state dict of the `model` of `mrla.train.task.Classification`.
    """
    prefix, weights = "model.", checkpoint["state_dict"]
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _recipe_of(folder: Path) -> Recipe | None:
    # The best weights lie in a folder of the run's; a pruned network may lie anywhere.
    for record in (folder / CONFIG, folder / PRUNED, folder.parent / CONFIG):
        if record.is_file():
            settings = read_json(record).get("settings")
            return from_dict(settings) if isinstance(settings, dict) and "recipe" in settings else None
    return None
