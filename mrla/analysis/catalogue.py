"""The named networks and what they cost."""

import json
from pathlib import Path
from typing import Any

import timm
import torch

from mrla.models import NAMED, NETWORKS, Chain, SavedNetwork, find_chains, read_config, resolve
from mrla.models.checkpoints.descriptions import create_empty

COUNTS = Path(__file__).parent / "catalogue.json"
"""What `count_network` gives for every network: to build them all takes most of a minute. A test counts anew."""


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
    counts = json.loads(COUNTS.read_text())
    return [{"name": name, "input_size": NAMED[name].default.input_size, **counts[name]} for name in names]


def count_network(name: str) -> dict[str, Any]:
    """What a named network costs, counted on it.

    Args:
        name: Its name in timm's registry.

    Returns:
        ``parameters`` and ``macs``, as `list_networks` has them.

    Example:
        >>> count_network("resnet18_cifar")["parameters"]["trainable"]
        11173962
    """
    from mrla.train.arms import count_parameters

    from .measure import count_macs

    with torch.device("meta"):  # shapes are all that is needed
        model = timm.create_model(name)
        return {"parameters": count_parameters(model), "macs": count_macs(model, NAMED[name].default.input_size)}


def write_counts() -> None:
    """Counts every named network anew and writes `COUNTS`: to be called where one was added or changed."""
    from mrla.files.atomic_write import write_json

    write_json(COUNTS, {name: count_network(name) for name in sorted(NAMED) if not name.startswith("test_")})


def describe_chains(network: str, blocks: str | None = None) -> list[Chain]:
    """The chains that `mrla.attach` finds in a network.

    Args:
        network: A name of timm's registry, torchvision's after ``torchvision/``, a folder that `mrla.save` wrote, or
            ``hf-hub:owner/name``.
        blocks: Pattern of the containers to look at; None for the rule's own choice.

    Returns:
        One chain for each run of blocks, in the order of the network. Of a network with mixers those of the plain one.

    Raises:
        ValueError: If there is no such network, or no chain in it.

    Example:
        >>> [(chain.name, chain.blocks) for chain in describe_chains("convnext_atto")][0]
        ('stages.0.blocks', ('0', '1'))
    """
    source = resolve(network, NETWORKS, what="a network")
    config: dict[str, Any] = {"architecture": network}
    if isinstance(source, SavedNetwork):
        config = read_config(source.place)
    return find_chains(create_empty(config["architecture"], config.get("model_args") or {}), blocks)
