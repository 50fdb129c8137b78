"""Shared parts of benchmarks of many networks: rows, processes, and the table of the page."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _setup  # noqa: F401

from tfjacreg import atomic_files
from tfjacreg.experiments import files
from tfjacreg.experiments.environment import environment

ROOT = Path(__file__).parents[1]


class Rows(NamedTuple):
    """A benchmark whose results have a row for each network, made of several parts.

    Attributes:
        key: Of the rows in the JSON file, and the option that chooses among them.
        names: The networks, in the order of the rows.
        parts: What can be measured of each.
        timed: Those parts whose figures belong to this machine.
        repeats: How many steps are timed, unless the command says so; 0 if none are.
        json: The file of the results.
        page: The page with the table.
        in_a_process: What the script runs in processes of its own, by name.
        measured: One part of a row: called with the network, the part and the repeats.
        with_table: The page with the table of the results in it.
    """

    key: str
    names: Sequence[str]
    parts: Sequence[str]
    timed: Sequence[str]
    repeats: int
    json: Path
    page: Path
    in_a_process: dict[str, Callable[..., Any]]
    measured: Callable[[str, str, int], Any]
    with_table: Callable[[str, dict[str, Any]], str]

    def main(self, description: str | None) -> None:
        """Fills in the results, row by row, and writes the table."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        names, parts = list(self.names), list(self.parts)
        parser.add_argument(f"--{self.key}", nargs="+", choices=names, default=names, dest="names")
        parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
        parser.set_defaults(repeats=self.repeats)
        if self.repeats:
            parser.add_argument(
                "--repeats", type=int, default=self.repeats, help="steps that are timed"
            )
        parser.add_argument("--redo", action="store_true", help="also what is there already")
        parser.add_argument("--json", type=Path, default=self.json)
        parser.add_argument("--page", type=Path, default=self.page)
        parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
        arguments = parser.parse_args()
        if arguments.run:
            part, *rest = arguments.run
            print(json.dumps(self.in_a_process[part](*rest)))
            return
        content = files.read_json(arguments.json) if arguments.json.exists() else {self.key: {}}
        for name in arguments.names:
            for part in arguments.parts:
                row = content[self.key].setdefault(name, {})
                if part in row and not arguments.redo:
                    continue
                row[part] = self.measured(name, part, arguments.repeats)
                if part in self.timed:
                    content["environment"] = environment()
                print(name, part, json.dumps(row[part]), flush=True)
                known = content[self.key]
                content[self.key] = {n: known[n] for n in self.names if n in known}
                files.write_json(arguments.json, content)
        page = arguments.page.read_text(encoding="utf-8")
        with atomic_files.replacing(arguments.page) as file:
            file.write_text(self.with_table(page, content), encoding="utf-8")


def in_a_process(script: str, *command: str) -> Any:
    """What a script of `Rows` runs in a fresh process, on as few threads as this one."""
    done = subprocess.run(
        [sys.executable, script, "--run", *command], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def python_with(folder: Path, *requirements: str) -> Path:
    """The Python of a virtual environment with some packages; made where it is not there yet."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements], check=True)
    return python


def between(page: str, begin: str, end: str, table: str) -> str:
    """The page with the table between two marks."""
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table}\n{end}{after}"
