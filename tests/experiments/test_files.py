"""Files written whole, JSON that a reader can scroll, and the committed results in that form."""

import json
from pathlib import Path

import pytest

from tfjacreg import atomic_files
from tfjacreg.experiments import files

RESULTS = sorted((Path(__file__).parents[2] / "results").rglob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_results_are_as_they_would_be_written(path):
    text = path.read_text()
    assert files.json_text(json.loads(text)) == text


def test_lists_of_numbers_are_on_one_line(tmp_path):
    content = {
        "numbers": [1, -2.5, 1e-20, None, True],
        "strings": ["a, b", "c"],
        "rows": [{"a": [0.1, 0.2]}, {"a": []}],
        "nested": [[1, 2], [3]],
        "text": "[\n  1,\n  2\n]",
        "escaped": '"[\\n 1,\\n 2\\n]"',
    }
    files.write_json(tmp_path / "new" / "some.json", content)
    text = (tmp_path / "new" / "some.json").read_text()
    assert json.loads(text) == content == files.read_json(tmp_path / "new" / "some.json")
    assert '  "numbers": [1, -2.5, 1e-20, null, true],\n' in text
    assert '      "a": [0.1, 0.2]\n' in text and "    [1, 2],\n    [3]\n" in text
    # Of strings each has a line: they may be long.
    assert '  "strings": [\n    "a, b",\n    "c"\n  ],\n' in text


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("old")

    def interrupted():
        with atomic_files.replacing(path) as file:
            file.write_text("half")
            assert file.parent == tmp_path and file.suffix == ".txt"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_files.replacing(path) as file:
        file.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_names_are_checked_before_the_work(tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "file").write_text("")
    atomic_files.check_files(tmp_path / "b.png", tmp_path / "new" / "folder" / "b.png")
    with pytest.raises(IsADirectoryError, match="a.png must be a file. Received: a folder"):
        atomic_files.check_files(tmp_path / "b.png", tmp_path / "a.png")
    with pytest.raises(NotADirectoryError, match="file must be a folder. Received: a file"):
        atomic_files.check_files(tmp_path / "file" / "new" / "a.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "some.json cannot be read"),
        (b"{", "some.json is not JSON"),
        (b"\xff\xfe", "some.json is not JSON"),
        (b"[1]", "some.json must hold a JSON object. Received: list."),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "some.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.read_json(tmp_path / "some.json")
