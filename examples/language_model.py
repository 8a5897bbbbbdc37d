"""Train a small language model on a text, with its logits in memory and without.

    python examples/language_model.py [TEXT] [--steps 100] [--batch 4096] [--features 64]

The model guesses the next two characters from the sixteen before them: tokens are the pairs of
characters that the text has, some thousands, and the layer that guesses shares its weight with the
embedding. TEXT is a file; without one it is the documentation of this project. Each way trains the
same model in a process of its own, so that the peak of its memory can be told.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from mnist_ext import functional

CONTEXT = 8  # tokens


class LanguageModel(nn.Module):
    """Everything but the head, which is the weight of the embedding."""

    def __init__(self, tokens: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, features)
        nn.init.normal_(self.embedding.weight, std=features**-0.5)
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(CONTEXT * features, 4 * features),
            nn.ReLU(),
            nn.Linear(4 * features, features),
        )

    def forward(self, context: Tensor) -> Tensor:
        """Map tokens [N, CONTEXT] to features [N, features], which the head multiplies."""
        return self.body(self.embedding(context))


def logits_in_memory(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute the loss as PyTorch's two functions do."""
    return F.cross_entropy(F.linear(features, weight), target)


WAYS = {
    "F.linear + F.cross_entropy": logits_in_memory,
    "mnist_ext linear_cross_entropy": functional.linear_cross_entropy,
}


@dataclass
class Result:
    """What one way came to."""

    first_loss: float
    last_loss: float
    seconds: float  # of a step, the median
    mib: float  # by which the peak of memory grew in training


def peak_mib() -> float:
    """Return the most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def train(way: str, tokens: Tensor, args: argparse.Namespace) -> Result:
    """Train a model whose loss is computed in that way."""
    torch.manual_seed(0)
    model = LanguageModel(int(tokens.max()) + 1, args.features)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, seconds, before = [], [], peak_mib()
    for _ in trange(args.steps, desc=way, unit="step"):
        start = time.perf_counter()
        first = torch.randint(len(tokens) - CONTEXT, (args.batch, 1))
        context, target = tokens[first + torch.arange(CONTEXT)], tokens[first[:, 0] + CONTEXT]
        loss = WAYS[way](model(context), model.embedding.weight, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return Result(losses[0], losses[-1], sorted(seconds)[len(seconds) // 2], peak_mib() - before)


def tokens_of(text: str) -> Tensor:
    """Return for each pair of characters its number among those that text has."""
    pairs = [text[i : i + 2] for i in range(0, len(text) - 1, 2)]
    number = {pair: i for i, pair in enumerate(sorted(set(pairs)))}
    return torch.tensor([number[pair] for pair in pairs])


def main() -> None:
    """Train both ways and print what they take."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", type=Path, help="a file; else this project's own pages")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4096, help="tokens to guess in a step")
    parser.add_argument("--features", type=int, default=64)
    args = parser.parse_args()
    project = Path(__file__).parents[1]
    files = [args.text] if args.text else [*project.glob("*.md"), *project.glob("docs/*.md")]
    tokens = tokens_of("\n".join(file.read_text(encoding="utf-8") for file in files))
    if len(tokens) <= CONTEXT:
        parser.error(f"text: expected more than {2 * CONTEXT + 1} characters in {args.text}")
    print(f"{len(tokens)} pairs of characters, {int(tokens.max()) + 1} different ones")
    # A process for each: the peak of memory never goes down again.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for way in WAYS:
            result = pool.apply(train, (way, tokens, args))
            print(
                f"{way:<32} loss {result.first_loss:.3f} to {result.last_loss:.3f}, "
                f"{result.seconds * 1e3:.0f} ms a step, {result.mib:.0f} MiB"
            )


if __name__ == "__main__":
    main()
