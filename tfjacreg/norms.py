"""Norms of the per-example Jacobian. The estimators know only `matvec` and `rmatvec`.

Each method of `left_vector` looks for the unit `u` that maximizes `||J^T u||`, with no gradient
attached. `spectral_norm` turns it into a certified triplet, and the penalty (`regularizers`) into
the differentiable `||J^T u||` with one more product.
"""

from __future__ import annotations

import numbers
import random
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np
import tensorflow as tf

from tfjacreg.jacobian import JacobianOperator
from tfjacreg.linear_maps import chain

METHODS = ("power", "lanczos", "exact")


class Operator(Protocol):
    """What a norm needs to know of a batch of linear maps."""

    @property
    def x(self) -> tf.Tensor:
        """A tensor of the shape of the maps' inputs, `[B, *in]`."""

    @property
    def primal(self) -> tf.Tensor:
        """A tensor of the shape of the maps' outputs, `[B, *out]`."""

    def matvec(self, v: tf.Tensor) -> tf.Tensor:
        """Returns `J v`."""

    def rmatvec(self, u: tf.Tensor) -> tf.Tensor:
        """Returns `J^T u`."""


class SingularTriplet(NamedTuple):
    """The leading singular triplet of every example's Jacobian, and how far it is from exact.

    Attributes:
        sigma: `[B]`, the norm `||J||_2`, from below: `sigma = ||J v|| <= ||J||_2`.
        u: `[B, *out]`, left singular vector, of norm 1; `J v = sigma u` by construction.
        v: `[B, *in]`, right singular vector, of norm 1.
        residual: `[B]`, `||J^T u - sigma v||`. Some singular value of J lies within `residual` of
            `sigma`; it is the largest unless the start was almost orthogonal to its vector.
    """

    sigma: tf.Tensor
    u: tf.Tensor
    v: tf.Tensor
    residual: tf.Tensor


def spectral_norm(
    network: keras.Layer,
    x: Any,
    *,
    method: str = "lanczos",
    iterations: int = 4,
    seed: int | None = 0,
    forward_mode: str = "accumulator",
) -> SingularTriplet:
    """Measures `||df/dx||_2` (eq. 3) at every example, in inference mode.

    `"power"` is Algorithm 1 with N = `iterations`, `"lanczos"` a Golub-Kahan bidiagonalization with
    as many steps from the same start: 2 N products each. `"exact"` needs no start and no
    iterations: it forms the Gram matrix on the smaller side from min(n_out, n_in) products, so it
    is for networks with few outputs (or inputs). Two more products then make the triplet and its
    residual (three with `"exact"`).

    Args:
        network: A network from `[B, *in]` to `[B, *out]`.
        x: Inputs `[B, *in]`.
        method: `"power"`, `"lanczos"` or `"exact"`.
        iterations: The N of Algorithm 1, or the steps of Lanczos; not used by `"exact"`.
        seed: Seed of the random starts, uniform on the unit sphere for each example; None draws a
            new one.
        forward_mode: How J v is computed; see `JacobianOperator`.

    Returns:
        A `SingularTriplet`. Where J = 0, sigma and the residual are 0 and u, v are arbitrary. Where
        J is not finite, or its square is not (||J|| > 1e19 in float32), sigma is NaN or infinite.

    Raises:
        TypeError: If `network` is not a Keras layer, or `x` is not one floating tensor.
        ValueError: If an argument is out of range, or `x` is empty.
    """
    validate_method(method, iterations)
    op = JacobianOperator(network, x, forward_mode=forward_mode)
    start = random_unit(op.x, (fresh_seed(seed), 0))
    _, w = leading_pair(op, method, iterations, start)
    return _triplet(op, unit(w))


def frobenius_norm(
    network: keras.Layer,
    x: Any,
    *,
    num_projections: int | None = None,
    seed: int | None = None,
) -> tf.Tensor:
    """Measures `||df/dx||_F` at every example, in inference mode.

    Args:
        network: A network from `[B, *in]` to `[B, *out]`.
        x: Inputs `[B, *in]`.
        num_projections: How many random projections to average (the `n_proj` of eq. 2; the square
            of the result is then unbiased); None computes the norm exactly, with n_out products.
        seed: Seed of the projections; None draws a new one.

    Returns:
        `[B]`.

    Raises:
        TypeError: If `network` is not a Keras layer, or `x` is not one floating tensor.
        ValueError: If `num_projections` is not a positive integer or None, or `x` is empty.
    """
    op = JacobianOperator(network, x)
    if num_projections is None:
        rows = _products_with_basis(op.rmatvec, op.primal, op.x.dtype)
        return tf.sqrt(tf.reduce_sum(tf.square(rows), axis=(1, 2)))
    validate_positive("num_projections", num_projections)
    return tf.sqrt(squared_frobenius_sample(op, num_projections, (fresh_seed(seed), 0)))


