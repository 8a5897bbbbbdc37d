"""Whether the kernels compute on this CPU what PyTorch's ops do."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_ext import functional, instruction_sets


def kernels_right() -> dict[str, bool]:
    """Run a layer and a loss, forward and backward, on each instruction set of this CPU.

    Returns:
        For each instruction set whether its results agree with those of PyTorch's ops.
    """
    expected = _results(ours=False)
    verdicts = {}
    for isa in instruction_sets.in_turn():
        pairs = zip(_results(ours=True), expected, strict=True)
        verdicts[isa] = all(torch.allclose(*pair, rtol=1e-4, atol=1e-4) for pair in pairs)
    return verdicts


def _results(ours: bool) -> tuple[Tensor, ...]:
    """Return the outputs of a layer with ReLU, their loss, and the gradients."""
    generator = torch.Generator().manual_seed(0)
    input, weight, bias = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((160, 133), (140, 133), (140,))  # large enough for AMX
    )
    if ours:
        outputs = functional.linear(input, weight, bias, activation="relu")
        loss = functional.cross_entropy(outputs, torch.arange(160) % 140)
    else:
        outputs = F.linear(input, weight, bias).relu()
        loss = F.cross_entropy(outputs, torch.arange(160) % 140)
    return outputs, loss, *torch.autograd.grad(loss, (input, weight, bias))
