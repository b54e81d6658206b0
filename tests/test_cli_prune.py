"""`mrla prune`: what is left of a trained network, what is written of it, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from test_cli import TINY, images_in

import mrla
from mrla.cli import main
from mrla.dense import detector
from mrla.dense import save as save_dense
from mrla.models import mixed_chains

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
QUIET = ["--progress", "false", "--machine.accelerator", "cpu", "--machine.threads", "1"]
ANY = ["--margin", "100"]
"""Any network keeps it: what is asked for is taken off."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", "--arm", "light", *TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run, for what is written into it."""
    return shutil.copytree(trained, tmp_path / "run")


def mixed(model) -> list[str]:
    return [block for chain in mixed_chains(model) for block in chain.mixers]


def test_what_is_left_is_saved_evaluated_and_recorded(run, capsys):
    whole = mixed(mrla.load(run))
    assert main(["prune", str(run), "--keep", "3", *ANY, *QUIET]) == 0
    printed = capsys.readouterr().out
    record = json.loads((run / "pruned" / "prune.json").read_text())
    assert f"3 of {len(whole)} mixers stay" in printed
    assert "run/pruned/model.safetensors" in printed
    assert mixed(mrla.load(run / "pruned")) == record["kept"]
    assert len(record["kept"]) == 3
    assert set(record["kept"]) | set(record["removed"]) == set(whole)
    assert record["keep"] == 3
    assert record["images"] == {"max_images": 1000, "source": "digits, val part"}
    assert record["command"].startswith("mrla prune ")
    for scores in (record["before"], record["after"]):
        assert f"{scores['loss']:.4f}" in printed
        low, high = (100 * scores["accuracy_interval"][end] for end in ("low", "high"))
        assert f"{100 * scores['accuracy']:.2f} ({low:.2f} to {high:.2f})" in printed
    assert record["margin"] == 100
    assert [step["shown"] for step in record["steps"]] == [True]
    assert record["verdict"] in " ".join(printed.split())
    assert record["note"] in " ".join(printed.split())
    assert main(["eval", str(run / "pruned"), "--machine.threads", "1"]) == 0  # with the run's own images
    assert f"{record['after']['accuracy']:.4f}" in capsys.readouterr().out


def test_a_checkpoint_file_keeps_names_and_normalisation(run):
    assert (
        main(["prune", str(run / "checkpoints" / "last.ckpt"), "--keep", "1", "--max_images", "60", *ANY, *QUIET]) == 0
    )
    facts = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    found = json.loads((run / "pruned" / "config.json").read_text())["pretrained_cfg"]
    assert found["label_names"] == [str(digit) for digit in range(10)]
    assert {name: found[name] for name in ("mean", "std", "input_size")} == {
        name: facts[name] for name in ("mean", "std", "input_size")
    }


def test_a_pruned_network_elsewhere_knows_its_images(run, tmp_path, capsys):
    out = tmp_path / "smaller"
    assert main(["prune", str(run), "--keep", "2", "--max_images", "60", "--out", str(out), *ANY, *QUIET]) == 0
    assert main(["eval", str(out), "--machine.threads", "1"]) == 0
    assert "val part, 449 images" in " ".join(capsys.readouterr().out.split())


def test_torchvisions_networks_and_other_images(tmp_path, capsys):
    model = mrla.attach(torchvision.models.squeezenet1_1(num_classes=2), "base", init="released")
    facts = {"class_names": ["cat", "dog"], "mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": (3, 32, 32)}
    mrla.save(model, "mine", architecture="torchvision/squeezenet1_1", model_args={"num_classes": 2}, **facts)
    root = images_in(tmp_path / "images")
    where = ["--data.kind", "folder", "--data.root", str(root), "--data.workers", "0"]
    kept = mixed(model)[-1]
    assert main(["prune", "mine", "--keep", kept, "--out", "less", *where, *ANY, *QUIET]) == 0
    assert mixed(mrla.load("less")) == [kept]
    assert main(["prune", "mine", "--keep", "0", "--out", "plain", *where, *ANY, *QUIET]) == 0
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(mrla.load("plain")(image), mrla.detach(mrla.load("mine"))(image))


def test_a_folder_that_prune_wrote_is_replaced_when_asked_and_no_other(run, capsys):
    words = ["prune", str(run), "--keep", "2", "--max_images", "60", *ANY, *QUIET]
    pruned, names = run / "pruned", {"model.safetensors", "config.json", "prune.json"}
    pruned.mkdir()
    (pruned / "note.txt").write_text("mine")
    assert main(words) == 2
    assert "holds 1 entries; choose another --out\n" in capsys.readouterr().err
    assert main([*words, "--overwrite", "true"]) == 2
    assert "only a folder that the same command wrote is replaced" in capsys.readouterr().err
    assert [path.name for path in pruned.iterdir()] == ["note.txt"]
    (pruned / "note.txt").unlink()
    assert main(words) == 0
    before = (pruned / "prune.json").stat().st_mtime_ns
    assert main(words) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "true", "--keep", "nothing"]) == 2
    assert (pruned / "prune.json").stat().st_mtime_ns == before
    assert main([words[0], "--overwrite", *words[1:]]) == 0  # alone, also where what follows is no flag
    assert {path.name for path in pruned.iterdir()} == names
    assert (pruned / "prune.json").stat().st_mtime_ns > before
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (".", "must not be the current folder"),
        ("..", "must not be the current folder or one above it"),
        ("{run}", "must not be or hold what is read"),
        ("{above}", "must not be or hold what is read"),
        ("link", "must not be or hold what is read"),
        ("other", "holds other results is not replaced"),
    ],
)
def test_no_folder_with_something_else_in_it_is_ever_replaced(run, out, said, capsys):
    """Each would be taken for a folder of ours by what lies in it."""
    run = shutil.copytree(run, Path("runs") / "a")
    Path("link").symlink_to(run.parent.resolve())
    Path("other/run").mkdir(parents=True)
    for place in (Path(), run, run.parent, Path("other")):
        (place / "prune.json").write_text("{}")
    Path("other/run/run.json").write_text("{}")
    there = sorted(Path.cwd().rglob("*"))
    words = ["--out", out.format(run=run, above=run.parent), "--overwrite", "true", "--keep", "2", *QUIET]
    assert main(["prune", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(Path.cwd().rglob("*")) == there


def test_48_images_take_nothing_off_and_nothing_is_written(run, capsys):
    there = sorted(run.rglob("*"))
    assert main(["prune", str(run), "--max_images", "48", *QUIET]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "8 of 8 mixers stay" in printed
    assert re.search(
        r"All 8 mixers stay: .* shown to lose [a-z]+ than 0\.5 points of accuracy: .* [\d,]+ images", printed
    )
    assert "The same images chose what is cut and judged it" in printed
    assert printed.endswith("Nothing is written.")
    assert sorted(run.rglob("*")) == there


def test_what_is_asked_for_is_refused_beyond_the_margin_with_its_score(run, capsys):
    there = sorted(run.rglob("*"))
    assert main(["prune", str(run), "--keep", "0", "--max_images", "48", *QUIET]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "mrla: error: what is left must be shown to lose less than the margin: without 8 of 8 mixers"
    )
    assert error.count("\n") == 1
    assert re.search(r"accuracy is \d+\.\d\d % \(95 % interval [\d.]+ to [\d.]+\) in place of", error)
    assert sorted(run.rglob("*")) == there
    enough = re.search(r"allow more with --margin ([\d.]+)$", error.strip())
    assert enough
    words = ["prune", str(run), "--keep", "0", "--max_images", "48", *QUIET]
    assert main([*words, "--margin", f"{float(enough[1]) - 0.1:.1f}"]) == 2
    assert main([*words, "--margin", enough[1]]) == 0
    record = json.loads((run / "pruned" / "prune.json").read_text())
    assert record["kept"] == []
    assert record["steps"][0]["images"] == 48


REFUSED = {
    "no checkpoint": (["nowhere"], "nowhere does not exist"),
    "no mixers": (["plain"], "the network must have mixers: plain has none; mrla.attach"),
    "a detector": (["found"], "the network must be a classifier: found is a detector"),
    "unknown images": (["mine"], "name them, such as --data.kind folder --data.root DIR"),
    "the hub without out": (["hf-hub:me/it"], "out must be given for a network on the hub"),
    "too many": (["run", "--keep", "99"], "keep must be from 0 to 8, the mixers of this network: got 99"),
    "another block": (["run", "--keep", "layer9"], "paths of blocks with a mixer: got 'layer9'"),
    "no margin": (["run", "--margin", "-1"], "margin must be the points of accuracy that may be lost, from 0 to 100"),
    "no image": (["run", "--max_images", "0"], "max_images must be at least 1, or None for all: got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_line_and_exit_code_2(case, run, capsys):
    plain = timm.create_model("test_resnet", num_classes=2)
    if case == "no mixers":
        mrla.save(plain, "plain")
    if case == "a detector":
        save_dense(detector("fcos", mrla.attach(plain), num_classes=2), "found", class_names=["cat"])
    if case == "unknown images":
        mrla.save(mrla.attach(plain), "mine")
    words, message = REFUSED[case]
    assert main(["prune", *words, *QUIET]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mrla: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(Path().glob("**/pruned"))
