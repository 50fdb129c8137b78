"""The four penalties of the paper's comparison: two of the Jacobian, two of the weights.

`regularizer(subject, state)` returns the penalty without its factor, and the next state. For a
penalty of the Jacobian the subject is the `JacobianOperator` of the batch, for a penalty of the
weights it is the network. `RegularizedModel` adds `factor * penalty` to the loss and keeps the
state (a step counter for random starts, iteration vectors) in variables, so that it is saved with
the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from keras.optimizers import schedules

from tfjacreg import arguments, estimators, linear_maps
from tfjacreg.jacobian import FORWARD_MODES, JacobianOperator
from tfjacreg.vectors import fresh_seed, random_unit

DEFAULT_FACTOR = 0.01

Factor: TypeAlias = "float | schedules.LearningRateSchedule"
State = Sequence[Any]
Key = tuple[Any, Any]


class Regularizer:
    """Base class of the penalties: a factor and a config.

    Args:
        factor: The weight lambda of the penalty in the loss (eq. 1), >= 0; or a
            `keras.optimizers.schedules.LearningRateSchedule`, which gives the factor at each step
            of the optimizer. A new number takes effect at the next training step. A schedule can
            replace a number, or a number a schedule, after `compile` and before `fit`.

    Raises:
        ValueError: If `factor` is neither a finite number >= 0 nor a schedule.
    """

    def __init__(self, factor: Factor) -> None:
        self._followers: list[weakref.ref[Any]] = []
        self.factor = factor

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the followers out: a copy has none."""
        return {**vars(self), "_followers": []}

    def followed_by(self, follower: Any) -> None:
        """Registers an object whose `factor_changes(factor)` is called before each later change.

        Args:
            follower: A model whose training step reads the factor; only a weak reference is kept.
        """
        self._followers.append(weakref.ref(follower))

    @property
    def factor(self) -> Factor:
        """The weight of the penalty in the loss, a number or a schedule."""
        return self._factor

    @factor.setter
    def factor(self, factor: Factor) -> None:
        if not isinstance(factor, schedules.LearningRateSchedule):
            factor = arguments.non_negative("factor", factor)
        for follower in self._followers:
            if (model := follower()) is not None:
                model.factor_changes(factor)
        self._factor: Factor = factor

    def initial_state(self, network: keras.Layer) -> list[np.ndarray]:
        """The state of the penalty before the first step; empty if it has none."""
        return []

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        scheduled = isinstance(self.factor, schedules.LearningRateSchedule)
        return {"factor": schedules.serialize(self.factor) if scheduled else self.factor}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Regularizer:
        """Makes the regularizer that `get_config` described."""
        factor = config["factor"]
        if isinstance(factor, dict):
            factor = schedules.deserialize(factor)
        return cls(**{**config, "factor": factor})


class WeightRegularizer(Regularizer):
    """Base class of penalties of the weights: called with the network, without a Jacobian."""

    def __call__(self, network: keras.Layer, state: State) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Computes the penalty; a subclass must define it.

        Args:
            network: The network.
            state: What `initial_state` or the last call returned.

        Returns:
            The penalty without its factor, a scalar, and the next state.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(network, state)")


