"""Estimators of the leading singular pair, from the products `matvec` and `rmatvec` alone.

Each method looks for the unit vector `u` that maximizes `||J^T u||`, without a gradient.
`singular_value` then takes one more product, the last backward mode of Algorithm 1, which gives the
differentiable `sigma = ||J^T u||`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from tfjacreg import arguments
from tfjacreg.vectors import (
    broadcast_like,
    flatten,
    inner,
    length,
    num_elements,
    random_unit,
    squared_length,
    unit,
)

METHODS = ("power", "lanczos", "exact")


class LinearOperator(Protocol):
    """What an estimator needs of a batch of linear maps."""

    @property
    def x(self) -> tf.Tensor:
        """A tensor with the shape of the maps' inputs, `[B, *in]`."""

    @property
    def primal(self) -> tf.Tensor:
        """A tensor with the shape of the maps' outputs, `[B, *out]`."""

    def matvec(self, v: tf.Tensor) -> tf.Tensor:
        """Returns `J v`, `[B, *out]`."""

    def rmatvec(self, u: tf.Tensor) -> tf.Tensor:
        """Returns `J^T u`, `[B, *in]`."""


def validate_method(method: str, iterations: int) -> int:
    """Checks the two arguments that all users of `leading_left_vector` take.

    Returns:
        The iterations, as Python's integer.

    Raises:
        ValueError: If `method` is unknown or `iterations` is not an integer from 1 to 1000.
    """
    arguments.one_of("method", method, METHODS)
    return arguments.unrolled_count("iterations", iterations)


