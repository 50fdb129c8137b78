"""The time that a comparison on your own data and network takes, for docs/own_data.md.

    python benchmarks/journey.py OUT --workers 2    # on a quiet machine

It writes 3,000 colour images of 32x32 pixels in six classes as an .npz, and a small network with
augmentation and BatchNorm as a .keras file. Then it runs the one command of README.md with this
number of workers, and prints the time until the report was there. The images are Fashion-MNIST's in
random colours.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import _rows
import _setup  # noqa: F401
import numpy as np
import training_set_size

from tfjacreg import datasets
from tfjacreg.experiments import files, report
from tfjacreg.experiments.environment import environment

JSON = _rows.ROOT / "results" / "journey.json"
IMAGES, CLASSES, SIDE = 3000, 6, 32


def images(data_dir: str | None) -> dict[str, np.ndarray]:
    """Images of the first classes, each in a colour of its own on another."""
    train = datasets.load("fashion_mnist", data_dir).train
    rng = np.random.default_rng(0)
    few = rng.permutation(np.flatnonzero(train.y < CLASSES))[:IMAGES]
    edge = (SIDE - train.x.shape[1]) // 2
    grey = np.pad(train.x[few], ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    colour, background = rng.random((2, len(few), 1, 1, 3))
    x = grey * colour + (1 - grey) * 0.5 * background
    return {"x_train": np.round(255 * x).astype("uint8"), "y_train": train.y[few]}


def main() -> None:
    """Makes the files, runs the command, writes what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data-dir", help="of tensorflow-datasets")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True)
    content = images(arguments.data_dir)
    np.savez_compressed(out / "mine.npz", **content)  # type: ignore[arg-type]
    training_set_size.batch_norm((SIDE, SIDE, 3), CLASSES).save(out / "mine.keras")
    command = [sys.executable, str(_rows.ROOT / "train.py")]
    command += ["--sweep", str(_rows.ROOT / "sweeps" / "compare.toml")]
    command += ["--dataset", "mine.npz", "--network", "mine.keras", "--out", "compare"]
    start = time.perf_counter()
    workers = [subprocess.Popen(command, cwd=out) for _ in range(arguments.workers)]
    if any([worker.wait() for worker in workers]):
        raise RuntimeError(f"A worker failed: {out} holds the logs.")
    minutes = (time.perf_counter() - start) / 60
    answer = report.write([out / "compare"], out / "compare" / "report").answer
    print(f"{minutes:.1f} minutes with {arguments.workers} workers\n{answer}")
    results = files.read_json(JSON) if JSON.exists() else {}
    results[f"{arguments.workers} workers"] = {"minutes": minutes, "answer": answer}
    results["environment"] = environment()
    files.write_json(JSON, results)


if __name__ == "__main__":
    main()
