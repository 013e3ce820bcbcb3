"""A report as blocks, rendered to Markdown and to one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.records.tables import markdown


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text; `lead` marks the main result."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Items:
    """A list of plain lines."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows under headers; the first `left` columns are text, the rest numbers. `name` is of its CSV file."""

    headers: Sequence[str]
    rows: Sequence[Sequence[object]]
    left: int = 1
    name: str = "table"


@dataclass(frozen=True)
class Figure:
    """A drawn figure and what it shows."""

    png: Path
    caption: str


Block = Heading | Text | Items | Table | Figure

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 84rem;
  margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid #ddd; }
p, li { max-width: 46rem; }
p.lead { font-size: 1.12rem; padding: .75rem 1rem; background: #f0f5fa; border-left: 4px solid #0072B2; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .78rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .35rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e6e6e6; }
th { vertical-align: bottom; white-space: normal; font-weight: 600; border-bottom: 2px solid #999; min-width: 3.5rem; }
th.l, td.l { text-align: left; }
tbody tr:hover { background: #f7f7f7; }
nav { font-size: .9rem; margin: 1rem 0; }
nav a { margin-right: 1rem; color: #0072B2; white-space: nowrap; display: inline-block; }
figure { margin: 1.5rem 0; max-width: 58rem; }
figure div { overflow-x: auto; }
figure img { max-width: 100%; height: auto; border: 1px solid #eee; }
figcaption { font-size: .9rem; color: #444; }
@media (max-width: 40rem) { body { padding: 1rem .9rem 3rem; } figure img { max-width: none; width: 36rem; } }
"""


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """Return the blocks as Markdown; links to figures are relative to the folder of the report."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}\n")
            case Text(text, lead):
                parts.append(f"**{text}**\n" if lead else text + "\n")
            case Items(lines):
                parts.append("".join(f"- {line}\n" for line in lines))
            case Table(headers, rows, left, _):
                parts.append(markdown(headers, rows, left))
            case Figure(png, caption):
                parts.append(f"![{caption}]({Path(os.path.relpath(png, folder)).as_posix()})\n")
    return "\n".join(parts)


def to_html(blocks: Sequence[Block]) -> str:
    """Return the blocks as one HTML page that contains its styles and pictures."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(text)}">{html.escape(text)}</a>' for text in sections)
    body = []
    for block in blocks:
        body.append(_element(block))
        if isinstance(block, Heading) and block.level == 1:
            body.append(f"<nav>{links}</nav>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _anchor(text: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in text.lower())


def _element(block: Block) -> str:
    """Return one block as HTML."""
    match block:
        case Heading(text, level):
            return f'<h{level} id="{_anchor(text)}">{html.escape(text)}</h{level}>'
        case Text(text, lead):
            mark = ' class="lead"' if lead else ""
            return f"<p{mark}>{html.escape(text)}</p>"
        case Items(lines):
            return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
        case Table(headers, rows, left, _):
            return _html_table(headers, rows, left)
        case Figure(png, caption):
            picture = base64.b64encode(png.read_bytes()).decode()
            text = html.escape(caption)
            return (
                f'<figure><div><img src="data:image/png;base64,{picture}" alt="{text}"></div>'
                f"<figcaption>{text}</figcaption></figure>"
            )


def _html_table(headers: Sequence[str], rows: Sequence[Sequence[object]], left: int) -> str:
    """Return a table that scrolls sideways on a narrow screen."""

    def line(tag: str, cells: Sequence[object]) -> str:
        marks = [' class="l"' if column < left else "" for column in range(len(cells))]
        return "".join(f"<{tag}{m}>{html.escape(str(c))}</{tag}>" for m, c in zip(marks, cells, strict=True))

    head = line("th", headers)
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
