"""Image files: which of a folder's are read, and the one way to read one."""

import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mrla.messages.one_line import one_line

from .orientation import orientation_of, swapped_if_lying, upright_image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".avif")
"""The files of a class folder that are read, whatever the case of their letters."""

HEIF_EXTENSIONS = (".heic", ".heif")
"""Those that are read too where pillow-heif is installed: ``pip install 'mrla[heif]'``."""

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF", "AVIF", "HEIF")
"""Pillow's names of what is decoded, whatever a file is called: never EPS, which Pillow hands to Ghostscript."""

SYSTEM_FOLDERS = (
    "@eaDir",
    "#recycle",
    "@Recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "__MACOSX",
    "lost+found",
)
"""Folders that file systems and file servers put beside those of a user."""


class UndecodableImageError(ValueError):
    """An image that does not decode, or not to a known range: one line, which names its path.

    Args:
        message: The line, or the traceback that ends in it: a loader's process hands over no more than that.
    """

    def __init__(self, message: str):
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__qualname__}: "))


class Photo(NamedTuple):
    """An image as it is looked at.

    Attributes:
        image: PIL's, upright, 8 bits of red, green and blue.
        stored_size: Width and height of the file's own rows and columns.
        orientation: EXIF's, 1 to 8: how the stored image was turned to stand upright. 1 is not at all.
    """

    image: Any
    stored_size: tuple[int, int]
    orientation: int


def read_image(path: str | Path) -> Any:
    """The image in a file, upright by its EXIF entry, with 8 bits of red, green and blue.

    Args:
        path: The file.

    Returns:
        PIL's image. What is transparent shows the colour that is stored there.

    Raises:
        UndecodableImageError: If the file is none of `FORMATS`, does not decode, is no regular file, or nothing says
            which of its values is white.
    """
    return read_photo(path).image


def read_photo(path: str | Path) -> Photo:
    """Like `read_image`, with how the stored image was turned.

    Args:
        path: The file.

    Returns:
        The image and how it lies in the file.

    Raises:
        UndecodableImageError: As `read_image`.
    """
    from PIL import Image

    try:
        with _regular_file(path) as file, Image.open(file, formats=_formats()) as image:
            orientation = orientation_of(image)
            image.load()  # which turns a TIFF, and says so
            upright = upright_image(_three_channels(image), orientation_of(image))
            return Photo(upright, swapped_if_lying(upright.size, orientation), orientation)
    except UndecodableImageError:
        raise
    except _UnknownRangeError as error:
        raise UndecodableImageError(
            f"{path} must have values of a known range: {error}; save it with 8 or 16 bits a channel"
        ) from error
    except Exception as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
        raise _undecodable(path, error) from error


def read_sizes(path: str | Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """How large an image is, without decoding it.

    Args:
        path: The file.

    Returns:
        Width and height upright, and as they are stored.

    Raises:
        UndecodableImageError: If it is none of `FORMATS`, or no regular file.
    """
    from PIL import Image

    try:
        with _regular_file(path) as file, Image.open(file, formats=_formats()) as image:
            return swapped_if_lying(image.size, orientation_of(image)), image.size
    except UndecodableImageError:
        raise
    except Exception as error:  # as in read_photo
        raise _undecodable(path, error) from error


def _undecodable(path: str | Path, error: Exception) -> UndecodableImageError:
    # Pillow names the open file, whose number says nothing.
    reason = re.sub(r" <_io\.\w+ name=[^>]*>", "", one_line(error))
    return UndecodableImageError(f"{path} does not decode as an image ({reason}); repair or remove it")


def read_indexed(paths: Sequence[str], index: int) -> Any:
    """`read_image` of one of several files.

    Args:
        paths: Image files.
        index: Which of them.
    """
    return read_image(paths[index])


def class_names_in(folder: Path) -> tuple[str, ...]:
    """The names of a folder's class folders, sorted; hidden ones and those of `SYSTEM_FOLDERS` are none.

    Args:
        folder: The folder of class folders.
    """
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name)))


def labelled_files(folder: Path, class_names: Sequence[str]) -> list[tuple[str, int]]:
    """The image files of a folder of class folders, with their labels, by class, folder and name.

    Hidden files and folders are passed by. A link is followed, each real folder and file once; one that leads into
    another class of `folder`, or above its own, is left out. What is left out is counted in one warning.

    Args:
        folder: The folder of class folders.
        class_names: The classes, whose places are the labels.

    Returns:
        Path and label of each image.

    Raises:
        ValueError: If a class has no image, an image has two labels, or what is named like an image is no regular file.
    """
    whole = os.path.realpath(folder)
    left_out: Counter[str] = Counter()
    label_of: dict[str, int] = {}  # of files that links lead to
    found: list[tuple[str, int]] = []
    for label, name in enumerate(class_names):
        files = sorted(_walk(os.path.join(folder, name), whole, left_out))
        for parent, file, linked_to in files:
            known = label_of.get(linked_to) if linked_to is not None else None
            if known is not None and known != label:
                raise ValueError(
                    f"an image must have one label: {linked_to} is linked to from {class_names[known]!r} and "
                    f"{name!r} in {folder}; remove one link"
                )
            if known is not None:
                left_out["second link to an image"] += 1
                continue
            if linked_to is not None:
                label_of[linked_to] = label
            found.append((os.path.join(parent, file), label))
        if not files:
            raise ValueError(
                f"every class needs an image: {name!r} has none in {folder}{_said(left_out)}; images end in "
                f"{', '.join(_extensions())}"
            )
    if left_out:
        warnings.warn(f"{folder}: not every file is read{_said(left_out)}", stacklevel=2)
    return found


