"""Stops commands by every signal at random moments, as tests/experiments/test_kills.py does.

    python benchmarks/random_kills.py                       # 40 kills, another seed each time
    python benchmarks/random_kills.py --seed 4711 --json results/random_kills.json

train.py, a sweep with two workers, evaluate.py, `report` and `prepare` are stopped as often as
`--kills` says. Afterwards the same command must give what an undisturbed one gives, to the byte,
and leave nothing behind. A seed repeats which signal comes when; what a process is doing then
depends on the machine. A process that ended before its signal is not counted. The record names each
kill.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tfjacreg import atomic_files
from tfjacreg.experiments import files
from tfjacreg.experiments.environment import environment

ROOT = Path(__file__).resolve().parents[1]
_KILL = re.compile(r"^kill: (\w+), (\w+) (.*): status (-?\d+)$", re.MULTILINE)


def run(kills: int, seed: int) -> dict[str, Any]:
    """Kills processes and returns the record; raises RuntimeError where a test fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-s"]
    command += [f"--kills={kills}", f"--moments={seed}", "tests/experiments/test_kills.py"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    found = [
        {"command": m[1], "signal": m[2], "moment": m[3], "status": int(m[4])}
        for m in _KILL.finditer(done.stdout)
    ]
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\nFailed with --kills {kills} --moments {seed}.")
    signals = Counter(str(kill["signal"]) for kill in found)
    return {
        "seed": seed,
        "kills": len(found),
        "signals": dict(sorted(signals.items())),
        "each": found,
        "environment": environment(),
    }


def main() -> None:
    """Kills, prints the record and writes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40, help="how many processes (40)")
    parser.add_argument("--seed", type=int, help="of signals and moments; the default is random")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there too")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**9) if args.seed is None else args.seed
    text = files.json_text(run(args.kills, seed))
    print(text)
    if args.json:
        with atomic_files.replacing(args.json) as file:
            file.write_text(text)


if __name__ == "__main__":
    main()
