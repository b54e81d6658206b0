"""Which files of a class folder are images, and what is read of one."""

import os
import shutil
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mrla.data.images import EXTENSIONS, UndecodableImageError, class_names_in, labelled_files, read_image, read_photo
from mrla.data.sampling import SampleKey
from mrla.data.sources import Folder

CLASSES = ("cat", "dog")
# Quadrants of four greys and a bright corner: each of the eight ways to turn it is another image, JPEG's too.
SIGN = np.kron(np.array([[250, 40, 40], [40, 120, 40]], np.uint8), np.ones((16, 16), np.uint8))


@pytest.fixture
def classes(tmp_path):
    """Two classes of two images."""
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(SIGN).save(tmp_path / "train" / name / f"{number}.png")
    return tmp_path / "train"


def names_of(files: list[tuple[str, int]], folder: Path) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path, _ in files]


def saved_turned(path: Path, orientation: int) -> None:
    """The sign in a file that says how to turn it."""
    back = Image.fromarray(SIGN).convert("RGB")
    back.getexif()[274] = {6: 8, 8: 6}.get(orientation, orientation)
    stored = ImageOps.exif_transpose(back)
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 100, "lossless": True} if path.suffix == ".webp" else {"quality": 100}
    stored.save(path, exif=exif, **({} if path.suffix in (".png", ".tiff") else options))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff", ".avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_upright_whatever_its_camera_stored(tmp_path, suffix, orientation):
    path = tmp_path / f"photo{suffix}"
    saved_turned(path, orientation)
    photo = read_photo(path)
    assert photo.image.mode == "RGB"
    assert photo.image.size == (48, 32)
    off = np.abs(np.asarray(photo.image)[..., 0].astype(int) - SIGN).mean()
    assert off < 3, off
    if suffix != ".avif":  # libavif turns by entries of its own
        assert photo.orientation == orientation
        assert photo.stored_size == ((32, 48) if orientation >= 5 else (48, 32))


def test_photos_of_iphones_are_read_where_pillow_heif_is_installed(classes):
    """How a HEIC file is turned is an entry of its own, which libheif heeds; EXIF's is a remark in it."""
    pytest.importorskip("pillow_heif")
    read_image(classes / "cat" / "0.png")  # registers it
    Image.fromarray(SIGN).convert("RGB").save(classes / "cat" / "photo.HEIC", quality=100)
    assert names_of(labelled_files(classes, CLASSES), classes)[:3] == ["cat/0.png", "cat/1.png", "cat/photo.HEIC"]
    found = np.asarray(read_image(classes / "cat" / "photo.HEIC"))[..., 0]
    assert np.abs(found.astype(int) - SIGN).mean() < 3


@pytest.mark.parametrize("orientation", [3, 6])
def test_greys_of_sixteen_bits_are_turned_too(tmp_path, orientation):
    stored = Image.fromarray(SIGN.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "grey.png", exif=exif)
    with Image.open(tmp_path / "grey.png") as again:
        assert again.mode == "I;16"
    found = np.asarray(read_image(tmp_path / "grey.png"))[..., 0]
    assert np.array_equal(found, np.rot90(SIGN, 2 if orientation == 3 else -1))


def test_every_value_of_sixteen_bits_is_rounded_to_the_nearest(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "all.png")
    found = np.asarray(read_image(tmp_path / "all.png"))[..., 0]
    assert np.array_equal(found, np.rint(values.astype(np.float64) / 257).astype(np.uint8))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_says_nothing(tmp_path):
    Image.fromarray(SIGN).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 40)
    assert read_image(tmp_path / "a.jpg").size == (48, 32)


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"SIMPLE  =                    T"]
)
def test_formats_that_run_other_programs_are_not_read(tmp_path, content, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UndecodableImageError, match=r"x\.jpg does not decode as an image .*cannot identify") as caught:
        read_image(tmp_path / "x.jpg")
    assert "\n" not in str(caught.value)


