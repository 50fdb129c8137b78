"""Text that may be anybody's, for a terminal or a page."""

from typing import Any, TypeGuard

from tfjacreg_startup import printable

_LONGEST_PATH = 4096


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
