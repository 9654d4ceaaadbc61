"""What an answer states: the one expression, or the words, that it gives as its result.

In order: the content of `<answer>` tags, the last box, an answer that is an expression as a whole, what follows "the
answer is", else the last sentence with mathematics in it. Prose is read by its candidates, the stretches of mathematics
between its words: one is what the answer states, several that are joined by "or", "and" and commas are a list, and
where one is denied, or several stand beside each other in another way, the answer states nothing.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

MAX_EXPRESSION = 400  # characters; LaTeX without end takes math-verify minutes
MAX_STATEMENT = 2_000  # characters that the exact rungs look at
_MAX_ANSWER = 20_000  # characters, from its end, in which the statement is looked for
_MAX_PROSE = 4_000  # of them where it has no box
_MAX_WORDS = 60  # of a sentence; candidates of a longer one are counted in its end

_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001))))  # those of Unicode too
_IGNORED = f"$*`{_BLANKS}"  # around an answer
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).){0,2000}?)</answer>", re.IGNORECASE | re.DOTALL)
_SPECIAL_TOKEN = re.compile(r"<\|\w{1,40}\|>\s*(?:user|assistant|system)?\s*$")
_ANCHOR = re.compile(
    r"\banswer\b(?:[^\n.:=$\\\x01]{0,60}?\s(?:is|are|equals|(?:must|should|would|could|might|may|can|will) be)\b"
    r"|[\s*]*[:=]|\s+[-–—]\s|\s+of\s|\**(?=\s*\x01|\s*\n))[\s:*]*|####\s*",
    re.IGNORECASE,
)
_MATHS = re.compile(
    r"\$\$(.{1,400}?)\$\$|(?<!\\)\$(?!\s*\d[\d.,]*\s+[a-z]{3})((?:\\\$|[^$\n]){1,400}?)(?<!\\)\$(?!\d)"
    r"|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]"
    r"|\\begin\{(?:align|gather|equation|eqnarray)\*?\}(.{1,2000}?)\\end\{[a-z]+\*?\}",
    re.DOTALL,
)
_LAST_ROW = re.compile(r".*\\\\|\\(?:Rightarrow|implies|begin\{aligned\}|end\{aligned\})|&", re.DOTALL)
_BOX = re.compile(r"\\f?box(?:ed)?\s*(?:\{|(\w)(?![\w.,]))")
_SENTENCE_END = re.compile(r"((?<!\\)[.!?](?:\s+(?![^{}\n]{0,60}\})|$)|[。！？]|\n)")
_MARKED = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[|\n|\*\*")  # text that says itself where its mathematics begins
_COMMAND = re.compile(r"\\[A-Za-z]+(\s*\{[^{}]*\})?")  # of LaTeX, with what it applies to
FUNCTION_NAMES = r"(?:arc)?(?:sin|cos|tan)h?|ln|log|exp|sqrt|mod|pi|max|min|gcd|lcm"
_WORD = re.compile(  # of prose; "ab" and "ABC" may be products
    rf"(?<![A-Za-z])(?!(?:{FUNCTION_NAMES})(?![A-Za-z]))"
    r"(?:[A-Za-z][a-z]{2,}|[Aa]n|as|at|be|by|he|if|in|is|it|no|of|on|or|so|to|vs|we)(?![A-Za-z])|[\u3040-\u9fff]"
)
_PHRASE = re.compile(r"[^\W\d]+(?:[ '-][^\W\d]+){0,3}")  # an answer in words
DOLLAR = re.compile(r"(?<!\\)\$")
ANY_DOLLAR = re.compile(r"\\?\$")

# Words that decide which candidate of a sentence counts
_JOINTS = {"or", "and", "maybe", "perhaps", "possibly", "probably", "also", "else", "alternatively", "otherwise",
 "either",
           "both", "nor", "even", "vs", "versus", "&", "/", "|"}  # fmt: skip
_DENIALS = {
    "not",
    "no",
    "never",
    "cannot",
    "neither",
    "nor",
    "except",
    "without",
    "wrong",
    "false",
    "incorrect",
    "impossible",
    "\\ne",
    "\\neq",
}
_RANGES = {
    "than",
    "least",
    "most",
    "between",
    "from",
    "above",
    "below",
    "exceeds",
    "exceed",
    "beyond",
    "within",
    "under",
}
_CONCLUDE = {"so", "thus", "hence", "therefore", "then", "is", "are", "was", "were", "be", "equals", "equal", "get",
             "gets", "gives", "give", "makes", "make", "have", "has", "obtain", "obtains", "yields", "leaves", "but",
             "being", "becomes", "remains", "implies", "find", "finds", "total", "giving", "leaving",
             "yield", "solves", "it's", "that's"}  # fmt: skip
_EXPLAIN = {"because", "since", "that", "divided"}
_CONDITIONS = {"if", "unless", "when", "whenever", "else", "otherwise"}
_TAKEN_BACK = {"no,", "wait", "actually", "sorry", "correction", "rather"}
_FILLERS = {"be", "equal", "equals", "to", "the", "answer", "simply", "just", "="}
_ANY = {"all", "any", "anything", "every", "everything", "no"}
_REFUTED = {"wrong", "false", "incorrect", "impossible", "excluded", "rejected", "fails"}
_NEW_CLAIM = {*_CONCLUDE, *_EXPLAIN, "instead", "rather", "it", "we"} - {
    "be",
    "is",
    "are",
    "was",
    "were",
    "equal",
    "have",
}
_ALTERNATIVE = re.compile(
    r"\W*(?:(?:and|but)\s+)?(?:or|alternatively|otherwise|else|maybe|perhaps|possibly|also|another|if not|either)\b",
    re.IGNORECASE,
)
_RECONSIDERED = re.compile(
    r"\W*(?:no|wait|actually|sorry|correction|hmm|oops|i mean|(?:just )?kidding|scratch that)\b(?=\W)", re.IGNORECASE
)
_UNSURE = re.compile(
    r"\b(?:or|alternatively|otherwise|maybe|perhaps|possibl[ey]|could|might|may|either|also|another|if not)\b",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[\s$*)}]*(?:\\[)\]])?[\s$*]*(?:(?:is|was|are|does|do|would be|must be|seems)"
    r"(?:n['’]t\b|\s+(?:not|wrong|incorrect|false|impossible|never|neither)\b)"
    r"|(?:cannot|can['’]t) be\b|fails\b|\?|\\pm(?![a-z])|\+|\^)",
    re.IGNORECASE,
)
_BETWEEN_BOXES = re.compile(
    r"[\s$*.;,)\\(\]\[]*(?:,|;|/|&|\b(?:and|or|maybe|perhaps|possibly|alternatively|otherwise|either|else|also)\b"
    r"(?:[^.\n\\$]{0,60})?)[\s$*(\\\[]*",
    re.IGNORECASE,
)
_OR_BEFORE = re.compile(
    r"[\s,]*\b(?:or|maybe|perhaps|possibly)\s+(?:(?:maybe|perhaps|possibly|even)\s+)?"
    r"(?:[\s$*(]|\\[(\[])*(?:([A-Za-z])\s*=\s*)?$",
    re.IGNORECASE,
)
_OR_AFTER = re.compile(
    r"[\s$*)}]*(?:\\[)\]])?[\s$*]*,?\s*\(?(?:or\b[^.\n]{0,40}?|(?:and|maybe|perhaps|possibly|/|&)(?:\s+(?:maybe|perhaps|possibly|even))?)"
    r"\s+\(?(?P<other>\\?\$?-?[\d\\$]\S*)",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"\b(?:option|choice)\s+\(?([A-J])\)?(?![\w'])|^\W*\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right|answer)",
    re.IGNORECASE,
)
_LABEL = re.compile(r"(?<!\w)\(?[A-J][.):](?=\s)")
_LABELLED = re.compile(r"\(?[A-J][.):]\s+[^\n]{1,100}")
_YES_NO = re.compile(r"\W*(yes|no|true|false)\s*[,.;:!]\s+(.*)", re.IGNORECASE | re.DOTALL)

_REFUTED_BEFORE = re.compile(
    r"(?:(?:\bnot|n['’]t) (?:true|correct|right|the case|so)"
    r"|\b(?:false|wrong|incorrect|doubt\w*|unlikely|impossible))"
    r"(?: that)?(?: [\w$='’]+){0,4}[\s$*]*$",
    re.IGNORECASE,
)

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "‐": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "/", "∞": "\\infty ",
        "π": "\\pi ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "±": "\\pm ", "∅": "\\emptyset ",
        "∪": "\\cup ", "∈": "\\in ", "∠": "\\angle ", "²": "^{2}", "³": "^{3}", "½": "\\frac{1}{2}",
         "⅓": "\\frac{1}{3}",
        "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "⅕": "\\frac{1}{5}", "⅛": "\\frac{1}{8}",
        "⅙": "\\frac{1}{6}", "⅖": "\\frac{2}{5}", "⅗": "\\frac{3}{5}", "⅘": "\\frac{4}{5}", "⅚": "\\frac{5}{6}",
        "⅜": "\\frac{3}{8}", "⅝": "\\frac{5}{8}", "⅞": "\\frac{7}{8}",
        "’": "'", "‘": "'", "′": "'", "“": '"', "”": '"', "€": "", "£": "", "¥": "", "₹": "", "√": "\\sqrt ",
        **{chr(0xFF01 + i): chr(0x21 + i) for i in range(94)},  # full width
    }
)  # fmt: skip
_CHINESE = re.compile("[\u3040-\u9fff]+")
_CHINESE_WORDS = {"或": " or ", "和": " and ", "不": " not ", "是": " is ", "为": " is "}
_ROOT = re.compile(r"√\s*(?:(\d+(?:\.\d+)?|[A-Za-z])|\(([^()]{1,100})\))")
_UNIT_POWER = re.compile(r"(?<=\d)\s*(?:[mck]?m|ft|in|yd|mi)[²³]")


def plain(text: str) -> str:
    """With LaTeX or ASCII for the characters of Unicode that mean the same."""
    if text.isascii():
        return text
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", _UNIT_POWER.sub("", text))
    text = _CHINESE.sub(lambda match: f" {''.join(_CHINESE_WORDS.get(c, c) for c in match[0])} ", text)
    return text.translate(_CHARACTERS)


def stripped(text: str) -> str:
    """Without what means nothing around an answer: blanks, dollar signs, bold, quotation marks, a full stop."""
    text = text.strip(_IGNORED).rstrip(f"{_IGNORED}.;,:。")
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        text = text[1:-1].strip(_IGNORED)
    return text


def _closing_brace(text: str, start: int) -> int:
    """Where the brace opened just before `start` is closed; -1 where it is not."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return -1


