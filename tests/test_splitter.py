"""Responses taken apart while they arrive: the same as taken apart whole, whatever the pieces."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hgpo_trl.modes import MODES, TAGS, Fault, Mode, format_response, split_response
from hgpo_trl.serving.splitter import Field, ResponseSplitter, split_whole

# Tags, whole and broken, blanks of several kinds, and text.
BROKEN = ["<", "</", "<think", "<no", "_think>", "think>", ">"]
BLANKS = [" ", "\n", "\n\n", "\t", "\u3000", "\x1f"]
PIECES = st.sampled_from([*TAGS, *TAGS, *BROKEN, *BLANKS, "a", "é", "42 "])
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=14).map("".join)
FORCED = st.sampled_from([None, *MODES])


@st.composite
def chunked(draw: st.DrawFn) -> tuple[list[str], Mode | None]:
    """A response in pieces, empty ones among them, and the mode that the prompt forces."""
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)], draw(FORCED)


def collect(chunks: list[str], mode: Mode | None) -> tuple[dict[Field, str], ResponseSplitter]:
    splitter = ResponseSplitter(mode)
    fields: dict[Field, str] = {}
    for pieces in [*map(splitter.feed, chunks), splitter.finish()]:
        for field, text in pieces.items():
            assert field == "content" or "content" not in fields, "no reasoning after content"
            fields[field] = fields.get(field, "") + text
    return fields, splitter


@given(chunked())
def test_in_pieces_as_whole(case: tuple[list[str], Mode | None]) -> None:
    chunks, mode = case
    fields, splitter = collect(chunks, mode)
    assert fields == split_whole("".join(chunks), mode)
    assert splitter.finish() == {}
    assert fields == collect(list("".join(chunks)), mode)[0]


def without_blanks(text: str) -> str:
    return "".join(text.split())


@given(chunked())
def test_nothing_is_lost_or_doubled(case: tuple[list[str], Mode | None]) -> None:
    """All but blanks and the mode's own two tags comes out once, in its order, and inner blanks stay as they are."""
    chunks, mode = case
    text = "".join(chunks)
    fields, splitter = collect(chunks, mode)
    expected = text
    if splitter.mode is not None:
        if mode is None:
            expected = expected.replace(splitter.mode.open_tag, "", 1)
        expected = expected.replace(splitter.mode.close_tag, "", 1)
    assert without_blanks("".join(fields.values())) == without_blanks(expected)
    for part in fields.values():
        assert part == part.strip()
        assert part in expected


@given(TEXTS, FORCED)
@example("<no_think>\n3\n</no_think>\n", None)
@example(" <think> a </think> b </think>", None)
def test_as_split_response(text: str, mode: Mode | None) -> None:
    """An independent way of splitting, on the whole text: a forced mode is a tag in front."""
    fields, splitter = collect([text], mode)
    expected = split_response((mode.open_tag if mode else "") + text)
    assert splitter.mode == expected.mode
    assert fields.get("reasoning", "") == expected.reasoning
    assert ("reasoning" in fields) == (expected.mode is Mode.THINK)
    assert ("content" not in fields) == (expected.mode is Mode.THINK and Fault.UNCLOSED in expected.faults)
    if Fault.TRAILING_TEXT in expected.faults:
        assert fields["content"].startswith(expected.answer)
    else:
        assert fields.get("content", "") == expected.answer


PLAIN = st.text().filter(lambda text: text.strip() and not re.search("|".join(TAGS), text))


@given(PLAIN, PLAIN, st.sampled_from(MODES))
def test_inverse_of_format_response(reasoning: str, answer: str, mode: Mode) -> None:
    think = mode is Mode.THINK
    fields, splitter = collect(list(format_response(mode, answer, reasoning if think else "")), None)
    assert splitter.mode is mode
    assert fields == ({"reasoning": reasoning.strip()} if think else {}) | {"content": answer.strip()}


@pytest.mark.parametrize(
    ("text", "mode", "fields"),
    [
        ("<think>\n1 + 2\n</think>\n\n3", None, {"reasoning": "1 + 2", "content": "3"}),
        ("<no_think>\n3\n</no_think>", None, {"content": "3"}),
        ("\n1 + 2\n</think>\n\n3", Mode.THINK, {"reasoning": "1 + 2", "content": "3"}),
        ("\n3\n</no_think>", Mode.NO_THINK, {"content": "3"}),
        ("<think>\n1 +", None, {"reasoning": "1 +"}),
        ("<think>", None, {"reasoning": ""}),
        ("<think></think>", None, {"reasoning": "", "content": ""}),
        ("<think>\n1 + 2\n</thi", None, {"reasoning": "1 + 2\n</thi"}),
        ("<no_think>\n3", None, {"content": "3"}),
        ("<no_think>", None, {"content": ""}),
        ("", Mode.THINK, {"reasoning": ""}),
        ("", None, {"content": ""}),
        (" <thi", None, {"content": "<thi"}),
        ("3 <think> 4 </think>", None, {"content": "3 <think> 4 </think>"}),
        ("</think> 3", None, {"content": "</think> 3"}),
        ("<no_think> 3 </think> 4 </no_think> 5", None, {"content": "3 </think> 4  5"}),
        ("<think> a <think> b </think> c </think>", None, {"reasoning": "a <think> b", "content": "c </think>"}),
        ("<no_think> 3 </no_think></no_think>", Mode.THINK, {"reasoning": "<no_think> 3 </no_think></no_think>"}),
    ],
)
def test_examples(text: str, mode: Mode | None, fields: dict[str, str]) -> None:
    assert split_whole(text, mode) == fields


def test_text_is_given_as_soon_as_it_is_known() -> None:
    splitter = ResponseSplitter()
    for piece, fields in [
        ("\n", {}), ("<thi", {}), ("nk>", {"reasoning": ""}), ("\n", {}), ("a", {"reasoning": "a"}), (" ", {}),
        ("b <", {"reasoning": " b"}), (" c", {"reasoning": " < c"}), ("\n</", {}), ("think>", {"content": ""}),
        (" ", {}), ("d", {"content": "d"}), ("<", {"content": "<"}),
    ]:  # fmt: skip
        assert splitter.feed(piece) == fields
