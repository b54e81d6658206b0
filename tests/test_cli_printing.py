"""What commands print: names as they are, whatever they look like, and streams that are closed, full or odd."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from test_cli import BENCH, TINY, images_in

import mrla
from mrla.cli import main
from mrla.cli.printing import console_of_width

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
SHORT = [*TINY[:2], "--epochs", "1", *TINY[4:]]
NAMES = ["[/x]", "[bold]x[/bold]", "[", ":smile:", "[link=x]a", "$x^$"]
QUIET = ["--machine.accelerator", "cpu", "--machine.threads", "1", "--progress", "false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *SHORT, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_run_may_be_called_anything(trained, name, capsys):
    shutil.copytree(trained, name)
    assert main(["train", *SHORT, "--out", name]) == 0
    printed = capsys.readouterr().out
    assert f"checkpoints are in {name}/" in printed
    assert f"mrla eval {name}\n" in printed
    assert main(["eval", name, *QUIET[:4]]) == 0
    assert f"{name}: val part, 449 images" in " ".join(capsys.readouterr().out.split())
    assert main(["train", *TINY, "--out", name]) == 2
    assert f"error: {name} belongs to a run with other settings" in capsys.readouterr().err


def test_images_and_classes_may_be_called_anything(tmp_path, capsys):
    classes = ["[", "[red]z"]
    model = mrla.attach(timm.create_model("test_resnet", num_classes=2), "light", init="released")
    mrla.save(model, "[b]net", class_names=classes, input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
    Image.fromarray(np.zeros((32, 32, 3), "uint8")).save("[red]z.png")
    assert main(["predict", "[b]net", "[red]z.png", "--out", "[i]drawn", *QUIET]) == 0
    printed = capsys.readouterr().out
    for text in ("[b]net: 1 image", "[red]z.png", "[ ", "[red]z ", "Drawn in [i]drawn/"):
        assert text in printed
    assert json.loads(Path("[i]drawn/predictions.json").read_text())["images"][0]["file"] == "[red]z.png"
    assert main(["export", "[b]net", "--format", "torch_export", "--out", "[u]net.pt2"]) == 0
    printed = capsys.readouterr().out
    assert "[u]net.pt2: torch_export, against the network" in printed
    assert "mrla predict [u]net.pt2 IMAGE" in printed
    root = images_in(tmp_path / "photos", classes=classes)
    data = ["--data.kind", "folder", "--data.root", str(root), "--data.workers", "0"]
    assert main(["explain", "[b]net", "[red]z.png", "--margin", "100", "--out", "[/s]said", *data, *QUIET]) == 0
    printed = capsys.readouterr().out
    assert "[/s]said/report.html" in printed
    assert "mrla prune [b]net" in printed
    assert "[red]z.png" in Path("[/s]said/report.html").read_text()
    assert main(["prune", "[b]net", "--keep", "1", "--margin", "100", "--out", "[/p]", *data, *QUIET]) == 0
    assert "[/p]/model.safetensors" in capsys.readouterr().out
    assert main(["chains", "[b]net"]) == 0
    assert "Chains of [b]net, for a batch" in capsys.readouterr().out
    assert main([*BENCH, "--arms", "plain", "--quantities", "inference", "--out", "[/b]"]) == 0
    assert "[/b]/bench.json" in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["", "wide", "-5", "0", "1.5", "²", "٣"])
def test_columns_that_are_no_number_count_as_none(columns, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    expected = console_of_width().width
    monkeypatch.setenv("COLUMNS", columns)
    assert console_of_width().width == (3 if columns == "٣" else expected)
    monkeypatch.setenv("COLUMNS", "77")
    assert console_of_width().width == 77


def test_closed_streams_in_one_process(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["train", *SHORT[:-2], "--out", str(trained)]) == 0  # asks whether it is a terminal
    assert main(["nonsense"]) == 2
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # to nowhere
        stream.close()


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("| true", 0, ""),
        (">/dev/full", 2, "mrla: error: standard output cannot be written (No space left on device)\n"),
    ],
)
def test_streams_of_a_shell(trained, redirected, code, said):
    words = " ".join(f"'{word}'" for word in [sys.executable, "-m", "mrla.cli", "models", "resnet18*"])
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{words} {redirected}"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stderr) == (code, said)


def test_a_name_that_the_encoding_lacks_is_printed_as_a_number(monkeypatch, tmp_path):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(printed, encoding="ascii"))
    assert main(["eval", "Fäden\udcff"]) == 2
    sys.stderr.flush()
    assert rb"F\xe4den\udcff" in printed.getvalue()
