"""A COCO folder: everything that its files can hold, kept, clipped, left out with a count, or refused."""

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageOps
from pycocotools import mask as mask_tools
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision

from mrla.data.annotated_images import OBJECTS_LEFT_OUT, DataReport, settled_box
from mrla.data.coco_masks import decode_mask, encode_mask, run_lengths
from mrla.data.detection_samples import DetectionSamples
from mrla.data.images import UndecodableImageError
from mrla.data.sampling import SampleKey
from mrla.data.sources import Coco

HEIGHT, WIDTH = 20, 30
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
CATEGORIES = [{"id": 17, "name": "cat"}, {"id": 3, "name": "car"}, {"id": 44, "name": "bottle"}]
SQUARE = [[4.0, 4.0, 12.0, 4.0, 12.0, 10.0, 4.0, 10.0]]


def image(number: int, **changes) -> dict:
    return {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH} | changes


def annotation(number: int, image_id: int = 1, **changes) -> dict:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 17,
        "bbox": [4.0, 4.0, 8.0, 6.0],
        "area": 48.0,
        "iscrowd": 0,
        "segmentation": SQUARE,
    } | changes


def without(entry: dict, key: str) -> dict:
    return {name: value for name, value in entry.items() if name != key}


@pytest.fixture
def folder(tmp_path):
    """Writes a folder of these annotations for both parts, with images 1 to 3, and describes it."""
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        for number in (1, 2, 3):
            Image.fromarray(PIXELS).save(tmp_path / part / f"{number}.png")
    (tmp_path / "annotations").mkdir()

    def write(annotations=None, images=None, categories=None, **others) -> Coco:
        content = {
            "images": [image(1)] if images is None else images,
            "annotations": [annotation(1)] if annotations is None else annotations,
            "categories": CATEGORIES if categories is None else categories,
        }
        for part in ("train", "val"):
            path = tmp_path / "annotations" / f"instances_{part}2017.json"
            path.write_text(json.dumps({key: value for key, value in (content | others).items() if value != "absent"}))
        return Coco(root=str(tmp_path), workers=0)

    return write


def opened(data: Coco, split="val"):
    return data.open(split, augment=False)


def first(data: Coco, split="val") -> dict:
    return opened(data, split)[SampleKey(0, 0)][1]


def counts(data: Coco, split="val") -> dict:
    report = opened(data, split).report
    assert report.objects_read == report.objects + sum(report.counts[name] for name in OBJECTS_LEFT_OUT)
    assert report.images_read == report.images + report.counts["empty_images"]
    return dict(report.counts)


def refused(data: Coco, message: str, *, named=("instances_val2017.json",), split="val") -> None:
    with pytest.raises(ValueError, match=message) as caught:
        opened(data, split)[SampleKey(0, 0)]
    text = str(caught.value)
    assert "\n" not in text
    for name in named:
        assert name in text


# What is read


def test_labels_are_contiguous_in_the_order_of_category_ids(folder):
    data = folder([annotation(1, category_id=44), annotation(2, category_id=3), annotation(3, category_id=17)])
    samples = opened(data)
    assert samples.facts.class_names == ("car", "cat", "bottle")
    assert samples.facts.category_ids == (3, 17, 44)
    assert len(samples.facts.class_names) == 3  # without the background
    assert samples.facts == data.facts()
    labels = samples[SampleKey(0, 0)][1]["labels"]
    assert labels.tolist() == [3, 1, 2]
    assert [samples.facts.category_ids[label - 1] for label in labels] == [44, 3, 17]


def test_a_sample_has_the_pixels_box_area_and_mask_of_the_files(folder):
    pixels, target = opened(folder())[SampleKey(0, 0)]
    assert torch.equal(pixels, torch.from_numpy(PIXELS).permute(2, 0, 1) / 255)
    assert target["boxes"].tolist() == [[4, 4, 12, 10]]
    assert (target["image_id"], target["area"].tolist(), target["iscrowd"].tolist()) == (1, [48], [0])
    expected = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.uint8)
    expected[0, 4:10, 4:12] = 1
    assert torch.equal(target["masks"], expected)


def test_images_come_in_the_order_of_their_ids(folder):
    samples = opened(folder([annotation(1, 3)], [image(3), image(1), image(2)]))
    assert [samples[SampleKey(0, index)][1]["image_id"] for index in range(3)] == [1, 2, 3]
    assert [len(samples[SampleKey(0, index)][1]["labels"]) for index in range(3)] == [0, 0, 1]
    with pytest.raises(IndexError, match="there are 3 images"):
        samples[SampleKey(0, 3)]


