"""linear_cross_entropy where it is used: a language model with a tied head, and DDP."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mnist_ext
from mnist_ext import functional

pytestmark = pytest.mark.cpu_only("whole models; the op itself is tested on each device")

VOCABULARY, CONTEXT, WIDTH, HEADS = 30_000, 32, 32, 4


class Block(nn.Module):
    """Causal self-attention and an MLP, each beside the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        qkv = self.attention(self.before_attention(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attention.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """As nanoGPT's: the embedding's weight is the head's."""

    def __init__(self, loss) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.2)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block(), nn.LayerNorm(WIDTH))
        self.loss = loss

    def forward(self, tokens, target):
        x = self.blocks(self.tokens(tokens) + self.positions.weight)
        return self.loss(x.flatten(0, 1), self.tokens.weight, target.flatten())


def two_ops(x, weight, target):
    return F.cross_entropy(F.linear(x, weight), target)


def trained(loss, steps=4):
    """Return the losses of training steps, the first one's gradients and the parameters."""
    torch.manual_seed(0)
    model = GPT(loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, gradients = [], []
    for _ in range(steps):
        text = torch.randint(0, VOCABULARY, (8, CONTEXT + 1))  # 256 rows: several blocks
        loss_of_step = model(text[:, :-1], text[:, 1:])
        optimizer.zero_grad()
        loss_of_step.backward()
        gradients = gradients or [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        losses.append(loss_of_step.item())
    return losses, gradients, [p.detach() for p in model.parameters()]


def test_a_tied_gpt_trains_as_with_pytorchs_two_ops():
    ours, torchs = (trained(loss) for loss in (functional.linear_cross_entropy, two_ops))
    assert ours[0] == pytest.approx(torchs[0], rel=1e-5)
    for a, b in zip(ours[1], torchs[1], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    for a, b in zip(ours[2], torchs[2], strict=True):
        # Adam's first steps are of the size of lr whatever the gradient's: signs near 0 may differ.
        assert (a - b).norm() <= 1e-3 * b.norm()


DISTRIBUTED = """
import sys, torch, mnist_ext
from torch.nn.parallel import DistributedDataParallel
rank, folder = int(sys.argv[1]), sys.argv[2]
group = {"rank": rank, "world_size": 2, "init_method": f"file://{folder}/rendezvous"}
torch.distributed.init_process_group("gloo", **group)
torch.set_num_threads(1)
torch.manual_seed(0)
model = DistributedDataParallel(mnist_ext.nn.LinearCrossEntropyLoss(8, 20, bias=True))
input, target = torch.randn(64, 8), torch.randint(0, 20, (64,))
for _ in range(2):  # DDP rebuilds its buckets behind the first one
    model.zero_grad()
    model(input.chunk(2)[rank], target.chunk(2)[rank]).backward()
gradients = {name: p.grad for name, p in model.module.named_parameters()}
torch.save(gradients, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_average_the_gradients(tmp_path):
    command = [sys.executable, "-c", DISTRIBUTED]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    torch.manual_seed(0)
    model = mnist_ext.nn.LinearCrossEntropyLoss(8, 20, bias=True)
    input, target = torch.randn(64, 8), torch.randint(0, 20, (64,))
    model(input, target).backward()
    for rank in range(2):
        for name, gradient in torch.load(tmp_path / f"{rank}.pt").items():
            expected = model.get_parameter(name).grad
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
