"""Steps that judge examples one by one: quality, language, length, correctness.

Every step is picklable and gets an example without tags.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from hgpo_trl.common.errors import UserError
from hgpo_trl.data.example import Drop, Example, Step
from hgpo_trl.modes import LHRM, Mode, ModeFormat
from hgpo_trl.training.rows import FaultyRow, Renderer, as_trained, open_row
from hgpo_trl.verification import check_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# --- quality --------------------------------------------------------------------------------------------------

_FENCE = re.compile(r"^\s*(```|~~~)", re.MULTILINE)
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{(\w+\*?)\}")
_LIST_ITEM = re.compile(r"\s*([-*+•|#>]|\d+[.)]|\w[.)]|https?:)")
_LONG = 1_000  # fewest characters of an answer whose end is checked
_PROSE = 80  # fewest characters of a last line that is a sentence, not a signature, a heading or a verse
_LINE = 12  # fewest characters of a line whose repetition counts: not a brace or a rule
_TAIL = 200  # characters at the end by which a loop is looked for
_LOOPS = 10  # periods


def quality(*, min_reasoning: int = 40, max_line_repeats: int = 20) -> Step:
    """Drop examples that are empty, cut off or repetitive.

    Reasons: "empty_prompt" (no letter or digit), "empty_answer", "empty_reasoning", "short_reasoning", "truncated" and
    "repetitive". The last two prefer precision to recall. An answer is truncated if a code fence, a displayed formula
    or an environment of LaTeX is left open, or if it has at least 1,000 characters and its last line is a sentence
    without an end. A trace cannot be truncated: the mark at its end was found. A part is repetitive if one line makes
    up a fifth of the text and more than `max_line_repeats` lines, or if it ends in ten or more copies of the same text.
    A generated trace may be short: it is whole.

    Args:
        min_reasoning: fewest characters of a trace.
        max_line_repeats: number of times that a line may always be repeated.

    Raises:
        UserError: a number is negative.
    """
    for name, value in (("min_reasoning", min_reasoning), ("max_line_repeats", max_line_repeats)):
        if value < 0:
            raise UserError(f"{name} must be at least 0; got {value}.")
    return partial(_quality, min_reasoning, max_line_repeats)


def _quality(min_reasoning: int, max_line_repeats: int, examples: Sequence[Example]) -> list[Drop | None]:
    return [_fault(example, min_reasoning, max_line_repeats) for example in examples]


def _fault(example: Example, min_reasoning: int, max_line_repeats: int) -> Drop | None:
    if not any(map(str.isalnum, example.query)):
        return Drop("empty_prompt")
    if example.mode is None:
        return None
    if not example.answer.strip():
        return Drop("empty_answer")
    if example.mode is Mode.THINK:
        length = len(example.reasoning.strip())
        if not length or (length < min_reasoning and not example.generated):
            return Drop("short_reasoning" if length else "empty_reasoning", {"characters": length})
    if sign := unfinished(example.answer):
        return Drop("truncated", {"sign": sign, "ends": example.answer[-80:]})
    for part, text in (("reasoning", example.reasoning), ("answer", example.answer)):
        if repeated := repetition(text, max_line_repeats):
            return Drop("repetitive", {"part": part, "text": repeated[:80]})
    return None


def unfinished(text: str) -> str | None:
    """The sign that a text was cut off: "code", "formula", "environment" or "sentence"; None if there is none."""
    if len(_FENCE.findall(text)) % 2:
        return "code"
    prose = re.sub(r"(```|~~~).*?\1|\\.?\$", "", text, flags=re.DOTALL).rstrip()  # without code and dollar amounts
    if not prose.endswith((".", "!", "?", "}", "$")):  # else a mark was forgotten in the middle
        if prose.count("\\[") - prose.count("\\\\[") > prose.count("\\]") or prose.count("$$") % 2:
            return "formula"
        depth: Counter[str] = Counter()
        for kind, name in _ENVIRONMENT.findall(prose):
            depth[name] += 1 if kind == "begin" else -1
        if any(count > 0 for count in depth.values()):
            return "environment"
    last = text.rstrip().rpartition("\n")[2]
    long = len(text) >= _LONG and len(last) >= _PROSE and " " in last and not _LIST_ITEM.match(last)
    return "sentence" if long and (last[-1] == "," or _is_latin(last[-1])) else None


def _is_latin(character: str) -> bool:
    """Whether it is a letter of a script whose sentences end with a full stop: Latin, Greek, Cyrillic."""
    return character.isalpha() and character < "\u0530"


def repetition(text: str, max_line_repeats: int) -> str | None:
    """The line, or the period at its end, that a text repeats over and over; None if there is none."""
    lines = Counter(line for line in map(str.strip, text.splitlines()) if len(line) >= _LINE)
    if lines:
        line, count = lines.most_common(1)[0]
        if count > max(max_line_repeats, 1) and count * len(line) * 5 >= len(text):
            return line
    text = text.rstrip()
    before = text.rfind(text[-_TAIL:], 0, len(text) - 1) if len(text) > 2 * _TAIL else -1
    period = len(text) - _TAIL - before
    span = max(_LOOPS * period, 2 * _TAIL)
    looped = before >= 0 and span <= len(text) and text[-span:-period] == text[-span + period :]
    return text[-period:] if looped else None


# --- language -------------------------------------------------------------------------------------------------

_NOT_PROSE = re.compile(
    r"(```|~~~).*?(\1|\Z)"  # code, displayed
    r"|`[^`\n]*`"
    r"|\$\$.*?(\$\$|\Z)|\$[^$\n]{0,400}\$|\\\[.*?(\\\]|\Z)|\\\(.*?(\\\)|\Z)"  # formulas
    r"|\\begin\s*\{(\w+\*?)\}.*?(\\end\s*\{\6\}|\Z)"
    r"|\\[A-Za-z]+|https?://\S+|<[^<>\n]*>|[\d_^={}|/\\+*#~@&%\[\]]+",
    re.DOTALL,
)
_MAX_PROSE = 1_000  # most characters of a part that are judged
_MIN_LETTERS = 20
_SURE = 0.8
_NO_LANGUAGE = "zxx"


def language(wanted: Collection[str]) -> Step:
    """Drop examples whose query, trace or answer py3langid takes for another language than the wanted ones.

    Only prose is judged, without code, formulas and addresses, and only where there is enough of it (20 letters; a
    letter of a script other than Latin, Greek and Cyrillic counts as four) and the verdict is sure (a probability of
    0.8). So a short query or plain mathematics stays, whatever its language.

    Args:
        wanted: codes of ISO 639, such as "en", "de", "zh".

    Raises:
        UserError: no language is wanted, or py3langid does not know one.
    """
    known = set(_identifier().labels)
    if not wanted or not known.issuperset(wanted):
        unknown = sorted(set(wanted) - known)
        raise UserError(f"languages={unknown or list(wanted)!r}: give codes of {', '.join(sorted(known))}.")
    return partial(_language, frozenset(wanted))


@cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language(wanted: frozenset[str], examples: Sequence[Example]) -> list[Drop | None]:
    return [_foreign(wanted, example) for example in examples]


def _foreign(wanted: frozenset[str], example: Example) -> Drop | None:
    for part in ("query", "answer", "reasoning"):
        code, probability = identify(getattr(example, part))
        if code not in wanted and code != _NO_LANGUAGE and probability >= _SURE:
            return Drop("language", {"part": part, "language": code, "probability": round(probability, 3)})
    return None


def identify(text: str) -> tuple[str, float]:
    """Language of a text's prose and its probability; "zxx" (none) for too little prose."""
    prose = " ".join(_NOT_PROSE.sub(" ", text[: 4 * _MAX_PROSE]).split())[:_MAX_PROSE]
    letters = sum(1 if character < "\u0530" else 4 for character in prose if character.isalpha())
    if letters < _MIN_LETTERS:
        return _NO_LANGUAGE, 1.0
    code, probability = _identifier().classify(prose)
    return code, float(probability)


