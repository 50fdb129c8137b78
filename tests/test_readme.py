"""What README.md and docs/ tell a reader to type."""

import collections
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
    *sorted(ROOT.glob("*.md")),
    *(
        page
        for folder in ("docs", "results", "benchmarks", "tests", "examples", "sweeps")
        for page in sorted((ROOT / folder).rglob("*.md"))
    ),
]


def prose(page):
    """A page without its blocks of code, in which nothing is a heading or a link."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.M)


def anchors(page):
    """The anchors of a page: as GitHub makes them of headings, and those set by hand."""
    found = collections.Counter()
    for heading in re.findall(r"^#+ +(.*?) *$", prose(page), re.M):
        shown = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w -]", "", shown).replace(" ", "-")
        if found[anchor]:
            found[f"{anchor}-{found[anchor]}"] += 1
        found[anchor] += 1
    return {*found, *re.findall(r'<a id="(.*?)">', prose(page))}


def has_anchor(page, anchor):
    """Whether a page has it. What a page of the API shows has the names below it, too."""
    shown = re.findall(r"^::: (\S+)$", prose(page), re.M)
    return anchor in anchors(page) or any(f"{anchor}.".startswith(f"{name}.") for name in shown)


def broken_links(page):
    """The links of a page that lead to no file, to no heading, or to no address."""
    text = prose(page)
    for link in re.findall(r"\]\((.*?)\)|<(https?:.*?)>|(?:href|src)=\"(.*?)\"", text):
        (link,) = filter(None, link)
        name, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            if not re.fullmatch(r"https://(\w[\w-]*\.)+[a-z]{2,}(/[\w./~%?=&#+-]*[\w/])?", link):
                yield link
            continue
        target = page.parent / name if name else page
        if not target.exists() or (anchor and not has_anchor(target, anchor)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert list(broken_links(page)) == []


def test_a_broken_link_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    good = ["page.md#a-call-of-f", "#a-call-of-f-1", "#set", "#tfjacreg.networks.get"]
    good += ["https://a.org/b_c/#d", "page.md"]
    bad = [
        "other.md",
        "page.md#a-call",
        "#a-call-of-f-2",
        "http://a.org",
        "https://a",
        "https://a.b c",
    ]
    page.write_text(
        '# A call, of `f`\n# A [call](page.md) of f!\n<a id="set">\n::: tfjacreg.networks\n'
        "```\n# no heading\n[no link](nowhere.md)\n```\n"
        + "".join(f"[x]({link})\n" for link in good + bad)
    )
    assert list(broken_links(page)) == bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_files_that_a_page_names_exist(page):
    text = page.read_text()
    for name in re.findall(r"python ((?:\w+/)?\w+\.py)", text):
        assert (ROOT / name).exists(), name
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
