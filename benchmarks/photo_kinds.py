"""Pictures as a phone or a scanner takes them, drawn from the digits of a data set.

Each kind is a function of a random generator and of 28x28 digits, uint8, light on dark; `draw`
makes the same picture of the same kind, seed and digits everywhere. Papers, pens, light and desk
differ from picture to picture.
"""

import io
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Random = np.random.Generator
Plane = NDArray[np.float64]  # [height, width], 0 to 1: coverage by ink, or brightness
Picture = NDArray[np.float64]  # [height, width, 3], 0 to 1

_WIDTH, _HEIGHT = 600, 800


def draw(kind: str, seed: int, digits: NDArray[np.uint8]) -> bytes:
    """Return the file of one picture, PNG or JPEG.

    Args:
        kind: a key of KINDS.
        seed: which picture of the kind.
        digits: uint8 [n, 28, 28], light on dark; n as `count` says.
    """
    random = np.random.default_rng([zlib.crc32(kind.encode()), seed])
    picture = KINDS[kind](random, digits)
    file = io.BytesIO()
    if kind.startswith(("scan", "numbers", "cropped", "small")):
        Image.fromarray(np.rint(picture.mean(axis=2).clip(0, 1) * 255).astype(np.uint8)).save(
            file, "png"
        )
    else:
        picture = picture + random.normal(0, random.uniform(0.004, 0.02), picture.shape)
        Image.fromarray(np.rint(picture.clip(0, 1) * 255).astype(np.uint8)).save(
            file, "jpeg", quality=int(random.integers(60, 95))
        )
    return file.getvalue()


def count(kind: str) -> int:
    """Return how many digits a picture of a kind shows."""
    return {"blank": 0, "numbers": int(kind[-1]) if kind[-1].isdigit() else 0}.get(
        kind.split()[0], 1
    )


# The digit


def _stroke(random: Random, digit: NDArray[np.uint8], side: int, turn: float = 0) -> Plane:
    """Enlarge a digit to a stroke with sharp edges; `side` is that of its 28 pixels."""
    image = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    if turn:
        image = image.rotate(turn, Image.Resampling.BICUBIC)
    blur = ImageFilter.GaussianBlur(side * random.uniform(0.004, 0.012))
    level = random.uniform(0.35, 0.5)
    return ((np.asarray(image.filter(blur)) / 255 - level) / 0.25 + 0.5).clip(0, 1)


def _on_page(random: Random, digit: NDArray[np.uint8], margin: float = 0.02) -> Plane:
    """Put the stroke somewhere on a page."""
    side = int(random.uniform(0.32, 0.62) * _WIDTH)
    page = np.zeros((_HEIGHT, _WIDTH))
    x = int(random.uniform(margin * _WIDTH, (1 - margin) * _WIDTH - side))
    y = int(random.uniform(margin * _HEIGHT, (1 - margin) * _HEIGHT - side))
    page[y : y + side, x : x + side] = _stroke(random, digit, side, random.uniform(-6, 6))
    return page


def _inked(paper: Picture, stroke: Plane, ink: NDArray[np.float64] | float) -> Picture:
    """Draw with a pen that lets `ink` of the light through, a share or one a colour."""
    return paper * (1 - stroke[..., None] * (1 - np.asarray(ink)))


def _pen(random: Random) -> NDArray[np.float64]:
    """Return the light, a colour, that comes from ink: black or dark blue."""
    return np.array([0.1, 0.1, random.choice([0.12, 0.35])]) + random.uniform(0, 0.08)


# Papers and light


