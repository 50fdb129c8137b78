"""A trial: the penalty's gradient by first derivatives alone, from a difference of two passes.

    python benchmarks/first_derivatives.py LeNet EfficientNetB0 LSTM ConvNeXtTiny

As in Algorithm 1 with N = 1, u comes from J v and v from J^T u, without gradient. The penalty is
then `<u, f(x + e v) - f(x)> / e` instead of `<J^T u, v>`, with the statistics and draws of the
first pass. `e` is a fraction of the length of each example. For each network it prints:

error: the difference between this gradient and the one by second derivatives, in all weights
together, relative to the latter, for several e and the same u and v.
step: the seconds of a training step, the smallest of some interleaved ones: plain, by default,
transposed and by differences. first: the seconds until the first of these steps is done.

The findings are in NOTES.md.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import _setup  # noqa: F401
import keras
import networks
import numpy as np
import tensorflow as tf

import tfjacreg
from tfjacreg import JacobianOperator, RegularizedModel, recording, regularizers, rewrites
from tfjacreg.vectors import inner, length, random_unit, unit

STEPS = (1e-3, 1e-2, 3e-2, 1e-1)
VARIANTS = ("plain", "accumulator", "transpose", "differences")


def made(name: str, variant: str) -> RegularizedModel:
    """A network to be trained in one way."""
    keras.utils.set_random_seed(0)
    if name == "LeNet":
        network = tfjacreg.networks.get("lenet", (28, 28, 1), 10)
    else:
        network = networks.network(name)
    is_ours = variant in ("accumulator", "transpose")
    penalty = regularizers.SpectralNorm(0.01, seed=0, forward_mode=variant) if is_ours else None
    model = RegularizedModel(network, penalty)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-6), loss, jit_compile=False)
    return model


def batch(name: str, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Images of noise as the network takes them, and random classes."""
    if name != "LeNet":
        return networks.batch(name, size)
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(size, 28, 28, 1)).astype("float32"))
    return x, tf.constant(rng.integers(0, 10, size))


@contextmanager
def _kept(network: keras.Layer) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Calls functions so that BatchNorm's moments are those of the first call."""
    moments: dict[int, Any] = {}

    def replayed(layer: keras.Layer) -> Callable[..., Any]:
        def replacement(original: Callable[..., Any], *args: Any) -> Any:
            if id(layer) not in moments:
                moments[id(layer)] = original(*args)
            return moments[id(layer)]

        return replacement

    places = [
        rewrites.Place(layer, "_moments", replayed(layer))
        for layer in network._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    yield lambda function: rewrites.while_replaced(places, function)


def moved(x: tf.Tensor, v: tf.Tensor, step: float) -> tuple[tf.Tensor, tf.Tensor]:
    """`x + e v` and e, `[B]`, a part of the length of each example."""
    e = step * length(x)
    return x + tf.reshape(e, [-1, *[1] * (len(x.shape) - 1)]) * v, e


def difference(
    network: keras.Layer, x: tf.Tensor, v: tf.Tensor, step: float, run: Any, at: tf.Tensor
) -> tf.Tensor:
    """`(f(x + e v) - f(x)) / e`: J v, to first order; `at` is f(x)."""
    forward, e = moved(x, v, step)

    def function() -> tf.Tensor:
        with recording.without_trace(network):
            return network(forward, training=True)

    return (run(function) - at) / tf.reshape(e, [-1, *[1] * (len(at.shape) - 1)])


def penalty_by_differences(
    network: keras.Layer, x: tf.Tensor, step: float, at: tf.Tensor, back: Any, run: Any
) -> tf.Tensor:
    """The mean over the batch of `<u, f(x + e v) - f(x)> / e` for Algorithm 1's u and v."""
    along = random_unit(x, (0, 0))
    u = tf.stop_gradient(unit(difference(network, x, along, step, run, at)))
    v = tf.stop_gradient(unit(back(u)))
    return tf.reduce_mean(inner(u, difference(network, x, v, step, run, at)))


def step_by_differences(model: RegularizedModel, part: float) -> Callable[[Any], Any]:
    """A training step on the loss and that penalty."""

    def step(data: Any) -> dict[str, tf.Tensor]:
        (x, y), network = data, model.network
        with _kept(network) as run, tf.GradientTape() as tape:
            with tf.GradientTape(persistent=True) as inner_tape:
                inner_tape.watch(x)
                logits = run(lambda: network(x, training=True))

            def back(u: tf.Tensor) -> tf.Tensor:
                with tape.stop_recording():
                    return inner_tape.gradient(logits, x, output_gradients=u)

            loss = model.compute_loss(x, y, logits, training=True)
            loss += 0.01 * penalty_by_differences(network, x, part, logits, back, run)
        weights = model.trainable_weights
        model.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}

    return step


