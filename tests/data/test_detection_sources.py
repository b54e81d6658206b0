"""The samples of every kind of detection data; what is refused is in test_coco_files.py's and test_voc_files.py's."""

import contextlib
import io
import json
import logging
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from mrla.data.coco_masks import encode_mask
from mrla.data.detection_samples import DetectionSamples, _flipped_or_not
from mrla.data.drawn_shapes import LEAST_VISIBLE, SHAPE_NAMES, DrawnShapes, tight_boxes
from mrla.data.randomness import derive_seed, seeded
from mrla.data.sampling import PADDING, EpochSampler, SampleKey
from mrla.data.sources import Coco, Shapes, Voc, kinds_for, write_coco

SMALL = Shapes(images=6, val_images=3, image_size=(40, 56), max_objects=4)


def assert_same(sample, other) -> None:
    (image, target), (other_image, other_target) = sample, other
    assert torch.equal(image, other_image)
    assert target.keys() == other_target.keys()
    for name, entry in target.items():
        if isinstance(entry, torch.Tensor):
            assert entry.dtype == other_target[name].dtype
            assert torch.equal(entry, other_target[name]), name
        else:
            assert entry == other_target[name]


def loaded(samples, workers: int, epochs: int = 2) -> list:
    sampler = EpochSampler(size=len(samples), batch_size=2, seed=3, shuffle=True)
    batches = DataLoader(
        samples,
        batch_size=2,
        sampler=sampler,
        num_workers=workers,
        collate_fn=DetectionSamples.collate,
        persistent_workers=workers > 0,
    )
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found += [pair for images, targets in batches for pair in zip(images, targets, strict=True)]
    if workers:
        batches._iterator._shutdown_workers()
    return found


# Drawn shapes


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(16, 130),
    width=st.integers(16, 130),
    most=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    split=st.sampled_from(["train", "val", "test"]),
)
def test_shapes_have_the_boxes_of_what_is_visible_of_them(height, width, most, seed, split):
    drawn = DrawnShapes(images=1, height=height, width=width, max_objects=most, seed=seed, split=split)
    image, target = drawn[0]
    masks, count = target["masks"], len(target["labels"])
    assert (image.shape, image.dtype) == ((3, height, width), torch.uint8)
    assert (masks.shape, masks.dtype) == ((count, height, width), torch.uint8)
    assert 1 <= count <= most
    assert set(target["labels"].tolist()) <= set(range(1, len(SHAPE_NAMES) + 1))
    assert masks.sum(0).max() == 1  # a pixel shows one shape
    assert torch.equal(target["area"], masks.sum((1, 2)).float())
    encoded = [encode_mask(mask.numpy()) for mask in masks]
    expected = torch.tensor(mask_tools.toBbox(encoded), dtype=torch.float32)
    expected[:, 2:] += expected[:, :2]
    assert torch.equal(target["boxes"], expected)
    assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
    assert target["boxes"].min() >= 0
    assert (target["boxes"][:, 2:] <= torch.tensor([width, height])).all()
    assert_same((image, target), drawn[0])


def test_a_quarter_of_every_shape_is_visible(monkeypatch):
    from mrla.data import drawn_shapes as shapes

    placed, seen = shapes._placed, []

    def recorded(*arguments):
        seen.append(placed(*arguments))
        return seen[-1]

    monkeypatch.setattr(shapes, "_placed", recorded)
    shares = []
    for index in range(40):
        seen.clear()
        _, target = DrawnShapes(images=40, height=64, width=64, max_objects=12, seed=1, split="train")[index]
        wholes = {}  # by the shape's window and mask, of which the visible mask is a part
        for mask in target["masks"].numpy():
            fitting = []
            for stamp, window, pixels in seen:
                full = np.zeros((64, 64), bool)
                full[window] = stamp
                if (full >= mask.astype(bool)).all():
                    fitting.append(pixels)
            wholes[mask.sum()] = min(fitting)
            shares.append(mask.sum() / wholes[mask.sum()])
    assert len(shares) > 150
    assert min(shares) >= LEAST_VISIBLE
    assert min(shares) < 0.45  # the images are not without overlap


