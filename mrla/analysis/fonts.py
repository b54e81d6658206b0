"""Fonts that have the letters of what is drawn: matplotlib's own, or an installed one for Chinese, Japanese, Korean."""

import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any


def font_for(texts: Sequence[str]) -> str:
    """The font file that draws most of some texts, and latin letters beside them.

    Args:
        texts: What is to be drawn.

    Returns:
        Matplotlib's own font if it draws them all, or if no installed one draws more of them.

    Example:
        >>> Path(font_for(["cat", "Katze, größer"])).name
        'DejaVuSans.ttf'
    """
    wanted = [_letters(text) for text in texts]
    best, most = _own_font(), _drawn(_own_font(), wanted)
    if most == len(wanted):
        return best
    for path in _installed_fonts():
        if (drawn := _drawn(path, wanted)) > most:
            best, most = path, drawn
        if most == len(wanted):
            break
    return best


def drawable(texts: Sequence[str], instead: Sequence[str]) -> tuple[str, list[str]]:
    """A font for texts, and what of them to draw with it.

    Args:
        texts: Names, as they are.
        instead: For each what is drawn where no installed font has its letters; said in one warning.

    Returns:
        The font file, and the texts to draw.

    Example:
        >>> drawable(["cat", "dog"], ["class 0", "class 1"])[1]
        ['cat', 'dog']
    """
    font = font_for(texts)
    letters = _letters_of(font)
    shown = [text if _letters(text) <= letters else other for text, other in zip(texts, instead, strict=True)]
    lost = [(text, other) for text, other in zip(texts, shown, strict=True) if text != other]
    if lost:
        text, other = lost[0]
        others = f" and {len(lost) - 1} other names" if len(lost) > 2 else " and another name" if len(lost) == 2 else ""
        how = f"they are drawn as {other!r} and so on" if others else f"it is drawn as {other!r}"
        warnings.warn(
            f"no installed font has the letters of {text!r}{others}: {how}; install one, such as Noto Sans CJK",
            stacklevel=2,
        )
    return font, shown


def matplotlib_fonts(texts: Sequence[str]) -> dict[Any, Any]:
    """Matplotlib's own font and, where that lacks letters of some texts, one that has them, for `rc_context`.

    Args:
        texts: What is to be drawn.

    Returns:
        ``font.family``, or nothing where matplotlib's settings do.
    """
    from matplotlib.font_manager import FontProperties, fontManager

    font = font_for(texts)
    if font == _own_font():
        return {}
    if font not in {entry.fname for entry in fontManager.ttflist}:
        fontManager.addfont(font)
    return {"font.family": ["DejaVu Sans", FontProperties(fname=font).get_name()]}


def _letters(text: str) -> frozenset[int]:
    return frozenset(ord(letter) for letter in text if not letter.isspace())


def _drawn(font: str, wanted: Sequence[frozenset[int]]) -> int:
    """How many of the texts a font draws; none if it has no latin letters and digits, which stand beside them."""
    letters = _letters_of(font)
    return sum(one <= letters for one in wanted) if _LATIN <= letters else 0


_LATIN = _letters("abcxyzABCXYZ0123456789%.,")


@lru_cache(maxsize=1)
def _own_font() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@lru_cache(maxsize=1)
def _installed_fonts() -> tuple[str, ...]:
    from matplotlib.font_manager import findSystemFonts, fontManager

    # Matplotlib keeps a list, which lacks what was installed after it was made.
    paths = [entry.fname for entry in fontManager.ttflist] + sorted(findSystemFonts())
    # A last-resort font has a box for every letter there is.
    return tuple(dict.fromkeys(path for path in paths if "lastresort" not in Path(path).name.lower()))


@cache
def _letters_of(font: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        face = FT2Font(font)
        return frozenset(face.get_charmap()) if face.scalable else frozenset()
    except (RuntimeError, OSError):  # a file that FreeType does not read draws nothing
        return frozenset()
