"""Norms of the Jacobian at each example, and the bound from the norms of the layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import ml_dtypes
import tensorflow as tf

from tfjacreg import arguments, signature
from tfjacreg.checks import contradiction_tolerance, refuse_hidden_operations
from tfjacreg.estimators import (
    leading_left_vector_and_product,
    products_with_basis,
    squared_frobenius_sample,
    validate_method,
)
from tfjacreg.jacobian import JacobianOperator, LostDerivative
from tfjacreg.linear_maps import chained_maps
from tfjacreg.vectors import (
    broadcast_like,
    fresh_seed,
    inner,
    length,
    num_elements,
    random_unit,
    unit,
)


class SingularTriplet(NamedTuple):
    """The leading singular triplet of every example's Jacobian, and how far it is from exact.

    Attributes:
        sigma: `[B]`, the estimate `||J v||` of the norm `||J||_2`, and never above it except by
            rounding. Its unit is outputs per unit of the network's own input.
        u: `[B, *out]`, left singular vector, of norm 1; `J v = sigma u` by construction.
        v: `[B, *in]`, right singular vector, of norm 1.
        residual: `[B]`, `||J^T u - sigma v||`. Some singular value of J lies within `residual` of
            `sigma`; it is the largest one unless the start was almost orthogonal to its vector.
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
    input: signature.Name = None,
    output: signature.Name = None,
) -> SingularTriplet:
    """Measures `||df/dx||_2` (eq. 3) at every example, in inference mode.

    `"power"` is Algorithm 1 with N = `iterations`. `"lanczos"` is a Golub-Kahan bidiagonalization
    with as many steps from the same start, and more exact. Both take 2 N products. `"exact"` has no
    start and no iterations: it forms the Gram matrix on the smaller side from min(n_out, n_in)
    products, so it is for networks with few outputs (or inputs). Two more products then give the
    triplet and its residual (three for `"exact"`).

    Whether an operation lacks a derivative is looked up once for each network, shape of x and flags
    of its layers (attributes that are True, False, None or text): a branch that other Python state
    adds later is not seen.

    Args:
        network: A network whose output is `[B, *out]`.
        x: What the network takes: `[B, *in]`, or a list, tuple or dict of tensors.
        method: `"power"`, `"lanczos"` or `"exact"`.
        iterations: The N of Algorithm 1, or the number of Lanczos steps, from 1 to 1000; not used
            by `"exact"`.
        seed: Seed of the random starts, uniform on the unit sphere for each example; None draws a
            new one.
        input: The floating input that the Jacobian is taken with respect to; see
            `JacobianOperator`.
        output: The output that the Jacobian is taken of, likewise.

    Returns:
        A `SingularTriplet`. Where J = 0, sigma and the residual are 0 and u, v are arbitrary. Where
        J is not finite, or its square overflows (||J|| > 1e19 in float32), sigma is NaN or
        infinite; where its square vanishes (||J|| < 1e-19), J counts as 0. In a graph sigma is also
        NaN where TensorFlow's products contradict each other; eagerly that raises an error.

    Raises:
        TypeError: If `network` is not a Keras layer, or `x` holds no floating tensor.
        ValueError: If an argument is out of range; if `x` is empty; if the output does not have one
            row for each example; if an operation has no derivative or loses it, so that the norm is
            not known.
    """
    validate_method(method, iterations)
    op = _operator(network, x, input, output)
    start = random_unit(op.x, (fresh_seed(seed), 0))
    _, w = leading_left_vector_and_product(op, method, iterations, start)
    return _triplet(op, unit(w), contradiction_tolerance(network, op.x.dtype.name))


def frobenius_norm(
    network: keras.Layer,
    x: Any,
    *,
    num_projections: int | None = None,
    seed: int | None = None,
    input: signature.Name = None,
    output: signature.Name = None,
) -> tf.Tensor:
    """Measures the Frobenius norm `||df/dx||_F` at every example, in inference mode.

    Whether an operation lacks a derivative is looked up once, as by `spectral_norm`.

    Args:
        network: A network whose output is `[B, *out]`.
        x: What the network takes: `[B, *in]`, or a list, tuple or dict of tensors.
        num_projections: How many random projections to average (the `n_proj` of eq. 2), from 1 to
            1000; the square of the result is then unbiased. None computes the norm exactly, with
            n_out products.
        seed: Seed of the projections; None draws a new one.
        input: The floating input that the Jacobian is taken with respect to; see
            `JacobianOperator`.
        output: The output that the Jacobian is taken of, likewise.

    Returns:
        The norms, `[B]`.

    Raises:
        TypeError: If `network` is not a Keras layer, or `x` holds no floating tensor.
        ValueError: If an argument is out of range; if `x` is empty; if the output does not have one
            row for each example; if an operation has no derivative or loses it, so that the norm is
            not known.
    """
    if num_projections is not None:
        arguments.unrolled_count("num_projections", num_projections)
    key = fresh_seed(seed), 0
    op = _operator(network, x, input, output)
    if num_projections is None:
        rows = products_with_basis(op.rmatvec, op.primal, op.x.dtype)
        norm = tf.sqrt(tf.reduce_sum(tf.square(rows), axis=(1, 2)))
    else:
        norm = tf.sqrt(squared_frobenius_sample(op, num_projections, key))
    u = random_unit(tf.cast(op.primal, op.x.dtype), (0, 1))
    back = op.rmatvec(u)
    v = unit(back)
    try:
        forth = op.matvec(v)
    except LostDerivative:  # No second derivative: nothing to compare the product with.
        return norm
    tolerance = contradiction_tolerance(network, op.x.dtype.name)
    return _consistent(op, norm, inner(back, v), inner(u, forth), length(forth), tolerance)


