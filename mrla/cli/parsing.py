"""How words of the command line become options."""

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from mrla.data.sources import DATA_KINDS, source_class
from mrla.messages.one_line import one_line
from mrla.messages.suggestions import nearest
from mrla.train.plugins import load_plugins
from mrla.train.recipe import DetectorOptions, Machine, Recipe, as_dict, from_dict
from mrla.train.recipes import RECIPES, get_recipe

DEFAULT_RECIPE = "digits_resnet18"
PLUGINS = "--plugins"
"""The flag of every command that names a user's own files."""


def command_parser(name: str, command: Callable[..., int]) -> ArgumentParser:
    """A parser of a command's words; the command's docstring is its help."""
    parser = ArgumentParser(prog=f"mrla {name}", description=command.__doc__, exit_on_error=False)
    text = "Python files or modules between commas, imported first: they register methods, images or formats"
    parser.add_argument(PLUGINS, type=str, default=None, help=text)
    return parser


def recipe_parser(
    name: str, words: Sequence[str], command: Callable[..., int], skip: set[str] | None = None
) -> ArgumentParser:
    """A parser of every field of a recipe; which recipe, and which images, must be known before it is made."""
    parser = command_parser(name, command)
    parser.add_argument("--config", action="config", help="A YAML file, as --print_config prints it")
    given = _config_of(words)
    load_plugins(listed(given.get("plugins") or ""))
    named = word_after(words, "--recipe")
    if "--recipe" in words and (named is None or named.startswith("--")):
        raise ValueError(f"--recipe must be one of {', '.join(RECIPES)}: got nothing")
    recipe = get_recipe(named or given.get("recipe") or DEFAULT_RECIPE)
    defaults = as_dict(recipe)
    data = given.get("data")
    kind = word_after(words, "--data.kind") or (data.get("kind") if isinstance(data, dict) else None)
    if kind is not None and kind != recipe.data.kind:
        defaults["data"] = vars(source_class(kind)())
    _check_data_flags(words, defaults["data"]["kind"], recipe.recipe)
    parser.add_argument("--recipe", type=str, default=recipe.recipe, help=f"One of {', '.join(RECIPES)}")
    parser.add_class_arguments(Recipe, None, skip={"recipe", "data", "detector", *(skip or ())})
    if recipe.detector is not None:
        parser.add_class_arguments(DetectorOptions, "detector")
    else:
        del defaults["detector"]
    parser.add_class_arguments(source_class(defaults["data"]["kind"]), "data")
    parser.set_defaults({key: value for key, value in defaults.items() if key not in (skip or ())})
    return parser


def _check_data_flags(words: Sequence[str], kind: str, recipe: str) -> None:
    """Refuses a flag that images of another kind have: the recipe is missing then, or another one is meant."""
    for word in words:
        flag = word.partition("=")[0]
        name = flag.removeprefix("--data.")
        others = [other for other, source in DATA_KINDS.items() if name in _field_names(source)]
        if not flag.startswith("--data.") or kind in others or not others:
            continue
        having = [other for other, make in RECIPES.items() if make().data.kind in others]
        chosen = "" if word_after(words, "--recipe") else ", which is taken where none is named"
        remedy = f"say --data.kind {' or '.join(others)}"
        if having:
            remedy = f"name the recipe with --recipe, one of {', '.join(having)} (finetune for your own images)"
        raise ValueError(f"the images of the recipe {recipe}{chosen}, are {kind} and have no {flag}: {remedy}")


def _field_names(source: Any) -> set[str]:
    return {field.name for field in fields(source)}


def recipe_from(options: Mapping[str, Any]) -> Recipe:
    """The recipe that parsed options make.

    Args:
        options: What `parse` gave for a parser of `recipe_parser`.

    Returns:
        The recipe.

    Raises:
        ValueError: If a field is out of range, or a network for small images is given a folder of any.
    """
    usual = get_recipe(options["recipe"])
    recipe = from_dict({name: options.get(name) for name in as_dict(usual)})
    small = usual.detector is None and not usual.data.own_images
    if small and recipe.data.size_from_network and recipe.model == usual.model:
        raise ValueError(
            f"the recipe {usual.recipe} trains {usual.model}, a network for the small images of {usual.data.kind}, "
            f"from random weights: for a folder of yours take --recipe finetune (a trained network) or --recipe "
            f"imagenet_resnet50 (random weights), or give the small size that is meant, such as --data.size 32"
        )
    return recipe


