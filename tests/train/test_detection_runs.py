"""Detection from recipe to finished run: average precision, resume, arms, saved detectors, commands."""

import contextlib
import io
import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_runs import CPU, SMALL, assert_same_run, result, rows, tiny_detection
from torch import Tensor

import mrla
from mrla.cli import main
from mrla.data.detection_samples import DetectionSamples
from mrla.data.samples import loader
from mrla.data.sampling import PADDING, SampleKey
from mrla.data.sources import Shapes, write_coco
from mrla.dense import detector, load, save, segmenter
from mrla.models import read_config, task_of_config
from mrla.train import Optim
from mrla.train.detection_task import PRECISIONS, AveragePrecision
from mrla.train.fitting import evaluate_detector, train
from mrla.train.history import History
from mrla.train.loaders import Batches
from mrla.train.recipe import DetectorOptions
from mrla.train.recipe_tasks import build_network
from mrla.train.recipes import get_recipe
from mrla.train.task import DivergedError


@pytest.fixture(autouse=True)
def _wide_console(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def samples(number: int = 6) -> DetectionSamples:
    opened = Shapes(images=1, val_images=number, image_size=64).open("val")
    assert isinstance(opened, DetectionSamples)
    return opened


def guesses(of: DetectionSamples, seed: int = 0) -> list[dict[str, Tensor]]:
    """What is there, moved about, some of it twice, some of another class, with scores."""
    generator, found = torch.Generator().manual_seed(seed), []
    for index in range(len(of)):
        target = of[SampleKey(0, index)][1]
        twice = torch.randint(0, 2, (len(target["labels"]),), generator=generator) + 1
        boxes = target["boxes"].repeat_interleave(twice, 0)
        boxes = boxes + torch.randint(-6, 7, boxes.shape, generator=generator)
        boxes = torch.cat((boxes[:, :2].clamp(0, 62), torch.maximum(boxes[:, 2:], boxes[:, :2].clamp(0, 62) + 1)), 1)
        masks = target["masks"].repeat_interleave(twice, 0).float()
        shift = int(torch.randint(0, 5, (), generator=generator))
        labels = target["labels"].repeat_interleave(twice, 0)
        wrong = torch.rand(len(labels), generator=generator) < 0.2
        labels = torch.where(wrong, labels % 5 + 1, labels)
        scores = torch.rand(len(labels), generator=generator)
        found.append({"boxes": boxes, "labels": labels, "scores": scores, "masks": masks.roll(shift, 2)[:, None]})
    return found


# --- average precision


def by_hand(of: DetectionSamples, predictions: list[dict[str, Tensor]], kind: str) -> list[float]:
    """COCO's numbers of the same predictions, from pycocotools alone."""
    images, annotations, detections = [], [], []
    for index, found in enumerate(predictions):
        target = of[SampleKey(0, index)][1]
        images.append({"id": index + 1, "height": 64, "width": 64})
        for at in range(len(target["labels"])):
            x, y, right, bottom = target["boxes"][at].tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(target["labels"][at]),
                    "bbox": [x, y, right - x, bottom - y],
                    "area": float(target["area"][at]),
                    "iscrowd": int(target["iscrowd"][at]),
                    "segmentation": coco_mask.encode(np.asfortranarray(target["masks"][at].numpy())),
                }
            )
        for at in range(len(found["labels"])):
            x, y, right, bottom = found["boxes"][at].tolist()
            detections.append(
                {"image_id": index + 1, "category_id": int(found["labels"][at]), **shown(found, at, kind)}
            )
    truth: Any = COCO()
    truth.dataset = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label, "name": str(label)} for label in range(1, 6)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return coco_numbers(truth, detections, kind)


def shown(found: dict[str, Tensor], at: int, kind: str) -> dict[str, Any]:
    """One detection in COCO's form."""
    x, y, right, bottom = found["boxes"][at].tolist()
    pixels = np.asfortranarray((found["masks"][at, 0] > 0.5).numpy().astype("uint8"))
    place = {"bbox": [x, y, right - x, bottom - y]} if kind == "bbox" else {"segmentation": coco_mask.encode(pixels)}
    return {"score": float(found["scores"][at]), **place}


