"""The model: a multilayer perceptron made of plain PyTorch modules."""

from collections.abc import Sequence

from torch import nn

from mnist_ext.app.training.settings import ACTIVATIONS


def mlp(
    hidden: Sequence[int] = (128, 64),
    activation: str = "none",
    in_features: int = 784,
    num_classes: int = 10,
) -> nn.Sequential:
    """Build a multilayer perceptron.

    Args:
        hidden: the width of each hidden layer.
        activation: what follows each hidden layer: ``none`` or ``relu``.
        in_features: values per input, 784 for an image of 28x28 pixels.
        num_classes: width of the output layer.

    Returns:
        A model from float32 [n, ...], flattened to [n, in_features], to logits [n, num_classes].

    Raises:
        ValueError: the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
    layers: list[nn.Module] = [nn.Flatten()]
    width = in_features
    for next_width in hidden:
        layers.append(nn.Linear(width, next_width))
        if activation == "relu":
            layers.append(nn.ReLU())
        width = next_width
    layers.append(nn.Linear(width, num_classes))
    return nn.Sequential(*layers)