def test_images_without_an_object_stay_in_validation_and_leave_training(folder):
    data = folder([annotation(1, 2)], [image(1), image(2), image(3)])
    assert (len(opened(data)), counts(data)) == (3, {})
    samples = opened(data, "train")
    assert len(samples) == 1
    assert samples[SampleKey(0, 0)][1]["image_id"] == 2
    assert counts(data, "train") == {"empty_images": 2}
    assert "image 1 in" in str(samples.report)
    kept = replace(data, skip_empty=False)
    assert (len(opened(kept, "train")), counts(kept, "train")) == (3, {})
    nothing = kept.open("train", augment=True)[SampleKey(0, 0)][1]
    assert nothing["boxes"].shape == (0, 4)
    assert nothing["masks"].shape == (0, HEIGHT, WIDTH)
    assert nothing["boxes"].dtype == torch.float32


def test_training_without_any_object_is_refused(folder):
    refused(folder([]), "must have an image to use: of 1 none is left; set data.skip_empty", split="train", named=())
    refused(folder([], []), "must have an image to use: of 0 none is left; add images")


def test_crowd_regions_are_marked_in_validation_and_left_out_of_training(folder):
    crowd = annotation(2, iscrowd=1, segmentation={"size": [HEIGHT, WIDTH], "counts": [0, 200, 400]})
    data = folder([annotation(1), crowd])
    target = first(data)
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["masks"][1].sum() == 200
    assert counts(data) == {"crowd_ignored": 1}
    assert len(first(data, "train")["labels"]) == 1
    assert counts(data, "train") == {"crowd_left_out": 1}


def test_a_crowd_region_does_not_count_in_average_precision(folder):
    target = first(folder([annotation(1), annotation(2, iscrowd=1, bbox=[15, 4, 14, 14])]))
    found = {"boxes": torch.tensor([[4.0, 4, 12, 10], [16, 5, 20, 9]]), "scores": torch.tensor([0.5, 0.9])}
    results = []
    for iscrowd in ([0, 1], [0, 0]):
        measure = MeanAveragePrecision()
        prediction = found | {"labels": target["labels"]}
        measure.update([prediction], [target | {"iscrowd": torch.tensor(iscrowd)}])
        with contextlib.redirect_stdout(io.StringIO()):
            results.append(float(measure.compute()["map"]))
    assert results[0] == 1
    assert results[1] < 0.6


def test_an_object_without_iscrowd_is_none(folder):
    assert first(folder([without(annotation(1), "iscrowd")]))["iscrowd"].tolist() == [0]


def test_an_area_that_is_not_given_is_computed(folder):
    data = folder([without(annotation(1, segmentation=[[4, 4, 12, 4, 4, 10]]), "area")])
    assert first(data)["area"].item() == first(data)["masks"].sum()
    assert counts(data) == {"area_computed": 1}
    boxes = replace(data, masks=False)
    assert first(boxes)["area"].item() == 48
    assert "masks" not in first(boxes)
    assert not boxes.has_masks


def test_the_given_area_is_kept(folder):
    assert first(folder([annotation(1, area=7.5)]))["area"].tolist() == [7.5]


# Boxes


@pytest.mark.parametrize(
    ("box", "expected", "noted"),
    [
        ([0, 0, WIDTH, HEIGHT], [0, 0, WIDTH, HEIGHT], {}),
        ([-4, 2, 10, 5], [0, 2, 6, 7], {"clipped": 1}),
        ([2, 2, 100, 100], [2, 2, WIDTH, HEIGHT], {"clipped": 1}),
        ([20.02, 3, 9.98 + 1e-9, 4], [20.02, 3, 30, 7], {}),
        ([WIDTH, 2, 5, 5], None, {"outside": 1}),
        ([-9, 2, 9, 5], None, {"outside": 1}),
        ([2, 500, 5, 5], None, {"outside": 1}),
        ([5, 5, 0, 5], None, {"zero_area": 1}),
        ([5, 5, 5, 0.0], None, {"zero_area": 1}),
        ([5, 5, 0.5, 5], [5, 5, 5.5, 10], {}),
    ],
)
def test_boxes_are_clipped_or_left_out_with_a_count(folder, box, expected, noted):
    data = folder([annotation(1, bbox=box), annotation(2)])
    found = first(data)["boxes"].tolist()
    assert np.allclose(found, ([] if expected is None else [expected]) + [[4, 4, 12, 10]])
    assert counts(data) == noted


