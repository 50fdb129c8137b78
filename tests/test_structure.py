"""Which module may import which, which one spells a file's name, and how long a module may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tfjacreg"
MODULES = sorted(PACKAGE.rglob("*.py"))
LIMIT = 400
# Modules that are still longer; one that no longer is has to leave the list.
TOO_LONG: set[str] = set()


def named(path):
    return str(path.relative_to(PACKAGE))


def imports(path):
    """Every module that a file imports, at its top or inside a function."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: -node.level]) + "." if node.level else ""
            module = base + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def of_experiments(name):
    return name.startswith("tfjacreg.experiments")


LIBRARY = [
    path
    for path in MODULES
    if "experiments" not in path.relative_to(PACKAGE).parts and path.name != "__main__.py"
]


@pytest.mark.parametrize("path", LIBRARY, ids=named)
def test_the_library_never_imports_the_experiments(path):
    assert not [name for name in imports(path) if of_experiments(name)]


def test_an_import_of_the_experiments_would_be_seen():
    assert len(LIBRARY) > 10
    for path in (PACKAGE / "__main__.py", ROOT / "train.py", ROOT / "evaluate.py"):
        assert any(map(of_experiments, imports(path)))


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_no_module_is_too_long(path):
    lines = len(path.read_text().splitlines())
    assert (lines > LIMIT) == (named(path) in TOO_LONG), lines


def test_the_heart_is_short():
    assert len((PACKAGE / "jacobian.py").read_text().splitlines()) <= 260


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