def coco_numbers(truth: COCO, detections: list[dict[str, Any]], kind: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluation = COCOeval(truth, truth.loadRes(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(number) for number in evaluation.stats[:6]]


def test_average_precision_is_that_of_pycocotools():
    of = samples(12)
    predictions = guesses(of)
    measured = AveragePrecision(masks=True)
    for start in range(0, 12, 5):
        targets = [of[SampleKey(0, index)][1] for index in range(start, min(start + 5, 12))]
        measured.update(predictions[start : start + 5], targets)
    found = measured.compute()
    for kind, theirs in (("box", "bbox"), ("mask", "segm")):
        expected = by_hand(of, predictions, theirs)
        assert [found[f"{kind}_{name}"] for name in PRECISIONS] == pytest.approx(expected, abs=1e-6)
        assert 0.05 < found[f"{kind}_ap"] < 0.95


def test_average_precision_of_files_is_that_of_pycocotools_on_the_files(tmp_path):
    data = write_coco(Shapes(images=1, val_images=12, image_size=64), tmp_path / "coco")
    path = tmp_path / "coco" / data.val_annotations
    content = json.loads(path.read_text())
    numbers = {1: 44, 2: 7, 3: 90, 4: 3, 5: 12}  # not in the order of the labels
    for entry in content["categories"]:
        entry["id"] = numbers[entry["id"]]
    for at, entry in enumerate(content["annotations"]):
        entry["category_id"] = numbers[entry["category_id"]]
        entry["iscrowd"] = int(at % 4 == 1)
        entry["area"] *= (1, 20)[at % 2]  # those that the file has decide on small, medium and large
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 5]  # nothing is there
    path.write_text(json.dumps(content))
    of = data.open("val")
    assert of.report.counts["crowd_ignored"] > 5
    predictions = guesses(of)
    predictions[4] = guesses(samples(1))[0]
    measured = AveragePrecision(masks=True)
    measured.update(predictions, [of[SampleKey(0, index)][1] for index in range(12)])
    found = measured.compute()
    ids = of.facts.category_ids
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
    for kind, theirs in (("box", "bbox"), ("mask", "segm")):
        detections = [
            {"image_id": at + 1, "category_id": ids[int(one["labels"][number]) - 1], **shown(one, number, theirs)}
            for at, one in enumerate(predictions)
            for number in range(len(one["labels"]))
        ]
        expected = coco_numbers(truth, detections, theirs)
        assert [found[f"{kind}_{name}"] for name in PRECISIONS] == pytest.approx(expected, abs=1e-6)
        assert 0.05 < found[f"{kind}_ap"] < 0.95
        assert min(expected) > -1  # all three sizes are there


def test_padding_does_not_count():
    of = samples(4)
    predictions = guesses(of)
    targets = [of[SampleKey(0, index)][1] for index in range(4)]
    alone, padded = AveragePrecision(masks=True), AveragePrecision(masks=True)
    alone.update(predictions, targets)
    padding = of[SampleKey(0, PADDING)][1]
    padded.update([*predictions, predictions[0]], [*targets, padding])
    assert alone.compute() == padded.compute()


def test_boxes_alone():
    of = samples(3)
    measured = AveragePrecision(masks=False)
    measured.update(guesses(of), [of[SampleKey(0, index)][1] for index in range(3)])
    assert set(measured.compute()) == {f"box_{name}" for name in PRECISIONS}


# --- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(tiny_detection(), folder, progress=False)
    return folder


def test_what_a_run_leaves_behind(finished):
    history, final = rows(finished / "history.csv"), result(finished)
    assert history == final["epochs"]
    assert [row["epoch"] for row in history] == [1, 2]
    assert {"train_loss", "val_box_ap", "val_box_ap50", "val_mask_ap"} <= set(history[0])
    assert final["best"] == max(history, key=lambda row: row["val_box_ap"])
    assert history[1]["train_loss"] < history[0]["train_loss"]
    assert task_of_config(read_config(finished)).name == "detection"
    assert task_of_config(read_config(finished / "best")).name == "detection"


def test_the_saved_detector_scores_what_the_history_says(finished):
    of = tiny_detection().data.open("val")  # type: ignore[arg-type]
    batches = loader(of, batch_size=4)
    scores = evaluate_detector(load(finished), batches, masks=True, machine=CPU)
    last = result(finished)["last"]
    assert scores == pytest.approx({name.removeprefix("val_"): last[name] for name in last if name.startswith("val_")})


def test_the_average_of_a_detectors_weights_is_saved_and_scored(finished, tmp_path):
    averaged = tiny_detection(ema_decay=0.9)
    train(averaged, tmp_path, progress=False)
    weights, last_step = load(tmp_path).state_dict(), load(finished).state_dict()
    assert not torch.equal(weights["roi_heads.box_head.fc6.weight"], last_step["roi_heads.box_head.fc6.weight"])
    losses = [[row["train_loss"] for row in result(folder)["epochs"]] for folder in (tmp_path, finished)]
    assert losses[0] == losses[1]
    of = averaged.data.open("val")  # type: ignore[arg-type]
    scores = evaluate_detector(load(tmp_path), loader(of, batch_size=4), machine=CPU)
    last = result(tmp_path)["last"]
    assert {name: last[f"val_{name}"] for name in scores} == pytest.approx(scores)


def test_an_interrupted_run_ends_as_the_uninterrupted_one(finished, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    started = History.on_train_epoch_start

    def crash(self: Any, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            raise Crash
        started(self, trainer, module)

    monkeypatch.setattr(History, "on_train_epoch_start", crash)
    with pytest.raises(Crash):
        train(tiny_detection(), tmp_path, progress=False)
    monkeypatch.undo()
    train(tiny_detection(), tmp_path, progress=False)
    assert_same_run(finished, tmp_path)


def test_arms_share_the_start_of_all_but_their_mixers():
    plain, light = (build_network(tiny_detection(arm=arm)) for arm in ("plain", "light"))
    theirs = light.state_dict()
    assert all(torch.equal(one, theirs[name]) for name, one in plain.state_dict().items())
    assert theirs.keys() - plain.state_dict().keys()
    images = [torch.rand(3, 64, 64)]
    with torch.no_grad():
        one, other = plain.eval()(images)[0], light.eval()(images)[0]
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet", "fcos"])
def test_every_detector_trains(name, tmp_path):
    options = DetectorOptions(
        name=name, min_size=64, max_size=64, freeze_stages=0, fpn_channels=64 if name == "fcos" else 16
    )
    run = train(tiny_detection(detector=options, epochs=1), tmp_path, progress=False)
    assert set(run.epochs[0]) >= {"train_loss", "val_box_ap"}
    assert "val_mask_ap" not in run.epochs[0]
    assert type(run.model).__name__.lower() == name.replace("_", "")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    recipe = tiny_detection(optim=Optim(lr=1e30, momentum=0.0), epochs=3)
    with pytest.raises(DivergedError):
        train(recipe, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"detector": None}, "data.kind must be one of digits, cifar10, cifar100, folder for classification"),
        ({"data": mrla.train.Digits()}, "data.kind must be one of coco, voc, shapes for a detector"),
    ],
)
def test_images_that_do_not_fit_the_task(changes, rule):
    with pytest.raises(ValueError, match=rule):
        tiny_detection(**changes)