class JacobianRegularizer(Regularizer):
    """Base class of penalties of the Jacobian: the batch mean of one value per example.

    A penalty of your own defines `per_example`. The state is the seed and the number of draws.

    Args:
        factor: The weight lambda, >= 0, or a schedule of it.
        seed: Seed of the random vectors; None draws a new one.
        fraction: The part of each batch that is penalized, in (0, 1]: `round(fraction * B)`
            examples, at least one, drawn at random, so that the mean is unbiased. Below 1 these
            examples take a forward pass of their own, and networks with BatchNorm or dropout are
            refused.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, factor: Factor, seed: int | None = None, fraction: float = 1.0) -> None:
        super().__init__(factor)
        self.seed = arguments.seed(seed)
        self.fraction: float = arguments.fraction(fraction)

    def per_example(self, jacobian: JacobianOperator, key: Key) -> tf.Tensor:
        """Computes the value of every example, `[B]`, whose mean is the penalty.

        Args:
            jacobian: The Jacobians. If `jacobian.tangent` is not None, it is what `tangent`
                returned for the same key.
            key: Two integers, the seed of the random numbers and the number of this draw;
                different at each step and on each replica.
        """
        raise TypeError(f"{type(self).__name__} must define per_example(jacobian, key)")

    def tangent(self, x: tf.Tensor, key: Key) -> tf.Tensor | None:
        """Returns the vectors v, `[B, *in]`, whose `J v` the forward pass is to compute, or None.

        Args:
            x: The input of the Jacobian, `[B, *in]`.
            key: The key that `per_example` gets.
        """
        return None

    def tangent_of_the_pass(self, x: tf.Tensor, state: State) -> tf.Tensor | None:
        """The tangent with which the forward pass of the whole batch must run, or None."""
        if self.fraction < 1:  # The penalized examples have a pass of their own.
            return None
        return self.tangent(x, self._next_key(state)[0])

    def __call__(
        self, jacobian: JacobianOperator, state: State
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Computes the mean over the penalized examples.

        Args:
            jacobian: The Jacobians of the batch, from a pass with the result of
                `tangent_of_the_pass` as its tangent.
            state: What `initial_state` or the last call returned.

        Returns:
            The penalty without its factor, a scalar, and the next state.
        """
        key, state = self._next_key(state)
        if self.fraction < 1:
            jacobian = self._sampled(jacobian, key)
        values = self.per_example(jacobian, key)  # A replica's last batch may be empty.
        return tf.reduce_sum(values) / tf.cast(tf.maximum(tf.size(values), 1), values.dtype), state

    def initial_state(self, network: keras.Layer) -> list[np.ndarray]:
        """The seed and the number of draws so far."""
        return [np.array([fresh_seed(self.seed), 0], np.int64)]

    def _next_key(self, state: State) -> tuple[Key, list[tf.Tensor]]:
        """The key of this draw, different on every replica, and the next state."""
        (seed_and_count,) = state
        seed, count = tf.unstack(tf.convert_to_tensor(seed_and_count))
        context = tf.distribute.get_replica_context()
        replica = tf.cast(context.replica_id_in_sync_group, count.dtype)
        draw = count * context.num_replicas_in_sync + replica
        return (seed, draw), [tf.stack([seed, count + 1])]

    def _sampled(self, jacobian: JacobianOperator, key: Key) -> JacobianOperator:
        """The operator of the examples that are penalized in this step, each equally likely."""
        batch_size = tf.shape(jacobian.x)[0]
        seed, draw = key
        # `_next_key` never gives negative draws, so this stream is disjoint from the others.
        uniform = tf.random.stateless_uniform([batch_size], (seed, -1 - draw), alg="philox")
        size = tf.cast(tf.round(self.fraction * tf.cast(batch_size, tf.float32)), tf.int32)
        indices = tf.argsort(uniform)[: tf.maximum(size, 1)]
        return jacobian.subset(indices, self.tangent(tf.gather(jacobian.x, indices), key))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "seed": self.seed, "fraction": self.fraction}


