"""Find the ink in a photograph of paper, and in the ink the digits, from left to right.

Paper is never evenly lit: the background at a pixel is what the paper around it looks like (a
morphological closing), and ink is the share of the background's light that is missing. What is no
digit is taken out: the desk around the page, the rulings of the paper, specks, soft shadows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Plane = NDArray[np.floating]  # [height, width]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice]  # rows, columns

# A page is this share of the picture at least, a rectangle nearly, and no longer than twice its
# width; the desk is at most so bright, of the page, and along so much of the picture's edge.
_LEAST_PAGE, _LEAST_RECTANGULAR, _LONGEST_PAGE = 0.2, 0.86, 2.0
_DARKEST_DESK, _LEAST_AROUND = 0.65, 0.7
# The side of what is averaged around an edge, of the picture's longer side.
_AROUND = 0.12
# The side of the closing, of the longer side: wider than strokes, narrower than shadows.
_CLOSING = 0.33
# Dark ink takes so much of the paper's light at least, light ink adds so much of full brightness;
# and so many times what the paper varies by.
_LEAST_INK, _LEAST_LIGHT, _LEAST_NOISES = 0.15, 0.25, 9.0
# Ink is what has this share of the darkest ink.
_INK = 0.45
# Parts of less than this share of the largest part's area are dirt.
_SPECK = 0.05
# Digits beside each other are at least this share of the highest one, and of the picture.
_LEAST_HEIGHT, _LEAST_OF_PICTURE = 0.4, 0.04
# Parts above each other are of one digit if they overlap by this share of the narrower one and lie
# apart by less than this share of the higher one.
_OVERLAP, _NEAR = 0.5, 0.4
# What touches the edge is a digit that was cropped closely if it has this share of a side; or this
# one of the height, and touches with so much of its longer side, as the end of a stroke does.
_FILLS, _LEAST_CROPPED, _STROKE_END = 0.8, 0.4, 0.25
# No shadow takes so much of the light. Else the ink changes by this share of its darkest at a
# stroke's outline, or this share of the stroke is nearly as dark as its darkest.
_DARKEST_SHADOW = 0.7
_ABRUPT, _SHARP = 0.5, 0.65
# Rulings are up to so thick, in pictures of at least so many pixels a side, and no darker ink
# than this share of theirs is left where nothing is written between them.
_THICKEST_RULING, _LEAST_RULED = 6, 100
_LEAST_LEFT = 0.75
# The standard deviation, of the longer side, that noise is smoothed with.
_SMOOTHING = 0.0015
_EIGHT = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True, eq=False)
class Digit:
    """What was drawn, cut out.

    Attributes:
        ink: [height, width], 0 to 1.
        box: left, top, right, bottom, in pixels of the plane that it was found in.
    """

    ink: Plane
    box: tuple[int, int, int, int]


def without_desk(colors: NDArray[np.floating], light: Plane) -> NDArray[np.floating]:
    """Return the colours with the desk around the page, if there is one, painted over.

    Each pixel of the desk takes the colour of the nearest pixel of the page.

    Args:
        colors: [height, width, channels].
        light: their brightness.
    """
    bright = ndimage.gaussian_filter(light, 2) > otsu(light)
    labels, number = ndimage.label(bright)
    if number == 0:
        return colors
    page = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    page = ndimage.binary_fill_holes(page)
    edge = np.ones_like(page)
    edge[1:-1, 1:-1] = False
    outside = edge & ~page
    if page.mean() < _LEAST_PAGE or outside.sum() < _LEAST_AROUND * edge.sum():
        return colors
    if np.median(light[~page]) > _DARKEST_DESK * np.median(light[page]):
        return colors
    if not _is_page(page):
        return colors
    rim = max(2, round(0.012 * max(light.shape)))
    page = ndimage.binary_erosion(page, iterations=rim, border_value=1)
    nearest = ndimage.distance_transform_edt(~page, return_distances=False, return_indices=True)
    return colors[tuple(nearest)]


def otsu(values: Plane) -> float:
    """Return the threshold that separates two classes best (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).clip(1, None)
    above = (below[-1] - below).clip(1, None)
    sums = np.cumsum(counts * middles)
    between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.argmax(between)])


