"""The README's code runs as it is printed; only weights that would be downloaded have a stand-in."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from mrla.cli import COMMANDS, main

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
COMMAND_LINES = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.mark.sweep
def test_python_blocks_run_in_order(monkeypatch, tmp_path):
    create_model = timm.create_model

    def without_download(name, pretrained=False, **arguments):
        return create_model(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", without_download)
    monkeypatch.chdir(tmp_path)
    images = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 10)
    loader = DataLoader(images, batch_size=4)
    names = {"train_loader": loader, "val_loader": loader, "names": [str(digit) for digit in range(10)]}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert (tmp_path / "runs" / "mine" / "model.safetensors").is_file()


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if line.startswith("mrla ")])
def test_commands_are_understood(line, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    name, *words = shlex.split(line)[1:]
    assert name in COMMANDS
    # These have no configuration to print; the checkpoint is the reader's own.
    if name in ("eval", "convert", "predict", "explain", "prune", "export"):
        assert main([name, *words]) == 2
        assert re.search("does not exist|cannot be read", capsys.readouterr().err)
        return
    assert main([name, *words, "--print_config"]) == 0
    printed = capsys.readouterr().out
    for flag, value in zip(words[::2], words[1::2], strict=True):
        assert re.search(rf"^ *{flag.lstrip('-').split('.')[-1]}: {re.escape(value)}$", printed, re.MULTILINE), flag


def test_both_set_up_commands_install_an_extra_that_exists():
    import tomllib

    extras = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = [re.search(r"pip install (?:-e )?'\.\[([\w,]+)\]'", line) for line in COMMAND_LINES]
    found = {extra for match in installs if match for extra in match[1].split(",")}
    assert found == {"train", "fast", "dense", "export", "test"}
    assert found <= set(extras)


def test_keys_of_compare_json_are_listed():
    from mrla.analysis.statistics import PairedDifference

    listed = set(re.findall(r"`(\w+)`", TEXT))
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_accuracy_top5", "figure"} <= listed
    assert set(PairedDifference.__dataclass_fields__) - {"baseline", "arm"} <= listed


def test_pictures_are_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT):
        assert (README.parent / path).is_file(), path
