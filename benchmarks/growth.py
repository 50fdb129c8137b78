"""How the cost of the penalty grows: with batch, width, pixels, depth and the number of outputs.

    python benchmarks/growth.py                        # what is missing in the results
    python benchmarks/growth.py --points "batch 16" --redo
    python benchmarks/growth.py --parts                # the figure and the table alone

steps: every variant takes some steps in turn, in one process; a step's time is that of some in a
row of which only the last is waited for, and the shortest counts. memory: the peak of a process
of its own for each variant, after three steps.

The floor counts multiply-adds of convolutions and dense layers, F in one forward pass and F1 in the
first of these layers. A plain step is the forward pass, the gradients of the kernels, and those of
all inputs except the first: 3 F - F1. Algorithm 1 with N = 1 adds J v, J^T u, the tangent of the
new v and another gradient of the kernels: 4 F.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import _memory
import _rows
import _setup  # noqa: F401
import applications
import keras
import numpy as np
import tensorflow as tf
from keras import layers
from matplotlib.figure import Figure

from tfjacreg import networks
from tfjacreg.experiments import figures
from tfjacreg.jacobian import FORWARD_MODES

VARIANTS = ("plain", *FORWARD_MODES)
PARTS = ("steps", "memory")
IN_A_ROW = 5
BEGIN, END = "<!-- growth.py: begin -->", "<!-- growth.py: end -->"
FIGURE = _rows.ROOT / "results" / "growth.svg"


def stack(depth: int) -> keras.Model:
    """So many 3x3 convolutions of 16 channels with BatchNorm, on 32x32 pixels."""
    inputs = keras.Input((32, 32, 3))
    x = inputs
    for _ in range(depth):
        x = layers.Conv2D(16, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def mobile_net(pixels: int) -> keras.Model:
    """MobileNetV2 for images of so many pixels along each side."""
    return keras.applications.MobileNetV2(
        weights=None, input_shape=(pixels, pixels, 3), classes=10, classifier_activation=None
    )


class Axis(NamedTuple):
    """What grows, and in which network.

    Attributes:
        words: Of the network and the rest, for the figure.
        sizes: The points.
        make: The network at a point.
        batch: Examples of a step at a point.
    """

    words: str
    sizes: tuple[int, ...]
    make: Callable[[int], keras.Model]
    batch: Callable[[int], int]


AXES = {
    "batch": Axis("LeNet", (16, 64, 256, 1024), lambda _: networks.lenet(), lambda size: size),
    "width": Axis(
        "resnet20, batch 8",
        (1, 2, 4, 8),
        lambda size: networks.resnet20(width=size),
        lambda _: 8,
    ),
    "pixels": Axis("MobileNetV2, batch 8", (32, 64, 128, 224), mobile_net, lambda _: 8),
    "depth": Axis("stack of convolutions, batch 8", (2, 8, 32, 64), stack, lambda _: 8),
    "outputs": Axis(
        "LeNet, batch 32",
        (10, 100, 1000),
        lambda size: networks.lenet(num_classes=size),
        lambda _: 32,
    ),
}
POINTS = [f"{name} {size}" for name, axis in AXES.items() for size in axis.sizes]


def step(point: str, variant: str) -> tuple[Callable[[], tf.Tensor], keras.Model]:
    """A compiled training step of one variant, and its network."""
    name, size = point.split()
    axis = AXES[name]
    keras.utils.set_random_seed(0)
    network = axis.make(int(size))
    model = applications.compiled(network, variant)
    rng, batch = np.random.default_rng(0), axis.batch(int(size))
    x = tf.constant(rng.normal(size=(batch, *network.input_shape[1:])).astype("float32"))
    y = tf.constant(rng.integers(0, network.output_shape[-1], batch))
    function = tf.function(model.train_step)
    return lambda: function((x, y))["loss"], network


def multiply_adds(network: keras.Model) -> tuple[int, int]:
    """Those of one example in all convolutions and dense layers, and in the first of them."""
    found = []
    for layer in network.layers:
        if isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D)):
            found.append(math.prod(layer.output.shape[1:3]) * math.prod(layer.kernel.shape))
        elif isinstance(layer, layers.Dense):
            found.append(math.prod(layer.kernel.shape))
    return sum(found), found[0]


def steps(point: str, repeats: int) -> dict[str, float]:
    """The shortest seconds of a step of every variant, and the floor of their ratio."""
    runs = {variant: step(point, variant) for variant in VARIANTS}
    total, first = multiply_adds(runs["plain"][1])
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(repeats + 1):
        for variant, (run, _) in runs.items():
            start = time.perf_counter()
            for _ in range(IN_A_ROW):
                loss = run()
            loss.numpy()
            if turn:  # The first one traces.
                times[variant].append((time.perf_counter() - start) / IN_A_ROW)
    floor = (7 * total - first) / (3 * total - first)
    return {variant: min(of_one) for variant, of_one in times.items()} | {"floor": floor}


def memory(point: str, variant: str) -> float:
    """GiB that this process has used at most after three steps."""
    run, _ = step(point, variant)
    for _ in range(3):
        run().numpy()
    return _memory.gib()


IN_A_PROCESS: dict[str, Callable[..., Any]] = {
    "steps": lambda point, repeats: steps(point, int(repeats)),
    "memory": memory,
}


def measured(point: str, part: str, repeats: int) -> dict[str, float]:
    """One part of the results of a point."""
    run = functools.partial(_rows.in_a_process, __file__, part, point)
    if part == "steps":
        return run(str(repeats))
    return {variant: run(variant) for variant in VARIANTS}


def table(content: dict[str, Any]) -> str:
    """The table of docs/cost.md."""
    lines = [
        "| what grows | plain step, ms | N = 1 | N = 1, transpose | floor | peak memory, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for point, row in content["points"].items():
        seconds, peaks = row["steps"], row["memory"]
        ratios = [f"{seconds[mode] / seconds['plain']:.2f}" for mode in FORWARD_MODES]
        shown = ", ".join(f"{peaks[variant]:.2f}" for variant in VARIANTS)
        words = f"{point} ({AXES[point.split()[0]].words})"
        lines.append(
            f"| {words} | {1e3 * seconds['plain']:.1f} | {' | '.join(ratios)} "
            f"| {seconds['floor']:.2f} | {shown} |"
        )
    return "\n".join(lines)


def draw(content: dict[str, Any]) -> None:
    """A panel for each axis: ratios to the plain step, and the floor."""
    styles = {"accumulator": ("N = 1, the default", "o-"), "transpose": ("transposed", "s--")}
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    panels = figure.subplots(2, 3, sharey=True)
    for panel, (name, axis) in zip(panels.flat, AXES.items(), strict=False):
        rows = [content["points"][f"{name} {size}"]["steps"] for size in axis.sizes]
        for mode, (label, style) in styles.items():
            panel.plot(axis.sizes, [row[mode] / row["plain"] for row in rows], style, label=label)
        floors = [row["floor"] for row in rows]
        panel.plot(axis.sizes, floors, ":", color="black", label="floor: multiply-adds")
        panel.set_xscale("log", base=2 if name != "outputs" else 10)
        panel.set_xticks(axis.sizes, [f"{size:,}" for size in axis.sizes])
        panel.minorticks_off()
        panel.set_xlabel(f"{name} ({axis.words})")
        panel.set_ylim(bottom=1)
    for row in panels:
        row[0].set_ylabel("step, in plain steps")
    panels.flat[-1].set_axis_off()
    panels.flat[-1].legend(*panels.flat[0].get_legend_handles_labels(), loc="center")
    figures.save(figure, FIGURE)


def with_table(page: str, content: dict[str, Any]) -> str:
    """The page with the table between its marks; draws the figure too, if all is there."""
    if set(POINTS) <= set(content["points"]):
        draw(content)
    return _rows.between(page, BEGIN, END, table(content))


def main() -> None:
    """Fills in the results, point by point, and writes the table and the figure."""
    _rows.Rows(
        key="points",
        names=POINTS,
        parts=PARTS,
        timed=PARTS,
        repeats=9,
        json=_rows.ROOT / "results" / "growth.json",
        page=_rows.ROOT / "docs" / "cost.md",
        in_a_process=IN_A_PROCESS,
        measured=measured,
        with_table=with_table,
    ).main(__doc__)


if __name__ == "__main__":
    main()
