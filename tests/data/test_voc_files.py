"""Pascal VOC's folder: what is read, left out with a count, and refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import VOCDetection

from mrla.data.annotated_images import OBJECTS_LEFT_OUT
from mrla.data.sampling import SampleKey
from mrla.data.sources import Voc

HEIGHT, WIDTH = 20, 30


def thing(name="dog", box=(5, 5, 12, 10), difficult: object = 0) -> str:
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"


def document(*objects: str, height: object = HEIGHT, width: object = WIDTH) -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(objects)}</annotation>"


@pytest.fixture
def voc(tmp_path):
    """Writes VOC2012 with these documents, the same for training and validation, and describes it."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)

    def write(*documents: str) -> Voc:
        names = [f"2008_{number:06d}" for number, _ in enumerate(documents)]
        for name, text in zip(names, documents, strict=True):
            (folder / "Annotations" / f"{name}.xml").write_text(text)
            Image.fromarray(np.full((HEIGHT, WIDTH, 3), 99, np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg")
        for part in ("train", "val"):
            (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names) + "\n")
        return Voc(root=str(tmp_path), workers=0)

    return write


def opened(data: Voc, split="val"):
    return data.open(split, augment=False)


def first(data: Voc, split="val") -> dict:
    return opened(data, split)[SampleKey(0, 0)][1]


def counts(data: Voc, split="val") -> dict:
    report = opened(data, split).report
    assert report.objects_read == report.objects + sum(report.counts[name] for name in OBJECTS_LEFT_OUT)
    assert report.images_read == report.images + report.counts["empty_images"]
    return dict(report.counts)


def refused(data: Voc, message: str, named="2008_000000.xml") -> None:
    with pytest.raises(ValueError, match=message) as caught:
        opened(data)[SampleKey(0, 0)]
    assert "\n" not in str(caught.value)
    assert named in str(caught.value)


def test_boxes_count_from_0_and_hold_their_last_pixels(voc):
    data = voc(document(thing(box=(1, 1, WIDTH, HEIGHT)), thing("person", (5, 6, 12, 10)), thing("cat", (3, 3, 3, 3))))
    image, target = opened(data)[SampleKey(0, 0)]
    assert target["boxes"].tolist() == [[0, 0, WIDTH, HEIGHT], [4, 5, 12, 10], [2, 2, 3, 3]]
    assert target["area"].tolist() == [WIDTH * HEIGHT, 40, 1]
    names = data.facts().class_names
    assert [names[label - 1] for label in target["labels"]] == ["dog", "person", "cat"]
    assert "masks" not in target
    assert (image.shape, target["image_id"], counts(data)) == ((3, HEIGHT, WIDTH), 1, {})


def test_there_are_20_classes_in_vocs_order():
    facts = Voc().facts()
    assert (len(facts.class_names), Voc().has_masks) == (20, False)
    assert facts.class_names == tuple(sorted(facts.class_names))
    assert facts.category_ids == tuple(range(1, 21))


def test_classes_of_ones_own_are_those_that_the_annotations_of_both_lists_name(voc, tmp_path):
    data = voc(document(thing("unicorn"), thing("dragon")), document(thing("dragon")), document(thing("cat")))
    lists = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Main"
    (lists / "train.txt").write_text("2008_000000\n2008_000001\n")
    (lists / "val.txt").write_text("2008_000002\n")
    facts = data.facts()
    assert (facts.class_names, facts.category_ids) == (("cat", "dragon", "unicorn"), (1, 2, 3))
    assert first(data, "train")["labels"].tolist() == [3, 2]
    assert first(data, "val")["labels"].tolist() == [1]


def test_fractions_of_a_pixel_are_read(voc):
    found = first(voc(document(thing(box=(5.5, 5, 12.25, 10)))))["boxes"]
    torch.testing.assert_close(found, torch.tensor([[4.5, 4, 12.25, 10]]))


def test_difficult_objects_leave_training_and_do_not_count_in_validation(voc):
    data = voc(document(thing(), thing(difficult=1)), document(thing(difficult=1)))
    assert first(data)["iscrowd"].tolist() == [0, 1]
    assert (len(opened(data)), counts(data)) == (2, {"difficult_ignored": 2})
    assert first(data, "train")["iscrowd"].tolist() == [0]
    assert (len(opened(data, "train")), counts(data, "train")) == (1, {"difficult_left_out": 2, "empty_images": 1})
    assert len(opened(replace(data, skip_empty=False), "train")) == 2


def test_difficult_and_parts_may_be_left_out(voc):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    text = thing().replace("<difficult>0</difficult>", part)
    assert first(voc(document(text)))["iscrowd"].tolist() == [0]


@pytest.mark.parametrize(
    ("box", "expected", "noted"),
    [
        ((0, 5, 40, 10), [0, 4, WIDTH, 10], {"clipped": 1}),
        ((31, 5, 40, 10), None, {"outside": 1}),
        ((6, 5, 5, 10), None, {"zero_area": 1}),
    ],
)
def test_boxes_are_clipped_or_left_out_with_a_count(voc, box, expected, noted):
    data = voc(document(thing(box=box), thing(box=(3, 3, 6, 6))))
    assert first(data)["boxes"].tolist() == ([] if expected is None else [expected]) + [[2, 2, 6, 6]]
    assert counts(data) == noted


def test_torchvision_reads_the_same_folder(voc, tmp_path):
    data = voc(document(thing()), document(thing("car")))
    theirs = VOCDetection(str(tmp_path), "2012", "val")
    for index, (_, target) in enumerate(theirs):
        (entry,) = target["annotation"]["object"]
        box = opened(data)[SampleKey(0, index)][1]["boxes"][0].tolist()
        assert [float(value) for value in entry["bndbox"].values()] == [box[0] + 1, box[1] + 1, *box[2:]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            document(thing(), thing().replace("<name>dog</name>", "")),
            "must be one of aeroplane.*: object 2 in .* has ''",
        ),
        (document(thing(), width=10**6), "must be whole, from 1 to 65500 pixels: .* has 1e\\+06x20"),
        (document(thing(difficult=2)), "difficult must be 0 or 1: object 1"),
        (document(thing(box=(5, 5, "x", 10))), "bndbox/xmax must be a finite number: object 1 .* has 'x'"),
        (document(thing(box=(5, 5, "nan", 10))), "bndbox/xmax must be a finite number"),
        (document(thing(box=(5, 5, 8))), "bndbox/ymax must be a finite number: object 1 .* has None"),
        (document(thing(box=(9, 5, 5, 10))), "must not have a negative size: object 1 in .* xmin 9"),
        (document(thing(), height=0), "size must be whole, from 1 to 65500 pixels: .* has 30x0"),
        (document(thing(), width=-30), "size must be whole, from 1"),
        (document(thing(), width="1.5"), "size must be whole, from 1"),
        (document(thing()).replace("size>", "sizes>"), "size/height must be a finite number: .* has None"),
        ("<annotation>", "must be XML as VOC has it: no element found"),
        ("", "must be XML as VOC has it"),
        ("<html/>", "must hold an 'annotation': it holds 'html'"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "must be XML as VOC has it"),
        ('<!DOCTYPE a [<!ENTITY b "bb">]>' + document(thing("&b;")), "declares a document type 'a'"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd">' + document(thing()), "declares a document type 'a'"),
        (document(thing(), height=WIDTH, width=HEIGHT), r"20x30 \(width x height\): it has 30x20"),
    ],
)
def test_a_file_that_cannot_be_is_refused(voc, text, message):
    refused(voc(text), message)


