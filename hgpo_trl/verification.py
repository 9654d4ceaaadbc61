r"""Whether an answer equals the reference answer: exact rungs first, then math-verify, in workers with a time limit.

What counts of an answer is its last `\boxed{}`, else what it states as the answer, else its last mathematics: an answer
that names several candidates is not right because one of them is. The rungs, each of which settles or passes on:

    text       equal, but for blanks, dollar signs, bold, a full stop and ways to write the same LaTeX
    numbers    plain numbers, fractions, mixed numbers, percentages, number bases: exactly, whatever their length
    words      names and letters of choices
    values     expressions that differ at a point
    lists      tuples, intervals and lists whose entries the rungs above settle
    symbolic   math-verify

Only the last can get stuck. `check_answers` gives it to processes that are killed at the time limit.
"""

import ast
import atexit
import functools
import logging
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

TIMEOUT_S = 5.0  # for a sample, in a worker of its own; in-process, for each parse and for the comparison
_CHUNK_TIMEOUT_S = 2.0  # for a chunk of samples of a few milliseconds each; when it is up they are tried one by one
_CHUNK = 8  # samples
_WORKER_MEMORY = 4 << 30  # bytes of address space
_MAX_EXPRESSION = 400  # characters; LaTeX without end takes math-verify minutes
_MAX_STATEMENT = 2_000  # characters that the exact rungs look at
_MAX_TEXT = 1_000  # characters of prose, from its end, that math-verify looks through
_MAX_ANSWER = 20_000  # characters, from its end, in which the statement is looked for
_MAX_DIGITS = 1_000  # of a fraction's parts; Python refuses to make an integer of more than 4,300

_IGNORED = "$*" + "".join(filter(str.isspace, map(chr, range(0x3001))))  # around an answer; the blanks of Unicode too

# --- What an answer states ----------------------------------------------------

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
_UNESCAPED_DOLLAR = re.compile(r"(?<!\\)\$")
_ANY_DOLLAR = re.compile(r"\\?\$")
_DOLLAR_SIGN = re.compile(r"(?<!\\)\\\$")


def _bare(text: str) -> str:
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


def _broken_off(text: str) -> bool:
    """Whether the answer ends within a box: nobody knows what it would have held."""
    start = text.rfind("\\boxed")
    if start < 0:
        return False
    rest = text[start + len("\\boxed") :].strip(f"{_IGNORED}.")
    return not rest or (rest.startswith("{") and _closing_brace(rest, 1) < 0)


def _is_expression(text: str) -> bool:
    """Whether it is mathematics (or one word) as a whole and not prose that contains some."""
    return len(text) <= _MAX_EXPRESSION and not _MARKED.search(text) and not _WORD.search(_COMMAND.sub("", text))


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


def _statement(answer: str) -> str | None:
    """The expression or the words that the answer gives as its result; None where that takes a search in prose."""
    answer = answer[-_MAX_ANSWER:]
    box = _boxed(answer)
    if box is not None:
        return _bare(box)
    bare = _bare(answer)
    if _is_expression(bare):
        return bare
    whole = _MATHS.fullmatch(answer.strip(" \n*."))
    if whole and "$" not in (inside := next(filter(None, whole.groups()))):
        return _bare(inside)
    anchor = None
    for anchor in _ANCHOR.finditer(answer.strip()):  # noqa: B007
        pass
    if anchor is None:
        if _PHRASE.fullmatch(bare):
            return bare
        listed = _CANDIDATES.search(bare[-_MAX_EXPRESSION:])
        return _JOINT.sub(", ", listed[1]) if listed else None
    rest = anchor.string[anchor.end() :]
    maths = _joined_maths(rest)
    if maths is not None:
        return _bare(maths)
    end = _SENTENCE_END.search(rest)
    sentence = _bare(rest[: end.start()] if end else rest)
    return sentence if _is_expression(sentence) or _PHRASE.fullmatch(sentence) else None