class _Box(NamedTuple):
    start: int
    end: int
    content: str


def _last_boxes(text: str) -> list[_Box]:
    r"""The last `\boxed{}` that are closed, the innermost of nested ones."""
    boxes: list[_Box] = []
    for match in [*_BOX.finditer(text)][-8:]:  # a policy in a loop may open boxes without end
        close = match.end() if match[1] else _closing_brace(text, match.end())
        if close < 0:
            continue
        if boxes and match.start() < boxes[-1].end:
            boxes.pop()
        boxes.append(_Box(match.start(), close + (not match[1]), match[1] or text[match.end() : close]))
    return boxes


def _last_words(text: str) -> list[str]:
    """The last words before a box, without the mathematics that it begins; empty where a sentence has ended."""
    words = text.rstrip("$*([{\\ \n").replace("’", "'").rsplit(None, 5)[-5:]
    ends = max(
        (i for i, word in enumerate(words) if word.endswith((".", "!", "?", ":")) or word.lower() == "no,"), default=-1
    )
    return [word.strip("$*,;:()[]{}").lower() for word in words[ends + 1 :]]


def _bounds(words: list[str]) -> bool:
    """Whether the words before a candidate say that it only bounds the result."""
    bounded = words[-2:] == ["up", "to"] or words[-3:] == ["or", "equal", "to"] or not _RANGES.isdisjoint(words[-1:])
    return bounded or _but(words)