def fitting_epochs(options: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The options with the recipe's own warm-up and frozen epochs shortened to fewer epochs; what is, is said.

    Args:
        options: What `parse` gave for a parser of `recipe_parser`.
        words: The command line: what was asked for there stays as it is.

    Returns:
        The options.
    """
    epochs, usual = options["epochs"], vars(get_recipe(options["recipe"]).optim)
    names = [
        name
        for name in ("warmup_epochs", "frozen_epochs")
        if 0 < epochs <= options["optim"][name] == usual[name] and _not_given(f"--optim.{name}", words)
    ]
    if not names:
        return options
    shorter = epochs // 2
    said = " and ".join(f"optim.{name} is {shorter} instead of {usual[name]}" for name in names)
    print(f"mrla: to fit into {epochs} epoch{'s' if epochs > 1 else ''}, {said}", file=sys.stderr)
    return {**options, "optim": {**options["optim"], **dict.fromkeys(names, shorter)}}


def _not_given(flag: str, words: Sequence[str]) -> bool:
    return not any(word.partition("=")[0] == flag for word in words)


def parse(parser: ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """Options by name; what cannot be parsed is a ValueError of one line, with the flag or value that was meant."""
    _config_of(words)  # what must not be read is refused before the parser reads it
    try:
        options = parser.parse_args(_with_values(parser, words)).as_dict()
    except ArgumentError as error:
        message = one_line(error)
        if unknown := re.search(r"unrecognized arguments: (--[^\s=]+)", message, flags=re.IGNORECASE):
            flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
            hint = nearest(unknown[1], flags)
            if unknown[1] == "--overwrite":  # other commands have it
                hint = ": runs are never replaced; another --out trains anew"
            raise ValueError(f"{parser.prog} has no flag {unknown[1]}{hint}") from error
        if wrong := re.search(r'Parser key "([\w.]+)": Expected a (.+)\. Got value: (.*)$', message):
            key, rule, given = wrong.groups()
            names = re.findall(r"'([^']*)'", rule) if "Literal" in rule else []
            rule = f"one of {', '.join(names)}" if names else re.sub(r"<class '(\w+)'>", r"\1", rule)
            raise ValueError(f"{key} must be {rule}: got {given!r}{nearest(given, names)}") from error
        raise ValueError(message) from error
    except (OverflowError, RecursionError) as error:  # a number of 400 digits, a list of 1,000 brackets
        raise ValueError(f"{parser.prog}: a value is too large or too deep ({one_line(error)})") from error
    if options.get("out") == "":  # which would be the current folder
        raise ValueError("out must name a file or folder: got ''; leave it out for the one that the command chooses")
    del options["plugins"]  # imported before, see `main`
    return options


def _with_values(parser: ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words, with ``true`` behind each switch that stands alone."""
    switches = {
        flag
        for action in parser._actions
        if getattr(action, "_typehint", None) is bool
        for flag in action.option_strings
    }
    spelled: list[str] = []
    for index, word in enumerate(words):
        spelled.append(word)
        following = words[index + 1].lower() if index + 1 < len(words) else ""
        if word in switches and following not in ("true", "false", "yes", "no", "on", "off", "1", "0"):
            spelled.append("true")
    return spelled


def word_after(words: Sequence[str], flag: str) -> str | None:
    """What a flag is given, before the parser is made that knows it."""
    for index, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and index + 1 < len(words):
            return words[index + 1]
    return None


def again(command: str, words: Sequence[str]) -> str:
    """A command that is suggested behind another one, with the plugins of that.

    Args:
        command: What is suggested.
        words: Those of the command that runs.

    Returns:
        What to type.
    """
    plugins = word_after(words, PLUGINS)
    return f"{command} {PLUGINS} {shlex.quote(plugins)}" if plugins else command


def whole_numbers(flag: str, text: str) -> list[int]:
    """Whole numbers between commas."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{flag} takes whole numbers, such as 1,8,64: got {text!r}") from error


def add_progress_flag(parser: ArgumentParser) -> None:
    """Adds ``--progress``."""
    text = "Whether it is shown how far it has come: a bar on a terminal, else a line a minute"
    parser.add_argument("--progress", type=bool, default=True, help=text)


def _config_of(words: Sequence[str]) -> dict[str, Any]:
    path = word_after(words, "--config")
    if path is None:
        return {}
    import yaml

    try:
        text = Path(path).read_text()
        # An alias stands for all that its anchor holds: nine that hold nine others each would never end.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError(f"--config must be a YAML file without aliases (*name): {path} has one; write it out")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--config must be a YAML file: {path} cannot be read ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config must be a YAML file as --print_config prints it: {path} holds no settings")
    return content


def listed(text: str) -> list[str]:
    """Words between commas; none of an empty text."""
    return [word.strip() for word in text.split(",")] if text.strip() else []


def add_data_flags(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Adds the flags that say what annotated images a trained network is shown, for `shown_data`."""
    kind = word_after(words, "--data.kind")
    parser.add_argument("--split", type=str, default="val", help="val, test or train")
    parser.add_argument("--batch_size", type=int, default=64, help="Images in one batch")
    if kind is not None:
        parser.add_class_arguments(source_class(kind), "data")
    else:
        parser.add_argument("--data.root", type=str, default=None, help="Where the images are, if they have moved")
        parser.add_argument("--data.kind", type=str, default=None, help=f"Other images: {', '.join(DATA_KINDS)}")
        text = "Processes that load images (as many as in training)"
        parser.add_argument("--data.workers", type=int | None, default=None, help=text)


def shown_data(options: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The images that `add_data_flags` asks for, as keywords of what shows them to a network."""
    kind = word_after(words, "--data.kind")
    return {
        "data": source_class(kind)(**options["data"]) if kind is not None else None,
        "root": None if kind is not None else options["data"]["root"],
        "workers": None if kind is not None else options["data"]["workers"],
        "split": options["split"],
        "batch_size": options["batch_size"],
    }


def add_study_flags(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Adds the flags of a command that studies a trained network and writes a folder, for `study_options`."""
    parser.add_argument(
        "--overwrite",
        type=bool,
        default=False,
        help="Whether a folder that this command wrote before is replaced, all of it",
    )
    parser.add_argument("--margin", type=float, default=0.5, help="How many points of accuracy may be lost")
    parser.add_argument("--max_images", type=int, default=1000, help="How many annotated images at most")
    add_data_flags(parser, words)
    parser.add_class_arguments(Machine, "machine")
    add_progress_flag(parser)


def study_options(parser: ArgumentParser, options: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """What `add_study_flags` asks for, and ``--out``, as keywords of what does it; with the command for the record."""
    return {
        "out": options["out"],
        **shown_data(options, words),
        "margin": options["margin"],
        "max_images": options["max_images"],
        "machine": Machine(**options["machine"]),
        "overwrite": options["overwrite"],
        "command": shlex.join([*parser.prog.split(), *words]),
    }
