"""Images a second that are distorted: our batches of torch ops against torchvision's transforms.

python benchmarks/augmentation.py [--images 2000] [--turns 5]

torchvision's v2 transforms draw one distortion for all images of a call, so that each image is a
call of its own here, as in a DataLoader; "of a batch" is a call for all of them, which is no
augmentation of each, and the least that they can take. On digits of the embedded data set, enlarged
to 28x28.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from provenance import describe
from torch import Tensor
from torchvision.transforms import v2

from mnist_ext.app.data import augment, datasets


def digits(count: int) -> Tensor:
    images = datasets.load("digits").train.images
    images = F.interpolate(images[:, None].float(), (28, 28), mode="bilinear")
    images = images.round().to(torch.uint8)
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    images = digits(args.images)
    split = datasets.Split(images.squeeze(1), torch.zeros(len(images), dtype=torch.int64))
    transform = v2.Compose(
        [
            v2.RandomAffine(degrees=10, translate=(0.05, 0.05), scale=(0.9, 1.1), shear=6),
            v2.ElasticTransform(alpha=34.0, sigma=4.0),
        ]
    )
    implementations: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: augment.augmented(split, 0).images,
        "torchvision": lambda: torch.cat([transform(image) for image in images.split(1)]),
        "torchvision, of a batch": lambda: transform(images),
    }
    print(describe())
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    for name, distort in implementations.items():
        got = distort().float()
        # The same ink but for the scale, elsewhere.
        assert abs(got.mean() / images.float().mean() - 1) < 0.3, name
        assert (got.view_as(images) - images.float()).abs().mean() > 5, name
    for _ in range(args.turns):
        for name, distort in implementations.items():
            started = time.perf_counter()
            distort()
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        ratios = [t / ours for t, ours in zip(times, seconds["ours"], strict=True)]
        print(
            f"{name:<24} {len(images) / statistics.median(times):10,.0f} images/s, "
            f"{statistics.median(ratios):.2f} times as long as ours "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
