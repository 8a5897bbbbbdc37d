"""A beginner's PyTorch tutorial on MNIST, with the operators of mnist_ext beside PyTorch's.

It walks from a batch of images to a trained network, and checks at every step that both sides
agree: each line shows the two numbers, their difference and whether it is small enough. The exit
code is 1 when any check fails.

    python examples/tutorial.py
"""

import argparse
import sys
from itertools import pairwise

import torch
import torch.nn.functional as theirs

import mnist_ext.functional as ours
import mnist_ext.nn
from mnist_ext.app import UserError
from mnist_ext.app.data import datasets
from mnist_ext.app.training.models import mlp

BATCH_SIZE = 64
LEARNING_RATE = 0.01


class Checks:
    """Prints each comparison as a line and counts those that fail."""

    def __init__(self) -> None:
        self.failed = 0

    def section(self, title: str) -> None:
        """Begin a section of the walk."""
        print(f"\n{title}\n{'':38} {'ours':>12} {'torch':>12} {'difference':>11}")

    def close(
        self, what: str, our: torch.Tensor, their: torch.Tensor, tolerance: float = 1e-5
    ) -> None:
        """Check that two tensors of one shape agree; print the first element of each."""
        our, their = our.detach(), their.detach()
        difference = (our - their).abs().max().item()
        passed = our.shape == their.shape and difference <= tolerance
        first_our, first_their = our.flatten()[0].item(), their.flatten()[0].item()
        self._print(what, f"{first_our:12.6f} {first_their:12.6f} {difference:11.1e}", passed)

    def true(self, what: str, passed: bool) -> None:
        """Check a statement."""
        self._print(what, f"{'':37}", passed)

    def _print(self, what: str, numbers: str, passed: bool) -> None:
        self.failed += not passed
        print(f"{what:38} {numbers}  {'ok' if passed else 'FAILED'}")