def test_boxes_below_a_pixel_leave_training_alone(folder):
    data = folder([annotation(1, bbox=[29.5, 5, 4, 5]), annotation(2)])
    assert counts(data) == {"clipped": 1}
    assert counts(data, "train") == {"below_a_pixel": 1}
    assert first(data, "train")["boxes"].tolist() == [[4, 4, 12, 10]]


number = st.floats(-100, 200, width=32)


@settings(max_examples=200)
@given(left=number, top=number, width=number, height=number, training=st.booleans())
def test_a_settled_box_is_inside_and_has_an_area(left, top, width, height, training):
    report = DataReport("file")
    box = settled_box(
        (left, top, left + abs(width), top + abs(height)), (50, 70), training=training, report=report, place="1"
    )
    if box is None:
        assert sum(report.counts[name] for name in OBJECTS_LEFT_OUT) == 1 == report.counts.total()
        return
    stored = torch.tensor(box, dtype=torch.float32)
    assert (stored >= 0).all()
    assert (stored <= torch.tensor([70, 50, 70, 50])).all()
    assert (stored[2:] > stored[:2]).all()
    flipped = 70 - stored[[2, 0]]
    assert not training or flipped[1] > flipped[0]


# Masks


@pytest.mark.parametrize("form", ["polygons", "uncompressed", "compressed"])
def test_masks_of_every_form_are_pycocotools_own(folder, form):
    polygons = [[3.3, 2.1, 17.8, 4.0, 9.5, 18.2], [20, 5, 29.9, 5, 29.9, 19, 25, 12.5, 20, 19]]
    compressed = mask_tools.merge(mask_tools.frPyObjects(polygons, HEIGHT, WIDTH))
    text = compressed["counts"].decode()
    segmentation = {
        "polygons": polygons,
        "compressed": {"size": [HEIGHT, WIDTH], "counts": text},
        "uncompressed": {"size": [HEIGHT, WIDTH], "counts": run_lengths(text)},
    }[form]
    with pytest.warns(DeprecationWarning, match="__array__"):
        expected = mask_tools.decode(compressed)
    found = first(folder([annotation(1, segmentation=segmentation)]))["masks"]
    assert np.array_equal(found[0].numpy(), expected)
    assert 100 < expected.sum() < 400


@settings(max_examples=100)
@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(0, 1)))
def test_run_lengths_are_those_that_pycocotools_writes(mask):
    encoded = encode_mask(mask)
    lengths = run_lengths(encoded["counts"])
    assert np.array_equal(np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(mask.shape, order="F"), mask)
    assert np.array_equal(decode_mask(encoded, *mask.shape), mask)


def test_long_runs_too():
    mask = np.zeros((1000, 1200), np.uint8)
    mask[10:990, 30:1100] = 1
    mask[500] = 0
    assert sum(run_lengths(encode_mask(mask)["counts"])) == mask.size


def test_polygons_of_two_points_are_left_out_with_a_count(folder):
    data = folder([annotation(1, segmentation=[*SQUARE, [1, 1, 2, 2], []])])
    assert first(data)["masks"].sum() == 48
    assert counts(data) == {"short_polygons": 2}
    data = folder([annotation(1, segmentation=[[1, 1, 2, 2]]), annotation(2, segmentation=[]), annotation(3)])
    assert len(first(data)["labels"]) == 1
    assert counts(data) == {"short_polygons": 1, "no_mask": 2}
    assert len(first(replace(data, masks=False))["labels"]) == 3


def rle(counts, size=(HEIGHT, WIDTH)):
    return {"size": list(size), "counts": counts}