def files_in(folder: str | Path) -> list[str]:
    """The image files of a folder and those below it, by folder and name, as `labelled_files` reads them.

    Args:
        folder: The folder.

    Returns:
        Their paths. What is left out is counted in one warning.

    Raises:
        ValueError: If it has none.
    """
    left_out: Counter[str] = Counter()
    found = sorted(_walk(str(folder), os.path.realpath(folder), left_out))
    if not found:
        raise ValueError(f"{folder} has no image{_said(left_out)}; images end in {', '.join(_extensions())}")
    if left_out:
        warnings.warn(f"{folder}: not every file is read{_said(left_out)}", stacklevel=2)
    return [os.path.join(parent, name) for parent, name, _ in found]


class _UnknownRangeError(ValueError):
    """An image of which nothing says what value is white."""


def _regular_file(path: str | Path) -> BinaryIO:
    """A file opened for reading; never a pipe or a device, on which opening or reading would wait."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UndecodableImageError(f"{path} is no regular file: an image must be one; remove it")
    return os.fdopen(descriptor, "rb")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow has."""
    from PIL import Image

    if find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@lru_cache(maxsize=1)
def _extensions() -> tuple[str, ...]:
    return EXTENSIONS + (HEIF_EXTENSIONS if find_spec("pillow_heif") is not None else ())


def _three_channels(image: Any) -> Any:
    """The image with 8 bits of red, green and blue; what is transparent shows the colour that is stored there."""
    import numpy as np
    from PIL import Image

    if image.mode[0] in "IF":  # greys of more than 8 bits, which PIL cuts off at 255 instead of scaling them
        white = _white(image)
        greys = np.asarray(image).astype(np.float32) * np.float32(255 / white)
        return Image.fromarray(greys.round().astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # PIL warns, or fails, where transparent colours of a palette are to become one colour of an image without.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _white(image: Any) -> int:
    """The value that stands for white in an image of greys of more than 8 bits."""
    if image.mode.startswith("I;16"):
        bits_per_sample = 258  # a tag of TIFF, where 12 bits are possible too
        return 2 ** getattr(image, "tag_v2", {}).get(bits_per_sample, (16,))[0] - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535  # more bits than 16 these formats do not have; PIL brings fewer of PPM to 16
    raise _UnknownRangeError(f"its mode is {image.mode} (PIL's name), in which white can be anything")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _walk(folder: str, whole: str, left_out: Counter[str]) -> Iterator[tuple[str, str, str | None]]:
    """Folder and name of each image below a class folder; of one that a link leads to, also where it is."""
    own = os.path.realpath(folder)
    folders, visited = [(folder, own, os.path.islink(folder))], {own}
    while folders:
        parent, real_parent, linked = folders.pop()
        with os.scandir(parent) as entries:
            for entry in entries:
                if _is_hidden(entry.name):
                    continue
                is_link = entry.is_symlink()
                real = os.path.realpath(entry.path) if is_link else os.path.join(real_parent, entry.name)
                outside = not _is_below(real, own)
                if is_link and not os.path.exists(real):
                    left_out["link to nothing"] += 1
                elif is_link and (not outside or _is_below(real, whole) or _is_below(whole, real)):
                    left_out["link into this folder"] += 1
                elif entry.is_dir():
                    if real not in visited:
                        visited.add(real)
                        folders.append((entry.path, real, linked or is_link))
                elif not entry.name.lower().endswith(_extensions()):
                    left_out[os.path.splitext(entry.name)[1].lower() or "file without an ending"] += 1
                elif entry.is_file():
                    yield parent, entry.name, real if linked or is_link else None
                else:
                    raise ValueError(f"{entry.path} is no regular file: an image must be one; remove it")


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _said(left_out: Counter[str]) -> str:
    """What was left out, as the end of a sentence."""
    if not left_out:
        return ""
    remedy = ""
    if any(ending in left_out for ending in HEIF_EXTENSIONS):
        remedy = " (pip install 'mrla[heif]' reads .heic and .heif)"
    return f": left out are {', '.join(f'{count} {what}' for what, count in sorted(left_out.items()))}{remedy}"
