"""Builds the wheel and the source distribution, and uses them as those who get them would.

    python .ci/distributions.py

The source distribution must hold every file of the project except the hidden ones; its tests are
collected, and a quick part of them run, in the unpacked folder. The wheel is installed on Python
3.11 beside this environment's packages, and into fresh environments of 3.12 and 3.13 with all it
depends on; there `tests/base_session.py` measures, trains, saves and loads. Needs what the extra
`test` installs, and `python3.12` and `python3.13` on the path or among pyenv's versions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEWER = ("3.12", "3.13")
# Quick ones, of the package, of the files beside it and of the experiments.
PART = ["tests/test_structure.py", "tests/test_signature.py", "tests/experiments/test_reading.py"]


def call(*command: object, folder: Path, path: Path | None = None) -> str:
    """Runs a command and returns what it prints; shows that where it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
        sys.exit(f"{' '.join(map(str, command))} ended with status {done.returncode}.")
    return done.stdout.strip()


def tracked() -> list[str]:
    """The project's files: those that git knows, or all that are there in a copy without it."""
    if (ROOT / ".git").exists():
        return call("git", "ls-files", "-z", folder=ROOT).split("\0")[:-1]
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
    made = ("__pycache__", "build", "dist", "runs", "out", "site")
    return [
        str(path)
        for path in paths
        if path.parts[0] not in made
        and not any(
            part.startswith(".") or part.endswith((".egg-info", *made[:1])) for part in path.parts
        )
    ]


def built(folder: Path) -> tuple[Path, Path]:
    """The wheel, made out of the source distribution, and that one, unpacked."""
    source = folder / "source"  # A copy of what is tracked: no folder of an earlier build goes in.
    source.mkdir()
    files = [name for name in tracked() if (ROOT / name).is_file()]
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    call(sys.executable, "-m", "build", "--outdir", folder / "dist", source, folder=folder)
    (archive,), (wheel,) = ((folder / "dist").glob(f"*{end}") for end in (".tar.gz", ".whl"))
    (folder / "unpacked").mkdir()
    call("tar", "-xf", archive, folder=folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    lacking = [n for n in files if not n.startswith(".") and not (unpacked / n).is_file()]
    if lacking:
        sys.exit(f"The source distribution lacks {lacking[:9]}: see MANIFEST.in.")
    print(f"{archive.name} has all {len(files)} files, {wheel.name} is made of it")
    return wheel, unpacked


def interpreter(version: str) -> Path:
    """A Python of this version; on the path pyenv has names that lead nowhere."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places = [*map(Path, os.get_exec_path()), *sorted(versions.glob(f"{version}.*/bin"))]
    for path in (place / f"python{version}" for place in places):
        if (
            path.exists()
            and not subprocess.run([path, "--version"], capture_output=True).returncode
        ):
            return path
    sys.exit(f"There is no python{version}: install it, or put it on the path.")


def use(folder: Path, wheel: Path, session: Path) -> None:
    """Runs the session with the wheel on each Python."""
    installed = folder / "installed"
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    call(sys.executable, *pip, "--no-deps", "--target", installed, wheel, folder=folder)
    pythons = [(sys.executable, installed)]
    for version in NEWER:
        found = interpreter(version)
        environment = folder / version
        call(found, "-m", "venv", environment, folder=folder)
        python = environment / "bin" / "python"
        call(python, *pip, wheel, folder=folder)
        pythons.append((str(python), None))
    for python, path in pythons:
        began = time.monotonic()
        saved = folder / f"saved-{len(list(folder.iterdir()))}"
        saved.mkdir()
        code = "import sys, tfjacreg; print(sys.version.split()[0], tfjacreg.__path__[0])"
        version, _, place = call(python, "-c", code, folder=folder, path=path).partition(" ")
        if not Path(place).is_relative_to(folder):
            sys.exit(f"Expected tfjacreg out of the wheel. Received: {place}")
        print(call(python, session, saved, folder=folder, path=path).splitlines()[0])
        print(f"Python {version}: the session took {time.monotonic() - began:.0f} s")


def main() -> None:
    """Builds and uses both."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        wheel, unpacked = built(folder)
        pytest = [sys.executable, "-m", "pytest", "-q", "-n", "0"]
        place = "import tfjacreg; print(tfjacreg.__path__[0])"
        if not Path(call(sys.executable, "-c", place, folder=unpacked)).is_relative_to(unpacked):
            sys.exit("The tests of the source distribution would import another tfjacreg.")
        print(call(*pytest, "--collect-only", folder=unpacked).splitlines()[-1])
        print(call(*pytest, *PART, folder=unpacked).splitlines()[-1])
        use(folder, wheel, unpacked / "tests" / "base_session.py")


if __name__ == "__main__":
    main()