def singular_value(op: LinearOperator, u: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes `sigma = ||J^T u||` and `v = J^T u / sigma`, the end of Algorithm 1.

    sigma is computed as `<J^T u, v>` with u and v held constant, so that its gradient is
    `d sigma = u^T dJ v`, and 0 instead of NaN where J = 0.

    Args:
        op: The maps.
        u: Unit vectors `[B, *out]`; no gradient flows into them.

    Returns:
        sigma `[B]`, differentiable in what `op` depends on, and v `[B, *in]`, without gradient.
    """
    w = op.rmatvec(tf.stop_gradient(u))
    v = tf.stop_gradient(unit(w))
    return inner(w, v), v


def leading_left_vector(
    op: LinearOperator, method: str, iterations: int, start: tf.Tensor | None
) -> tf.Tensor:
    """Estimates the leading left singular vector of every map, `[B, *out]`.

    Args:
        op: The maps.
        method: One of `METHODS`.
        iterations: The N of Algorithm 1, or the steps of Lanczos.
        start: Unit vectors `[B, *in]`; `"exact"` needs none.

    Returns:
        Unit vectors without a gradient; zero where J = 0.
    """
    if method == "power":
        u = _power_iteration(op, iterations, start)
    elif method == "lanczos":
        u, _ = _lanczos(op, iterations, start, complete=False)
    else:
        u = _exact(op)
    return tf.stop_gradient(u)


def leading_left_vector_and_product(
    op: LinearOperator, method: str, iterations: int, start: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds u as `leading_left_vector` does, and `J^T u`, both without a gradient.

    `"power"` and `"lanczos"` take 2 N products in all, as in training. Lanczos knows `J^T u` for
    every u in its space from the recurrence, and here uses the last product too to choose u: its
    `||J^T u||` is the largest in that space.

    Args:
        op: The maps.
        method: One of `METHODS`.
        iterations: The N of Algorithm 1, or the steps of Lanczos.
        start: Unit vectors `[B, *in]`; `"exact"` needs none.

    Returns:
        Unit vectors u `[B, *out]`, zero where J = 0, and `J^T u`, `[B, *in]`.
    """
    if method == "lanczos":
        u, w = _lanczos(op, iterations, start, complete=True)
    else:
        u = leading_left_vector(op, method, iterations, start)
        w = op.rmatvec(u)
    return tf.stop_gradient(u), tf.stop_gradient(w)


def squared_frobenius_sample(op: LinearOperator, num_projections: int, key: Any) -> tf.Tensor:
    """The unbiased estimate of `||J||_F^2` inside eq. (2), differentiable, `[B]`.

    Args:
        op: The maps.
        num_projections: How many `v` to draw on the unit sphere in output space (`n_proj`).
        key: Two integers: the seed of the sequence of draws, and the number of this draw.
    """
    like = tf.cast(op.primal, op.x.dtype)
    seed, draw = key
    projections = [
        squared_length(op.rmatvec(random_unit(like, (seed, draw * num_projections + j))))
        for j in range(num_projections)
    ]
    n_out = tf.cast(num_elements(like), like.dtype)
    return n_out * tf.add_n(projections) / num_projections


def products_with_basis(
    product: Callable[[tf.Tensor], tf.Tensor], like: tf.Tensor, dtype: tf.DType
) -> tf.Tensor:
    """The products with every unit vector of the space of `like`, `[B, n, m]`.

    Args:
        product: `matvec` or `rmatvec` of a batch of maps.
        like: A tensor with the shape of the vectors, `[B, ...]`, of n elements per example.
        dtype: The dtype of the vectors.

    Raises:
        ValueError: If the shape of `like` is not known in the graph that is being traced.
    """
    n = like.shape[1:].num_elements()
    if n is None:
        raise ValueError(
            "method='exact', and frobenius_norm without num_projections, take the products with "
            "every unit vector: the output, or for the spectral norm the input, must have a known "
            "size along all axes but the batch. Use method='lanczos', or num_projections, or give "
            "the network's Input a full shape. "
            f"Received: a tensor of shape {tuple(like.shape)}"
        )
    products = []
    for k in range(n):
        basis_vector = tf.broadcast_to(tf.one_hot(k, n, dtype=dtype), tf.shape(flatten(like)))
        products.append(flatten(product(tf.reshape(basis_vector, tf.shape(like)))))
    return tf.stack(products, axis=1)


def _power_iteration(op: LinearOperator, iterations: int, v: tf.Tensor) -> tf.Tensor:
    """Algorithm 1 without its last backward mode, which `singular_value` computes."""
    u = unit(op.matvec(v))
    for _ in range(iterations - 1):
        v = unit(op.rmatvec(u))
        u = unit(op.matvec(v))
    return u


def _lanczos(
    op: LinearOperator, steps: int, v: tf.Tensor, *, complete: bool
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Golub-Kahan bidiagonalization with full reorthogonalization: the leading u, and J^T u.

    After k steps `J V_k = U_k B_k` and `J^T U_k = V_{k+1} [B_k, beta_k e_k]^T`, with B upper
    bidiagonal. The best u in the span of U_k is `U_k p`, with p the leading left singular vector of
    `[B_k, beta_k e_k]`; or of `B_k` while the last product `J^T u_k` has not been made, as in
    training, where that product is the penalty itself: then `J^T u` is not known.
    """
    # More steps than the space has dimensions find nothing more. Where a graph does not know the
    # size, they are taken and find zeros.
    sizes = [num_elements(op.x), *([num_elements(op.primal)] if complete else [])]
    steps = min([steps, *[size for size in sizes if isinstance(size, int)]])
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
    u = unit(_combination(p, us))
    if not complete:
        return u, None
    q = tf.pad(alpha_k * p, [[0, 0], [0, 1]]) + tf.pad(beta_k * p, [[0, 0], [1, 0]])
    return u, _combination(q, vs)


def _combination(coefficients: tf.Tensor, vectors: list[tf.Tensor]) -> tf.Tensor:
    """The sum of `[B, k]` coefficients times k vectors `[B, ...]`."""
    basis = tf.stack([flatten(vector) for vector in vectors], axis=1)
    return tf.reshape(tf.einsum("bk,bkn->bn", coefficients, basis), tf.shape(vectors[0]))


def _next_direction(
    a: tf.Tensor, basis: list[tf.Tensor], scales: list[tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Orthogonalizes `a` against `basis`; returns the length of the rest and its unit vector.

    A rest at the level of rounding means that the Krylov space is complete: then both are 0.
    """
    largest = tf.reduce_max(tf.stack([length(a), *scales]), axis=0)
    for _ in range(2):  # Twice is enough (Kahan, Parlett).
        for b in basis:
            a -= broadcast_like(inner(a, b), a) * b
    left = length(a)
    rounding = 16 * np.finfo(a.dtype.as_numpy_dtype).eps
    # `>=`, not `>`: an infinite length must stay infinite.
    left = tf.where(left >= rounding * largest, left, tf.zeros_like(left))
    return left, a * broadcast_like(tf.math.divide_no_nan(tf.ones_like(left), left), a)


def _exact(op: LinearOperator) -> tf.Tensor:
    """The left vector from the eigenvectors of the Gram matrix on the smaller side."""
    n_out, n_in = op.primal.shape[1:].num_elements(), op.x.shape[1:].num_elements()
    if n_in is None or (n_out is not None and n_out <= n_in):
        rows = products_with_basis(op.rmatvec, op.primal, op.x.dtype)
        gram = tf.matmul(rows, rows, transpose_b=True)
        u = _leading_eigenvector(gram)
        u *= tf.cast(tf.reduce_any(rows != 0, axis=(1, 2)), u.dtype)[:, None]
        return tf.reshape(u, tf.shape(op.primal))
    columns = products_with_basis(op.matvec, op.x, op.x.dtype)
    gram = tf.matmul(columns, columns, transpose_b=True)
    v = _leading_eigenvector(gram)
    return unit(tf.reshape(tf.einsum("bk,bkn->bn", v, columns), tf.shape(op.primal)))


def _leading_eigenvector(gram: tf.Tensor) -> tf.Tensor:
    """`[B, n, n]` to `[B, n]`; NaN where the matrix is not finite, so that `eigh` does not fail."""
    is_finite = tf.reduce_all(tf.math.is_finite(gram), axis=(1, 2))
    finite = tf.where(is_finite[:, None, None], gram, tf.zeros_like(gram))
    values, vectors = tf.linalg.eigh(finite)
    leading, value = vectors[:, :, -1], values[:, -1:]
    # XLA's eigh stops at an error of 1e-7 in float64 too: one step of perturbation theory squares
    # it. Where two eigenvalues are nearly equal the step would only divide rounding by rounding.
    off = tf.linalg.matvec(finite, leading) - value * leading
    off = tf.linalg.matvec(vectors, off, transpose_a=True)
    gap = value - values
    rounding = np.sqrt(np.finfo(gram.dtype.as_numpy_dtype).eps)
    off = tf.where(gap > rounding * value, off, tf.zeros_like(off))
    leading += tf.linalg.matvec(vectors, tf.math.divide_no_nan(off, gap))
    total = tf.reduce_sum(gram, axis=(1, 2))[:, None]
    # The NaN is computed, not a constant, for the reason given in `vectors.unit`.
    return tf.where(is_finite[:, None], leading, total - total)
