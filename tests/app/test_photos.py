"""Digits are found in photographs of paper: each step by itself, then each kind of picture."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_predict import content

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from photo_kinds import KINDS, count, draw

from mnist_ext.app.data import datasets, photo
from mnist_ext.app.data.images import NothingFoundError, prepare


def page(
    *lines: tuple[tuple[float, float], ...], size=(300, 400), width=16, paper=230
) -> np.ndarray:
    """Draw strokes on paper; brightness, 0 to 1."""
    image = Image.new("L", size, paper)
    for line in lines:
        ImageDraw.Draw(image).line(line, fill=30, width=width)
    return np.asarray(image, dtype=np.float64) / 255


ONE = ((100, 100), (100, 250))


def boxes(light: np.ndarray, dark_on_light: bool = True) -> list[tuple[int, int, int, int]]:
    return [digit.box for digit in photo.find_digits(light, dark_on_light)]


class TestFindDigits:
    def test_from_left_to_right_with_their_boxes(self):
        two, first = ((220, 110), (220, 240)), ONE
        found = boxes(page(two, first))
        assert np.abs(np.subtract(found, [(92, 100, 109, 251), (212, 110, 229, 241)])).max() <= 2

    def test_light_on_dark(self):
        assert boxes(1 - page(ONE), dark_on_light=False) == boxes(page(ONE))

    def test_a_bar_apart_belongs_to_the_digit_below_it(self):
        bar = ((95, 80), (160, 80))
        assert len(boxes(page(ONE, bar))) == 1

    def test_specks_are_no_digits(self):
        light = page(ONE)
        light[50:54, 200:204] = light[300:305, 30:34] = light[100:103, 93:95] = 0.1
        assert boxes(light) == boxes(page(ONE))

    def test_a_digit_may_end_at_the_edge_and_a_strip_along_it_is_none(self):
        seven = ((0, 100), (200, 100), (160, 300))
        (box,) = boxes(page(seven))
        assert np.abs(np.subtract(box, (0, 92, 208, 300))).max() <= 3
        strip = page()
        strip[100:300, :20] = 0.1
        assert boxes(strip) == []

    def test_rulings_go_and_the_stroke_that_they_cross_stays(self):
        light = page(ONE)
        light[20::30][light[20::30] > 0.5] = 0.1  # as dark as the ink
        light[21::30][light[21::30] > 0.5] = 0.1
        assert np.abs(np.subtract(boxes(light), boxes(page(ONE)))).max() <= 3

    def test_a_long_bar_of_a_digit_is_no_ruling(self):
        seven = ((60, 100), (240, 100), (160, 300))
        ink = photo.ink_of(page(seven), dark_on_light=True)
        assert photo.without_rulings(ink, 0.4) is ink

    def test_a_shadow_is_no_ink(self):
        y, x = np.mgrid[0:400, 0:300]
        light = page() * (1 - 0.5 / (1 + np.exp((x + y / 2 - 250) / 8)))
        assert boxes(light) == []
        shaded = page(ONE) * light / light.max()
        assert np.abs(np.subtract(boxes(shaded), boxes(page(ONE)))).max() <= 3

    @pytest.mark.parametrize("level", [0.02, 0.5, 1.0])
    def test_nothing_on_an_even_page(self, level):
        assert boxes(np.full((300, 200), level)) == []


class TestPolarity:
    def test_glare_brighter_than_the_ink_is_dark(self):
        light = page(ONE, paper=120)
        y, x = np.mgrid[0:400, 0:300]
        light = (light + 0.9 * np.exp(-((x - 110) ** 2 + (y - 180) ** 2) / 2 / 30**2)).clip(0, 1)
        assert light.max() - 120 / 255 > 120 / 255 - light.min()
        assert photo.is_dark_on_light(light, np.full_like(light, 120 / 255))
        assert not photo.is_dark_on_light(1 - light, np.full_like(light, 135 / 255))


class TestDesk:
    def test_the_desk_takes_the_colour_of_the_page(self):
        paper = Image.fromarray((page(ONE) * 255).astype(np.uint8)).convert("LA")
        desk = Image.new("LA", (500, 600), (50, 255))
        desk.paste(paper, (100, 100))
        turned = desk.rotate(4, Image.Resampling.BICUBIC, fillcolor=(50, 255)).convert("L")
        light = np.asarray(turned, dtype=np.float64) / 255
        painted = photo.without_desk(light[..., None], light)[..., 0]
        assert (light < 0.5).mean() > 0.3
        assert (painted < 0.5).mean() < 0.05
        assert len(boxes(painted)) == 1

    def test_a_light_digit_on_dark_is_no_page(self):
        for light in (1 - page(ONE), 1 - page(((150, 20), (150, 380)), width=120)):
            colors = light[..., None]
            assert photo.without_desk(colors, light) is colors


DIGITS = datasets.load("digits").test.images.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind):
    """The digits are found, and look like those that they were drawn from."""
    for seed in range(2):
        digits = DIGITS[4 * seed : 4 * seed + count(kind)]
        clean = [prepare(content(Image.fromarray(digit))).pixels[0] for digit in digits]
        try:
            found = prepare(draw(kind, seed, digits)).pixels
        except NothingFoundError:
            found = []
        for a, b in zip(found, clean, strict=True):
            assert np.corrcoef(a.flatten(), b.flatten())[0, 1] > 0.6


class TestPredict:
    def test_a_number(self, ran, digits_run):
        Path("number.png").write_bytes(draw("numbers of 3", 0, DIGITS[:3]))
        (result,) = ran("predict", digits_run, "number.png", "--json").objects
        assert result["number"] == "".join(digit["name"] for digit in result["digits"])
        assert len(result["digits"]) == 3
        ends = [x for digit in result["digits"] for x in digit["box"][::2]]
        assert ends == sorted(ends)
        assert ends[-1] <= result["width"]
        out = ran("predict", digits_run, "number.png").out
        assert out.startswith(f"number.png: {result['number']}, ")
        assert out.count(" sure") == 4

    def test_a_blank_page_is_exit_code_1(self, ran, digits_run):
        Path("blank.jpg").write_bytes(draw("blank lined", 0, DIGITS[:0]))
        printed = ran("predict", digits_run, "blank.jpg", "--json", code=1)
        assert "no digit found" in printed.objects[0]["error"]
        assert "blank.jpg: no digit found" in printed.err
        # What cannot be read is worse, whatever the order.
        ran("predict", digits_run, "none.png", "blank.jpg", code=2)

    def test_a_narrow_terminal(self, ran, digits_run, monkeypatch):
        """The picture above, the three likeliest below."""
        monkeypatch.setenv("COLUMNS", "40")
        Path("photo.jpg").write_bytes(draw("photo", 0, DIGITS[:1]))
        out = ran("predict", digits_run, "photo.jpg").out
        assert out.count(" %") == 4
        assert max(map(len, out.splitlines()[1:])) <= 40
