r"""Whether an answer equals the reference answer: cheap exact rungs first, then math-verify, in workers with a time limit.

What counts of an answer is its last `\boxed{}`, else what it states as the answer, else its last mathematics: an answer
that names several candidates is not right because one of them is. The rungs, each of which settles or passes on:

    text       equal, but for blanks, dollar signs, bold, a full stop and ways to write the same LaTeX
    numbers    plain numbers, fractions, mixed numbers, percentages, number bases: exactly, whatever their length
    words      names and letters of choices
    lists      tuples, intervals and lists whose entries the rungs above settle
    symbolic   math-verify

Only the last can get stuck. `check_answers` gives it to processes that are killed at the time limit.
"""

import ast
import atexit
import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from decimal import Decimal
from fractions import Fraction
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

TIMEOUT_S = 5.0  # for a sample, in a worker of its own; in-process, for each parse and for the comparison
_CHUNK_TIMEOUT_S = 2.0  # for a chunk of samples of a few milliseconds each; when it is up they are tried one by one
_CHUNK = 8  # samples
_WORKER_MEMORY = 4 << 30  # bytes of address space
_MAX_EXPRESSION = 200  # characters; LaTeX without end takes math-verify minutes
_MAX_TEXT = 1_000  # characters of prose, from its end, that math-verify looks through
_MAX_DIGITS = 1_000  # of a fraction's parts; Python refuses to make an integer of more than 4,300

_IGNORED = "$*" + "".join(filter(str.isspace, map(chr, range(0x3001))))  # around an answer; the blanks of Unicode too

# --- What an answer states ----------------------------------------------------

_ANCHOR = re.compile(r"\banswer\b(?:[^\n.:=$\\]{0,60}?\s(?:is|are|equals)\b|\s*[:=])[\s:*]*|####\s*", re.IGNORECASE)
_MATHS = re.compile(
    r"\$\$(.{1,400}?)\$\$|(?<!\\)\$((?:\\\$|[^$]){1,400}?)(?<!\\)\$|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.DOTALL
)
_JOINT = re.compile(r"\s*(?:,?\s*(?:and|or)\b|,|;)\s*")
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