def _but(words: list[str]) -> bool:
    """Whether the words before a candidate say that it is anything else."""
    last = words[-2:]
    return last in (["other", "than"], ["rule", "out"]) or (last[-1:] == ["but"] and not _ANY.isdisjoint(words))


def _alternative_to_box(before: str) -> list[str]:
    """The candidate to which "or" joins the box; an equation of something else is a step on the way."""
    joint = _OR_BEFORE.search(before)
    if not joint:
        return []
    prose = _Prose(before[: joint.start()])
    candidates, tail = _candidates(_SENTENCE_END.split(prose.text)[-1])
    if not candidates or len(tail) > 1:
        return []
    other = prose.filled(candidates[-1].text)
    return [] if joint[1] and not re.match(rf"\W*{joint[1]}\s*=", other) else [other]


def boxed(text: str) -> str | None:
    """What the last box holds, and what is joined to it by a comma, "and" or "or"; nothing where it is denied."""
    boxes = _last_boxes(text)
    if not boxes:
        return None
    last = boxes[-1]
    before, after = text[max(0, last.start - 100) : last.start], text[last.end : last.end + 120]
    if _DENIED_AFTER.match(after) or (" that " in before and _REFUTED_BEFORE.search(before)):
        return ""
    words = _last_words(before)
    denied = next((word for word in reversed(words) if word not in _FILLERS), "")
    if denied in _DENIALS or denied.endswith("n't") or _but(words):
        return ""
    contents = [last.content]
    for earlier, later in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if not _BETWEEN_BOXES.fullmatch(text[earlier.end : later.start]):
            break
        contents.insert(0, earlier.content)
    if len(contents) == 1:
        contents = _alternative_to_box(before) + contents
    other = _OR_AFTER.match(after)
    if other:
        contents.append(stripped(other["other"]))
    return ", ".join(dict.fromkeys(content.strip() for content in contents))


