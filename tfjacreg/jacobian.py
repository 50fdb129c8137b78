"""The Jacobian of a network, one matrix per example, as a linear operator.

For an example `x` the matrix `J = df/dx` is never formed. It is known through two products:
`matvec(v) = J v` (the paper's forward mode, eq. 6) and `rmatvec(u) = J^T u` (its backward mode,
eq. 7). Section 3.2 and appendix C of the paper extend both to any differentiable network through
its computational graph; here the graph is TensorFlow's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import keras
import tensorflow as tf

from tfjacreg import _keras, arguments, graph_search, passes, recording, rewrites, signature

FORWARD_MODES = ("accumulator", "transpose")


T = TypeVar("T")

# What has been found once; see `JacobianOperator.once`.
_found: weakref.WeakKeyDictionary[keras.Layer, dict[Any, Any]] = weakref.WeakKeyDictionary()


class LostDerivative(ValueError):
    """An operation has a first derivative but not the second, which transposing J^T u needs."""


class NotConnected(ValueError):
    """Nothing differentiable leads from the input of a network to its output."""


class JacobianOperator:
    """The Jacobians of `network` at the examples of a batch: `J_i = d network(x_i) / d x_i`.

    The constructor runs the network once and records the pass on a `tf.GradientTape`. `rmatvec`
    goes backward on this tape. `matvec` is the transpose of that linear map: the derivative of
    `<J^T u, v>` with respect to `u`. Neither runs the network again. With `tangent=v` a
    `tf.autodiff.ForwardAccumulator` also computes `J v` along the pass, as Algorithm 1 begins; the
    result is `tangent_out`.

    Works eagerly, in a `tf.function` and inside an outer `tf.GradientTape`, which can differentiate
    `primal`, `tangent_out` and all products with respect to the weights.

    Attributes:
        network: The network.
        training: Whether the pass ran in training mode.
        x: The input of the Jacobian, `[B, *in]`, in at least float32.
        outputs: Everything that the network returned.
        primal: The output `f(x)` that the Jacobian is of, `[B, *out]`, in the network's own dtype.
        tangent: The tangent of the pass, `[B, *in]`, or None.
        tangent_out: `J v` for this tangent, `[B, *out]`, in the dtype of `x`; or None.
        holds_constants: Whether something in the pass was held constant for the Jacobian, such as
            the batch statistics of BatchNorm.

    Args:
        network: A `keras.Layer` (any model is one).
        x: What the network takes: a tensor or array `[B, *in]`, B >= 1, or a list, tuple or dict of
            them. All of them except the input of the Jacobian are constants, and may be integers.
        training: Whether the network runs in training mode. BatchNorm then takes its statistics
            from this batch and treats them as constants for the Jacobian, dropout uses one mask for
            all products, and moving statistics are updated once, as in any training pass.
        tangent: Vectors v, `[B, *in]`, whose product `J v` is computed along the pass.
        input: The floating tensor of `x` that the Jacobian is taken with respect to: its position,
            key or name. It may be left out if there is only one.
        output: The floating output that the Jacobian is taken of, named in the same way.

    Raises:
        TypeError: If `network` is not a `keras.Layer`, `x` or the output holds no floating tensor,
            `training` is not True or False, or `tangent` does not hold real numbers.
        ValueError: If `x` has no batch axis or an empty one; if there are several inputs or outputs
            and none is named; if `tangent` has another shape than the input. With a `tangent`, also
            if its product is not known, for the reasons given in `matvec`; without one, the first
            product raises this.
    """

    def __init__(
        self,
        network: keras.Layer,
        x: Any,
        *,
        training: bool = False,
        tangent: Any = None,
        input: signature.Name = None,
        output: signature.Name = None,
    ) -> None:
        self.network = arguments.network(network)
        self.training = arguments.boolean("training", training)
        self._output = output
        self._run(signature.resolve_input(network, x, input), tangent)

    def _run(
        self, taken: signature.NetworkInput, tangent: Any, *, is_partial: bool = False
    ) -> None:
        """The one forward pass, along which the product with the tangent (eq. 6) is computed."""
        self._taken, self.x, self.tangent, self.tangent_out = taken, taken.x, None, None
        self._transposable: Any = None
        accumulator = None
        if tangent is not None:
            self.tangent = arguments.vector("tangent", tangent, self.x, "the input x")
            accumulator = tf.autodiff.ForwardAccumulator(self.x, self.tangent)
        self._tape = tf.GradientTape(persistent=True)

        def forward() -> None:
            self._tape.watch(self.x)
            self.outputs = self.network(taken.packed(), training=self.training)
            self.primal = signature.select_output(self.network, self.outputs, self._output)

        self.holds_constants = recording.record(
            self.network, self._tape, accumulator, forward, is_partial=is_partial
        )
        if accumulator is not None:
            product = accumulator.jvp(self.primal)
            if product is None and self._tape.gradient(self.primal, self.x) is not None:
                raise self._lost()
            self.tangent_out = tf.cast(self._connected(product), self.x.dtype)
            # Eagerly, TensorFlow takes the pass off an outer tape once its tangents are freed.
            self._accumulator = accumulator

    def subset(self, indices: tf.Tensor, tangent: Any = None) -> JacobianOperator:
        """The Jacobians of some of the examples, from a second forward pass over these alone.

        The second pass changes nothing in the network: it comes beside the pass of the whole batch.

        Args:
            indices: Which examples, integers `[R]`.
            tangent: Vectors `[R, *in]` whose product is computed along the second pass, or None.

        Returns:
            The operator of these examples, with `x` of shape `[R, *in]`.

        Raises:
            ValueError: If the network draws random numbers, keeps a state in a plain `tf.Variable`,
                or takes anything from the whole batch: the second pass would then differ. If an
                input is sparse.
        """
        part = object.__new__(JacobianOperator)
        part.network, part.training, part._output = self.network, self.training, self._output
        tensors = self._taken.tensors()
        if any(isinstance(tensor, tf.SparseTensor) for tensor in tensors):
            raise ValueError(
                "The examples of a sparse tensor cannot be taken one by one. Use fraction=1. "
                f"Received: a sparse input of network {self.network.name!r}"
            )
        some = [tf.gather(tensor, indices) for tensor in tensors]
        taken = self._taken.with_tensors(some)
        before = len(_operations())
        with recording.without_trace(self.network) as scope:
            part._run(taken, tangent, is_partial=True)
        drawn = "such as those of Dropout" if recording.has_drawn(self.network, scope) else None
        drawn = drawn or self._draws_or_assigns(_operations()[before:])
        if drawn:
            raise ValueError(
                f"{recording.NEEDS_THE_WHOLE_BATCH}Received: network {self.network.name!r}, which "
                f"draws random numbers or keeps a state, {drawn}"
            )
        return part

    def _draws_or_assigns(self, operations: list[tf.Operation]) -> str | None:
        """What the pass does differently when it is run again; in a graph its operations tell."""
        if not tf.executing_eagerly():
            return graph_search.draws_or_assigns(operations)
        return self.once(
            "draws",
            lambda: self.traced(lambda _: graph_search.draws_or_assigns(_operations())),
        )

    def once(self, kind: str, find: Callable[[], T]) -> T:
        """Returns what `find` returns; it is called once per network, shape of x and flags.

        Args:
            kind: A name for what is found.
            find: Called without arguments.
        """
        known = _found.setdefault(self.network, {})
        specs = [str(tf.type_spec_from_value(tensor)) for tensor in self._taken.tensors()]
        key = kind, self.training, self._output, self._taken.position, *specs
        flags = _flags(self.network)
        if key not in known or known[key][0] != flags:
            known[key] = flags, find()
        return known[key][1]

    def traced(self, find: Callable[[JacobianOperator], T]) -> T:
        """Returns what `find` finds in the graph of the same pass; the graph is never run.

        Args:
            find: A function of an operator of symbolic tensors; `x.graph` holds all operations.
        """
        found: list[T] = []

        def forward(tensors: list[Any]) -> tf.Tensor:
            taken = self._taken.with_tensors(tensors)
            with recording.without_trace(self.network):
                symbolic = JacobianOperator(
                    self.network,
                    taken.packed(),
                    training=self.training,
                    input=taken.position,
                    output=self._output,
                )
            found.append(find(symbolic))
            return symbolic.primal

        specs = [tf.type_spec_from_value(tensor) for tensor in self._taken.tensors()]
        # Not in an `init_scope`, where no tape records: a layer may use one.
        tf.function(forward, autograph=False).get_concrete_function(specs)
        return found[0]

    def moved(self, x: tf.Tensor) -> JacobianOperator:
        """The operator at another point, from a further pass that changes nothing in the network.

        Args:
            x: The point, of the shape of `x`, in any floating dtype.
        """
        other = object.__new__(JacobianOperator)
        other.network, other.training, other._output = self.network, self.training, self._output
        with recording.without_trace(self.network):
            other._run(self._taken_at(x), None)
        return other

    def run_again(self, x: tf.Tensor) -> None:
        """Runs the network as it is, unrecorded, at another point; changes nothing in it.

        Args:
            x: The point, as in `moved`.
        """
        with recording.without_trace(self.network):
            self.network(self._taken_at(x).packed(), training=self.training)

    def _taken_at(self, x: tf.Tensor) -> signature.NetworkInput:
        leaves = list(self._taken.leaves)
        leaves[self._taken.position] = x
        return self._taken._replace(leaves=leaves)

    def matvec(self, v: Any) -> tf.Tensor:
        """Computes `J_i v_i` for every example: the forward mode, eq. (6).

        For `tangent` itself, the result is the product that was computed along the pass. The first
        call records a `J^T u`, which all calls transpose; if it came while an outer tape did not
        record (`stop_recording`) or in another graph, a later one that needs it records another.

        Args:
            v: Tangents, `[B, *in]`.

        Returns:
            `[B, *out]`, in the dtype of `x`.

        Raises:
            TypeError: If `v` does not hold real numbers.
            ValueError: If `v` has another shape than `x`; if J^T u cannot be transposed, because an
                operation lacks a second derivative; if no differentiable operation leads from the
                input to the output.
        """
        if v is not None and v is self.tangent:
            return self.tangent_out
        v = arguments.vector("v", v, self.x, "the input x")
        try:
            if not self._can_transpose():
                self.rmatvec_to_transpose(tf.zeros_like(self.primal))
            _, tape, u, pulled_back = self._transposable
            product = tape.gradient(pulled_back, u, output_gradients=v)
        # An operation whose gradient has no registered gradient raises one of these, as does
        # `tf.recompute_grad`.
        except (LookupError, NotImplementedError) as error:
            raise self._lost() from error
        if product is None:
            raise self._lost()
        return tf.cast(product, self.x.dtype)

    def rmatvec(self, u: Any) -> tf.Tensor:
        """Computes `J_i^T u_i` for every example: the backward mode, eq. (7).

        Args:
            u: Cotangents, `[B, *out]`.

        Returns:
            `[B, *in]`, in the dtype of `x`.

        Raises:
            TypeError: If `u` does not hold real numbers.
            ValueError: If `u` has another shape than `primal`, or no differentiable operation leads
                from the input to the output.
        """
        return self._vjp(arguments.vector("u", u, self.primal, "the network's output"))

    def rmatvec_to_transpose(self, u: Any) -> tf.Tensor:
        """Computes what `rmatvec` does, recorded as a function of u for `matvec` to transpose.

        Without this call `matvec` records a product of its own, at u = 0.

        Args:
            u: Cotangents, `[B, *out]`.

        Returns:
            `[B, *in]`, in the dtype of `x`.
        """
        u = arguments.vector("u", u, self.primal, "the network's output")
        tape = tf.GradientTape(persistent=True)
        with tape:
            tape.watch(u)
            pulled_back = self._vjp(u)
        self._transposable = passes.current_graph(), tape, u, pulled_back
        return pulled_back

    def _can_transpose(self) -> bool:
        """Whether what the last J^T u to transpose was recorded from is all that is needed now.

        It is not for a tape that was not recording then: to that tape it would be a constant.
        """
        if self._transposable is None:
            return False
        graph, _, _, pulled_back = self._transposable
        return passes.can_use(graph) and passes.is_followed_like(pulled_back, self.primal)

    def _vjp(self, u: tf.Tensor) -> tf.Tensor:
        return self._connected(
            rewrites.in_blocks(lambda: self._tape.gradient(self.primal, self.x, output_gradients=u))
        )

    def _lost(self) -> LostDerivative:
        return LostDerivative(
            f"J v is not known: in network {self.network.name!r} the derivative of some layer "
            "has no derivative itself, so that J^T u cannot be transposed. `check_network` "
            f"names the layer. Received: x of shape {tuple(self.x.shape)}"
        )

    def _connected(self, product: tf.Tensor | None) -> tf.Tensor:
        """Returns the product; refuses None, since a missing path is not a product of 0."""
        if product is None:
            raise NotConnected(
                "The Jacobian is not known: no differentiable operation leads from the input of "
                f"network {self.network.name!r} to its output, so that every product would be 0. "
                "Replace the operation without a derivative (an integer cast, a look-up of tokens, "
                f"tf.numpy_function, ...). Received: x of shape {tuple(self.x.shape)}"
            )
        return product


def _operations() -> list[tf.Operation]:
    """The operations so far of the graph that is being traced; none eagerly."""
    return [] if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_operations()


def _flags(network: keras.Layer) -> list[Any]:
    """What may say which operations the layers run: attributes that are True, False, None or text.

    Numbers do not count, since a layer may count its calls.
    """
    return [
        (type(layer), *((k, v) for k, v in vars(layer).items() if isinstance(v, _FLAGS)))
        for layer in _keras.layers_of(network)
    ]


_FLAGS = (bool, str, type(None))
