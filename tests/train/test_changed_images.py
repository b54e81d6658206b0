"""A run whose images have changed since it began is refused, finished or not."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_runs import OPTIM, tiny

from mrla.analysis import compare
from mrla.data.sources import Shapes, write_coco
from mrla.train import Folder
from mrla.train.fitting import train
from mrla.train.loaders import RecipeImages
from mrla.train.runs import finished_run, open_run

SHORT = replace(OPTIM, warmup_epochs=0)


def write_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path):
    for part in ("train", "val"):
        for label, name in enumerate(("a", "b")):
            for index in range(4):
                write_image(tmp_path / "photos" / part / name / f"{index}.png", 90 * label + index)
    return tmp_path / "photos"


def one_more(photos):
    write_image(photos / "train" / "a" / "more.png", 7)


def one_fewer(photos):
    (photos / "train" / "a" / "3.png").unlink()


def another_label(photos):
    (photos / "train" / "a" / "3.png").rename(photos / "train" / "b" / "5.png")


def other_content(photos):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / "train" / "a" / "3.png")


SAID = {
    one_more: "train part has 8 then, 9 now",
    one_fewer: "train part has 8 then, 7 now",
    another_label: "train part has 8, of which names, labels or sizes differ",
    other_content: "train part has 8, of which names, labels or sizes differ",
}


@pytest.mark.parametrize("change", SAID)
def test_a_run_and_a_comparison_notice(change, photos, tmp_path):
    recipe = tiny(data=Folder(root=str(photos), size=8, workers=0), epochs=1, optim=SHORT, batch_size=4)
    contents = RecipeImages(recipe).contents
    assert contents is not None
    assert {part: entry["images"] for part, entry in contents.items()} == {"train": 8, "val": 8}
    out = tmp_path / "out"
    assert open_run(out, {"a": 1}, contents) is None
    open_run(out, {"a": 1}, contents)
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "last.ckpt").touch()
    change(photos)
    with pytest.raises(ValueError, match=SAID[change]) as error:
        finished_run(out, {"a": 1}, RecipeImages(recipe).contents)
    assert "\n" not in str(error.value)
    finished_run(out, {"a": 1}, None)  # nothing is known of a caller's loaders


@pytest.mark.usefixtures("runs_in_one_process")
def test_what_is_mended_before_an_epoch_is_finished_goes_on(photos, tmp_path):
    """A photograph that stops the first epoch is to be removed; then the same command must do."""
    recipe = tiny(data=Folder(root=str(photos), size=8, workers=0), epochs=1, optim=SHORT, batch_size=4)
    broken = photos / "train" / "a" / "broken.png"
    broken.write_text("no image")
    with pytest.raises(ValueError, match="does not decode as an image"):
        train(recipe, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="does not decode as an image"):
        compare(recipe, seeds=1, out=tmp_path / "compared", progress=False)
    broken.unlink()
    train(recipe, tmp_path / "run", progress=False)
    compare(recipe, seeds=1, out=tmp_path / "compared", progress=False)


def test_end_to_end(photos, tmp_path):
    recipe = tiny(data=Folder(root=str(photos), size=8, workers=0), epochs=1, optim=SHORT, batch_size=4)
    out = tmp_path / "out"
    assert not train(recipe, out, progress=False).was_finished
    assert train(recipe, out, progress=False).was_finished
    one_more(photos)
    with pytest.raises(ValueError, match="a run on other images"):
        train(recipe, out, progress=False)
    (photos / "train" / "a" / "more.png").unlink()
    assert train(recipe, out, progress=False).was_finished
    # a folder of an older version has not written them down
    record = json.loads((out / "run.json").read_text())
    del record["images"]
    (out / "run.json").write_text(json.dumps(record))
    one_fewer(photos)
    assert train(recipe, out, progress=False).was_finished


@pytest.mark.usefixtures("runs_in_one_process")
def test_a_comparison(photos, tmp_path):
    recipe = tiny(data=Folder(root=str(photos), size=8, workers=0), epochs=1, optim=SHORT, batch_size=4)
    out = tmp_path / "compared"
    assert not compare(recipe, seeds=1, out=out, progress=False).was_finished
    assert compare(recipe, seeds=1, out=out, progress=False).was_finished
    other_content(photos)
    with pytest.raises(ValueError, match="a run on other images"):
        compare(recipe, seeds=1, out=out, progress=False)


def test_annotations_that_change(tmp_path):
    written = write_coco(Shapes(images=3, val_images=2, image_size=32), tmp_path / "coco")
    before = written.open("train").fingerprint()
    assert before == written.open("train").fingerprint()
    annotations = tmp_path / "coco" / written.train_annotations
    shutil.copy(annotations, tmp_path / "kept.json")
    content = json.loads(annotations.read_text())
    content["annotations"][0]["bbox"][2] -= 0.5
    annotations.write_text(json.dumps(content))
    assert written.open("train").fingerprint() != before
    shutil.copy(tmp_path / "kept.json", annotations)
    assert written.open("train").fingerprint() == before
    assert Shapes().open("train").fingerprint() is None