def _paper(random: Random) -> Picture:
    """Return paper with a light tint and fibres."""
    tint = random.uniform(0.86, 0.97) - np.array([0, 0.01, 0.05]) * random.uniform(0, 1)
    fibres = random.normal(0, random.uniform(0, 0.012), (_HEIGHT // 2, _WIDTH // 2))
    grain = np.asarray(Image.fromarray(fibres.astype(np.float32)).resize((_WIDTH, _HEIGHT)))
    return (1 + grain[..., None]) * tint


def _light(random: Random, least: float = 0.6) -> Picture:
    """Return light that falls off to one side and to the corners."""
    y, x = np.mgrid[-1 : 1 : _HEIGHT * 1j, -1 : 1 : _WIDTH * 1j]
    angle = random.uniform(0, 2 * np.pi)
    slope = 0.5 + 0.35 * (x * np.cos(angle) + y * np.sin(angle))
    light = 1 - (1 - random.uniform(least, 1)) * slope - random.uniform(0, 0.12) * (x * x + y * y)
    return light[..., None] * np.array([1, 1 - random.uniform(0, 0.03), 1 - random.uniform(0, 0.1)])


def _rulings(random: Random, paper: Picture, squared: bool) -> Picture:
    """Print lines on paper, blue, grey or reddish, as a photo taken not quite level shows them."""
    gap, width = random.uniform(26, 46), int(random.integers(1, 4))
    color = np.array([(150, 180, 215), (165, 165, 175), (205, 160, 165)])[random.integers(3)] / 255
    size = 2 * max(_WIDTH, _HEIGHT)
    lines = Image.new("L", (size, size))
    pen = ImageDraw.Draw(lines)
    for at in np.arange(random.uniform(0, gap), size, gap):
        pen.line([(0, at), (size, at)], 255, width)
        if squared:
            pen.line([(at, 0), (at, size)], 255, width)
    turned = lines.rotate(random.normal(0, 0.7), Image.Resampling.BICUBIC)
    left, top = (size - _WIDTH) // 2, (size - _HEIGHT) // 2
    stroke = np.asarray(turned.crop((left, top, left + _WIDTH, top + _HEIGHT))) / 255
    return paper * (1 - stroke[..., None] * (1 - color) * random.uniform(0.6, 1))


def _shadow(random: Random) -> Picture:
    """Return light with the shadow of a hand or a phone: a straight edge, soft or hard."""
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    angle = random.uniform(0, 2 * np.pi)
    through = random.uniform(0.25, 0.75) * _WIDTH, random.uniform(0.25, 0.75) * _HEIGHT
    far = (x - through[0]) * np.cos(angle) + (y - through[1]) * np.sin(angle)
    dark = 1 / (1 + np.exp(-far / random.uniform(1.5, 20)))
    return 1 - (1 - random.uniform(0.45, 0.75)) * dark[..., None] * np.ones(3)


def _glare(random: Random, picture: Picture) -> Picture:
    """Add one or two reflections of a lamp."""
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    for _ in range(random.integers(1, 3)):
        at = random.uniform(0.1, 0.9) * _WIDTH, random.uniform(0.1, 0.9) * _HEIGHT
        sigma = random.uniform(0.05, 0.13) * _WIDTH * random.uniform(0.7, 1.4, 2)
        spot = np.exp(-(((x - at[0]) / sigma[0]) ** 2 + ((y - at[1]) / sigma[1]) ** 2) / 2)
        picture = picture + random.uniform(0.3, 0.6) * spot[..., None]
    return picture


def _on_desk(random: Random, page: Picture) -> Picture:
    """Lay the page, turned a little, on a dark desk: wood or grey."""
    desk = np.array([(0.3, 0.2, 0.14), (0.16, 0.16, 0.18), (0.4, 0.28, 0.2)])[random.integers(3)]
    grain = random.normal(0, 0.02, (_HEIGHT, 1, 1)) + np.zeros((_HEIGHT, _WIDTH, 1))
    share, at = random.uniform(0.62, 0.85), random.uniform(-0.06, 0.06, 2)
    size = int(_WIDTH * share), int(_HEIGHT * share)
    corner = int((0.5 + at[0] - share / 2) * _WIDTH), int((0.5 + at[1] - share / 2) * _HEIGHT)
    place = Image.new("RGBA", (_WIDTH, _HEIGHT))
    small = Image.fromarray(np.rint(page.clip(0, 1) * 255).astype(np.uint8)).resize(size)
    place.paste(small, corner)
    turned = np.asarray(place.rotate(random.uniform(-5, 5), Image.Resampling.BICUBIC)) / 255
    opaque = turned[..., 3:]
    return turned[..., :3] * opaque + (desk + grain) * (1 - opaque)


def _specks(random: Random, picture: Picture) -> Picture:
    """Scatter three specks of dirt."""
    image = Image.new("L", (_WIDTH, _HEIGHT))
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, radius = random.uniform(0, _WIDTH), random.uniform(0, _HEIGHT), random.uniform(1, 5)
        pen.ellipse([x - radius, y - radius, x + radius, y + radius * random.uniform(0.6, 1)], 255)
    return _inked(picture, np.asarray(image) / 255, 0.2)


# The kinds


def _photo(random: Random, digits: NDArray[np.uint8]) -> Picture:
    return _inked(_paper(random), _on_page(random, digits[0]), _pen(random)) * _light(random)


def _scan(random: Random, digits: NDArray[np.uint8], turn: float = 0) -> Picture:
    side = int(random.integers(200, 500))
    paper = np.full((side, side, 3), random.uniform(0.9, 1))
    return _inked(paper, _stroke(random, digits[0], side, turn), random.uniform(0.05, 0.3))


def _small(random: Random, digits: NDArray[np.uint8]) -> Picture:
    side = int(random.integers(28, 64))
    return _inked(np.ones((side, side, 3)), _stroke(random, digits[0], side), 0.1)


def _cropped(random: Random, digits: NDArray[np.uint8]) -> Picture:
    picture = _scan(random, digits)
    dark = picture[..., 0] < 0.6
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    margin = int(random.integers(1, 6))
    return picture[
        max(rows[0] - margin, 0) : rows[-1] + margin,
        max(columns[0] - margin, 0) : columns[-1] + margin,
    ]


def _dim(random: Random, digits: NDArray[np.uint8]) -> Picture:
    paper = _paper(random) * np.array([0.55, 0.52, 0.42]) * random.uniform(0.5, 1.1)
    pen = random.uniform(0.3, 0.45)
    picture = _inked(paper, _on_page(random, digits[0]), pen) * _light(random)
    return picture + random.normal(0, random.uniform(0.01, 0.03), picture.shape)


def _pencil(random: Random, digits: NDArray[np.uint8]) -> Picture:
    grain = random.normal(1, random.uniform(0.05, 0.25), (_HEIGHT, _WIDTH)).clip(0, 1.4)
    stroke = _on_page(random, digits[0]) * grain
    return _inked(_paper(random), stroke, random.uniform(0.5, 0.72)) * _light(random)


def _shadowed(random: Random, digits: NDArray[np.uint8]) -> Picture:
    return _photo(random, digits) * _shadow(random)


def _ruled(random: Random, digits: NDArray[np.uint8], squared: bool = False) -> Picture:
    paper = _rulings(random, _paper(random), squared)
    return _inked(paper, _on_page(random, digits[0]), _pen(random)) * _light(random)


def _desk(random: Random, digits: NDArray[np.uint8]) -> Picture:
    page = _inked(_paper(random), _on_page(random, digits[0], margin=0.06), _pen(random))
    return _on_desk(random, page) * _light(random, least=0.75)


def _glaring(random: Random, digits: NDArray[np.uint8]) -> Picture:
    return _glare(random, _photo(random, digits) * random.uniform(0.5, 0.9))


def _numbers(random: Random, digits: NDArray[np.uint8]) -> Picture:
    """Write digits side by side, which do not touch, of about one size, up and down a little."""
    side = int(random.integers(140, 240))
    strokes = [
        _stroke(random, digit, int(side * random.uniform(0.85, 1.1)), random.uniform(-5, 5))
        for digit in digits
    ]
    # By their ink: 28 pixels have four or more of margin.
    strokes = [s[:, (s > 0.2).any(0)] for s in strokes]
    gaps = random.uniform(0.12, 0.4, len(strokes) + 1) * side
    gaps[[0, -1]] += 0.1 * side
    width = int(gaps.sum()) + sum(s.shape[1] for s in strokes)
    page, x = np.zeros((int(side * 1.7), width + 1)), 0.0
    for gap, stroke in zip(gaps[:-1], strokes, strict=True):
        x += gap
        y = int((page.shape[0] - len(stroke)) / 2 + random.uniform(-0.1, 0.1) * side)
        page[y : y + len(stroke), int(x) : int(x) + stroke.shape[1]] = stroke
        x += stroke.shape[1]
    paper = np.full((*page.shape, 3), random.uniform(0.85, 1))
    return _inked(paper, page, random.uniform(0.05, 0.3))


KINDS: dict[str, Callable[[Random, NDArray[np.uint8]], Picture]] = {
    "scan": _scan,
    "scan turned": lambda r, d: _scan(r, d, turn=r.uniform(-8, 8)),
    "photo": _photo,
    "small": _small,
    "cropped": _cropped,
    "dim": _dim,
    "pencil": _pencil,
    "shadow": _shadowed,
    "lined": _ruled,
    "squared": lambda r, d: _ruled(r, d, squared=True),
    "specks": lambda r, d: _specks(r, _photo(r, d)),
    "desk": _desk,
    "glare": _glaring,
    "numbers of 2": _numbers,
    "numbers of 3": _numbers,
    "numbers of 4": _numbers,
    "blank": lambda r, d: _paper(r) * _light(r),
    "blank lined": lambda r, d: _rulings(r, _paper(r), squared=False) * _light(r),
    "blank shadow": lambda r, d: _paper(r) * _light(r) * _shadow(r),
}
