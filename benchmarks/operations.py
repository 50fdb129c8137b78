"""Which operations make up a training step of LeNet: their milliseconds, on one thread.

    python benchmarks/operations.py          # anew, on a quiet machine
    python benchmarks/operations.py --table  # docs/cost.md alone

TensorFlow's profiler says how long each operation of some steps ran. On one thread they run one
after the other, so that their sum is nearly the step. The steps are those of `fit_time.py`.
"""

import argparse
import collections
import tempfile
from pathlib import Path
from typing import Any

import _rows
import _setup  # noqa: F401
import fit_time
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from tfjacreg import atomic_files
from tfjacreg.experiments import files
from tfjacreg.experiments.environment import environment

JSON = _rows.ROOT / "results" / "operations.json"
PAGE = _rows.ROOT / "docs" / "cost.md"
BEGIN, END = "<!-- operations.py: begin -->", "<!-- operations.py: end -->"
BATCH_SIZE, WARM, STEPS, SHOWN = 256, 10, 20, 12
VARIANTS = {
    "plain": fit_time.PLAIN,
    "Frobenius": "`FrobeniusNorm(f)`, 1 projection",
    "N = 1": "`SpectralNorm(f)`, N = 1",
}


def milliseconds(variant: str, batch_size: int) -> dict[str, float]:
    """Milliseconds of a step in each kind of operation."""
    model, (x, y) = fit_time.model_of(fit_time.Case("lenet", batch_size), VARIANTS[variant])
    one = tf.constant(x[:batch_size]), tf.constant(y[:batch_size])
    step = tf.function(model.train_step)
    for _ in range(WARM):
        step(one)["loss"].numpy()
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(STEPS):
            step(one)["loss"].numpy()
        tf.profiler.experimental.stop()
        (path,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
    found: collections.Counter[str] = collections.Counter()
    for plane in (plane for plane in space.planes if "CPU" in plane.name):
        for event in (event for line in plane.lines for event in line.events):
            name = plane.event_metadata[event.metadata_id].name
            if is_operation(name):
                found[name.split(":")[-1]] += event.duration_ps / 1e9 / STEPS
    return dict(found)


def is_operation(name: str) -> bool:
    """Whether a name is `node:type`, of an operation, and not of a function that runs some."""
    return name.count(":") == 1 and not name.startswith(("$", "Thread", "Execut", "EagerL", "TFE"))


def table(content: dict[str, Any]) -> str:
    """The table of docs/cost.md: the dearest kinds, the others, and their sum."""
    of = content["milliseconds"]
    kinds = sorted(set().union(*of.values()), key=lambda kind: -of["N = 1"].get(kind, 0))
    lines = [f"| | {' | '.join(VARIANTS)} |", "|---|---|---|---|"]

    def add(words: str, chosen: list[str]) -> None:
        sums = (sum(of[variant].get(kind, 0) for kind in chosen) for variant in VARIANTS)
        lines.append(f"| {words} | {' | '.join(f'{value:.2f}' for value in sums)} |")

    for kind in kinds[:SHOWN]:
        add(f"`{kind}`", [kind])
    add(f"{len(kinds) - SHOWN} others", kinds[SHOWN:])
    add("**sum**", kinds)
    return "\n".join(lines)


def main() -> None:
    """Measures, and writes the results and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="measure nothing")
    if not parser.parse_args().table:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        found = {variant: milliseconds(variant, BATCH_SIZE) for variant in VARIANTS}
        files.write_json(JSON, {"milliseconds": found, "environment": environment()})
    page = PAGE.read_text(encoding="utf-8")
    with atomic_files.replacing(PAGE) as file:
        shown = table(files.read_json(JSON))
        file.write_text(_rows.between(page, BEGIN, END, shown), encoding="utf-8")


if __name__ == "__main__":
    main()
