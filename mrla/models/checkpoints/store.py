"""Saving a network so that it can be rebuilt without the code that made it, and loading it again."""

import hashlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mrla.files.atomic_write import make_folder, room_for, sweep, unfinished, written_together

from ..mixed_blocks import MIXER
from .classification import ClassificationTask as _Classification  # noqa: F401  registers the task
from .config_files import CONFIG, WEIGHTS, WEIGHTS_HASH, read_config
from .descriptions import create_empty, differences
from .hub_transfer import download, hub_name
from .tasks import task_of, task_of_config
from .tensor_files import check_values, read_safetensors


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Writes a classifier's, detector's or segmenter's weights and everything that is needed to rebuild it.

    The folder then holds ``model.safetensors`` and ``config.json``, in the form of timm's hub: for a network named in
    timm's registry ``timm.create_model("local-dir:FOLDER")`` reads it too. If it fails or is interrupted, what the
    folder held before is still there. Of weights that have several names each gets a copy.

    Args:
        model: A network made by `timm.create_model`, attached or not, one whose `architecture` is given, or what
            `mrla.dense.detector` and `segmenter` make of them, which takes `class_names` alone.
        folder: Where to write; other files in it are left alone.
        state_dict: Weights to write in place of the network's own, such as an average or an earlier epoch's.
        architecture: Name to rebuild it by, needed only where timm did not make it: ``"torchvision/resnet18"``.
        model_args: Arguments that the architecture was built with, where timm has not recorded them.
        class_names: Names of the classes, in the order of the logits; of a detector or segmenter without the
            background, so that the name of label n is at n - 1.
        input_size: Image shape (c, h, w) that the network was trained on.
        mean: Mean of each channel that images are normalised with.
        std: Standard deviation of each channel, by which they are divided after that.

    Returns:
        The folder.

    Raises:
        ValueError: If something is given that its task does not take, or the architecture is not known or does not
            rebuild the network (its modules, what they show of themselves and their eps and rates are compared, too),
            an argument is not JSON, weights are on the meta device, or the folder is not writable.

    Example:
        >>> import mrla, tempfile, timm
        >>> model = mrla.attach(timm.create_model("resnet18", num_classes=2))
        >>> folder = mrla.save(model, tempfile.mkdtemp(), class_names=["cat", "dog"])
        >>> type(mrla.load(folder)).__name__
        'ResNet'
    """
    weights = model.state_dict() if state_dict is None else state_dict
    facts = {"architecture": architecture, "model_args": model_args, "class_names": class_names}
    facts |= {"input_size": input_size, "mean": mean, "std": std}
    facts = {name: value for name, value in facts.items() if value is not None}
    task = task_of(model)
    if foreign := [name for name in facts if name not in task.facts]:
        raise ValueError(
            f"a {task.noun} is saved with what it was built with: got {', '.join(foreign)} too; leave it out "
            f"({task.name} takes {', '.join(task.facts)})"
        )
    config = task.describe(model, weights, facts)
    task.check(config, model, Path(folder) / CONFIG)
    return _write(Path(folder), config, weights)


def _write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """Writes ``config.json`` and ``model.safetensors``, both or neither.

    Args:
        folder: Where; other files in it are left alone.
        config: What `build` needs, and what else is known of the network.
        weights: The weights.

    Returns:
        The folder.

    Raises:
        ValueError: If the description is not JSON, weights are on the meta device, or the folder is not writable.
    """
    try:
        json.dumps(config)
    except TypeError as error:
        raise ValueError(
            f"class_names, input_size, mean and std must be writable as JSON: {error}; pass plain strings and numbers"
        ) from error
    if empty := next((name for name, tensor in weights.items() if tensor.is_meta), None):
        raise ValueError(f"weights must have values to be saved: {empty} is on the meta device; load weights first")
    make_folder(folder)
    _finish(folder)
    sweep(folder)
    # The weights take their place first: whoever has read a config.json finds weights that are as new, and sees by the
    # hash whether they are newer. If the process is killed between the two, the config.json lies ready beside.
    with written_together(folder / WEIGHTS, folder / CONFIG) as (weights_beside, config_beside):
        with room_for(folder / WEIGHTS):
            save_file(_apart(weights), weights_beside)
        tied = {**config["mrla"], WEIGHTS_HASH: _sha256(weights_beside)}
        config_beside.write_text(json.dumps({**config, "mrla": tied}, indent=2) + "\n")
    return folder


def _finish(folder: Path) -> None:
    """Puts the config.json in its place whose weights have taken theirs before their process was killed."""
    if not (folder / WEIGHTS).is_file():
        return
    for path in unfinished(folder / CONFIG):
        with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            if json.loads(path.read_text())["mrla"][WEIGHTS_HASH] == _sha256(folder / WEIGHTS):
                path.replace(folder / CONFIG)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(folder: str | Path, *, allow_nan: bool = False) -> nn.Module:
    """Rebuilds a network that `save` or `mrla.push` has written, in eval mode; no code from there is run.

    Args:
        folder: A folder with ``model.safetensors`` and ``config.json``, or a repository on the Hugging Face Hub as timm
            spells it: ``"hf-hub:owner/name"``, ``"hf-hub:owner/name@revision"``. One that is private is read with the
            token of ``hf auth login`` or ``HF_TOKEN``.
        allow_nan: Whether weights may be NaN, as after a training that diverged.

    Returns:
        The network, with its mixers if it had any, on the CPU and in float32; weights that were saved in lower
        precision keep their values. What is known of its classes and images is in `pretrained_cfg`, as timm has it; of
        a detector or segmenter the names of the classes are in `class_names`.

    Raises:
        ValueError: If the folder or a file is missing or damaged, the weights are of another network or another save
            than the config.json, a weight is NaN, or the hub cannot be reached, has no such repository or does not
            allow it.

    Example:
        >>> import mrla, tempfile, timm
        >>> folder = mrla.save(timm.create_model("resnet18"), tempfile.mkdtemp())
        >>> mrla.load(folder).training
        False
    """
    if (on_hub := hub_name(folder)) is not None:
        folder = download(*on_hub, (CONFIG, WEIGHTS))
    config, weights = _read_saved(folder)
    task = task_of_config(config)
    _check_size(config, weights, Path(folder))
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten below
        model = task.rebuild(config)
    _put_weights(model, weights, Path(folder) / WEIGHTS, task.config_title(config), allow_nan=allow_nan)
    task.check(config, model, Path(folder) / CONFIG)
    task.restore(config, model)
    return model.eval()


def _read_saved(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json of a saved network and the weights that it was written with.

    Args:
        folder: A folder on this machine.

    Returns:
        The content of both.

    Raises:
        ValueError: As `read_config`, or if the weights are missing, damaged or not those of that config.json. A writer
            that is at work is waited for, a second at most.
    """
    path = Path(folder) / WEIGHTS
    for attempt in range(_ATTEMPTS):
        time.sleep(0.2 if attempt else 0)
        config = read_config(folder)
        weights = read_safetensors(path)
        known = (config.get("mrla") or {}).get(WEIGHTS_HASH)
        if known is None or _sha256(path) == known:
            return config, weights
        with suppress(OSError):  # a folder that can only be read
            _finish(Path(folder))
    raise ValueError(
        f"{path} is not what {Path(folder) / CONFIG} was written with: writing was broken off, or one of them was "
        f"changed; save the network again, or, if it was changed on purpose, remove {WEIGHTS_HASH} from {CONFIG}"
    )