def _last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{}` that is closed."""
    end = len(text)
    for _ in range(8):  # a policy in a loop may open boxes without end
        start = max(text.rfind("\\boxed{", 0, end), text.rfind("\\fbox{", 0, end))
        if start < 0:
            return None
        inside = text.index("{", start) + 1
        close = _closing_brace(text, inside)
        if close >= 0:
            return text[inside:close]
        end = start
    return None


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
    box = _last_box(answer)
    if box is not None:
        return _bare(box)
    bare = _bare(answer)
    if _is_expression(bare):
        return bare
    whole = _MATHS.fullmatch(answer.strip(" \n*."))
    if whole and "$" not in (inside := next(filter(None, whole.groups()))):
        return _bare(inside)
    anchor = None
    for anchor in _ANCHOR.finditer(answer.strip()[-20 * _MAX_TEXT :]):  # noqa: B007
        pass
    if anchor is None:
        return bare if _PHRASE.fullmatch(bare) else None
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
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_NAME = re.compile(r"(?:[A-Za-z](?:_\{?\w+\}?)?|[a-zA-Z]\([a-z]\))(?:=|\\in(?![A-Za-z]))\s*")


def _normalise(text: str) -> str:
    """One of the spellings of the same LaTeX."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return _bare(text)


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
    if isinstance(a.value, Decimal) and isinstance(b.value, Decimal):
        if a.percent == b.percent:
            return a.value == b.value
        parts, other = (a.value, b.value) if a.percent else (b.value, a.value)
        return parts == other or parts.scaleb(-2) == other
    if max(len(str(n.value)) for n in (a, b) if isinstance(n.value, Decimal)) > _MAX_DIGITS if _mixed(a, b) else False:
        return False
    x, y = Fraction(a.value), Fraction(b.value)
    if x == y or (a.percent != b.percent and (x / 100 == y if a.percent else x == y / 100)):
        return True
    # A rounded decimal may be near enough for math-verify.
    return None if _mixed(a, b) and abs(x - y) < Fraction(1, 1000) * max(1, abs(x)) else False


def _mixed(a: _Number, b: _Number) -> bool:
    return isinstance(a.value, Decimal) != isinstance(b.value, Decimal)


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
    opening: str
    items: list[str]
    closing: str


def _items(text: str) -> _List | None:
    """The entries at the top level of a list, and its brackets: "" for none."""
    opening = next((o for o in ("(", "[", "\\{") if text.startswith(o)), "")
    depth, start, items = 0, len(opening), []
    closing, end = "", len(text)
    for match in re.finditer(r"\\[{}]|\\.|[()\[\]{},]", text):
        token = match[0]
        if token in ("(", "[", "{", "\\{"):
            depth += 1
        elif token in (")", "]", "}", "\\}"):
            depth -= 1
            if depth == 0 and opening and not closing:
                if match.end() != len(text):
                    opening = ""  # the bracket belongs to the first entry only
                    return _plain_items(text)
                closing, end = token, match.start()
        elif token == "," and depth == (1 if opening else 0):
            items.append(text[start : match.start()])
            start = match.end()
    items.append(text[start:end])
    if depth != 0 or len(items) < 2 or bool(opening) != bool(closing):
        return None
    return _List(opening, [item.strip() for item in items], closing)


def _plain_items(text: str) -> _List | None:
    depth, start, items = 0, 0, []
    for match in re.finditer(r"\\[{}]|\\.|[()\[\]{},]", text):
        token = match[0]
        depth += {"(": 1, "[": 1, "{": 1, "\\{": 1, ")": -1, "]": -1, "}": -1, "\\}": -1}.get(token, 0)
        if token == "," and depth == 0:
            items.append(text[start : match.start()])
            start = match.end()
    items.append(text[start:])
    return _List("", [item.strip() for item in items], "") if depth == 0 and len(items) > 1 else None


def _equal_lists(a: _List, b: _List) -> bool | None:
    ordered = a.opening in ("(", "[") or b.opening in ("(", "[")
    if ordered:
        if a.opening and b.opening and (a.opening, a.closing) != (b.opening, b.closing):
            return False if "\\{" not in (a.opening, b.opening) else None
        if (a.opening, a.closing) != (b.opening, b.closing):
            return None
        if len(a.items) != len(b.items):
            return False
        verdicts = [_settle_normalised(x, y)[0] for x, y in zip(a.items, b.items, strict=True)]
        return False if False in verdicts else None if None in verdicts else True
    table = [[_settle_normalised(x, y)[0] for y in b.items] for x in a.items]
    if (
        len(a.items) == len(b.items)
        and all(True in row for row in table)
        and all(map(_any_true, zip(*table, strict=True)))
    ):
        return True
    return None if any(None in row for row in table) or len(a.items) != len(b.items) else False


def _any_true(column: Sequence[bool | None]) -> bool:
    return True in column


def _settle_normalised(reference: str, answer: str) -> tuple[bool | None, str]:
    """The verdict of the exact rungs and the rung; None where they do not settle it."""
    if reference.replace(" ", "") == answer.replace(" ", ""):
        return True, "text"
    if not answer:
        return False, "text"
    named, other = _NAME.match(reference), _NAME.match(answer)
    if bool(named) != bool(other) or (named and other and named[0] == other[0]):
        reference = reference[named.end() :] if named else reference
        answer = answer[other.end() :] if other else answer
        if reference.replace(" ", "") == answer.replace(" ", ""):
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
    return None, "symbolic"


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
    if _reference(reference) == _bare(answer):
        return True, "text"
    if len(answer) <= 5_000:
        number, other = _number(_reference(reference)), _number(_bare(answer))
        if number and other:
            verdict = _equal_numbers(number, other)
            if verdict is not None:
                return verdict, "numbers"
    statement = _statement(answer)
    if statement is None or len(statement) > 100 * _MAX_EXPRESSION:
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


def _symbolic(reference: str, answer: str, timeout: int | None = None) -> bool:
    from math_verify import verify

    return verify(
        _parse_reference(_reference(reference), timeout), _parse_answer(answer, timeout), timeout_seconds=timeout
    )


# --- Workers ------------------------------------------------------------------


def _prepare_worker() -> None:
    import logging
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY, _WORKER_MEMORY))
    logging.disable(logging.WARNING)  # math-verify warns of every sample that it cannot take


def _check_chunk(compare: Callable[[str, str], bool], pairs: list[tuple[str, str]]) -> list[bool]:
    return [compare(reference, answer) for reference, answer in pairs]


def _serve(channel: Connection, workers: int) -> None:
    """Answer batches of pairs until the other end is closed. Runs in a process that imports nothing heavy."""
    from pebble import ProcessExpired, ProcessPool

    _symbolic("x = 1", "$\\frac{2}{2}$")  # what is loaded and compiled before the workers are forked they share
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ProcessPool(workers, initializer=_prepare_worker, context=multiprocessing.get_context("fork")) as pool:
        while True:
            try:
                pairs, compare, timeout = channel.recv()
            except EOFError:
                pool.stop()
                return

            def run(jobs: list[list[int]], limit: float) -> list[int]:
                futures = [
                    pool.schedule(_check_chunk, args=(compare, [pairs[i] for i in job]), timeout=limit)  # noqa: B023
                    for job in jobs
                ]
                failed = []
                for job, future in zip(jobs, futures, strict=True):
                    try:
                        for i, verdict in zip(job, future.result(), strict=True):
                            verdicts[i] = verdict  # noqa: B023
                    except (TimeoutError, ProcessExpired, CancelledError, Exception):
                        failed += job
                return failed

            verdicts: list[bool | None] = [None] * len(pairs)
            size = max(1, min(_CHUNK, -(-len(pairs) // workers)))
            chunks = [list(range(start, min(start + size, len(pairs)))) for start in range(0, len(pairs), size)]
            failed = run(chunks, min(timeout, _CHUNK_TIMEOUT_S))
            run([[i] for i in failed], timeout)
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
        if _server is None:
            _server = _Server()
        try:
            return _server.ask(pairs, compare, timeout)
        except (EOFError, OSError):  # the server was killed
            _close()
            return [None] * len(pairs)
        except BaseException:  # an interrupt: what the server still sends would be taken for the next batch's verdicts
            _close()
            raise


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