# --- The exact rungs ----------------------------------------------------------

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
    return _bare(text)


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
    if several and _value(single, _some) is not None:
        return _one_of_several(several, single), "lists"
    for number, text in ((a, answer), (b, reference)):
        if number and (_NAMES.fullmatch(text) or _SET.search(text)):
            return False, "words"
    return _different_values(reference, answer), "values"


# --- Values -------------------------------------------------------------------

_MIXED = re.compile(r"(?<![\d.}^])(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\[A-Za-z]+|\S")
_CONSTANTS = {"e": complex(math.e), "i": 1j, "\\pi": complex(math.pi)}
_PAIRS = {"(": ")", "{": "}", "[": "]"}


class _Evaluation:
    """The value of a LaTeX expression of sums, products, powers, fractions and roots, its letters standing for numbers.

    Raises ValueError for whatever else it meets, and for what may be read in two ways.
    """

    def __init__(self, text: str, letter: Callable[[str], complex]) -> None:
        self.tokens = _TOKEN.findall(_MIXED.sub(r"(\1+\\frac{\2}{\3})", text))[::-1]
        self.letter = letter
        self.value = self.total()
        if self.tokens:
            raise ValueError(f"{self.tokens[-1]} is left over")

    def next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def total(self) -> complex:
        value = 0j
        while True:
            sign = -1 if self.next() == "-" else 1
            if self.next() in ("+", "-"):
                self.tokens.pop()
            value += sign * self.product()
            if self.next() not in ("+", "-"):
                return value

    def product(self) -> complex:
        value = self.power()
        while True:
            token = self.next()
            if token in ("*", "\\cdot", "\\times"):
                self.tokens.pop()
                value *= self.power()
            elif token == "/":
                self.tokens.pop()
                value /= self.power()
                if self.begins():
                    raise ValueError("1/2x")
            elif self.begins():
                if token[0].isdigit():
                    raise ValueError("2 3")
                value *= self.power()
            else:
                return value

    def begins(self) -> bool:
        token = self.next()
        return bool(token) and (token[0].isalnum() or token in ("(", "{", "\\frac", "\\sqrt", "\\pi"))

    def power(self) -> complex:
        value = self.atom()
        while self.next() == "^":
            self.tokens.pop()
            value = value ** self.argument()
        return value

    def argument(self) -> complex:
        """What a command or a power applies to: a group, or one character."""
        if len(self.next()) > 1 and self.next()[0].isdigit():
            raise ValueError("x^12")
        return self.atom()

    def group(self, opening: str) -> complex:
        if not self.tokens or self.tokens.pop() != opening:
            raise ValueError(f"no {opening}")
        value = self.total()
        if not self.tokens or self.tokens.pop() != _PAIRS[opening]:
            raise ValueError(f"no {_PAIRS[opening]}")
        return value

    def atom(self) -> complex:
        token = self.next()
        if token in ("(", "{"):
            return self.group(token)
        if not token:
            raise ValueError("nothing")
        self.tokens.pop()
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if token == "\\frac":
            return self.group("{") / self.group("{")
        if token == "\\sqrt":
            degree = self.group("[") if self.next() == "[" else 2
            return self.argument() ** (1 / degree)
        if token.isascii() and token.isalpha():
            return self.letter(token)
        return complex(float(token))


def _value(text: str, letter: Callable[[str], complex]) -> complex | None:
    try:
        return _Evaluation(text, letter).value
    except (ValueError, ArithmeticError, RecursionError):
        return None


def _some(letter: str) -> complex:
    return complex(1 + ord(letter) * 0.6180339887 % 1)


def _one(letter: str) -> complex:
    return complex(1)


def _letters(text: str) -> set[str]:
    return {token for token in _TOKEN.findall(text) if token.isalpha() and token not in _CONSTANTS}