# --- length ---------------------------------------------------------------------------------------------------

_TOKENS_PER_MESSAGE = 4  # a chat template's marks of role and end


def token_limit(tokenizer: "PreTrainedTokenizerBase | None", max_tokens: int | None) -> Step:
    """Set `num_tokens`, and drop examples with more than `max_tokens` as "too_long".

    It counts the contents of all messages, the response with its mode's tags, and four tokens per message for the marks
    of the chat template, in one call of the tokenizer for all examples. This is close to the template's own number; a
    system message that the template adds is not counted.

    Args:
        tokenizer: of the model to be trained; None counts nothing.
        max_tokens: of prompt and response; None drops nothing.

    Raises:
        UserError: there is a limit but no tokenizer, or the limit is not positive.
    """
    if max_tokens is not None and tokenizer is None:
        raise UserError(f"max_tokens={max_tokens} needs a tokenizer to count with.")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1; got {max_tokens}.")
    return partial(_token_limit, tokenizer, max_tokens)


def _token_limit(
    tokenizer: "PreTrainedTokenizerBase | None", max_tokens: int | None, examples: Sequence[Example]
) -> list[Drop | None]:
    if tokenizer is None or not examples:
        return [None] * len(examples)
    texts = ["\n".join(message["content"] for message in (*e.prompt, *e.completion())) for e in examples]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    verdicts: list[Drop | None] = []
    for example, ids in zip(examples, encoded, strict=True):
        messages = len(example.prompt) + (example.mode is not None)
        example.num_tokens = len(ids) + _TOKENS_PER_MESSAGE * messages
        too_long = max_tokens is not None and example.num_tokens > max_tokens
        verdicts.append(Drop("too_long", {"tokens": example.num_tokens}) if too_long else None)
    return verdicts