WHOLE = encode_mask(np.eye(HEIGHT, WIDTH, dtype=np.uint8))["counts"]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, 5, 5, 5]], "a polygon must be a list of finite numbers, x and y in turn"),
        ([[1, 1, 5, 5, 5, "6"]], "a polygon must be a list of finite numbers"),
        ([[1, 1, 5, 5, 5, float("nan")]], "a polygon must be a list of finite numbers"),
        ([[1, 1, 5, 5, 5, int("9" * 401)]], "a polygon must be a list of finite numbers"),
        ([1, 1, 5, 5, 5, 6], "a polygon must be a list"),
        ([[1, 1, 5, 5, 5, 1e9]], "a polygon must lie near its image"),
        ("text", "segmentation must be a list of polygons or run lengths"),
        (None, "segmentation must be a list of polygons .* set data.masks to false"),
        (rle([100]), "run lengths must fill the image, 600 pixels: .* add up to 100"),
        (rle([0, 700]), "run lengths must fill the image"),
        (rle([-1, 601]), "counts must be a text or a list of whole numbers"),
        (rle([1.5, 598.5]), "counts must be a text or a list of whole numbers"),
        (rle(7), "counts must be a text or a list of whole numbers"),
        ({"size": [HEIGHT, WIDTH]}, "counts must be a text or a list"),
        (rle([600], (WIDTH, HEIGHT)), r"must be of the image's size, \[20, 30\] \(height, width\): .* has \[30, 20\]"),
        ({"counts": [600]}, "must be of the image's size, .* has None"),
        (rle(WHOLE[:-2]), "run lengths must fill the image"),
        (rle(""), "run lengths must fill the image, 600 pixels: .* add up to 0"),
        (rle("é11"), "compressed run lengths: in annotation 9 .* is not expected"),
        (rle("oooooooooooo"), "compressed run lengths"),
        (rle("o"), "compressed run lengths: .* ends within a number"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(folder, segmentation, message):
    data = folder([annotation(1), annotation(9, segmentation=segmentation)])
    refused(data, message, named=("instances_val2017.json", "annotation 9"))
    assert len(first(replace(data, masks=False))["labels"]) == 2


def test_a_missing_segmentation_is_refused_where_masks_are_read(folder):
    refused(folder([without(annotation(9), "segmentation")]), "set data.masks to false", named=("annotation 9",))


# What is refused of an annotation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [1, 1, -2, 4]}, "no negative size: annotation 9 .* corners are not COCO's form"),
        ({"bbox": [1, 1, float("nan"), 4]}, "bbox must be four finite numbers: annotation 9 .*nan"),
        ({"bbox": [float("inf"), 1, 2, 4]}, "bbox must be four finite numbers"),
        ({"bbox": [1, 1, 2]}, "bbox must be four finite numbers"),
        ({"bbox": [1, 1, 2, int("9" * 401)]}, "bbox must be four finite numbers"),
        ({"area": int("9" * 401)}, "area must be a finite number"),
        ({"id": int("9" * 401)}, "id must be a whole number, 0 or more: an annotation"),
        ({"bbox": "1 1 2 4"}, "bbox must be four finite numbers"),
        ({"bbox": [1, 1, 2, True]}, "bbox must be four finite numbers"),
        ({"area": -1}, "area must be a finite number, zero or more: annotation 9 .* has -1"),
        ({"area": float("nan")}, "area must be a finite number"),
        ({"iscrowd": 2}, "iscrowd must be 0 or 1: annotation 9 .* has 2"),
        ({"category_id": 99}, "category_id must be one of the categories: annotation 9 .* has 99"),
        ({"category_id": "cat"}, "category_id must be a whole number"),
        ({"image_id": 7}, "image_id must be one of the images: annotation 9 .* has 7"),
        ({"image_id": 1.5}, "image_id must be a whole number"),
        ({"id": 1}, "annotation ids must differ: .* has 1 twice"),
        ({"id": -9}, "id must be a whole number, 0 or more: an annotation"),
    ],
)
def test_an_annotation_that_cannot_be_is_refused(folder, changes, message):
    refused(folder([annotation(1), annotation(9, **changes)]), message)


@pytest.mark.parametrize("area", [None, 0, 0.0])
def test_an_area_that_is_not_known_is_computed(folder, area):
    """Some tools write 0 where they know none; as it stands the object would be none of COCO's small ones."""
    data = folder([annotation(1, area=area)])
    assert first(data)["area"].item() == first(data)["masks"].sum() > 0
    assert counts(data)["area_computed"] == 1


def test_no_mask_is_made_of_a_size_that_the_image_has_not(folder, tmp_path):
    """65,500 times 65,500 pixels of a mask would be 4 GiB."""
    data = folder([without(annotation(1), "area")], images=[image(1, height=65_500, width=65_500)])
    refused(data, "must have the size that its annotations say, 65500x65500 .* it has 30x20", named=("1.png",))


@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "bbox"])
def test_an_annotation_without_a_key_is_refused(folder, key):
    refused(folder([annotation(1), without(annotation(9), key)]), f"must have '{key}': it has only ")


