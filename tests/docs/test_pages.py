"""Every code block of the documentation runs, page by page and in order, as it is printed.

What a reader would have (photographs, a trained network, a notebook's archive) is made small by hidden comments:

    <!-- setup                      Python, run before the block behind it; the functions of scenes.py are known,
                                   and `cifar_archive(FOLDER)`
    photos("photos")
    -->
    <!-- run with: --epochs 1 -->   words added to each mrla command of the block behind it
    <!-- not run: why -->           the block behind it is looked at (its commands, their flags), not run
    <!-- file: my_method.py -->     the block behind it is written to that file, which commands and imports then read
"""

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import scenes
from small_cifar import make_cifar
from torchvision.datasets import CIFAR10

from mrla.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if not {"_build", "notebooks", "generated"} & set(path.parts) and path.name != "README.md"
)
BLOCK = re.compile(
    r"<!-- setup\n(?P<setup>.*?)\n-->|<!-- (?P<option>run with|not run|file): (?P<words>.*?) -->|"
    r"^(?P<fence>```+)(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A piece of a page that can run.

    Attributes:
        language: ``python``, ``bash``, ``setup`` or ``file``.
        code: Its lines.
        more: Words for its commands; of a file its name.
        runs: Whether it is run.
    """

    language: str
    code: str
    more: str = ""
    runs: bool = True


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page that can run, in order."""
    found, more, runs, file = [], "", True, ""
    for match in BLOCK.finditer(text):
        if match["setup"] is not None:
            found.append(Block("setup", match["setup"]))
        elif match["option"] == "run with":
            more = match["words"]
        elif match["option"] == "not run":
            runs = False
        elif match["option"] == "file":
            file = match["words"]
        else:
            if file:
                found.append(Block("file", match["code"], file))
            elif match["language"] in ("python", "bash"):
                found.append(Block(match["language"], match["code"], more, runs))
            more, runs, file = "", True, ""
    return found


def run_commands(block: Block) -> None:
    """Runs the commands of mrla in a block; of others it is looked at what they name."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["mrla"]:
            check_other_command(line)
            continue
        name, *rest = words[1:]
        assert name in COMMANDS or name.startswith("--"), line
        if block.runs:
            assert main([name, *rest, *shlex.split(block.more)]) == 0, line
        else:
            check_flags(name, rest)


def check_flags(name: str, words: list[str]) -> None:
    """Looks whether a command that is not run would understand its words."""
    if name in ("compare", "train"):
        assert main([name, *words, "--print_config"]) == 0
    else:
        assert main([name, *words]) in (0, 2)


def check_other_command(line: str) -> None:
    """Looks whether the extras that are installed, and the scripts that are called, exist."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"pip install.*?\[([\w,]+)\]", line):
        assert set(names.split(",")) <= set(extras), line
    for script in re.findall(r"python ((?:benchmarks|docs|tests)/\S+\.py)", line):
        assert (ROOT / script).is_file(), line


@pytest.mark.sweep
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_blocks_run_in_order(page, in_an_empty_folder, without_downloads, runs_in_one_process, monkeypatch):
    def cifar_archive(folder: str) -> None:
        make_cifar(Path(folder), CIFAR10, monkeypatch, per_file=8)

    monkeypatch.syspath_prepend(Path.cwd())  # as for a script in that folder
    names: dict[str, Any] = {name: made for name, made in vars(scenes).items() if not name.startswith("_")}
    names["cifar_archive"] = cifar_archive
    for number, block in enumerate(blocks_of(page.read_text()), start=1):
        if block.language == "bash":
            run_commands(block)
        elif block.language == "file":
            Path(block.more).write_text(block.code)
        elif block.runs:
            exec(compile(block.code, f"{page.name}, block {number}", "exec"), names)


def test_pages_are_found():
    assert len(PAGES) > 2
    text = "<!-- setup\nx = 1\n-->\n<!-- run with: --epochs 1 -->\n```bash\nmrla train\n```\n\n```python\nx\n```\n"
    text += "<!-- file: a.toml -->\n```toml\n[a]\n```\n"
    assert blocks_of(text) == [
        Block("setup", "x = 1"),
        Block("bash", "mrla train\n", "--epochs 1"),
        Block("python", "x\n"),
        Block("file", "[a]\n", "a.toml"),
    ]
