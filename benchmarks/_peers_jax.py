"""LeNet in JAX, compiled: plain, and with Algorithm 1 (N = 1) by `jvp` and `vjp`."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _peers
import jax
import jax.numpy as jnp
import numpy as np

Weights = dict[str, jax.Array]


def lenet(weights: Weights, x: jax.Array) -> jax.Array:
    """`[B, 28, 28, 1]` to `[B, 10]`."""
    for layer, padding in (("conv1", "SAME"), ("conv2", "VALID")):
        dimensions = ("NHWC", "HWIO", "NHWC")
        kernel, bias = weights[f"{layer}_kernel"], weights[f"{layer}_bias"]
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=dimensions)
        x = jax.nn.relu(x + bias)
        n, height, width, channels = x.shape
        # The derivative of a reduce_window is slower on a CPU.
        x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ weights["dense1_kernel"] + weights["dense1_bias"])
    x = jax.nn.relu(x @ weights["dense2_kernel"] + weights["dense2_bias"])
    return x @ weights["logits_kernel"] + weights["logits_bias"]


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over the batch."""
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])


def unit(a: jax.Array) -> jax.Array:
    """Each example divided by its length."""
    lengths = jnp.sqrt(jnp.sum(a**2, axis=tuple(range(1, a.ndim)), keepdims=True))
    return a / lengths


def norms(weights: Weights, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits, and the estimate of sigma of every example."""

    def forward(x: jax.Array) -> jax.Array:
        return lenet(weights, x)

    logits, tangent = jax.jvp(forward, (x,), (unit(jax.random.normal(key, x.shape)),))
    u = jax.lax.stop_gradient(unit(tangent))
    (back,) = jax.vjp(forward, x)[1](u)
    return logits, jnp.sqrt(jnp.sum(back**2, axis=(1, 2, 3)))


def made(path: Path, batch: int, with_penalty: bool) -> _peers.Peer:
    """A peer, with or without the penalty."""
    arrays, images, labels = _peers.read(path, batch)
    x, y = jnp.asarray(images), jnp.asarray(labels)

    def objective(weights: Weights, key: jax.Array) -> jax.Array:
        if not with_penalty:
            return cross_entropy(lenet(weights, x), y)
        logits, sigma = norms(weights, x, key)
        return cross_entropy(logits, y) + _peers.FACTOR * jnp.mean(sigma)

    @jax.jit
    def update(state: Any) -> tuple[Any, jax.Array]:
        weights, velocity, key = state
        key, own = jax.random.split(key)
        loss, gradients = jax.value_and_grad(objective)(weights, own)
        velocity = jax.tree.map(
            lambda v, g: _peers.MOMENTUM * v - _peers.RATE * g, velocity, gradients
        )
        return (jax.tree.map(jnp.add, weights, velocity), velocity, key), loss

    weights = {name: jnp.asarray(array) for name, array in arrays.items()}
    held = [(weights, jax.tree.map(jnp.zeros_like, weights), jax.random.key(0))]

    def step() -> jax.Array:
        held[0], loss = update(held[0])
        return loss

    compiled = jax.jit(lambda key: norms(weights, x, key)[1])

    def estimate(draw: int) -> np.ndarray:
        return np.asarray(compiled(jax.random.key(draw)))

    return _peers.Peer(step, float, estimate if with_penalty else None)


MAKERS: dict[str, Callable[[Path, int], _peers.Peer]] = {
    "plain": lambda path, batch: made(path, batch, False),
    "algorithm_1": lambda path, batch: made(path, batch, True),
}


if __name__ == "__main__":
    _peers.serve(MAKERS, {"jax": importlib.metadata.version("jax")})
