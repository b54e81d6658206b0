import pickle
import struct
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from small_cifar import PER_FILE, make_cifar, md5
from torchvision import datasets

from mrla.data.images import UndecodableImageError
from mrla.data.samples import IGNORE_LABEL, loader
from mrla.data.sampling import PADDING, SampleKey
from mrla.data.sources import Cifar10, Cifar100, Digits, Folder, kinds_for
from mrla.data.sources.cifar import _read


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """A description whose root holds both the folder and the archive, and torchvision's class."""
    dataset, describe = {"cifar10": (datasets.CIFAR10, Cifar10), "cifar100": (datasets.CIFAR100, Cifar100)}[
        request.param
    ]
    make_cifar(tmp_path / "data", dataset, monkeypatch)
    yield describe(root=str(tmp_path / "data"), workers=0), dataset
    _read.cache_clear()


def remove_folder(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.fixture
def folder(tmp_path):
    """Images of two classes, 4 to train on and 2 to validate on of each."""
    draw = np.random.default_rng(0)
    for split, number in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    return Folder(root=str(tmp_path), size=16, workers=0)


def all_batches(samples, epochs: int = 1, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches, found = loader(samples, **options), []
    try:
        for epoch in range(epochs):
            batches.sampler.set_epoch(epoch)
            found += [tuple(batch) for batch in batches]
    finally:
        # After an error the workers would live on in the traceback, and cost 5 seconds each when that is collected.
        if options.get("workers") and batches._iterator is not None:
            batches._iterator._shutdown_workers()
    return found


def assert_same(batches, others) -> None:
    assert len(batches) == len(others)
    for (images, labels), (other_images, other_labels) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# Digits


def test_digits_are_split_once_stratified_disjoint_and_whole():
    from sklearn.datasets import load_digits

    parts = {split: Digits().open(split) for split in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [898, 449, 450]
    everything = Counter(load_digits().target.tolist())
    for part, share in zip(parts.values(), (0.5, 0.25, 0.25), strict=True):
        for label, count in Counter(part.labels).items():
            assert abs(count - share * everything[label]) <= 1
    found = torch.cat([part.tensors[0].flatten(1) for part in parts.values()])
    facts = Digits().facts()
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    expected = (images - facts.mean[0]) / facts.std[0]
    assert Counter(map(tuple, (found * 1000).round().int().tolist())) == Counter(
        map(tuple, (expected * 1000).round().int().tolist())
    )


def test_digits_constants_are_those_of_the_training_part():
    images = Digits().open("train").tensors[0]
    facts = Digits().facts()
    measured = images * facts.std[0] + facts.mean[0]
    assert round(measured.mean().item(), 4) == facts.mean[0]
    assert round(measured.std().item(), 4) == facts.std[0]
    assert (facts.in_chans, facts.size, facts.class_names) == (1, 8, tuple("0123456789"))


def test_digits_give_the_same_one_by_one_as_in_batches():
    samples = Digits().open("val")
    keys = [SampleKey(0, index) for index in (5, 448, PADDING, 0)]
    images, labels = samples.__getitems__(keys)
    assert images.shape == (4, 1, 8, 8)
    assert images.dtype == torch.float32
    for key, image, label in zip(keys, images, labels, strict=True):
        alone, alone_label = samples[key]
        assert torch.equal(image, alone)
        assert label == alone_label


def test_more_workers_than_cores_are_no_warning(recwarn):
    loader(Digits().open("train"), batch_size=8, workers=1000)
    assert not recwarn.list


def test_digits_with_workers_equal_those_without():
    samples = pickle.loads(pickle.dumps(Digits().open("train")))
    options = {"batch_size": 256, "shuffle": True, "drop_last": True}
    alone = all_batches(Digits().open("train"), **options)
    assert [len(labels) for _, labels in alone] == [256] * 3
    assert_same(alone, all_batches(samples, workers=2, **options))


# Padding and processes


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_padding_is_sample_0_with_the_ignored_label(kind, folder):
    data = Digits() if kind == "digits" else folder
    samples = data.open("val")
    image, label = samples[SampleKey(0, PADDING)]
    assert label == IGNORE_LABEL == torch.nn.CrossEntropyLoss().ignore_index
    assert torch.equal(image, samples[SampleKey(0, 0)][0])


@pytest.mark.parametrize("kind", ["digits", "folder"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_batches_of_two_processes_are_those_of_one(kind, shuffle, folder):
    data, size = (Digits(), 256) if kind == "digits" else (folder, 6)
    samples = data.open("train", seed=1)
    options = {"batch_size": size, "shuffle": shuffle, "drop_last": shuffle, "seed": 1, "epochs": 2}
    one = all_batches(samples, **options)
    ranks = [all_batches(samples, rank=rank, world_size=2, **options) for rank in (0, 1)]
    assert_same(one, [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)])


def test_processes_share_a_last_batch_that_does_not_divide():
    samples = Digits().open("val")
    ranks = [all_batches(samples, batch_size=256, rank=rank, world_size=2)[-1] for rank in (0, 1)]
    labels = torch.cat([labels for _, labels in ranks])
    assert len(labels) == 194
    assert labels[:193].tolist() == samples.labels[256:]
    assert labels[193] == IGNORE_LABEL


# Augmentation is a function of seed, epoch and index


def test_a_key_gives_the_same_image_in_any_order(folder):
    samples = folder.open("train", seed=1)
    keys = [SampleKey(epoch, index) for epoch in (0, 1) for index in range(len(samples))]
    forwards = {key: samples[key][0] for key in keys}
    backwards = {key: samples[key][0] for key in reversed(keys)}
    assert all(torch.equal(forwards[key], backwards[key]) for key in keys)
    assert not torch.equal(forwards[SampleKey(0, 0)], forwards[SampleKey(1, 0)])
    assert not torch.equal(folder.open("train", seed=2)[keys[0]][0], forwards[keys[0]])


def test_a_sample_leaves_the_random_state_alone(folder):
    samples = folder.open("train")
    before = torch.get_rng_state()
    samples[SampleKey(0, 0)]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("auto_augment", [None, "rand-m9-mstd0.5-inc1"])
def test_workers_change_nothing(folder, auto_augment):
    samples = replace(folder, auto_augment=auto_augment).open("train", seed=1)
    options = {"batch_size": 4, "shuffle": True, "drop_last": True, "epochs": 2}
    alone = all_batches(samples, **options)
    assert not torch.equal(alone[0][0], alone[2][0])
    assert_same(alone, all_batches(samples, workers=2, **options))


def count_threads(image) -> torch.Tensor:
    return torch.tensor(torch.get_num_threads())


def test_a_worker_takes_one_thread(folder):
    samples = folder.open("val")
    samples.transform = count_threads
    assert all_batches(samples, batch_size=4, workers=1)[0][0].tolist() == [1] * 4


def test_augment_chooses_between_the_two_transforms(folder):
    key = SampleKey(0, 1)
    plain = folder.open("train", augment=False)
    assert torch.equal(plain[key][0], plain[SampleKey(1, 1)][0])
    assert not torch.equal(plain[key][0], folder.open("train")[key][0])
    assert not torch.equal(folder.open("val", augment=True)[key][0], folder.open("val")[key][0])


def test_classes_in_turn(folder):
    """The same samples, so that any first part of them is of all classes, in memory and in files."""
    for samples in (Digits().open("val"), folder.open("val")):
        in_turn = samples.by_turns()
        assert type(in_turn) is type(samples)
        assert in_turn.class_names == samples.class_names
        classes = len(samples.class_names)
        assert in_turn.labels[:classes] == list(range(classes))
        one, other = ([part[SampleKey(0, index)] for index in range(len(part))] for part in (samples, in_turn))
        key = lambda sample: (sample[1], sample[0].sum().item())  # noqa: E731
        for (image, label), (same, same_label) in zip(sorted(one, key=key), sorted(other, key=key), strict=True):
            assert label == same_label
            assert torch.equal(image, same)


# CIFAR


def test_cifar_reads_archive_and_folder_alike_and_leaves_root_as_it_was(cifar, tmp_path, monkeypatch):
    data, dataset = cifar
    for_the_while = tmp_path / "for the while"
    for_the_while.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(for_the_while))
    root = Path(data.root)
    # Another root, because what was read from this one is kept.
    alone = tmp_path / "archive alone"
    alone.mkdir()
    (root / dataset.filename).rename(alone / dataset.filename)
    archived = replace(data, root=str(alone))
    before = (alone / dataset.filename).read_bytes()
    for split, files in (("train", len(dataset.train_list)), ("val", len(dataset.test_list)), ("test", 1)):
        unpacked, packed = data.open(split, seed=1), archived.open(split, seed=1)
        assert len(unpacked) == len(packed) == PER_FILE * files
        options = {"batch_size": PER_FILE, "shuffle": True}
        assert_same(all_batches(unpacked, **options), all_batches(packed, **options))
        assert unpacked.labels == packed.labels
    assert [path.name for path in alone.iterdir()] == [dataset.filename]
    assert (alone / dataset.filename).read_bytes() == before
    assert not list(for_the_while.iterdir())
    named = replace(data, root=str(alone / dataset.filename), download=True)  # the file itself: nothing to fetch
    itself = replace(data, root=str(root / dataset.base_folder))  # the unpacked folder likewise
    assert itself.open("val").labels == data.open("val").labels
    one, other = (all_batches(where.open("val"), batch_size=PER_FILE) for where in (named, data))
    assert_same(one, other)
    assert named.facts() == archived.facts() == data.facts()
    assert data.facts().class_names[:2] == ("class0", "class1")


def test_cifar_pixels_are_those_of_the_file_normalised_to_minus_one_and_one(cifar):
    data, dataset = cifar
    stored = pickle.loads((Path(data.root) / dataset.base_folder / dataset.test_list[0][0]).read_bytes())
    samples = data.open("val")
    for index in range(PER_FILE):
        image, label = samples[SampleKey(0, index)]
        expected = torch.tensor(stored["data"][index].reshape(3, 32, 32)) / 255 * 2 - 1
        torch.testing.assert_close(image, expected)
        assert label == stored.get("labels", stored.get("fine_labels"))[index]


def test_cifar_train_transforms_are_the_notebooks(cifar):
    from torchvision import transforms

    from mrla.data.randomness import derive_seed, seeded

    data, dataset = cifar
    notebook = transforms.Compose(
        [
            transforms.RandomResizedCrop(32),
            transforms.RandomHorizontalFlip(0.5),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )
    theirs = dataset(data.root, train=True, transform=notebook)
    samples = data.open("train", seed=4)
    for key in [SampleKey(epoch, index) for epoch in range(5) for index in range(len(samples))]:
        with seeded(derive_seed(4, "sample", *key)):
            expected, label = theirs[key.index]
        image, found = samples[key]
        assert torch.equal(image, expected)
        assert found == label


def test_cifar_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"must hold cifar-10-python\.tar\.gz or cifar-10-batches-py: .*nothing"
    ) as caught:
        Cifar10(root=str(tmp_path / "nothing")).open("train")
    one_line(caught)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_a_damaged_cifar_archive_is_refused(cifar, damage):
    data, dataset = cifar
    archive = Path(data.root) / dataset.filename
    content = archive.read_bytes()
    archive.write_bytes(content[:-20] if damage == "truncated" else content[:-1] + b"x")
    remove_folder(Path(data.root) / dataset.base_folder)
    with pytest.raises(ValueError, match="truncated or not the standard archive") as caught:
        data.open("train")
    text = one_line(caught)
    assert all(part in text for part in (str(archive), dataset.tgz_md5, md5(archive.read_bytes())))
    assert [path.name for path in Path(data.root).iterdir()] == [dataset.filename]


@pytest.mark.parametrize("damage", ["missing", "other"])
@pytest.mark.parametrize("table", ["train_list", "test_list", "meta"])
def test_a_damaged_cifar_folder_is_refused(cifar, table, damage):
    data, dataset = cifar
    meta = (dataset.meta["filename"], dataset.meta["md5"])
    name, expected = meta if table == "meta" else getattr(dataset, table)[-1]
    path = Path(data.root) / dataset.base_folder / name
    path.unlink() if damage == "missing" else path.write_bytes(b"x")
    with pytest.raises(ValueError, match="must be the standard file") as caught:
        data.open("train")
    text = one_line(caught)
    assert str(path) in text
    assert "missing" in text if damage == "missing" else expected in text and md5(b"x") in text


@pytest.mark.parametrize("asked", [False, True])
def test_cifar_is_fetched_only_when_asked(tmp_path, monkeypatch, asked):
    calls = []

    def fetch(dataset):
        calls.append(dataset.root)
        raise OSError("no\nnetwork")

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    with pytest.raises(ValueError, match=r"could not be fetched .*no network" if asked else "has neither") as caught:
        Cifar10(root=str(tmp_path), download=asked).open("val")
    one_line(caught)
    assert len(calls) == asked


# Folders


def test_a_folder_gives_images_and_class_names(folder):
    facts = folder.facts()
    assert (facts.in_chans, facts.size, facts.class_names) == (3, 16, ("cat", "dog"))
    for split, size in (("train", 8), ("val", 4)):
        samples = folder.open(split)
        images, labels = all_batches(samples, batch_size=size)[0]
        assert images.shape == (size, 3, 16, 16)
        assert images.dtype == torch.float32
        assert labels.tolist() == [0] * (size // 2) + [1] * (size // 2)
        assert samples.class_names == ("cat", "dog")


def test_an_image_is_resized_cropped_at_its_centre_and_normalised(folder):
    path = Path(folder.root) / "val" / "cat" / "0.png"
    image = Image.open(path)
    # 16 / 0.8 = 20, the height the image has: no resize, and columns 4 to 20, rows 2 to 18 are the centre.
    pixels = torch.tensor(np.asarray(image)[2:18, 4:20]).permute(2, 0, 1) / 255
    data = replace(folder, crop_pct=0.8, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    mean, std = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
    torch.testing.assert_close(data.open("val")[SampleKey(0, 0)][0], (pixels - mean) / std)


IN_OTHER_MODES = {
    "L.png": lambda grey: grey,
    "LA.png": lambda grey: grey.convert("LA"),
    "RGBA.png": lambda grey: grey.convert("RGBA"),
    "P.png": lambda grey: grey.convert("P"),
    "CMYK.tiff": lambda grey: grey.convert("RGB").convert("CMYK"),
}


@pytest.mark.parametrize("name", IN_OTHER_MODES)
def test_an_image_of_any_mode_has_the_pixels_of_its_three_channels(folder, name):
    pixels = np.random.default_rng(1).integers(0, 256, (20, 24), dtype=np.uint8)
    path = Path(folder.root) / "val" / "cat" / f"1{name}"  # after 0.png and before 2.png
    IN_OTHER_MODES[name](Image.fromarray(pixels)).save(path)
    with Image.open(path) as stored:
        assert stored.mode == path.stem[1:]
    plain = replace(folder, crop_pct=0.8, mean=(0.0,) * 3, std=(1.0,) * 3)
    (path.parent / "1.png").unlink()
    image, label = plain.open("val")[SampleKey(0, 1)]
    assert label == 0
    # The centre, as in the test above.
    torch.testing.assert_close(image, torch.tensor(pixels[2:18, 4:20]).expand(3, -1, -1) / 255)


GREY = np.random.default_rng(2).integers(0, 256, (20, 24), dtype=np.uint8)
WIDE = GREY.astype(np.uint16) * 257


def with_one_image(folder: Folder, path: Path) -> Folder:
    """The folder with `path` alone in val/cat, looked at in whole and not normalised."""
    for other in path.parent.iterdir():
        if other != path:
            other.unlink()
    return replace(folder, size=20, crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


def write_tiff(path: Path, bits: int, order: str) -> None:
    """An uncompressed TIFF of `GREY` with 12 or 16 bits, in either order of bytes, as PIL does not write it."""
    values = WIDE >> (16 - bits)
    if bits == 12:  # two values in three bytes
        text = "".join(f"{value:03x}" for value in values.ravel())
        pixels = bytes.fromhex(text)
    else:
        pixels = values.astype(f"{order}u2").tobytes()
    height, width = GREY.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(pixels))
    path.write_bytes(start + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


DEEP_GREYS = {
    "I;16 png": lambda path: Image.fromarray(WIDE).save(path),
    "I;16 tiff": lambda path: write_tiff(path, 16, "<"),
    "I;16B tiff": lambda path: write_tiff(path, 16, ">"),
    "I;16 12.tiff": lambda path: write_tiff(path, 12, "<"),
    "I pgm": lambda path: path.write_bytes(b"P5 24 20 65535\n" + WIDE.astype(">u2").tobytes()),
    "I 10.pgm": lambda path: path.write_bytes(b"P5 24 20 1020\n" + (WIDE // 257 * 4).astype(">u2").tobytes()),
}


@pytest.mark.parametrize("name", [*DEEP_GREYS, "I png"])
def test_greys_of_more_than_8_bits_are_scaled(folder, name, monkeypatch):
    mode, _, suffix = name.partition(" ")
    path = Path(folder.root) / "val" / "cat" / f"0.{suffix}"
    if name == "I png":  # as older PIL opens what newer PIL opens as I;16
        monkeypatch.setitem(PngImagePlugin._MODES, (16, 0), ("I", "I;16B"))
        name = "I;16 png"
    DEEP_GREYS[name](path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    image, _ = with_one_image(folder, path).open("val")[SampleKey(0, 0)]
    expected = torch.tensor(GREY[:, 2:22]).expand(3, -1, -1).double()
    assert (image.double() * 255 - expected).abs().max() < (1 if "12" in suffix else 0.01)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_greys_of_an_unknown_range_are_refused(folder, dtype, workers):
    path = Path(folder.root) / "val" / "cat" / "0.tiff"
    Image.fromarray(GREY.astype(dtype)).save(path)
    samples = with_one_image(folder, path).open("val")
    with pytest.raises(UndecodableImageError, match=r"must have values of a known range: its mode is [IF] ") as caught:
        all_batches(samples, batch_size=3, workers=workers)
    text = one_line(caught)
    assert text.startswith(str(path))
    assert text.endswith("save it with 8 or 16 bits a channel")


@pytest.mark.parametrize("transparency", [bytes(range(256)), 7])
def test_a_palette_with_transparency_shows_its_colours(folder, transparency):
    path = Path(folder.root) / "val" / "cat" / "0.png"
    stored = Image.fromarray(GREY, mode="P")
    colours = np.random.default_rng(3).integers(0, 256, (256, 3), dtype=np.uint8)
    stored.putpalette(colours.tobytes())
    stored.save(path, transparency=transparency)
    with Image.open(path) as opened:
        assert opened.mode == "P"
        assert opened.info["transparency"] == transparency
    # Warnings are errors here, and would be called an image that does not decode.
    image, _ = with_one_image(folder, path).open("val")[SampleKey(0, 0)]
    torch.testing.assert_close(image, torch.tensor(colours[GREY[:, 2:22]]).permute(2, 0, 1) / 255)


def test_classes_are_sorted_by_name_and_labels_follow(tmp_path):
    names = ["pear", "Fig", "apple", "10", "9", "kiwi", "lime", "Date"]
    for split in ("train", "val"):
        for number, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / split / name / "a.png")
        (tmp_path / split / "notes.txt").write_text("not a class")
    data = Folder(root=str(tmp_path), size=4, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0, workers=0)
    assert data.facts().class_names == ("10", "9", "Date", "Fig", "apple", "kiwi", "lime", "pear")
    images, labels = all_batches(data.open("val"), batch_size=8)[0]
    for image, label in zip(images, labels, strict=True):
        assert names[round(image[0].mean().item() * 255)] == data.facts().class_names[label]


def test_a_test_part_is_opened_if_there_is_one(folder):
    root = Path(folder.root)
    with pytest.raises(ValueError, match=r"has no test/, only train/ and val/") as caught:
        folder.open("test")
    one_line(caught)
    (root / "val").rename(root / "test")
    assert len(folder.open("test")) == 4


def test_a_missing_folder_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*absent") as caught:
        replace(folder, root=str(tmp_path / "absent")).open("train")
    one_line(caught)


def test_a_root_that_is_a_file_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"there is no folder .*file") as caught:
        replace(folder, root=str(tmp_path / "file")).open("train")
    one_line(caught)


@pytest.mark.parametrize(("missing", "there"), [("train", "val"), ("val", "train")])
@pytest.mark.parametrize("asked", ["train", "val"])
def test_a_missing_part_is_refused(folder, missing, there, asked):
    root = Path(folder.root)
    (root / missing).rename(root / "elsewhere")
    if (missing, asked) == ("val", "train"):
        assert len(folder.open("train")) == 8  # asks nothing of val
        return
    with pytest.raises(ValueError, match=f"has {there}/, {missing}/ is needed") as caught:
        folder.open(asked)
    text = one_line(caught)
    assert folder.root in text


def test_a_part_without_classes_is_refused(folder, tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="must have a folder of images for every class: it has none") as caught:
        replace(folder, root=str(tmp_path / "empty")).open("train")
    one_line(caught)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_an_image_is_refused(folder, split):
    for part in ("train", "val"):
        bird = Path(folder.root) / part / "bird"
        bird.mkdir()
        Image.new("RGB", (4, 4)).save(bird / "a.png")
    (Path(folder.root) / split / "bird" / "a.png").rename(Path(folder.root) / split / "bird" / "notes.txt")
    with pytest.raises(ValueError, match=r"every class needs an image: .*bird") as caught:
        folder.open(split)
    assert str(Path(folder.root) / split) in one_line(caught)


@pytest.mark.parametrize("where", ["train", "val"])
def test_other_classes_in_val_than_in_train_are_refused(folder, where):
    for number in range(7):
        (Path(folder.root) / where / f"extra{number}").mkdir()
    with pytest.raises(
        ValueError, match=f"val must have the classes of train: .*'extra0' is only in {where}"
    ) as caught:
        folder.open("val")
    text = one_line(caught)
    assert "'extra4'" in text
    assert "'extra5'" not in text
    assert text.endswith("and 2 more")


@pytest.mark.parametrize("content", ["text", "truncated", "empty"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_named_in_one_line(folder, content, suffix, workers):
    path = Path(folder.root) / "val" / "dog" / f"2.{suffix}"
    Image.open(path.with_name("1.png")).save(path, quality=95)
    whole = path.read_bytes()
    path.write_bytes({"text": b"not an image", "truncated": whole[: len(whole) * 2 // 3], "empty": b""}[content])
    samples = folder.open("val")
    with pytest.raises(UndecodableImageError) as caught:
        all_batches(samples, batch_size=2, workers=workers)
    assert one_line(caught).startswith(f"{path} does not decode as an image (")


# Descriptions


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        *(
            (kind, {"workers": -1}, "data.workers must be zero to 1024 processes: got -1")
            for kind in kinds_for("classification")
        ),
        ("folder", {"size": 0}, "data.size must be a positive number of pixels: got 0"),
        ("folder", {"size": -32}, "data.size must be a positive number of pixels: got -32"),
        ("folder", {"crop_pct": 0.0}, "data.crop_pct must be in"),
        ("folder", {"crop_pct": float("nan")}, "data.crop_pct must be in"),
        ("folder", {"crop_pct": 1.5}, "data.crop_pct must be in"),
        ("folder", {"std": (0.2, 0.0, 0.2)}, "data.std must be positive"),
        ("folder", {"std": (0.2, -1.0, 0.2)}, "data.std must be positive"),
        ("folder", {"std": (float("nan"), 0.2, 0.2)}, "data.std must be positive"),
        ("folder", {"mean": (0.5,)}, "must have 3 channels"),
        ("folder", {"interpolation": "nearest"}, "data.interpolation"),
    ],
)
def test_a_description_that_cannot_be_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        kinds_for("classification")[kind](**options)
    one_line(caught)


def test_descriptions_name_their_kind():
    assert {kind: describe().kind for kind, describe in kinds_for("classification").items()} == {
        kind: kind for kind in kinds_for("classification")
    }


def test_an_unknown_augmentation_is_refused(folder):
    with pytest.raises(ValueError, match=r"data\.auto_augment must be .* got 'nonsense'") as caught:
        replace(folder, auto_augment="nonsense").open("train")
    one_line(caught)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train', 'val' or 'test': got 'valid'"):
        Digits().open("valid")
