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
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mnist_ext.errors import UserError

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


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image, made like those of a data set.

    Attributes:
        pixels: uint8 [28, 28]; 0 is the background.
        size: width and height of the file's image, after its rotation.
        mode: the file's pixel format, in Pillow's terms.
        inverted: the border was light, so that dark is what was drawn.
    """

    pixels: Tensor
    size: tuple[int, int]
    mode: str
    inverted: bool


def prepare(content: bytes, dataset: str = "mnist") -> Prepared:
    """Make an image of any size and format look like those of a data set.

    What differs from the border is taken for what was drawn: there should be one digit on a plain
    background, which need not be lit evenly. Transparent parts count as paper. The image is
    inverted where the border is brighter than what was drawn.

    Args:
        content: the file, in a format that Pillow reads; of several frames the first one.
        dataset: whose images to imitate: ``mnist``, ``fashion-mnist`` or ``digits``.

    Raises:
        UserError: it is no image, is damaged or larger than Pillow's limit, or shows nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                mode = image.mode
                upright = ImageOps.exif_transpose(image)
                size = upright.size
                gray = _gray(upright)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"is too large ({error})") from error
    except UserError:
        raise
    # Pillow's decoders raise many kinds of errors on damaged files.
    except Exception as error:
        if isinstance(error, Image.UnidentifiedImageError):
            raise UserError("is not an image of a format that can be read") from error
        raise UserError(f"is a damaged image ({str(error) or type(error).__name__})") from error
    ink, inverted = _ink(gray)
    box = _SIDE if dataset == "fashion-mnist" else _DIGIT_BOX
    placed = _place(ink, box, by_mass=dataset == "mnist")
    return Prepared(torch.from_numpy(placed), size, mode, inverted)


def _gray(image: Image.Image) -> NDArray[np.floating]:
    """Return the brightness, 0 to 1, reduced to at most _LARGEST_SIDE pixels a side."""
    if image.mode.startswith(("I", "F")):
        # Pillow would cut 16 and 32 bits off at 255. Their range is whatever they use, so that
        # black must not be stretched to white where there is nothing else.
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        if not np.isfinite(high - low):
            raise UserError("holds values that are not finite")
        values = (values - low) / (high - low) if high > low else np.zeros_like(values)
        return np.asarray(_reduced(Image.fromarray(values.astype(np.float32))))
    if image.has_transparency_data:
        colors = np.asarray(_reduced(image.convert("RGBA").convert("RGBa")), dtype=np.float32) / 255
        # RGBa: colours already weighted with the opacity.
        light = colors[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        opacity = colors[..., 3]
        if (1 - opacity).max() > 0:
            # Dark on transparent was meant for light paper, light on transparent for dark.
            paper = 0.0 if light.sum() > 0.5 * opacity.sum() else 1.0
            return light + (1 - opacity) * np.float32(paper)
        return light
    return np.asarray(_reduced(image.convert("RGB").convert("L")), dtype=np.float32) / 255


def _reduced(image: Image.Image) -> Image.Image:
    if max(image.size) > _LARGEST_SIDE:
        image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.BOX)
    return image


def _ink(gray: NDArray[np.floating]) -> tuple[NDArray[np.float64], bool]:
    """Return how far each pixel is from the background, 0 to 1, and whether that is lighter."""
    height, width = gray.shape
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    edge = max(1, round(_BORDER * min(height, width)))
    border = np.ones(gray.shape, dtype=bool)
    border[edge : height - edge, edge : width - edge] = False

    # A plane through the border is the background: a photograph is rarely lit evenly. Fitted a
    # second time without what lies far off, strokes that reach the border.
    position = np.stack([np.ones_like(y), y, x], axis=-1)
    at, level = position[border], gray[border].astype(np.float64)
    kept = np.abs(level - np.median(level)) <= max(2 * level.std(), 1e-6)
    plane = np.linalg.lstsq(at[kept], level[kept], rcond=None)[0]
    darker = position @ plane - gray
    inverted = bool(darker.max() > -darker.min())
    ink = darker if inverted else -darker

    # What the border varies by is background inside, too.
    floor = max(float(np.percentile(np.abs(darker[border][kept]), 95)), 0.0)
    if ink.max() - floor < _LEAST_CONTRAST:
        raise UserError("shows nothing: its pixels are all alike")
    return np.clip((ink - floor) / (ink.max() - floor), 0, 1), inverted


def _place(ink: NDArray[np.float64], box: int, by_mass: bool) -> NDArray[np.uint8]:
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