def test_masks_need_images_that_have_them():
    from mrla.data.sources import Coco

    with pytest.raises(ValueError, match="objects have masks, for mask_rcnn"):
        tiny_detection(data=Coco(masks=False))


def test_an_option_that_no_detector_has():
    wrong = replace(SMALL, options={"box_hed_dim": 3})
    with pytest.raises(
        ValueError, match=r"detector\.options must be arguments of mrla\.dense\.detector.*box_head_dim|box_hed_dim"
    ):
        build_network(tiny_detection(detector=wrong))


def test_the_released_coco_settings():
    """facts.md: 1x schedule, batch 16, lr 0.02 (RetinaNet 0.01), frozen_stages 1, BN in eval mode."""
    for name, rate in (("coco_faster_rcnn_r50", 0.02), ("coco_mask_rcnn_r50", 0.02), ("coco_retinanet_r50", 0.01)):
        recipe = get_recipe(name)
        assert recipe.detector is not None
        assert (recipe.optim.lr, recipe.batch_size, recipe.epochs) == (rate, 16, 12)
        assert recipe.optim.milestones == (8, 11)
        assert (recipe.detector.freeze_stages, recipe.detector.norm_eval) == (1, True)
        assert (recipe.detector.min_size, recipe.detector.max_size) == (800, 1333)