# What is refused of a file


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("content", ["absent", {}, [1]])
def test_a_file_of_another_structure_is_refused(folder, key, content):
    refused(folder(**{key: content}), f"must have a list of objects '{key}'")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([image(1), image(1, file_name="2.png")], "image ids must differ: .* has 1 twice"),
        ([image(1, height=0)], "height must be a whole number, 1 to 65500: image 1 .* has 0"),
        ([image(1, width=-30)], "width must be a whole number, 1 to 65500"),
        ([image(1, height=10**6, width=10**6)], "height must be a whole number, 1 to 65500: image 1 .* has 1000000"),
        ([image(1, file_name="../2.png")], r"file_name must be of a file in .*: image 1 .* has '\.\./2\.png'"),
        ([image(1, file_name="/2.png")], "file_name must be of a file in .*: image 1 .* has '/2.png'"),
        ([image(1, width=30.5)], "width must be a whole number"),
        ([image(1, width=float("nan"))], "width must be a whole number"),
        ([image("one")], "id must be a whole number"),
        ([image(1, file_name=7)], "file_name must be a text: image 1 .* has 7"),
        ([without(image(1), "file_name")], "must have 'file_name': it has only 'id', 'height', 'width'"),
        ([without(image(1), "height")], "must have 'height'"),
        ([without(image(1), "id")], "must have 'id'"),
        ([image(1), image(8), image(9)], r"every image must have its file: .*8\.png \(image 8 .* of 1 other images"),
        ([image(1), image(9)], r"every image must have its file: .*9\.png \(image 9 .*is not there; add"),
    ],
)
def test_images_that_cannot_be_are_refused(folder, images, message):
    refused(folder(images=images), message)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([], "must have a category"),
        ([{"id": 17, "name": "a"}, {"id": 17, "name": "b"}], "category ids must differ: .* has 17 twice"),
        ([{"id": 17}], "category 17 in .* must have 'name'"),
        ([{"name": "a"}], "must have 'id'"),
    ],
)
def test_categories_that_cannot_be_are_refused(folder, categories, message):
    refused(folder(categories=categories), message)
    with pytest.raises(ValueError, match=message):
        folder(categories=categories).facts()


@pytest.mark.parametrize("content", [b'{"images": [', b"", b"\xff\xfe\x00", b"[" * 100_000])
def test_broken_json_is_refused(folder, content):
    data = folder()
    (Path(data.root) / data.val_annotations).write_bytes(content)
    refused(data, "must be JSON: ")


def test_json_that_is_no_object_is_refused(folder):
    data = folder()
    (Path(data.root) / data.val_annotations).write_text("[]")
    refused(data, "must hold a JSON object")


def test_missing_files_and_folders_are_refused(folder, tmp_path):
    data = folder()
    refused(replace(data, val_annotations="absent.json"), "absent.json cannot be read", named=())
    refused(replace(data, val_annotations="annotations"), "annotations cannot be read", named=())
    refused(replace(data, val_images="absent"), "there is no folder .*absent", named=())
    refused(data, "annotations for 'train' and 'val' alone", split="test", named=())


def test_images_may_lie_in_folders_of_their_own(folder):
    data = folder(images=[image(1, file_name="deep/1.png")])
    (Path(data.root) / "val2017" / "deep").mkdir()
    (Path(data.root) / "val2017" / "1.png").rename(Path(data.root) / "val2017" / "deep" / "1.png")
    assert opened(data)[SampleKey(0, 0)][0].shape == (3, HEIGHT, WIDTH)


def test_other_categories_in_val_than_in_train_are_refused(folder):
    data = folder(categories=[*CATEGORIES, {"id": 5, "name": "dog"}])
    train = Path(data.root) / data.train_annotations
    renamed = Path(data.root) / "renamed.json"
    content = json.loads(train.read_text())
    content["categories"][0]["name"] = "Cat"
    renamed.write_text(json.dumps(content))
    changed = replace(data, train_annotations=str(renamed))
    refused(changed, "the same categories: .* differ in the ids 17; give both one list", split="train", named=())
    folder()
    refused(replace(data, val_annotations=str(renamed)), "differ in the ids 5, 17", split="train", named=())
    assert len(opened(replace(data, val_annotations="absent.json"), "train")) == 1  # asks nothing of val then


# Images