@keras.saving.register_keras_serializable("tfjacreg")
class SpectralNorm(JacobianRegularizer):
    """The exact spectral norm of the Jacobian at every training example, eq. (8).

    The penalty is the mean over the batch of `h(sigma_i)` with `sigma_i = ||J_i^T u_i||`. The unit
    vector `u_i` is found by Algorithm 1, by Lanczos, or from the whole Gram matrix, and is held
    constant in the gradient: `d sigma = u^T dJ v`. Where J = 0, sigma and its gradient are 0.

    Args:
        factor: The weight lambda, >= 0, or a schedule of it.
        method: `"power"` (the paper's), `"lanczos"` or `"exact"`; see `norms.spectral_norm`.
        iterations: The N of Algorithm 1, or the number of Lanczos steps: 2 N products either way.
        squared: Whether h(s) = s^2 instead of h(s) = s (eq. 1).
        seed: Seed of the random starts; None draws a new one.
        forward_mode: How the first J v is computed: `"accumulator"` along the forward pass, with a
            `tf.autodiff.ForwardAccumulator`; `"transpose"` after it, by transposing J^T u, as all
            later products are. Both give the same numbers. Loops in a graph need `"transpose"`; a
            recurrence of more than 64 steps or of an open length is such a loop.
        fraction: The part of each batch that is penalized; see `JacobianRegularizer`.
        threshold: h acts on `max(sigma - threshold, 0)`, so slopes up to the threshold are not
            penalized. Its unit is sigma's: outputs (for example logits) per unit of the network's
            own input. 0 is the paper's penalty.

    Raises:
        TypeError: If `squared` is not True or False.
        ValueError: If another argument is out of range.
    """

    def __init__(
        self,
        factor: Factor,
        method: str = "power",
        iterations: int = 1,
        squared: bool = False,
        seed: int | None = None,
        forward_mode: str = "accumulator",
        fraction: float = 1.0,
        threshold: float = 0.0,
    ) -> None:
        super().__init__(factor, seed, fraction)
        self.iterations = estimators.validate_method(method, iterations)
        self.method = method
        self.squared = arguments.boolean("squared", squared)
        self.forward_mode = arguments.one_of("forward_mode", forward_mode, FORWARD_MODES)
        self.threshold = arguments.non_negative("threshold", threshold)

    def tangent(self, x: tf.Tensor, key: Key) -> tf.Tensor | None:
        """The random start of Algorithm 1, or None if the forward mode or the method needs none."""
        if self.forward_mode == "transpose" or self.method == "exact":
            return None
        return random_unit(x, key)

    def per_example(self, jacobian: JacobianOperator, key: Key) -> tf.Tensor:
        """Computes h(sigma) of every example, `[B]`; see the base class."""
        start = random_unit(jacobian.x, key) if jacobian.tangent is None else jacobian.tangent
        u = estimators.leading_left_vector(jacobian, self.method, self.iterations, start)
        sigma, _ = estimators.singular_value(jacobian, u)
        if self.threshold:
            sigma = tf.nn.relu(sigma - self.threshold)
        return tf.square(sigma) if self.squared else sigma

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "method": self.method,
            "iterations": self.iterations,
            "squared": self.squared,
            "forward_mode": self.forward_mode,
            "threshold": self.threshold,
        }


@keras.saving.register_keras_serializable("tfjacreg")
class FrobeniusNorm(JacobianRegularizer):
    """The squared Frobenius norm of the Jacobian, by random projections, eq. (2).

    The penalty is the mean over the batch of the unbiased estimate of `||J_i||_F^2`.

    Args:
        factor: The weight lambda, >= 0, or a schedule of it.
        num_projections: `n_proj`, the projections drawn for every example, at each step.
        seed: Seed of the projections; None draws a new one.
        fraction: The part of each batch that is penalized; see `JacobianRegularizer`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        factor: Factor,
        num_projections: int = 1,
        seed: int | None = None,
        fraction: float = 1.0,
    ) -> None:
        super().__init__(factor, seed, fraction)
        self.num_projections = arguments.unrolled_count("num_projections", num_projections)

    def per_example(self, jacobian: JacobianOperator, key: Key) -> tf.Tensor:
        """Computes the estimate of every example, `[B]`; see the base class."""
        return estimators.squared_frobenius_sample(jacobian, self.num_projections, key)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "num_projections": self.num_projections}


@keras.saving.register_keras_serializable("tfjacreg")
class SpectralBound(WeightRegularizer):
    """The sum of the layers' squared norms, `sum_l ||W^l||_2^2`, eq. (5) (Yoshida and Miyato).

    Each step continues the power iteration of the step before, so that one iteration is enough once
    the weights move slowly. The norm of a convolution is the norm of its linear map, with its
    stride and padding, at the size of its input.

    Args:
        factor: The weight lambda, >= 0, or a schedule of it.
        iterations: Power iterations for every layer at each step.
        seed: Seed of the iteration vectors; None draws a new one.

    Raises:
        ValueError: If an argument is out of range. When the model is built, if the network has no
            layer with a kernel, or if the linear map or the input size of a layer is not known.
    """

    def __init__(self, factor: Factor, iterations: int = 1, seed: int | None = None) -> None:
        super().__init__(factor)
        self.iterations = arguments.unrolled_count("iterations", iterations)
        self.seed = arguments.seed(seed)

    def initial_state(self, network: keras.Layer) -> list[np.ndarray]:
        """A random right vector, `[1, *in]`, for every layer with a kernel."""
        seed = fresh_seed(self.seed)
        return [
            random_unit(linear_map.x, (seed, number)).numpy()
            for number, linear_map in enumerate(linear_maps.layer_maps(network))
        ]

    def __call__(self, network: keras.Layer, state: State) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Computes the sum over the layers; see the base class."""
        squares, next_state = [], []
        for linear_map, start in zip(linear_maps.layer_maps(network), state, strict=True):
            start = tf.convert_to_tensor(start)
            u = estimators.leading_left_vector(linear_map, "power", self.iterations, start)
            sigma, v = estimators.singular_value(linear_map, u)
            squares.append(tf.reduce_sum(tf.square(sigma)))
            # A layer that is all zeros for a while must not lose its vector for good.
            next_state.append(tf.where(tf.reduce_any(v != 0), v, start))
        return tf.add_n(squares), next_state

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "iterations": self.iterations, "seed": self.seed}


