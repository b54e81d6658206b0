"""What `mrla predict` draws and writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import mrla
from mrla.analysis.evaluation.prediction import predict, preparation
from mrla.cli import main
from mrla.data.sources import Shapes, write_coco
from mrla.dense import detector, load, save
from mrla.deploy import export
from mrla.train import Machine
from mrla.train.recipe import Recipe
from mrla.train.recipes import Folder

CPU = Machine(accelerator="cpu", threads=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("coco") / "shapes"
    write_coco(Shapes(images=1, val_images=2, image_size=64), folder)
    return sorted((folder / "val2017").glob("*.png"))


@pytest.fixture(scope="module")
def of_objects(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    options = {"fpn_channels": 16, "box_head_dim": 16, "mask_head_dim": 8, "mask_head_layers": 1}
    backbone = mrla.attach(timm.create_model("test_resnet"), "light")
    model = detector("mask_rcnn", backbone, 3, min_size=64, max_size=64, detections_per_image=4, **options)
    return save(model, tmp_path_factory.mktemp("detector"), class_names=["left <b>", "right"])


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = mrla.attach(timm.create_model("test_resnet", num_classes=7), "light")
    return mrla.save(model, tmp_path_factory.mktemp("classifier"), class_names=[f"kind {at}" for at in range(7)])


def test_objects(of_objects, pictures, tmp_path):
    found = predict(of_objects, pictures, tmp_path, score_thresh=0.0, machine=CPU)
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert written["images"] == found
    model = load(of_objects)
    for file, entry in zip(pictures, found, strict=True):
        image = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)
        with torch.inference_mode():
            expected = model([image.float() / 255])[0]
        assert entry["boxes"] == expected["boxes"].tolist()
        assert entry["scores"] == expected["scores"].tolist()
        assert 0 < len(entry["labels"]) <= 4
        assert set(entry["names"]) <= {"left <b>", "right"}
        with Image.open(tmp_path / entry["drawing"]) as drawn:
            assert drawn.size == (320, 320)  # small pictures are enlarged


def test_nothing_above_the_score(of_objects, pictures, tmp_path):
    found = predict(of_objects, pictures[:1], tmp_path, score_thresh=1.0, machine=CPU)
    assert found[0]["labels"] == []
    with Image.open(tmp_path / found[0]["drawing"]) as drawn, Image.open(pictures[0]) as picture:
        assert np.array_equal(np.asarray(drawn), np.asarray(picture))


def test_classes(of_classes, pictures, tmp_path):
    found = predict(of_classes, pictures, tmp_path, machine=CPU)
    for entry in found:
        assert len(entry["names"]) == 5
        assert entry["scores"] == sorted(entry["scores"], reverse=True)
        assert 0 < sum(entry["scores"]) <= 1 + 1e-6
        assert (tmp_path / entry["drawing"]).is_file()


def test_a_network_of_grey_images(pictures, tmp_path):
    mrla.save(timm.create_model("test_resnet", num_classes=3, in_chans=1), tmp_path / "net", input_size=(1, 32, 32))
    found = predict(tmp_path / "net", pictures[:1], tmp_path / "out", top=9, machine=CPU)
    assert len(found[0]["names"]) == 3


@pytest.mark.parametrize(
    ("format", "suffix"),
    [
        ("onnx", ".onnx"),
        pytest.param("torch_export", ".pt2", marks=pytest.mark.sweep),
        pytest.param("openvino", ".xml", marks=pytest.mark.sweep),
    ],
)
def test_an_exported_file_gives_the_checkpoints_answers(format, suffix, of_classes, pictures, tmp_path):
    file = export(mrla.load(of_classes), tmp_path / f"net{suffix}", format=format).path
    found = predict(file, pictures, tmp_path / "file", top=7, machine=CPU)
    expected = predict(of_classes, pictures, tmp_path / "checkpoint", top=7, machine=CPU)
    for entry, other in zip(found, expected, strict=True):
        assert entry["names"] == other["names"]
        assert entry["scores"] == pytest.approx(other["scores"], abs=1e-5)
        assert (tmp_path / "file" / entry["drawing"]).is_file()


@pytest.mark.sweep
def test_images_are_cropped_as_the_exported_file_says(of_classes, pictures, tmp_path):
    model, data = mrla.load(of_classes), Folder(crop_pct=0.4, interpolation="bilinear")
    prepared = preparation(model, Recipe(recipe="own", model="test_resnet", data=data, epochs=1, batch_size=1))
    assert (prepared["crop_pct"], prepared["interpolation"]) == (0.4, "bilinear")
    scores = []
    for crop_pct in (0.4, None):
        path = tmp_path / f"{crop_pct}.pt2"
        export(model, path, format="torch_export", crop_pct=crop_pct)
        scores.append(predict(path, pictures, tmp_path, top=7, machine=CPU)[0]["scores"])
    assert scores[0] != pytest.approx(scores[1], abs=1e-6)


def test_a_file_of_other_channels_than_pictures_have(pictures, tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(5, 3, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    path = export(net, tmp_path / "net.pt2", format="torch_export").path
    with pytest.raises(ValueError, match=r"pictures have one or three channels.*\(5, 224, 224\)"):
        predict(path, pictures, tmp_path / "out", machine=CPU)


def test_an_image_that_does_not_decode_is_named(of_classes, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png does not decode as an image"):
        predict(of_classes, [tmp_path / "text.png"], tmp_path / "out", machine=CPU)


def test_files_of_one_name_and_pictures_on_their_side(of_classes, tmp_path):
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "same.jpg")
        picture, exif = Image.new("RGB", (400, 200), "red"), Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        picture.save(files[-1], exif=exif)
    found = predict(of_classes, files, tmp_path / "out", machine=CPU)
    assert [entry["drawing"] for entry in found] == ["same.png", "same-2.png"]
    with Image.open(tmp_path / "out" / "same.png") as drawn:
        assert drawn.height > 400


@pytest.mark.filterwarnings("always")
def test_a_bad_file_is_named_and_the_others_are_drawn(of_classes, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", "more/b.png"):
        shutil.copy(pictures[0], folder / name)
    (folder / "bad.png").write_text("no image")
    (folder / "notes.txt").write_text("not read")
    assert main(["predict", str(of_classes), "photos", "--out", "out", "--machine.accelerator", "cpu"]) == 1
    said = capsys.readouterr()
    assert "left out are 1 .txt" in said.err
    assert said.err.splitlines()[-1].startswith("mrla: not read: photos/bad.png does not decode as an image")
    assert "Traceback" not in said.err
    images = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert [entry.get("drawing") for entry in images] == ["a.png", None, "b.png"]
    assert "photos/bad.png" in images[1]["error"]


def test_a_drawing_takes_no_other_files_place(of_classes, pictures, tmp_path):
    """Neither an input's, nor another drawing's, nor that of a file which is there; an older drawing's it does."""
    for name in ("x.png", "y.png", "y.jpg", "y-2.png"):
        with Image.open(pictures[0]) as picture:
            picture.convert("RGB").save(tmp_path / name)
    (tmp_path / "z.png").write_bytes(b"somebody's")
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(tmp_path / "x.png", other / "z.png")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    files = [tmp_path / "x.png", tmp_path / "y.png", tmp_path / "y.jpg", tmp_path / "y-2.png", other / "z.png"]
    names = [entry["drawing"] for entry in predict(of_classes, files, tmp_path, machine=CPU)]
    assert names == ["x-2.png", "y-3.png", "y-4.png", "y-2-2.png", "z-2.png"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    again = [entry["drawing"] for entry in predict(of_classes, files, tmp_path, machine=CPU)]
    assert again == names


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["nowhere", "{picture}"], "nowhere"),
        (["{objects}", "no.png"], "images must be files or folders: no.png does not exist"),
        (["{objects}", "empty"], "empty has no image; images end in"),
        (["{objects}", "{text}"], "does not decode as an image"),
        (["{objects}", "{picture}", "--score_thresh", "1.5"], "score_thresh must be from 0 to 1: got 1.5"),
        (["{classes}", "{picture}", "--top", "0"], "top must be at least 1: got 0"),
    ],
)
def test_refused_with_one_line_and_exit_code_2(
    words, rule, of_objects, of_classes, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    places = {"picture": pictures[0], "objects": of_objects, "classes": of_classes, "text": tmp_path / "text.png"}
    assert main(["predict", *(word.format(**places) for word in words)]) == 2
    error = capsys.readouterr().err
    assert rule in error
    assert error.count("\n") == 1


def test_the_command_prints_what_it_found(of_objects, pictures, tmp_path, capsys):
    assert main(["predict", str(of_objects), *map(str, pictures), "--out", str(tmp_path), "--score_thresh", "0"]) == 0
    printed = capsys.readouterr().out
    assert "right" in printed or "left <b>" in printed
    assert (tmp_path / "predictions.json").is_file()


def test_names_beyond_ascii_are_drawn(of_classes, pictures, tmp_path):
    """Pillow's own font has one empty box for each letter that it lacks."""
    from PIL import ImageFont

    from mrla.analysis.fonts import font_for

    font = ImageFont.truetype(font_for(["öЖé"]), 20)
    shapes = {bytes(font.getmask(letter)) for letter in "öЖé"}
    assert len(shapes | {bytes(font.getmask(chr(0xFFFF)))}) == 4
    names = ["Größe", "Жук", "été", "a", "b", "c", "d"]
    model = mrla.attach(timm.create_model("test_resnet", num_classes=7), "light")
    folder = mrla.save(model, tmp_path / "net", class_names=names)
    found = predict(folder, pictures[:1], tmp_path / "out", machine=CPU)
    assert set(found[0]["names"]) <= set(names)
