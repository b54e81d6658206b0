"""Pictures inside a page, as data: files of its folder, made smaller where they would make the page heavy."""

import base64
from io import BytesIO
from pathlib import Path

BUDGET = 1_100_000
"""Bytes that all pictures of a page may take together, before they are written as text (which adds a third)."""
_MEDIA = {"PNG": "image/png", "JPEG": "image/jpeg"}
_SIDES = (1600, 1200, 900, 600, 400, 250)


def inlined(folder: Path, names: list[str]) -> list[tuple[str, int, int] | None]:
    """The pictures as data URIs, within `BUDGET`.

    Each may take an equal share of what those before it have left. One that does not fit is written anew as JPEG, at
    the largest size that does.

    Args:
        folder: Where they are.
        names: Their file names.

    Returns:
        For each the URI, its width and its height in pixels; None for one that does not fit at any size.

    Raises:
        ValueError: If a name is not that of a PNG or JPEG file in `folder`.
    """
    left, found = BUDGET, []
    for index, name in enumerate(names):
        picture = _picture(_inside(folder, name), left // (len(names) - index))
        left -= 0 if picture is None else len(picture[1])
        if picture is None:
            found.append(None)
        else:
            media, data, width, height = picture
            found.append((f"data:{media};base64,{base64.b64encode(data).decode()}", width, height))
    return found


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).name != name or path.is_symlink() or not path.is_file():
        raise ValueError(f"drawing must name a file in the report's folder {folder}: got {name!r}; put it there")
    return path


def _picture(path: Path, most: int) -> tuple[str, bytes, int, int] | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"drawing must be a picture: {path.name} cannot be read ({error}); draw it anew") from error
    if image.format not in _MEDIA:
        raise ValueError(f"drawing must be PNG or JPEG: got {image.format} in {path.name}; draw it anew")
    data = path.read_bytes()
    if len(data) <= most:
        return _MEDIA[image.format], data, *image.size
    # On white, where it lets the page through: JPEG has no transparency.
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.convert("RGBA").getchannel("A"))
    for side in _SIDES:
        smaller = flat.copy()
        smaller.thumbnail((side, side))
        buffer = BytesIO()
        smaller.save(buffer, "JPEG", quality=82)
        if buffer.tell() <= most:
            return _MEDIA["JPEG"], buffer.getvalue(), *smaller.size
    return None
