"""Wrong values for every field of a file in JSON, in TOML or with numbers in lines."""

import copy
import json
import math

# At least eight for each kind of field; each has the wrong type or exceeds any sensible limit.
WRONG = {
    "null": None,
    "true": True,
    "a word": "x",
    "an empty string": "",
    "NaN": math.nan,
    "infinity": -math.inf,
    "negative": -7,
    "a fraction": 0.123456,
    "huge": 10**400,
    "beyond single precision": 1e300,
    "an empty list": [],
    "an empty object": {},
    "nested": [[[{"a": [[]]}]]],
    "deep": None,  # Filled in below.
    "a list of words": ["x", "y"],
    "controls": "\x1b]0;title\x07\x1b[2J\r\n\x00",
    "direction marks": "\u202egnp.exe\u2066\u200b",
    "a half": "\ud800",
    "a long string": "a" * 30_000,
    "markup": "<script>alert(1)</script>![x](/etc/passwd)$\\frac{1}{0}$ | \n# a",
    "another file": "../../../../etc/passwd",
}
for _ in range(300):
    WRONG["deep"] = [WRONG["deep"]]


def fields(content, path=()):
    """Every field of JSON content, including objects and lists, as the keys that lead to it."""
    items = content.items() if isinstance(content, dict) else enumerate(content[:1])
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from fields(value, (*path, key))


def changed(content, path, value):
    """The content with another value for a field."""
    result = copy.deepcopy(content)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


def without(content, path):
    """The content without a field."""
    result = copy.deepcopy(content)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return result


def in_json(content):
    """A name and a file's text for every field with every wrong value, and without the field."""
    for path in fields(content):
        name = ".".join(map(str, path))
        yield f"without {name}", json.dumps(without(content, path))
        for kind, value in WRONG.items():
            yield f"{name} is {kind}", json.dumps(changed(content, path, value))


def in_lines(text):
    """The same for every column of numbers in lines, in the first and last line."""
    head, *rows = text.splitlines()
    for line in (0, len(rows) - 1):
        cells = rows[line].split(",")
        for column, name in enumerate(head.split(",")):
            for kind, value in WRONG.items():
                cell = value if isinstance(value, str) else json.dumps(value)
                quoted = '"' + cell.replace('"', '""') + '"'
                row = ",".join([*cells[:column], quoted, *cells[column + 1 :]])
                lines = [head, *rows[:line], row, *rows[line + 1 :]]
                told = f"{name} is {kind} in line {line + 1}"
                yield told, ("\r\n".join(lines) + "\r\n").encode(errors="surrogatepass")
    for column, name in enumerate(head.split(",")):
        names = head.split(",")
        names[column] = "\x1b[2J"
        yield f"{name} has another name", "\r\n".join([",".join(names), *rows, ""]).encode()


def in_toml(value):
    """A value of JSON as TOML writes it; None if TOML has no such value."""
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "nan" if math.isnan(value) else repr(value)
    if isinstance(value, list):
        items = [in_toml(item) for item in value]
        return None if None in items else f"[{', '.join(items)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k} = {in_toml(v)}' for k, v in value.items())}}}"
    if isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            return '"\\ud800"'  # Which TOML refuses.
        return json.dumps(value)
    return str(value)