def _far_apart(a: complex, b: complex) -> bool:
    """Farther than math-verify's rounding to six decimals."""
    return abs(a - b) > 1e-3 * max(abs(a), abs(b)) and abs(a - b) > 1e-5


def _different_values(reference: str, answer: str) -> bool | None:
    """False where two expressions differ for some value of their letters, None otherwise.

    Where only one has letters they may be a unit: it has to differ without it, too.
    """
    if max(len(reference), len(answer)) > _MAX_EXPRESSION:
        return None
    for text, other in ((reference, answer), (answer, reference)):
        if text.endswith("%"):
            parts = text[:-1]
            both = {_different_values(parts, other), _different_values(f"\\frac{{{parts}}}{{100}}", other)}
            return False if both == {False} else None
    a, b = _value(reference, _some), _value(answer, _some)
    if a is None or b is None or not _far_apart(a, b):
        return None
    if _letters(reference) != _letters(answer):
        a, b = _value(reference, _one), _value(answer, _one)
        if a is None or b is None or not _far_apart(a, b):
            return None
    return False


@functools.lru_cache(maxsize=65_536)  # a query's reference answer is asked for N times a step, and again every epoch
def _reference(text: str) -> str:
    """A reference answer as one expression; a list as text ("['2', '3']") gives its entries, separated by commas."""
    bare = text.strip()
    if bare.startswith("['") or bare.startswith('["'):
        try:
            entries = ast.literal_eval(bare)
        except (SyntaxError, ValueError):
            return _bare(bare)
        bare = ", ".join(_bare(str(entry)) for entry in entries)
    return _bare(_UNESCAPED_DOLLAR.sub("", bare))


@functools.lru_cache(maxsize=65_536)
def _normalised_reference(text: str) -> str:
    return _normalise(_reference(text))


def _settle(reference: str, answer: str) -> tuple[bool | None, str]:
    """The verdict of the exact rungs on a whole answer, and the rung that gave it."""
    bare = _bare(answer)
    if bare in (_bare(reference), _reference(reference)):
        return True, "text"
    if len(bare) <= _MAX_STATEMENT:
        number, other = _number(_reference(reference)), _number(bare)
        if number and other:
            verdict = _equal_numbers(number, other)
            return verdict, "numbers" if verdict is not None else "symbolic"
    statement = _statement(answer)
    if statement == "" or (statement is None and _broken_off(answer)):
        return False, "text"
    if statement is None or max(len(statement), len(reference)) > _MAX_STATEMENT:
        return None, "symbolic"
    verdict, rung = _settle_normalised(_normalised_reference(reference), _normalise(statement))
    return verdict, rung if verdict is not None else "symbolic"


# --- math-verify --------------------------------------------------------------


def _timeout() -> int | None:
    """math-verify's time limit is a signal, which only the main thread can take."""
    return int(TIMEOUT_S) if threading.current_thread() is threading.main_thread() else None


def _parse(text: str, timeout: int | None) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    return parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()], parsing_timeout=timeout)


@functools.lru_cache(maxsize=65_536)
def _parse_reference(text: str, timeout: int | None) -> list:
    return _parse(f"${text}$", timeout)


def _parse_answer(answer: str, timeout: int | None) -> list:
    """What the answer states, as a whole; else what math-verify finds at the end of the prose."""
    statement = _statement(answer)
    if statement is not None and len(statement) <= _MAX_EXPRESSION:
        found = _parse(f"${_ANY_DOLLAR.sub('', statement)}$", timeout)
        if found:
            return found
    elif statement is not None:
        return []
    return _parse(_DOLLAR_SIGN.sub("", answer.strip()[-_MAX_TEXT:]), timeout)


