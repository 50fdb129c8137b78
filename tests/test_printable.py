"""Text of others shows all that is in it."""

import pytest

from tfjacreg import cli
from tfjacreg.printable import printable

HIDDEN = ["\x1b", "\x07", "\x00", "\r", "\x7f", "\x9b", "\u202e", "\u2066", "\u200f", "\ud800"]
HIDDEN += ["\u2028", "\u2029", "\u200b", "\ufeff", "\ue000"]


@pytest.mark.parametrize("character", HIDDEN)
def test_what_is_not_seen_is_written_out(character, capsys):
    shown = printable(f"a{character}b")
    assert character not in shown and shown.startswith("a\\") and shown.endswith("b")

    def main():
        raise ValueError(f"a{character}b")

    assert cli.run("name", main, lambda: "Stopped.") == 2
    assert capsys.readouterr().err == f"name: error: {shown}\n"


@pytest.mark.parametrize("text", ["", "a b", "one\ntwo\tthree", "ä ß 数 π é"])
def test_what_is_seen_stays(text):
    assert printable(text) == text


def test_a_long_text_is_cut():
    assert printable("x" * 9, limit=3) == "xxx..."