def test_seed_part_and_index_decide_a_drawing_and_nothing_else_does():
    samples = SMALL.open("val", seed=5)
    np.random.seed(7)
    forwards = [samples[SampleKey(0, index)] for index in range(3)]
    torch.manual_seed(8)
    backwards = [SMALL.open("val", seed=6)[SampleKey(4, index)] for index in (2, 1, 0)]
    for sample, other in zip(forwards, reversed(backwards), strict=True):
        assert_same(sample, other)
    images = [samples[SampleKey(0, 0)][0], samples[SampleKey(0, 1)][0]]
    images += [SMALL.open(part, augment=False)[SampleKey(0, 0)][0] for part in ("train", "test")]
    images.append(replace(SMALL, seed=1).open("val")[SampleKey(0, 0)][0])
    for number, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[:number])
    assert [len(SMALL.open(part)) for part in ("train", "val", "test")] == [6, 3, 3]


def test_another_process_draws_the_same():
    code = (
        "import hashlib, torch\n"
        "from mrla.data.sources import *\n"
        "from mrla.data.sampling import SampleKey\n"
        "samples = Shapes(image_size=(40, 56)).open('train', seed=2)\n"
        "image, target = samples[SampleKey(3, 4)]\n"
        "print(hashlib.md5(image.numpy().tobytes() + target['masks'].numpy().tobytes()).hexdigest())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(code, {})
    assert found.stdout == here.getvalue()
    assert len(here.getvalue()) == 33


def test_colour_and_place_do_not_give_the_class_away():
    drawn = DrawnShapes(images=400, height=32, width=32, max_objects=3, seed=0, split="train")
    colours = {label: [] for label in range(1, len(SHAPE_NAMES) + 1)}
    for index in range(400):
        image, target = drawn[index]
        for label, mask in zip(target["labels"].tolist(), target["masks"], strict=True):
            colours[label].append(image[:, mask.bool()].float().mean(1))
    total = sum(map(len, colours.values()))
    for found in colours.values():
        assert abs(len(found) / total - 0.2) < 0.06
        assert (torch.stack(found).mean(0) - 127).abs().max() < 20


# Samples


def test_a_sample_is_what_detectors_and_metrics_take():
    samples = SMALL.open("train")
    image, target = samples[SampleKey(0, 1)]
    count = len(target["labels"])
    assert (image.shape, image.dtype) == ((3, 40, 56), torch.float32)
    assert image.min() >= 0
    assert 0.3 < image.max() <= 1
    types = {name: (entry.dtype, tuple(entry.shape)) for name, entry in target.items() if name != "image_id"}
    assert types == {
        "boxes": (torch.float32, (count, 4)),
        "labels": (torch.int64, (count,)),
        "masks": (torch.uint8, (count, 40, 56)),
        "area": (torch.float32, (count,)),
        "iscrowd": (torch.int64, (count,)),
    }
    assert {type(entry) for name, entry in target.items() if name != "image_id"} == {torch.Tensor}
    assert type(target["image_id"]) is int


def test_targets_as_predictions_have_an_average_precision_of_one():
    samples = SMALL.open("val")
    _, targets = DetectionSamples.collate([samples[SampleKey(0, index)] for index in range(3)])
    measure = MeanAveragePrecision(iou_type=("bbox", "segm"))
    predictions = [target | {"scores": torch.ones(len(target["labels"]))} for target in targets]
    predictions = [{**entry, "masks": entry["masks"].bool()} for entry in predictions]
    measure.update(predictions, [target | {"masks": target["masks"].bool()} for target in targets])
    with contextlib.redirect_stdout(io.StringIO()):
        found = measure.compute()
    assert found["bbox_map"] == found["segm_map"] == 1


def test_torchvisions_detector_learns_from_a_batch():
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    classes = len(SMALL.facts().class_names) + 1
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=classes, min_size=64, max_size=96)
    samples = SMALL.open("train")
    losses = model(*DetectionSamples.collate([samples[SampleKey(0, index)] for index in range(2)]))
    assert all(loss.isfinite() for loss in losses.values())
    assert "loss_mask" in losses


