"""How good a model's predictions on a data set are, class by class."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_ext.app.data.datasets import Split, batches

# Images per batch. It affects speed and memory only.
_BATCH = 1000


@torch.inference_mode()
def logits_of(model: nn.Module, split: Split, mean: float, std: float) -> Tensor:
    """Return what a model says of every image.

    Args:
        model: maps float32 images [n, 1, 28, 28] to logits [n, classes].
        split: the images, on the device of the model.
        mean: see ``mnist_ext.app.data.datasets.normalize``.
        std: see ``mnist_ext.app.data.datasets.normalize``.

    Returns:
        Logits [N, classes], on the device of the model.
    """
    model.eval()
    return torch.cat([model(images) for images, _ in batches(split, _BATCH, mean, std)])


@dataclass(frozen=True, eq=False)
class Scores:
    """The predictions for a labelled set, counted.

    Attributes:
        logits: float [N, C]; the highest one of a row is the prediction.
        labels: int64 [N], the truth: 0 to C - 1.
    """

    logits: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @cached_property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits.double(), self.labels).item()

    @cached_property
    def predictions(self) -> Tensor:
        """The predicted classes, int64 [N]."""
        return self.logits.argmax(dim=1)

    @cached_property
    def confusion(self) -> Tensor:
        """The number of images of class i that were taken for class j, int64 [C, C]."""
        classes = self.logits.shape[1]
        pairs = self.labels * classes + self.predictions
        return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    @property
    def right(self) -> int:
        """The number of images that were taken for what they are."""
        return int(self.confusion.trace())

    @property
    def accuracy(self) -> float:
        """Correct predictions, in percent."""
        return 100 * self.right / len(self)

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy, in points of percent: sqrt(p (1 - p) / N).

        What chance in the choice of the N images makes of a model that is right with probability
        p; what chance makes of the training, in seeds, comes on top.
        """
        p = self.accuracy / 100
        return 100 * math.sqrt(p * (1 - p) / len(self))

    @property
    def support(self) -> list[int]:
        """The number of images of each class."""
        return self.confusion.sum(1).tolist()

    @property
    def precision(self) -> list[float | None]:
        """Of those taken for a class, those of it, in percent; None where there are none."""
        return _percent(self.confusion.diag(), self.confusion.sum(0))

    @property
    def recall(self) -> list[float | None]:
        """Of those of a class, those taken for it, in percent; None where there are none."""
        return _percent(self.confusion.diag(), self.confusion.sum(1))

    def mistakes(self, most: int) -> list["Mistake"]:
        """Return the wrong predictions, the most confident ones first, and no more than so many."""
        confidence, predictions = self.logits.double().softmax(dim=1).max(dim=1)
        confidence = confidence.where(predictions != self.labels, -1.0)
        order = confidence.argsort(descending=True, stable=True)[
            : min(most, len(self) - self.right)
        ]
        return [
            Mistake(i, int(self.labels[i]), int(predictions[i]), float(confidence[i]))
            for i in order.tolist()
        ]

    def summary(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """Return all figures as JSON values; accuracy, precision and recall in percent."""
        columns = (class_names, self.support, self.precision, self.recall)
        return {
            "images": len(self),
            "loss": self.loss if math.isfinite(self.loss) else None,
            "accuracy": self.accuracy,
            "accuracy_standard_error": self.standard_error,
            "classes": [
                dict(zip(("name", "images", "precision", "recall"), row, strict=True))
                for row in zip(*columns, strict=True)
            ],
            "confusion": self.confusion.tolist(),
        }


def short_names(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class names for use in tables: ``7`` where a name is ``7 - seven``."""
    return tuple(name.split(" - ")[0] for name in class_names)


def sure(probability: float) -> str:
    """Return a probability as text; only certainty is 100 %."""
    return "> 99.9 %" if 0.9995 <= probability < 1 else f"{100 * probability:.1f} %"


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction.

    Attributes:
        index: of the image in its set.
        label: what it is.
        prediction: what it was taken for.
        confidence: the probability that the model gave to its prediction.
    """

    index: int
    label: int
    prediction: int
    confidence: float


def _percent(part: Tensor, whole: Tensor) -> list[float | None]:
    pairs = zip(part.tolist(), whole.tolist(), strict=True)
    return [100 * p / w if w else None for p, w in pairs]
