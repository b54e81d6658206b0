"""The named networks and what they cost."""

from typing import Any

import timm
import torch

from mrla.models import NAMED
from mrla.train.arms import count_parameters

from .measure import count_macs


def list_networks(filter: str = "*") -> list[dict[str, Any]]:
    """Every network that mrla adds to timm's registry, but the twins that tests use.

    Args:
        filter: Pattern of names, such as ``"resnet50*"``.

    Returns:
        For each: ``name``, ``input_size`` (c, h, w), ``parameters`` (``trainable``, ``with_statistics``) and ``macs``
        of one image.

    Raises:
        ValueError: If no name fits.

    Example:
        >>> [network["name"] for network in list_networks("resnet18_cifar*")]
        ['resnet18_cifar', 'resnet18_cifar_mrla_base', 'resnet18_cifar_mrla_light']
    """
    names = [name for name in timm.list_models(filter) if name in NAMED and not name.startswith("test_")]
    if not names:
        raise ValueError(f"no network of mrla fits {filter!r}; `mrla models` lists them all")
    networks = []
    for name in names:
        input_size = NAMED[name].default.input_size
        with torch.device("meta"):  # shapes are all that is needed
            model = timm.create_model(name)
            macs = count_macs(model, input_size)
        networks.append(
            {
                "name": name,
                "input_size": input_size,
                "parameters": count_parameters(model),
                "macs": macs,
            }
        )
    return networks
