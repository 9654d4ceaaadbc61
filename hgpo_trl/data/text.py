"""Tokens by which deduplication and decontamination compare texts, independent of spelling and layout."""

import re
import unicodedata
from collections.abc import Callable

_Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]

_RULES: tuple[_Rule, ...] = (
    (re.compile(r"[‐-―−]"), "-"),
    (re.compile(r"\{,\}|\\!"), ""),  # LaTeX's thousands
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\w)\s*(\w)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(left|right|bigl?|bigr?|displaystyle|limits|quad|qquad|text|textbf|mathrm|mathbf)(?![a-z])"), " "),
    (re.compile(r"\\(leq|geq|neq)(?![a-z])"), lambda match: f"\\{match[1][:2]}"),
    (re.compile(r"\\(cdot|times)(?![a-z])"), "*"),
    (re.compile(r"\\[,;: ()\[\]]|[$~]"), " "),
    (re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])"), " "),  # a hyphen
)
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # scripts without spaces: a character
    r"|[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
    r"|\d+(?:\.\d+)?|(?<=\d)!|[-+*/=<>^|%()\[\]]"
)
BRACKETS = frozenset("()[]")
SIGNS = frozenset("-+*/=<>^|%!") | BRACKETS


def tokens(text: str) -> list[str]:
    """Words, numbers and mathematical signs of a text, in lower case and in one way of writing LaTeX.

    Blanks, punctuation, dollar signs, braces and LaTeX's spacing are left out; `\\dfrac12`, `\\frac{1}{2}` and
    `\\frac 1 2` are the same, and so are 1,000 and 1000.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return _TOKEN.findall(text)
