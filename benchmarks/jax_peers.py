"""The same work in JAX, jit-compiled; nothing, and a notice, where JAX is not installed.

JAX chooses its number of threads itself: as many as there are CPUs. Arrays are shared with PyTorch
through dlpack where that needs no copy.
"""

from collections.abc import Callable

from torch import Tensor, nn

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

Implementations = dict[str, Callable[[], object]]


def notice() -> str:
    if jax is None:
        return "JAX is not installed and therefore absent: pip install jax"
    return f"JAX {jax.__version__}"


def array(tensor: Tensor):
    detached = tensor.detach()
    if detached.element_size() == 2:
        return jnp.asarray(detached.float().numpy()).astype(str(tensor.dtype).split(".")[1])
    return jnp.asarray(detached.numpy())


def linear(input: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Implementations:
    """Forward and backward of one layer; returns the gradients."""
    if jax is None:
        return {}
    arguments = [array(t) for t in (input, weight, bias)]
    grad_array = array(grad)

    @jax.jit
    def run(x, w, b, g):
        output, pullback = jax.vjp(lambda x, w, b: x @ w.T + b, x, w, b)
        return output, pullback(g)

    return {"jax": lambda: jax.block_until_ready(run(*arguments, grad_array))[1]}


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Implementations, Implementations]:
    """Forward; forward and backward, which returns the gradient."""
    if jax is None:
        return {}, {}
    x, t = array(logits), jnp.asarray(target.numpy())

    def loss(x, t):
        log_p = jax.nn.log_softmax(x)
        return -jnp.take_along_axis(log_p, t[:, None], 1).mean()

    forward, both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    return (
        {"jax": lambda: jax.block_until_ready(forward(x, t))},
        {"jax": lambda: jax.block_until_ready(both(x, t))[1]},
    )


class JaxLoop:
    """Training steps of a Sequential of Linear and ReLU, any number of them in one call."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, lr: float) -> None:
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.ReLU))]
        self.params = [(array(m.weight), array(m.bias)) for m in layers if isinstance(m, nn.Linear)]
        self.images = jnp.asarray(images.flatten(2).numpy())
        self.labels = jnp.asarray(labels.numpy())
        number = len(images)

        def loss_of(params, x, y):
            linears = iter(params)
            for layer in layers:
                if isinstance(layer, nn.ReLU):
                    x = jax.nn.relu(x)
                else:
                    weight, bias = next(linears)
                    x = x @ weight.T + bias
            return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1).mean()

        def step(params, index):
            x, y = self.images[index % number], self.labels[index % number]
            loss, grads = jax.value_and_grad(loss_of)(params, x, y)
            return jax.tree.map(lambda p, g: p - lr * g, params, grads), loss

        self.scan = jax.jit(lambda params, indices: jax.lax.scan(step, params, indices))

    def run(self, steps: int):
        self.params, losses = self.scan(self.params, jnp.arange(steps))
        return jax.block_until_ready(losses)


def training(model: nn.Module, images: Tensor, labels: Tensor, lr: float) -> dict[str, "JaxLoop"]:
    """Return the loop over [number, batch, 1, 28, 28] images."""
    return {} if jax is None else {"jax scan": JaxLoop(model, images, labels, lr)}