def _differ_clearly(a: list, b: list) -> bool:
    """Whether both are numbers whose values are far apart: cheaper than to simplify their difference."""
    from sympy import Expr

    if not (a and b and isinstance(a[0], Expr) and isinstance(b[0], Expr) and a[0].is_number and b[0].is_number):
        return False
    try:
        x, y = complex(a[0].evalf(15)), complex(b[0].evalf(15))
    except (TypeError, ValueError, ArithmeticError):  # a number that sympy cannot evaluate, such as a huge power
        return False
    return abs(x - y) > 1e-3 * max(abs(x), abs(y), 1.0)


def _symbolic(reference: str, answer: str, timeout: int | None = None) -> bool:
    from math_verify import verify

    a, b = _parse_reference(_reference(reference), timeout), _parse_answer(answer, timeout)
    return not _differ_clearly(a, b) and verify(a, b, timeout_seconds=timeout)


# --- Workers ------------------------------------------------------------------


_REHEARSAL = (  # the grammar's parser is slow on the first sight of a construct
    ("\\sin^2 y + \\cos(2x)", "\\frac{16}{5}"),
    ("\\begin{pmatrix} -1/3 \\\\ 2 \\end{pmatrix}", "\\left( \\frac{1}{4}, -\\frac{3}{4} \\right)"),
    ("(-\\infty,-8]\\cup [8,\\infty)", "(0,5) \\cup (5,\\infty)"),
    ("26x^2+30x - 1", "x(30+26x) - y"),
    ("7\\text{ hours}", "\\frac{1}{7}\\triangle ABC"),
    ("\\log\\left(\\frac{2007}{2006}\\right)", "\\ln 2 + \\lfloor\\sqrt{n-1}\\rfloor"),
    ("12x - 4y + 3z - 169 = 0", "y = 2x + 3"),
    ("\\{1, \\sqrt[3]{2}\\}", "1 \\pm \\sqrt{19}"),
    ("x \\in [-2,7]", "-2 \\le x < 7"),
    ("\\binom{2n}{n}", "\\frac{(2n)!}{n! \\cdot n!}"),
    ("2^{1009} + |x|", "3 \\times e^{i \\pi}"),
    ("1:4", "10\\%"),
    ("A, B", "\\text{Evelyn}"),
)


def _prepare_worker() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY, _WORKER_MEMORY))


def _check_chunk(compare: Callable[[str, str], bool], pairs: list[tuple[str, str]]) -> list[bool]:
    return [compare(reference, answer) for reference, answer in pairs]


def _run(
    pool: Any, compare: Callable[[str, str], bool], chunks: list[list[tuple[str, str]]], limit: float
) -> list[bool | None]:
    """The verdicts on all pairs, in order; None for all of a chunk that did not end well within the limit."""
    futures = [pool.schedule(_check_chunk, args=(compare, chunk), timeout=limit) for chunk in chunks]
    verdicts: list[bool | None] = []
    for chunk, future in zip(chunks, futures, strict=True):
        try:
            verdicts += future.result()
        except Exception:  # the time was up, the worker died (pebble's ProcessExpired), or the rung itself raised
            verdicts += [None] * len(chunk)
    return verdicts