def spectral_bound(network: keras.Layer, *, iterations: int = 50) -> float:
    """The product of the layers' norms, `prod_l ||W^l||_2` (Section 2.1), in inference mode.

    It bounds `||df/dx||_2` at every x if the activations have slope at most 1 (ReLU, tanh, sigmoid,
    ...), the pooling windows do not overlap, and no other layer without weights stretches its input
    (as upsampling does). The norm of a convolution is the norm of its linear map, with its stride
    and padding, at the size of its input. BatchNorm counts with its inference scale, Normalization
    and Rescaling with their scales, and a layer that runs twice counts twice. Each norm is computed
    by Lanczos, which approaches it from below.

    Args:
        network: A built chain of layers (a `Sequential`, or a functional model without branches).
        iterations: Lanczos steps for each layer, from 1 to 1000.

    Returns:
        The bound.

    Raises:
        TypeError: If `network` is not a Keras layer.
        ValueError: If `iterations` is out of range; if the network is not a chain of Keras layers;
            if a layer with weights has no known linear map, or a layer's input size is not known.
            The message names the layer.
    """
    arguments.network(network)
    arguments.unrolled_count("iterations", iterations)
    bound = 1.0
    for linear_map in chained_maps(network):
        start = random_unit(linear_map.x, (0, 0))
        _, w = leading_left_vector_and_product(linear_map, "lanczos", iterations, start)
        bound *= float(length(w)[0])
    return bound


def _operator(
    network: keras.Layer, x: Any, input: signature.Name, output: signature.Name
) -> JacobianOperator:
    op = JacobianOperator(network, x, input=input, output=output)
    signature.refuse_folded(network, op.x, op.primal)
    refuse_hidden_operations(op)
    return op


def _triplet(op: JacobianOperator, v: tf.Tensor, tolerance: float) -> SingularTriplet:
    z = op.matvec(v)
    sigma, u = length(z), unit(z)
    back = op.rmatvec(u)
    residual = length(back - broadcast_like(sigma, v) * v)
    sigma = _consistent(op, sigma, inner(back, v), inner(u, z), sigma, tolerance)
    is_zero = sigma == 0
    return SingularTriplet(
        sigma, _constant_unit_where(is_zero, u), _constant_unit_where(is_zero, v), residual
    )


def _consistent(
    op: JacobianOperator,
    norm: tf.Tensor,
    backward: tf.Tensor,
    forward: tf.Tensor,
    scale: tf.Tensor,
    tolerance: float,
) -> tf.Tensor:
    """Returns the norm if `<J^T u, v> = <u, J v>` for these u and v; if not, NaN in a graph.

    Raises:
        ValueError: If they differ, eagerly.
    """
    # What vanishes in half precision, or whose square vanishes, is no contradiction.
    smallest = max(
        float(ml_dtypes.finfo(op.primal.dtype.name).tiny),
        float(ml_dtypes.finfo(op.x.dtype.name).tiny) ** 0.5,
    )
    size = tf.sqrt(tf.cast(num_elements(op.x), norm.dtype))
    is_wrong = tf.abs(backward - forward) > tolerance * scale + smallest * size
    if not tf.executing_eagerly():
        return norm + tf.sqrt(-tf.cast(is_wrong, norm.dtype))
    if tf.reduce_any(is_wrong):
        raise ValueError(
            f"The norm of the Jacobian of network {op.network.name!r} is not known: TensorFlow "
            "loses a derivative of it, so that <u, J v> is not <J^T u, v>. `check_network` names "
            f"the layer. Received: x of shape {tuple(op.x.shape)}"
        )
    return norm


def _constant_unit_where(condition: tf.Tensor, a: tf.Tensor) -> tf.Tensor:
    """Where the map is 0 any unit vector is singular: returns a constant one there."""
    return tf.where(broadcast_like(condition, a), unit(tf.ones_like(a)), a)
