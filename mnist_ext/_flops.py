"""FLOPs of the ops for torch.utils.flop_counter: 2 for each multiply-add of a product, as its own.

Called on shapes, ``[..., K]`` for a tensor, as that module calls its formulas.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

_Shape = Sequence[int]


def _linear(input: _Shape, weight: _Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(input[:-1]) * math.prod(weight)


def _linear_backward(
    grad_output: _Shape, input: _Shape | None, weight: _Shape | None, *_: Any, **__: Any
) -> int:
    products = [2 * math.prod(grad_output) * t[-1] for t in (input, weight) if t is not None]
    return sum(products)


def _mlp(input: _Shape, weights: list[_Shape], *_: Any, **__: Any) -> int:
    return sum(_linear(input, weight) for weight in weights)


def _mlp_backward(grad_output: _Shape, input: _Shape, *args: Any, **_: Any) -> int:
    _, _, weights, _, _, need_input = args[:6]
    of_inputs = weights if need_input else weights[1:]
    return _mlp(input, weights) + _mlp(input, of_inputs)


def _train_steps(
    step: int,
    images: _Shape,
    labels: _Shape,
    order: _Shape | None,
    batch_size: int,
    lr: list[float],
    params: list[_Shape],
    *_: Any,
    **__: Any,
) -> int:
    weights = [shape for shape in params if len(shape) == 2]
    rows = [*(order or images[:1]), 0]
    return 2 * _mlp(rows, weights) + _mlp(rows, weights[1:])


_FORMULAS = {
    "linear": _linear,
    "linear_backward": _linear_backward,
    "mlp": _mlp,
    "mlp_backward": _mlp_backward,
    "train_steps": _train_steps,
}


def register() -> None:
    """Register the formulas, if anybody has imported torch.utils.flop_counter.

    That takes longer to import than all of ours. Asked wherever the ops get into a program anew: on
    import, by `nn.swap`, and when torch.compile asks for the shapes of an op.
    """
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None or not hasattr(flop_counter, "register_flop_formula"):
        return
    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.mnist_ext, name)
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op)(formula)
