"""Documents as lists of blocks (`Heading`, `Paragraph`, `Table`, ...), rendered as Markdown and as HTML.

The templates are `templates/document.*.jinja`. Text between backticks is code.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

NO_BREAK = "\u00a0"  # a space at which no line ends


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Lead:
    """The most important sentence."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """The first `labels` columns hold text; the others hold numbers and are flush right."""

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
    """Lines shown as they are."""

    text: str
    language: str = ""


Block = Heading | Lead | Paragraph | Bullets | Table | Picture | Code


def _markdown(text: str) -> str:
    """Escape the characters outside code that Markdown would take for its own."""
    parts = text.split("`")
    return "`".join(part if index % 2 else re.sub(r"([\\*<|])", r"\\\1", part) for index, part in enumerate(parts))


def _html(text: str) -> Markup:
    code = Markup("<code>{}</code>")
    parts = text.split("`")
    return Markup().join(code.format(part) if index % 2 else escape(part) for index, part in enumerate(parts))


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


_TEMPLATES = Environment(
    loader=PackageLoader("hgpo_trl"),
    autoescape=lambda name: str(name).endswith(".html.jinja"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {
    "markdown": _markdown,
    "html": _html,
    "data_url": _data_url,
    "kind": lambda block: type(block).__name__,
}


def to_markdown(blocks: Iterable[Block]) -> str:
    """Render blocks as Markdown; pictures are links to their files."""
    return _TEMPLATES.get_template("document.md.jinja").render(blocks=blocks)


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """Render blocks as one page of HTML that needs no other file."""
    return _TEMPLATES.get_template("document.html.jinja").render(title=title, blocks=blocks)
