"""The last rung: math-verify, which may take any time it likes."""

import functools

from hgpo_trl.verification.exact import expression
from hgpo_trl.verification.statements import ANY_DOLLAR, MAX_EXPRESSION, stated

TIMEOUT_S = 5.0  # for a sample, in a worker of its own; in-process, for each parse and for the comparison


def _parse(text: str, timeout: int | None) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    return parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()], parsing_timeout=timeout)


@functools.lru_cache(maxsize=65_536)
def _parse_reference(text: str, timeout: int | None) -> list:
    return _parse(f"${text}$", timeout)


def _parse_answer(answer: str, timeout: int | None) -> list:
    """What the answer states, as a whole: math-verify never searches prose, in which it can be led."""
    statement = stated(answer)
    return _parse(f"${ANY_DOLLAR.sub('', statement)}$", timeout) if 0 < len(statement) <= MAX_EXPRESSION else []


def _differ_clearly(a: list, b: list) -> bool:
    """Whether both are numbers whose values are far apart: cheaper than to simplify their difference."""
    from sympy import Expr

    if not (a and b and isinstance(a[0], Expr) and isinstance(b[0], Expr) and a[0].is_number and b[0].is_number):
        return False
    try:
        x, y = a[0].evalf(30), b[0].evalf(30)
        return bool(abs(x - y) > 1e-6 * max(abs(x), abs(y)))
    except (TypeError, ValueError, ArithmeticError):  # a number that sympy cannot evaluate
        return False


def symbolically_equal(reference: str, answer: str, timeout: int | None = None) -> bool:
    """Whether math-verify finds them equal; with a time limit, False when it is up (only in the main thread)."""
    from math_verify import verify

    a, b = _parse_reference(expression(reference), timeout), _parse_answer(answer, timeout)
    return not _differ_clearly(a, b) and verify(a, b, timeout_seconds=timeout)