def _is_page(mask: Mask) -> bool:
    """Say whether a mask fills the smallest rectangle around it, which is turned, as a page does.

    A light digit on a dark picture is no page: what fills a rectangle, a one, is longer.
    """
    at = np.argwhere(mask ^ ndimage.binary_erosion(mask)) @ np.array([1, 1j])
    turned = at[:, None] * np.exp(1j * np.deg2rad(np.arange(-45, 45)))
    sides = np.stack([np.ptp(turned.real, axis=0), np.ptp(turned.imag, axis=0)]) + 1
    short, long = np.sort(sides[:, np.argmin(sides.prod(axis=0))])
    return bool(mask.sum() >= _LEAST_RECTANGULAR * short * long and long <= _LONGEST_PAGE * short)


def is_dark_on_light(light: Plane, border: Plane) -> bool:
    """Say whether what has sharp edges is darker than what is around it and than the border.

    Args:
        light: brightness.
        border: at each pixel, the brightness that the picture's border leads to expect.
    """
    slope = ndimage.gaussian_gradient_magnitude(light, 1)
    edges = slope >= 0.5 * np.percentile(slope, 99.8)
    middle = (ndimage.maximum_filter(light, 5) + ndimage.minimum_filter(light, 5)) / 2
    around = ndimage.uniform_filter(light, round(_AROUND * max(light.shape)))
    votes = np.sign(around - middle) + np.sign(border - middle)
    return bool(votes[edges].sum() >= 0)


def ink_of(light: Plane, dark_on_light: bool) -> Plane:
    """Return the ink: the share of the paper's light that is missing, or the light added."""
    side = max(3, round(_CLOSING * max(light.shape)))
    smooth = ndimage.gaussian_filter(light, max(light.shape) / 400)
    if not dark_on_light:
        return np.asarray(light - ndimage.grey_opening(smooth, side, mode="reflect"))
    background = ndimage.grey_closing(smooth, side, mode="reflect")
    return np.asarray(1 - light / np.maximum(background, 0.02))


def without_rulings(ink: Plane, level: float) -> Plane:
    """Return the ink without thin straight lines that run far across or down, if there are any.

    An opening across a line takes it out where no stroke, which is thicker, crosses it.
    """
    if min(ink.shape) < _LEAST_RULED:
        return ink
    for axis in (0, 1):
        ruled, side = _is_ruled(ink > level, axis), 2
        while ruled and side <= _THICKEST_RULING:
            # One pixel more than what breaks the lines, of which the edges are fainter.
            ruled, side = _is_ruled(ink > level, axis), side + 1
            ink = ndimage.grey_opening(ink, (side, 1) if axis else (1, side))
    return ink