def errors(name: str, size: int) -> dict[float, float]:
    """The relative error of the gradient for each e."""
    network = made(name, "plain").network
    x, _ = batch(name, size)
    weights = [weight.value for weight in network.trainable_variables]
    zero = tf.UnconnectedGradients.ZERO

    @tf.function(autograph=False)
    def wanted() -> Any:
        with tf.GradientTape() as tape, recording.without_trace(network):
            op = JacobianOperator(network, x, training=True)
            with tape.stop_recording():
                u = unit(op.matvec(random_unit(x, (0, 0))))
                v = unit(op.rmatvec(u))
            total = tf.reduce_mean(inner(op.rmatvec(u), v))
        return u, v, tape.gradient(total, weights, unconnected_gradients=zero)

    @tf.function(autograph=False)
    def found(u: tf.Tensor, v: tf.Tensor, part: tf.Tensor) -> Any:
        with tf.GradientTape() as tape, _kept(network) as run:

            def first() -> tf.Tensor:
                with recording.without_trace(network):
                    return network(x, training=True)

            at = run(first)
            total = tf.reduce_mean(inner(u, difference(network, x, v, part, run, at)))
        return tape.gradient(total, weights, unconnected_gradients=zero)

    u, v, right = wanted()
    norm = tf.linalg.global_norm(right)
    return {
        part: float(
            tf.linalg.global_norm(
                [
                    tf.convert_to_tensor(a) - tf.convert_to_tensor(b)
                    for a, b in zip(found(u, v, tf.constant(part)), right, strict=True)
                ]
            )
            / norm
        )
        for part in STEPS
    }


def times(name: str, size: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds of a step and until the first one is done, for each variant."""
    data, runs, found = batch(name, size), {}, {}
    for variant in VARIANTS:
        model = made(name, variant)
        step = step_by_differences(model, 1e-2) if variant == "differences" else model.train_step
        runs[variant] = tf.function(step, autograph=False)
        begin = time.perf_counter()
        runs[variant](data)["loss"].numpy()
        found[variant] = time.perf_counter() - begin
    smallest = dict.fromkeys(runs, np.inf)
    for _ in range(repeats):
        for variant, run in runs.items():
            begin = time.perf_counter()
            run(data)["loss"].numpy()
            smallest[variant] = min(smallest[variant], time.perf_counter() - begin)
    return {variant: (smallest[variant], found[variant]) for variant in runs}


def main() -> None:
    """Prints the figures of each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--errors-only", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.networks:
        shown = (
            f"e = {e:g}: {error:.4f}" for e, error in errors(name, arguments.batch_size).items()
        )
        print(f"{name}: error of the gradient,", ", ".join(shown), flush=True)
        if arguments.errors_only:
            continue
        measured = times(name, arguments.batch_size, arguments.repeats)
        plain = measured["plain"][0]
        for variant, (step, first) in measured.items():
            text = f"step {1e3 * step:.2f} ms ({step / plain:.2f}), first {first:.1f} s"
            print(f"  {variant:12} {text}", flush=True)


if __name__ == "__main__":
    main()