def broken_off(text: str) -> bool:
    """Whether the answer ends within a box: nobody knows what it would have held."""
    start = text.rfind("\\boxed")
    if start < 0:
        return False
    rest = text[start + len("\\boxed") :].strip(f"{_IGNORED}.")
    return not rest or (rest.startswith("{") and _closing_brace(rest, 1) < 0)


def is_expression(text: str) -> bool:
    """Whether it is mathematics (or one word) as a whole and not prose that contains some."""
    return len(text) <= MAX_EXPRESSION and not _MARKED.search(text) and not _WORD.search(_COMMAND.sub("", text))


# --- prose ---------------------------------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    text: str
    before: list[str]  # the words between the candidate before it, or the beginning, and this one
    comma: bool  # whether a comma or the like stands right before it


class _Prose:
    r"""Text with its delimited mathematics taken out: character 1, a number and character 2 stand for each."""

    def __init__(self, text: str) -> None:
        self.maths: list[str] = []
        text = _MATHS.sub(self._take_out, text.replace("\x01", " ").replace("\x02", " "))
        self.text = text.replace("\\]", " ").replace("\\)", " ")  # of mathematics that began before the text

    def _take_out(self, match: re.Match) -> str:
        inside = next(filter(None, match.groups()))
        if match[5] or "\\begin{aligned}" in inside:  # rows of one calculation: the last is its result
            inside = _LAST_ROW.sub("", inside.strip().removesuffix("\\\\"))
        inside = inside.strip()
        if inside.isalpha() and len(inside) == 1 and match.end() < len(match.string.rstrip(" .\n")):
            return inside  # "where $x$ is": a name, no result
        end = inside[-1:] if inside[-1:] in (".", ",", ";") else ""  # which belongs to the sentence
        self.maths.append(inside.rstrip(".,;"))
        blank = "" if match[2] else " "
        return f"{blank}\x01{len(self.maths) - 1}\x02{end}{blank}"

    def filled(self, text: str) -> str:
        return re.sub("\x01(\\d+)\x02", lambda match: self.maths[int(match[1])], text)


_PLACEHOLDER = re.compile("\x01\\d+\x02")
_OPERATOR = re.compile(r"[+\-*/=<>:^]+|\\(?:times|cdot|le|ge|leq|geq|approx|pm|div|cup|in)")
_BARE_UNIT = re.compile(r"(?:[A-Za-z]{1,3}|square|cubic)(?:\^\{?[23]\}?)?")
_MATHEMATICAL = re.compile(r"[\d\\\x01]")
_LETTER = re.compile(r"-?[A-Za-z]")