def test_too_many_pixels_are_one_line(tmp_path, monkeypatch):
    Image.fromarray(SIGN).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UndecodableImageError, match=r"x\.png does not decode as an image \(Image size \(1536 pixels\)"):
        read_image(tmp_path / "x.png")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def endless(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("make", [fifo, device])
def test_what_is_no_regular_file_is_refused_without_waiting(classes, make):
    make(classes / "cat" / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg is no regular file"):
        labelled_files(classes, CLASSES)
    with pytest.raises(UndecodableImageError, match=r"x\.jpg is no regular file"):
        read_image(classes / "cat" / "x.jpg")


@pytest.mark.parametrize("make", [endless, lambda path: path.symlink_to("absent.jpg")])
def test_a_link_to_nothing_is_counted(classes, make):
    make(classes / "cat" / "x.jpg")
    with pytest.warns(UserWarning, match="1 link to nothing"):
        assert len(labelled_files(classes, CLASSES)) == 4


def test_a_socket_named_like_an_image_is_refused(classes):
    with socket.socket(socket.AF_UNIX) as one:
        os.chdir(classes / "cat")  # a socket's path may have 100 characters
        one.bind("x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg is no regular file"):
        labelled_files(classes, CLASSES)


@pytest.mark.parametrize("name", [".thumbnails", "@eaDir", "__MACOSX", "$RECYCLE.BIN"])
def test_hidden_and_system_folders_are_no_classes_and_not_looked_into(classes, name):
    shutil.copytree(classes / "cat", classes / name)
    shutil.copytree(classes / "cat", classes / "dog" / name)
    shutil.copy(classes / "cat" / "0.png", classes / "cat" / "._0.png")
    assert class_names_in(classes) == CLASSES
    assert names_of(labelled_files(classes, CLASSES), classes) == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]


def test_what_is_not_read_is_counted_in_one_line(classes, monkeypatch):
    monkeypatch.setattr("mrla.data.images._extensions", lambda: EXTENSIONS)  # as without pillow-heif
    for number in range(5):
        (classes / "cat" / f"{number}.heic").write_bytes(b"")
    (classes / "dog" / "notes.TXT").write_text("")
    (classes / "dog" / "moving.gif").write_bytes(b"")
    (classes / "dog" / "README").write_text("")
    with pytest.warns(UserWarning, match="not every file is read") as said:
        labelled_files(classes, CLASSES)
    (one,) = said
    text = str(one.message)
    assert text.startswith(f"{classes}: not every file is read: left out are 1 .gif, 5 .heic, 1 .txt, 1 file without ")
    assert "mrla[heif]" in text
    assert "\n" not in text


def test_a_class_of_photos_that_cannot_be_read_names_what_reads_them(classes, monkeypatch):
    monkeypatch.setattr("mrla.data.images._extensions", lambda: EXTENSIONS)
    for file in (classes / "dog").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"every class needs an image: 'dog' has none .*2 \.heic \(pip install"):
        labelled_files(classes, CLASSES)


def test_images_lie_in_folders_of_folders_and_keep_their_order(classes):
    (classes / "cat" / "b" / "c").mkdir(parents=True)
    for place in ("b/2.png", "b/c/1.png", "b/10.PNG"):
        shutil.copy(classes / "cat" / "0.png", classes / "cat" / place)
    found = names_of(labelled_files(classes, CLASSES), classes)
    assert found[:5] == ["cat/0.png", "cat/1.png", "cat/b/10.PNG", "cat/b/2.png", "cat/b/c/1.png"]


def test_links_to_folders_above_give_each_image_once_under_its_own_label(classes):
    for name in CLASSES:
        (classes / name / "up").symlink_to("..")
        (classes / name / "further").symlink_to(classes.parent)
        (classes / name / "self").symlink_to(".")
        (classes / name / "again.png").symlink_to("0.png")
    (classes / "cat" / "other").symlink_to(classes / "dog")
    (classes / "cat" / "other.png").symlink_to(classes / "dog" / "1.png")
    with pytest.warns(UserWarning, match="10 link into this folder"):
        found = labelled_files(classes, CLASSES)
    assert found == [(str(classes / name / f"{n}.png"), label) for label, name in enumerate(CLASSES) for n in range(2)]


def test_links_to_images_that_lie_elsewhere_are_followed(classes, tmp_path):
    store = tmp_path / "store"
    shutil.move(classes / "cat", store / "cats")
    (classes / "cat").symlink_to(store / "cats")
    Image.fromarray(SIGN).save(store / "more.png")
    (store / "folder").mkdir()
    Image.fromarray(SIGN).save(store / "folder" / "3.png")
    (classes / "dog" / "2.png").symlink_to(store / "more.png")
    (classes / "dog" / "folder").symlink_to(store / "folder")
    found = names_of(labelled_files(classes, CLASSES), classes)
    assert found == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/2.png", "dog/folder/3.png"]
    (classes / "dog" / "twice.png").symlink_to(store / "more.png")
    with pytest.warns(UserWarning, match="1 second link to an image"):
        assert names_of(labelled_files(classes, CLASSES), classes) == found
    (classes / "dog" / "cat.png").symlink_to(store / "cats" / "0.png")
    with pytest.raises(ValueError, match=r"an image must have one label: .*0\.png is linked to from 'cat' and 'dog'"):
        labelled_files(classes, CLASSES)


def test_training_and_prediction_read_the_same(tmp_path):
    """Three photos turned by their camera, and their upright copies: equal tensors from a folder of classes."""
    for kind in ("turned", "upright"):
        for split in ("train", "val"):
            for name in CLASSES:
                (tmp_path / kind / split / name).mkdir(parents=True)
                for orientation in (6, 8, 3):
                    path = tmp_path / kind / split / name / f"{orientation}.png"
                    saved_turned(path, orientation) if kind == "turned" else Image.fromarray(SIGN).save(path)
    for split in ("train", "val"):
        turned, upright = (Folder(root=str(tmp_path / kind), size=32).open(split) for kind in ("turned", "upright"))
        assert Folder(root=str(tmp_path / "turned")).facts().class_names == CLASSES
        for index in range(6):
            assert torch.equal(turned[SampleKey(0, index)][0], upright[SampleKey(0, index)][0])


def test_nothing_is_said_of_a_folder_of_images(classes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(labelled_files(classes, CLASSES)) == 4
