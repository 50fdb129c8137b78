"""The reference of `second_derivatives.py`: the same networks on Keras' JAX backend.

    KERAS_BACKEND=jax JAX_ENABLE_X64=1 python benchmarks/_oracle_reference.py FOLDER [NAME ...]

This script runs where keras and jax are installed, without tfjacreg and TensorFlow. For every
network it writes an .npz file into FOLDER with the outputs `[B, *out]`; the singular values
`[B, k]` and the leading pair u `[B, *out]`, v `[B, *in]` of each example's dense Jacobian, computed
by `jax.jacrev` and NumPy's SVD; and the gradient of the mean of `<u, J v>` in every trainable
weight. With u and v held constant this is the gradient of the mean of sigma.

In training mode the Jacobian is the one of the inference pass with the statistics of a training
pass over the same weights and batch: these are constants in x, but functions of the weights,
through which the gradient flows.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _oracle_networks
import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras.src.backend.common import dtypes


def attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """The plain formula, `[B, T, heads, d]`: jax.nn's has its softmax in float32."""
    scale = options.get("scale")
    scores = jnp.einsum("btnh,bsnh->bnts", query, key)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    least = -0.7 * jnp.finfo(scores.dtype).max  # Finite: a row may be masked as a whole.
    if options.get("bias") is not None:
        scores = scores + options["bias"]
    if options.get("is_causal"):
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, least)
    if options.get("mask") is not None:
        scores = jnp.where(options["mask"], scores, least)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)


def held(network: keras.Model, training: bool) -> Callable[..., Any]:
    """The function `(weights, x of the batch, x of the Jacobian) -> outputs`; see the module."""
    others = [v.value for v in network.non_trainable_variables]

    def inference(weights: Any, batch: Any, x: Any) -> Any:
        state = others
        if training:
            _, state = network.stateless_call(weights, others, batch, training=True)
        return network.stateless_call(weights, state, x, training=False)[0]

    return inference


def reference(name: str) -> dict[str, np.ndarray]:
    """What the module says, of one network."""
    network = _oracle_networks.build(name)
    x = jnp.asarray(_oracle_networks.inputs(name, network))
    for layer in network._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # What a pass writes is what it took.
    function = held(network, _oracle_networks.NETWORKS[name].training)
    weights = [v.value for v in network.trainable_variables]

    @jax.jit
    def outputs_and_jacobians(weights: Any) -> Any:
        def single(point: Any) -> Any:
            return function(weights, x, point[None])[0]

        return function(weights, x, x), jax.vmap(jax.jacrev(single))(x)

    outputs, dense = map(np.asarray, outputs_and_jacobians(weights))
    size = int(np.prod(outputs.shape[1:]))
    left, sigma, right = np.linalg.svd(dense.reshape(len(x), size, -1), full_matrices=False)
    u = left[:, :, 0].reshape(outputs.shape)
    v = right[:, 0].reshape(x.shape)

    def penalty(weights: Any) -> Any:
        _, pull_back = jax.vjp(lambda x_: function(weights, x, x_), x)
        return jnp.sum(pull_back(jnp.asarray(u))[0] * v) / len(x)

    gradient = jax.jit(jax.grad(penalty))
    gradients = gradient(weights)
    rounded = "f32[" in str(gradient.trace(weights).jaxpr)
    found = {"outputs": outputs, "sigma": sigma, "u": u, "v": v, "rounded": np.array(rounded)}
    found["digest"] = np.array(_oracle_networks.digest(network, np.asarray(x)))
    return found | {f"gradient_{n}": np.asarray(g) for n, g in enumerate(gradients)}


def main(folder: str, *names: str) -> None:
    """Writes what is not there yet."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    # Keras' type promotion on JAX makes float32 of float64, in tanh and in much else.
    dtypes.BIT64_TO_BIT32_DTYPE.update(float64="float64", complex128="complex128")
    jax.nn.dot_product_attention = attention
    versions = {"keras": keras.__version__, "jax": jax.__version__, "numpy": np.__version__}
    np.savez(Path(folder) / "versions.npz", **versions)
    for name in names or _oracle_networks.NETWORKS:
        path = Path(folder) / _oracle_networks.file_name(name)
        if path.exists():
            continue
        start = time.perf_counter()
        try:
            found = reference(name)
        except Exception as error:  # Whatever JAX or Keras cannot do is part of the result.
            print(f"{name}: {type(error).__name__}: {error}"[:300], flush=True)
            found = {"error": np.array(f"{type(error).__name__}: {error}"[:300])}
        np.savez(path, **found)  # type: ignore[arg-type]
        print(f"{name} {time.perf_counter() - start:.1f} s", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main(*sys.argv[1:])
