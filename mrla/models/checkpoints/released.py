"""Checkpoints of the released code and of the Paddle notebook, in our networks."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mrla.files.atomic_write import sweep, written_whole
from mrla.messages.suggestions import nearest

from .descriptions import differences, network_arguments
from .store import save
from .tensor_files import check_values, read_state_dict

# Whole parts of a dotted name, and what they are called here. Wq stands in <block>.mrla.mrla.Wq, its BatchNorm beside
# the block's mixer as bn_mrla.
_RELEASED_RESNET = {
    "mrla.lambda_t": "mrla.decay",
    "mrla.mrla.Wq.weight": "mrla.query_weight",
    "mrla.mrla.Wk.weight": "mrla.key_weight",
    "mrla.mrla.Wv.weight": "mrla.value_weight",
    "bn_mrla": "mrla.norm",
    "la.Wq.weight": "mrla.query_weight",
    "la.Wk.weight": "mrla.key_weight",
    "la.Wv.weight": "mrla.value_weight",
    "bn_la": "mrla.norm",
    "se.fc.0": "se.fc1",
    "se.fc.2": "se.fc2",
    "eca.conv": "se.conv",
}
_RELEASED_BASE = {**_RELEASED_RESNET, **{f"stages.{stage}": f"layer{stage + 1}" for stage in range(4)}}
_RELEASED_DEIT = {**_RELEASED_RESNET, "mrla.normx": "mrla.input_norm", "mrla.normo": "mrla.shortcut_norm"}
_NOTEBOOK = {
    "mrla.lambda_t": "mrla.decay",
    "mrla.mla.convq.weight": "mrla.query_weight",
    "mrla.mla.convk.weight": "mrla.key_weight",
    "mrla.mla.convv.weight": "mrla.value_weight",
    "mrla_bn": "mrla.norm",
    "_mean": "running_mean",
    "_variance": "running_var",
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """How the checkpoints of one kind of foreign code are read.

    Attributes:
        network: The same network in timm's registry.
        names: Parts of dotted names there, and what they are here.
        transposed: Linear layers that are stored as [in, out], as Paddle stores them.
        head: The classifier's path, whose weight gives the number of classes.
    """

    network: str
    names: Mapping[str, str] = field(repr=False)
    transposed: tuple[str, ...] = ()
    head: str = "fc"


def _references() -> dict[str, Reference]:
    released = {
        f"{backbone}_mrla{letter}": Reference(network=f"{backbone}{stem}_mrla_{method}", names=names)
        for backbone in ("resnet50", "resnet101")
        for letter, stem, method, names in (("l", "", "light", _RELEASED_RESNET), ("b", "c", "base", _RELEASED_BASE))
    }
    transformers = {
        f"deit_mrla{letter}_{size}_patch16_224": Reference(
            network=f"deit_{size}_patch16_224_mrla_{method}", names=_RELEASED_DEIT, head="head"
        )
        for size in ("tiny", "small", "base")
        for letter, method in (("l", "light"), ("b", "base"))
    }
    notebook = {
        f"paddle_{backbone}_mrla": Reference(
            network=f"{backbone}_cifar_mrla_light", names=_NOTEBOOK, transposed=("fc",)
        )
        for backbone in (*(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)), "resnext50_32x4d", "wide_resnet50_2")
    }
    baseline = {"paddle_resnet18": Reference(network="resnet18_cifar", names=_NOTEBOOK, transposed=("fc",))}
    return {**released, **transformers, **notebook, **baseline}


REFERENCES = _references()
"""What `load_reference` knows, by the name of the architecture."""


def load_reference(
    arch: str, checkpoint: str | Path | Mapping[str, Any], *, allow_nan: bool = False, **overrides: Any
) -> nn.Module:
    """Loads a checkpoint of the released code or of the Paddle notebook into our network: the same logits.

    Args:
        arch: The foreign name: ``resnet50_mrlal``, ``resnet101_mrlal`` (light), ``resnet50_mrlab``, ``resnet101_mrlab``
            (base), ``deit_mrla{l,b}_{tiny,small,base}_patch16_224``; the notebook's
            ``paddle_resnet{18,34,50,101,152}_mrla``, ``paddle_resnext50_32x4d_mrla``,
            ``paddle_wide_resnet50_2_mrla``, and ``paddle_resnet18``, its baseline.
        checkpoint: A file (``.pth``, ``.pth.tar``, ``.safetensors``, ``.pdparams`` and the like), or a state dict. No
            code in it is run.
        allow_nan: Whether weights may be NaN, as after a training that diverged.
        overrides: Arguments of the network: ``se=True``, ``eca=(5, 5, 5, 7)``, ``img_size=384`` (the position
            embedding is resampled), ``layers``, ``channels``. The number of classes is the checkpoint's. Two options of
            the released code have no weight that would show them, so they are never refused and must be given:
            ``channel_wise`` is ``mixer={"head_dim": 1}``, and dilated stages are ``output_stride=16`` or ``8``.

    Returns:
        The network, in eval mode.

    Raises:
        ValueError: If the architecture is not known, the file cannot be read, a weight is NaN, or the checkpoint is of
            another architecture (the first differences are named).

    Example:
        >>> import timm
        >>> ours = timm.create_model("resnet18_cifar", num_classes=7).state_dict()
        >>> theirs = {name.replace("running_mean", "_mean").replace("running_var", "_variance"): tensor
        ...           for name, tensor in ours.items()}
        >>> theirs["fc.weight"] = theirs["fc.weight"].T  # as Paddle stores it
        >>> load_reference("paddle_resnet18", theirs).num_classes
        7
    """
    if arch not in REFERENCES:
        raise ValueError(f"arch must be one of {', '.join(REFERENCES)}: got {arch!r}{nearest(arch, REFERENCES)}")
    if weights := {"pretrained", "checkpoint_path"} & set(overrides):
        raise ValueError(f"the weights are the checkpoint's: got {', '.join(sorted(weights))} too; leave it out")
    reference = REFERENCES[arch]
    theirs = read_state_dict(checkpoint)
    state = translate(theirs, reference.names, reference.transposed)
    arguments = {**_classes(arch, reference, state, overrides), **overrides}
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten below
            model = timm.create_model(reference.network, **arguments)
    except (TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{arch} cannot be built with {overrides}: {error}; leave out what does not fit it") from error
    _resample_position(model, state, overrides)
    own = model.state_dict()
    for name in own:  # a count of batches that neither Paddle nor older files hold; nothing here reads it
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, own[name])
    if found := _foreign_to_it(theirs, reference.names) or differences(own, state):
        raise ValueError(f"the checkpoint is not one of {arch} ({found}){_hint(state, overrides)}")
    source = "the mapping" if isinstance(checkpoint, Mapping) else checkpoint
    check_values(state, source, allow_nan=allow_nan)
    model.load_state_dict(state)
    return model.eval()


def convert(checkpoint: str | Path, target: str | Path, arch: str, **overrides: Any) -> nn.Module:
    """Writes a checkpoint of the released code or of the notebook with our names, as a folder or a file.

    Args:
        checkpoint: The file to read, as in `load_reference`.
        target: A new or empty folder, which is written as by `mrla.save` and which every command takes; or a
            ``.safetensors`` file to write, whole or not at all.
        arch: The foreign name, as in `load_reference`.
        overrides: As in `load_reference`.

    Returns:
        The network, as `load_reference` gives it. ``timm.create_model(network, ..., checkpoint_path=target)``
        reads the file, whose metadata holds the network's name and arguments; `mrla.load` the folder.

    Raises:
        ValueError: As `load_reference`, or if `target` is neither or cannot be written.

    Example:
        It needs a checkpoint of the released code::

            model = convert("r50.pth.tar", "r50", "resnet50_mrlal")
            same = mrla.load("r50")
    """
    target = Path(target)
    is_file = target.suffix == ".safetensors"
    if not is_file and target.suffix and not target.is_dir():
        raise ValueError(f"what is written is a .safetensors file, or a folder without an ending: got {target}")
    if not is_file and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"the folder to write must be new or empty: {target} is not; choose another")
    model = load_reference(arch, checkpoint, **overrides)
    if not is_file:
        save(model, target)
        return model
    arguments = json.dumps(network_arguments(model))
    metadata = {"format": "pt", "architecture": REFERENCES[arch].network, "model_args": arguments}
    sweep(target.parent)
    with written_whole(target) as beside:
        save_file(model.state_dict(), beside, metadata=metadata)
    return model


def translate(
    state: Mapping[str, Tensor], names: Mapping[str, str], transposed: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """A foreign state dict with our names, shapes and layouts.

    Args:
        state: Foreign names and tensors.
        names: Parts of dotted names, and what they are here.
        transposed: Linear layers that are stored as [in, out]. Their shapes do not say so: many are square.

    Returns:
        Our names and tensors: lambda as (c,), squeeze-and-excitation as 1x1 convolutions.

    Raises:
        ValueError: If two names there stand for one here.

    Example:
        >>> import torch
        >>> theirs = {"0.bn_mrla.weight": torch.ones(4), "0.mrla.lambda_t": torch.ones(4, 1, 1)}
        >>> ours = translate(theirs, REFERENCES["resnet50_mrlal"].names)
        >>> {name: tuple(tensor.shape) for name, tensor in ours.items()}
        {'0.mrla.norm.weight': (4,), '0.mrla.decay': (4,)}
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, kind = name.rpartition(".")
        if path in transposed and kind == "weight" and tensor.ndim == 2:
            tensor = tensor.T
        renamed = _rename(name, names)
        if renamed.endswith("mrla.decay"):
            tensor = tensor.flatten()
        if re.search(r"(^|\.)se\.fc[12]\.weight$", renamed) and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        if renamed in ours:
            raise ValueError(f"two names of the checkpoint stand for {renamed}, one of them {name}: it mixes two codes")
        ours[renamed] = tensor
    return ours


