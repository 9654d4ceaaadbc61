"""What an answer states: the expression or the words that it gives as its result."""

import re

MAX_EXPRESSION = 400  # characters; LaTeX without end takes math-verify minutes
MAX_STATEMENT = 2_000  # characters that the exact rungs look at
MAX_TEXT = 1_000  # characters of prose, from its end, that math-verify looks through
_MAX_ANSWER = 20_000  # characters, from its end, in which the statement is looked for

_IGNORED = "$*" + "".join(filter(str.isspace, map(chr, range(0x3001))))  # around an answer; the blanks of Unicode too
_ANCHOR = re.compile(r"\banswer\b(?:[^\n.:=$\\]{0,60}?\s(?:is|are|equals)\b|\s*[:=])[\s:*]*|####\s*", re.IGNORECASE)
_MATHS = re.compile(
    r"\$\$(.{1,400}?)\$\$|(?<!\\)\$((?:\\\$|[^$]){1,400}?)(?<!\\)\$|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.DOTALL
)
_JOINT = re.compile(r"\s*(?:,?\s*(?:and|or)\b|,|;)\s*")
_CANDIDATES = re.compile(  # numbers that prose ends with
    r"(?<![\d.,])(-?\d[\d./]*(?:\s*(?:,?\s*(?:or|and)|,)\s+-?\d[\d./]*)+)\W*$"
)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,?\s*(?:and|or)\b|,|;)[\s$]*")
_SENTENCE_END = re.compile(r"\.(?=\s)|\n|$")
_MARKED = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[|\n|\*\*")  # text that says itself where its mathematics begins
_COMMAND = re.compile(r"\\[A-Za-z]+(\s*\{[^{}]*\})?")  # of LaTeX, with what it applies to
_WORD = re.compile(  # of prose; "ab" and "ABC" may be products
    r"(?<![A-Za-z])(?:[A-Za-z][a-z]{2,}|[Aa]n|as|at|be|by|he|if|in|is|it|no|of|on|or|so|to|we)(?![A-Za-z])"
)
_PHRASE = re.compile(r"[^\W\d]+(?:[ '-][^\W\d]+){0,3}")  # an answer in words
DOLLAR = re.compile(r"(?<!\\)\$")
ANY_DOLLAR = re.compile(r"\\?\$")
DOLLAR_SIGN = re.compile(r"(?<!\\)\\\$")


def stripped(text: str) -> str:
    """Without what means nothing around an answer: blanks, dollar signs, bold, a full stop."""
    return text.strip(_IGNORED).rstrip(f"{_IGNORED}.")


def _closing_brace(text: str, start: int) -> int:
    """Where the brace opened just before `start` is closed; -1 where it is not."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return -1


def _last_box(text: str, end: int | None = None) -> tuple[int, int, str] | None:
    r"""Where the last `\boxed{}` that is closed begins and ends, and its content."""
    for _ in range(8):  # a policy in a loop may open boxes without end
        start = max(text.rfind("\\boxed{", 0, end), text.rfind("\\fbox{", 0, end))
        if start < 0:
            return None
        inside = text.index("{", start) + 1
        close = _closing_brace(text, inside)
        if close >= 0:
            return start, close + 1, text[inside:close]
        end = start
    return None


def _boxed(text: str) -> str | None:
    """What the last box holds, and the boxes joined to it by a comma, "and" or "or"."""
    box = _last_box(text)
    if box is None:
        return None
    contents = [box[2]]
    while (before := _last_box(text, box[0])) and _BETWEEN_BOXES.fullmatch(text[before[1] : box[0]]):
        contents.insert(0, before[2])
        box = before
    return ", ".join(dict.fromkeys(content.strip() for content in contents))


def broken_off(text: str) -> bool:
    """Whether the answer ends within a box: nobody knows what it would have held."""
    start = text.rfind("\\boxed")
    if start < 0:
        return False
    rest = text[start + len("\\boxed") :].strip(f"{_IGNORED}.")
    return not rest or (rest.startswith("{") and _closing_brace(rest, 1) < 0)


def _is_expression(text: str) -> bool:
    """Whether it is mathematics (or one word) as a whole and not prose that contains some."""
    return len(text) <= MAX_EXPRESSION and not _MARKED.search(text) and not _WORD.search(_COMMAND.sub("", text))


def _joined_maths(text: str) -> str | None:
    """The mathematics that the text begins with, and what is joined to it by a comma, "and" or "or"."""
    parts, position = [], 0
    while match := _MATHS.match(text, position):
        parts.append(next(filter(None, match.groups())))
        joint = _JOINT.match(text, match.end())
        if not joint:
            break
        position = joint.end()
    return ", ".join(part.strip() for part in parts) or None


def stated(answer: str) -> str | None:
    """The expression or the words that the answer gives as its result; None where that takes a search in prose."""
    answer = answer[-_MAX_ANSWER:]
    box = _boxed(answer)
    if box is not None:
        return stripped(box)
    bare = stripped(answer)
    if _is_expression(bare):
        return bare
    whole = _MATHS.fullmatch(answer.strip(" \n*."))
    if whole and "$" not in (inside := next(filter(None, whole.groups()))):
        return stripped(inside)
    anchor = None
    for anchor in _ANCHOR.finditer(answer.strip()):  # noqa: B007
        pass
    if anchor is None:
        if _PHRASE.fullmatch(bare):
            return bare
        listed = _CANDIDATES.search(bare[-MAX_EXPRESSION:])
        return _JOINT.sub(", ", listed[1]) if listed else None
    rest = anchor.string[anchor.end() :]
    maths = _joined_maths(rest)
    if maths is not None:
        return stripped(maths)
    end = _SENTENCE_END.search(rest)
    sentence = stripped(rest[: end.start()] if end else rest)
    return sentence if _is_expression(sentence) or _PHRASE.fullmatch(sentence) else None
