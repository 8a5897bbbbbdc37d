"""From an image file to an image as the data sets have them: 28x28, light on dark.

MNIST's digits were "size normalized to fit in a 20x20 pixel box while preserving their aspect
ratio" and "centered in a 28x28 image by computing the center of mass of the pixels, and translating
the image so as to position this point at the center of the 28x28 field" (LeCun, Cortes and Burges,
http://yann.lecun.com/exdb/mnist). Fashion-MNIST's pieces fill the 28x28 pixels by their longer side
and lie in the middle (Xiao, Rasul and Vollgraf, arXiv:1708.07747, section 2). The embedded digits
lie in the middle of MNIST's box, as they fill it.
"""

import io
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin
from torch import Tensor

from mnist_ext.app import UserError
from mnist_ext.app.data import photo

_SIDE = 28
_DIGIT_BOX = 20
# Images are reduced to this before anything else: noise averages out, and time is bounded.
_LARGEST_SIDE = 512
# The share of the sides that counts as border.
_BORDER = 0.04
# Ink of which there is less than this, of the most in the image, is background.
_FAINT = 0.1
# Brightness, of 0 to 1, by which the image must vary at least.
_LEAST_CONTRAST = 0.04
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# Ink whose lightness differs from the background's by less than this, of the distance of their
# colours, is distinguished by colour.
_LEAST_LIGHTNESS = 0.5
# Noise has a connectedness of up to 0.5, also after JPEG; MNIST's digits have 1.4 and more.
_LEAST_CONNECTED = 0.6

_JPEG, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
# A JPEG of so many times as many pixels as Pillow takes: memory stays bounded.
_JPEG_FACTOR = 4
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif")
_TIFF_COLORS, _TIFF_YCBCR = 262, 6
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)
# Bytes put after the end of a file that ends too early: more than what follows the pixels.
_FILL = 1 << 16


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a file shows, made like the images of a data set.

    Attributes:
        pixels: uint8 [n, 28, 28], the digits from left to right; 0 is the background.
        boxes: where in the file's image they lie: left, top, right, bottom.
        size: width and height of the file's image, after its rotation.
        mode: the file's pixel format, in Pillow's terms.
        inverted: what was drawn is darker than the background.
        notice: what a user should know about the file, if anything.
    """

    pixels: Tensor
    boxes: list[tuple[int, int, int, int]]
    size: tuple[int, int]
    mode: str
    inverted: bool
    notice: str | None = None


class NothingFoundError(UserError):
    """The file is an image, and shows nothing that could be classified."""


def prepare(content: bytes, dataset: str = "mnist") -> Prepared:
    """Make what an image of any size and format shows look like the images of a data set.

    Digits are found on paper as `photo` describes, side by side; of clothing there should be one
    piece on a plain background, which need not be lit evenly. Transparent parts count as paper.

    Args:
        content: the file, in a format that Pillow reads; of several frames the first one.
        dataset: whose images to imitate: ``mnist``, ``fashion-mnist`` or ``digits``.

    Raises:
        NothingFoundError: it shows nothing.
        UserError: it is no image, lacks pixels, or is larger than Pillow's limit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with a file's metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            decoded = _decoded(content)
            orientation = _orientation(decoded.image)
            turn = _TURNS.get(orientation)
            upright = decoded.image if turn is None else decoded.image.transpose(turn)
            colors = _colors(upright)
            if dataset == "fashion-mnist":
                ink, inverted = _ink(colors)
                digits = [photo.Digit(ink, (0, 0, *ink.shape[::-1]))]
            else:
                digits, inverted = _digits(colors)
        except UserError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UserError(f"is too large ({error}); make it smaller") from error
        except Image.UnidentifiedImageError as error:
            raise UserError(_unknown(content)) from error
        # Pillow's decoders raise many kinds of errors on damaged files.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"is a damaged image ({reason})") from error
    if not digits:
        raise NothingFoundError("no digit found")
    box = _SIDE if dataset == "fashion-mnist" else _DIGIT_BOX
    placed = np.stack([_place(digit.ink, box, by_mass=dataset == "mnist") for digit in digits])
    size = decoded.size[::-1] if orientation in _LYING else decoded.size
    notice = "its end is missing, but all pixels are there" if decoded.cut else None
    height, width = colors.shape[:2]
    scale = np.tile([size[0] / width, size[1] / height], 2)
    boxes = [tuple(np.rint(digit.box * scale).astype(int).tolist()) for digit in digits]
    return Prepared(torch.from_numpy(placed), boxes, size, decoded.image.mode, inverted, notice)


@dataclass(frozen=True, eq=False)
class _Decoded:
    """An image with its pixels, the size that the file says, and whether its end is missing."""

    image: Image.Image
    size: tuple[int, int]
    cut: bool