_ATTEMPTS = 6


def _check_size(config: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raises where the network that is described is larger than its weights, before memory is taken for it.

    Args:
        config: As `read_config` gives it.
        weights: What was read beside it.
        folder: Where both are from, for errors.

    Raises:
        ValueError: If the plain network has more numbers than there are weights, or cannot be built.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = create_empty(config["architecture"], config.get("model_args") or {})
    # A name can bring mixers that were taken off again.
    own = {name: tensor for name, tensor in plain.state_dict().items() if MIXER not in name.split(".")}
    wanted, found = (sum(tensor.numel() for tensor in state.values()) for state in (own, weights))
    if wanted > found:
        missing = differences(own, weights)
        raise ValueError(
            f"{folder / WEIGHTS} is of another network than {config['architecture']}: {CONFIG} describes {wanted} "
            f"numbers, it has {found} ({missing}); keep it with the config.json that it was saved with"
        )


def _put_weights(
    model: nn.Module, weights: Mapping[str, Tensor], path: Path, name: str, *, allow_nan: bool = False
) -> None:
    """Gives a network weights that were read from a file.

    Args:
        model: The network, which gets them.
        weights: Tensors by name.
        path: The file, for errors.
        name: What the network is called in an error.
        allow_nan: Whether weights may be NaN.

    Raises:
        ValueError: If they are of another network, or one is NaN.
    """
    if found := differences(model.state_dict(), weights):
        raise ValueError(
            f"{path} is of another network than {name} ({found}); keep it with the config.json that it was saved with"
        )
    check_values(weights, path, allow_nan=allow_nan)
    model.load_state_dict(weights)


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the file takes them: dense, and none in the memory of another, as two names of one parameter are."""
    taken: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        memory = tensor.untyped_storage().data_ptr()
        shared, tensor = memory in taken, tensor.contiguous()
        apart[name] = tensor.clone() if shared else tensor
        taken.add(memory)
    return apart
