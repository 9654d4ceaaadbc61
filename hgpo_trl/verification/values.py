"""Values of LaTeX expressions, to tell apart at once what differs at a point. It never says that two are equal."""

import math
import re
from collections.abc import Callable

from hgpo_trl.verification.statements import MAX_EXPRESSION

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


def has_value(text: str) -> bool:
    """Whether it can be evaluated."""
    return _value(text, _some) is not None


def _some(letter: str) -> complex:
    return complex(1 + ord(letter) * 0.6180339887 % 1)


def _one(letter: str) -> complex:
    return complex(1)


def _letters(text: str) -> set[str]:
    return {token for token in _TOKEN.findall(text) if token.isalpha() and token not in _CONSTANTS}


def _far_apart(a: complex, b: complex) -> bool:
    """Farther than math-verify's rounding to six decimals."""
    return abs(a - b) > 1e-3 * max(abs(a), abs(b)) and abs(a - b) > 1e-5


def different_values(reference: str, answer: str) -> bool | None:
    """False where two expressions differ for some value of their letters, None otherwise.

    Where only one has letters they may be a unit: it has to differ without it, too.
    """
    if max(len(reference), len(answer)) > MAX_EXPRESSION:
        return None
    for text, other in ((reference, answer), (answer, reference)):
        if text.endswith("%"):
            parts = text[:-1]
            both = {different_values(parts, other), different_values(f"\\frac{{{parts}}}{{100}}", other)}
            return False if both == {False} else None
    a, b = _value(reference, _some), _value(answer, _some)
    if a is None or b is None or not _far_apart(a, b):
        return None
    if _letters(reference) != _letters(answer):
        a, b = _value(reference, _one), _value(answer, _one)
        if a is None or b is None or not _far_apart(a, b):
            return None
    return False