# --- saved detectors


@pytest.mark.parametrize("arm", ["light", "base"])
def test_a_saved_detector_says_the_same(arm, tmp_path):
    model = build_network(tiny_detection(arm=arm)).eval()
    save(model, tmp_path, class_names=["a", "b", "c", "d", "e"])
    again = load(tmp_path)
    assert again.class_names == ("a", "b", "c", "d", "e")
    assert not again.training
    images = [torch.rand(3, 48, 64)]
    with torch.no_grad():
        one, other = model(images)[0], again(images)[0]
    assert all(torch.equal(one[name], other[name]) for name in one)
    save(again, tmp_path / "again")
    assert load(tmp_path / "again").state_dict().keys() == model.state_dict().keys()


def test_what_cannot_be_saved_or_loaded(tmp_path):
    with pytest.raises(ValueError, match="can be saved: got a Linear"):
        save(torch.nn.Linear(2, 2), tmp_path)
    model = detector("retinanet", "test_resnet", 2, min_size=64, fpn_channels=16)
    model.head.classification_head.cls_logits = torch.nn.Conv2d(16, 3, 3)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="does not rebuild this network"):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())
    model = detector("retinanet", "test_resnet", 2, min_size=64, fpn_channels=16)
    save(model, tmp_path / "detector")
    with pytest.raises(ValueError, match="a detector is saved with what it was built with: got input_size, mean too"):
        mrla.save(model, tmp_path / "detector", input_size=(3, 64, 64), mean=(0, 0, 0))
    import timm

    mrla.save(timm.create_model("test_resnet"), tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"load a classifier with mrla\.load"):
        load(tmp_path / "classifier")


# --- commands


@pytest.mark.parametrize("which", [".", "best", "checkpoints/last.ckpt"])
def test_eval_finds_the_recorded_scores(which, finished, capsys):
    assert main(["eval", str(finished / which), "--machine.accelerator", "cpu"]) == 0
    printed = capsys.readouterr().out
    row = result(finished)["best" if which == "best" else "last"]
    assert f"{row['val_box_ap']:.4f}" in printed
    assert "mask AP50" in printed


def test_eval_on_other_images(finished, capsys):
    assert (
        main(["eval", str(finished), "--data.kind", "shapes", "--data.image_size", "64", "--data.val_images", "3"]) == 0
    )
    assert "3 images" in " ".join(capsys.readouterr().out.split())  # a narrow table breaks its title
    assert main(["eval", str(finished), "--data.kind", "digits"]) == 2
    assert "must be of coco, voc, shapes for this network" in capsys.readouterr().err


