"""Class names of any script are written in letters, and where no font has them, as numbers."""

import logging

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import ImageFont

from stage_interactor.pages import charts, fonts
from stage_interactor.pages.boxes import class_colour, draw_boxes


@pytest.fixture(autouse=True)
def known_fonts(monkeypatch, tmp_path):
    """matplotlib's font, and one that has two Chinese letters, as full squares, and no digits."""
    path = tmp_path / "squares.ttf"
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat", "dog"])
    builder.setupCharacterMap({ord("猫"): "cat", ord("犬"): "dog"})
    builder.setupGlyf({".notdef": empty, "cat": square, "dog": square})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in (".notdef", "cat", "dog")})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    dejavu = next(fonts.font_files())

    def use(*files):
        monkeypatch.setattr(fonts, "font_files", lambda: iter(files))
        fonts.split_by_font.cache_clear()
        fonts._tell_how.cache_clear()

    use(dejavu, str(path))
    yield use
    fonts.split_by_font.cache_clear()
    fonts._tell_how.cache_clear()


def draw(*names, score=None):
    image = np.zeros((40 * len(names), 160, 3), np.uint8)
    boxes = [[2, 40 * row + 22, 158, 40 * row + 38] for row in range(len(names))]
    scores = None if score is None else [score] * len(names)
    return draw_boxes(image, boxes, range(len(names)), scores, class_names=names, font_size=14)


@pytest.mark.parametrize("name", ["Größe", "кошка", "γάτα", "قطة", "chaîne", "œuvre", "čtyři"])
def test_names_of_european_and_arabic_letters_need_no_other_font(name):
    ((text, path),) = fonts.split_by_font(f"{name} 0.87")
    assert text == f"{name} 0.87" and path.endswith("DejaVuSans.ttf")
    assert fonts.readable(name, "7") == name
    drawn = draw(name)
    missing = ImageFont.truetype(path, 14).getmask("\uffff")  # what tofu looks like
    letters = [ImageFont.truetype(path, 14).getmask(letter) for letter in name]
    assert all(bytes(letter) != bytes(missing) for letter in letters)
    assert not np.array_equal(drawn, draw("7")) and not np.array_equal(drawn, draw("?" * len(name)))


def test_an_english_name_is_drawn_as_ever():
    assert type(fonts.font_of(["cat 0.87"], 14)) is type(ImageFont.load_default(14))
    assert fonts.split_by_font("cat 0.87") == (("cat 0.87", None),)


def test_a_name_is_written_in_several_fonts_where_none_has_all_of_it():
    runs = fonts.split_by_font("猫犬 cat é 0.87")
    assert [run.text for run in runs] == ["猫犬", " cat ", "é", " 0.87"]
    assert [run.path and run.path[-8:] for run in runs] == ["ares.ttf", None, "Sans.ttf", None]
    font = fonts.font_of(["猫犬 cat", "plain"], 20)
    assert font.getlength("猫犬 cat") > font.getlength("猫犬") == pytest.approx(40, abs=1)
    # Two full squares, of 16 pixels each, on the plate of the class's colour.
    drawn = draw("猫犬", score=0.5)
    plate = (drawn == class_colour(0)).all(-1)
    letters = ((drawn == 0).all(-1) | (drawn == 255).all(-1))[:22] & ~plate[:22]
    assert letters[:, :36].sum(1).max() >= 20 and plate.sum() > 300


def test_letters_are_composed_and_what_only_directs_them_is_not_missed():
    assert fonts.readable("Gro\u0308ße", "0") == "Größe"
    assert fonts.readable("two\nlines", "0") == "two lines"
    for name in ("کتاب\u200cها", "\u202bقطة\u202c", "e\ufe0f"):
        assert fonts.split_by_font(name) is not None


def test_without_a_font_the_number_is_written_and_that_is_said_once(caplog, known_fonts):
    known_fonts(next(iter(fonts.font_files())))
    with caplog.at_level(logging.WARNING):
        drawn = draw("猫", "犬 x", "cat", score=0.9)
        draw("猫")
    (told,) = caplog.messages
    assert "stage-interactor[fonts]" in told and "fonts-noto-cjk" in told
    assert np.array_equal(drawn, draw("0", "1", "cat", score=0.9))


def test_a_font_that_cannot_be_used_is_passed_over(tmp_path, known_fonts):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    squares = tmp_path / "squares.ttf"
    known_fonts(str(tmp_path / "broken.ttf"), str(tmp_path / "nowhere.otf"), str(squares))
    assert fonts.split_by_font("猫") == (("猫", str(squares)),)


def test_upright_fonts_of_one_weight_come_first():
    paths = ["/a/NotoSansCJK-Bold.ttc", "/a/NotoSerifCJK-Regular.ttc", "/b/NotoSansCJK-Regular.ttc"]
    assert sorted(paths, key=fonts._rank)[0] == "/b/NotoSansCJK-Regular.ttc"


def test_charts_leave_letters_to_the_browser(recwarn):
    drawn = charts.bars({"猫": 1.0, "a$b$": 2.0, "$x^{": 3.0}, x="AP, %")
    assert "猫" in drawn and "a$b$" in drawn and "$x^{" in drawn
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
