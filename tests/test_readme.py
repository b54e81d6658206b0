"""The README's code runs as it is printed; only weights that would be downloaded have a stand-in."""

import re
import shlex
from pathlib import Path

import pytest

from mrla.cli import COMMANDS, main

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
COMMAND_LINES = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


def test_it_is_short():
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120]


def test_python_blocks_run_in_order(in_an_empty_folder, without_downloads):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("mrla ")])
def test_commands_are_understood(line, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    name, *words = shlex.split(line)[1:]
    assert name in COMMANDS
    # These have no configuration to print; the checkpoint is the reader's own.
    if name == "chains":
        assert main([name, *words]) == 0
        return
    if name in ("eval", "convert", "predict", "explain", "prune", "export"):
        assert main([name, *words]) == 2
        assert re.search("does not exist|cannot be read", capsys.readouterr().err)
        return
    assert main([name, *words, "--print_config"]) == 0
    printed = capsys.readouterr().out
    for flag, value in zip(words[::2], words[1::2], strict=True):
        assert re.search(rf"^ *{flag.lstrip('-').split('.')[-1]}: {re.escape(value)}$", printed, re.MULTILINE), flag


def test_every_command_that_installs_names_extras_that_exist():
    import tomllib

    extras = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = re.finditer(r"pip install (?:-e )?'\.\[([\w,]+)\]'", TEXT)
    found = {extra for match in installs for extra in match[1].split(",")}
    assert found == {"train", "fast", "test", "docs"}
    assert found <= set(extras)


def test_links_and_pictures_are_there():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)", TEXT):
        assert (README.parent / path).is_file(), path
