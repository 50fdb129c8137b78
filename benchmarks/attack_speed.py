"""Times every measure of evaluate.py on one classifier, and records its peak memory.

python benchmarks/attack_speed.py runs/none --out results/attack_speed.json

Linux only: other systems cannot reset the peak memory of a process.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import _memory
import _setup  # noqa: F401

from tfjacreg import datasets
from tfjacreg.experiments import evaluation, files, measures
from tfjacreg.experiments.environment import environment

SEED = 0


def main() -> None:
    """Prints and writes seconds and peak memory, and the memory of the process before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--limit", type=int, default=1000, help="test images (1000)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    (target,) = evaluation.find_targets([args.run], data_dir=args.data_dir)
    test = datasets.load(target.dataset, target.data_dir).test
    x, y = test.x[: args.limit], test.y[: args.limit]
    model = evaluation.load(target.classifier)

    before = _memory.gib("VmRSS")
    print(f"memory before: {before:.2f} GiB")
    print(f"{'measure':12} {'images':>7} {'seconds':>8} {'images/s':>9} {'peak memory':>12}")
    rows: list[dict[str, Any]] = []
    for name in (*measures.PERTURBATIONS, *measures.POINTWISE):
        forget_peak()
        started = time.perf_counter()
        measures.measure(name, model, x, y, SEED, name)
        seconds = time.perf_counter() - started
        peak = _memory.gib()
        rows.append({"measure": name, "images": len(x), "seconds": seconds, "peak_gib": peak})
        print(f"{name:12} {len(x):7} {seconds:8.1f} {len(x) / seconds:9.1f} {peak:8.2f} GiB")
    machine = environment()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    files.write_json(args.out, {"rows": rows, "before_gib": before, "environment": machine})


def forget_peak() -> None:
    """Lets the peak of the process start from what it takes now."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
