"""``mnist-ext predict``: images of all kinds become digits like MNIST's; bad ones are named."""

import io
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from run_folders import assert_one_line

from mnist_ext.app import UserError
from mnist_ext.app.cli.commands.predict import classify
from mnist_ext.app.cli.main import main
from mnist_ext.app.data import datasets, images
from mnist_ext.app.data.images import Prepared, prepare
from mnist_ext.app.report.scores import logits_of
from mnist_ext.app.runs import trained


def drawn(width: int = 200, height: int = 260, paper: int = 0, ink: int = 255) -> Image.Image:
    """Draw a 7, off the middle."""
    image = Image.new("L", (width, height), paper)
    points = [(0.15, 0.2), (0.6, 0.2), (0.3, 0.85)]
    ImageDraw.Draw(image).line(
        [(x * width, y * height) for x, y in points], fill=ink, width=width // 10
    )
    return image


TIFF_MODES = ("CMYK", "YCbCr", "I", "F")


def on_transparent(ink: int) -> Image.Image:
    shape = drawn()
    return Image.merge("LA", (Image.new("L", shape.size, ink), shape)).convert("RGBA")


def content(image: Image.Image, format: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


EXPECTED = prepare(content(drawn())).pixels[0].int()


def difference(image: Image.Image, format: str = "png", **options) -> float:
    """Return the mean difference, in grey levels, from the 7 that is light on dark."""
    (pixels,) = prepare(content(image, format, **options)).pixels
    return (pixels.int() - EXPECTED).abs().float().mean().item()


class TestPrepare:
    def test_it_looks_like_mnist(self):
        """A box of 20x20 around the digit, the centre of mass within the middle pixel."""
        mass = EXPECTED.double()
        rows, columns = mass.sum(1), mass.sum(0)
        assert int((rows > 0).sum()) == 20
        assert int((columns > 0).sum()) < 20
        middle = torch.arange(28).double() + 0.5
        assert 14 <= float(rows @ middle / rows.sum()) < 15
        assert 14 <= float(columns @ middle / columns.sum()) < 15
        assert mass.max() == 255

    def test_an_image_of_that_kind_stays_as_it_is(self):
        (again,) = prepare(content(Image.fromarray(EXPECTED.byte().numpy()))).pixels
        assert torch.equal(again.int(), EXPECTED)

    @pytest.mark.parametrize("size", [(28, 28), (100, 130), (900, 1170), (3000, 3900)])
    def test_any_size(self, size):
        assert difference(drawn().resize(size, Image.Resampling.LANCZOS)) < 12

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", *TIFF_MODES])
    def test_any_mode(self, mode):
        assert difference(drawn().convert(mode), "tiff" if mode in TIFF_MODES else "png") < 1

    @pytest.mark.parametrize(
        ("image", "inverted"),
        [
            (drawn(paper=255, ink=0), True),
            (drawn(paper=200, ink=60), True),
            (drawn(paper=0, ink=90), False),
            (drawn(paper=120, ink=200), False),
            # Dark on transparent is on light paper, light on transparent on dark.
            (on_transparent(0), True),
            (on_transparent(255), False),
            # A 12-bit scanner's.
            (Image.fromarray(np.asarray(drawn(), dtype=np.uint16) * 16), False),
        ],
    )
    def test_dark_on_light_and_light_on_dark(self, image, inverted):
        assert difference(image) < 1
        assert prepare(content(image)).inverted == inverted

    def test_a_transparent_palette_colour(self):
        image = drawn(paper=7, ink=250).convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
        assert difference(image, transparency=image.getpixel((0, 0))) < 1

    def test_exif_rotation(self):
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
        lying = drawn().transpose(Image.Transpose.ROTATE_90)
        assert difference(lying, exif=exif) < 1
        assert prepare(content(lying, exif=exif)).size == (200, 260)

    def test_photographs(self):
        """Lit from one side; and with much noise."""
        ink = np.asarray(drawn(), dtype=np.float64) / 255
        light = np.linspace(110, 230, 200)[None, :] * np.linspace(0.8, 1, 260)[:, None]
        for paper, sigma, most in ((light, 3, 8), (np.full_like(light, 200), 20, 20)):
            noise = np.random.default_rng(0).normal(0, sigma, light.shape)
            photo = np.clip(paper * (1 - 0.8 * ink) + noise, 0, 255).astype(np.uint8)
            assert difference(Image.fromarray(photo), "jpeg", quality=85) < most

    def test_fashion_fills_the_image(self):
        (pixels,) = prepare(content(drawn()), "fashion-mnist").pixels
        assert int((pixels.sum(1) > 0).sum()) == 28

    def test_the_embedded_digits_are_still_known(self, digits_run):
        """Also as large images, dark on light; with MNIST the accuracy stays as it is."""
        model = trained.load(digits_run)
        split = datasets.load("digits").test
        right = 0
        for pixels, label in zip(split.images[:60], split.labels[:60], strict=True):
            large = Image.fromarray(255 - pixels.numpy()).resize((280, 280))
            prepared = datasets.Split(prepare(content(large)).pixels, label[None])
            logits = logits_of(model.model, prepared, model.mean, model.std)
            right += int(logits.argmax() == label)
        assert right > 30

    def test_probabilities_are_means_over_copies_moved_by_a_pixel(self, digits_run):
        model = trained.load(digits_run)
        pixels = datasets.load("digits").test.images[:3]
        assert pixels[:, [0, -1]].sum() == pixels[:, :, [0, -1]].sum() == 0
        ways = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
        moved = torch.cat([pixels.roll(way, (1, 2)) for way in ways])
        split = datasets.Split(moved, torch.zeros(15, dtype=torch.int64))
        each = logits_of(model.model, split, model.mean, model.std).softmax(1)
        found = classify(model, Prepared(pixels, [(0, 0, 28, 28)] * 3, (28, 28), "L", False))
        got = torch.tensor([list(digit["probabilities"].values()) for digit in found])
        torch.testing.assert_close(got, each.view(5, 3, 10).mean(0))

    @pytest.mark.parametrize(
        ("image", "part"),
        [
            (b"", "is not an image"),
            (b"<svg/>", "is not an image"),
            (content(drawn())[:300], "is a damaged image"),
            (content(Image.new("L", (50, 50), 77)), "no digit found"),
            (content(Image.new("RGBA", (50, 50))), "no digit found"),
            (content(Image.new("L", (1, 1))), "no digit found"),
            (content(Image.new("F", (9, 9), float("nan")), "tiff"), "not finite"),
            (content(drawn(), "bmp")[:-1], "is a damaged image"),
            (content(drawn(), "tiff")[:-1], "is a damaged image"),
            (content(drawn(), "ppm")[:-1], "is a damaged image"),
            (
                b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
                "HEIC .* convert it to JPEG or PNG",
            ),
        ],
    )
    def test_bad_images(self, image, part):
        with pytest.raises(UserError, match=part):
            prepare(image)

    @pytest.mark.parametrize(
        ("paper", "ink"),
        [((0, 130, 0), (255, 0, 0)), ((255, 0, 0), (0, 130, 0)), ("white", "gold")],
    )
    def test_ink_that_differs_in_colour_alone(self, paper, ink):
        shape = drawn()
        image = Image.composite(
            Image.new("RGB", shape.size, ink), Image.new("RGB", shape.size, paper), shape
        )
        assert difference(image) < 1
        assert difference(image, "jpeg", quality=90) < 6

    @pytest.mark.parametrize("size", [(28, 28), (260, 200), (900, 700)])
    @pytest.mark.parametrize("format", ["png", "jpeg"])
    def test_noise_is_no_digit(self, size, format):
        random = np.random.default_rng(0)
        spread = random.normal(230, 8, size)
        specks = np.where(random.random(size) < 0.001, 0.0, 255.0)
        specks[size[0] // 2, size[1] // 2] = 0
        for noise in (spread, specks):
            image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
            with pytest.raises(UserError, match="no digit found"):
                prepare(content(image, format))

    def test_faint_noise_and_lines_all_over_are_no_digit(self):
        noise = np.random.default_rng(0).normal(30_000, 60, (200, 200)).round()
        stain = 30_000 - np.asarray(drawn(), dtype=np.uint16) // 8  # as faint
        lines = np.full((300, 300), 250, dtype=np.uint8)
        lines[::20] = lines[:, ::20] = 150
        for image in (noise.astype(np.uint16), noise.astype(np.float32), stain, lines):
            with pytest.raises(UserError, match="no digit found"):
                prepare(content(Image.fromarray(image), "tiff"))

    def test_a_huge_jpeg_is_read_at_an_eighth_of_its_size(self, monkeypatch):
        image = drawn().resize((1600, 2080))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
        assert difference(image, "jpeg") < 6
        assert prepare(content(image, "jpeg")).size == (1600, 2080)
        assert images._decoded(content(image, "jpeg")).image.size == (200, 260)

    @pytest.mark.parametrize(
        ("format", "limit"),
        # From twice its limit, Pillow raises itself; of a JPEG four times as much is read.
        [("png", 1000), ("png", 40_000), ("jpeg", 10_000)],
    )
    def test_a_huge_image_is_refused_before_it_is_decoded(self, monkeypatch, format, limit):
        image = content(drawn(), format)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match="is too large"):
            prepare(image)

    @pytest.mark.parametrize("format", ["png", "jpeg", "gif"])
    def test_a_cut_end_that_no_pixel_needs(self, format):
        whole = content(drawn(), format)
        for missing in (1, 2):
            prepared = prepare(whole[:-missing])
            assert torch.equal(prepared.pixels, prepare(whole).pixels)
            assert (prepared.notice is not None) == (format != "gif")
        assert prepare(whole).notice is None
        with pytest.raises(UserError, match="is a damaged image"):
            prepare(whole[: len(whole) * 2 // 3])

    @pytest.mark.parametrize(
        ("chunk", "places"),  # behind the header, before the end
        [
            (b"\0\0\0\4eXIfMM\0*\0\0\0\0", (33, -12)),  # a wrong checksum
            (b"\0\0\0\4eXIfxxxx" + zlib.crc32(b"eXIfxxxx").to_bytes(4, "big"), (33, -12)),
            (b"\0\0\xff\0eXIfMM", (-12,)),  # longer than the file
        ],
    )
    def test_a_broken_exif_chunk(self, chunk, places):
        whole = content(drawn())
        for at in places:
            prepared = prepare(whole[:at] + chunk + whole[at:])
            assert torch.equal(prepared.pixels, prepare(whole).pixels)


@pytest.fixture
def seven() -> str:
    Path("seven.png").write_bytes(content(drawn(paper=255, ink=0)))
    return "seven.png"


class TestPredict:
    def test_json(self, ran, digits_run, seven):
        first, second = ran("predict", digits_run, seven, seven, "--json").objects
        assert first == second
        assert first["file"] == "seven.png"
        assert sum(first["probabilities"].values()) == pytest.approx(1)
        assert first["probability"] == max(first["probabilities"].values())
        assert first["probabilities"][first["name"]] == first["probability"]
        assert first["seen_as"] == "dark on light"
        assert (first["width"], first["height"], first["mode"]) == (200, 260, "L")

    def test_text(self, ran, digits_run, seven):
        out = ran("predict", digits_run, seven).out
        assert out.startswith("seven.png: ")
        assert "200x260 L, dark on light" in out
        assert "█" in out
        assert "\x1b" not in out
        assert out.count(" %") == 11
        assert max(map(len, out.splitlines())) < 80

    @pytest.mark.parametrize(("columns", "shown"), [(40, 3), (64, 3), (65, 10)])
    def test_where_the_bars_do_not_fit_beside_the_picture(
        self, ran, digits_run, seven, monkeypatch, columns, shown
    ):
        """The picture is above, and the likeliest three classes are below it."""
        monkeypatch.setenv("COLUMNS", str(columns))
        (result,) = ran("predict", digits_run, seven, "--json").objects
        lines = ran("predict", digits_run, seven).out.splitlines()
        assert max(map(len, lines)) <= columns
        bars = [line for line in lines if line.endswith(" %")]
        assert len(bars) == shown
        if shown == 3:
            assert lines[-3:] == bars
            assert bars[0].startswith(f"{result['name']}  █")
            assert f"{100 * result['probability']:.1f} %" in bars[0]

    def test_bad_files_are_named_and_the_others_done(self, ran, digits_run, seven):
        Path("text.png").write_text("no image")
        argv = ["predict", digits_run, "none.png", seven, "text.png", ".", "--json"]
        printed = ran(*argv, code=2)
        assert ["error" in o for o in printed.objects] == [True, False, True, True]
        lines = printed.err.splitlines(keepends=True)
        assert len(lines) == 3
        for line, name in zip(lines, ("none.png", "text.png", "."), strict=True):
            assert_one_line(line, f"{name}: ")

    def test_names_are_printed_without_what_a_terminal_obeys(self, ran, digits_run, seven):
        names = ["lat\udce9.png", "\x1b]0;title\x07.png", "two\nlines.png", "none\x9b.png"]
        for name in names[:3]:
            Path(name).write_bytes(Path(seven).read_bytes())
        out, err = ran("predict", digits_run, *names, code=2)
        for name in (r"lat\xe9.png: ", r"\x1b]0;title\x07.png: ", r"two\nlines.png: "):
            assert f"\n{name}" in f"\n{out}"
        assert_one_line(err, r"none\x9b.png: ")
        assert not set(out + err) & set("\x1b\x07\x9b")

    def test_a_cut_file_is_noted(self, ran, digits_run, seven):
        Path("cut.png").write_bytes(Path(seven).read_bytes()[:-4])
        printed = ran("predict", digits_run, "cut.png", "--json")
        assert printed.err.startswith("mnist-ext: note: cut.png: its end is missing")
        assert "its end is missing" in printed.objects[0]["notice"]

    def test_standard_input(self, capsys, digits_run, seven, monkeypatch):
        """In ASCII where the terminal has no more."""
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(seven).read_bytes())))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert main(["predict", str(digits_run), "-"]) == 0
        out = sys.stdout.buffer.getvalue().decode("ascii")
        assert out.startswith("standard input: ")
        assert "@" in out
        assert capsys.readouterr().err == ""

    def test_on_a_terminal(self, refused, digits_run, seven, monkeypatch):
        """Grey half blocks; a terminal as standard input is no image."""
        monkeypatch.setenv("TERM", "xterm-256color")
        controller, terminal = os.openpty()
        monkeypatch.setattr(sys, "stdin", os.fdopen(os.dup(terminal)))
        monkeypatch.setattr(sys, "stdout", os.fdopen(terminal, "w", encoding="utf-8"))

        def read() -> bytes:
            out = b""
            while b"the end" not in out:
                out += os.read(controller, 65536)
            return out

        with ThreadPoolExecutor(1) as pool:
            shown = pool.submit(read)
            try:
                refused("predict", digits_run, seven, "-", parts=("-: ", "is a terminal"))
            finally:
                print("the end", flush=True)
        assert b"\x1b[38;5;231" in shown.result()
        assert "▀".encode() in shown.result()
        for file in (sys.stdin, sys.stdout):
            file.close()
        os.close(controller)