def _candidates(sentence: str) -> tuple[list[_Candidate], list[str]]:
    """The stretches of mathematics of a sentence, and the words after the last."""
    tokens = sentence.split()[-4 * _MAX_WORDS :]
    found: list[_Candidate] = []
    words: list[str] = []
    run: list[str] = []
    depth, comma = 0, False

    def finish() -> None:
        nonlocal run, words, comma
        while run and (_OPERATOR.fullmatch(run[-1]) or run[-1] in ("**",)):
            run.pop()
        if run:
            text = " ".join(run)
            comma_next = text.endswith((",", ";"))
            text = stripped(text).rstrip("!?").lstrip(":")
            if text.count("(") != text.count(")") and text.count("[") == text.count("]"):
                text = text.strip("()")
            found.append(_Candidate(text, words, comma))
            words, comma = [], comma_next
        run = []

    for i, token in enumerate(tokens):
        bare = token.strip("*_\"'`()[],;:.!?").removeprefix("$")
        following = tokens[i + 1] if i + 1 < len(tokens) else ""
        operator = bool(_OPERATOR.fullmatch(token.strip("*")))
        mathematical = bool(_MATHEMATICAL.search(bare)) and not (run and _BARE_UNIT.fullmatch(bare))
        if mathematical and _WORD.search(_COMMAND.sub("", bare)) and "\x01" not in bare and not bare[0].isdigit():
            mathematical = False
        letter = bool(_LETTER.fullmatch(bare)) and bool(
            _OPERATOR.fullmatch(following) or (run and _OPERATOR.fullmatch(run[-1]))
        )
        if depth > 0 or mathematical or letter or (operator and (run or _MATHEMATICAL.search(following))):
            if run and depth <= 0 and run[-1].rstrip("*").endswith((",", ";", "?", ":")):
                finish()
            run.append(token.strip('*_"`'))
            depth += sum(token.count(b) for b in "([{") - sum(token.count(b) for b in ")]}")
            continue
        finish()
        depth = 0
        comma = comma or token in (",", ";")
        word = token.strip('*_"`()[],;:.!?').lower()
        if word == "no" and token.lower() != "no":
            word = "no,"  # that takes back what stands before it
        if token[:1] in ",;" or (token[-1:] in ",;" and not found):
            comma = True
        if word:
            words.append(word)
        if token[-1:] in ",;:":
            comma = True
    finish()
    return found, words


def _denied(candidate: _Candidate) -> bool:
    """Whether the words before it say that it is not, or that it only bounds the result."""
    if _bounds(candidate.before) or _REFUTED_BEFORE.search(" ".join(candidate.before)):
        return True
    for word in reversed(candidate.before):
        if word in _DENIALS or word.endswith("n't"):
            return True
        if word in _NEW_CLAIM:
            return False
    return False


def _refuted(words: list[str]) -> bool:
    """Whether the words after a candidate take it back, or leave it open."""
    first, second = [*words, "", ""][:2]
    denied = (
        first == "cannot"
        or first.endswith("n't")
        or (first in ("is", "was", "are", "does", "do") and second in _DENIALS)
    )
    return denied or first == "or" or not _REFUTED.isdisjoint(words)


def _joined(candidate: _Candidate) -> bool:
    """Whether it continues a list."""
    words = candidate.before
    return (
        words == ["to"]
        or (not words and candidate.comma)
        or (
            bool(words)
            and any(word in _JOINTS for word in words)
            and all(word in _JOINTS or i < 2 for i, word in enumerate(words))
        )
    )


def _read(sentence: str, filled: Callable[[str], str], *, anchored: bool) -> str | None:
    """What a sentence states; "" where it hedges, None where it has no candidate."""
    candidates, tail = _candidates(sentence)
    if not candidates:
        return None
    if _refuted(tail):
        return ""
    groups: list[list[_Candidate]] = []
    for candidate in candidates:
        if groups and _joined(candidate):
            groups[-1].append(candidate)
        else:
            groups.append([candidate])
    kept = [group for group in groups if not _denied(group[0])]
    if not kept:
        return ""
    if len(kept) > 1 and not (anchored and not candidates[0].before):
        concludes = [i == 0 or not _CONCLUDE.isdisjoint(group[0].before) for i, group in enumerate(kept)]
        concludes[-1] |= "=" in filled(kept[-1][0].text) and _CONDITIONS.isdisjoint(kept[-1][0].before)
        kept = kept[max(i for i, conclusion in enumerate(concludes) if conclusion) :]
    if any("or" in group[0].before or _TAKEN_BACK.intersection(group[0].before) for group in groups[1:]):
        return ""
    if len(kept) > 1:
        words = kept[1][0].before
        explained = _EXPLAIN.intersection(words) or "to" in words[:-1]
        if not explained or any(len(group) > 1 or _JOINTS.intersection(group[0].before) for group in kept[1:]):
            return ""
    return ", ".join(candidate.text for candidate in kept[0])


def _choice(text: str) -> str | None:
    """The letter of a choice that is named as such; "" where others are, too."""
    chosen = {(match[1] or match[2]).upper() for match in _CHOSEN.finditer(text)}
    if not chosen:
        return None
    others = re.search(r"\b(?:or|not|nor|neither)\b|n't\b|[,/&] ?\(?[B-J]\b", text)
    return chosen.pop() if len(chosen) == 1 and not others else ""


