"""Distorted copies of images: what they may differ by."""

import pytest
import torch

from mnist_ext.app.data import augment
from mnist_ext.app.data.augment import augmented
from mnist_ext.app.data.datasets import Split, load

# Each part of a distortion, by the constant that turns it off where it is 0.
PARTS = ("_ROTATION", "_SCALING", "_SHEAR", "_TRANSLATION", "_DISPLACEMENT")


def only(monkeypatch, *parts):
    for part in set(PARTS) - set(parts):
        monkeypatch.setattr(augment, part, 0.0)


def a_cross(count: int) -> Split:
    """Return images of two wide strokes that cross in the middle."""
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    images[:, 12:16, 6:22] = images[:, 6:22, 12:16] = 255
    return Split(images, torch.zeros(count, dtype=torch.int64))


def moments(images):
    """Return mass, mean x, mean y, and variances of x, y and their covariance, of each image."""
    mass = images.double() / images.double().sum((1, 2), keepdim=True)
    at = torch.arange(28.0, dtype=torch.float64) - 13.5
    x, y = (mass.sum(1) * at).sum(1), (mass.sum(2) * at).sum(1)
    dx, dy = at - x[:, None], at - y[:, None]
    xx, yy = (mass.sum(1) * dx**2).sum(1), (mass.sum(2) * dy**2).sum(1)
    xy = torch.einsum("nyx,ny,nx->n", mass, dy, dx)
    return images.double().sum((1, 2)), x, y, xx, yy, xy


def test_nothing_is_changed_without_distortions(monkeypatch):
    only(monkeypatch)
    train = load("digits").train
    copy = augmented(train, 0)
    assert torch.equal(copy.images, train.images)
    assert copy.labels is train.labels


def test_a_seed_determines_the_copy():
    train = load("digits").train
    copy = augmented(train, 3)
    assert copy.images.dtype == torch.uint8
    assert copy.images.shape == train.images.shape
    assert torch.equal(copy.images, augmented(train, 3).images)
    assert not torch.equal(copy.images, augmented(train, 4).images)
    batch = augment._BATCH  # the same image at the same place of two batches
    assert not torch.equal(*(augmented(a_cross(2 * batch), 0).images.split(batch)))


@pytest.mark.parametrize("part", PARTS)
def test_how_far(monkeypatch, part):
    """Each part moves, scales or turns as far as it says in both directions, and no farther."""
    only(monkeypatch, part)
    images = a_cross(2000).images
    mass, x, y, xx, yy, xy = moments(augmented(Split(images, torch.zeros(2000)), 0).images)
    *_, plain, _, _ = moments(images)
    plain, mass = plain[0].item(), mass / images[0].sum()
    if part == "_TRANSLATION":
        for place in (x, y):
            assert -1.51 < place.min() < -1.4
            assert 1.4 < place.max() < 1.51
    elif part == "_SCALING":  # 10 % to each side
        for variance in (xx, yy):
            assert 1.1**-2 * 0.97 < (variance / plain).min() < 0.87
            assert 1.18 < (variance / plain).max() < 0.9**-2 * 1.03
    elif part == "_SHEAR":  # x gains a tenth of y
        assert xy.abs().max().item() == pytest.approx(0.1 * plain, rel=0.1)
        assert xy.min() < 0 < xy.max()
    elif part == "_ROTATION":  # of a bar: no second moment of a cross changes
        images[:, 6:12] = images[:, 16:] = 0
        *_, wide, high, _ = moments(images[:1])
        *_, xy = moments(augmented(Split(images, torch.zeros(2000)), 0).images)
        ten_degrees = 0.171 * (wide - high).item()  # sine times cosine
        assert xy.abs().max().item() == pytest.approx(ten_degrees, rel=0.05)
        assert xy.min() < 0 < xy.max()
    else:
        assert mass.std() > 0.02
        assert 0.3 < x.std() < 1.0
