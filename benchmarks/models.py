"""Training steps of whole models: as PyTorch runs them, and after `mnist_ext.nn.swap`.

    python benchmarks/models.py [MODEL ...] [--turns 15] [--csv FILE]

GPT as nanoGPT's for a CPU (4 blocks of 128 features) and larger (6 of 384), both on characters; the
latter also with a vocabulary of 8,192, where "head" calls `linear_cross_entropy` in place of the
last layer and its loss; an encoder as BERT's (4 of 256); classifiers. AdamW, float32, or bfloat16
by autocast. The losses of two steps are compared before the steps take turns. `ratio` says how many
times as long PyTorch's step takes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from provenance import describe, fields
from table import Table
from torch import Tensor, nn

import mnist_ext
from mnist_ext import functional
from mnist_ext.app.bench.timing import TURNS, take_turns


class Block(nn.Module):
    """Self-attention and an MLP, each beside the residual stream."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide = 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, width] to the same."""
        qkv = self.attention(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        attention = F.scaled_dot_product_attention(
            *qkv.permute(2, 0, 3, 1, 4), is_causal=self.causal
        )
        x = x + self.projection(attention.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    """Tokens [N, T] to logits [N * T, vocabulary]; the head's weight is the embedding's."""

    def __init__(
        self, vocabulary: int, length: int, blocks: int, width: int, heads: int, causal: bool
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        body = [Block(width, heads, causal) for _ in range(blocks)]
        self.blocks = nn.Sequential(*body, nn.LayerNorm(width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.head.weight, std=0.02)

    def features(self, tokens: Tensor) -> Tensor:
        """Return what the head multiplies: [N * T, width]."""
        return self.blocks(self.tokens(tokens) + self.positions.weight).flatten(0, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.features(tokens))


Sample = tuple[Tensor, Tensor]


def language(
    vocabulary: int, batch: int, length: int, blocks: int, width: int, heads: int, causal: bool
) -> tuple[nn.Module, Sample]:
    """Return such a model and a batch for it."""
    tokens, target = torch.randint(vocabulary, (2, batch, length))
    model = Transformer(vocabulary, length, blocks, width, heads, causal)
    return model, (tokens, target.flatten())


def classifier(batch: int, *widths: int) -> tuple[nn.Module, Sample]:
    """Return layers of those widths with ReLU between them, and a batch for them."""
    layers: list[nn.Module] = []
    for before, width in itertools.pairwise(widths):
        layers += [nn.Linear(before, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), (torch.randn(batch, widths[0]), labels(batch))


def convolutional(batch: int) -> tuple[nn.Module, Sample]:
    """Return PyTorch's example for MNIST, without dropout, and a batch for it."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    return model, (torch.randn(batch, 1, 28, 28), labels(batch))


def labels(batch: int) -> Tensor:
    return torch.randint(10, (batch,))


MODELS: dict[str, Callable[[], tuple[nn.Module, Sample]]] = {
    "GPT 4x128": lambda: language(65, 12, 64, 4, 128, 4, causal=True),
    "GPT 6x384": lambda: language(65, 4, 256, 6, 384, 12, causal=True),
    "GPT 6x384, 8192 tokens": lambda: language(8192, 4, 256, 6, 384, 12, causal=True),
    "BERT 4x256": lambda: language(1000, 8, 128, 4, 256, 4, causal=False),
    "512-256-10": lambda: classifier(128, 512, 256, 10),
    "784-1024-1024-10": lambda: classifier(256, 784, 1024, 1024, 10),
    "CNN 32-64-128-10": lambda: convolutional(64),
}


def step_of(
    model: nn.Module, criterion: nn.Module, sample: Sample, bfloat16: bool, head: bool
) -> Callable[[], Tensor]:
    """Return a function that makes a training step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs, target = sample

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
            if head:
                features = model.features(inputs)
                loss = functional.linear_cross_entropy(features, model.head.weight, target)
            else:
                loss = criterion(model(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    print(describe())
    columns = {"model": "<24", "dtype": "<9", "implementation": "<8", "ms": ">9.2f"}
    columns |= dict.fromkeys(("ratio", "ratio_p20", "ratio_p80"), ">9.3f")
    table = Table(columns, fields(), args.turns)
    table.header()
    for name in args.models or MODELS:
        for dtype in ("float32", "bfloat16"):
            torch.manual_seed(0)
            model, sample = MODELS[name]()
            steps = {}
            ways = ["torch", "swapped", "head"] if "tokens" in name else ["torch", "swapped"]
            for way in ways:
                own, criterion = copy.deepcopy(model), nn.CrossEntropyLoss()
                if way != "torch":
                    own, criterion = mnist_ext.nn.swap(own), mnist_ext.nn.swap(criterion)
                steps[way] = step_of(own, criterion, sample, dtype == "bfloat16", way == "head")
            # The second loss is that of a model which the first step has changed.
            losses = {way: torch.stack([step(), step()]).float() for way, step in steps.items()}
            tolerance = {"float32": 1e-4, "bfloat16": 3e-2}[dtype]
            for way in ways:
                torch.testing.assert_close(losses[way], losses["torch"], rtol=tolerance, atol=0)
            times = take_turns(steps, args.turns, seconds_per_turn=0.1)
            for way in ways:
                p20, ratio, p80 = times.ratio("torch", to=way)
                ratios = {"ratio": ratio, "ratio_p20": p20, "ratio_p80": p80}
                ms = times.percentiles(way)[1] * 1e3
                table.add(model=name, dtype=dtype, implementation=way, ms=ms, **ratios)
    if args.csv:
        table.write(args.csv)


if __name__ == "__main__":
    main()
