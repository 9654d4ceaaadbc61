"""Documents as lists of blocks (`Heading`, `Paragraph`, `Table`, ...), rendered as Markdown and as HTML.

The templates are `templates/document.*.jinja`. Text between backticks is code.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

OPEN = 400  # characters of a reasoning that the page shows without a click
EXCERPT = 300  # characters of a text that Markdown shows
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


@dataclass(frozen=True)
class Response:
    """A model's response: its mode, badges such as "chosen", what is known of it, and its text as it is.

    `verdict` is "right", "wrong", "graded" or "".
    """

    mode: str
    badges: Sequence[str]
    verdict: str
    notes: Sequence[str]
    reasoning: str
    answer: str


@dataclass(frozen=True)
class SideBySide:
    """A prompt and the responses to it, in columns; Markdown shows the beginning of each text and the end."""

    title: str
    prompt: str
    facts: Sequence[str]
    responses: Sequence[Response]


Block = Heading | Lead | Paragraph | Bullets | Table | Picture | Code | SideBySide


def _markdown(text: str) -> str:
    """Escape the characters outside code that Markdown would take for its own."""
    parts = text.split("`")
    return "`".join(part if index % 2 else re.sub(r"([\\*<|])", r"\\\1", part) for index, part in enumerate(parts))


def _html(text: str) -> Markup:
    code = Markup("<code>{}</code>")
    parts = text.split("`")
    return Markup().join(code.format(part) if index % 2 else escape(part) for index, part in enumerate(parts))


def _fenced(text: str) -> str:
    """Text as a block of Markdown code, whatever it holds."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _excerpt(text: str) -> str:
    """The beginning and the end of a text, where the answer is."""
    return text if len(text) <= EXCERPT else f"{text[: EXCERPT // 2]} […] {text[-EXCERPT // 2 :]}"


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
_TEMPLATES.globals["OPEN"] = OPEN
_TEMPLATES.filters |= {
    "markdown": _markdown,
    "html": _html,
    "fenced": _fenced,
    "excerpt": _excerpt,
    "data_url": _data_url,
    "kind": lambda block: type(block).__name__,
}


def to_markdown(blocks: Iterable[Block]) -> str:
    """Render blocks as Markdown; pictures are links to their files."""
    return _TEMPLATES.get_template("document.md.jinja").render(blocks=blocks)


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """Render blocks as one page of HTML that needs no other file."""
    return _TEMPLATES.get_template("document.html.jinja").render(title=title, blocks=blocks)
