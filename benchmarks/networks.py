"""What the penalty costs on networks that people train: 32x32 pixels, ten logits.

    python benchmarks/networks.py                              # what is missing in the results
    python benchmarks/networks.py --networks ConvNeXtTiny --redo

steps: every variant takes a training step in turn, again and again, in one process; the shortest of
its steps counts. `double_backward` is plain TensorFlow, without tfjacreg: the gradient of the loss
and of `<J^T u, v>` for given u and v. Any penalty of a Jacobian needs as much, and Algorithm 1 one
product J v more.
starts: seconds until the first step of `fit` is done, of the clock and of the processor, seconds of
the self-check, and the peak memory of three steps. Every variant takes turns with the others, in
three processes of its own: the figures are their medians.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import _memory
import _rows
import _setup  # noqa: F401
import applications
import keras
import numpy as np
import step_time
import tensorflow as tf
from keras import layers

import tfjacreg
from tfjacreg.jacobian import FORWARD_MODES

VARIANTS = ("plain", *FORWARD_MODES)
STARTS = (*VARIANTS, "double_backward")
PROCESSES = 3
PARTS = ("steps", "starts")
BATCH_SIZE = 8
BEGIN, END = "<!-- networks.py: begin -->", "<!-- networks.py: end -->"
IMAGE = (32, 32, 3)


def vit() -> keras.Model:
    """A small Vision Transformer: 64 patches of 4x4 pixels, four blocks of width 128."""
    inputs = keras.Input(IMAGE)
    x = layers.Reshape((64, 128))(layers.Conv2D(128, 4, strides=4)(inputs))
    for _ in range(4):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 32)(y, y)])
        y = layers.Dense(256, "gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(128)(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def lstm(unroll: bool) -> keras.Model:
    """A bidirectional LSTM that reads the 32 rows of an image."""
    recurrence = layers.LSTM(128, unroll=unroll, use_cudnn=False)
    return keras.Sequential(
        [
            keras.Input(IMAGE),
            layers.Reshape((32, 96)),
            layers.Bidirectional(recurrence),
            layers.Dense(10),
        ]
    )


OWN: dict[str, Callable[[], keras.Model]] = {
    "ViT": vit,
    "LSTM": lambda: lstm(unroll=False),
    "LSTM, unrolled": lambda: lstm(unroll=True),
}
NETWORKS = (
    *("ResNet50", "MobileNetV2", "EfficientNetB0", "DenseNet121", "ConvNeXtTiny"),
    *("Xception", "InceptionV3"),
    *OWN,
)


def network(name: str) -> keras.Model:
    """One of `NETWORKS` with fresh weights."""
    keras.utils.set_random_seed(0)
    return OWN[name]() if name in OWN else applications.network(name)


def model(name: str, variant: str) -> keras.Model:
    """The same, ready to be trained by Keras alone or with the penalty in one forward mode."""
    return applications.compiled(network(name), variant)


def batch(name: str, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Noise as the network takes it, and random classes."""
    like = "ResNet50" if name in OWN else name  # Standardized images.
    x = tf.constant(applications.images(like, size).astype("float32"))
    return x, tf.constant(np.random.default_rng(0).integers(0, 10, size))


