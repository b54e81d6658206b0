"""How a comparison is repeated, read off its settings: the command, or the call in Python."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from mrla.data.sources import source_class
from mrla.train.recipe import Recipe, as_dict, from_dict
from mrla.train.recipes import RECIPES, get_recipe

_OF_THE_CALLER = ("data", "detector", "batch_size", "model", "model_args", "pretrained")


def repeat_comparison(content: Mapping[str, Any]) -> str:
    """What makes a comparison's runs once more, in a folder of their own.

    Args:
        content: The content of ``compare.json``.

    Returns:
        A command line; for runs of a caller's network and loaders, or of a recipe that has no name here, Python code.

    Example:
        >>> settings = as_dict(dataclasses.replace(get_recipe("digits_resnet18"), epochs=6, seed=3))
        >>> print(repeat_comparison({"recipe": settings, "arms": ["plain", "base"], "seeds": [3, 4]}))
        mrla compare --recipe digits_resnet18 --arms plain,base --seeds 2 --epochs 6 --seed 3 --out runs/again
    """
    settings = content["recipe"]
    own = settings["data"]["kind"] == "loaders"
    if own or settings["recipe"] not in RECIPES:
        return _call(content, own)
    defaults = as_dict(get_recipe(settings["recipe"]))
    words = ["mrla", "compare", "--recipe", settings["recipe"], "--arms", ",".join(content["arms"])]
    words += ["--seeds", str(len(content["seeds"]))]
    kind = settings["data"]["kind"]
    data = defaults["data"]
    if kind != data["kind"]:
        words += ["--data.kind", kind]
        data = json.loads(json.dumps(dataclasses.asdict(source_class(kind)())))  # lists in place of tuples
    words += _flags("data.", settings["data"], data)
    # The arms are given by their own flag, and the data's flags depend on their kind.
    rest = {name: value for name, value in settings.items() if name not in ("recipe", "arm", "data")}
    words += _flags("", {**rest, "seed": content["seeds"][0]}, defaults)
    return shlex.join([*words, "--out", "runs/again"])


def _flags(prefix: str, given: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in given.items():
        default = usual.get(name)
        if value == default:
            continue
        if isinstance(value, Mapping) and isinstance(default, Mapping) and name not in ("model_args", "options"):
            words += _flags(f"{prefix}{name}.", value, default)
        else:
            words += [f"--{prefix}{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def _call(content: Mapping[str, Any], own: bool) -> str:
    settings = {**content["recipe"], "seed": content["seeds"][0]}
    usual = get_recipe(settings["recipe"]) if settings["recipe"] in RECIPES else None
    lines, network = ["import mrla"], ""
    if own:
        # The network and the loaders are the caller's, so what a recipe says of them does not matter.
        stand_in = as_dict(usual or get_recipe("finetune"))
        network = "model=model, train_loader=train_loader, val_loader=val_loader, "
        lines.append(f"# model: a plain {settings['model']!r}; loaders: in batches of {settings['batch_size']!r}")
        settings |= {name: stand_in[name] for name in _OF_THE_CALLER}
    lines += _python(from_dict(settings), usual)
    named = f"arms={list(content['arms'])!r}, seeds={len(content['seeds'])}"
    return "\n".join([*lines, f'mrla.compare(recipe, {network}{named}, out="runs/again")'])


def _python(recipe: Recipe, usual: Recipe | None) -> list[str]:
    """A recipe as code: what differs from `usual`, or everything."""
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    if usual is not None:
        values = {name: value for name, value in values.items() if name != "arm" and value != getattr(usual, name)}
    kinds = {type(value) for value in values.values() if dataclasses.is_dataclass(value)}
    imports = {f"from {kind.__module__} import {kind.__name__}" for kind in kinds}
    arguments = ", ".join(f"{name}={value!r}" for name, value in values.items())
    if usual is None:
        return [*sorted(imports | {"from mrla.train import Recipe"}), f"recipe = Recipe({arguments})"]
    made = f"get_recipe({recipe.recipe!r})"
    if arguments:
        imports |= {"from dataclasses import replace"}
        made = f"replace({made}, {arguments})"
    return [*sorted(imports | {"from mrla.train import get_recipe"}), f"recipe = {made}"]