def tutorial(dataset: datasets.Dataset, epochs: int) -> int:
    """Walk through the tutorial and return the number of failed checks."""
    checks = Checks()
    print(f"{dataset.name}: {len(dataset.train):,} training images from {dataset.source}")

    # Two copies of one network: 784 -> 128 -> 64 -> 10. The first keeps PyTorch's layers, the
    # second has them swapped for ours. The same seed gives both the same initial weights.
    torch.manual_seed(0)
    their_model = mlp()
    torch.manual_seed(0)
    our_model = mnist_ext.nn.swap(mlp())
    their_criterion = torch.nn.CrossEntropyLoss()
    our_criterion = mnist_ext.nn.swap(torch.nn.CrossEntropyLoss())

    generator = torch.Generator().manual_seed(0)
    images, labels = next(
        datasets.batches(dataset.train, BATCH_SIZE, dataset.mean, dataset.std, generator)
    )

    checks.section(f"1. The first batch: {len(images)} images to {len(images)} x 10 logits")
    # A linear layer is y = x W^T + b. First one by hand, then the whole network.
    pixels = images.flatten(1)
    first_layer = their_model[1]
    checks.close(
        "output of the first layer",
        ours.linear(pixels, first_layer.weight, first_layer.bias),
        theirs.linear(pixels, first_layer.weight, first_layer.bias),
    )
    our_logits, their_logits = our_model(images), their_model(images)
    checks.close("logits of the network", our_logits, their_logits)

    checks.section("2. Two losses of that batch, before any training")
    # The textbook's first loss compares probabilities with one-hot labels:
    # 1/(2n) * sum((y - y_hat)^2). Classification uses the cross-entropy instead. An untrained
    # network gives each of ten classes about the probability 1/10, so it is near ln 10 = 2.303.
    one_hot = theirs.one_hot(labels, num_classes=10)
    checks.close(
        "mean squared error",
        half_mean_squared_error(our_logits.softmax(dim=1), one_hot),
        half_mean_squared_error(their_logits.softmax(dim=1), one_hot),
    )
    our_loss = ours.cross_entropy(our_logits, labels)
    their_loss = theirs.cross_entropy(their_logits, labels)
    checks.close("cross-entropy", our_loss, their_loss)
    checks.true("it is about 2.3", abs(our_loss.item() - 2.303) < 0.3)

    checks.section("3. Gradients: what autograd does")
    # The gradient of mean(x^2) is 2x/n. That is the whole of backward(): derivatives by the
    # chain rule.
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    x.square().mean().backward()
    checks.close("mean(x^2): autograd | by hand 2x/n", x.grad, 2 * x / len(x))
    # The same goes for the network: its parameters have no gradient until backward() is called.
    our_weight = next(our_model.parameters())
    their_weight = next(their_model.parameters())
    checks.true("no gradient before backward()", our_weight.grad is None)
    our_loss.backward()
    their_loss.backward()
    checks.true("a tensor after it", isinstance(our_weight.grad, torch.Tensor))
    for (name, our_parameter), their_parameter in zip(
        our_model.named_parameters(), their_model.parameters(), strict=True
    ):
        checks.close(f"gradient of {name}", our_parameter.grad, their_parameter.grad)

    checks.section("4. One step of gradient descent")
    # The optimizer moves every weight against its gradient: W - learning rate * gradient.
    by_hand = our_weight.detach() - LEARNING_RATE * our_weight.grad
    before = our_weight.detach().clone()
    our_optimizer = mnist_ext.optim.SGD(our_model.parameters(), lr=LEARNING_RATE)
    their_optimizer = torch.optim.SGD(their_model.parameters(), lr=LEARNING_RATE)
    checks.close("a weight before the step", our_weight, their_weight)
    our_optimizer.step()
    their_optimizer.step()
    checks.close("a weight after the step", our_weight, their_weight)
    checks.close("ours | by hand W - lr * gradient", our_weight, by_hand)
    checks.true("the step changed the weights", not torch.equal(before, our_weight))

    checks.section(f"5. Training: {epochs} epochs, batches of {BATCH_SIZE}, mean loss of each")
    our_losses, their_losses = [], []
    for epoch in range(1, epochs + 1):
        our_sum = their_sum = torch.zeros(())
        # Both networks see the same batches in the same order.
        for images, labels in datasets.batches(
            dataset.train, BATCH_SIZE, dataset.mean, dataset.std, generator
        ):
            # The five lines of every PyTorch training loop, with our operators ...
            our_optimizer.zero_grad()
            our_logits = our_model(images)
            our_loss = our_criterion(our_logits, labels)
            our_loss.backward()
            our_optimizer.step()
            # ... and with PyTorch's.
            their_optimizer.zero_grad()
            their_logits = their_model(images)
            their_loss = their_criterion(their_logits, labels)
            their_loss.backward()
            their_optimizer.step()

            our_sum = our_sum + our_loss.detach() * len(labels)
            their_sum = their_sum + their_loss.detach() * len(labels)
        our_losses.append(our_sum / len(dataset.train))
        their_losses.append(their_sum / len(dataset.train))
        # Rounding differs between the two, and every step builds on the one before.
        checks.close(f"epoch {epoch}", our_losses[-1], their_losses[-1], tolerance=1e-3)
    for name, losses in (("ours", our_losses), ("torch", their_losses)):
        falls = all(later < earlier for earlier, later in pairwise(losses))
        checks.true(f"the loss falls in every epoch ({name})", falls)

    checks.section("6. The trained network on images it has not seen: accuracy in percent")
    # One wrong image in ten thousand is 0.01 %; close calls may fall on either side.
    our_accuracy = accuracy(our_model, dataset)
    their_accuracy = accuracy(their_model, dataset)
    # On a small test set, a single image already weighs more than 0.2 %.
    tolerance = max(0.2, 100 / len(dataset.test))
    checks.close("test accuracy", our_accuracy, their_accuracy, tolerance)
    return checks.failed


def half_mean_squared_error(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return 1/(2n) * sum((target - predicted)^2) over the n rows of [n, classes]."""
    return (target - predicted).square().sum() / (2 * len(target))


@torch.inference_mode()
def accuracy(model: torch.nn.Module, dataset: datasets.Dataset) -> torch.Tensor:
    """Return the percentage of test images that the model classifies correctly."""
    correct = torch.zeros(())
    for images, labels in datasets.batches(dataset.test, 1000, dataset.mean, dataset.std):
        correct += (model(images).argmax(dim=1) == labels).sum()
    return 100 * correct / len(dataset.test)


def main() -> int:
    """Read the options, load the data and walk through the tutorial."""
    parser = argparse.ArgumentParser(
        description="A beginner's PyTorch tutorial with the operators of mnist_ext.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", choices=datasets.DATASETS, default="auto", help="the data set")
    parser.add_argument("--data-dir", help="folder that holds the data set")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of training")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error("argument --epochs: must be at least 1")

    try:
        dataset = datasets.load(args.dataset, args.data_dir)
    except UserError as error:
        print(f"tutorial: error: {error}", file=sys.stderr)
        return 2
    if dataset.notice:
        print(f"tutorial: note: {dataset.notice}", file=sys.stderr)
    failed = tutorial(dataset, args.epochs)
    print(f"\n{failed} checks failed" if failed else "\nall checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
