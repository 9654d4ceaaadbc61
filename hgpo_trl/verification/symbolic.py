"""The last rung: math-verify, which may take any time it likes."""

import functools
import threading

from hgpo_trl.verification.exact import expression
from hgpo_trl.verification.statements import ANY_DOLLAR, DOLLAR_SIGN, MAX_EXPRESSION, MAX_TEXT, stated

TIMEOUT_S = 5.0  # for a sample, in a worker of its own; in-process, for each parse and for the comparison


def _parse(text: str, timeout: int | None) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    return parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()], parsing_timeout=timeout)


@functools.lru_cache(maxsize=65_536)
def _parse_reference(text: str, timeout: int | None) -> list:
    return _parse(f"${text}$", timeout)


def _parse_answer(answer: str, timeout: int | None) -> list:
    """What the answer states, as a whole; else what math-verify finds at the end of the prose."""
    statement = stated(answer)
    if statement is not None and len(statement) <= MAX_EXPRESSION:
        found = _parse(f"${ANY_DOLLAR.sub('', statement)}$", timeout)
        if found:
            return found
    elif statement is not None:
        return []
    return _parse(DOLLAR_SIGN.sub("", answer.strip()[-MAX_TEXT:]), timeout)


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


def symbolically_equal(reference: str, answer: str, timeout: int | None = None) -> bool:
    """Whether math-verify finds them equal; with a time limit, False when it is up (only in the main thread)."""
    from math_verify import verify

    a, b = _parse_reference(expression(reference), timeout), _parse_answer(answer, timeout)
    return not _differ_clearly(a, b) and verify(a, b, timeout_seconds=timeout)


def symbolically_equal_in_time(reference: str, answer: str) -> bool:
    """The same with a time limit where it can have one: it is a signal, which only the main thread can take."""
    main = threading.current_thread() is threading.main_thread()
    return symbolically_equal(reference, answer, int(TIMEOUT_S) if main else None)