@settings(max_examples=40, deadline=None)
@given(index=st.integers(0, 50), seed=st.integers(0, 1000), width=st.integers(16, 60))
def test_a_flip_moves_image_boxes_and_masks_together(index, seed, width):
    drawn = DrawnShapes(images=51, height=30, width=width, max_objects=5, seed=0, split="train")
    image, target = drawn[index]
    with seeded(seed):
        flipped, moved = _flipped_or_not(image, target)
    assert np.array_equal(tight_boxes(moved["masks"].numpy()), moved["boxes"].numpy())
    if torch.equal(flipped, image):
        assert_same((image, target), (flipped, moved))
        return
    assert torch.equal(flipped, image.flip(-1))
    assert torch.equal(moved["masks"], target["masks"].flip(-1))
    canvas = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(30, width))
    assert torch.equal(moved["boxes"], functional.horizontal_flip(canvas).as_subclass(torch.Tensor))
    assert torch.equal(drawn[index][1]["boxes"], target["boxes"])  # the source's own are left alone


def test_flips_are_a_function_of_seed_epoch_and_index():
    samples = SMALL.open("train", seed=1)
    keys = [SampleKey(epoch, index) for epoch in range(8) for index in range(6)]
    before = torch.get_rng_state()
    forwards = {key: samples[key] for key in keys}
    assert torch.equal(torch.get_rng_state(), before)
    for key in reversed(keys):
        assert_same(forwards[key], SMALL.open("train", seed=1)[key])
    plain = SMALL.open("train", augment=False)
    flipped = [not torch.equal(forwards[key][0], plain[SampleKey(0, key.index)][0]) for key in keys]
    assert 14 < sum(flipped) < 34
    for index in range(6):  # some epochs flip an image and some do not
        assert {flip for key, flip in zip(keys, flipped, strict=True) if key.index == index} == {True, False}
    others = SMALL.open("train", seed=2)
    assert any(not torch.equal(forwards[key][0], others[key][0]) for key in keys)
    val = SMALL.open("val")
    assert torch.equal(val[SampleKey(0, 0)][0], val[SampleKey(5, 0)][0])
    assert derive_seed(1, "sample", 0, 0) != derive_seed(2, "sample", 0, 0)


def test_workers_change_nothing():
    samples = pickle.loads(pickle.dumps(SMALL.open("train", seed=1)))
    for sample, other in zip(loaded(samples, 0), loaded(samples, 2), strict=True):
        assert_same(sample, other)


def test_padding_is_the_first_image_with_nothing_in_it():
    samples = SMALL.open("val")
    image, target = samples[SampleKey(0, PADDING)]
    assert torch.equal(image, samples[SampleKey(0, 0)][0])
    assert target["image_id"] == PADDING
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 40, 56)
    assert {len(target[name]) for name in ("labels", "area", "iscrowd")} == {0}


def test_images_of_different_sizes_are_collated():
    samples = [replace(SMALL, image_size=size).open("val")[SampleKey(0, 0)] for size in (16, (20, 30))]
    images, targets = pickle.loads(pickle.dumps(DetectionSamples.collate))(samples)
    assert [tuple(image.shape) for image in images] == [(3, 16, 16), (3, 20, 30)]
    assert [target["image_id"] for target in targets] == [1, 1]


# Written out


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Coco:
    return write_coco(SMALL, tmp_path_factory.mktemp("written") / "deep" / "shapes")


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_written_is_read_back_as_it_was(written, split, caplog):
    drawn, read = (data.open(split, seed=4) for data in (SMALL, written))
    assert len(drawn) == len(read)
    for epoch in (0, 1):
        for index in range(len(drawn)):
            assert_same(drawn[SampleKey(epoch, index)], read[SampleKey(epoch, index)])
    assert_same(drawn[SampleKey(0, PADDING)], read[SampleKey(0, PADDING)])
    assert written.facts() == SMALL.facts() == read.facts == drawn.facts
    assert written.has_masks == SMALL.has_masks
    assert not caplog.records
    assert not read.report.counts
    assert read.report.objects == read.report.objects_read > len(read) - 1