def squared_frobenius_sample(op: Operator, num_projections: int, key: Any) -> tf.Tensor:
    """The unbiased estimate of `||J||_F^2` inside eq. (2), differentiable, `[B]`.

    Args:
        op: The Jacobians.
        num_projections: How many `v` to draw on the sphere in output space (`n_proj`).
        key: Seed of the sequence of draws, and which draw of it this is (two integers).
    """
    like = tf.cast(op.primal, op.x.dtype)
    seed, draw = key
    projections = [
        _squared_length(op.rmatvec(random_unit(like, (seed, draw * num_projections + j))))
        for j in range(num_projections)
    ]
    n_out = tf.cast(tf.shape(_flat(like))[1], like.dtype)
    return n_out * tf.add_n(projections) / num_projections


def spectral_bound(network: keras.Layer, *, iterations: int = 50) -> float:
    """The product of the layers' norms, `prod_l ||W^l||_2` (Section 2.1), in inference mode.

    It bounds `||df/dx||_2` at every x if the activations have slope at most 1 (ReLU, tanh, sigmoid,
    ...), the pooling windows do not overlap, and no other layer without weights stretches its input
    (as upsampling does). Each convolution's norm is that of the linear map it is, with its stride
    and padding at its input's size; BatchNorm counts with its inference scale, Normalization and
    Rescaling with theirs, and a layer that runs twice counts twice. Each factor comes from Lanczos
    and approaches the layer's norm from below.

    Args:
        network: A built chain of layers (a `Sequential`, or a functional model without branches).
        iterations: Lanczos steps for each layer.

    Returns:
        The bound.

    Raises:
        ValueError: If the network is not a chain of Keras layers, or holds a layer with weights
            whose linear map is not known: the message names it.
    """
    validate_positive("iterations", iterations)
    bound = 1.0
    for linear_map in chain(network):
        start = random_unit(linear_map.x, (0, 0))
        _, w = leading_pair(linear_map, "lanczos", iterations, start)
        bound *= float(length(w)[0])
    return bound


def left_vector(op: Operator, method: str, iterations: int, start: tf.Tensor) -> tf.Tensor:
    """An estimate of the leading left singular vector of every map, `[B, *out]`.

    Args:
        op: The maps.
        method: One of `METHODS`.
        iterations: The N of Algorithm 1, or the steps of Lanczos.
        start: Unit vectors `[B, *in]`.

    Returns:
        Unit vectors, with no gradient; zero where J = 0.
    """
    if method == "power":
        u = _power_iteration(op, iterations, start)
    elif method == "lanczos":
        u, _ = _lanczos(op, iterations, start, complete=False)
    else:
        u = _exact(op)
    return tf.stop_gradient(u)


