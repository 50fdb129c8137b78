"""Which module may import which, what is installed, and who spells a run folder's file names."""

import ast
import graphlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tfjacreg"
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """Every module that a file imports, at its top or inside a function."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: -node.level] if node.level else ()
            for alias in node.names:
                yield ".".join(filter(None, (*base, node.module, alias.name)))


def within(name, packages):
    """Whether a dotted name is one of these packages or modules, or lies in one of them."""
    return any(f"{name}.".startswith(f"tfjacreg.{package}.") for package in packages)


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def graph():
    """The modules of the package that each of them imports."""
    names = {dotted(path) for path in MODULES}
    found = {}
    for path in MODULES:
        # `from package import name` imports a module, or what is in the package's own.
        known = (name if name in names else name.rpartition(".")[0] for name in imports(path))
        found[dotted(path)] = names.intersection(known)
    return found


def test_the_imports_form_no_circle():
    graphlib.TopologicalSorter(graph()).prepare()  # Its error names the circle.


def test_a_circle_would_be_seen():
    imported = graph()
    assert "tfjacreg.vectors" in imported["tfjacreg.norms"]
    imported["tfjacreg.vectors"].add("tfjacreg.norms")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(imported).prepare()


# What the modules of a package do not import. `__main__` is a command, no part of the library.
LIBRARY = [path for path in MODULES if not within(dotted(path), ["experiments", "__main__"])]
NEVER = {
    "library": (LIBRARY, ["experiments"]),
    "judging": (sorted(PACKAGE.glob("judging/*.py")), ["attacks", "robustness"]),
    "rewrites": (sorted(PACKAGE.glob("rewrites/*.py")), ["jacobian", "checks", "model"]),
}


@pytest.mark.parametrize("package", NEVER)
def test_imports_point_one_way(package):
    paths, above = NEVER[package]
    wrong = {dotted(path): [n for n in imports(path) if within(n, above)] for path in paths}
    assert not any(wrong.values()), wrong


def test_an_import_that_points_up_would_be_seen():
    assert len(LIBRARY) > 10
    for path in (PACKAGE / "__main__.py", ROOT / "train.py", ROOT / "evaluate.py"):
        assert any(within(name, ["experiments"]) for name in imports(path))
    assert any(within(name, ["attacks"]) for name in imports(PACKAGE / "__init__.py"))


def test_every_package_is_installed():
    """An editable install finds a package that `pyproject.toml` does not list; others do not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {dotted(path) for path in MODULES if path.name == "__init__.py"}
    assert found == set(project["tool"]["setuptools"]["packages"])


FILES = (
    "config.json",
    "history.csv",
    "checkpoint.keras",
    "classifier.keras",
    "saved_model",
    "metrics.json",
    "evaluation.json",
    "adversarial_examples.png",
    "error.txt",
)


def strings(path):
    """The strings in a file's code; docstrings may name what they please."""
    tree = ast.parse(path.read_text())
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(first.value)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node not in docstrings
        ):
            yield node.value


def test_a_run_folder_has_one_owner():
    """The names of its files are spelled in one module; a message or a help text may have them."""
    spelled = {
        (path.name, text)
        for path in (*MODULES, *ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py"))
        for text in strings(path)
        if text.strip("*./") in FILES
    }
    assert spelled == {("folder_reader.py", name) for name in FILES}
