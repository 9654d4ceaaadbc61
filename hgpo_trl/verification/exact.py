"""The exact rungs: text, numbers, words, equations, lists and values. Each settles a verdict or passes on."""

import ast
import functools
import re
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from hgpo_trl.verification import values
from hgpo_trl.verification.spelling import marks, normalise, split, tight
from hgpo_trl.verification.statements import (
    DOLLAR,
    MAX_STATEMENT,
    boxed,
    broken_off,
    in_words,
    is_expression,
    stated,
    stripped,
)

_MAX_DIGITS = 1_000  # of a fraction's parts; Python refuses to make an integer of more than 4,300
_MAX_ROUNDED = 15  # characters: as many digits as floating point tells
_ROUNDED = 6  # digits from which a decimal is taken for a rounded value

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
_POWER = r"(?:\^\{?[23]\}?)?"
_UNIT_WORDS = rf"\\text\{{(?![^{{}}]*\b(?:or|and|not|more|less|than|if|at)\b)[^{{}}\d]*\}}{_POWER}"
_UNIT = (
    rf"(?:{_UNIT_WORDS}(?:/{_UNIT_WORDS})?|[kmc]?m/(?:h|hr|s|min)"
    rf"|(?!or\b|and\b|not\b)(?:cm|mm|km|kg|ft|[a-z]{{4,}}(?: [a-z]{{2,}}){{0,2}}|day|USD|feet|mph){_POWER})?"
)
_NUMBER = re.compile(rf"(?P<sign>[+-]?)(?P<value>{_DECIMAL})(?P<percent>%?){_UNIT}")
_INTEGER = rf"-?\d{{1,{_MAX_DIGITS}}}"
_RATIO = re.compile(
    rf"(?P<sign>[+-]?)(?P<whole>\d{{0,{_MAX_DIGITS}}})\\frac\{{(?P<top>{_INTEGER})\}}\{{(?P<bottom>{_INTEGER})\}}"
    rf"(?P<percent>%?){_UNIT}"
)
_SLASH = re.compile(
    rf"(?P<sign>[+-]?)(?P<whole>)(?P<top>\d{{1,{_MAX_DIGITS}}})/(?P<bottom>\d{{1,{_MAX_DIGITS}}})(?P<percent>%?)"
)
_SPACED = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_NUMBERS_IN_A_ROW = re.compile(r"[-\d.,]+(?: [-\d.,]+)+")
_BASED = re.compile(r"(?P<digits>-?[0-9A-Fa-f]+)_\{?(?P<base>\d{1,2})\}?")
_WORDS = re.compile(r"\\text\{([^{}]*)\}|([A-Za-z][A-Za-z' -]*(?: [\w' -]*)?)")
_NAMES = re.compile(r"\\text\{[^{}]+\}|[A-Za-z]{3,}[A-Za-z ]*")
_SET = re.compile(  # or a matrix, or an inequality
    r"\\(?:cup|cap|in|infty|begin|le|ge|ne|emptyset)(?![A-Za-z])|[<>]"
)
_DENIAL = re.compile(
    r"\b(?:or|not|never|cannot|neither|nor|except|either)\b|n't\b|\?|\\ne(?![A-Za-z])|\\neg(?![A-Za-z])", re.IGNORECASE
)
_CHOICE = re.compile(r"(?:\\text\{)?\(?(?:\\text\{)?\(?(?:[Oo]ption |[Cc]hoice )?\(?([A-Z])\)?\}?\)?\}?")
_LABEL = re.compile(r"(?:\\text\{)?\(?([A-J])(?:\)|\.|:)\}?\s*([^}\s].*)")
_BRACKETS = (("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("\\{", "\\}"))
_MAX_SET = 30
_NAME = re.compile(
    r"\\?[A-Za-z]+'?(?:_(?:\{\w+\}|\w))?'?(?:\^2)?|[A-Za-z](?:_(?:\{\w+\}|\w))?(?:\^\{-1\})?\([^()=]*\)"
    r"|\\angle ?[A-Z]+|\\(?:text|overline)\{[^{}]*\}|[|\[][A-Za-z]+[|\]]"
)
_TUPLE_NAME = re.compile(r"\(([A-Za-z_\d{}\\]+(?:, ?[A-Za-z_\d{}\\]+)+)\)")
_IN = re.compile(r"(\\?[A-Za-z]+(?:_\w)?) ?\\in(?![A-Za-z]) ?(.+)")
_VARIABLE = re.compile(r"\\[a-z]+|[A-Za-z](?:_(?:\{\w+\}|\w))?")
_MODULUS = re.compile(r" ?\\pmod\{(\w+)\}$")
_APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])")
_MATRIX = re.compile(r"\\begin\{([pbv]?matrix)\}(.*)\\end\{\1\}", re.DOTALL)
_SIGNS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_RELATIONS = ("<", ">", "\\le", "\\ge")
_UNCLEAR = re.compile(r"[-+*/=<>^]$|\\dots(?![A-Za-z])|[#?;\"&]|\\text\{[^{}]*\b(?:and|or|not|more|less|than|if)\b")
_WORKED = re.compile(r"^####\s*(\S.*?)\s*\Z", re.MULTILINE)


