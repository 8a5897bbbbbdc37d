"""Data augmentation: randomly distorted copies of the images to train on."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_ext.app.data.datasets import Split

# Largest rotation in degrees, scaling and shear as shares of 1, translation in pixels.
_ROTATION, _SCALING, _SHEAR, _TRANSLATION = 10.0, 0.1, 0.1, 1.5
# Displacements of a grid of so many points a side over the image: standard deviation in pixels. On
# images held out (one seed, 30 epochs) 4 and 1.0 gave 99.27 %, 4 and 1.4 99.17, 6 and 1.0 99.14.
_GRID, _DISPLACEMENT = 4, 1.0
# Images that are transformed together: the floats of all would be hundreds of megabytes.
_BATCH = 500


def augmented(split: Split, seed: int) -> Split:
    """Return a copy with each image transformed at random: affinely and elastically.

    Rotation, scaling, shear and translation; and smooth fields of displacements after P. Simard,
    D. Steinkraus and J. Platt, "Best practices for convolutional neural networks applied to visual
    document analysis", 2003: here a grid of normally distributed ones, interpolated bicubically.

    Args:
        split: images, on any device; what lies beyond their edges counts as 0.
        seed: determines the copy, on every device, up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [_augmented(images, generator) for images in split.images.split(_BATCH)]
    return Split(torch.cat(parts), split.labels)


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    count, height, width = images.shape

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    angle = math.radians(_ROTATION) * uniform(count)
    scale = 1 + _SCALING * uniform(count, 2)
    shear = _SHEAR * uniform(count)
    # affine_grid counts from -1 to 1 across an image.
    shift = 2 * _TRANSLATION * uniform(count, 2) / torch.tensor([width, height])
    cosine, sine = angle.cos(), angle.sin()
    rows = [
        torch.stack([cosine * scale[:, 0], (shear - sine) * scale[:, 1], shift[:, 0]], 1),
        torch.stack([sine * scale[:, 0], cosine * scale[:, 1], shift[:, 1]], 1),
    ]
    maps = torch.stack(rows, 1).to(images.device)
    coarse = torch.randn(count, 2, _GRID, _GRID, generator=generator)
    coarse *= 2 * _DISPLACEMENT / torch.tensor([width, height])[:, None, None]
    field = F.interpolate(
        coarse.to(images.device), (height, width), mode="bicubic", align_corners=False
    )
    places = F.affine_grid(maps, [count, 1, height, width], align_corners=False)
    places += field.permute(0, 2, 3, 1)
    moved = F.grid_sample(images[:, None].float(), places, align_corners=False)
    return moved.round_().to(torch.uint8).squeeze(1)
