"""Documents as lists of blocks (`Heading`, `Paragraph`, `Table`, ...), written as Markdown and as HTML.

`...` within a text is code.
"""

import base64
import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

NO_BREAK = "\u00a0"  # a space at which no line ends


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Lead:
    """The sentence to read if one reads only one."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """`labels` leading columns of text; the others are numbers and flush right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1


@dataclass(frozen=True)
class Picture:
    file: str
    png: bytes
    title: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Lines to be shown as they are."""

    text: str
    language: str = ""


Block = Heading | Lead | Paragraph | Bullets | Table | Picture | Code


def _inline(text: str, plain: Callable[[str], str], code: Callable[[str], str]) -> str:
    """Render the parts of `text` outside and within backticks."""
    return "".join((code if index % 2 else plain)(part) for index, part in enumerate(text.split("`")))


def _markdown_inline(text: str) -> str:
    return _inline(text, lambda part: re.sub(r"([\\*<|])", r"\\\1", part), lambda part: f"`{part}`")


def _html_inline(text: str) -> str:
    return _inline(text, html.escape, lambda part: f"<code>{html.escape(part)}</code>")


def to_markdown(blocks: Iterable[Block]) -> str:
    """The blocks as Markdown; pictures are links to their files."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {_markdown_inline(text)}")
            case Lead(text):
                parts.append(f"> {_markdown_inline(text)}")
            case Paragraph(text):
                parts.append(_markdown_inline(text))
            case Bullets(items):
                parts.append("\n".join(f"- {_markdown_inline(item)}" for item in items))
            case Table(header, rows, labels):
                rule = [":--" if column < labels else "--:" for column in range(len(header))]
                cells = [[_markdown_inline(cell) for cell in row] for row in (header, *rows)]
                cells.insert(1, rule)
                parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
            case Picture(file, _, title, caption):
                parts.append(f"![{_markdown_inline(title)}]({file})\n\n{_markdown_inline(f'{title}. {caption}')}")
            case Code(text, language):
                parts.append(f"```{language}\n{text}\n```")
    return "\n\n".join(parts) + "\n"


CSS = """
body { max-width: 900px; margin: 2.5rem auto; padding: 0 1rem; color: #222; background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1, h2 { line-height: 1.25; margin: 2.2rem 0 .7rem; }
h1 { margin-top: 0; }
.lead { font-size: 1.15rem; padding: .8rem 1.1rem; background: #f3f5f8; border-left: 4px solid #2066b0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #bbb; vertical-align: bottom; }
.number { text-align: right; }
figure { margin: 1.8rem 0; }
img { width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #444; }
code { font-size: .92em; background: #f3f3f3; padding: .05em .3em; border-radius: 3px; }
""".strip()


def _html_row(cells: Sequence[str], tag: str, labels: int) -> str:
    classes = ["" if column < labels else ' class="number"' for column in range(len(cells))]
    body = (f"<{tag}{kind}>{_html_inline(cell)}</{tag}>" for cell, kind in zip(cells, classes, strict=True))
    return f"<tr>{''.join(body)}</tr>"


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """The blocks as one page of HTML that needs no other file."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"<h{level}>{_html_inline(text)}</h{level}>")
            case Lead(text):
                parts.append(f'<p class="lead">{_html_inline(text)}</p>')
            case Paragraph(text):
                parts.append(f"<p>{_html_inline(text)}</p>")
            case Bullets(items):
                parts.append("\n".join(["<ul>", *(f"<li>{_html_inline(item)}</li>" for item in items), "</ul>"]))
            case Table(header, rows, labels):
                head = _html_row(header, "th", labels)
                body = "\n".join(_html_row(row, "td", labels) for row in rows)
                table = f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
                parts.append(f'<div class="scroll">{table}</div>')
            case Picture(_, png, alt, caption):
                source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
                text = f"<strong>{_html_inline(alt)}.</strong> {_html_inline(caption)}"
                image = f'<img alt="{html.escape(alt)}" src="{source}">'
                parts.append(f"<figure>\n{image}\n<figcaption>{text}</figcaption>\n</figure>")
            case Code(text):
                parts.append(f"<pre><code>{html.escape(text)}</code></pre>")
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
