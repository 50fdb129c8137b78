"""Checks that a base install works, and what it costs: packages, disk space, import time.

    python benchmarks/base_install.py                      # the newest versions
    python benchmarks/base_install.py --oldest             # the oldest that pyproject.toml allows
    python benchmarks/base_install.py --json results/base_install.json

It installs the project alone into a fresh virtual environment in a temporary folder and runs
tests/base_session.py there. It needs Python 3.11 or later, and no package.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {"tfjacreg": "import tfjacreg", "tensorflow, keras": "import tensorflow, keras"}
REPETITIONS = 3


def oldest() -> list[str]:
    """The oldest TensorFlow and Keras that pyproject.toml allows, as requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pairs = [re.fullmatch(r"(\w+)>=([\d.]+)", line) for line in project["dependencies"]]
    return [f"{p[1]}=={p[2]}.*" for p in pairs if p and p[1] in ("tensorflow", "keras")]


def install(folder: Path, requirements: list[str]) -> Path:
    """Installs a copy of the project and returns the environment's Python."""
    source = folder / "source"
    source.mkdir()
    # A copy: a build folder that an earlier build left would go into the package.
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    modules = (f"{name}.py" for name in setuptools["py-modules"])
    for name in ("pyproject.toml", "README.md", "LICENSE", *modules):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "tfjacreg", source / "tfjacreg", ignore=shutil.ignore_patterns("__pycache__")
    )
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*map(str, pip), str(source), *requirements], check=True)
    return python


def measure(folder: Path, requirements: list[str]) -> dict[str, Any]:
    """Installs, counts, times and runs the session."""
    python: Any = install(folder, requirements)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    listed = json.loads(_output([*pip, "list", "--format", "json"], folder))
    versions = {p["name"]: p["version"] for p in listed if p["name"] not in ("pip", "setuptools")}
    _output([*pip, "check"], folder)
    site = Path(_output([python, "-c", "import tfjacreg; print(tfjacreg.__path__[0])"], folder))
    if not site.is_relative_to(folder):
        raise RuntimeError(f"Expected tfjacreg in the fresh environment. Received: {site}")
    sizes = {
        path.name: sum(f.lstat().st_size for f in path.rglob("*") if f.is_file())
        for path in site.parent.iterdir()
        if not path.name.startswith(("pip", "setuptools", "_distutils"))
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in IMPORTS}
    for _ in range(REPETITIONS):
        for name, statement in IMPORTS.items():
            start = _clocks()
            _output([python, "-c", statement], folder)
            seconds[name].append(_since(start))
    saved = folder / "session"
    saved.mkdir()
    start = _clocks()
    print(_output([python, ROOT / "tests" / "base_session.py", saved], folder))
    session = _since(start)
    return {
        "python": platform.python_version(),
        **{name: versions[name] for name in ("tensorflow", "keras", "numpy", "ml_dtypes")},
        "packages": len(versions),
        "megabytes": round(sum(sizes.values()) / 1e6),
        "tensorflow_megabytes": round(sizes["tensorflow"] / 1e6),
        "import": {name: _summary(clocks) for name, clocks in seconds.items()},
        "session": _summary([session]),
    }


def _clocks() -> tuple[float, float]:
    """The time of day, and the processor's time that the children of this process have had."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def _since(start: tuple[float, float]) -> tuple[float, float]:
    now = _clocks()
    return now[0] - start[0], now[1] - start[1]


def _summary(clocks: list[tuple[float, float]]) -> dict[str, float]:
    """The medians; the processor's time is the steadier one where others use the machine too."""
    wall, processor = (round(statistics.median(values), 1) for values in zip(*clocks, strict=True))
    return {"seconds": wall, "processor_seconds": processor}


def _output(command: list[Any], folder: Path) -> str:
    """What a command prints. Of one that fails, all of it is shown."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["TF_CPP_MIN_LOG_LEVEL"] = "2"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()
    return done.stdout.strip()


def main() -> None:
    """Measures, prints and writes what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--oldest", action="store_true", help="the oldest TensorFlow and Keras")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder).resolve(), oldest() if args.oldest else [])
    text = json.dumps(figures, indent=2)
    print(text)
    if args.json:
        temporary = args.json.with_name(f".partial-{args.json.name}")
        temporary.write_text(text + "\n")
        os.replace(temporary, args.json)


if __name__ == "__main__":
    main()
