"""What README.md and docs/ tell a reader to type."""

import contextlib
import re
from pathlib import Path

import keras
import pytest

import evaluate
import tfjacreg
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_example_runs(fresh_python, tmp_path):
    example = re.findall(r"```python\n(import keras.*?)```", README, re.DOTALL)
    assert len(example) == 1 and len(example[0].splitlines()) <= 12
    printed = fresh_python.run(example[0], cwd=tmp_path).stdout
    assert "penalty" in printed and "shape=(5,)" in printed
    assert (tmp_path / "network.keras").exists()


def test_the_readme_is_short():
    assert len(README.split()) <= 1000


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "results").rglob("README.md")),
    ROOT / "benchmarks" / "NOTES.md",
    ROOT / "tests" / "README.md",
]


def anchors(page):
    """The anchors that GitHub gives the headings of a page, and those set by hand."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    kept = (re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return {*kept, *re.findall(r'<a id="(.*?)">', text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_links_name_files_that_exist(page):
    text = page.read_text()
    for name in re.findall(r"python ((?:\w+/)?\w+\.py)", text):
        assert (ROOT / name).exists(), name
    for name, anchor in re.findall(r"\]\(([\w/.-]+)(?:#([\w-]+))?\)", text):
        assert (page.parent / name).exists(), name
        assert not anchor or anchor in anchors(page.parent / name), f"{name}#{anchor}"
    for name in re.findall(r"`((?:sweeps|docs|results|benchmarks|tests)/[\w/.-]+\.\w+)", text):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_index():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README, page.name


def test_every_promise_about_files_from_others_names_its_test():
    """A sentence in each row, a test for each sentence, and nothing else on the page but limits."""
    text = (ROOT / "docs" / "files_from_others.md").read_text()
    promised, limits = text.split("## What we do not promise")
    intro, *sections = re.split(r"^## ", promised, flags=re.M)
    assert len(sections) == 6 and intro.count(". ") + intro.count(".\n") <= 4 and limits
    for section in sections:
        _, _, head, rule, *rows = section.strip().splitlines()
        assert (head, rule) == ("| promise | test |", "|---|---|") and rows
        for row in rows:
            sentence, tests = re.fullmatch(r"\| (.+\.) \| (.+) \|", row).groups()
            assert not re.search(r"[.!?] [A-Z]", sentence), sentence
            for name in tests.split(", "):
                file, function = re.fullmatch(r"`([\w/]+\.py)::(test_\w+)`", name).groups()
                code = (ROOT / "tests" / file).read_text()
                assert f"\ndef {function}(" in code, name


def test_tests_that_the_page_of_layers_names():
    text = (ROOT / "docs" / "layers.md").read_text()
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for file, name in re.findall(r"`(?:tests/)?(\w+\.py)::(\w+)", text):
        assert re.search(rf"\b(def|class) {name}\b", files[file]), f"{file}::{name}"
    named = re.findall(r"\b(test_\w+)`", text)
    assert len(named) > 20
    for name in named:
        assert f"def {name}(" in "".join(files.values()), name


def examples(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_guide_runs(fresh_python, tmp_path):
    """Its blocks one after the other."""
    blocks = examples("guide.md")
    assert len(blocks) == 6
    show = "print(len(gradients), float(penalty), t.sigma.shape, op.primal.shape)"
    printed = fresh_python.run("\n".join([*blocks, show]), cwd=tmp_path).stdout
    assert (tmp_path / "network.keras").exists() and (tmp_path / "run.keras").exists()
    count, penalty, *shapes = printed.split("\n")[-2].split(maxsplit=2)
    assert int(count) == 6 and float(penalty) > 0
    assert shapes == ["(4,) (256, 5)"]


@pytest.mark.slow
def test_the_blocks_of_the_page_for_those_who_come_run(fresh_python, tmp_path):
    """One after the other; what they measure is what the page says."""
    blocks = examples("coming_from.md")
    assert len(blocks) == 9
    fresh_python.run("\n".join(blocks), cwd=tmp_path)


def test_the_call_on_the_page_of_layers_runs():
    """It is a method; without its `hold_constant` the layer would be refused."""
    (block,) = examples("layers.md")
    for text, mixes in (
        (block, False),
        (block.replace("tfjacreg.hold_constant()", "none()"), True),
    ):
        known = {"ops": keras.ops, "tfjacreg": tfjacreg, "none": contextlib.nullcontext}
        exec(text, known)
        layer = type("Layer", (keras.layers.Layer,), {"call": known["call"]})()
        x = keras.random.normal((4, 3))
        with pytest.raises(ValueError, match="mixes") if mixes else contextlib.nullcontext():
            tfjacreg.check_network(layer, x)


def test_every_page_with_blocks_is_run():
    pages = {page.name for page in (ROOT / "docs").glob("*.md") if examples(page.name)}
    assert pages == {"guide.md", "sweeps.md", "coming_from.md", "layers.md", "own_data.md"}


@pytest.mark.slow
def test_the_data_and_the_network_of_the_walk_are_made(fresh_python, tmp_path):
    (example,) = examples("own_data.md")
    fresh_python.run(example, cwd=tmp_path)
    assert (tmp_path / "mine.npz").exists() and (tmp_path / "mine.keras").exists()


@pytest.mark.slow
def test_the_example_of_several_gpus_runs(fresh_python, tmp_path):
    (example,) = (block for block in examples("sweeps.md") if "MirroredStrategy" in block)
    assert "penalty" in fresh_python.run(example, cwd=tmp_path).stdout


@pytest.mark.parametrize(("page", "script"), [("training.md", train), ("evaluating.md", evaluate)])
def test_options_in_the_docs_are_options_of_the_script(capsys, page, script):
    """Every --option on the lines of the script's synopsis is in its --help."""
    text = (ROOT / "docs" / page).read_text()
    synopsis = re.search(rf"```\n(python {script.__name__}.py .*?)```", text, re.DOTALL).group(1)
    with pytest.raises(SystemExit):
        script.main(["--help"])
    described = capsys.readouterr().out
    options = re.findall(r"--[\w-]+", synopsis)
    assert len(options) >= 5
    for option in options:
        assert option in described
