"""docs/api.md says what the docstrings say."""

import importlib.util
import re
from pathlib import Path

import pytest

import tfjacreg

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text()


@pytest.fixture(scope="module")
def rendered():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.render()


def test_the_page_is_up_to_date(rendered):
    assert rendered == PAGE, "Run `python docs/make_api.py`."


def test_every_exported_name_is_there():
    titles = re.findall(r"^#+ (\S+)$", PAGE, re.M)
    for name in set(tfjacreg.__all__) - {"norms"}:
        assert {name, f"tfjacreg.{name}"} & set(titles), name


def test_links_lead_somewhere():
    links = re.findall(r"\]\(#(.*?)\)", PAGE)
    anchors = re.findall(r'<a id="(.*?)">', PAGE)
    headings = [title.replace(".", "") for title in re.findall(r"^## (.*)$", PAGE, re.M)]
    assert len(links) > 40 and len(set(anchors)) == len(anchors)
    assert set(links) == {*anchors, *headings}


@pytest.mark.parametrize(
    "expected",
    [
        # Of a class the constructor's arguments, of a function its result and errors, of a
        # dataclass its fields; private names are not there.
        "tfjacreg.regularizers.WeightDecay(factor: Factor",
        "`Factor` is a number or a",
        "- `u`: Cotangents, `[B, *out]`.",
        "**Returns** `[B, *in]`, in the dtype of `x`.",
        "- `ValueError`: If `u` has another shape than `primal`.",
        "    dataset: str = 'digits',",
    ],
)
def test_what_a_reader_looks_for(expected):
    assert expected in PAGE


def test_nothing_private():
    assert not re.findall(r"^#+ _(?!_call__)", PAGE, re.M)
