"""One of the many spellings of the same LaTeX, and the parts of what is spelt so."""

import re
from typing import Any

from hgpo_trl.verification.statements import FUNCTION_NAMES, plain, stripped

_FENCES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_COMMANDS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "\\frac"),
    **dict.fromkeys(("mbox", "textbf", "textit", "textrm", "textnormal", "mathrm", "mathbf", "mathit", "operatorname",
                     "textsf", "mathsf", "boldsymbol"), "\\text"),
    **dict.fromkeys(("vec", "overrightarrow"), "\\vec"),
    **dict.fromkeys(("displaystyle", "textstyle", "degree", "limits", "rm", "bf"), " "),
    **dict.fromkeys(("quad", "qquad"), " "),
    **dict.fromkeys(("leq", "leqslant"), "\\le"), **dict.fromkeys(("geq", "geqslant"), "\\ge"), "neq": "\\ne",
     "lt": "<",
    "gt": ">", "varnothing": "\\emptyset", **dict.fromkeys(("lor", "vee", "land"), ","), "dbinom": "\\binom",
    **dict.fromkeys(("ldots", "cdots", "dotsc"), "\\dots"), "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "lbrace": "\\{", "rbrace": "\\}", "bmod": "\\mod", "ast": "*", "colon": ":", "euro": "", "pounds": "",
    "infin": "\\infty", "bar": "\\overline", "simeq": "\\approx",
}  # fmt: skip
_LATEX: list[tuple[str, re.Pattern[str], Any]] = [
    (mark, re.compile(pattern), replacement)
    for pattern, replacement, mark in (  # the mark is part of whatever the pattern matches
        (r"(?<=\d)(?:\\[,;: ]|~)\s*(?=\d{3}(?!\d))", "", ""),
        (r"\\!\s*", "", "\\!"),
        (r"(?<!\\)\\[,;: ]", " ", ""),
        (r"\\frac\s*([\da-z])\s*([\da-z])(?![\da-z])", r"\\frac{\1}{\2}", "frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", "frac"),
        (r"\\frac\s*([\da-z])\s*\{", r"\\frac{\1}{", "frac"),
        (r"(\\frac\{[^{}]*\})\s*([\da-z])", r"\1{\2}", "frac"),
        (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}", "over"),
        (r"^([^{}]*)\\over(?![a-z])([^{}]*)$", r"\\frac{\1}{\2}", "over"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", "sqrt"),
        (r"\\text\s*\{\s*([^{}]*?)[\s.]*\}", r"\\text{\1}", "text"),
        (r"\\text\{~?([ei])\}", r"\1", "text"),
        (r"\\text\s*\{([a-z])\}(?=\s*(?:[-+]|$))", r"\1", "text"),
        (r"\\vec\s*\{([a-z])\}", r"\1", "vec"),
        (r"\\text\{((?:arc)?(?:sin|cos|tan)h?|ln|log|exp)\}", r"\\\1", "text"),
        (r"\\text\{([-+]?[\d.,/]+)\}", r"\1", "text"),
        (r"\\text\{([-+]?[\d.,/]+) ([a-z][a-z ]*)\}", r"\1\\text{\2}", "text"),
        (r"\\text\{[\s,(]*(?:either|both)[\s,]*\}", "", "text"),
        (r"\\text\{[\s,(]*(?:and|or)(?:[\s,]+(?:maybe|perhaps|possibly|also))*[\s,]*\}", ", ", "text"),
        (r"\s*\\text\{\s*(?:percent(?:age)?|per cent|\\?%)\s*\}", "%", "text"),
        (r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})(?![A-Za-z])", "", "circ"),
        (
            r"\s*\(?\\(?:pmod|mod)\s*(?:\{\s*(\w+)\s*\}|(\w+))\)?|\s*\(\\text\{mod\}\s*(\w+)\)",
            r" \\pmod{\1\2\3}",
            "mod",
        ),
        (r"\\\{\s*\\\}", r"\\emptyset", "\\{"),
        (r"\+\\infty", r"\\infty", "infty"),
        (r"\\([$%])", r"\1", ""),
    )
]
_PLAIN: list[tuple[str, re.Pattern[str], Any]] = [
    (mark, re.compile(pattern), replacement)
    for pattern, replacement, mark in (
        (r"\{,\}(?=\d{3})", ",", "{,}"),
        (r"~|\s+", " ", ""),
        (r"\$|°", "", ""),
        (r"(?<=[\d}]) ?\b(?:percent(?:age)?|per cent)\b", "%", "cent"),
        (r" (?=%)", "", " %"),
        (r" ?\(?\bmod (\w+)\)?", r" \\pmod{\1}", "mod"),
        (r"(?<==)\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), "="),
        (r"\.{3,}", r"\\dots ", "..."),
        (r"<=", r"\\le ", "<="),
        (r">=", r"\\ge ", ">="),
        (rf"(?<![A-Za-z\\{{])(?={FUNCTION_NAMES})({FUNCTION_NAMES})(?=[\s(^_\d\\])", r"\\\1", ""),
        (r" *,? +(?:and|or) +(?=[-\d\\(\[]|[A-Za-z] ?=)|(?<=^[A-Z]) (?:and|or) (?=[A-Z]$)", ", ", " "),
        (r"^(?:either|both) ", "", "either"),
        (r"(?<=[\d)\]}]) *; *", ", ", ";"),
        (r"(?<![\d.,/])(\d+) (\d+)/(\d+)(?![\d/.])", r"\1\\frac{\2}{\3}", "/"),
        (r" (?![\w\\])|(?<![\w,]) |(?<=\d) (?=[A-Za-z\\])", "", ""),
    )
]
_SINGLE = re.compile(r"(?<=[_^])\{(\w)\}")
_LOOSE = re.compile(r"(?<!\d) +| +(?!\d)")
_DEPTH = {**dict.fromkeys(("(", "[", "\\{", "{"), 1), **dict.fromkeys((")", "]", "\\}", "}"), -1)}
_MARK = re.compile(r"\\[{}]|\\[A-Za-z]+|\\.|[()\[\]{},=<>:]")
_MAX_DEPTH = 20


def normalise(text: str) -> str:
    """One of the spellings of the same expression or words."""
    text = plain(text)
    if "\\" in text:
        text = _COMMAND.sub(lambda match: _COMMANDS.get(match[1], match[0]), _FENCES.sub("", text))
        for mark, pattern, replacement in _LATEX:
            if mark in text:
                text = pattern.sub(replacement, text)
    for mark, pattern, replacement in _PLAIN:
        if mark in text:
            text = pattern.sub(replacement, text)
    text = stripped(text)
    while len(text) > 2 and (text[0], text[-1]) in (("(", ")"), ("{", "}")) and _enclosed(text):
        text = text[1:-1].strip()
    return text


def tight(text: str) -> str:
    """Without blanks, but for those between digits, and without braces around one character."""
    return _SINGLE.sub(r"\1", _LOOSE.sub("", text))


def _enclosed(text: str) -> bool:
    """Whether its first and last bracket are a pair that holds one thing."""
    depth = 0
    for match in _MARK.finditer(text):
        depth += _DEPTH.get(match[0], 0)
        if (depth == 0 and match.end() < len(text)) or (depth == 1 and match[0] == ",") or depth > _MAX_DEPTH:
            return False
    return depth == 0


def split(text: str, *marks: str) -> list[str] | None:
    """The text at these marks outside all brackets; None where brackets do not pair up or nest too deep."""
    depth, start, parts = 0, 0, []
    for match in _MARK.finditer(text):
        depth += _DEPTH.get(match[0], 0)
        if not 0 <= depth <= _MAX_DEPTH:
            return None
        if depth == 0 and match[0] in marks:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()] if depth == 0 else None


def marks(text: str, *wanted: str) -> list[str]:
    """Those of these marks that stand outside all brackets, in order."""
    depth, found = 0, []
    for match in _MARK.finditer(text):
        depth += _DEPTH.get(match[0], 0)
        if depth == 0 and match[0] in wanted:
            found.append(match[0])
    return found
