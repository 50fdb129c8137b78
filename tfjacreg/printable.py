"""Text that may be anybody's, for a terminal or a page."""

import unicodedata
from typing import Any, TypeGuard

# Controls, direction marks and other invisible ones, surrogates, and separators of lines.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
_LONGEST_PATH = 4096


def printable(text: str, *, limit: int | None = None) -> str:
    """Writes out what is not seen, such as ESC; line breaks and tabs stay.

    Args:
        text: The text.
        limit: How many characters are shown, at most.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}..."
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in _HIDDEN and c not in "\n\t" else c for c in text
    )


def is_one_line(value: object) -> TypeGuard[str]:
    """Whether a value is a text that is seen whole in one line: what a path of a file may be."""
    return (
        isinstance(value, str)
        and len(value) <= _LONGEST_PATH
        and not {"\n", "\t"} & set(value)
        and printable(value) == value
    )


def shown(value: Any) -> str:
    """A value of a file as Python writes it, for a message, which it does not fill."""
    try:
        return printable(repr(value), limit=200)
    except (RecursionError, ValueError):  # Too deep, or an integer of too many digits.
        return f"one that is too long to show, of type {type(value).__name__}"