def test_the_samples_of_files_are_pickled_for_workers(written):
    samples = written.open("train", seed=1)
    again = pickle.loads(pickle.dumps(samples))
    assert again.report.counts == samples.report.counts
    for sample, other in zip(loaded(samples, 0), loaded(again, 1), strict=True):
        assert_same(sample, other)


def test_cocos_own_tools_load_what_is_written(written):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(Path(written.root) / written.train_annotations))
    samples = written.open("train", augment=False)
    assert sorted(coco.imgs) == [1, 2, 3, 4, 5, 6]
    assert [entry["name"] for entry in coco.loadCats(coco.getCatIds())] == list(SHAPE_NAMES)
    for index in range(6):
        _, target = samples[SampleKey(0, index)]
        entries = coco.loadAnns(coco.getAnnIds(imgIds=index + 1))
        assert [entry["category_id"] for entry in entries] == target["labels"].tolist()
        for entry, mask in zip(entries, target["masks"], strict=True):
            with pytest.warns(DeprecationWarning, match="__array__"):
                assert np.array_equal(coco.annToMask(entry), mask.numpy())


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be new or empty") as caught:
        write_coco(SMALL, tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="must be new or empty"):
        write_coco(SMALL, tmp_path / "kept.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    (tmp_path / "empty").mkdir()
    assert len(write_coco(SMALL, tmp_path / "empty").open("val")) == 3


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError("no space left")

    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(OSError, match="no space left"):
        write_coco(SMALL, tmp_path / "shapes")
    assert list(tmp_path.iterdir()) == []


# Descriptions


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        *(
            (kind, {"workers": -1}, "data.workers must be zero to 1024 processes: got -1")
            for kind in kinds_for("detection")
        ),
        ("voc", {"year": "2013"}, "data.year must be one of 2007, .*: got '2013'"),
        ("shapes", {"images": 0}, "data.images must be a positive number: got 0"),
        ("shapes", {"val_images": -2}, "data.val_images must be a positive number: got -2"),
        ("shapes", {"image_size": 15}, "data.image_size must be 16 pixels or more: got 15"),
        ("shapes", {"image_size": (64, 0)}, r"data.image_size must be 16 pixels or more: got \(64, 0\)"),
        ("shapes", {"max_objects": 0}, "data.max_objects must be from 1 to 255: got 0"),
        ("shapes", {"max_objects": 256}, "data.max_objects must be from 1 to 255: got 256"),
    ],
)
def test_a_description_that_cannot_be_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kinds_for("detection")[kind](**options)


def test_descriptions_name_their_kind():
    assert {kind: describe().kind for kind, describe in kinds_for("detection").items()} == {
        kind: kind for kind in kinds_for("detection")
    }
    assert {type(describe()) for describe in kinds_for("detection").values()} == {Coco, Voc, Shapes}


@pytest.mark.parametrize("data", [SMALL, Voc(), Coco()])
def test_an_unknown_split_is_refused(data):
    with pytest.raises(ValueError, match="'train', 'val' or 'test': got 'valid'"):
        data.open("valid")


def test_descriptions_load_without_what_they_do_not_need():
    code = (
        "import sys; import mrla.data.sources as data\n"
        "data.Shapes().facts(); data.Shapes().open('train')\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pycocotools", "lightning", "torchmetrics", "sklearn"} & set(found.stdout.split())


def test_a_report_is_logged_where_something_was_left_out(written, tmp_path, caplog):
    root = Path(written.root)
    content = json.loads((root / written.val_annotations).read_text())
    content["annotations"][0]["bbox"] = [-3.0, 1.0, 10.0, 10.0]
    (tmp_path / "val.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        samples = replace(written, val_annotations=str(tmp_path / "val.json")).open("val")
    assert caplog.messages == [str(samples.report)]
    assert "1 boxes clipped to the image: annotation 1" in caplog.text