def leading_pair(
    op: Operator, method: str, iterations: int, start: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds u as `left_vector` does, and `J^T u`, without gradient.

    The products are 2 N in all, as in training. But here Lanczos, whose recurrence holds `J^T u` of
    every u in its space, chooses u with the last of them: its `||J^T u||` is the largest there is
    in that space.

    Args:
        op: The maps.
        method: One of `METHODS`.
        iterations: The N of Algorithm 1, or the steps of Lanczos.
        start: Unit vectors `[B, *in]`.

    Returns:
        Unit vectors u, zero where J = 0, and `J^T u`.
    """
    if method == "lanczos":
        u, w = _lanczos(op, iterations, start, complete=True)
    else:
        u = left_vector(op, method, iterations, start)
        w = op.rmatvec(u)
    return tf.stop_gradient(u), tf.stop_gradient(w)


def _power_iteration(op: Operator, iterations: int, v: tf.Tensor) -> tf.Tensor:
    """Algorithm 1 up to its last backward mode, which gives sigma and the next v."""
    u = unit(op.matvec(v))
    for _ in range(iterations - 1):
        v = unit(op.rmatvec(u))
        u = unit(op.matvec(v))
    return u


def _lanczos(
    op: Operator, steps: int, v: tf.Tensor, *, complete: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Golub-Kahan bidiagonalization with full reorthogonalization: the leading u, and J^T u.

    After k steps `J V_k = U_k B_k` and `J^T U_k = V_{k+1} [B_k, beta_k e_k]^T`, with B upper
    bidiagonal. The best u in the span of U_k is `U_k p`, with p the leading left singular vector of
    `[B_k, beta_k e_k]`, or of `B_k` while the last product `J^T u_k` has not been made: in training
    that product is the penalty itself, and what is returned for `J^T u` lacks its part.
    """
    steps = min(steps, _size(op.x), _size(op.primal) if complete else steps)
    vs: list[tf.Tensor] = [v]
    us: list[tf.Tensor] = []
    alphas: list[tf.Tensor] = []
    betas: list[tf.Tensor] = []
    for k in range(steps):
        alpha, u = _next_direction(op.matvec(vs[-1]), us, alphas + betas)
        us.append(u)
        alphas.append(alpha)
        if k + 1 < steps or complete:
            beta, v = _next_direction(op.rmatvec(u), vs, alphas + betas)
            vs.append(v)
            betas.append(beta)
        else:
            betas.append(tf.zeros_like(alpha))
    # B B^T is tridiagonal: alpha_k^2 + beta_k^2 on the diagonal, beta_k alpha_{k+1} beside it.
    alpha_k, beta_k = tf.stack(alphas, -1), tf.stack(betas, -1)
    beside = beta_k[:, :-1] * alpha_k[:, 1:]
    gram = tf.linalg.diag(tf.square(alpha_k) + tf.square(beta_k))
    gram += tf.linalg.diag(beside, k=1) + tf.linalg.diag(beside, k=-1)
    p = _leading_eigenvector(gram)
    q = tf.pad(alpha_k * p, [[0, 0], [0, 1]]) + tf.pad(beta_k * p, [[0, 0], [1, 0]])
    return unit(_combination(p, us)), _combination(q[:, : len(vs)], vs)


def _combination(coefficients: tf.Tensor, vectors: list[tf.Tensor]) -> tf.Tensor:
    """The sum of `[B, k]` coefficients times k vectors `[B, ...]`."""
    basis = tf.stack([_flat(vector) for vector in vectors], axis=1)
    return tf.reshape(tf.einsum("bk,bkn->bn", coefficients, basis), tf.shape(vectors[0]))


def _next_direction(
    a: tf.Tensor, basis: list[tf.Tensor], scales: list[tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Orthogonalizes `a` against `basis`; returns the length that is left and the unit vector.

    What is left at the level of rounding means that the Krylov space is complete: then both are 0.
    """
    largest = tf.reduce_max(tf.stack([length(a), *scales]), axis=0)
    for _ in range(2):  # Twice is enough (Kahan, Parlett).
        for b in basis:
            a -= _per_example(inner(a, b), a) * b
    left = length(a)
    rounding = 16 * np.finfo(a.dtype.as_numpy_dtype).eps
    # Not `>`: a length that is infinite must stay so.
    left = tf.where(left >= rounding * largest, left, tf.zeros_like(left))
    return left, a * _per_example(tf.math.divide_no_nan(tf.ones_like(left), left), a)


def _exact(op: Operator) -> tf.Tensor:
    """The left vector from the eigenvectors of the Gram matrix on the smaller side."""
    if _size(op.primal) <= _size(op.x):
        rows = _products_with_basis(op.rmatvec, op.primal, op.x.dtype)
        gram = tf.matmul(rows, rows, transpose_b=True)
        u = _leading_eigenvector(gram)
        u *= tf.cast(tf.reduce_any(rows != 0, axis=(1, 2)), u.dtype)[:, None]
        return tf.reshape(u, tf.shape(op.primal))
    columns = _products_with_basis(op.matvec, op.x, op.x.dtype)
    gram = tf.matmul(columns, columns, transpose_b=True)
    v = _leading_eigenvector(gram)
    return unit(tf.reshape(tf.einsum("bk,bkn->bn", v, columns), tf.shape(op.primal)))


def _leading_eigenvector(gram: tf.Tensor) -> tf.Tensor:
    """`[B, n, n]` to `[B, n]`; NaN where the matrix is not finite: `eigh` would fail for all."""
    is_finite = tf.reduce_all(tf.math.is_finite(gram), axis=(1, 2))
    finite = tf.where(is_finite[:, None, None], gram, tf.zeros_like(gram))
    return tf.where(is_finite[:, None], tf.linalg.eigh(finite)[1][:, :, -1], np.nan)


def _products_with_basis(
    product: Callable[[tf.Tensor], tf.Tensor], like: tf.Tensor, dtype: tf.DType
) -> tf.Tensor:
    """The products with every unit vector of the space of `like`, `[B, n, m]`."""
    n = _size(like)
    products = []
    for k in range(n):
        basis_vector = tf.broadcast_to(tf.one_hot(k, n, dtype=dtype), tf.shape(_flat(like)))
        products.append(_flat(product(tf.reshape(basis_vector, tf.shape(like)))))
    return tf.stack(products, axis=1)


def _triplet(op: Operator, v: tf.Tensor) -> SingularTriplet:
    z = op.matvec(v)
    sigma, u = length(z), unit(z)
    residual = length(op.rmatvec(u) - _per_example(sigma, v) * v)
    is_zero = sigma == 0
    return SingularTriplet(
        sigma, _anything_where(is_zero, u), _anything_where(is_zero, v), residual
    )


def _anything_where(condition: tf.Tensor, a: tf.Tensor) -> tf.Tensor:
    """Where the map is 0, any unit vector is singular: take the constant one."""
    return tf.where(_per_example(condition, a), unit(tf.ones_like(a)), a)


def random_unit(like: tf.Tensor, key: Any) -> tf.Tensor:
    """Vectors uniform on the unit sphere, one for each example of `like`, `[B, ...]`.

    The draw depends only on `key` and the shape, so that training goes on from a saved counter; XLA
    draws other numbers from the same key than eager and graph execution do.

    Args:
        like: Gives shape and dtype.
        key: Seed of the sequence of draws, and which draw of it this is (two integers).
    """
    key = tf.stack([tf.cast(part, tf.int64) for part in key])
    # By name: the generator that XLA would choose is thirty times slower on a CPU.
    normal = tf.random.stateless_normal(tf.shape(like), key, dtype=like.dtype, alg="philox")
    return unit(normal)


def fresh_seed(seed: int | None) -> int:
    """Returns `seed`, or a new random one for None.

    Raises:
        ValueError: If `seed` is neither None nor a non-negative integer.
    """
    validate_seed(seed)
    # Python's generator, so that keras.utils.set_random_seed makes the whole run repeatable.
    return random.randrange(2**31) if seed is None else seed


def validate_seed(seed: int | None) -> int | None:
    """Returns a seed that is None or a non-negative integer, NumPy's too, as Python's.

    Raises:
        ValueError: If it is not.
    """
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"`seed` must be None or an integer >= 0. Received: seed={seed!r}")
    return int(seed)


def unit(a: tf.Tensor) -> tf.Tensor:
    """Scales every example of `a`, `[B, ...]`, to length 1; zero stays zero.

    Where the square of the length is beyond the dtype (1e19 in float32) the result is NaN.
    """
    flat = _flat(a)
    squared = tf.reduce_sum(tf.square(flat), axis=1, keepdims=True)
    # Below `tiny` the square has lost its digits: such a vector counts as zero.
    scale = tf.math.rsqrt(tf.maximum(squared, np.finfo(a.dtype.as_numpy_dtype).tiny))
    # The square of a long vector is infinite: it must not count as zero.
    scale = tf.where(tf.math.is_finite(squared), scale, np.nan)
    return tf.reshape(flat * scale, tf.shape(a))


def inner(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """The inner products of the examples of two tensors, `[B, ...]` to `[B]`."""
    return tf.reduce_sum(a * b, axis=list(range(1, a.shape.rank)))


def length(a: tf.Tensor) -> tf.Tensor:
    """The Euclidean norm of every example of `a`, `[B, ...]` to `[B]`. Not for gradients: at 0."""
    return tf.sqrt(_squared_length(a))


def _squared_length(a: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.square(_flat(a)), axis=1)


def _flat(a: tf.Tensor) -> tf.Tensor:
    """Reshapes `[B, ...]` to `[B, n]`."""
    return tf.reshape(a, [-1, _size(a)])


def _size(a: tf.Tensor) -> int:
    size = a.shape[1:].num_elements()
    if size is None:
        raise ValueError(
            "All axes but the batch must have a known size: give the network's Input a full shape. "
            f"Received: a tensor of shape {tuple(a.shape)}"
        )
    return size


def _per_example(s: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Reshapes `[B]` so that it broadcasts over the other axes of `like`."""
    return tf.reshape(s, [-1] + [1] * (like.shape.rank - 1))


def validate_method(method: str, iterations: int) -> None:
    """Checks the two arguments that all users of `left_vector` take.

    Raises:
        ValueError: If `method` is unknown or `iterations` is not a positive integer.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}. Received: method={method!r}")
    validate_positive("iterations", iterations)


def validate_positive(name: str, value: int) -> int:
    """Returns an argument that is an integer of at least 1, NumPy's too, as Python's.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be an integer >= 1. Received: {name}={value!r}")
    return int(value)
