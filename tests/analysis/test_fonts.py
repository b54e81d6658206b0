"""Names in any script are drawn by a font that has their letters, or it is said what is drawn instead."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

import mrla
from mrla.analysis import fonts
from mrla.analysis.explanation.activation_maps import draw_activation_maps
from mrla.analysis.fonts import drawable, font_for, matplotlib_fonts
from mrla.cli import main

LATIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789%.,() "


def make_font(path: Path, letters: str) -> str:
    """A font in which every letter is a block."""
    pen = TTGlyphPen(None)
    for at, corner in enumerate([(100, 0), (100, 700), (900, 700), (900, 0)]):
        (pen.lineTo if at else pen.moveTo)(corner)
    pen.closePath()
    block = pen.glyph()
    names = {ord(letter): f"letter{ord(letter)}" for letter in letters}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), **dict.fromkeys(names.values(), block)})
    builder.setupHorizontalMetrics({name: (1000, 100) for name in [".notdef", *names.values()]})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Three fonts: one without latin letters, one for Chinese and Japanese, one for Korean too."""
    made = [
        make_font(tmp_path / "Bare.ttf", "猫犬고양이"),
        make_font(tmp_path / "Some.ttf", LATIN + "猫犬ねこ"),
        make_font(tmp_path / "Most.ttf", LATIN + "猫犬ねこ고양이"),
    ]
    monkeypatch.setattr(fonts, "_installed_fonts", lambda: tuple(made))
    return made


@pytest.fixture
def none_installed(monkeypatch):
    monkeypatch.setattr(fonts, "_installed_fonts", lambda: ())


def test_the_first_font_that_has_all_letters(installed):
    assert Path(font_for(["cat", "größer", "кот"])).name == "DejaVuSans.ttf"
    assert font_for(["猫", "dog"]) == installed[1]
    assert font_for(["猫", "고양이"]) == installed[2]
    assert drawable(["猫", "ねこ"], ["class 0", "class 1"]) == (installed[1], ["猫", "ねこ"])


def test_what_no_font_has_is_said_once_and_drawn_as_a_number(none_installed):
    with pytest.warns(
        UserWarning, match=r"no installed font .* '猫' and another name: they are drawn as 'class 1' and so on; "
    ) as told:
        font, shown = drawable(["cat", "猫", "犬"], ["class 0", "class 1", "class 2"])
    assert len(told) == 1
    assert Path(font).name == "DejaVuSans.ttf"
    assert shown == ["cat", "class 1", "class 2"]


def test_matplotlibs_fonts(installed, tmp_path):
    assert matplotlib_fonts(["cat"]) == {}
    assert matplotlib_fonts(["猫"]) == {"font.family": ["DejaVu Sans", "Some"]}
    maps = {"with mixers": torch.rand(8, 8)}
    drawn = draw_activation_maps(
        torch.rand(3, 8, 8), maps, tmp_path / "maps.png", captions={"with mixers": "고양이 9 %"}
    )
    assert drawn.is_file()  # a letter that is missing is a warning of matplotlib's, and so an error here


def classifier(names: list[str]) -> None:
    mrla.save(timm.create_model("test_resnet", num_classes=2), "net", class_names=names, input_size=(3, 32, 32))
    Image.fromarray(np.full((64, 64, 3), 200, dtype=np.uint8)).save("photo.png")


WORDS = ["predict", "net", "photo.png", "--progress", "false", "--machine.accelerator", "cpu", "--out"]


def test_predict_draws_the_names(installed, in_an_empty_folder, capsys):
    classifier(["猫", "犬"])
    assert main([*WORDS, "drawn"]) == 0
    printed = capsys.readouterr()
    assert "猫" in printed.out
    assert printed.err == ""
    classifier(["ねこ", "犬"])
    assert main([*WORDS, "other"]) == 0
    one, other = (np.asarray(Image.open(Path(out) / "photo.png").convert("L")) for out in ("drawn", "other"))
    rows = one[one.shape[0] - 40 :]
    assert (rows < 50).sum() > 200  # blocks, which DejaVu Sans does not have
    assert one.shape == other.shape
    assert not np.array_equal(one, other)


@pytest.mark.filterwarnings("default")
def test_predict_says_in_one_line_what_it_cannot_draw(none_installed, in_an_empty_folder, capsys):
    classifier(["猫", "犬"])
    assert main([*WORDS, "drawn"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("mrla: warning: no installed font has the letters of '猫' and another name: they are drawn")
    assert error.count("\n") == 1