def _decoded(content: bytes) -> _Decoded:
    """Decode a file, also one whose end or metadata are broken, if all its pixels are there."""
    png = content.startswith(_PNG)
    cut = png and _PNG_END not in content
    try:
        return _Decoded(*_loaded(content), cut)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception as error:
        if png:
            return _Decoded(*_loaded(_bare_png(content)), cut)
        if isinstance(error, Image.UnidentifiedImageError):
            raise
        # What comes after the end makes no difference where nothing of the pixels is missing.
        # The half of a marker would be completed by it.
        content = content.rstrip(b"\xff")
        one, other = (_loaded(content + filler * _FILL + _JPEG_END) for filler in (b"\0", b"U"))
        if one[0].tobytes() != other[0].tobytes():
            raise
        return _Decoded(*one, cut=True)


def _loaded(content: bytes) -> tuple[Image.Image, tuple[int, int]]:
    """Return the image, with its pixels, and the size that the file says.

    A JPEG of more pixels than Pillow takes is read at an eighth of its size.
    """
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    jpeg = content.startswith(_JPEG)
    with _set(Image, "MAX_IMAGE_PIXELS", _JPEG_FACTOR * limit if jpeg else limit):
        image = Image.open(io.BytesIO(content))
    size = image.size
    if jpeg and math.prod(size) > limit:
        image.draft(None, (size[0] // 8, size[1] // 8))
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if tags.get(_TIFF_COLORS) == _TIFF_YCBCR:
        # Pillow before 13 takes such pixels, uncompressed, for RGBX; libtiff knows better.
        with _set(TiffImagePlugin, "READ_LIBTIFF", True):
            image = Image.open(io.BytesIO(content))
    image.load()
    return image, size


@contextmanager
def _set(module: ModuleType, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _bare_png(content: bytes) -> bytes:
    """Return a PNG file without its metadata, and with an end."""
    parts, at = [_PNG], len(_PNG)
    while at < len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        chunk = content[at : at + 12 + length]
        if kind == b"IDAT" and len(chunk) < 12 + length:
            chunk = _png_chunk(kind, chunk[8:])
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            parts.append(chunk)
        at += 12 + length
    return b"".join([*parts, _png_chunk(b"IEND", b"")])


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return len(data).to_bytes(4, "big") + kind + data + checksum.to_bytes(4, "big")


def _unknown(content: bytes) -> str:
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        return (
            "is a HEIC or AVIF image, which cannot be read here: convert it to JPEG or PNG, for "
            "example with heif-convert"
        )
    return "is not an image of a format that can be read: convert it to JPEG or PNG"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # the pixels are whole, whatever the metadata are
        return 1


def _colors(image: Image.Image) -> NDArray[np.floating]:
    """Return the colours, 0 to 1, [height, width, 1 or 3], of at most _LARGEST_SIDE a side."""
    if image.mode.startswith(("I", "F")):
        # Pillow would cut 16 and 32 bits off at 255. What is white is not known: the largest.
        values = np.asarray(image, dtype=np.float64)
        low, high = min(float(values.min()), 0.0), float(values.max())
        if not np.isfinite(high - low):
            raise UserError("holds values that are not finite")
        values = (values - low) / (high - low) if high > low else np.zeros_like(values)
        return np.asarray(_reduced(Image.fromarray(values.astype(np.float32))))[..., None]
    if image.has_transparency_data:
        colors = np.asarray(_reduced(image.convert("RGBA").convert("RGBa")), dtype=np.float32) / 255
        # RGBa: colours already weighted with the opacity.
        colors, opacity = colors[..., :3], colors[..., 3:]
        # Dark on transparent was meant for light paper, light on transparent for dark.
        paper = 0.0 if (colors @ _LUMINANCE).sum() > 0.5 * opacity.sum() else 1.0
        return colors + (1 - opacity) * np.float32(paper)
    if image.mode in ("1", "L"):
        return np.asarray(_reduced(image.convert("L")), dtype=np.float32)[..., None] / 255
    return np.asarray(_reduced(image.convert("RGB")), dtype=np.float32) / 255


def _reduced(image: Image.Image) -> Image.Image:
    if max(image.size) > _LARGEST_SIDE:
        image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.BOX)
    return image


def _digits(colors: NDArray[np.floating]) -> tuple[list[photo.Digit], bool]:
    """Return the digits on a page, and whether they are darker than it."""
    colors = photo.without_desk(colors, _luminance(colors))
    line = _ink_color(colors)
    if line is None:
        light = _luminance(colors)
        inverted = photo.is_dark_on_light(light, _darker(light)[0] + light)
        return photo.find_digits(light, inverted), inverted
    light = colors @ line
    return photo.find_digits(light - min(light.min(), 0), True), bool(line @ _LUMINANCE > 0)


def _luminance(colors: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.asarray(colors @ _LUMINANCE if colors.shape[2] == 3 else colors[..., 0])


def _ink_color(colors: NDArray[np.floating]) -> NDArray[np.float64] | None:
    """Return what colours must be multiplied with to tell ink by its colour, paper being more.

    None where lightness tells it from the paper.
    """
    if colors.shape[2] == 1:
        return None
    apart = np.stack([_smooth(_darker(colors[..., c])[0]) for c in range(3)], axis=-1)
    distance = np.sqrt((apart**2).mean(axis=-1))
    darker = _smooth(_darker(_luminance(colors))[0])
    if max(darker.max(), -darker.min()) >= _LEAST_LIGHTNESS * distance.max():
        return None
    # Along the line from the ink's colour to the paper's, a grey being 1 apart from black.
    line = apart[np.unravel_index(distance.argmax(), distance.shape)]
    return np.asarray(line / (np.linalg.norm(line) * math.sqrt(3)))


def _ink(colors: NDArray[np.floating]) -> tuple[NDArray[np.float64], bool]:
    """Return how far each pixel is from the background, 0 to 1, and whether that is lighter."""
    line = _ink_color(colors)
    darker, paper = _darker(_luminance(colors) if line is None else colors @ line)
    inverted = bool(darker.max() > -darker.min())
    ink = darker if inverted else -darker
    if line is not None:
        inverted = bool(line @ _LUMINANCE > 0)

    # What the border varies by is background inside, too.
    floor = max(float(np.percentile(np.abs(ink[paper]), 95)), 0.0)
    if ink.max() - floor < _LEAST_CONTRAST:
        raise NothingFoundError("shows nothing: its pixels are all alike")
    ink = np.clip((ink - floor) / (ink.max() - floor), 0, 1)
    if _connected(ink) < _LEAST_CONNECTED:
        raise NothingFoundError("shows nothing, only specks")
    return ink, inverted


def _connected(ink: NDArray[np.float64]) -> float:
    """Return how far ink has ink beside it: near 0 for noise, 1 for thin lines, 4 for areas."""
    pairs = (
        (ink[:, 1:], ink[:, :-1]),
        (ink[1:], ink[:-1]),
        (ink[1:, 1:], ink[:-1, :-1]),
        (ink[1:, :-1], ink[:-1, 1:]),
    )
    return float(sum((a * b).sum() for a, b in pairs) / (ink * ink).sum())


def _darker(values: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return how much darker than the background each pixel is, and which ones are background."""
    height, width = values.shape
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    edge = max(1, round(_BORDER * min(height, width)))
    border = np.ones(values.shape, dtype=bool)
    border[edge : height - edge, edge : width - edge] = False

    # A plane through the border is the background: a photograph is rarely lit evenly. Fitted a
    # second time without what lies far off, strokes that reach the border.
    position = np.stack([np.ones_like(y), y, x], axis=-1)
    at, level = position[border], values[border].astype(np.float64)
    kept = np.abs(level - np.median(level)) <= max(2 * level.std(), 1e-6)
    plane = np.linalg.lstsq(at[kept], level[kept], rcond=None)[0]
    border[border] = kept
    return position @ plane - values, border


def _smooth(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the mean of each pixel and its eight neighbours."""
    height, width = values.shape
    padded = np.pad(values, 1, mode="edge")
    near = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.asarray(np.mean(near, axis=0))


def _place(ink: NDArray[np.floating], box: int, by_mass: bool) -> NDArray[np.uint8]:
    """Fit what is drawn into a box, and that into the middle of 28x28 pixels."""
    drawn = ink >= _FAINT
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = bottom - top, right - left
    scale = box / max(height, width)
    target = max(1, round(width * scale)), max(1, round(height * scale))
    crop = Image.fromarray(ink[top:bottom, left:right].astype(np.float32))
    digit = np.asarray(crop.resize(target, Image.Resampling.BILINEAR))
    # Thin strokes pale when they are reduced.
    digit = np.clip(digit / digit.max(), 0, 1)

    height, width = digit.shape
    if by_mass:
        # To within half a pixel of 14, and never over the edge.
        y = _SIDE // 2 - _middle(digit.sum(1))
        x = _SIDE // 2 - _middle(digit.sum(0))
        y, x = min(max(y, 0), _SIDE - height), min(max(x, 0), _SIDE - width)
    else:
        y, x = (_SIDE - height) // 2, (_SIDE - width) // 2
    placed = np.zeros((_SIDE, _SIDE), dtype=np.uint8)
    placed[y : y + height, x : x + width] = np.rint(digit * 255)
    return placed


def _middle(mass: NDArray[np.floating]) -> int:
    """Return the pixel that the centre of mass lies in."""
    return math.floor(float(mass @ (np.arange(len(mass)) + 0.5) / mass.sum()))