# --- numbers and words -------------------------------------------------------------------------------------------


class _Number(NamedTuple):
    value: Decimal | Fraction
    percent: bool


def _number(text: str) -> _Number | None:
    match = _NUMBER.fullmatch(text)
    if match:
        return _Number(Decimal(match["sign"] + match["value"].replace(",", "")), bool(match["percent"]))
    match = _RATIO.fullmatch(text) or _SLASH.fullmatch(text)
    if match and int(match["bottom"]):
        value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
        return _Number(-value if match["sign"] == "-" else value, bool(match["percent"]))
    if _SPACED.fullmatch(text):
        return _Number(Decimal(text.replace(" ", "")), False)
    return None


def _equal_numbers(a: _Number, b: _Number) -> bool:
    """Exactly, or to the last digit of a decimal that is long enough to be a rounded fraction.

    "50%" equals 1/2 as well as 50.
    """
    if isinstance(a.value, Decimal) and isinstance(b.value, Decimal) and a.percent == b.percent:
        return a.value == b.value
    x, y = Fraction(a.value), Fraction(b.value)
    if x == y or (a.percent != b.percent and (x / 100 == y if a.percent else x == y / 100)):
        return True
    if a.percent != b.percent or isinstance(a.value, Fraction) == isinstance(b.value, Fraction):
        return False
    decimal, other = (a.value, y) if isinstance(a.value, Decimal) else (b.value, x)
    return _rounds_to(decimal, other)  # type: ignore[arg-type]


def _rounds_to(decimal: Decimal, exact: Fraction) -> bool:
    """Whether a decimal of six digits or more after the point is this value, rounded or cut off."""
    places = -int(decimal.as_tuple().exponent)
    if not _ROUNDED <= places <= _MAX_DIGITS or len(decimal.as_tuple().digits) < _ROUNDED:
        return False
    return abs(Fraction(decimal) - exact) < Fraction(1, 10**places)


def _words(text: str) -> str | None:
    match = _WORDS.fullmatch(text)
    if not match:
        return None
    words = " ".join((match[1] if match[1] is not None else match[2]).split())
    return words.casefold() if len(words) > 1 else words


def _compare_words(reference: str, answer: str) -> bool | None:
    choice, other = _CHOICE.fullmatch(reference), _CHOICE.fullmatch(answer)
    if choice and other:
        return choice[1] == other[1]
    words, others = _words(reference), _words(answer)
    if words is None or others is None:
        return None
    if words == others:
        return True
    if "'" in words or "'" in others:
        return False
    return None if max(len(words), len(others)) < 3 and is_expression(words) and is_expression(others) else False


# --- lists -------------------------------------------------------------------------------------------------------


