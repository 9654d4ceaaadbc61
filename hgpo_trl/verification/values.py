"""Values of LaTeX expressions: numbers exactly, and expressions in letters where the letters stand for numbers.

An expression is parsed once and evaluated up to three times: in floating point, which tells most unequal ones apart; in
fractions, which settle whatever is rational, however large or small; in floating point of as many digits as it takes.
"""

import cmath
import functools
import math
import re
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from hgpo_trl.verification.statements import MAX_EXPRESSION

_MAX_BITS = 200_000  # of an exact numerator or denominator
_MAX_EXPONENT_BITS = 2_000  # of an exponent in floating point; a tower such as 9^{9^{9^9}} is beyond it
_PRECISION = 192  # bits
_MAX_PRECISION = 100_000
_MAX_WORK = 40_000  # bits times functions: what a policy can make this process compute takes well under a second
_MAX_DEPTH = 60

_MIXED = re.compile(r"(?<![\d.}^])(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d{0,50})\\overline\{(\d{1,50})\}")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\d.}])(\d+\.?\d*)[eE]([+-]?\d{1,6})(?![\d.A-Za-z])")
_TOKEN = re.compile(r"\d+\.?\d*|\.\d+|[A-Za-z]_(?:\{\w+\}|\w)|\\[A-Za-z]+|\S")
_CONSTANTS = {"e": "e", "i": "i", "\\pi": "pi"}
_PAIRS = {"(": ")", "{": "}", "[": "]"}
_GREEK = {
    f"\\{name}" for name in (
        "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi chi "
        "psi omega Delta Omega"
    ).split()
}  # fmt: skip
FUNCTIONS = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc", "arcsin": "asin",
    "arccos": "acos", "arctan": "atan", "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "ln": "log", "log": "log",
    "exp": "exp",
}  # fmt: skip
_FUNCTION = {f"\\{name}": function for name, function in FUNCTIONS.items()}

_Tree = tuple  # an operator and its operands, each a tree, or a leaf: ("number", text), ("letter", name), ("pi",)


class _NotExactError(ArithmeticError):
    """The value is irrational."""


class _TooLargeError(ArithmeticError):
    """The value has more digits than can be computed."""


# --- parsing -----------------------------------------------------------------------------------------------------