def _phrase(sentence: str) -> str:
    """Words that are the result, where a sentence has no mathematics: what follows its last verb."""
    words = sentence.split()
    last = max((i for i, word in enumerate(words) if word.lower().strip(",:") in _CONCLUDE), default=-1)
    rest = words[last + 1 :]
    return stripped(" ".join(rest)) if 0 < len(rest) <= 4 else stripped(sentence)


def _sentences(text: str) -> list[str]:
    """Without questions, which state nothing."""
    parts = [*_SENTENCE_END.split(text), ""]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [part for part, end in pairs if part.strip(f"{_IGNORED}-#_.") and not end.startswith("?")]


def _conclusion(text: str) -> str:
    """What prose states."""
    prose = _Prose(text)
    anchor = None
    for anchor in _ANCHOR.finditer(prose.text):  # noqa: B007
        pass
    if anchor is None:
        sentences = _sentences(prose.text)
        for number in range(len(sentences) - 1, -1, -1):
            found = _read(sentences[number], prose.filled, anchored=False)
            if found is not None:
                hedges = number > 0 and _ALTERNATIVE.match(sentences[number])
                return "" if hedges else prose.filled(found)
        choice = _choice(prose.text)
        if choice is not None:
            return choice
        answered = _YES_NO.match(prose.text)
        if answered and not re.search(r"\b(?:yes|no|true|false|or|maybe|perhaps)\b", answered[2], re.IGNORECASE):
            return answered[1]
        if not sentences or (len(sentences) > 1 and _ALTERNATIVE.match(sentences[-1])):
            return ""
        return _phrase(sentences[-1])
    before = _sentences(prose.text[: anchor.start()] + "answer")
    clause = before[-1][: -len("answer")] if before else ""
    if _ALTERNATIVE.match(clause) or re.search(r"\bor\b", clause) or _REFUTED_BEFORE.search(clause):
        return ""
    rest = _sentences(prose.text[anchor.end() :])
    if not rest:
        return ""
    for later in rest[1:]:
        if _RECONSIDERED.match(later) and _candidates(later)[0]:
            return prose.filled(_read(later, prose.filled, anchored=False) or "")
    if _negated(anchor[0]):
        return ""
    sentence = stripped(rest[0])
    if is_expression(sentence) and not _PLACEHOLDER.search(sentence):
        stated = sentence
    else:
        found = _read(rest[0], prose.filled, anchored=True)
        choice = _choice(sentence)
        if found is not None:
            stated = found
        elif choice is not None:
            stated = choice
        else:
            stated = sentence if _PHRASE.fullmatch(sentence) else ""
    for later in rest[1:]:
        others = [candidate.text for candidate in _candidates(later)[0]]
        if _ALTERNATIVE.match(later) or (_UNSURE.search(later) and any(other != stated for other in others)):
            return ""
    return prose.filled(stated)


def _negated(anchor: str) -> bool:
    return bool(re.search(r"\b(?:not|cannot|never)\b|n['’]t\b", anchor))


def in_words(answer: str, reference: str) -> bool:
    """Whether an answer says that the answer is this reference, which is in words."""
    if not answer.endswith(reference) or is_expression(reference):
        return False
    anchors = [*_ANCHOR.finditer(answer, 0, len(answer) - len(reference))]
    return bool(anchors) and anchors[-1].end() == len(answer) - len(reference) and not _negated(anchors[-1][0])


def stated(answer: str) -> str:
    """The expression or the words that the answer gives as its result; "" where it states none, or more than one."""
    answer = plain(answer[-_MAX_ANSWER:])
    tagged = [*_TAGGED.finditer(answer)]
    if tagged:
        answer = tagged[-1][1]
    answer = _SPECIAL_TOKEN.sub("", answer)
    box = boxed(answer)
    if box is not None:
        return stripped(box)
    bare = stripped(answer.strip().removeprefix("####"))
    if is_expression(bare) and not _ANCHOR.match(bare):
        return bare
    whole = _MATHS.fullmatch(answer.strip(" \n*."))
    if whole and "$" not in (inside := next(filter(None, whole.groups()))):
        return stripped(inside)
    if _LABELLED.fullmatch(bare) and len(_LABEL.findall(bare)) == 1:
        return bare
    if len(answer) > _MAX_PROSE:
        answer = answer[-_MAX_PROSE:]
        answer = answer[answer.find("\n") + 1 :]
    return stripped(_conclusion(answer))
