"""The API reference: each public name once, by topic, with the first sentence of its docstring."""

import re
import tomllib
from pathlib import Path

import griffe
import pytest

import tfjacreg

FOLDER = Path(__file__).parents[1] / "docs" / "api"
PAGES = sorted(set(FOLDER.glob("*.md")) - {FOLDER / "README.md"})
README = (FOLDER / "README.md").read_text()
# Of these modules a page shows all that is public; of others what it names.
MODULES = ("regularizers", "callbacks", "attacks", "robustness", "networks", "datasets")
RUNS = ("experiments.config", "experiments.run", "experiments.sweep")
# `norms` is the module of the three functions that the package exports.
EXPORTED = set(tfjacreg.__all__) - {"norms", *MODULES}


@pytest.fixture(scope="module")
def package():
    return griffe.load("tfjacreg", search_paths=[str(FOLDER.parents[1])], docstring_parser="google")


def shown(page):
    """What a page shows, without the name of the package."""
    return re.findall(r"^::: tfjacreg\.(\S+)$", page.read_text(), re.M)


def public(package, name):
    """The functions and classes of a module that its page shows."""
    for member in package[name].members.values():
        is_own = not member.is_alias and not member.name.startswith("_")
        if is_own and member.has_docstring and (member.is_function or member.is_class):
            yield member.name


def test_every_public_name_is_on_one_page():
    names = sorted(name for page in PAGES for name in shown(page))
    assert names == sorted({*EXPORTED, *MODULES, *RUNS})


def test_the_first_page_lists_all_with_their_first_sentence(package):
    listed = re.findall(r"^\| \[`(.*?)`\]\((\w+\.md#\S+)\) \| (.*) \|$", README, re.M)
    expected = []
    for page in PAGES:
        for name in shown(page):
            members = public(package, name) if name in (*MODULES, *RUNS) else [""]
            for member in members:
                whole = f"{name}.{member}".strip(".")
                text = package[whole].docstring.value.split("\n\n")[0]
                sentence = " ".join(text.split()).replace("||", "‖")  # A bar ends a cell.
                expected.append((f"tfjacreg.{whole}", f"{page.name}#tfjacreg.{whole}", sentence))
    assert sorted(listed) == sorted(expected)


def test_docstrings_are_those_that_the_site_can_read(package):
    """What it is built from: arguments, results and errors as sections."""
    operator = package["JacobianOperator"].final_target
    kinds = [section.kind.value for section in operator["rmatvec"].docstring.parsed]
    assert kinds == ["text", "parameters", "returns", "raises"]
    assert package["spectral_norm"].final_target.parameters["method"].default == "'lanczos'"


def test_the_site_is_built_without_a_warning():
    """`mkdocs build` is run by `.ci/run`: here that it is strict, and that all pages are in it."""
    root = FOLDER.parents[1]
    settings = (root / "mkdocs.yml").read_text()
    assert "\nstrict: true\n" in settings
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert any("mkdocs" in line for line in extras["optional-dependencies"]["docs"])
    in_nav = set(re.findall(r"^ +- (?:.*: )?(\S+\.md)$", settings, re.M))
    pages = {*root.glob("docs/**/*.md"), *root.glob("results/**/*.md"), *root.glob("*.md")}
    assert in_nav >= {str(page.relative_to(root)) for page in pages}