# --- as the stage opens it -----------------------------------------------------------------------------------


def opened(tokenizer: "PreTrainedTokenizerBase", mode_format: ModeFormat = LHRM) -> Step:
    """Drop examples that the stage could not open: the chat template refuses them, or rewrites their response.

    The reasons are those of `hgpo_trl.training.rows.KINDS`.

    Args:
        tokenizer: of the model to be trained; it gets tags and template as in Stage I.
        mode_format: of the responses.
    """
    return partial(_opened, Renderer(as_trained(tokenizer, mode_format)))


def _opened(renderer: Renderer, examples: Sequence[Example]) -> list[Drop | None]:
    return [_refusal(renderer, example) for example in examples]


def _refusal(renderer: Renderer, example: Example) -> Drop | None:
    row: dict[str, Any] = {"prompt": example.prompt}
    if example.mode is not None:
        row["completion"] = example.completion()
    try:
        open_row(row, renderer)
    except FaultyRow as fault:
        return Drop(fault.kind, {"detail": fault.detail})
    return None


# --- correctness ----------------------------------------------------------------------------------------------


def verified_answers() -> Step:
    """Drop responses to maths problems whose answer is not the reference: "wrong_answer", or "unverifiable".

    Examples of another domain, prompts alone and rows without a reference are kept.
    """
    return _verified_answers


def _verified_answers(examples: Sequence[Example]) -> list[Drop | None]:
    verdicts: list[Drop | None] = [None] * len(examples)
    judged = [i for i, e in enumerate(examples) if e.domain == "maths" and e.mode is not None and e.reference]
    references, answers = [examples[i].reference or "" for i in judged], [examples[i].answer for i in judged]
    for i, verdict in zip(judged, check_answers(references, answers), strict=True):
        if not verdict:
            detail = {"reference": examples[i].reference, "answer": examples[i].answer[-200:]}
            verdicts[i] = Drop("unverifiable" if verdict is None else "wrong_answer", detail)
    return verdicts
