"""The exact rungs: text, numbers, words, values and lists. Each settles a verdict or passes on."""

import ast
import functools
import re
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from hgpo_trl.verification.statements import DOLLAR, MAX_STATEMENT, broken_off, stated, stripped
from hgpo_trl.verification.values import different_values, has_value

_MAX_DIGITS = 1_000  # of a fraction's parts; Python refuses to make an integer of more than 4,300

_SPELLINGS = [
    (re.compile(pattern, re.DOTALL), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
        (r"\\!\s*|\{,\}(?=\d{3})", lambda match: "," if match[0] == "{,}" else ""),
        (r"\\[,;: ]|~|\\q?quad(?![A-Za-z])|\s+", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\\(?:mbox|textbf|textit|textrm|mathrm|mathbf|operatorname)\s*\{", r"\\text{"),
        (r"\\text\s*\{\s*([^{}]*?)[\s.]*\}", r"\\text{\1}"),
        (r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])|°", ""),
        (r"\\([$%])", r"\1"),
        (r"\$", ""),
        (r"\\leq(?![A-Za-z])", r"\\le"),
        (r"\\geq(?![A-Za-z])", r"\\ge"),
        (r"\s+(?![\w\\])|(?<![\w,])\s+|(?<=\d)\s+(?=[A-Za-z\\])", ""),
    )
]
_CHARACTERS = str.maketrans({"−": "-", "–": "-", "∞": "\\infty ", "π": "\\pi ", "×": "\\times ", "·": "\\cdot "})

_LOOSE = re.compile(r"(?<!\d) +| +(?!\d)")
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
_UNIT = r"(?:\\text\{[^{}\d]*\}(?:\^\{?\d\}?)?)?"
_NUMBER = re.compile(rf"(?P<sign>[+-]?)(?P<value>{_DECIMAL})(?P<percent>%?){_UNIT}")
_INTEGER = rf"-?\d{{1,{_MAX_DIGITS}}}"
_RATIO = re.compile(
    rf"(?P<sign>[+-]?)(?P<whole>\d{{0,{_MAX_DIGITS}}})\\frac\{{(?P<top>{_INTEGER})\}}\{{(?P<bottom>{_INTEGER})\}}"
    rf"(?P<percent>%?){_UNIT}"
)
_SLASH = re.compile(
    rf"(?P<sign>[+-]?)(?P<whole>)(?P<top>\d{{1,{_MAX_DIGITS}}})/(?P<bottom>\d{{1,{_MAX_DIGITS}}})(?P<percent>%?)"
)
_BASED = re.compile(r"(?P<digits>[0-9A-Fa-f]+)_\{?(?P<base>\d{1,2})\}?")
_WORDS = re.compile(r"\\text\{([^{}]*)\}|([A-Za-z][A-Za-z' -]*)")
_NAMES = re.compile(r"\\text\{[^{}\d]+\}|[A-Za-z]{3,}[A-Za-z ]*")
_SET = re.compile(
    r"\\(?:cup|cap|infty|begin|leqslant|geqslant|le|ge)(?![A-Za-z])|[<>]"
)  # or a matrix, or an inequality
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_OPENING, _CLOSING = ("(", "[", "\\{"), (")", "]", "\\}")
_DEPTH = {**dict.fromkeys((*_OPENING, "{"), 1), **dict.fromkeys((*_CLOSING, "}"), -1)}
_BRACKET = re.compile(r"\\[{}]|\\.|[()\[\]{},]")
_MAX_DEPTH, _MAX_SET = 20, 30
_NAME = re.compile(r"(?:[A-Za-z](?:_\{?\w+\}?)?|[a-zA-Z]\([a-z]\))(?:=|\\in(?![A-Za-z]))\s*")


def _normalise(text: str) -> str:
    """One of the spellings of the same LaTeX."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return stripped(text)


def _tight(text: str) -> str:
    """Without blanks, but for those between digits."""
    return _LOOSE.sub("", text)


class _Number(NamedTuple):
    value: Decimal | Fraction
    percent: bool


def _number(text: str) -> _Number | None:
    match = _NUMBER.fullmatch(text)
    if match:
        return _Number(Decimal(match["sign"] + match["value"].replace(",", "")), bool(match["percent"]))
    match = _RATIO.fullmatch(text) or _SLASH.fullmatch(text)
    if not match or int(match["bottom"]) == 0:
        return None
    value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    return _Number(-value if match["sign"] == "-" else value, bool(match["percent"]))


def _equal_numbers(a: _Number, b: _Number) -> bool | None:
    """Exactly; "50%" equals both 50 and 0.5. None where a rounded decimal may be near enough to a fraction."""
    both_decimal = isinstance(a.value, Decimal) and isinstance(b.value, Decimal)
    if both_decimal and a.percent == b.percent:
        return a.value == b.value
    x, y = Fraction(a.value), Fraction(b.value)
    if x == y or (a.percent != b.percent and (x / 100 == y if a.percent else x == y / 100)):
        return True
    exact = both_decimal or isinstance(a.value, Fraction) == isinstance(b.value, Fraction)
    return False if exact or abs(x - y) * 1000 > abs(x) else None


def _words(text: str) -> str | None:
    match = _WORDS.fullmatch(text)
    if not match:
        return None
    words = " ".join((match[1] if match[1] is not None else match[2]).split())
    choice = _CHOICE.fullmatch(words)
    if choice:
        return choice[1]
    return words.casefold() if len(words) > 1 else words


class _List(NamedTuple):
    opening: str  # "" for none
    items: list[str]
    closing: str


def _split(text: str) -> list[str] | None:
    """The text at its commas outside all brackets; None where brackets do not pair up or nest too deep."""
    depth, start, items = 0, 0, []
    for match in _BRACKET.finditer(text):
        depth += _DEPTH.get(match[0], 0)
        if not 0 <= depth <= _MAX_DEPTH:
            return None
        if match[0] == "," and depth == 0:
            items.append(text[start : match.start()].strip())
            start = match.end()
    return [*items, text[start:].strip()] if depth == 0 else None


def _items(text: str) -> _List | None:
    """A list of at least two entries."""
    for opening in _OPENING:
        closing = next((bracket for bracket in _CLOSING if text.endswith(bracket)), "")
        if text.startswith(opening) and closing:
            items = _split(text[len(opening) : -len(closing)])
            if items and len(items) > 1:
                return _List(opening, items, closing)
    items = _split(text)
    return _List("", items, "") if items and len(items) > 1 else None


def _equal_lists(a: _List, b: _List) -> bool | None:
    """Tuples and intervals in order and with their brackets; sets and bare lists in any order."""
    brackets, others = (a.opening, a.closing), (b.opening, b.closing)
    if a.opening in ("(", "[") or b.opening in ("(", "["):
        if brackets != others:
            return False if a.opening in ("(", "[") and b.opening in ("(", "[") else None
        if len(a.items) != len(b.items):
            return False
        verdicts = [_settle_normalised(x, y)[0] for x, y in zip(a.items, b.items, strict=True)]
        return False if False in verdicts else None if None in verdicts else True
    if len(a.items) != len(b.items) or len(a.items) > _MAX_SET:
        return None
    table = [[_settle_normalised(x, y)[0] for y in b.items] for x in a.items]
    if all(True in row for row in table) and all(True in column for column in zip(*table, strict=True)):
        return True
    return None if any(None in row for row in table) else False


def _one_of_several(several: _List, single: str) -> bool | None:
    """A list is not a number, unless it is one with blanks between its thousands, or equal entries."""
    if several.opening in ("(", "["):
        return False
    if all(re.fullmatch(r"\d{3}", item) for item in several.items[1:]):
        return None
    return False if any(_settle_normalised(item, single)[0] is False for item in several.items) else None


def _settle_normalised(reference: str, answer: str) -> tuple[bool | None, str]:
    """The verdict of the exact rungs and the rung; None where they do not settle it."""
    if _tight(reference) == _tight(answer):
        return True, "text"
    if not answer:
        return False, "text"
    named, other = _NAME.match(reference), _NAME.match(answer)
    if bool(named) != bool(other) or (named and other and named[0] == other[0]):
        reference = reference[named.end() :] if named else reference
        answer = answer[other.end() :] if other else answer
        if _tight(reference) == _tight(answer):
            return True, "text"
    a, b = _number(reference), _number(answer)
    if a and b:
        return _equal_numbers(a, b), "numbers"
    based, other_based = _BASED.fullmatch(reference), _BASED.fullmatch(answer)
    if based and other_based:
        same = based["base"] == other_based["base"] and based["digits"].lstrip("0") == other_based["digits"].lstrip("0")
        return same, "numbers"
    if (based and b) or (other_based and a):
        return False, "numbers"
    words, other_words = _words(reference), _words(answer)
    if words is not None and other_words is not None:
        if words == other_words:
            return True, "words"
        if len(words) > 2 and len(other_words) > 2 and "\\text" in reference:
            return False, "words"
    lists = _items(reference), _items(answer)
    if lists[0] and lists[1]:
        return _equal_lists(lists[0], lists[1]), "lists"
    several, single = (lists[0], answer) if lists[0] else (lists[1], reference)
    if several and has_value(single):
        return _one_of_several(several, single), "lists"
    for number, text in ((a, answer), (b, reference)):
        if number and (_NAMES.fullmatch(text) or _SET.search(text)):
            return False, "words"
    return different_values(reference, answer), "values"


@functools.lru_cache(maxsize=65_536)  # a query's reference answer is asked for N times a step, and again every epoch
def expression(text: str) -> str:
    """A reference answer as one expression; a list as text ("['2', '3']") gives its entries, separated by commas."""
    bare = text.strip()
    if bare.startswith("['") or bare.startswith('["'):
        try:
            entries = ast.literal_eval(bare)
        except (SyntaxError, ValueError):
            return stripped(bare)
        bare = ", ".join(stripped(str(entry)) for entry in entries)
    return stripped(DOLLAR.sub("", bare))


@functools.lru_cache(maxsize=65_536)
def _normalised_reference(text: str) -> str:
    return _normalise(expression(text))


def settle(reference: str, answer: str) -> tuple[bool | None, str]:
    """The verdict of the exact rungs on a whole answer, and the rung that gave it."""
    bare = stripped(answer)
    if bare in (stripped(reference), expression(reference)):
        return True, "text"
    if len(bare) <= MAX_STATEMENT:
        number, other = _number(expression(reference)), _number(bare)
        if number and other:
            verdict = _equal_numbers(number, other)
            return verdict, "numbers" if verdict is not None else "symbolic"
    statement = stated(answer)
    if statement == "" or (statement is None and broken_off(answer)):
        return False, "text"
    if statement is None or max(len(statement), len(reference)) > MAX_STATEMENT:
        return None, "symbolic"
    verdict, rung = _settle_normalised(_normalised_reference(reference), _normalise(statement))
    return verdict, rung if verdict is not None else "symbolic"
