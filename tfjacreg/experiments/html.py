"""Makes one self-contained HTML page from Markdown and the pictures beside it."""

from __future__ import annotations

import base64
import html
import itertools
import re
from pathlib import Path

from markdown_it import MarkdownIt

from tfjacreg.experiments import reading

# The policy forbids every request: only what is in the page is shown.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --page: #fff; --text: #1a1a1a; --line: #ddd; --strong: #888;
 --code: #f5f5f5; --link: #0b57a4; }}
@media (prefers-color-scheme: dark) {{
 :root {{ --page: #16181b; --text: #e6e6e6; --line: #3a3d42; --strong: #888; --code: #23262b;
  --link: #8cc2ff; }}
}}
body {{ max-width: 62rem; margin: 0 auto; padding: 1rem; background: var(--page);
 color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }}
h1, h2, h3 {{ line-height: 1.2; margin: 1.6em 0 .5em; break-after: avoid; }}
h1 {{ margin-top: .2em; font-size: 1.6rem; }}
h2 {{ padding-top: .6em; border-top: 1px solid var(--line); }}
a {{ color: var(--link); }}
nav ul {{ padding: 0; margin: 0; list-style: none; }}
nav li {{ display: inline-block; margin-right: 1.2em; }}
img {{ max-width: 100%; height: auto; vertical-align: top; break-inside: avoid; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3em .7em; border-bottom: 1px solid var(--line); text-align: left;
 vertical-align: top; }}
th {{ border-bottom: 2px solid var(--strong); vertical-align: bottom; }}
pre {{ padding: .7em; overflow-x: auto; background: var(--code); font-size: .85em;
 line-height: 1.35; }}
code {{ font-family: ui-monospace, monospace; font-size: .92em; }}
@media (max-width: 64rem) {{
 table {{ font-size: .9rem; }}
 th, td {{ padding: .3em .5em; }}
}}
@media screen and (max-width: 40rem) {{
 body {{ padding: .8rem; }}
 h1 {{ font-size: 1.3rem; }}
 table {{ font-size: .75rem; line-height: 1.3; }}
 th, td {{ padding: .3em .2em; }}
 td:first-child, th:first-child {{ padding-left: 0; }}
 td, th {{ overflow-wrap: normal; }}
 img {{ max-width: none; }}
 p {{ overflow-x: auto; }}
}}
@media print {{
 body {{ max-width: none; padding: 0; font-size: 9pt; }}
 nav {{ display: none; }}
 table {{ width: 100%; font-size: 8pt; }}
 th, td {{ padding: .2em .4em; }}
 table, tr {{ break-inside: avoid; }}
 p:has(+ .scroll) {{ break-after: avoid; }}
 pre {{ white-space: pre-wrap; font-size: 7pt; }}
}}
</style>
</head>
<body>
{body}</body>
</html>
"""
_KINDS = {".png": "image/png", ".svg": "image/svg+xml"}


def render(markdown: str, folder: Path) -> str:
    """Renders Markdown as a page that needs no other file.

    Args:
        markdown: The text, CommonMark with tables; its first line is the title, as a heading. HTML
            in it is shown as text. A list of contents is put before the first heading of the second
            level.
        folder: The folder of its pictures, SVG or PNG files.

    Raises:
        ValueError: If it names a picture that is not directly in that folder.
        OSError: If a picture cannot be read.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    for before, token in itertools.pairwise(tokens):
        for child in token.children or []:
            if child.type == "text" and before.type == "td_open":
                # A number stays on the line of what is before it, such as a plus or minus sign.
                child.content = re.sub(
                    r"(?<=[\w±<]) (?=[\d<])", "\N{NO-BREAK SPACE}", child.content
                )
            if child.type == "image":
                child.attrs["src"] = _embedded(str(child.attrs["src"]), folder)
    # A heading is three tokens: its opening, its text and its closing.
    titles = [
        (opening, "".join(child.content for child in inline.children or []))
        for opening, inline in itertools.pairwise(tokens)
        if opening.type == "heading_open"
    ]
    sections = [(opening, text) for opening, text in titles if opening.tag == "h2"]
    for number, (opening, _) in enumerate(sections, start=1):
        opening.attrs["id"] = f"section-{number}"
    body = parser.renderer.render(tokens, parser.options, {})
    if sections:
        start = '<h2 id="section-1">'
        body = body.replace(start, _contents([text for _, text in sections]) + start, 1)
    return _PAGE.format(title=html.escape(titles[0][1]), body=body)


def _embedded(name: str, folder: Path) -> str:
    path = folder / name
    if path.name != name or path.is_symlink() or path.suffix not in _KINDS:
        raise ValueError(
            f"A picture must lie in {folder}, as {' or '.join(_KINDS)}. Received: {name!r}"
        )
    picture = reading.read_bytes(path, reading.PICTURE)
    return f"data:{_KINDS[path.suffix]};base64,{base64.b64encode(picture).decode()}"


def _contents(titles: list[str]) -> str:
    lines = [
        f'<li><a href="#section-{number}">{html.escape(title)}</a></li>'
        for number, title in enumerate(titles, start=1)
    ]
    return "\n".join(['<nav aria-label="Contents"><ul>', *lines, "</ul></nav>\n"])
