"""Training with a penalty: an ordinary Keras model around a network."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfjacreg import (
    _keras,
    arguments,
    atomic_files,
    regularizers,
    rewrites,
    signature,
    weak_penalties,
    weights_files,
)
from tfjacreg.checks import check_network, explained
from tfjacreg.error_causes import is_of_a_derivative
from tfjacreg.jacobian import JacobianOperator

# The name of the mean penalty in the logs, as long as no metric of the user has it.
_PENALTY = "penalty"


@keras.saving.register_keras_serializable("tfjacreg")
class RegularizedModel(keras.Model):
    """Trains `network` with `factor * penalty` added to its loss, eq. (1).

    It is an ordinary Keras model: `compile`, `fit`, `evaluate`, `predict`, `save` and `export` work
    as they do for the network alone. In the logs `loss` is the whole training objective, `penalty`
    the mean penalty without its factor (for `SpectralNorm` the mean sigma), and `val_loss` the loss
    without the penalty. If a metric of yours is called `penalty`, the mean penalty is logged as
    `regularizer_penalty`. Sample and class weights do not weight the penalty: eq. (8) is a plain
    mean.

    Only training adds the penalty. The Jacobian is taken of the same forward pass as the loss, so
    the penalty changes no running statistic and draws no dropout mask of its own. With
    `regularizer=None` the training step is Keras' own.

    Args:
        network: A Keras model. Save it with `model.network.save(...)` to use it where tfjacreg is
            not installed.
        regularizer: Anything that `regularizers.get` accepts.
        input: The floating input that the Jacobian is taken with respect to, by position, key or
            name. It may be left out if there is only one.
        output: The floating output that the Jacobian is taken of, named in the same way.
        **kwargs: `name` and `dtype`, as for any Keras model; the default dtype policy is the
            network's.

    Raises:
        TypeError: If `network` is not a Keras layer, `regularizer` is none of what
            `regularizers.get` accepts, or `input` or `output` is not a position, key or name.
        ValueError: If `network` has a method or property of its own that the model around it would
            ignore: a `fit`, `evaluate` or `predict`, a training step, a loss, or a rule of which
            weights are trained (a task of KerasHub or another `RegularizedModel` has one). If a
            subclass overrides `call` and the penalty is one of the Jacobian. Under
            `tf.distribute.MultiWorkerMirroredStrategy`. When the model is built, if there is a
            regularizer and the network has no trainable weights. Before the first training step,
            if `check_network` refuses the network.
    """

    train_function: Any

    def __init__(
        self,
        network: keras.Layer,
        regularizer: str | dict[str, Any] | regularizers.Regularizer | None = None,
        input: signature.Name = None,
        output: signature.Name = None,
        **kwargs: Any,
    ) -> None:
        arguments.network(network)
        _refuse_own_training(network)
        # The network casts its own inputs, as it does alone.
        kwargs = {"dtype": network.dtype_policy, **kwargs, "autocast": False}
        super().__init__(**kwargs)
        if isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
            raise ValueError(
                "MultiWorkerMirroredStrategy is not supported: Keras 3 itself cannot train under "
                "it. Use MirroredStrategy on one machine. Received: RegularizedModel made in the "
                "scope of a MultiWorkerMirroredStrategy"
            )
        self.network = network
        self.regularizer = regularizers.get(regularizer)
        signature.check_name("input", input)
        signature.check_name("output", output)
        if self._is_of_the_jacobian and type(self).call is not RegularizedModel.call:
            raise ValueError(
                "`call` must not be overridden if the penalty is one of the Jacobian, which is "
                "taken of the network alone. Put what it does into the network. "
                f"Received: {type(self).__name__} with a `call` of its own and the penalty "
                f"{self.regularizer!r}"
            )
        self._of: dict[str, Any] = {"input": input, "output": output}
        # The warnings about the layers and the one of the first step come once.
        self._is_told = self._is_weighed = False
        # The weights that the check has seen, once for each way to compile the step.
        self._checked: set[tuple[bool, int]] = set()
        self._example = _Specs(None)
        self._penalty_state: list[keras.Variable] = []
        self._penalty_name: str | None = None
        if self.regularizer is not None:
            self._penalty_tracker = keras.metrics.Mean(name=_PENALTY)
        inputs = _keras.input_structure(network) if network.built else None
        if inputs is not None:
            # Called once on symbolic inputs, so that it can be summarized and exported at once.
            self(signature.symbolic(inputs))
            # A subclass may keep a teacher or a metric as an attribute, as a functional model may.
            _keras.unlock(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; `network` and `regularizer` can be set only once."""
        if name in ("network", "regularizer") and name in vars(self):
            raise AttributeError(
                "A model keeps the network and the penalty that it was made with. For others make "
                "RegularizedModel(network, regularizer) anew; another factor may be set as "
                f"`model.regularizer.factor`. Received: {name}={value!r}"
            )
        super().__setattr__(name, value)

    @property
    def output_names(self) -> list[str] | None:
        """The names of the network's outputs, by which losses and metrics may be given."""
        return getattr(self.network, "output_names", None)

    @property
    def input(self) -> Any:
        """The symbolic inputs, in the structure that the network takes."""
        graph = _keras.graph_of(self.network)
        return super().input if graph is None else graph.input

    @property
    def inputs(self) -> list[keras.KerasTensor]:
        """The symbolic inputs of the network, as a list."""
        return self.network.inputs

    @property
    def input_shape(self) -> Any:
        """The shape of the network's input, or the shapes if there are several."""
        return self.network.input_shape

    @property
    def operations(self) -> list[keras.Operation]:
        """The operations of the network, if it is a functional model."""
        return self.network.operations

    @property
    def output(self) -> Any:
        """The symbolic outputs, in the structure that the network returns."""
        graph = _keras.graph_of(self.network)
        return super().output if graph is None else graph.output

    @property
    def outputs(self) -> list[keras.KerasTensor]:
        """The symbolic outputs of the network, as a list."""
        return self.network.outputs

    @property
    def output_shape(self) -> Any:
        """The shape of the network's output, or the shapes if there are several."""
        return self.network.output_shape

    def get_layer(self, name: str | None = None, index: int | None = None) -> keras.Layer:
        """Finds a layer by name, in the model or in its network; or by index, in the model."""
        if name is None or any(layer.name == name for layer in self.layers):
            return super().get_layer(name, index)
        return self.network.get_layer(name)

    @property
    def metrics(self) -> list[keras.Metric]:
        """The metrics of the model, and those that the network keeps for itself."""
        return [*super().metrics, *_keras.own_metrics(self.network)]

    def build(self, input_shape: Any) -> None:
        """Builds the network and creates the variables that hold the penalty's state."""
        if not self.network.built:
            # A symbolic call, which also builds the layers inside a subclassed network.
            dtype = self.network.input_dtype
            self.network(
                keras.tree.map_shape_structure(lambda s: keras.KerasTensor(s, dtype), input_shape)
                if self._example.specs is None
                else signature.symbolic(self._example.specs)
            )
        if self.regularizer is not None:
            if not self.network.trainable_variables and not _is_made_again.get():
                raise ValueError(
                    "There is nothing to regularize: `network` has no trainable weights. Set "
                    "`trainable = True` on some layer, or pass regularizer=None. "
                    f"Received: network={self.network.name!r}"
                )
            # In a variable, so that a traced step sees a new factor. In double precision, so that
            # the product is rounded as with a Python number.
            self._factor_variable = tf.Variable(np.nan, trainable=False, dtype=tf.float64)
            self.factor_changes(self.regularizer.factor)
            self.regularizer.followed_by(self)
            self._penalty_state = [
                self.add_weight(
                    shape=value.shape,
                    initializer=functools.partial(_starting_at, value),
                    dtype=value.dtype.name,
                    trainable=False,
                    aggregation="only_first_replica",
                    name=f"penalty_state_{number}",
                )
                for number, value in enumerate(self.regularizer.initial_state(self.network))
            ]
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Runs the network.

        Raises:
            ValueError: If this model is a layer of another model in training: the penalty would be
                lost.
        """
        trains = training and self.regularizer is not None and bool(self.trainable_variables)
        if trains and _keras.is_inside_another(self):
            raise ValueError(
                "A RegularizedModel adds its penalty in its own training step: as a layer of "
                "another model that trains it would add none. Put its `network` into the other "
                "model, and that into a RegularizedModel. "
                f"Received: a call of {self.name!r} with training=True from another layer"
            )
        return self.network(inputs, training=training)

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Called by Keras before anything is traced: here the shape of the data is known."""
        super()._maybe_symbolic_build(iterator, data_batch)
        if iterator is not None:
            data_batch = _keras.element_spec(iterator)
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data_batch)
        if not all(_has_a_shape(t) for t in keras.tree.flatten(x)):
            return  # The parts of a batch for several devices do not share one shape.
        self._example = _Specs(keras.tree.map_structure(_spec, x))
        if not self.built and all(t.shape.rank for t in keras.tree.flatten(self._example.specs)):
            self(signature.symbolic(self._example.specs))
        graph, targets = _keras.graph_of(self.network), keras.tree.flatten(y)
        if graph is None or not self._is_as_written("train_step", "call", "compute_metrics"):
            return  # What the metrics compare is known to the step alone.
        if targets and all(_has_a_shape(t) and t.shape for t in targets):
            _keras.build_metrics(self, signature.symbolic(y), graph.output)

    def make_train_function(self, force: bool = False) -> None:
        """Makes the training function; the first time, outside any graph, checks the Jacobian."""
        self._check()
        before = self.train_function
        super().make_train_function(force)
        if self.train_function is not before:
            self.train_function = self._first_step(self.train_function)

    def _first_step(self, train: Any) -> Any:
        """The training function until one step is done, around which it does what comes once."""

        def first(iterator: Any) -> Any:
            self._build_optimizer()
            logs = train(iterator)
            self.train_function = train
            if not self._is_weighed:
                self._weigh(logs)
            return logs

        return first

    def _build_optimizer(self) -> None:
        """Makes the optimizer's variables before the step that uses them.

        If the step makes them, or the variables of the metrics, TensorFlow traces it a second time.
        It still does where they cannot be made before: if a layer is not built yet, or if the step
        is not the one of this class and may train other weights.
        """
        is_known = self._is_as_written("train_step") and bool(self.trainable_variables)
        is_known = is_known and all(layer.built for layer in _keras.layers_of(self))
        if is_known and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    def _weigh(self, logs: Any) -> None:
        """Warns if the penalty added next to nothing to the loss of the first step."""
        self._is_weighed = True
        factor, name = getattr(self.regularizer, "factor", None), self._penalty_name
        # Below a threshold the penalty is not meant to act; a schedule may begin at 0.
        acts = isinstance(factor, float) and not getattr(self.regularizer, "threshold", 0)
        if factor and acts and self._is_of_the_jacobian and {name, "loss"} <= set(logs):
            weak_penalties.warn_of_first_step(
                self.network, factor, float(logs[name]), float(logs["loss"])
            )

    def _is_as_written(self, *methods: str) -> bool:
        """Whether neither a subclass nor this object has another method of these names."""
        own = (getattr(getattr(self, name), "__func__", None) for name in methods)
        return all(f is getattr(RegularizedModel, n) for f, n in zip(own, methods, strict=True))

    @property
    def _is_of_the_jacobian(self) -> bool:
        return isinstance(self.regularizer, regularizers.JacobianRegularizer)

    def factor_changes(self, factor: regularizers.Factor) -> None:
        """Makes the training step use a new factor; called by the regularizer.

        Raises:
            ValueError: If the step is already traced and a schedule takes the place of a number, or
                a number the place of a schedule.
        """
        is_number, was_number = (
            not isinstance(given, keras.optimizers.schedules.LearningRateSchedule)
            for given in (factor, self.regularizer.factor)  # type: ignore[union-attr]
        )
        if is_number != was_number and self.train_function is not None:
            raise ValueError(
                "A schedule of the factor, or a number in its place, counts only after "
                "`model.compile(...)`: compile first, then set it. "
                f"Received: factor={factor!r}"
            )
        if is_number:
            self._factor_variable.assign(factor)

    def _check(self) -> None:
        """Checks the network, if the penalty is one of its Jacobian and this is not done yet.

        XLA computes other products, and weights that were frozen have other second derivatives.
        """
        regularizer: Any = self.regularizer
        if not self._is_of_the_jacobian:
            return
        is_compiled = bool(self.jit_compile and not self.run_eagerly)
        subjects = {(is_compiled, id(v)) for v in self.network.trainable_variables}
        tells = regularizer.factor != 0 and not self._is_told
        if subjects <= self._checked and not tells:
            return
        example = signature.example(self.network, self._example.specs)
        if tells:
            self._is_told = True
            weak_penalties.warn_of_layers(self.network, self.loss, example=example, **self._of)
        if subjects <= self._checked:
            return
        if example is None:
            weak_penalties.warn_of_no_check(self.network)
        else:
            # FrobeniusNorm and custom penalties compute no product along the pass.
            forward_mode = getattr(regularizer, "forward_mode", "transpose")
            is_open = signature.leaves_lengths_open(self.network, self._example.specs)
            with rewrites.keeping_loops() if is_open else contextlib.nullcontext():
                check_network(
                    self.network,
                    example,
                    forward_mode=forward_mode,
                    jit_compile=is_compiled,
                    **self._of,
                )
        self._checked |= subjects

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step on the loss plus the penalty, in the order of Algorithm 1."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        # Eagerly an empty batch is known to be empty: there is nothing to penalize.
        is_empty = any(t is not None and t.shape[:1] == (0,) for t in keras.tree.flatten(x))
        if self.regularizer is None or is_empty:
            return super().train_step(data)
        with tf.GradientTape() as tape:
            # Forward mode, along the pass of the loss.
            with self._explained(is_forward=True):  # Keras' own errors stay what they are.
                subject, y_pred = self._forward(x)
            loss = _keras.compute_loss(self, x, y, y_pred, sample_weight)
            # Backward mode.
            with self._explained():
                regularizer: Any = self.regularizer
                penalty, state = regularizer(subject, self._penalty_state)
            # Keras scales the loss by 1/replicas because gradients are summed; so must the penalty.
            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            penalty = tf.cast(penalty, loss.dtype)
            loss += tf.cast(self._factor(), loss.dtype) * penalty / replicas
            self._track(loss * replicas, penalty, x)
            loss = self.optimizer.scale_loss(loss)
        weights = self.trainable_weights
        if weights:
            with self._explained():
                gradients = tape.gradient(loss, weights)
            self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        else:  # In the words of Keras' own step.
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        for variable, value in zip(self._penalty_state, state, strict=True):
            variable.assign(value)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _forward(self, x: Any) -> tuple[JacobianOperator | keras.Layer, Any]:
        """The forward pass: returns what the penalty is taken of, and the network's outputs."""
        if not self._is_of_the_jacobian:
            return self.network, self(x, training=True)
        regularizer: Any = self.regularizer
        start = signature.resolve_input(self.network, x, self._of["input"]).x
        tangent = regularizer.tangent_of_the_pass(start, self._penalty_state)
        jacobian = JacobianOperator(self.network, x, training=True, tangent=tangent, **self._of)
        return jacobian, jacobian.outputs

    def _factor(self) -> Any:
        """The weight of the penalty at this step."""
        factor = self.regularizer.factor  # type: ignore[union-attr]
        if isinstance(factor, keras.optimizers.schedules.LearningRateSchedule):
            return factor(self.optimizer.iterations)
        return self._factor_variable

    @contextlib.contextmanager
    def _explained(self, *, is_forward: bool = False) -> Iterator[None]:
        """Explains an error of TensorFlow that says that a derivative is missing.

        Args:
            is_forward: Whether only the forward pass runs, which may lack tangents alone.
        """
        try:
            yield
        except (TypeError, LookupError, AttributeError, tf.errors.InternalError) as error:
            lacks_tangents = "variant" in str(error)
            # Others are mistakes in a penalty, a network or a loss, and say so themselves.
            if not lacks_tangents and (is_forward or not is_of_a_derivative(error)):
                raise
            mode = getattr(self.regularizer, "forward_mode", "transpose")
            raise explained(error, self.network, mode) from error

    def _track(self, loss: tf.Tensor, penalty: tf.Tensor, x: Any) -> None:
        """Updates the epoch's means of the loss and the penalty."""
        batch_size = tf.shape(next(t for t in keras.tree.flatten(x) if t is not None))[0]
        _keras.loss_tracker(self).update_state(loss, sample_weight=batch_size)
        self._penalty_tracker.update_state(penalty, sample_weight=batch_size)

    def get_metrics_result(self) -> dict[str, Any]:
        """Returns the metrics and the mean penalty, under a name that no other metric has."""
        if self.regularizer is None:
            return super().get_metrics_result()
        logs: dict[str, Any] = {}
        for metric in self.metrics:
            if metric is not self._penalty_tracker:
                result = metric.result()
                logs.update(result if isinstance(result, dict) else {metric.name: result})
        self._penalty_name = _PENALTY
        while self._penalty_name in logs:
            self._penalty_name = f"regularizer_{self._penalty_name}"
        return {**logs, self._penalty_name: self._penalty_tracker.result()}

    def test_step(self, data: Any) -> dict[str, Any]:
        """Evaluates as Keras does; the penalty belongs to training, so it is left out."""
        self._penalty_name = None
        logs = super().test_step(data)
        return {name: value for name, value in logs.items() if name != self._penalty_name}

    def save_weights(self, filepath: Any, overwrite: bool = True, **kwargs: Any) -> None:
        """Saves the weights; a `.weights.h5` file can also be loaded by the network alone.

        Args:
            filepath: Where to save.
            overwrite: Whether an existing file is replaced without asking.
            **kwargs: Further arguments of `keras.Model.save_weights`.
        """
        if not weights_files.is_one(filepath) or kwargs.get("max_shard_size"):
            super().save_weights(filepath, overwrite=overwrite, **kwargs)
            return
        path = Path(filepath)
        if overwrite or not path.exists() or _keras.ask_to_overwrite(str(path)):
            with atomic_files.replacing(path) as partial:
                super().save_weights(partial, **kwargs)
                weights_files.put_network_first(partial, self.network)

    def load_weights(self, filepath: Any, skip_mismatch: bool = False, **kwargs: Any) -> None:
        """Loads weights; a `.weights.h5` file of the network alone is loaded into the network.

        Args:
            filepath: What to load.
            skip_mismatch: Whether layers with other shapes are left as they are.
            **kwargs: Further arguments of `keras.Model.load_weights`.
        """
        if not weights_files.is_one(filepath):
            super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)
            return
        self.network.load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)
        with weights_files.own_part(filepath) as own:
            if own is not None:
                loaded = _keras.layers_of(self.network)
                kwargs["objects_to_skip"] = [*kwargs.get("objects_to_skip", ()), *loaded]
                super().load_weights(own, skip_mismatch=skip_mismatch, **kwargs)

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Exports the network as `network.export` does, with the names and dtypes of its inputs.

        Args:
            filepath: Where to export.
            *args: Further arguments of `keras.Model.export`: `format`, `verbose`,
                `input_signature`.
            **kwargs: The same by name, and the options of a format.
        """
        is_network = type(self).call is RegularizedModel.call and hasattr(self.network, "export")
        export = self.network.export if is_network else super().export
        export(filepath, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, serialized."""
        return {
            **super().get_config(),
            "network": keras.saving.serialize_keras_object(self.network),
            "regularizer": keras.saving.serialize_keras_object(self.regularizer),
            **self._of,
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
        with _frozen_allowed():
            return cls(**config)

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds what was saved, even if all layers have been frozen since."""
        with _frozen_allowed():
            super().build_from_config(config)


# Whether a model is being recreated from its config.
_is_made_again = contextvars.ContextVar("is_made_again", default=False)


@contextlib.contextmanager
def _frozen_allowed() -> Iterator[None]:
    """Accepts a network without trainable weights: it was frozen after its training."""
    token = _is_made_again.set(True)
    try:
        yield
    finally:
        _is_made_again.reset(token)


# The methods by which Keras trains and evaluates a model. A network that overrides one of them is
# more than its layers.
_OF_TRAINING = [
    *("train_step", "test_step", "predict_step"),
    *("make_train_function", "make_test_function", "make_predict_function"),
]
_OF_THE_LOSS = ["compute_loss", "compute_metrics", "get_metrics_result"]
_OF_THE_LAYERS = ["losses", "trainable_variables", "trainable_weights"]
_OF_THE_DATA = [
    *("fit", "evaluate", "predict"),
    *("train_on_batch", "test_on_batch", "predict_on_batch"),
]


def _refuse_own_training(network: keras.Layer) -> None:
    """Refuses a network whose own methods or properties the model around it would ignore."""
    advice = {
        **dict.fromkeys(
            _OF_TRAINING,
            "Pass the network inside it, or the same layers as a plain keras.Model; a training "
            "step of your own adds the penalty as docs/guide.md shows",
        ),
        **dict.fromkeys(
            _OF_THE_LOSS,
            "Pass the network inside it, or the same layers as a plain keras.Model, and define the "
            "method in a subclass of RegularizedModel",
        ),
        **dict.fromkeys(_OF_THE_DATA, _data_advice(network)),
        **dict.fromkeys(
            _OF_THE_LAYERS,
            "Say it of the layers: `add_loss` in a layer's `call`, `trainable = False` of a layer",
        ),
    }
    for name, way in advice.items():
        if _is_own(network, name):
            raise ValueError(
                f"`network` must be used as Keras uses models: {type(network).__name__} has a "
                f"`{name}` of its own, which the model around it would ignore. {way}. "
                f"Received: {network!r}"
            )


def _is_own(network: keras.Layer, name: str) -> bool:
    """Whether a method or property of a network is not Keras'.

    The class that defines it decides: a function may carry the name of the one that it wraps, and
    tools put their own functions into Keras' classes.
    """
    if name in vars(network):
        return True
    owner = next((kind for kind in type(network).__mro__ if name in vars(kind)), None)
    return owner is not None and not owner.__module__.startswith("keras.")


def _data_advice(network: keras.Layer) -> str:
    """What to pass instead of a network that preprocesses its data, as KerasHub's tasks do."""
    layers = "the same layers as a plain keras.Model"
    if _keras.graph_of(network) is not None:
        layers = "its layers alone, keras.Model(network.inputs, network.outputs)"
    if hasattr(network, "backbone"):
        layers = f"its `backbone` with a head, or {layers}"
    given = "its `preprocessor`" if hasattr(network, "preprocessor") else "the same mapping"
    return f"Pass {layers}, and preprocess in the data: `dataset.map(...)` with {given}"


class _Specs:
    """The shapes and dtypes of the data, as `tf.TensorSpec`s in the structure of the data.

    This is an object because Keras makes a tracked copy of a list or dict that a model keeps.
    """

    def __init__(self, specs: Any) -> None:
        self.specs = specs


def _starting_at(value: Any, shape: Any, dtype: Any) -> tf.Tensor:
    """An initializer for a variable that starts with a given value."""
    return tf.constant(value, dtype, shape)


def _has_a_shape(data: Any) -> bool:
    return hasattr(data, "shape") and hasattr(data, "dtype")


def _spec(data: Any) -> tf.TensorSpec | tf.SparseTensorSpec:
    """The shape and dtype of a batch of any size, from a tensor, an array or a spec."""
    shape = tf.TensorShape(data.shape)
    shape = tf.TensorShape([None, *shape[1:]]) if shape.rank else shape
    is_sparse = isinstance(data, (tf.SparseTensor, tf.SparseTensorSpec))
    return (tf.SparseTensorSpec if is_sparse else tf.TensorSpec)(shape, data.dtype)
