"""The four penalties of the paper's comparison, behind one call signature.

`regularizer(operator, state)` returns the penalty of a batch, without its factor, and the next
state. `RegularizedModel` adds `factor * penalty` to the loss and keeps the state (a step counter
for random starts, iteration vectors) in variables, so that it is saved with the model.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfjacreg import linear_maps, norms
from tfjacreg.jacobian import JacobianOperator, validate_forward_mode

DEFAULT_FACTOR = 0.01

State = Sequence[Any]


class Regularizer:
    """Base of the penalties: a factor, a config, and the call described above.

    Args:
        factor: The weight lambda of the penalty in the loss, >= 0.

    Raises:
        ValueError: If `factor` is not a finite number >= 0.
    """

    def __init__(self, factor: float) -> None:
        if (
            isinstance(factor, bool)
            or not isinstance(factor, numbers.Real)
            or not math.isfinite(factor)
            or factor < 0
        ):
            raise ValueError(f"`factor` must be a finite number >= 0. Received: factor={factor!r}")
        self.factor: float = float(factor)

    # Whether the penalty is one of the Jacobian, whose products `fit` then checks first.
    of_jacobian = True

    def initial_state(self, network: keras.Layer) -> list[np.ndarray]:
        """What the penalty remembers from step to step, at the first step."""
        return []

    def __call__(
        self, operator: JacobianOperator, state: State
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Computes the penalty of a batch.

        Args:
            operator: The batch's Jacobians; `operator.network` is the network.
            state: What `initial_state` or the last call returned.

        Returns:
            The penalty without its factor, a scalar, and the next state.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(operator, state)")

    @property
    def forward_mode(self) -> str:
        """How the operator that the penalty is given should compute J v."""
        return "accumulator"

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"factor": self.factor}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Regularizer:
        """Makes the regularizer that `get_config` described."""
        return cls(**config)


class _RandomStart(Regularizer):
    """A penalty that draws vectors: its state is the seed and the number of draws so far."""

    def __init__(self, factor: float, seed: int | None, fraction: float) -> None:
        super().__init__(factor)
        self.seed = norms.validate_seed(seed)
        if (
            isinstance(fraction, bool)
            or not isinstance(fraction, numbers.Real)
            or not 0 < fraction <= 1
        ):
            raise ValueError(
                f"`fraction` must be a number in (0, 1]. Received: fraction={fraction!r}"
            )
        self.fraction: float = float(fraction)

    def initial_state(self, network: keras.Layer) -> list[np.ndarray]:
        """The seed and the number of draws so far."""
        return [np.array([norms.fresh_seed(self.seed), 0], np.int64)]

    def _draw(self, state: State) -> tuple[tuple[tf.Tensor, tf.Tensor], list[tf.Tensor]]:
        """The key of this draw, different on every replica, and the next state."""
        (seed_and_count,) = state
        seed, count = tf.unstack(tf.convert_to_tensor(seed_and_count))
        context = tf.distribute.get_replica_context()
        replica = tf.cast(context.replica_id_in_sync_group, count.dtype)
        draw = count * context.num_replicas_in_sync + replica
        return (seed, draw), [tf.stack([seed, count + 1])]

    def _penalized(self, operator: JacobianOperator, key: tuple[Any, Any]) -> JacobianOperator:
        """The operator of the examples that are penalized in this step: each equally likely."""
        if self.fraction == 1:
            return operator
        batch_size = tf.shape(operator.x)[0]
        seed, draw = key
        # Negative numbers are draws of nothing else.
        uniform = tf.random.stateless_uniform([batch_size], (seed, -1 - draw), alg="philox")
        size = tf.cast(tf.round(self.fraction * tf.cast(batch_size, tf.float32)), tf.int32)
        return operator.of_examples(tf.argsort(uniform)[: tf.maximum(size, 1)])

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "seed": self.seed, "fraction": self.fraction}


@keras.saving.register_keras_serializable("tfjacreg")
class SpectralNorm(_RandomStart):
    """The exact spectral norm of the Jacobian at every training point, eq. (8).

    The penalty is the mean over the batch of `h(sigma_i)`, `sigma_i = ||J^T u_i||`, where the unit
    vector `u_i` comes from Algorithm 1 (or Lanczos, or the whole Gram matrix) and carries no
    gradient: `d sigma = u^T dJ v`. Where J = 0, sigma and its gradient are 0.

    Args:
        factor: The weight lambda, >= 0.
        method: `"power"` (the paper's), `"lanczos"` or `"exact"`; see `norms.spectral_norm`.
        iterations: The N of Algorithm 1, or the steps of Lanczos: 2 N products.
        squared: Whether h(s) = s^2 instead of h(s) = s (eq. 1).
        seed: Seed of the random starts; None draws a new one.
        forward_mode: How J v is computed, `"accumulator"` or `"transpose"`; see `JacobianOperator`.
        fraction: The part of each batch that is penalized, in (0, 1]: `round(fraction * B)`
            examples, at least one, drawn at random, so that the mean is unbiased. Below 1 they take
            a forward pass of their own, and networks with BatchNorm or dropout are refused.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        factor: float,
        method: str = "power",
        iterations: int = 1,
        squared: bool = False,
        seed: int | None = None,
        forward_mode: str = "accumulator",
        fraction: float = 1.0,
    ) -> None:
        super().__init__(factor, seed, fraction)
        norms.validate_method(method, iterations)
        self.method = method
        self.iterations = int(iterations)
        self.squared = bool(squared)
        self._forward_mode = validate_forward_mode(forward_mode)

    @property
    def forward_mode(self) -> str:
        """How the operator that the penalty is given should compute J v."""
        return self._forward_mode

    def __call__(
        self, operator: JacobianOperator, state: State
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Computes the mean of h(sigma); see the base class."""
        key, state = self._draw(state)
        operator = self._penalized(operator, key)
        start = norms.random_unit(operator.x, key)
        u = norms.left_vector(operator, self.method, self.iterations, start)
        w = operator.rmatvec(u)
        # ||w|| written as <w, v> with v constant: the same gradient, and 0 instead of NaN at w = 0.
        v = tf.stop_gradient(norms.unit(w))
        sigma = norms.inner(w, v)
        return tf.reduce_mean(tf.square(sigma) if self.squared else sigma), state

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "method": self.method,
            "iterations": self.iterations,
            "squared": self.squared,
            "forward_mode": self.forward_mode,
        }


@keras.saving.register_keras_serializable("tfjacreg")
class FrobeniusNorm(_RandomStart):
    """The squared Frobenius norm of the Jacobian, by random projections, eq. (2).

    The penalty is the mean over the batch of the unbiased estimate of `||J_i||_F^2`.

    Args:
        factor: The weight lambda, >= 0.
        num_projections: `n_proj`, the projections drawn for every example, at each step.
        seed: Seed of the projections; None draws a new one.
        fraction: The part of each batch that is penalized, in (0, 1]; see `SpectralNorm`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        factor: float,
        num_projections: int = 1,
        seed: int | None = None,
        fraction: float = 1.0,
    ) -> None:
        super().__init__(factor, seed, fraction)
        self.num_projections = norms.validate_positive("num_projections", num_projections)

    def __call__(
        self, operator: JacobianOperator, state: State
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Computes the mean squared Frobenius norm; see the base class."""
        key, state = self._draw(state)
        operator = self._penalized(operator, key)
        squares = norms.squared_frobenius_sample(operator, self.num_projections, key)
        return tf.reduce_mean(squares), state

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "num_projections": self.num_projections}


@keras.saving.register_keras_serializable("tfjacreg")
class SpectralBound(Regularizer):
    """The sum of the layers' squared norms, `sum_l ||W^l||_2^2`, eq. (5) (Yoshida and Miyato).

    Every step goes on with the power iteration of the step before, so that one iteration is enough
    once the weights move slowly. A convolution's norm is that of the linear map it is, with its
    stride and padding at its input's size.

    Args:
        factor: The weight lambda, >= 0.
        iterations: Power iterations for every layer at each step.
        seed: Seed of the iteration vectors; None draws a new one.

    Raises:
        ValueError: If an argument is out of range.
    """

    of_jacobian = False

    def __init__(self, factor: float, iterations: int = 1, seed: int | None = None) -> None:
        super().__init__(factor)
        self.iterations = norms.validate_positive("iterations", iterations)
        self.seed = norms.validate_seed(seed)

    def initial_state(self, network: keras.Layer) -> list[np.ndarray]:
        """A random right vector for every layer with a kernel."""
        seed = norms.fresh_seed(self.seed)
        return [
            norms.random_unit(linear_map.x, (seed, number)).numpy()
            for number, linear_map in enumerate(linear_maps.weighted(network))
        ]

    def __call__(
        self, operator: JacobianOperator, state: State
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Computes the sum over layers; see the base class."""
        squares, next_state = [], []
        for linear_map, start in zip(linear_maps.weighted(operator.network), state, strict=True):
            start = tf.convert_to_tensor(start)
            u = norms.left_vector(linear_map, "power", self.iterations, start)
            w = linear_map.rmatvec(u)
            v = tf.stop_gradient(norms.unit(w))
            squares.append(tf.square(tf.reduce_sum(w * v)))
            # A layer of zeros must not end its iteration for good.
            next_state.append(tf.where(tf.reduce_any(v != 0), v, start))
        return tf.add_n(squares), next_state

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "iterations": self.iterations, "seed": self.seed}


