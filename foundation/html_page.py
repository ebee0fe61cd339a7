"""Self-contained HTML pages: one file, no script, nothing loaded from anywhere; all text is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

# Light and dark, narrow and wide. Charts have the colours --c0 to --c5.
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667079; --line: #e2e6ea; --paper: #fff;
  --tile: #f5f7f9;
  --c0: #2367c4; --c1: #d0670b; --c2: #1d8a4e; --c3: #9440c2; --c4: #b3243f; --c5: #55707f;
  --alarm: #d11f2f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #97a1ab; --line: #31383f; --paper: #14181c; --tile: #1d2329;
    --c0: #6ea8fa; --c1: #f2a25c; --c2: #5fcf92; --c3: #c78cf0; --c4: #f07d92; --c5: #a2b8c4;
  --alarm: #ff6b76; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 36px 0 8px; }
.status { font-size: 16px; margin: 4px 0 16px; } .note, small { color: var(--soft); font-size: 13px;
  font-weight: 400; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 10px; margin: 0; }
.facts div { background: var(--tile); border-radius: 8px; padding: 10px 12px; }
dt { color: var(--soft); font-size: 12px; } dd { margin: 0; font-size: 20px;
  font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 18px; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto;
  display: block; }
.grid { stroke: var(--line); } text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.value { text-anchor: end; } .step { text-anchor: middle; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
details { margin-top: 14px; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: var(--tile); padding: 12px; border-radius: 8px; font-size: 12.5px; }
"""

# The browser may load and run nothing, whatever a recipe, a caption or a file name contains.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, parts: Sequence[str], style: str = "") -> str:
    """The whole page.

    Args:
        title: plain text; also the page's heading.
        parts: HTML, one below the other.
        style: CSS besides `STYLE`.
    """
    name = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}{style}</style></head>\n<body><main>\n"
        + "\n".join([f"<h1>{name}</h1>", *parts])
        + "\n</main></body></html>\n"
    )


def section(title: str, content: str, otherwise: str) -> str:
    """A heading above HTML, or above a plain remark where there is none."""
    return f"<h2>{html.escape(title)}</h2>\n" + (content or f'<p class="note">{html.escape(otherwise)}</p>')


def details(title: str, text: str) -> str:
    """Plain text that unfolds below its title."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Tiles of name and value, plain text."""
    tiles = (f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{"".join(tiles)}</dl>'


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of plain text; empty where there are no rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def embedded_picture(picture: Image.Image, name: str, largest_side: int = 256) -> str:
    """An `<img>` that carries its picture, shrunk to `largest_side` pixels.

    Args:
        picture: RGB.
        name: plain text for those who don't see it.
    """
    small = picture.copy()
    small.thumbnail((largest_side, largest_side))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