def _serve(channel: Connection, workers: int) -> None:
    """Answer batches of pairs until the other end is closed. Runs in a process that imports nothing heavy."""
    from pebble import ProcessPool

    logging.disable(logging.WARNING)  # math-verify warns of having no time limit, and of what it cannot take
    for reference, answer in _REHEARSAL:  # what is imported and learnt before the workers are forked they share
        _symbolic(reference, f"${answer}$")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel.send("ready")
    with ProcessPool(workers, initializer=_prepare_worker, context=multiprocessing.get_context("fork")) as pool:
        while True:
            try:
                pairs, compare, timeout = channel.recv()
            except EOFError:
                pool.stop()
                return
            size = max(1, min(_CHUNK, len(pairs) // (2 * workers)))
            chunks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
            verdicts = _run(pool, compare, chunks, min(timeout, _CHUNK_TIMEOUT_S))
            failed = [i for i, verdict in enumerate(verdicts) if verdict is None]
            for i, verdict in zip(failed, _run(pool, compare, [[pairs[i]] for i in failed], timeout), strict=True):
                verdicts[i] = verdict
            channel.send(verdicts)


class _Server:
    """The process that holds the pool of workers.

    It is a plain subprocess: it may be started from any thread and from a daemonic process, shares nothing with CUDA in
    this one, does not import this one's script again, and ends when this process does, however that ends.
    """

    def __init__(self) -> None:
        self.channel, other = Pipe()
        workers = len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if multiprocessing.parent_process() is not None:
            workers = 1  # a sibling of this process has its own
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            "from multiprocessing.connection import Connection\n"
            "from hgpo_trl.verification import _serve\n"
            f"_serve(Connection({other.fileno()}), {max(1, workers)})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[other.fileno()], stdin=subprocess.DEVNULL
        )
        other.close()
        try:
            self.channel.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise RuntimeError("The process that verifies answers did not start; its own error is above.") from error

    def ask(self, pairs: list[tuple[str, str]], compare: Callable, timeout: float) -> list[bool | None]:
        self.channel.send((pairs, compare, timeout))
        return self.channel.recv()

    def close(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()


_server: _Server | None = None
_lock = threading.Lock()


def _close() -> None:
    global _server
    if _server is not None:
        _server.close()
        _server = None


def _forget() -> None:
    """A forked child starts a server of its own."""
    global _server, _lock
    _lock = threading.Lock()
    if _server is not None:
        _server.channel.close()
        _server = None


atexit.register(_close)
os.register_at_fork(after_in_child=_forget)


def _ask_server(pairs: list[tuple[str, str]], compare: Callable, timeout: float) -> list[bool | None]:
    global _server
    with _lock:
        for _ in range(2):  # a server that was killed, for want of memory or by a user, is replaced once
            if _server is None or _server.process.poll() is not None:
                _close()
                _server = _Server()
            try:
                return _server.ask(pairs, compare, timeout)
            except (EOFError, OSError):
                _close()
            except BaseException:  # an interrupt: what is still to come would be taken for the next batch's verdicts
                _close()
                raise
    return [None] * len(pairs)


# --- Public -------------------------------------------------------------------


def answers_match(reference: str, answer: str) -> bool:
    """Whether the answer equals the reference answer, decided in this process.

    In the main thread math-verify gives up after `TIMEOUT_S` (False); in another thread nothing stops it.
    """
    verdict, _ = _settle(reference, answer)
    return _symbolic(reference, answer, _timeout()) if verdict is None else verdict


def check_answers(
    references: Sequence[str],
    answers: Sequence[str],
    *,
    timeout: float = TIMEOUT_S,
    compare: Callable[[str, str], bool] = _symbolic,
) -> list[bool | None]:
    """Whether each answer equals its reference answer, in order.

    What the exact rungs do not settle goes, once per distinct pair, to worker processes that are killed at the limit.
    From any thread; the workers are started when they are first needed and kept.

    Args:
        references: reference answers; a list as text ("['2', '3']") asks for all its entries.
        answers: as many answers: an expression, or prose with the result in it.
        timeout: seconds for one sample.
        compare: the last rung.

    Returns:
        True, False or, where the verifier got stuck or crashed on this sample, None.

    Raises:
        ValueError: not as many answers as references.
    """
    if len(references) != len(answers):
        raise ValueError(f"answers: {len(answers)} for {len(references)} references: give one per reference.")
    verdicts: dict[tuple[str, str], bool | None] = {
        pair: _settle(*pair)[0] for pair in dict.fromkeys(zip(references, answers, strict=True))
    }
    rest = sorted(pair for pair, verdict in verdicts.items() if verdict is None)
    if rest:
        verdicts.update(zip(rest, _ask_server(rest, compare, timeout), strict=True))
    return [verdicts[pair] for pair in zip(references, answers, strict=True)]