@keras.saving.register_keras_serializable("tfjacreg")
class WeightDecay(Regularizer):
    """The sum of the squares of all kernels, `sum_l ||W^l||_F^2`: L2 without biases and BatchNorm.

    Args:
        factor: The weight lambda, >= 0. The gradient is `2 * factor * W`: what PyTorch calls
            `weight_decay` is twice this factor.

    Raises:
        ValueError: If `factor` is out of range.
    """

    of_jacobian = False

    def __call__(
        self, operator: JacobianOperator, state: State
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Computes the sum over kernels; see the base class."""
        squares = [
            tf.reduce_sum(tf.square(tf.convert_to_tensor(kernel.value)))
            for kernel in linear_maps.kernels(operator.network)
        ]
        return tf.add_n(squares), []


NAMES: dict[str, Callable[..., Regularizer]] = {
    "spectral": SpectralNorm,
    "frobenius": FrobeniusNorm,
    "spectral_bound": SpectralBound,
    "weight_decay": WeightDecay,
}


def get(identifier: None | str | dict[str, Any] | Regularizer) -> Regularizer | None:
    """Returns the regularizer that `identifier` means.

    Args:
        identifier: None; a name in `NAMES`, for that penalty with `factor=DEFAULT_FACTOR`; a
            serialized object, or `{"class_name": ..., "config": {...}}`; or a regularizer.

    Raises:
        ValueError: If nothing is known by that name.
        TypeError: If it is none of these.
    """
    if identifier is None or isinstance(identifier, Regularizer):
        return identifier
    if isinstance(identifier, str):
        if identifier not in NAMES:
            raise ValueError(
                f"A regularizer's name must be one of {sorted(NAMES)}. Received: {identifier!r}"
            )
        return NAMES[identifier](DEFAULT_FACTOR)
    if isinstance(identifier, dict):
        known = {cls.__name__: cls for cls in NAMES.values()}
        name = identifier.get("class_name")
        if not identifier.get("module") and name not in known:
            raise ValueError(
                f"`class_name` in a regularizer's config must be one of {sorted(known)}, or stand "
                f"beside the `module` of a class of your own. Received: {identifier!r}"
            )
        found = keras.saving.deserialize_keras_object(identifier, custom_objects=known)
        if isinstance(found, Regularizer):
            return found
    raise TypeError(
        "A regularizer is None, a name, a config or a tfjacreg.regularizers.Regularizer. "
        f"Received: {identifier!r}"
    )
