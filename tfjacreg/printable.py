"""Makes text from unknown sources fit for a terminal or a page."""

from typing import Any, TypeGuard

from tfjacreg_startup import printable

_LONGEST_PATH = 4096


def is_one_line(value: object) -> TypeGuard[str]:
    """Whether a value is a text that one line shows whole, as a path in a file must be."""
    return (
        isinstance(value, str)
        and len(value) <= _LONGEST_PATH
        and not {"\n", "\t"} & set(value)
        and printable(value) == value
    )


def shown(value: Any) -> str:
    """A value from a file as Python writes it, cut to fit into a message."""
    try:
        return printable(repr(value), limit=200)
    except (RecursionError, ValueError):  # Nested too deep, or an integer with too many digits.
        return f"one that is too long to show, of type {type(value).__name__}"
