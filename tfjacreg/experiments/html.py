"""One self-contained HTML page from Markdown and the pictures beside it."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from markdown_it import MarkdownIt

from tfjacreg.experiments import reading

# The policy forbids every request: what is not in the page is not shown.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ max-width: 62rem; margin: 0 auto; padding: 1rem; background: #fff; color: #1a1a1a;
 font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }}
h1, h2, h3 {{ line-height: 1.2; margin: 1.6em 0 .5em; break-after: avoid; }}
h1 {{ margin-top: .5em; }}
h2 {{ padding-top: .6em; border-top: 1px solid #ccc; }}
img {{ display: block; max-width: 100%; height: auto; margin: 1rem auto; break-inside: avoid; }}
table {{ display: block; width: max-content; max-width: 100%; overflow-x: auto;
 border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: left;
 vertical-align: top; }}
th {{ min-width: 4rem; border-bottom: 2px solid #888; vertical-align: bottom; }}
td {{ white-space: nowrap; }}
pre {{ padding: .7em; overflow-x: auto; background: #f5f5f5; font-size: .85em; line-height: 1.35; }}
code {{ font-family: ui-monospace, monospace; font-size: .92em; }}
@media screen and (max-width: 40rem) {{
 p {{ overflow-x: auto; }}
 img {{ max-width: none; width: auto; height: 16rem; }}
}}
@media print {{
 body {{ max-width: none; padding: 0; font-size: 9pt; }}
 table {{ display: table; width: 100%; font-size: 8pt; }}
 th, td {{ min-width: 0; padding: .2em .4em; white-space: normal; }}
 tr {{ break-inside: avoid; }}
 pre {{ white-space: pre-wrap; font-size: 7pt; }}
}}
</style>
</head>
<body>
{body}</body>
</html>
"""


def render(markdown: str, folder: Path) -> str:
    """Renders Markdown as a page that needs no other file.

    Args:
        markdown: The text, CommonMark with tables; its first line is the title, as a heading.
            HTML in it is shown as text.
        folder: Where its pictures are, PNG files.

    Raises:
        ValueError: If it names a picture that is not in that folder itself.
        OSError: If a picture cannot be read.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token in tokens:
        for child in token.children or []:
            if child.type == "image":
                name = str(child.attrs["src"])
                path = folder / name
                if path.name != name or path.is_symlink():
                    raise ValueError(f"A picture must lie in {folder}. Received: {name!r}")
                picture = reading.read_bytes(path, reading.PICTURE)
                encoded = base64.b64encode(picture).decode()
                child.attrs["src"] = f"data:image/png;base64,{encoded}"
    # The heading is an opening, its text and a closing.
    title = html.escape("".join(child.content for child in tokens[1].children or []))
    body = parser.renderer.render(tokens, parser.options, {})
    return _PAGE.format(title=title, body=body)