def _is_ruled(mask: Mask, axis: int) -> bool:
    """Say whether thin lines along an axis are as long, together, as the picture."""

    # Of bytes, filters of a size are separable: fast. Each shape is across the line, along it.
    def shaped(across: int, along: int) -> tuple[int, int]:
        return (across, along) if axis else (along, across)

    ink = mask.astype(np.uint8)
    thin = ink - ndimage.grey_opening(ink, shaped(_THICKEST_RULING + 1, 1))
    # A line that is not quite level stays within three pixels for long enough; others cross it.
    thin = ndimage.maximum_filter(thin, shaped(3, _THICKEST_RULING + 1))
    lines = ndimage.grey_opening(thin, shaped(1, mask.shape[axis] // 6))
    return bool(lines.sum() >= 3 * mask.shape[axis])


def find_digits(light: Plane, dark_on_light: bool) -> list[Digit]:
    """Find the digits on a page.

    Args:
        light: brightness, 0 to 1.
        dark_on_light: which of the two the digits are.

    Returns:
        The digits from left to right; none where nothing looks like one.
    """
    ink = ink_of(light, dark_on_light)
    if min(ink.shape) >= _LEAST_RULED:
        ink = ndimage.gaussian_filter(ink, _SMOOTHING * max(ink.shape))
    paper, noise, level = _levels(ink)
    if level >= max(_LEAST_INK, _LEAST_NOISES * noise):
        darkest = level
        ink = without_rulings(ink, paper + _INK * level)
        paper, noise, level = _levels(ink)
        # Paler than the rulings: what is left of them.
        if level < _LEAST_LEFT * darkest:
            return []
    least = _LEAST_INK if dark_on_light else _LEAST_LIGHT
    if level < max(least, _LEAST_NOISES * noise):
        return []
    ink = ink - paper
    return _digits(ink, ink > _INK * level)


def _levels(ink: Plane) -> tuple[float, float, float]:
    """Return the ink of blank paper, what that varies by, and how far above it the darkest is."""
    blank = ink[ink <= max(otsu(ink), ink.min())]
    paper = float(np.median(blank))
    noise = 1.4826 * float(np.median(np.abs(blank - paper)))
    return paper, noise, float(np.percentile(ink, 99.9)) - paper


def _is_cut(contact: int, box: Box, shape: tuple[int, int]) -> bool:
    """Say whether a part touches the picture's edge otherwise than closely cropped digits do.

    Args:
        contact: how many of its pixels lie on the edge.
        box: where the part lies.
        shape: the picture's.
    """
    height, width = map(_length, box)
    if contact == 0 or height >= _FILLS * shape[0] or width >= _FILLS * shape[1]:
        return False
    is_end = contact <= _STROKE_END * max(height, width)
    return not (is_end and height >= _LEAST_CROPPED * shape[0])


def _is_sharp(ink: Plane, step: Plane, part: Mask) -> bool:
    """Say whether a part is a stroke: darker than shadows, or abrupt at its outline, or even.

    Args:
        ink: of the part's surroundings, as the others.
        step: how far the ink varies within two pixels of each.
        part: the part's pixels.
    """
    darkest = np.percentile(ink[part], 95)
    outline = part & ~ndimage.binary_erosion(part)
    return bool(
        darkest >= _DARKEST_SHADOW
        or np.median(step[outline]) >= _ABRUPT * darkest
        or (ink[part] > 0.75 * darkest).mean() >= _SHARP
    )


def _digits(ink: Plane, mask: Mask) -> list[Digit]:
    """Group the connected parts of a mask into digits."""
    labels, _ = ndimage.label(mask, _EIGHT)
    boxes = dict(enumerate(ndimage.find_objects(labels), 1))
    step = ndimage.maximum_filter(ink, 5) - ndimage.minimum_filter(ink, 5)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    contacts = np.bincount(edge, minlength=len(boxes) + 1)
    areas = {
        part: np.count_nonzero(labels[box] == part)
        for part, box in boxes.items()
        if not _is_cut(contacts[part], box, mask.shape)
        and _is_sharp(ink[box], step[box], labels[box] == part)
    }
    strokes = [part for part in areas if areas[part] >= _SPECK * max(areas.values())]
    groups = _grouped({part: boxes[part] for part in strokes})
    highest = max((_length(rows) for (rows, _), _ in groups), default=0)
    least = max(_LEAST_HEIGHT * highest, _LEAST_OF_PICTURE * max(ink.shape))
    digits = []
    for (rows, columns), parts in groups:
        if _length(rows) < least:
            continue
        # With the edges of the strokes, which are fainter.
        around = tuple(slice(max(s.start - 2, 0), s.stop + 2) for s in (rows, columns))
        own = np.isin(labels[around], parts)
        near = ndimage.binary_dilation(own, _EIGHT, iterations=2)
        full = np.percentile(ink[around][own], 95 if min(ink.shape) >= _LEAST_RULED else 100)
        cut = np.where(near, (ink[around] / full).clip(0, 1), 0)
        digits.append(Digit(cut, (columns.start, rows.start, columns.stop, rows.stop)))
    return digits


def _grouped(boxes: dict[int, Box]) -> list[tuple[Box, list[int]]]:
    """Merge parts that lie above each other, from left to right; return boxes and parts."""
    groups: list[tuple[Box, list[int]]] = []
    for part, box in sorted(boxes.items(), key=lambda item: item[1][1].start):
        for i, (other, parts) in enumerate(groups):
            if _belong_together(box, other):
                groups[i] = (_union(box, other), [*parts, part])
                break
        else:
            groups.append((box, [part]))
    return sorted(groups, key=lambda group: group[0][1].start)


def _belong_together(one: Box, other: Box) -> bool:
    """Say whether two boxes overlap in x by half the narrower and are near each other in y."""
    apart, beside = (
        max(a.start, b.start) - min(a.stop, b.stop) for a, b in zip(one, other, strict=True)
    )
    narrower = min(_length(one[1]), _length(other[1]))
    return -beside > _OVERLAP * narrower and apart < _NEAR * max(_length(one[0]), _length(other[0]))


def _union(one: Box, other: Box) -> Box:
    rows, columns = (
        slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True)
    )
    return rows, columns


def _length(span: slice) -> int:
    return int(span.stop - span.start)
