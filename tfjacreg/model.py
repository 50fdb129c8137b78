"""Training with a penalty: an ordinary Keras model around a network."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfjacreg import regularizers
from tfjacreg.checks import check_network
from tfjacreg.jacobian import JacobianOperator


@keras.saving.register_keras_serializable("tfjacreg")
class RegularizedModel(keras.Model):
    """Trains `network` with `factor * penalty` added to its loss, eq. (1).

    An ordinary Keras model: `compile`, `fit`, `evaluate`, `predict`, `save` and `export` work as
    they do for the network alone. In the logs `loss` is the whole training objective, `penalty` the
    mean penalty without its factor (for `SpectralNorm` the mean sigma), and `val_loss` the loss
    without it. Sample and class weights do not weigh the penalty: eq. (8) is a plain mean.

    Only training adds the penalty. The forward pass of the loss is also the one that the Jacobian
    is taken of, so the penalty moves no running statistic and draws no dropout mask. With
    `regularizer=None` the training step is Keras' own.

    Args:
        network: A Keras model from `[B, *in]` to `[B, *out]`. Save it with
            `model.network.save(...)` to use it where tfjacreg is not installed.
        regularizer: Anything that `regularizers.get` takes.
        **kwargs: `name` and `dtype`, as for any Keras model.

    Raises:
        TypeError: If `network` is not a Keras layer.
        ValueError: When built, if there is a regularizer and the network has no trainable weights;
            before the first training step, if `check_network` refuses the network; under
            `tf.distribute.MultiWorkerMirroredStrategy`.
    """

    def __init__(
        self,
        network: keras.Layer,
        regularizer: None | str | dict[str, Any] | regularizers.Regularizer = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(network, keras.Layer):
            raise TypeError(
                "`network` must be a keras.Layer, for example a keras.Model. "
                f"Received: network={network!r} (of type {type(network).__name__})"
            )
        if isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
            raise ValueError(
                "MultiWorkerMirroredStrategy is not supported: Keras 3 itself cannot train under "
                "it. Use MirroredStrategy on one machine. Received: RegularizedModel made in the "
                "scope of a MultiWorkerMirroredStrategy"
            )
        self.network = network
        self._is_checked = False
        self._example_shape = tf.TensorShape(None)
        self.regularizer = regularizers.get(regularizer)
        self._penalty_state: list[keras.Variable] = []
        if self.regularizer is not None:
            self._penalty_tracker = keras.metrics.Mean(name="penalty")
        if network.built and isinstance(getattr(network, "input_shape", None), tuple):
            # Called once on a symbolic input: it can then be summarized and exported at once.
            self(keras.KerasTensor(network.input_shape, dtype=network.input_dtype))

    def build(self, input_shape: Any) -> None:
        """Builds the network and makes the variables that the penalty remembers things in."""
        self._example_shape = tf.TensorShape(input_shape[1:])
        if not self.network.built:
            # A symbolic call, which also builds what a subclassed network holds.
            self.network(keras.KerasTensor(input_shape, dtype=self.network.input_dtype))
        if self.regularizer is not None:
            if not self.network.trainable_variables:
                raise ValueError(
                    "There is nothing to regularize: `network` has no trainable weights. Set "
                    "`trainable = True` on some layer, or pass regularizer=None. "
                    f"Received: network={self.network.name!r}"
                )
            self._penalty_state = [
                self.add_weight(
                    shape=value.shape,
                    initializer=lambda shape, dtype, value=value: tf.constant(value, dtype),
                    dtype=value.dtype.name,
                    trainable=False,
                    aggregation="only_first_replica",
                    name=f"penalty_state_{number}",
                )
                for number, value in enumerate(self.regularizer.initial_state(self.network))
            ]
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Runs the network."""
        return self.network(inputs, training=training)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Keras' own, called before anything is traced: here the shape of the data is known."""
        super()._maybe_symbolic_build(iterator, data_batch)
        if iterator is not None:
            data_batch = iterator._distributed_dataset.element_spec
        x = keras.utils.unpack_x_y_sample_weight(data_batch)[0]
        # Of several inputs, and of the parts of a batch for several devices, there is no one shape.
        shape = tf.TensorShape(getattr(x, "shape", None))
        if shape.rank and not self.built:
            self.build((None, *shape[1:]))
        if shape.rank and shape[1:].is_fully_defined():
            self._example_shape = shape[1:]

    def make_train_function(self, force: bool = False) -> Any:
        """Keras' own; the first time, outside any graph, it checks the network's Jacobian."""
        self._check()
        return super().make_train_function(force)

    def _check(self) -> None:
        """Checks the network once, if the penalty is one of its Jacobian."""
        regularizer = self.regularizer
        if self._is_checked or regularizer is None or not regularizer.of_jacobian:
            return
        if not self._example_shape.is_fully_defined():
            return  # The norms themselves refuse axes of unknown size.
        # A stateful recurrence takes batches of one size only.
        size = (getattr(self.network, "input_shape", None) or [None])[0] or 2
        if size < 2:
            return
        x = tf.random.stateless_normal((size, *self._example_shape), (0, 0), alg="philox")
        check_network(self.network, x, forward_mode=regularizer.forward_mode)
        self._is_checked = True

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step on the loss plus the penalty: forward mode, backward mode, then the gradient."""
        if self.regularizer is None:
            return super().train_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if not self.built:
            self.build(x.shape)
        with tf.GradientTape() as tape:
            operator = JacobianOperator(
                self, x, training=True, forward_mode=self.regularizer.forward_mode
            )
            # The penalty comes first: its first product can then share the one forward pass.
            penalty, state = self.regularizer(operator, self._penalty_state)
            y_pred = operator.primal if operator.has_run else self(x, training=True)
            loss = self._compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
            )
            # Keras' loss is already divided by the number of replicas whose gradients are summed.
            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            penalty = tf.cast(penalty, loss.dtype)
            loss += self.regularizer.factor * penalty / replicas
            batch_size = tf.shape(operator.x)[0]
            self._loss_tracker.update_state(loss * replicas, sample_weight=batch_size)
            self._penalty_tracker.update_state(penalty, sample_weight=batch_size)
            loss = self.optimizer.scale_loss(loss)
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        for variable, value in zip(self._penalty_state, state, strict=True):
            variable.assign(value)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def test_step(self, data: Any) -> dict[str, Any]:
        """Keras' own: the penalty belongs to training, so its metric is left out."""
        logs = super().test_step(data)
        logs.pop("penalty", None)
        return logs

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, serialized."""
        return {
            **super().get_config(),
            "network": keras.saving.serialize_keras_object(self.network),
            "regularizer": keras.saving.serialize_keras_object(self.regularizer),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> RegularizedModel:
        """Makes the model that `get_config` described."""
        config = dict(config)
        for key in ("network", "regularizer"):
            config[key] = keras.saving.deserialize_keras_object(
                config[key], custom_objects=custom_objects
            )
        return cls(**config)