class _List(NamedTuple):
    opening: str  # "" for none
    items: list[str]
    closing: str

    @property
    def ordered(self) -> bool:
        return self.opening in ("(", "[") or any("\\dots" in item for item in self.items)


def _items(text: str) -> _List | None:
    """A list of at least two entries, or a set."""
    for opening, closing in _BRACKETS:
        if text.startswith(opening) and text.endswith(closing):
            items = split(text[len(opening) : -len(closing)], ",")
            if items and (len(items) > 1 or opening == "\\{"):
                return _List(opening, _with_both_signs(items, opening), closing)
    items = split(text, ",")
    if items and (len(items) > 1 or (len(marks(text, "\\pm")) == 1 and not marks(text, "="))):
        items = _with_both_signs(items, "")
        return _List("", items, "") if len(items) > 1 else None
    return None


def _with_both_signs(items: list[str], opening: str) -> list[str]:
    r"""The two numbers that `1 \pm 2` stands for in a set or a list."""
    if opening in ("(", "["):
        return items
    expanded = []
    for item in items:
        one = len(_SIGNS.findall(item)) == 1
        expanded += [_SIGNS.sub("+", item).lstrip("+"), _SIGNS.sub("-", item)] if one else [item]
    return expanded


def _compare_lists(a: _List, b: _List) -> bool | None:
    """Tuples, intervals and sequences in order; sets and bare lists in any order; a set is no tuple."""
    if "" not in (a.opening, b.opening) and (a.opening, a.closing) != (b.opening, b.closing):
        return False
    if len(a.items) != len(b.items) or len(a.items) > _MAX_SET:
        return False if a.ordered or b.ordered or max(len(a.items), len(b.items)) <= _MAX_SET else None
    if (a.opening == "[") != (b.opening == "["):
        return False
    if not a.ordered and not b.ordered:
        named = _compare_named(a, b)
        if named is not None:
            return named[0]
        a, b = _without_names(a), _without_names(b)
    if a.ordered or b.ordered:
        return _all(_settle(x, y)[0] for x, y in zip(a.items, b.items, strict=True))
    return _compare_unordered(a.items, b.items)


