"""Recording a forward pass, and what it holds constant (Section 3.2 and appendix B).

`record` runs the one pass of a `JacobianOperator`. In it, the batch statistics of BatchNorm and the
places of max-pooling's maxima are constants for the Jacobian, and `hold_constant` lets a custom
layer do the same. The gradient of the loss is not affected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from tfjacreg import _keras, passes, rewrites

# Part of the names of operations that are computed while a pass holds them constant.
HELD = "tfjacreg_held"
NEEDS_THE_WHOLE_BATCH = (
    "Some examples of a batch can be penalized without the others only if the network computes "
    "each alone and without random numbers. Use fraction=1. "
)


@contextlib.contextmanager
def hold_constant() -> Iterator[None]:
    """Makes what is computed in this context a constant for the Jacobian, and only for it.

    A layer that mixes the examples of a batch (BatchNorm in training mode) gives `f(x_i)` a
    derivative with respect to another example `x_j`. The paper's pseudo-inference mode
    (Section 3.2) treats the statistics of the batch as constants instead. `JacobianOperator` does
    so for Keras' `BatchNormalization` and its subclasses; in a layer of your own, compute the
    statistics in this context:

    ```python
    def call(self, x, training=None):
        with tfjacreg.hold_constant():
            mean = ops.mean(x, axis=0)
        return x - mean
    ```

    The gradient of the loss still flows through the statistics. Outside the forward pass of a
    Jacobian the context does nothing.

    Raises:
        ValueError: During such a pass, if the context is entered inside a `tf.function`, or inside
            a branch or loop of a graph; or if only some examples of the batch are penalized
            (`fraction` < 1).
    """
    if not passes.recorded.stack:
        yield
        return
    if passes.recorded.stack[-1].is_partial:
        raise ValueError(
            f"{NEEDS_THE_WHOLE_BATCH}Received: a layer that takes something from the whole batch, "
            "such as BatchNormalization in training mode"
        )
    if passes.recorded.stack[-1].graph is not passes.current_graph():
        # For a graph inside the pass the tape records one call, with everything in it.
        raise ValueError(
            "What a layer takes from the whole batch cannot be held constant for the Jacobian "
            "inside of a tf.function, a branch or a loop of a graph. Take it outside of it. "
            "Received: hold_constant(), or BatchNormalization in training mode, in such a place"
        )
    with passes.recorded.stack[-1].paused(), tf.name_scope(HELD):
        yield


def record(
    network: keras.Layer,
    tape: tf.GradientTape,
    accumulator: tf.autodiff.ForwardAccumulator | None,
    function: Callable[[], None],
    *,
    is_partial: bool = False,
) -> bool:
    """Records the forward pass of a function on the tape, and along the accumulator if given.

    Args:
        network: The network whose layers hold their statistics and places of maxima.
        tape: A persistent tape, not yet entered.
        accumulator: An accumulator, not yet entered; or None.
        function: Runs the network, without arguments.
        is_partial: Whether the pass runs some examples of a batch only, so that nothing may be
            taken from the whole batch.

    Returns:
        Whether something in the pass was held constant.
    """
    recorded = passes.Pass(tape, accumulator, is_partial)

    def do() -> None:
        passes.recorded.stack.append(recorded)
        # A tape that is entered after an accumulator does not record what the accumulator computes,
        # and no J^T u goes through that.
        with accumulator or contextlib.nullcontext(), tape:
            function()

    def undo() -> None:
        # Both exit what they have entered, and do nothing otherwise.
        if accumulator is not None:
            accumulator.__exit__(None, None, None)
        tape.__exit__(None, None, None)
        if recorded in passes.recorded.stack:
            passes.recorded.stack.remove(recorded)

    rewrites.active(
        network,
        lambda: rewrites.undone(do, undo),
        _held_statistics,
        has_tangent=accumulator is not None,
    )
    return recorded.has_held


@contextlib.contextmanager
def without_trace(network: keras.Operation) -> Iterator[keras.StatelessScope]:
    """Undoes what the passes inside change of Keras' state: variables, seeds and added losses."""
    with keras.StatelessScope() as scope, _keras.losses_kept(network):
        yield scope


def has_drawn(network: keras.Operation, scope: keras.StatelessScope) -> bool:
    """Whether Keras' random numbers were drawn in a scope of `without_trace`."""
    variables = getattr(network, "variables", [])
    own = {id(v) for v in variables if "seed_generator" not in v.path}
    return bool(set(scope.state_mapping) - own)


def _held_statistics(layer: keras.Layer) -> list[rewrites.Place]:
    """The place where BatchNorm computes the moments of its batch, which are to be held."""
    if not isinstance(layer, keras.layers.BatchNormalization):
        return []
    return [rewrites.Place(layer, "_moments", _held_moments)]


def _held_moments(moments: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # What is constant for the Jacobian needs no second derivative.
    with hold_constant(), rewrites.stepping_aside():
        return moments(*args, **kwargs)