def test_eval_needs_an_object_to_measure_by(finished, tmp_path, capsys):
    """Average precision of nothing is -1, which no table can show."""
    write_coco(Shapes(images=1, val_images=2, image_size=64), tmp_path)
    annotations = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(annotations.read_text())
    annotations.write_text(json.dumps({**content, "annotations": []}))
    words = ["eval", str(finished), "--data.kind", "coco", "--data.root", str(tmp_path)]
    assert main([*words, "--machine.threads", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "must have an object to measure by: of 0 read, 0 do not count" in said


@pytest.mark.parametrize("command", ["eval", "predict", "explain"])
def test_segmenters_are_refused_in_one_line(command, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64)).save(image)
    folder = save(segmenter("fcn", timm.create_model("test_resnet"), 3), tmp_path / "net")
    assert main([command, str(folder), *([str(image)] if command != "eval" else [])]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "is a segmenter's; load it with mrla.dense.load" in said


@pytest.mark.usefixtures("runs_in_one_process")
def test_a_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["compare", "--recipe", "shapes_mask_rcnn", "--seeds", "2", "--epochs", "1", "--out", "here"]
    words += ["--model", "test_resnet", "--model_args", "{}", "--data.images", "8", "--data.val_images", "4"]
    words += ["--data.image_size", "64", "--batch_size", "4", "--detector.min_size", "64", "--detector.max_size", "64"]
    words += ["--optim.warmup_epochs", "0", "--detector.fpn_channels", "16"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "here" / "compare.json").read_text())
    assert content["figure"] == "val_box_ap"
    assert len(content["table"]["light"]["val_box_ap"]["values"]) == 2
    assert "box AP (%), last epoch" in printed
    assert (tmp_path / "here" / "curves.png").is_file()
    header = (tmp_path / "here" / "table.csv").read_text().splitlines()[0]
    assert "val_mask_ap_mean" in header


def broken(root: Path, how: str) -> None:
    """A COCO folder whose training part has one thing wrong."""
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    first = content["annotations"][0]
    if how == "category":
        first["category_id"] = 77
    elif how == "polygon":
        first["segmentation"] = [[1, 2, 3]]
    elif how == "twice":
        content["annotations"].append(first)
    elif how == "image":
        (root / "train2017" / "000000000002.png").unlink()
    elif how == "clipped":
        first["bbox"] = [-5, -5, 30, 30]
    elif how == "crowd":
        first["iscrowd"] = 1
    path.write_text(json.dumps(content))


TINY_WORDS = ["train", "--recipe", "shapes_mask_rcnn", "--data.kind", "coco", "--data.root", "coco", "--out", "run"]
TINY_WORDS += ["--data.workers", "0", "--model", "test_resnet", "--model_args", "{}", "--epochs", "1"]
TINY_WORDS += ["--batch_size", "4", "--detector.min_size", "64", "--detector.max_size", "64"]
TINY_WORDS += ["--detector.fpn_channels", "16", "--optim.warmup_epochs", "0"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("category", "annotation 1 in coco/annotations/instances_train2017.json has 77"),
        ("polygon", "annotation 1 in coco/annotations/instances_train2017.json has [1, 2, 3]"),
        ("twice", "coco/annotations/instances_train2017.json has 1 twice"),
        ("image", "coco/train2017/000000000002.png (image 2 in "),
    ],
)
def test_training_on_a_folder_with_something_wrong_is_refused_before_it_begins(
    how, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    broken(Path(write_coco(Shapes(images=4, val_images=2, image_size=64), "coco").root), how)
    assert main(TINY_WORDS) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("clipped", "1 boxes clipped to the image: annotation 1"),
        ("crowd", "1 crowd regions left out of training: annotation 1"),
    ],
)
def test_training_says_what_it_left_out_or_changed(how, said, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    broken(Path(write_coco(Shapes(images=4, val_images=2, image_size=64), "coco").root), how)
    with caplog.at_level(logging.WARNING):  # other tests' libraries may have set another
        assert main(TINY_WORDS) == 0
    assert said in caplog.text
    assert len(rows(tmp_path / "run" / "history.csv")) == 1


def test_a_recipe_without_a_detector_has_no_such_flag(capsys):
    assert main(["train", "--detector.min_size", "64"]) == 2
    assert "has no flag --detector.min_size" in capsys.readouterr().err


def test_batches_of_lists_go_through_workers():
    of = Shapes(images=6, val_images=2, image_size=64, workers=1).open("train")
    batches = Batches(loader(of, batch_size=2, workers=1, shuffle=True))
    try:
        images, targets = next(iter(batches))
    finally:
        batches.close()
    assert [image.shape for image in images] == [(3, 64, 64)] * 2
    assert all(len(target["boxes"]) == len(target["masks"]) for target in targets)