GREY = PIXELS[:, :, 0]
IN_OTHER_MODES = {
    "L": (Image.fromarray(GREY), np.stack([GREY] * 3, -1)),
    "1": (Image.fromarray(GREY > 99), np.stack([(GREY > 99) * 255] * 3, -1)),
    "LA": (Image.fromarray(GREY).convert("LA"), np.stack([GREY] * 3, -1)),
    "RGBA": (Image.fromarray(np.dstack([PIXELS, GREY])), PIXELS),
    "P": (Image.fromarray(GREY).convert("P"), np.stack([GREY] * 3, -1)),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257), np.stack([GREY] * 3, -1)),
}


@pytest.mark.parametrize("mode", IN_OTHER_MODES)
def test_an_image_of_any_mode_has_three_channels(folder, mode):
    data = folder()
    stored, expected = IN_OTHER_MODES[mode]
    path = Path(data.root) / "val2017" / "1.png"
    stored.save(path)
    with Image.open(path) as again:
        assert again.mode == mode
    found = opened(data)[SampleKey(0, 0)][0]
    assert torch.equal(found, torch.tensor(expected).permute(2, 0, 1).to(torch.uint8) / 255)


def turned(picture: Image.Image, orientation: int) -> Image.Image:
    """The image that a viewer shows of one with this entry in its EXIF."""
    picture.getexif()[274] = orientation
    return ImageOps.exif_transpose(picture)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("as_shown", [True, False])
def test_boxes_and_masks_stand_upright_with_their_image(folder, orientation, as_shown):
    """A white rectangle, its box and its outline, annotated on the image as shown or as stored, stay on one another."""
    pixels, (left, top, wide, high) = np.zeros((HEIGHT, WIDTH, 3), np.uint8), (3, 5, 9, 6)
    pixels[top : top + high, left : left + wide] = 255
    stored, height, width = Image.fromarray(pixels), HEIGHT, WIDTH
    if as_shown or orientation < 5:  # a half turn leaves the size: such annotations are taken to be as shown
        stored = turned(stored, {6: 8, 8: 6}.get(orientation, orientation))  # each other is its own inverse
    else:
        height, width = WIDTH, HEIGHT
    corners = [left, top, left + wide, top, left + wide, top + high, left, top + high]
    box = {"bbox": [left, top, wide, high], "segmentation": [corners], "area": wide * high}
    data = replace(folder(annotations=[annotation(1, **box)]), masks=True)
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(Path(data.root) / "val2017" / "1.png", exif=exif)
    found, target = opened(data)[SampleKey(0, 0)]
    assert found.shape == (3, height, width)
    assert torch.equal(target["masks"][0], found[0].to(torch.uint8))
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert torch.equal(found[0, y1:y2, x1:x2], torch.ones(y2 - y1, x2 - x1))
    assert found[0].sum() == (y2 - y1) * (x2 - x1) == wide * high


def test_an_image_of_another_size_than_described_is_refused(folder):
    data = folder(images=[image(1, height=WIDTH, width=HEIGHT)], annotations=[annotation(1)])
    refused(data, r"1\.png \(image 1 in .* 20x30 \(width x height\): it has 30x20")


@pytest.mark.parametrize("content", [b"not an image", b""])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_named(folder, content, workers):
    data = folder()
    (Path(data.root) / "val2017" / "1.png").write_bytes(content)
    batches = DataLoader(
        opened(data), sampler=[SampleKey(0, 0)], num_workers=workers, collate_fn=DetectionSamples.collate
    )
    iterator = iter(batches)
    with pytest.raises(UndecodableImageError, match=r"1\.png does not decode .* \[image 1 in .*json\]$") as caught:
        next(iterator)
    if workers:  # the traceback would keep the worker, and that costs 5 seconds when it is collected
        iterator._shutdown_workers()
    assert "\n" not in str(caught.value)


def test_without_pycocotools_the_extra_is_named(folder, monkeypatch):
    import pycocotools

    data = folder()
    monkeypatch.delattr(pycocotools, "mask")
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mrla\[dense\]'"):
        first(data)
    assert len(first(replace(data, masks=False))["labels"]) == 1


def test_a_report_names_the_first_few(folder):
    data = folder([annotation(number, bbox=[-1, 1, 5, 5]) for number in range(1, 6)])
    text = str(opened(data).report)
    assert text.splitlines()[0].endswith("instances_val2017.json: 1 of 1 images and 5 of 5 objects are used")
    assert text.splitlines()[1] == "  5 boxes clipped to the image: annotation 1, annotation 2, annotation 3, ..."
