"""The pages of the reference that are read off the code: names, commands, recipes, families, benchmarks."""

import importlib
import inspect
import json
import re
import sys
import types
from argparse import Action
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from jsonargparse import ArgumentParser
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
GENERATED = DOCS / "reference" / "generated"

MODULES = {
    "mrla": "What most programs need",
    "mrla.ops": "The operators and the mixers",
    "mrla.models": "Mixers in networks, networks as files",
    "mrla.data": "Images",
    "mrla.dense": "Detectors and segmenters",
    "mrla.deploy": "Folded networks and exported files",
    "mrla.train": "Recipes and runs",
    "mrla.analysis": "Comparing, explaining, pruning, measuring",
}
"""The modules whose names are public, in the order of the reference."""


def public_names(module_name: str) -> dict[str, Any]:
    """The public objects of a module by name: what its file or its table of later imports offers."""
    module = importlib.import_module(module_name)
    names = [*vars(module), *getattr(module, "_LATER", ())]
    objects = {name: getattr(module, name) for name in dict.fromkeys(names) if not name.startswith("_")}
    return {
        name: found
        for name, found in objects.items()
        if not isinstance(found, types.ModuleType) and name not in ("TYPE_CHECKING", "Any", "import_module")
    }


def documented_names() -> dict[str, dict[str, Any]]:
    """For each module the public names that it is documented with: an object that two modules have, with the first."""
    seen: dict[int, str] = {}
    pages: dict[str, dict[str, Any]] = {}
    for module_name in MODULES:
        pages[module_name] = {}
        for name, found in public_names(module_name).items():
            if seen.setdefault(id(found), module_name) == module_name:
                pages[module_name][name] = found
    return pages


def _module_page(module_name: str, title: str, own: dict[str, Any]) -> str:
    lines = [module_name, "=" * len(module_name), "", f"{title}.", "", f".. module:: {module_name}", ""]
    elsewhere = [name for name in public_names(module_name) if name not in own]
    if elsewhere:
        lines += ["Also here: " + ", ".join(f"`mrla.{name}`" for name in sorted(elsewhere)) + ".", ""]
    for name, found in own.items():
        if inspect.isclass(found):
            lines += [f".. autoclass:: {module_name}.{name}", *_members(found), ""]
        elif inspect.isroutine(found):
            lines += [f".. autofunction:: {module_name}.{name}", ""]
        else:
            lines += [f".. data:: {module_name}.{name}", "", *(f"   {line}" for line in constant_text(name, found)), ""]
    return "\n".join(lines)


def _members(found: type) -> list[str]:
    """The option that names a class's own methods and properties; its fields are in the docstring's ``Attributes``."""
    names = [
        name
        for name, member in vars(found).items()
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, (classmethod, staticmethod, property)))
        and inspect.getdoc(getattr(found, name))
    ]
    return [f"   :members: {', '.join(names)}"] if names else []


def constant_text(name: str, found: Any) -> list[str]:
    """The lines of the string that stands below a constant where it is defined; none where there is no such string."""
    for module_name, module in sorted(sys.modules.items()):
        if module_name.partition(".")[0] == "mrla" and vars(module).get(name) is found:
            texts = ModuleAnalyzer.for_module(module_name).find_attr_docs()
            if ("", name) in texts:
                return texts["", name]
    return []


class _Built(Exception):
    """A parser was built and would have parsed."""

    def __init__(self, parser: ArgumentParser):
        super().__init__()
        self.parser = parser


def parser_of(name: str) -> ArgumentParser:
    """The parser that a command builds, before it parses."""
    from mrla.cli import COMMANDS

    def stop(parser: ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Built(parser)

    with mock.patch.object(ArgumentParser, "parse_args", stop):
        try:
            COMMANDS[name]([])
        except _Built as built:
            return built.parser
    raise RuntimeError(f"mrla {name} has parsed nothing")


def _flags(parser: ArgumentParser) -> Iterator[tuple[str, list[Action]]]:
    """The groups of a parser with their flags; those that every parser has are left out."""
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help != "==SUPPRESS==" and action.dest not in ("help", "print_config")
        ]
        if actions:
            yield (group.title or "options", actions)


def _default(action: Action) -> str:
    value = action.default
    if value is None or value == "==SUPPRESS==":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _cell(text: str) -> str:
    """A table's cell: bars escaped, lines joined, the code of docstrings in single backticks, flags as code."""
    line = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
    return re.sub(r"(?<![\w`-])--[a-z_.]+", r"`\g<0>`", line)