def _rename(name: str, names: Mapping[str, str]) -> str:
    # Whole parts of a dotted name: "la.Wq" must not be found in "mrla.Wq". The longest first.
    parts = "|".join(re.escape(theirs) for theirs in sorted(names, key=len, reverse=True))
    return re.sub(rf"(?:(?<=\.)|^)(?:{parts})(?=\.|$)", lambda found: names[found[0]], name)


def _foreign_to_it(state: Mapping[str, Tensor], names: Mapping[str, str]) -> str:
    """How many names that code does not use, since we use them in their place, and the first five; "" for none."""
    parts = "|".join(re.escape(here) for here in names.values())
    strange = [name for name in state if re.search(rf"(?:(?<=\.)|^)(?:{parts})(?=\.|$)", name)]
    listed = "; ".join(f"{name} is no name of that code" for name in strange[:5])
    return f"{len(strange)} differences: {listed}" if strange else ""


def _classes(
    arch: str, reference: Reference, state: Mapping[str, Tensor], overrides: Mapping[str, Any]
) -> dict[str, int]:
    """The number of classes that the checkpoint's head has, if there is a head to tell it."""
    head = state.get(f"{reference.head}.weight")
    if head is None or head.ndim != 2:
        return {}
    classes = head.shape[0]
    if overrides.get("num_classes", classes) != classes:
        raise ValueError(
            f"the checkpoint of {arch} has {classes} classes: got num_classes={overrides['num_classes']}; load it "
            f"without, then call reset_classifier"
        )
    return {"num_classes": classes}


def _resample_position(model: nn.Module, state: dict[str, Tensor], overrides: Mapping[str, Any]) -> None:
    """Fits the position embedding to an image size that the caller asked for."""
    theirs, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if "img_size" not in overrides or theirs is None or own is None or theirs.shape == own.shape:
        return
    if theirs.ndim == 3 and theirs.shape[2] == own.shape[2]:
        state["pos_embed"] = resample_abs_pos_embed(
            theirs,
            new_size=list(model.patch_embed.grid_size),  # type: ignore[union-attr]
            num_prefix_tokens=model.num_prefix_tokens,  # type: ignore[arg-type]
        )


def _hint(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> str:
    """The remedy where the checkpoint's own names show what was not said."""
    if any(name.endswith("se.fc1.weight") for name in state) and not overrides.get("se"):
        return "; it has squeeze-and-excitation: pass se=True"
    if any(name.endswith("se.conv.weight") for name in state) and not overrides.get("eca"):
        return "; it has efficient channel attention: pass eca=(5, 5, 5, 7) or its kernel sizes"
    return "; name the architecture that it was saved from"