class _Parser:
    """The tree of sums, products, powers, fractions, roots, factorials and functions.

    Raises ValueError for whatever else it meets, and for what may be read in two ways.
    """

    def __init__(self, text: str) -> None:
        text = _REPEATING.sub(_repeating, text)
        text = _SCIENTIFIC.sub(r"(\1*10^{\2})", text)
        self.tokens = _TOKEN.findall(_MIXED.sub(r"(\1+\\frac{\2}{\3})", text))[::-1]
        self.depth = 0
        self.tree = self.total()
        if self.tokens:
            raise ValueError(f"{self.tokens[-1]} is left over")

    def next(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def total(self) -> _Tree:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ValueError("nested too deep")
        terms: list[_Tree] = []
        while not terms or self.next() in ("+", "-"):
            negative = self.next() == "-"
            if self.next() in ("+", "-"):
                self.tokens.pop()
            term = self.product()
            terms.append(("-", term) if negative else term)
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def product(self, *, of_function: bool = False) -> _Tree:
        tree = self.power()
        while True:
            token = self.next()
            if token in ("*", "\\cdot", "\\times") and not of_function:
                self.tokens.pop()
                tree = ("*", tree, self.signed())
            elif token in ("/", "\\div") and not of_function:
                self.tokens.pop()
                tree = ("/", tree, self.signed())
                if self.begins():
                    raise ValueError("1/2x")
            elif self.begins() and not (of_function and (token in _FUNCTION or token == "(")):
                if token[0].isdigit():
                    raise ValueError("2 3")
                tree = ("*", tree, self.power())
            else:
                return tree

    def signed(self) -> _Tree:
        if self.next() != "-":
            return self.power()
        self.tokens.pop()
        return ("-", self.power())

    def begins(self) -> bool:
        token = self.next()
        return bool(token) and (
            token[0].isalnum()
            or token in ("(", "{", "\\frac", "\\sqrt", "\\pi", "\\binom")
            or token in _GREEK
            or token in _FUNCTION
        )

    def power(self) -> _Tree:
        tree = self.atom()
        while self.next() in ("^", "!"):
            if self.tokens.pop() == "!":
                tree = ("!", tree)
            else:
                tree = ("^", tree, self.argument())
                if self.next() == "^":
                    raise ValueError("a^b^c")
        return tree

    def argument(self) -> _Tree:
        """What a command or a power applies to: a group, or one character."""
        if len(self.next()) > 1 and self.next()[0].isdigit():
            raise ValueError("x^12")
        return self.atom()

    def group(self, opening: str) -> _Tree:
        if not self.tokens or self.tokens.pop() != opening:
            raise ValueError(f"no {opening}")
        tree = self.total()
        if not self.tokens or self.tokens.pop() != _PAIRS[opening]:
            raise ValueError(f"no {_PAIRS[opening]}")
        return tree

    def function(self, name: str) -> _Tree:
        base = exponent = None
        if self.next() == "_" and name == "\\log":
            self.tokens.pop()
            base = self.argument()
        if self.next() == "^":
            self.tokens.pop()
            exponent = self.argument()
            if exponent == ("-", ("number", "1")):
                raise ValueError("an inverse function")
        argument = self.group("(") if self.next() == "(" else self.product(of_function=True)
        tree: _Tree = ("log", argument, base) if base else ("function", _FUNCTION[name], argument)
        return ("^", tree, exponent) if exponent else tree

    def atom(self) -> _Tree:
        token = self.next()
        if token in ("(", "{"):
            return self.group(token)
        if not token:
            raise ValueError("nothing")
        self.tokens.pop()
        if token in _CONSTANTS:
            return (_CONSTANTS[token],)
        if token == "\\frac":
            return ("/", self.argument(), self.argument())
        if token == "\\binom":
            return ("binomial", self.argument(), self.argument())
        if token == "\\sqrt":
            degree = self.group("[") if self.next() == "[" else ("number", "2")
            return ("root", self.argument(), degree)
        if token in _FUNCTION:
            return self.function(token)
        if token == "|":
            tree = self.total()
            if self.next() != "|":
                raise ValueError("no |")
            self.tokens.pop()
            return ("abs", tree)
        if token in _GREEK or (token.isascii() and token[0].isalpha()):
            return ("letter", token)
        if not (token[-1].isdigit() or token[0].isdigit()) or not token.isascii():
            raise ValueError(token)
        return ("number", token)


def _repeating(match: re.Match) -> str:
    whole, start, period = match.groups()
    top = int(whole + start + period) - int(whole + start or "0")
    return f"\\frac{{{top}}}{{{(10 ** len(period) - 1) * 10 ** len(start)}}}"


@functools.lru_cache(maxsize=65_536)
def _tree(text: str) -> _Tree | None:
    if len(text) > MAX_EXPRESSION:
        return None
    try:
        return _Parser(text).tree
    except (ValueError, RecursionError):
        return None


def _nodes(tree: _Tree) -> Iterator[_Tree]:
    yield tree
    for part in tree[1:]:
        if isinstance(part, tuple):
            yield from _nodes(part)


@functools.lru_cache(maxsize=65_536)
def _letters(text: str) -> frozenset[str]:
    tree = _tree(text)
    return frozenset(node[1] for node in _nodes(tree) if node[0] == "letter") if tree else frozenset()


# --- evaluation --------------------------------------------------------------------------------------------------


class _Arithmetic:
    """The value of a tree; subclasses say in which numbers."""

    def __init__(self, letter: Callable[[str], Fraction]) -> None:
        self.letter = letter

    def __call__(self, tree: _Tree) -> Any:
        match tree[0]:
            case "number":
                return self.number(tree[1])
            case "letter":
                return self.rational(self.letter(tree[1]))
            case "+":
                return self.sum([self(term) for term in tree[1:]])
            case "-":
                return -self(tree[1])
            case "*":
                return self(tree[1]) * self(tree[2])
            case "/":
                return self(tree[1]) / self(tree[2])
            case "^":
                return self.power(self(tree[1]), self(tree[2]))
            case "root":
                return self.root(self(tree[1]), self(tree[2]))
            case "!":
                return self.factorial(self(tree[1]))
            case "abs":
                return self.number("0") + abs(self(tree[1]))
            case "binomial":
                n, k = tree[1], tree[2]
                return self(("!", n)) / (self(("!", k)) * self(("!", ("+", n, ("-", k)))))
            case "log":
                return self.function("log", self(tree[1])) / self.function("log", self(tree[2]))
            case "function":
                return self.function(tree[1], self(tree[2]))
            case constant:
                return self.constant(constant)

    def number(self, text: str) -> Any:
        return self.rational(Fraction(text))

    def sum(self, terms: list) -> Any:
        return sum(terms[1:], terms[0])

    def root(self, value: Any, degree: Any) -> Any:
        return self.power(value, 1 / degree)

    def rational(self, value: Fraction) -> Any:
        raise NotImplementedError

    def power(self, base: Any, exponent: Any) -> Any:
        raise NotImplementedError

    def factorial(self, value: Any) -> Any:
        raise NotImplementedError

    def function(self, name: str, value: Any) -> Any:
        raise NotImplementedError

    def constant(self, name: str) -> Any:
        raise NotImplementedError


class _Floats(_Arithmetic):
    """Complex numbers of the machine. `scale` is the largest term of a sum, from which its error can be told."""

    scale = 0.0

    def rational(self, value: Fraction) -> complex:
        return complex(float(value))

    def number(self, text: str) -> complex:
        return complex(float(text))

    def sum(self, terms: list[complex]) -> complex:
        self.scale = max(self.scale, *map(abs, terms))
        return sum(terms)

    def power(self, base: complex, exponent: complex) -> complex:
        return (base + 0) ** exponent  # + 0 turns -0.0 into 0.0, which decides the branch of a root

    def factorial(self, value: complex) -> complex:
        if value.imag or value.real != int(value.real) or not 0 <= value.real <= 170:
            raise _NotExactError
        return complex(math.factorial(int(value.real)))

    def function(self, name: str, value: complex) -> complex:
        if name in ("cot", "sec", "csc"):
            raise _NotExactError
        return getattr(cmath, name)(value + 0)

    def constant(self, name: str) -> complex:
        return {"e": complex(math.e), "i": 1j, "pi": complex(math.pi)}[name]


class _Fractions(_Arithmetic):
    """Rational numbers, exactly."""

    def rational(self, value: Fraction) -> Fraction:
        return value

    def power(self, base: Fraction, exponent: Fraction) -> Fraction:
        if exponent.denominator != 1:
            return self.power(_exact_root(base, exponent.denominator), Fraction(exponent.numerator))
        bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
        if bits > 1 and bits * abs(exponent.numerator) > _MAX_BITS:
            raise _TooLargeError
        return base**exponent.numerator

    def factorial(self, value: Fraction) -> Fraction:
        if value.denominator != 1 or value < 0:
            raise _NotExactError
        if value > 10_000:
            raise _TooLargeError
        return Fraction(math.factorial(value.numerator))

    def function(self, name: str, value: Fraction) -> Fraction:
        raise _NotExactError

    def constant(self, name: str) -> Fraction:
        raise _NotExactError


def _exact_root(value: Fraction, degree: int) -> Fraction:
    if value < 0 or not 2 <= degree <= 64:
        raise _NotExactError
    parts = []
    for part in (value.numerator, value.denominator):
        root = math.isqrt(part) if degree == 2 else _integer_root(part, degree)
        if root**degree != part:
            raise _NotExactError
        parts.append(root)
    return Fraction(*parts)


def _integer_root(value: int, degree: int) -> int:
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low


class _LongFloats(_Arithmetic):
    """Complex numbers of mpmath. `spread` is how many bits apart the terms of sums lie, which takes as much precision.

    Each thread has a context of its own: its precision is state.
    """

    _local = threading.local()

    def __init__(self, letter: Callable[[str], Fraction], precision: int) -> None:
        super().__init__(letter)
        if not hasattr(self._local, "context"):
            from mpmath import MPContext

            self._local.context = MPContext()
        self.context = self._local.context
        self.context.prec = precision
        self.spread = 0

    def rational(self, value: Fraction) -> Any:
        return self.context.mpf(value.numerator) / value.denominator

    def sum(self, terms: list) -> Any:
        sizes = [self.context.mag(term) for term in terms if term]
        if sizes:
            self.spread += max(sizes) - min(sizes)
        return super().sum(terms)

    def power(self, base: Any, exponent: Any) -> Any:
        if exponent and self.context.mag(exponent) > _MAX_EXPONENT_BITS:
            raise _TooLargeError
        if base and abs(self.context.mag(base)) > 1 << _MAX_EXPONENT_BITS:
            raise _TooLargeError
        return self.context.power(base, exponent)

    def factorial(self, value: Any) -> Any:
        if value and self.context.mag(value) > _MAX_EXPONENT_BITS:
            raise _TooLargeError
        return self.context.factorial(value)

    def function(self, name: str, value: Any) -> Any:
        if name != "log" and value and self.context.mag(value) > _MAX_EXPONENT_BITS:
            raise _TooLargeError
        return getattr(self.context, name)(value)

    def constant(self, name: str) -> Any:
        return self.context.mpc(0, 1) if name == "i" else +getattr(self.context, name)


_ERRORS = (ValueError, ArithmeticError, RecursionError, TypeError, NotImplementedError)


def _positive(letter: str) -> Fraction:
    return Fraction(1013 + sum(map(ord, letter)) * 617 % 1009, 1013)


def _larger(letter: str) -> Fraction:
    return Fraction(2027 + sum(map(ord, letter)) * 1237 % 2017, 1009)


def _negative(letter: str) -> Fraction:
    return -_larger(letter) / 3


def _one(letter: str) -> Fraction:
    return Fraction(1)


def value(text: str, letter: Callable[[str], Fraction] = _positive) -> complex | None:
    """In floating point; None for what cannot be evaluated, or has letters and no value at this point."""
    tree = _tree(text)
    try:
        return _Floats(letter)(tree) if tree else None
    except _ERRORS:
        return None


def rational(text: str) -> Fraction | None:
    """The exact value of a number; None for what is none, irrational or too long."""
    tree = _tree(text)
    if tree is None or _letters(text):
        return None
    try:
        return _Fractions(_one)(tree)
    except _ERRORS:
        return None


def has_value(text: str) -> bool:
    """Whether it can be evaluated."""
    return _tree(text) is not None


def is_number(text: str) -> bool:
    """Whether it can be evaluated and has no letters."""
    return _tree(text) is not None and not _letters(text)


# --- comparison --------------------------------------------------------------------------------------------------


def _far_apart(a: _Tree, b: _Tree, letter: Callable[[str], Fraction]) -> bool:
    """Whether floating point is enough to tell them apart."""
    floats = _Floats(letter)
    try:
        x, y = floats(a), floats(b)
    except _ERRORS:
        return False
    size = max(abs(x), abs(y))
    if not (cmath.isfinite(x) and cmath.isfinite(y)) or min(abs(x), abs(y)) < 1e-250 or floats.scale > 1e6 * size:
        return False
    return abs(x - y) > 1e-6 * size


def _same_at(a: _Tree, b: _Tree, letter: Callable[[str], Fraction]) -> bool | None:
    """Whether two trees have the same value at a point; None where one of them has none there."""
    try:
        return bool(_Fractions(letter)(a) == _Fractions(letter)(b))
    except _ERRORS:
        pass
    try:
        return _same_in_digits(a, b, letter)
    except _TooLargeError:
        return False
    except _ERRORS:
        return None


def _work(tree: _Tree) -> int:
    """The transcendental functions of a tree; a factorial, which may be a gamma function, counts as twenty."""
    weights = {"function": 1, "log": 2, "!": 20, "binomial": 60}
    powers = (node for node in _nodes(tree) if node[0] == "^" and node[2][0] != "number")
    return sum(weights.get(node[0], 0) for node in _nodes(tree)) + sum(1 for _ in powers)


def _same_in_digits(a: _Tree, b: _Tree, letter: Callable[[str], Fraction]) -> bool | None:
    """A difference that shrinks as the precision grows is none."""
    first = _LongFloats(letter, _PRECISION), _LongFloats(letter, _PRECISION)
    if not all(floats.context.isfinite(floats(tree)) for floats, tree in zip(first, (a, b), strict=True)):
        return None
    precision = _PRECISION + max(floats.spread for floats in first)
    if precision > _MAX_PRECISION or precision * (_work(a) + _work(b)) > _MAX_WORK:
        raise _TooLargeError
    gaps = []
    for bits in (precision, 2 * precision):
        floats = _LongFloats(letter, bits)
        x, y = floats(a), floats(b)
        gaps.append(abs(x - y))
        if gaps[-1] == 0:
            return True
    return bool(gaps[1] < gaps[0] * floats.context.mpf(2) ** (-precision // 2))


def _real_at(tree: _Tree, letter: Callable[[str], Fraction]) -> bool:
    try:
        found = _Floats(letter)(tree)
    except _ERRORS:
        return False
    return abs(found.imag) <= 1e-9 * abs(found)


def compare(reference: str, answer: str) -> bool | None:
    """Whether two expressions have the same value, whatever their letters stand for.

    Where only one has letters they may be a unit: it has to differ without it, too.

    Returns:
        None where one of them cannot be evaluated, or they may differ by a unit only.
    """
    a, b = _tree(reference), _tree(answer)
    if a is None or b is None:
        return None
    letters, others = _letters(reference), _letters(answer)
    same = False if _far_apart(a, b, _positive) else _same_at(a, b, _positive)
    if same and letters | others:
        same = _same_at(a, b, _larger)
        if same and _real_at(a, _negative) and _real_at(b, _negative):
            same = _same_at(a, b, _negative)
    if same is None and not letters | others:  # 1/0 is no number
        return False
    if same is False and bool(letters) != bool(others) and not _far_apart(a, b, _one):
        in_sum = any(node[0] == "+" for node in _nodes(a if letters else b))
        return False if in_sum or _same_at(a, b, _one) is False else None
    return same


def proportional(a: str, b: str) -> bool | None:
    """Whether one expression in letters is a multiple of the other, as the two sides of an equation may be."""
    trees = _tree(a), _tree(b)
    if trees[0] is None or trees[1] is None or not _letters(a) | _letters(b):
        return None
    products = [("/", *trees), ("/", *trees)]
    try:
        ratios = []
        for letter in (_positive, _larger, _negative):
            ratios.append(_Fractions(letter)(products[0]))
        return len(set(ratios)) == 1 and ratios[0] != 0
    except _ERRORS:
        return None
