"""`mrla.explain` and `mrla explain`: what they record, write and refuse."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from known_effects import COLLAPSING, DECISIVE, NARROW, REDUNDANT, images, known_effects
from PIL import Image
from test_effects import awake, batches, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mrla
from mrla.analysis import Picture
from mrla.analysis.explanation import explaining
from mrla.analysis.explanation.checkpoints import explain_checkpoint
from mrla.analysis.explanation.explaining import Origin
from mrla.analysis.explanation.layer_attention_maps import draw_layer_attention
from mrla.cli import main
from mrla.data.sources import Shapes
from mrla.dense import detector
from mrla.dense import save as save_detector
from mrla.models import mixed_chains, recording
from mrla.train import Machine

CPU = Machine(accelerator="cpu", threads=1)


@pytest.fixture(scope="module")
def base_explained():
    torch.manual_seed(0)
    model = awake(network("base", init="released"), "layer3.1")
    return model, mrla.explain(model, batches(), cuts=["mixers", "links", "heads"]).content


def test_means_and_spread_are_those_over_images(base_explained):
    model, content = base_explained
    with torch.no_grad(), recording(model) as heard:
        for shown, _ in batches():
            model(shown)
    assert content["images"] == {"count": 12, "source": "the caller's loader"}
    for chain, (mixed, weights) in zip(content["chains"], heard.attention_over_layers(), strict=True):
        assert (chain["name"], tuple(chain["blocks"])) == (mixed.name, mixed.blocks)
        assert chain["heads"] * chain["head_dim"] == {"layer1": 8, "layer2": 8}.get(mixed.name, 16)
        for found, expected in (
            (chain["mean"], weights.mean((0, 1))),
            (chain["sd"], weights.mean(1).std(0)),
            (chain["by_head"], weights.mean(0)),
        ):
            assert np.allclose(np.array(found, dtype=float), expected, equal_nan=True, atol=1e-5)
    assert len(content["pictures"]) == 4
    first = np.array(content["pictures"][0]["retrieval"][2], dtype=float)
    assert np.allclose(first, heard.attention_over_layers()[2][1][0].mean(0), equal_nan=True, atol=1e-5)


def test_the_rest_of_what_is_found(base_explained):
    _, content = base_explained
    assert (content["model"], content["method"], content["task"]) == ("resnet18", "base", "classification")
    assert content["terms"] is None  # there is no lambda
    assert {kind: len(content["cuts"][kind]) for kind in ("mixers", "links", "heads")} == {
        "mixers": 8,
        "links": 4,
        "heads": 8,
    }
    everything = content["cuts"]["all"]
    assert everything["loss"] == pytest.approx(content["baseline"]["loss"] + everything["loss_change"]["mean"])
    assert content["verdict"][0].endswith("mrla compare measures.")
    assert json.loads(json.dumps(content, allow_nan=False)) == content


EXAMPLES = {
    "redundant": (REDUNDANT, COLLAPSING, 0.5),
    "decisive": (DECISIVE, NARROW, 0.5),
    "few images": ([0.0] * 3, [(48, 3.0, 0.0)], 0.5),
    "few images, a large margin": ([0.0] * 3, [(48, 3.0, 0.0)], 8.0),
    "every cut seen to cost more": ([1.0], NARROW, 0.5),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_explain_and_prune_decide_alike(example):
    given, groups, margin = EXAMPLES[example]
    model, loader = known_effects(given), images(*groups)
    content = mrla.explain(model, loader, cuts=["mixers"], margin=margin).content
    pruned = mrla.prune(model, loader, margin=margin)
    least = content["cuts"]["least"]
    assert least == pruned.steps[0]
    assert least["shown"] == (pruned.removed != ())
    if least["shown"]:
        assert set(least["removed"]) <= set(pruned.removed)
    (sentence,) = (one for one in content["verdict"] if "whose cut costs least" in one)
    assert ("is shown to lose less" in sentence) == least["shown"]
    assert f"{margin:g} points of accuracy" in sentence


def test_the_sentences_say_what_is_shown_and_what_is_not():
    decisive = mrla.explain(known_effects(DECISIVE), images(*NARROW), cuts=["mixers"]).content["verdict"]
    assert decisive[0].startswith(
        "This network relies on its mixers: with all of them cut the accuracy of 60.00 % changes"
    )
    assert "-12.90 points (95 % interval -15.1" in decisive[0]
    assert decisive[1] == (
        "Of 3 mixers, cut alone, 1 is shown to lower the accuracy: blocks.2 (-12.90 points); of 2 neither an effect is "
        "shown nor that there is none."
    )
    few = mrla.explain(known_effects([0.0] * 3), images((48, 3.0, 0.0)), cuts=["mixers"]).content["verdict"]
    assert few[0].startswith(
        "That the mixers do anything is not resolved: with all of them cut the accuracy of 100.00 %"
    )
    assert "95 % interval -7.41 to +7.41" in few[0]
    assert few[1] == "Of 3 mixers, cut alone, none is shown to change anything, nor that it changes nothing."
    assert few[2].endswith("that takes at least 765 images, none of them changed.")
    redundant = mrla.explain(known_effects(REDUNDANT), images(*COLLAPSING), cuts=["mixers"]).content["verdict"]
    assert "Without the mixer of blocks.0, whose cut costs least, the network is shown to lose less" in redundant[2]
    for sentences in (decisive, few, redundant):
        assert "spare" not in " ".join(sentences)


def test_the_first_pictures_are_of_all_classes_and_a_result_is_shown_in_a_few_words():
    """Of images sorted by class, as those of folders are."""
    sorted_images = DataLoader(TensorDataset(torch.randn(12, 3, 32, 32), torch.arange(12) // 4), batch_size=12)
    found = mrla.explain(network(), sorted_images, cuts=[], class_names=["a", "b", "c"])
    names = [picture["file"] for picture in found.content["pictures"]]
    assert names == ["image 1 (a)", "image 2 (a)", "image 5 (b)", "image 9 (c)"]
    assert repr(found).startswith("Explanation(folder=None, model='")
    assert len(repr(found)) < 500
    assert len(repr(Picture(name="x", input=torch.randn(3, 64, 64)))) < 100


def test_of_light_the_terms_and_the_recurrence():
    model = awake(network(init="released"), "layer2.1")
    content = mrla.explain(model, batches(), cuts=[], max_images=7).content
    assert content["cuts"] is None
    assert content["images"]["count"] == 7
    assert [record["block"] for record in content["terms"]] == [b for c in mixed_chains(model) for b in c.mixers]
    for record in content["terms"]:
        assert 0 < record["share"] < 1
        assert record["attention"] > 0
        assert record["carried"] > 0
    decay = model.layer1[1].mrla.decay.detach().abs()
    chain = content["chains"][0]
    assert chain["mean"][0][0] == pytest.approx(float(model.layer1[0].mrla.decay.detach().abs().mean()), rel=1e-5)
    assert chain["mean"][1][1] > float(decay.mean())  # the output of the block before, and its value in it
    assert chain["sd"][0][0] == pytest.approx(0, abs=1e-6)  # lambda is the same for every image
    assert any("lambda term is" in sentence for sentence in content["verdict"])


def test_a_network_that_hears_one_known_block_is_explained_so():
    model = network("base", init="released", heads=1)
    for at in (3, 4):
        mixers = [block.mrla for block in model.get_submodule(f"layer{at}").children()]
        for index, mixer in enumerate(mixers):
            for weight, value in ((mixer.query_weight, 1e4), (mixer.key_weight, -1e4 if index else 1e4)):
                nn.init.zeros_(weight)
                with torch.no_grad():
                    weight[..., weight.shape[-1] // 2] = value
    content = mrla.explain(model, batches(), cuts=[]).content
    for chain in content["chains"][2:]:
        assert chain["mean"] == [[None, 1.0, None], [None, 1.0, 0.0]]
        assert chain["sd"] == [[None, 0.0, None], [None, 0.0, 0.0]]
    assert "layer3.0 (1)" in content["verdict"][0]


def test_the_network_is_left_as_it_was():
    model = network(init="released").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mrla.explain(model, batches(), cuts=["mixers"])
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_written(tmp_path):
    model, calls = network(init="released"), []
    found = mrla.explain(
        model,
        batches(),
        pictures=[Picture(name="one <b>", input=torch.randn(3, 64, 64))],
        class_names=["<i>a", "$b$", "c" * 60],
        out=tmp_path / "out",
        origin=Origin(command="mrla explain x", source="some"),
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "explain.json",
        "looked-at-1.png",
        "report.html",
        "retrieval.png",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert json.loads((tmp_path / "out" / "explain.json").read_text()) == found.content
    assert found.folder == tmp_path / "out"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "one &lt;b&gt;" in page
    assert "<i>a" not in page
    # Three batches, of the whole network, without all mixers, and without each of 8 mixers and 8 links.
    assert calls[-1] == (3 * 18, 3 * 18)
    assert {total for _, total in calls} == {54}
    for name in ("looked-at-1.png", "retrieval.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 300


def test_a_folder_that_explain_wrote_is_replaced_whole_when_asked_and_no_other(tmp_path, monkeypatch):
    model, out = network(), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"new or empty folder: .*out holds 1 entries; choose another --out$"):
        mrla.explain(model, batches(), cuts=[], out=out)
    with pytest.raises(ValueError, match=r"out must be a folder: .*mine.txt is a file"):
        mrla.explain(model, batches(), cuts=[], out=out / "mine.txt")
    with pytest.raises(ValueError, match=r"only a folder that the same command wrote is replaced: .* no explain\.json"):
        mrla.explain(model, batches(), cuts=[], out=out, overwrite=True)
    (out / "mine.txt").unlink()
    mrla.explain(model, batches(), cuts=[], out=out)
    with pytest.raises(ValueError, match="replace it with --overwrite"):
        mrla.explain(model, batches(), cuts=[], out=out)
    (out / "of before").write_text("")
    before = sorted(tmp_path.rglob("*"))

    def broken(*_: object, **__: object):
        raise ValueError("no page")

    with monkeypatch.context() as patch:
        patch.setattr(explaining, "write_report", broken)
        with pytest.raises(ValueError, match="no page"):
            mrla.explain(model, batches(), cuts=[], out=out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    mrla.explain(model, batches(), cuts=[], out=out, overwrite=True)
    assert not (out / "of before").exists()
    assert (out / "explain.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_network_with_no_place_to_look_at_is_explained_without_maps(tmp_path, monkeypatch):
    def none(*_: object, **__: object):
        raise ValueError("needs a module that gives it")

    monkeypatch.setattr(explaining, "draw_cam_overlay", none)
    picture = Picture(name="one", input=torch.randn(3, 32, 32))
    content = mrla.explain(network(), pictures=[picture], cuts=[], out=tmp_path / "out").content
    assert content["pictures"][0]["drawing"] is None
    assert content["pictures"][0]["caption"] == "no activation maps: needs a module that gives it"
    assert "no activation maps" in (tmp_path / "out" / "report.html").read_text()


def test_where_to_look_is_found_once_for_images_of_one_size(tmp_path, monkeypatch):
    asked = []
    found = explaining.cam_target_for
    monkeypatch.setattr(explaining, "cam_target_for", lambda *given: (asked.append(given[2]), found(*given))[1])
    sizes = [(32, 32), (48, 64), (32, 32), (48, 64)]
    pictures = [Picture(name=str(at), input=torch.randn(3, *size)) for at, size in enumerate(sizes)]
    content = mrla.explain(network(), pictures=pictures, cuts=[], out=tmp_path / "out").content
    assert asked == [(3, 32, 32), (3, 48, 64)]
    assert all(one["caption"].endswith("behind layer2") for one in content["pictures"])
    assert all((tmp_path / "out" / one["drawing"]).is_file() for one in content["pictures"])


def test_a_method_that_hears_nobody_is_cut_all_the_same(tmp_path):
    content = mrla.explain(awake(network("dw"), "layer3.1"), batches(), cuts=["mixers"], out=tmp_path / "out").content
    assert content["chains"] == []
    assert content["images"]["count"] == 12
    assert [one["retrieval"] for one in content["pictures"]] == [[]] * 4
    assert sum(abs(one["loss_change"]["mean"]) > 1e-5 for one in content["cuts"]["mixers"]) == 1
    assert not (tmp_path / "out" / "retrieval.png").exists()
    assert (tmp_path / "out" / "report.html").is_file()


def test_pictures_alone(tmp_path):
    model = network("base", init="released")
    pictures = [Picture(name=str(at), input=torch.randn(3, 32, 32)) for at in range(3)]
    content = mrla.explain(model, pictures=pictures, cuts=[]).content
    assert content["images"]["count"] == 3
    assert content["baseline"] is None
    assert len(content["pictures"]) == 3
    spread = [[row, column] for row, column in np.argwhere(np.array(content["chains"][2]["sd"], dtype=float) > 0)]
    assert spread


def test_a_detector_is_heard():
    torch.manual_seed(0)
    options = {"fpn_channels": 16, "box_head_dim": 16}
    backbone = mrla.attach(timm.create_model("test_resnet"), "base", init="released")
    model = detector("faster_rcnn", backbone, 3, min_size=64, max_size=64, **options).eval()
    images = [[torch.rand(3, 64, 64), torch.rand(3, 64, 48)], [torch.rand(3, 48, 64)]]
    content = mrla.explain(model, [(batch, [{}] * len(batch)) for batch in images], cuts=[]).content
    assert content["task"] == "detection"
    assert (content["model"], content["method"]) == ("faster_rcnn on test_resnet", "base")
    assert content["images"]["count"] == 3
    assert content["chains"][0]["name"].startswith("backbone.body.")
    with pytest.raises(ValueError, match=r"cuts are measured on classifiers.*leave the cuts out"):
        mrla.explain(model, [], cuts=["mixers"])


def test_bad_calls():
    model = network()
    with pytest.raises(ValueError, match="neither a loader nor pictures"):
        mrla.explain(model, cuts=[])
    with pytest.raises(ValueError, match=r"margin must be the points of accuracy that may be lost.*got 200"):
        mrla.explain(model, batches(), margin=200)
    with pytest.raises(ValueError, match=r"max_images must be at least 1.*got 0"):
        mrla.explain(model, batches(), max_images=0)
    with pytest.raises(ValueError, match=r"this ResNet has no mixers.*mrla.attach"):
        mrla.explain(timm.create_model("resnet18"), batches())
    with pytest.raises(ValueError, match="cuts must be of mixers, links, heads"):
        mrla.explain(model, batches(), cuts=["mixer"])
    with pytest.raises(ValueError, match="there are pictures alone; leave the cuts out"):
        mrla.explain(model, pictures=[Picture(name="x", input=torch.randn(3, 32, 32))])


def test_a_map_with_many_columns_is_drawn(tmp_path):
    blocks = [f"layer3.{at}" for at in range(16)]
    mean = [[None, *([0.5] * (at + 1)), *([None] * (15 - at))] for at in range(16)]
    chain = {
        "name": "layer3",
        "blocks": blocks,
        "sources": ["input", *blocks],
        "quantity": "q",
        "mean": mean,
        "sd": mean,
    }
    with Image.open(draw_layer_attention([chain, chain, chain], tmp_path / "map.png", title="many")) as picture:
        assert picture.height > picture.width / 2


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on the digits, of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "light"
    words = [
        "--arm",
        "light",
        "--epochs",
        "1",
        "--optim.warmup_epochs",
        "0",
        "--out",
        str(folder),
        "--progress",
        "false",
        "--machine.threads",
        "1",
    ]
    assert main(["train", *words]) == 0
    return folder


def test_the_command(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")  # long paths in one line
    picture = tmp_path / "a picture.png"
    Image.fromarray((np.random.default_rng(0).random((20, 30, 3)) * 255).astype("uint8")).save(picture)
    words = [str(run), str(picture), "--out", str(tmp_path / "out"), "--cuts", "mixers", "--max_images", "64"]
    assert main(["explain", *words, "--machine.threads", "1"]) == 0
    content = json.loads((tmp_path / "out" / "explain.json").read_text())
    assert content["images"] == {"count": 64, "source": "digits, val part"}
    assert [one["file"] for one in content["pictures"]] == [str(picture)]
    assert content["command"].startswith("mrla explain ")
    assert "'" in content["command"]  # the space in the file's name
    said = " ".join(capsys.readouterr().out.split())
    assert content["verdict"][0] in said
    assert "report.html" in said
    # 64 images show nothing, so nothing is suggested.
    assert "mrla prune" not in said
    assert re.search(r"is (not )?shown to lose \w+ than 0\.5 points.* \d+ images", said)
    words = [*words[:2], "--out", str(tmp_path / "all"), "--cuts", "mixers", "--machine.threads", "1"]
    assert main(["explain", *words, "--margin", "100"]) == 0
    assert f"mrla prune {run} --margin 100" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", ["dw", "base"])
def test_the_command_names_the_files_that_are_there(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")  # long paths in one line
    folder = mrla.save(mrla.attach(timm.create_model("test_resnet", num_classes=3), method), tmp_path / "net")
    Image.new("RGB", (40, 50)).save(tmp_path / "picture.png")
    words = [str(folder), str(tmp_path / "picture.png"), "--out", str(tmp_path / "out"), "--machine.accelerator", "cpu"]
    assert main(["explain", *words, "--machine.threads", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    named = said.rpartition("/out/")[2].split(", ")
    assert set(named) == {path.name for path in (tmp_path / "out").iterdir() if path.stem != "looked-at-1"}


def test_the_command_refuses_in_one_line(run, tmp_path, capsys):
    def refused(*words: str) -> str:
        assert main(["explain", *words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    plain = mrla.save(timm.create_model("test_resnet", num_classes=3), tmp_path / "plain")
    said = refused(str(plain))
    assert "the network must have mixers" in said
    assert "mrla.attach(mrla.load(" in said
    other = mrla.save(mrla.attach(timm.create_model("test_resnet", num_classes=3)), tmp_path / "other")
    assert "does not say what images it was trained with" in refused(str(other), "--out", str(tmp_path / "x"))
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"\x89PNG\r\n\x1a\nno")
    assert "torn.png" in refused(str(run), str(torn), "--out", str(tmp_path / "x"))
    assert "does not exist" in refused(str(run), "nowhere.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "new or empty folder" in refused(str(run), "--out", str(tmp_path / "full"))
    assert not (tmp_path / "x").exists()


def test_a_saved_network_whose_images_are_not_known_is_explained_by_files(tmp_path):
    folder = mrla.save(mrla.attach(timm.create_model("test_resnet", num_classes=3), init="released"), tmp_path / "net")
    picture = tmp_path / "picture.png"
    Image.new("L", (40, 50), 80).save(picture)
    found = explain_checkpoint(folder, [picture], out=tmp_path / "out", machine=CPU)
    assert found.content["images"]["count"] == 1
    assert found.content["cuts"] is None


def test_a_detectors_folder_is_explained_on_its_images(tmp_path):
    torch.manual_seed(0)
    options = {"fpn_channels": 16, "box_head_dim": 16}
    backbone = mrla.attach(timm.create_model("test_resnet"), "base", init="released")
    model = detector("faster_rcnn", backbone, 6, min_size=64, max_size=64, **options)
    shapes = Shapes(images=1, val_images=3, image_size=64)
    folder = save_detector(model, tmp_path / "net")
    found = explain_checkpoint(folder, data=shapes, out=tmp_path / "out", batch_size=2, machine=CPU)
    assert found.content["images"] == {"count": 3, "source": "shapes, val part"}
    assert found.content["pictures"] == []
    assert (tmp_path / "out" / "report.html").is_file()
