"""The same work in JAX, jit-compiled; nothing, and a notice, where JAX is not installed.

JAX chooses its number of threads itself: as many as there are CPUs. Arrays are shared with PyTorch
through dlpack where that needs no copy.
"""

from collections.abc import Callable

from torch import Tensor

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

Contestants = dict[str, Callable[[], object]]


def notice() -> str:
    if jax is None:
        return "JAX is not installed and therefore absent: pip install 'mnist-ext[bench]'"
    return f"JAX {jax.__version__}"


def array(tensor: Tensor):
    detached = tensor.detach()
    if detached.element_size() == 2:
        return jnp.asarray(detached.float().numpy()).astype(str(tensor.dtype).split(".")[1])
    return jnp.asarray(detached.numpy())


def linear(input: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Contestants:
    """Forward and backward of one layer."""
    if jax is None:
        return {}
    arguments = [array(t) for t in (input, weight, bias)]
    grad_array = array(grad)

    @jax.jit
    def run(x, w, b, g):
        output, pullback = jax.vjp(lambda x, w, b: x @ w.T + b, x, w, b)
        return output, pullback(g)

    return {"jax": lambda: jax.block_until_ready(run(*arguments, grad_array))}


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Contestants, Contestants]:
    """Forward; forward and backward."""
    if jax is None:
        return {}, {}
    x, t = array(logits), jnp.asarray(target.numpy())

    def loss(x, t):
        log_p = jax.nn.log_softmax(x)
        return -jnp.take_along_axis(log_p, t[:, None], 1).mean()

    forward, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    return (
        {"jax": lambda: jax.block_until_ready(forward(x, t))},
        {"jax": lambda: jax.block_until_ready(both(x, t))},
    )