@keras.saving.register_keras_serializable("tfjacreg")
class WeightDecay(WeightRegularizer):
    """The sum of the squares of all trainable kernels, `sum_l ||W^l||_F^2`.

    This is the L2 penalty without biases and BatchNorm parameters.

    Args:
        factor: The weight lambda, >= 0, or a schedule of it. The gradient is `2 * factor * W`:
            PyTorch's `weight_decay` is twice this factor.

    Raises:
        ValueError: If `factor` is out of range. In training, if the network has trainable weights
            but no trainable kernel.
    """

    def __call__(self, network: keras.Layer, state: State) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Computes the sum over the kernels; see the base class."""
        if not network.trainable_variables:  # All of it is frozen.
            return tf.zeros(()), []
        squares = [
            tf.reduce_sum(tf.square(tf.convert_to_tensor(kernel.value)))
            for kernel in linear_maps.trainable_kernels(network)
        ]
        return tf.add_n(squares), []


BY_NAME: dict[str, Callable[..., Regularizer]] = {
    "spectral": SpectralNorm,
    "frobenius": FrobeniusNorm,
    "spectral_bound": SpectralBound,
    "weight_decay": WeightDecay,
}


def get(identifier: str | dict[str, Any] | Regularizer | None) -> Regularizer | None:
    """Returns the regularizer that `identifier` describes.

    Args:
        identifier: None; a name in `BY_NAME`, for that penalty with `factor=DEFAULT_FACTOR`; a
            serialized object, or `{"class_name": ..., "config": {...}}`; or a regularizer.

    Returns:
        The regularizer; None for None.

    Raises:
        ValueError: If the name or class is unknown, or the config does not fit the class.
        TypeError: If `identifier` is none of these.
    """
    if identifier is None or isinstance(identifier, Regularizer):
        return identifier
    if isinstance(identifier, str):
        if identifier not in BY_NAME:
            raise ValueError(
                f"A regularizer's name must be one of {sorted(BY_NAME)}. Received: {identifier!r}"
            )
        return BY_NAME[identifier](DEFAULT_FACTOR)
    if isinstance(identifier, dict):
        known = {cls.__name__: cls for cls in BY_NAME.values()}
        name = identifier.get("class_name")
        if not identifier.get("module") and name not in known:
            valid = f"one of {sorted(known)}, or stand beside the `module` of a class of your own"
            raise ValueError(f"`class_name` must be {valid}. Received: {identifier!r}")
        try:
            found = keras.saving.deserialize_keras_object(identifier, custom_objects=known)
        except (AttributeError, KeyError, TypeError) as error:
            advice = "`config` must be what `get_config` of the regularizer returns"
            raise ValueError(f"{advice}: {error!r}. Received: {identifier!r}") from error
        if isinstance(found, Regularizer):
            return found
    raise TypeError(
        "A regularizer is None, a name, a config or a tfjacreg.regularizers.Regularizer. "
        f"Received: {identifier!r}"
    )
