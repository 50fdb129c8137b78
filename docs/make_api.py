"""Writes docs/api.md, the API reference, from the docstrings.

python docs/make_api.py
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import griffe

ROOT = Path(__file__).parents[1]
PACKAGE = "tfjacreg"
# A griffe.Module, Class, Function, Attribute or Alias of one: each has names of its own.
Node: TypeAlias = Any
# In the order of a reader's need: measure and train, judge, run many. Of the experiments only what
# a script of one's own may call.
MODULES = (
    "regularizers",
    "callbacks",
    "attacks",
    "robustness",
    "networks",
    "datasets",
    "experiments.config",
    "experiments.run",
    "experiments.sweep",
)
HEAD = """\
# API reference

Written by `python docs/make_api.py` from the docstrings. Shapes stand in brackets: `[B, *in]` is a
batch of inputs, `[B, *out]` one of outputs. Everything after a lone `*` is given by its keyword.
`Factor` is a number or a `keras.optimizers.schedules.LearningRateSchedule`; `Name` a position, a
key or a name; `Key` two integers, a seed and a number; `State` a list of tensors; `Progress` a
function of a number.
"""


def render() -> str:
    """The whole page."""
    package = griffe.load(PACKAGE, search_paths=[str(ROOT)], docstring_parser="google")
    exported = [package[str(name)] for name in package.exports or []]
    own = [_target(member) for member in exported if not _target(member).is_module]
    sections = [(PACKAGE, package, own)]
    for name in MODULES:
        module = package[name]
        public = [m for m in module.members.values() if _documented(m) and m not in own]
        sections.append((f"{PACKAGE}.{name}", module, public))
    lines = [HEAD]
    for title, _, members in sections:
        names = ", ".join(f"[{m.name}](#{_anchor(title, m)})" for m in members)
        lines.append(f"- [{title}](#{title.replace('.', '')}): {names}")
    for title, module, members in sections:
        lines += ["", f"## {title}", "", *_text(module)]
        for member in members:
            lines += [f'<a id="{_anchor(title, member)}"></a>', "", *_object(member, 3, title)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _target(member: Node) -> Node:
    return member.final_target if member.is_alias else member


def _documented(member: Node) -> bool:
    if member.is_alias or not member.has_docstring:
        return False
    kind = member.is_function or member.is_class or "property" in member.labels
    return kind and (not member.name.startswith("_") or member.name == "__call__")


def _anchor(title: str, member: Node) -> str:
    return f"{title}.{member.name}"


def _object(member: Node, level: int, owner: str) -> Iterator[str]:
    """A class or function: its signature, its docstring and, of a class, its methods."""
    yield f"{'#' * level} {member.name}"
    yield ""
    if "property" in member.labels:
        yield from ["```python", f"{owner}.{member.name}: {member.annotation}", "```", ""]
    else:
        yield from ["```python", *_signature(member, owner), "```", ""]
    yield from _text(member)
    for child in member.members.values() if member.is_class else ():
        if _documented(child):
            yield from _object(child, level + 1, member.name)


def _signature(member: Node, owner: str) -> list[str]:
    """One line if it is short, otherwise a line for each parameter."""
    function = member
    if member.is_class:
        function = member.all_members.get("__init__")
        if function is None:
            # The fields of a named tuple, or an exception.
            fields = [m for m in member.members.values() if m.is_attribute and m.annotation]
            parts = [f"{m.name}: {m.annotation}" for m in fields if not m.labels & {"property"}]
            return _wrapped(
                f"{owner}.{member.name}", parts or [str(base) for base in member.bases], ""
            )
    parts = []
    keyword_only = False
    for parameter in function.parameters:
        if parameter.name in ("self", "cls") and function.parent.is_class:
            continue
        star = {"variadic positional": "*", "variadic keyword": "**"}.get(parameter.kind.value, "")
        if parameter.kind.value == "keyword-only" and not keyword_only:
            keyword_only = True
            parts.append("*")
        part = f"{star}{parameter.name}"
        if parameter.annotation is not None:
            part += f": {parameter.annotation}".replace("signature.Name", "Name")
        if parameter.default is not None and not star:
            part += f" = {parameter.default}"
        parts.append(part)
    returns = "" if member.is_class or function.returns is None else f" -> {function.returns}"
    return _wrapped(f"{owner}.{member.name}".replace(".__call__", ""), parts, returns)


def _wrapped(name: str, parts: list[str], returns: str) -> list[str]:
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) <= 100:
        return [line]
    return [f"{name}(", *(f"    {part}," for part in parts), f"){returns}"]


def _text(member: Node) -> Iterator[str]:
    """The sections of a docstring."""
    for section in member.docstring.parsed if member.docstring else ():
        match section.kind.value:
            case "text":
                yield section.value
            case "parameters" | "attributes" | "raises" as kind:
                yield f"**{kind.capitalize()}**\n"
                for item in section.value:
                    name = item.annotation if kind == "raises" else item.name
                    yield f"- `{name}`: {_joined(item.description)}"
            case "returns" | "yields" as kind:
                yield f"**{kind.capitalize()}** " + " ".join(
                    _joined(item.description) for item in section.value
                )
            case "admonition":
                yield f"**{section.title}** {_joined(section.value.description)}"
            case kind:
                raise ValueError(f"{member.path}: a docstring section of an unknown kind: {kind}")
        yield ""


def _joined(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    """Writes the page."""
    target = ROOT / "docs" / "api.md"
    temporary = target.with_name(f".partial-{target.name}")
    temporary.write_text(render(), encoding="utf-8")
    os.replace(temporary, target)


if __name__ == "__main__":
    main()
