"""Rewards: one scalar per response, from its answer part alone, 0 where the format is broken (Eq. 7, the rule).

They are ordinary TRL reward functions and know nothing of what a mode costs: no length penalty and no format bonus,
both of which a policy learns to exploit.
"""

import re
import threading
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from hgpo_trl.imports import load_module
from hgpo_trl.modes import completion_text, split_response

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_IGNORED = "$*" + "".join(filter(str.isspace, map(chr, range(0x3001))))  # around an answer; the blanks of Unicode too
_DOLLAR_SIGN = re.compile(r"(?<!\\)\\\$")
_MARKED = re.compile(r"\$|\\boxed|\\\(|\\\[|\n|\*\*")  # text that says itself where its mathematics begins
_COMMAND = re.compile(r"\\[A-Za-z]+(\s*\{[^{}]*\})?")  # of LaTeX, with what it applies to
_WORD = re.compile(r"[A-Za-z]{2,}")
_MAX_EXPRESSION = 200  # characters
_TIMEOUT_S = 5  # per parse and per comparison
_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


def accuracy_reward(completions: list, answer: list[str | None], **kwargs: Any) -> list[float | None]:
    """1.0 for a well-formed response whose answer part equals the reference answer, else 0.0.

    Args:
        completions: as TRL passes them, mode tags included.
        answer: the data set's column of reference answers, one per completion. Rows without one (None or blank) are not
            scored.

    Returns:
        One of 1.0, 0.0 and None (no reference answer) per completion.
    """
    rewards: list[float | None] = []
    for completion, reference in zip(completions, answer, strict=True):
        if reference is None or not str(reference).strip():
            rewards.append(None)
            continue
        response = split_response(completion_text(completion))
        rewards.append(float(response.well_formed and answers_match(str(reference), response.answer)))
    return rewards


def answers_match(reference: str, answer: str) -> bool:
    """Whether two answers are equal: as text, as numbers, or, where neither settles it, for math-verify."""
    bare_reference, bare_answer = _bare(reference), _bare(answer)
    if bare_reference == bare_answer:
        return True
    if _NUMBER.fullmatch(bare_reference) and _NUMBER.fullmatch(bare_answer):
        return Decimal(bare_reference) == Decimal(bare_answer)  # exact; Fraction refuses more than 4,300 digits
    return verify(_parse_reference(bare_reference), _parse_answer(answer), timeout_seconds=_timeout())


def _bare(text: str) -> str:
    """Without what means nothing around an answer: blanks, dollar signs, bold, a full stop."""
    return text.strip(_IGNORED).rstrip(f"{_IGNORED}.")


def _timeout() -> int | None:
    """math-verify's time limit is a signal, which only the main thread can take."""
    return _TIMEOUT_S if threading.current_thread() is threading.main_thread() else None


def _parse(text: str) -> list:
    return parse(text, _EXTRACTION, parsing_timeout=_timeout())


@lru_cache(maxsize=65_536)  # a query's reference answer is asked for N times a step, and again every epoch
def _parse_reference(text: str) -> list:
    return _parse(f"${text}$")


def _parse_answer(text: str) -> list:
    """What math-verify finds in prose; but a bare expression is read whole, not for a number that it contains."""
    bare = _bare(text)
    short = len(bare) <= _MAX_EXPRESSION  # LaTeX without end takes math-verify minutes
    if short and not _MARKED.search(bare) and not _WORD.search(_COMMAND.sub("", bare)):
        return _parse(f"${bare}$")
    return _parse(_DOLLAR_SIGN.sub("", text.strip())) or (_parse(f"${bare}$") if short else [])


def load_reward(name: str) -> Callable | str:
    """A reward function by "package.module.function" or "path/to/file.py:function"; else a reward model's id or path.

    Raises:
        ValueError: the file, the module or the function does not exist, or no function is named.
    """
    if name.endswith(".py"):
        raise ValueError(f"reward_funcs: {name!r} names a file but no function in it: write {name}:function.")
    source, separator, function = name.rpartition(":" if ".py:" in name else ".")
    if ("/" in name and ".py:" not in name) or Path(name).exists():
        return name
    if not separator:
        raise ValueError(
            f"reward_funcs: {name!r} is neither a function (package.module.function or path/to/file.py:function) nor a "
            "reward model's id or path."
        )
    module = load_module(source)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"reward_funcs: {name!r}: {source} has no function {function!r}.")
    return getattr(module, function)
