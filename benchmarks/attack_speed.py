"""Times the attacks and the distances on one classifier.

python benchmarks/attack_speed.py runs/none --out results/attack_speed.json
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import _setup  # noqa: F401

from tfjacreg import attacks, datasets, robustness
from tfjacreg.experiments import evaluation, files
from tfjacreg.experiments.environment import environment


def main() -> None:
    """Prints and writes seconds, and the peak memory of the process up to then."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--limit", type=int, default=10_000, help="images for PGD (10000)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    (target,) = evaluation.find_targets([args.run], data_dir=args.data_dir)
    test = datasets.load(target.dataset, target.data_dir).test
    model = evaluation.load(target.classifier)
    few = min(args.limit, 1000)

    rows = []
    print(f"{'judgement':36} {'images':>7} {'seconds':>8} {'images/s':>9} {'peak memory':>12}")

    def timed(name: str, count: int, judge: Callable[[], object]) -> None:
        started = time.perf_counter()
        judge()
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append({"judgement": name, "images": count, "seconds": seconds, "peak_gib": peak})
        print(f"{name:36} {count:7} {seconds:8.1f} {count / seconds:9.1f} {peak:8.2f} GiB")

    x, y = test.x[: args.limit], test.y[: args.limit]
    timed("PGD, 32 iterations", len(x), lambda: attacks.pgd(model, x, y, iterations=32))
    x, y = x[:few], y[:few]
    timed(
        "PGD on the margin, 32 iterations",
        few,
        lambda: attacks.pgd(model, x, y, iterations=32, loss="margin"),
    )
    timed("TPGD, 32 iterations", few, lambda: attacks.tpgd(model, x, y, iterations=32))
    timed("Square, 32/255, 1000 queries", few, lambda: attacks.square(model, x, y))
    timed("Square, 8/255, 1000 queries", few, lambda: attacks.square(model, x, y, eps=8 / 255))
    timed(
        "boundary distance, 100 directions", few, lambda: robustness.boundary_distance(model, x, y)
    )
    timed("minimal distance", few, lambda: robustness.minimal_distance(model, x, y))
    machine = environment()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    files.write_json(args.out, {"rows": rows} | machine)


if __name__ == "__main__":
    main()
