"""Documents as Markdown and HTML: every text of every block is there, and none of it is taken for markup."""

import base64
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hgpo_trl.reporting.documents import (
    Block,
    Bullets,
    Code,
    Heading,
    Lead,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)

TEXT = st.lists(
    st.sampled_from(["a", "*b*", "<i>", "x|y", "&amp;", '"q"', "it's", "{{ c }}", "{% d %}", "π"]), min_size=1
)
TEXTS = TEXT.map(" ".join)


class Page(HTMLParser):
    """The texts and the tags of a page's body."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(page[page.index("<body>") :])

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)


@given(TEXTS, TEXTS)
def test_html_shows_texts_as_they_are(first: str, second: str) -> None:
    blocks: list[Block] = [
        Heading(first),
        Lead(second),
        Bullets([first, second]),
        Table([first], [[second]]),
        Code(first),
    ]
    page = Page(to_html(first, blocks))
    assert page.texts == [first, second, first, second, first, second, first]
    assert not {"i", "script"} & set(page.tags)


@given(TEXTS)
def test_markdown_escapes_all_but_code(text: str) -> None:
    escaped = re.sub(r"([*<|])", r"\\\1", text)
    assert to_markdown([Paragraph(f"{text} `{text}`")]) == f"{escaped} `{text}`\n"


def test_every_block_as_markdown() -> None:
    blocks: list[Block] = [
        Heading("Title", level=1),
        Lead("First."),
        Paragraph("Text with `code`."),
        Bullets(["one", "two"]),
        Table(["name", "unit", "number"], [["a", "b", "1"], ["c", "d", "2"]], labels=2),
        Picture("a.png", b"png", "Figure", "It shows."),
        Code("x = 1", "python"),
    ]
    assert to_markdown(blocks) == (
        "# Title\n\n> First.\n\nText with `code`.\n\n- one\n- two\n\n"
        "| name | unit | number |\n| :-- | :-- | --: |\n| a | b | 1 |\n| c | d | 2 |\n\n"
        "![Figure](a.png)\n\nFigure. It shows.\n\n```python\nx = 1\n```\n"
    )


def test_html_needs_no_other_file() -> None:
    png = b"\x89PNG"
    page = to_html("t", [Picture("a.png", png, 'A "b"', "It shows `<x>`.")])
    assert f'<img alt="A &#34;b&#34;" src="data:image/png;base64,{base64.b64encode(png).decode()}">' in page
    assert "<code>&lt;x&gt;</code>" in page
    assert "a.png" not in page


@pytest.mark.parametrize(("labels", "numbers"), [(0, 2), (1, 1), (2, 0)])
def test_numbers_are_flush_right(labels: int, numbers: int) -> None:
    page = to_html("t", [Table(["a", "b"], [["c", "d"]], labels=labels)])
    assert page.count('class="number"') == 2 * numbers
