"""The ten digits as a hand draws them: for each its strokes, of points from 0 to 1, y downwards."""

import math

Stroke = list[tuple[float, float]]


def _arc(x: float, y: float, across: float, up: float, start: float, end: float) -> Stroke:
    """Return part of an ellipse around (x, y); angles in degrees, 0 to the right, 90 downwards."""
    angles = [math.radians(start + (end - start) * i / 16) for i in range(17)]
    return [(x + across * math.cos(a), y + up * math.sin(a)) for a in angles]


DIGITS: dict[int, list[Stroke]] = {
    0: [_arc(0.5, 0.5, 0.2, 0.32, -90, 280)],
    1: [[(0.53, 0.18), (0.5, 0.5), (0.47, 0.82)]],
    2: [[*_arc(0.48, 0.34, 0.19, 0.16, -160, 40), (0.3, 0.8), (0.72, 0.8)]],
    3: [[*_arc(0.46, 0.34, 0.18, 0.15, -150, 90), *_arc(0.46, 0.65, 0.21, 0.17, -90, 150)]],
    4: [[(0.36, 0.2), (0.3, 0.52), (0.68, 0.52)], [(0.62, 0.22), (0.6, 0.84)]],
    5: [[(0.66, 0.2), (0.38, 0.2), (0.35, 0.46), *_arc(0.47, 0.62, 0.19, 0.18, -110, 140)]],
    6: [[(0.6, 0.18), (0.42, 0.38), *_arc(0.49, 0.66, 0.16, 0.16, 180, -180)]],
    7: [[(0.3, 0.22), (0.7, 0.22), (0.6, 0.45), (0.45, 0.84)]],
    8: [[*_arc(0.5, 0.35, 0.15, 0.15, 90, -270), *_arc(0.5, 0.66, 0.18, 0.16, -90, 270)]],
    9: [[*_arc(0.48, 0.36, 0.16, 0.16, 0, -350), (0.64, 0.36), (0.6, 0.6), (0.54, 0.84)]],
}