def _compare_unordered(a: list[str], b: list[str]) -> bool | None:
    """Each entry has a partner of its own."""
    left = list(b)
    undecided = False
    for x in a:
        verdicts = [_settle(x, y)[0] for y in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            undecided = True
        else:
            return False
    return None if undecided else True


def _all(verdicts: object) -> bool | None:
    found = list(verdicts)  # type: ignore[call-overload]
    return False if False in found else None if None in found else True


def _name_and_value(item: str) -> tuple[str, str] | None:
    sides = split(item, "=")
    if not sides or len(sides) != 2 or not _NAME.fullmatch(sides[0]):
        return None
    return tight(sides[0]), sides[1]


def _assignments(items: list[str]) -> dict[str, str] | None:
    """The values of two or more unknowns by their names; None where it is not that, or one has several."""
    pairs = [_name_and_value(item) for item in items]
    names = {pair[0] for pair in pairs if pair}
    if len(names) < len(items):
        return None
    return dict(pair for pair in pairs if pair)


def _compare_named(a: _List, b: _List) -> tuple[bool | None] | None:
    """Unknowns by their names, in any order; with values alone in the order of the names. None for other lists."""
    named, others = _assignments(a.items), _assignments(b.items)
    if named is None and others is None:
        return None
    if named is not None and others is not None:
        if named.keys() != others.keys():
            return (False,)
        return (_all(_settle(named[name], others[name])[0] for name in named),)
    names = named or others or {}
    if named is None and len({name[0] for name in names}) == 1:  # x_1 and x_2 are two values of one unknown
        return None
    values_ = [[*names.values()], b.items if named is not None else a.items]
    return (_all(_settle(x, y)[0] for x, y in zip(*values_, strict=True)),)


def _without_names(items: _List) -> _List:
    """The values of one unknown: `x = 2, x = 3`, `n = 2, 3`."""
    pairs = [_name_and_value(item) for item in items.items]
    names = {pair[0][0] for pair in pairs if pair}
    if pairs[0] is None or len(names) != 1:
        return items
    return items._replace(items=[pair[1] if pair else item for pair, item in zip(pairs, items.items, strict=True)])


def _one_of_several(several: _List, single: str) -> bool | None:
    """A list is not a number, unless all its entries are equal to it."""
    if several.opening in ("(", "["):
        return False
    return _all(_settle(item, single)[0] for item in several.items)


# --- equations, inequalities, matrices -----------------------------------------------------------------------------


def _sides(text: str) -> list[str]:
    return split(text, "=") or [text]


def _compare_equations(reference: str, answer: str) -> bool | None:
    """An equation gives the value on its right; a reference that is one does so if its left is a name."""
    left, right = _sides(reference), _sides(answer)
    if len(left) == 1:
        if len(right) == 2 and _NAME.fullmatch(right[1]) and not _NAME.fullmatch(right[0]):
            return _settle(left[0], right[0])[0]
        return _settle(left[0], right[-1])[0]
    if _NAME.fullmatch(left[-1]) and len(left) == 2 and not _NAME.fullmatch(left[0]):
        left = left[::-1]
    if len(right) == 1:
        if _NAME.fullmatch(left[0]) or _TUPLE_NAME.fullmatch(left[0]) or len(left) > 2:
            return _settle(left[-1], right[0])[0]
        return False if values.has_value(right[0]) else None
    if _NAME.fullmatch(right[-1]) and len(right) == 2 and not _NAME.fullmatch(right[0]):
        right = right[::-1]
    same = tight(left[0]) == tight(right[0])
    if same or (len(left) > 2 and len(right) > 2):
        verdict = _settle(left[-1], right[-1])[0]
        if verdict is not False or _NAME.fullmatch(left[0]) or _TUPLE_NAME.fullmatch(left[0]):
            return verdict
    if _TUPLE_NAME.fullmatch(left[0]) or _TUPLE_NAME.fullmatch(right[0]):
        a, b = _unfolded(left), _unfolded(right)
        return _compare_lists(a, b) if a and b else False
    named = _VARIABLE.fullmatch(left[0]) and _VARIABLE.fullmatch(right[0])
    if named and values.is_number(left[-1]) and values.is_number(right[-1]):
        return False
    if len(left) == len(right) == 2:
        return values.proportional(*(f"{side[0]}-({side[1]})" for side in (left, right))) or None
    return None


def _unfolded(sides: list[str]) -> _List | None:
    """`(x, y) = (2, 3)` as `x = 2, y = 3`."""
    names, entries = _TUPLE_NAME.fullmatch(sides[0]), _items(sides[-1])
    if not names or not entries or len(entries.items) != len(found := names[1].split(",")):
        return None
    return _List("", [f"{name.strip()}={entry}" for name, entry in zip(found, entries.items, strict=True)], "")


def _interval(text: str) -> tuple[str, str] | None:
    """The variable and the interval that an inequality, or a statement of membership, gives it."""
    member = _IN.fullmatch(text)
    if member:
        return member[1], member[2]
    signs = marks(text, *_RELATIONS)
    parts = split(text, *_RELATIONS)
    if not signs or not parts or len(parts) > 3:
        return None
    if signs[0] in (">", "\\ge"):
        parts, signs = parts[::-1], signs[::-1]
        signs = [{">": "<", "\\ge": "\\le"}.get(sign, "") for sign in signs]
    if not all(sign in ("<", "\\le") for sign in signs):
        return None
    if len(parts) == 3:
        low, variable, high = parts
        opening, closing = "(["[signs[0] == "\\le"], ")]"[signs[1] == "\\le"]
    elif _VARIABLE.fullmatch(parts[0]) and not _VARIABLE.fullmatch(parts[1]):
        low, variable, high = "-\\infty", *parts
        opening, closing = "(", ")]"[signs[0] == "\\le"]
    elif _VARIABLE.fullmatch(parts[1]) and not _VARIABLE.fullmatch(parts[0]):
        low, variable, high = *parts, "\\infty"
        opening, closing = "(["[signs[0] == "\\le"], ")"
    else:
        return None
    return (variable, f"{opening}{low},{high}{closing}") if _VARIABLE.fullmatch(variable) else None


def _compare_intervals(reference: str, answer: str) -> tuple[bool | None] | None:
    """Inequalities as intervals. None where neither is one, or they cannot be."""
    a, b = _interval(reference), _interval(answer)
    if a and b and a[0] != b[0]:
        return None
    if not a and not b:
        return None
    left, right = a[1] if a else reference, b[1] if b else answer
    if (not a or not b) and left[:1] + right[:1] not in ("((", "([", "[(", "[["):
        return None
    return (_settle(left, right)[0],)


def _union(text: str) -> list[str] | None:
    parts = split(text, "\\cup")
    if parts and len(parts) > 1:
        return parts
    listed = split(text, ",")
    if not listed or len(listed) < 2 or not all(marks(item, *_RELATIONS) for item in listed):
        return None
    intervals = [_interval(item) for item in listed]
    return [interval[1] for interval in intervals if interval] if all(intervals) else None


def _rows(text: str) -> list[list[str]] | None:
    match = _MATRIX.fullmatch(text)
    if not match or "\\begin" in match[2]:
        return None
    rows = [row for row in re.split(r"\\\\(?:\[\w*\])?", match[2]) if row.strip()]
    return [[normalise(cell) for cell in row.split("&")] for row in rows]


def _compare_matrices(a: list[list[str]], b: list[list[str]]) -> bool | None:
    if [len(row) for row in a] != [len(row) for row in b]:
        return False
    return _all(_settle(x, y)[0] for row, other in zip(a, b, strict=True) for x, y in zip(row, other, strict=True))


# --- values ------------------------------------------------------------------------------------------------------


def _compare_values(reference: str, answer: str) -> bool | None:
    reference, answer = (text.replace(",", "") if _NUMBER.fullmatch(text) else text for text in (reference, answer))
    for text, other in ((reference, answer), (answer, reference)):
        if text.endswith("%") and not other.endswith("%"):
            parts = text[:-1]
            both = [values.compare(parts, other), values.compare(f"\\frac{{{parts}}}{{100}}", other)]
            return True if True in both else None if None in both else False
        if text.endswith("%"):
            return values.compare(reference[:-1], answer[:-1])
    verdict = values.compare(reference, answer)
    if verdict is False and (_rounded(reference, answer) or _rounded(answer, reference)):
        return True
    return verdict


def _rounded(text: str, other: str) -> bool:
    """Whether the one is a decimal that the other, an irrational number, rounds to."""
    number = _NUMBER.fullmatch(text)
    if not number or "." not in number["value"] or len(text) > _MAX_ROUNDED or not values.is_number(other):
        return False
    found = values.value(other)
    decimal = Decimal(number["sign"] + number["value"].replace(",", ""))
    return found is not None and not found.imag and _rounds_to(decimal, Fraction(found.real))


def _without_modulus(text: str) -> tuple[str, str]:
    match = _MODULUS.search(text)
    return (text[: match.start()], match[1]) if match else (text, "")


def _congruent(reference: str, answer: str) -> tuple[bool | None, str] | None:
    """A residue, with or without its modulus and the name of what is congruent to it; None without a modulus."""
    (left, modulus), (right, other) = _without_modulus(reference), _without_modulus(answer)
    if not modulus and not other:
        return None
    if modulus and other and modulus != other:
        return False, "values"
    left, right = left.replace("\\equiv", "="), right.replace("\\equiv", "=")
    verdict, rung = _settle(left, right)
    if modulus and other and verdict is False and modulus.isdigit() and int(modulus):
        a, b = _sides(left), _sides(right)
        x, y = values.rational(a[-1]), values.rational(b[-1])
        if x is not None and y is not None and [tight(side) for side in a[:-1]] == [tight(side) for side in b[:-1]]:
            return (x - y) % int(modulus) == 0, "values"
    return verdict, rung


# --- the rungs ---------------------------------------------------------------------------------------------------


def _approximate(text: str) -> str:
    r"""Without the rounded value after `\approx`, unless it is all that is there."""
    exact, *rounded = _APPROXIMATELY.split(text)
    if not rounded:
        return text
    exact = exact.strip()
    return exact if exact and not _NAME.fullmatch(exact) else rounded[-1].strip()


def _settle(reference: str, answer: str) -> tuple[bool | None, str]:
    """The verdict of the exact rungs and the rung; None where they do not settle it."""
    if tight(reference) == tight(answer):
        return True, "text"
    if not answer:
        return False, "text"
    a, b = _number(reference), _number(answer)
    if a and b:
        return _equal_numbers(a, b), "numbers"
    return _settle_structure(reference, answer, bool(a), bool(b))


def _settle_structure(reference: str, answer: str, a: bool, b: bool) -> tuple[bool | None, str]:
    based, other_based = _BASED.fullmatch(reference), _BASED.fullmatch(answer)
    if based and other_based:
        same = based["base"] == other_based["base"] and based["digits"].lstrip("0") == other_based["digits"].lstrip("0")
        return same, "numbers"
    if (based and b) or (other_based and a):
        return False, "numbers"
    if _DENIAL.search(answer) and not _DENIAL.search(reference):
        return False, "words"
    label, single = _LABEL.fullmatch(answer), _CHOICE.fullmatch(reference)
    if label and (single or not _LABEL.fullmatch(reference)) and not re.search(r"\b[A-J][).:]", label[2]):
        return (single[1] == label[1], "words") if single else _settle(reference, normalise(label[2]))
    verdict = _compare_words(reference, answer)
    if verdict is not None:
        return verdict, "words"
    if "\\approx" in answer or "\\approx" in reference:
        return _settle(_approximate(reference), _approximate(answer))
    if "\\pmod" in answer or "\\pmod" in reference:
        congruent = _congruent(reference, answer)
        if congruent is not None:
            return congruent
    matrices = _rows(reference), _rows(answer)
    if matrices[0] and matrices[1]:
        return _compare_matrices(matrices[0], matrices[1]), "lists"
    unions = _union(reference), _union(answer)
    if unions[0] and unions[1]:
        same = len(unions[0]) == len(unions[1])
        return _compare_unordered(unions[0], unions[1]) if same else None, "lists"
    intervals = _compare_intervals(reference, answer)
    if intervals is not None:
        return intervals[0], "lists"
    lists = None if a else _items(reference), None if b else _items(answer)
    if lists[0] and lists[1]:
        return _compare_lists(lists[0], lists[1]), "lists"
    if len(_sides(reference)) > 1 or len(_sides(answer)) > 1:
        if not lists[0] and not lists[1]:
            return _compare_equations(reference, answer), "equations"
        for listed, sides in ((lists[0], _sides(answer)), (lists[1], _sides(reference))):
            if listed and len(sides) == 2 and (unfolded := _unfolded(sides)):
                return _compare_lists(listed, unfolded), "lists"
            if listed and len(sides) > 1 and (listed is lists[0] or _NAME.fullmatch(sides[0])):
                return _settle(reference if lists[0] else sides[-1], answer if lists[1] else sides[-1])
    several, one = (lists[0], answer) if lists[0] else (lists[1], reference)
    if several and (values.has_value(one.rstrip("%")) or (several.opening == "" and several is lists[1])):
        return _one_of_several(several, one), "lists"
    for number, text in ((reference, answer), (answer, reference)):
        if (_SET.search(text) or _NAMES.fullmatch(text)) and values.has_value(number.rstrip("%")):
            return False, "words"
        if _NUMBERS_IN_A_ROW.fullmatch(text):
            return False, "numbers"
    ratios = split(reference, ":"), split(answer, ":")
    if ratios[0] and ratios[1] and len(ratios[0]) + len(ratios[1]) > 2:
        return _compare_ratios(ratios[0], ratios[1]), "values"
    return _compare_values(reference, answer), "values"


def _compare_ratios(a: list[str], b: list[str]) -> bool | None:
    r"""`2:4` is `1:2`, and `\frac{1}{2}`; `8:30`, which may be a time of day, is not `4:15`."""
    if len(a) == len(b) and _is_clock(a) and _is_clock(b):
        return [int(part) for part in a] == [int(part) for part in b]
    if len(a) == 1 or len(b) == 1:
        ratio, other = (a, b[0]) if len(a) > 1 else (b, a[0])
        return values.compare(f"\\frac{{{ratio[0]}}}{{{ratio[1]}}}", other) if len(ratio) == 2 else False
    if len(a) != len(b):
        return False
    return _all(values.compare(f"({x})({b[0]})", f"({y})({a[0]})") for x, y in zip(a[1:], b[1:], strict=True))


def _is_clock(parts: list[str]) -> bool:
    """Hours and minutes, or seconds too: every part but the first has two digits and is below 60."""
    hours, *rest = parts
    return bool(re.fullmatch(r"\d{1,2}", hours)) and all(re.fullmatch(r"[0-5]\d", part) for part in rest)


def final_answer(reference: str) -> str:
    """What follows `####` in the last line of a worked solution (GSM8K); any other reference as it is."""
    worked = _WORKED.search(reference) if "####" in reference else None
    return worked[1] if worked else reference


@functools.lru_cache(maxsize=65_536)  # a query's reference answer is asked for N times a step, and again every epoch
def expression(text: str) -> str:
    r"""A reference answer as one expression.

    That is the final answer of a worked solution, what a box holds, or the entries of a list as text ("['2', '3']"),
    separated by commas.
    """
    bare = final_answer(text).strip()
    if bare.startswith("['") or bare.startswith('["'):
        try:
            entries = ast.literal_eval(bare)
        except (SyntaxError, ValueError):
            return stripped(bare)
        bare = ", ".join(stripped(str(entry)) for entry in entries)
    if "box" in bare:
        inside = boxed(bare)
        bare = inside if inside else bare
    if bare[:2] in ("\\(", "\\["):
        bare = re.sub(r"\\[()\[\]]", "", bare)
    return stripped(DOLLAR.sub("", bare))


class _Reference(NamedTuple):
    expression: str
    number: _Number | None
    normalised: str


@functools.lru_cache(maxsize=65_536)
def _reference(text: str) -> _Reference:
    found = expression(text)
    return _Reference(found, _number(found), normalise(found))


def settle(reference: str, answer: str) -> tuple[bool | None, str]:
    """The verdict of the exact rungs on a whole answer, and the rung that gave it."""
    bare, expected = stripped(answer), _reference(reference)
    if bare in (expected.expression, stripped(reference)):
        return True, "text"
    if expected.number and len(bare) <= MAX_STATEMENT and (number := _number(bare)):
        return _equal_numbers(expected.number, number), "numbers"
    if in_words(bare, expected.expression):
        return True, "text"
    statement = stated(answer)
    if statement == "" or broken_off(answer):
        return False, "text"
    if max(len(statement), len(expected.normalised)) > MAX_STATEMENT:
        return False, "text"
    normalised = normalise(statement)
    verdict, rung = _settle(expected.normalised, normalised)
    if verdict is None and not (_is_clear(expected.normalised) and _is_clear(normalised)):
        return False, "text"
    return verdict, rung if verdict is not None else "symbolic"


def _is_clear(text: str) -> bool:
    """Whether it is one expression for math-verify, which takes from a text what it understands and leaves the rest."""
    return is_expression(text) and text.count("|") % 2 == 0 and split(text) is not None and not _UNCLEAR.search(text)
