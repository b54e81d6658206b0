"""Which parameters of a network are new to it, and groups of them for an optimizer."""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from mrla.ops import LayerMixer


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    old_lr_scale: float = 0.1,
    decay_vectors: bool = False,
    new: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Groups of a network's parameters for any torch optimizer: the new ones at full pace, the trained ones slower.

    New are the mixers, the classifier, and what `new` names. Vectors (norms, biases, lambda, scales) and what the
    network lists in `no_weight_decay()` are not decayed. Frozen parameters are left out.

    Args:
        model: A network, attached or not.
        lr: Learning rate of the new parameters.
        weight_decay: Weight decay of matrices and kernels.
        old_lr_scale: Learning rate of all other parameters, as a multiple of `lr`.
        decay_vectors: Whether everything is decayed, as in the released code and the notebook.
        new: Patterns of further names that count as new, such as ``"layer4.*"``.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``, those of new parameters first, none of them empty; those
        that would get the same numbers are one.

    Raises:
        ValueError: If a number is out of range, a pattern fits no parameter, or nothing is trainable.

    Example:
        >>> import mrla, timm, torch
        >>> model = mrla.attach(timm.create_model("resnet18", num_classes=5))
        >>> optimizer = torch.optim.AdamW(mrla.param_groups(model, lr=1e-3, weight_decay=0.05))
        >>> [(round(group["lr"], 6), group["weight_decay"]) for group in optimizer.param_groups]
        [(0.001, 0.05), (0.001, 0.0), (0.0001, 0.05), (0.0001, 0.0)]
    """
    for name, value in (("lr", lr), ("old_lr_scale", old_lr_scale)):
        if not value > 0:
            raise ValueError(f"{name} must be positive: got {value}; to freeze parameters set requires_grad=False")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be zero or more: got {weight_decay}")
    fresh = new_parameters(model, new)
    never_decayed: set[str] = set()
    if callable(listed := getattr(model, "no_weight_decay", None)):
        never_decayed = set(listed())  # type: ignore[call-overload]
    parts: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            old = name not in fresh and old_lr_scale != 1
            undecayed = not decay_vectors and (parameter.ndim <= 1 or name in never_decayed)
            parts.setdefault((old, undecayed), []).append(parameter)
    if not parts:
        raise ValueError(f"this {type(model).__name__} must have a parameter to train: all of them are frozen")
    return [
        {
            "params": parts[old, undecayed],
            "lr": lr * old_lr_scale if old else lr,
            "weight_decay": 0.0 if undecayed else weight_decay,
        }
        for old, undecayed in sorted(parts)
    ]


def new_parameters(model: nn.Module, patterns: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The parameters that a trained network did not have: those of its mixers, its classifier, and `patterns`.

    Args:
        model: A network, attached or not.
        patterns: Patterns of further names.

    Returns:
        The parameters by name.

    Raises:
        ValueError: If a pattern fits no parameter.

    Example:
        >>> import timm
        >>> list(new_parameters(timm.create_model("resnet18")))
        ['fc.weight', 'fc.bias']
    """
    inside = {id(parameter) for part in new_modules(model) for parameter in part.parameters()}
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"every pattern of new must fit a parameter's name: {pattern!r} fits none")
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in inside or any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def new_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The mixers of a network, and its classifier, if it has one."""
    yield from (module for module in model.modules() if isinstance(module, LayerMixer))
    yield from classifiers(model)


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers of a network that make logits: timm's `get_classifier()`, or the last one of torchvision's head.

    Args:
        model: Any network.

    Returns:
        None for a network without; two for a distilled DeiT.

    Example:
        >>> import torchvision
        >>> classifiers(torchvision.models.resnet18(num_classes=2))
        [Linear(in_features=512, out_features=2, bias=True)]
    """
    if callable(get := getattr(model, "get_classifier", None)):
        found: Any = get()
        return _with_parameters(found if isinstance(found, (tuple, list)) else (found,))
    # What torchvision calls so may be several layers, of which all but the last were trained for any classes.
    heads = _with_parameters(getattr(model, name, None) for name in ("fc", "classifier", "heads", "head"))[:1]
    return [layer for head in heads for layer in _with_parameters(head.modules())][-1:]


def _with_parameters(parts: Iterable[Any]) -> list[nn.Module]:
    return [part for part in parts if isinstance(part, nn.Module) and any(True for _ in part.parameters())]