def _command_page() -> str:
    from mrla.cli import COMMANDS

    lines = ["# Commands", "", "Read off the parsers. `mrla COMMAND --help` prints the same.", ""]
    lines += [
        "Every command ends with 0, or after one line on standard error with 2, 130 (Ctrl-C) or 143 (SIGTERM); `mrla",
        "predict` with 1 where a file could not be read, `mrla export` with 1 where the file differs from the network.",
        "",
    ]
    for name, command in COMMANDS.items():
        parser = parser_of(name)
        lines += [f"## mrla {name}", "", _cell((command.__doc__ or "").split("\n\n")[0]), ""]
        if any(action.dest == "config" for action in parser._actions):
            lines += ["`--print_config` prints all settings as YAML, `--config FILE.yaml` reads them.", ""]
        for title, actions in _flags(parser):
            if title not in ("options", "positional arguments"):
                lines += [f"{title.rstrip(':')}:", ""]
            lines += ["| word | default | meaning |", "|---|---|---|"]
            for action in actions:
                word = action.option_strings[-1] if action.option_strings else str(action.dest).upper()
                default = _default(action)
                shown = f"`{_cell(default)}`" if default else ""
                lines.append(f"| `{word}` | {shown} | {_cell(str(action.help or '').split(' (type:')[0])} |")
            lines.append("")
    return "\n".join(lines)


def _recipe_page() -> str:
    from mrla.train.recipe import as_dict
    from mrla.train.recipes import RECIPES

    lines = [
        "# Recipes",
        "",
        "Every setting of every recipe, read off the code. Each is a flag: `mrla train --recipe NAME --optim.lr 0.05`.",
        "",
    ]
    for name, make in RECIPES.items():
        text = inspect.cleandoc(make.__doc__ or "")
        lines += [f"## {name}", "", text.replace("``", "`"), "", "| setting | value |", "|---|---|"]
        for key, value in as_dict(make()).items():
            entries = value.items() if isinstance(value, dict) and key != "model_args" else [("", value)]
            for part, entry in entries:
                label = f"{key}.{part}" if part else key
                lines.append(f"| `{label}` | `{_cell(json.dumps(entry))}` |")
        lines.append("")
    return "\n".join(lines)


def _families_page() -> str:
    newest = sorted((ROOT / "benchmarks" / "results").glob("attach_coverage_*.json"))[-1]
    content = json.loads(newest.read_text())
    rows: dict[str, dict[str, Any]] = content["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    attached = {name: row for name, row in rows.items() if row.get("chains")}
    lines = [
        "# Families of networks",
        "",
        "What `mrla.attach` does with one small network of each of timm's families and each of torchvision's",
        f"builders: {len(attached)} of {len(rows)} get mixers. Measured by us with {versions};",
        f"`benchmarks/results/{newest.name}` holds all values,",
        "and `python benchmarks/attach_coverage.py` measures again.",
        "",
        "*kept* means: the outputs are the same bit for bit in eval and training mode, in float32 and bfloat16, a",
        "plain checkpoint loads, every new parameter learns, and `detach` gives the plain network back.",
        "",
        "| family | chains | blocks | layout | light | base | exact |",
        "|---|---|---|---|---|---|---|",
    ]
    methods = ("light", "base", "exact")
    for name, row in sorted(attached.items()):
        verdicts = [_promises(row.get(method) or {}) for method in methods]
        lines.append(
            f"| {name} | {row['chains']} | {row['blocks']} | {', '.join(row['layouts'])} | {' | '.join(verdicts)} |"
        )
    lines += ["", "No chain is found in:", ""]
    for name, row in sorted(rows.items()):
        if name not in attached:
            lines.append(f"- {name}: {_reason(row)}")
    return "\n".join(lines) + "\n"


def _reason(row: dict[str, Any]) -> str:
    """What `attach` says of a network without a chain, up to the list of its containers."""
    text = str(row.get("reason") or "no chain").partition(". Its containers")[0]
    return _cell(text.partition("outputs of one shape; ")[2] or text)


def _promises(found: dict[str, str]) -> str:
    broken = [f"{name}: {value}" for name, value in found.items() if value != "kept"]
    return _cell("; ".join(broken)) or ("kept" if found else "-")


def write_pages() -> None:
    """Writes every generated page; one that is the same already is left alone, so that it is not read anew."""
    pages = {"commands.md": _command_page(), "recipes.md": _recipe_page(), "families.md": _families_page()}
    own = documented_names()
    for module_name, title in MODULES.items():
        pages[f"{module_name}.rst"] = _module_page(module_name, title, own[module_name])
    GENERATED.mkdir(parents=True, exist_ok=True)
    for stale in GENERATED.iterdir():
        if stale.name not in pages:
            stale.unlink()
    for name, text in pages.items():
        place = GENERATED / name
        if not place.is_file() or place.read_text() != text:
            place.write_text(text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Writes the pages before Sphinx looks for sources."""
    app.connect("builder-inited", lambda _: write_pages())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