def double_backward(made: keras.Model) -> Callable[[Any], dict[str, tf.Tensor]]:
    """A step on the loss and `<J^T u, v>` for given u and v, by two tapes and nothing else."""

    def step(data: Any) -> dict[str, tf.Tensor]:
        x, y = data
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                logits = made(x, training=True)
            pulled_back = inner.gradient(logits, x, output_gradients=tf.ones_like(logits))
            loss = made.compute_loss(x, y, logits, training=True)
            loss += 0.01 * tf.reduce_sum(pulled_back)
        weights = made.trainable_weights
        made.optimizer.apply_gradients(zip(outer.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}

    return step


def steps(name: str, repeats: int) -> dict[str, float]:
    """Shortest seconds of a step of every variant, interleaved."""
    data = batch(name, BATCH_SIZE)
    functions: dict[str, Callable[[Any], Any]] = {
        variant: model(name, variant).train_step for variant in VARIANTS
    }
    functions["double_backward"] = double_backward(model(name, "plain"))

    def run(compiled: Callable[[Any], dict[str, tf.Tensor]]) -> Any:
        return compiled(data)["loss"].numpy()

    runs = {key: functools.partial(run, tf.function(f)) for key, f in functions.items()}
    times = step_time.interleaved(runs, repeats)
    return {key: min(seconds) for key, seconds in times.items()}


def start(name: str, variant: str) -> dict[str, float]:
    """Seconds of the self-check and until the first step of `fit` is done, and peak memory."""
    is_bare = variant == "double_backward"
    made: Any = model(name, "plain" if is_bare else variant)
    if is_bare:
        made.train_step = double_backward(made)
    check, seconds = tfjacreg.model.check_network, [0.0]

    def timed(*args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        check(*args, **kwargs)
        seconds[0] = time.perf_counter() - begin

    tfjacreg.model.check_network = timed
    x, y = batch(name, BATCH_SIZE)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    made.fit(x, y, batch_size=BATCH_SIZE, verbose=0)
    first, first_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    made.fit(x, y, batch_size=BATCH_SIZE, epochs=2, verbose=0)
    found = {"first": first, "first_cpu": first_cpu, "check": seconds[0]}
    return {**found, "peak_gib": _memory.gib()}


IN_A_PROCESS: dict[str, Callable[..., Any]] = {
    "steps": lambda name, repeats: steps(name, int(repeats)),
    "start": start,
}


in_a_process = functools.partial(_rows.in_a_process, __file__)


def measured(name: str, part: str, repeats: int) -> dict[str, Any]:
    """One part of the results of a network."""
    if part == "steps":
        return in_a_process("steps", name, str(repeats))
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in STARTS}
    for _ in range(PROCESSES):
        for variant in STARTS:
            runs[variant].append(in_a_process("start", name, variant))
    return {
        variant: {key: statistics.median(run[key] for run in of) for key in of[0]}
        for variant, of in runs.items()
    }


def table(content: dict[str, Any]) -> str:
    """The table of docs/cost.md."""
    lines = [
        "| network | plain step, ms | double backward | N = 1 | N = 1, transpose "
        "| first step, s: plain, N = 1, transpose "
        "| first step / plain: double backward, N = 1, transpose "
        "| first step: N = 1 / transpose | check, s: N = 1, transpose "
        "| peak memory, GiB: plain, N = 1, transpose |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in content["networks"].items():
        seconds, starts = (row.get(part, {}) for part in PARTS)
        cells = [name, f"{1e3 * seconds['plain']:.0f}" if seconds else ""]
        for key in ("double_backward", *FORWARD_MODES):
            cells.append(f"{seconds[key] / seconds['plain']:.2f}" if key in seconds else "-")
        firsts = {variant: of["first"] for variant, of in starts.items()}
        cells.append(", ".join(f"{firsts[v]:.1f}" for v in VARIANTS if v in firsts))
        others = ("double_backward", *FORWARD_MODES)
        cells.append(", ".join(_ratio(firsts, v, "plain") for v in others))
        cells.append(_ratio(firsts, *FORWARD_MODES))
        for key, shown in (("check", FORWARD_MODES), ("peak_gib", VARIANTS)):
            cells.append(", ".join(f"{starts[v][key]:.1f}" for v in shown if v in starts))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(values: dict[str, float], of: str, to: str) -> str:
    return f"{values[of] / values[to]:.1f}" if of in values and to in values else "-"


def with_table(page: str, content: dict[str, Any]) -> str:
    """The page with the table between its marks."""
    return _rows.between(page, BEGIN, END, table(content))


def main() -> None:
    """Fills in the results, row by row, and writes the table."""
    _rows.Rows(
        key="networks",
        names=NETWORKS,
        parts=PARTS,
        timed=PARTS,
        repeats=30,
        json=_rows.ROOT / "results" / "networks.json",
        page=_rows.ROOT / "docs" / "cost.md",
        in_a_process=IN_A_PROCESS,
        measured=measured,
        with_table=with_table,
    ).main(__doc__)


if __name__ == "__main__":
    main()