@pytest.mark.parametrize("file", ["Annotations/2008_000000.xml", "JPEGImages/2008_000000.jpg"])
def test_a_missing_file_is_refused(voc, file, tmp_path):
    data = voc(document(thing()))
    (tmp_path / "VOCdevkit" / "VOC2012" / file).unlink()
    refused(data, "must have its (annotations|file): ", named=file)


def test_lists(voc, tmp_path):
    data = voc(document(thing()), document(thing()))
    lists = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Main"
    with pytest.raises(ValueError, match=r"test\.txt cannot be read .* there is \['train', 'val'\]"):
        opened(data, "test")
    (lists / "test.txt").write_text("2008_000001  1\n\n")  # as lists of one class are
    assert len(opened(data, "test")) == 1
    (lists / "val.txt").write_text("2008_000001\n2008_000001\n")
    refused(data, r"must have each once: .*val\.txt has 2008_000001 twice", named="val.txt")
    (lists / "val.txt").write_text("")
    refused(data, "of 0 none is left; add images", named="val.txt")
    assert len(opened(replace(data, val_set="train"))) == 2
    with pytest.raises(ValueError, match=r"VOC2007.*cannot be read .* there is none"):
        opened(replace(data, year="2007"))


def test_images_are_looked_for_in_their_folder(voc):
    data = voc(document(thing()))
    images = Path(data.root) / "VOCdevkit" / "VOC2012" / "JPEGImages"
    images.rename(images.with_name("images"))
    refused(data, "there is no folder .*JPEGImages", named="JPEGImages")
