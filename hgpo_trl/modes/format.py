"""The two modes of a hybrid-reasoning model, and how a response in each looks as text.

    think:     <think> reasoning </think> answer
    no think:  <no_think> answer </no_think>

That is the format of `lhrm`, this library's own (arXiv 2505.14631, section 2.1). Models that already think have other
marks: a `ModeFormat` says which.
"""

import re
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import cached_property
from typing import Any

from hgpo_trl.common.errors import UserError


class Mode(StrEnum):
    """How a response is given: with a reasoning trace (⊢), or at once (⊬)."""

    THINK = "think"
    NO_THINK = "no_think"

    @property
    def open_tag(self) -> str:
        return f"<{self}>"

    @property
    def close_tag(self) -> str:
        return f"</{self}>"


MODES = (Mode.THINK, Mode.NO_THINK)  # this order is the mode axis of every tensor
TAGS = tuple(tag for mode in MODES for tag in (mode.open_tag, mode.close_tag))

# Marks of a reasoning trace in other models' responses. `List<Thought>` in code is none of them.
_TRACE = re.compile(
    r"(?:(?<!\w)<|</)(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad)/?>"
    r"|<\|(?:(?:begin|end)_of_thought|/?think(?:ing)?)\|>"
    r"|\[/?think\]"
    r"|◁/?think(?:ing)?▷",
    re.IGNORECASE,
)

# Fields of a chat message in which models keep their trace, beside the content.
TRACE_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought")


# --- formats ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModeFormat:
    """The marks by which a model begins and ends its modes.

    A response follows the generation prompt and begins with its mode's opening, which `HGPOTrainer` forces. The
    decision stands where the tokens of the two openings part. An empty `think` means that every response thinks unless
    it begins with `no_think`. Texts are written with the blanks around a mark; reading a response allows any blanks.

        think:     {think}{lead} reasoning {end_reasoning} answer
        no think:  {no_think}{lead} answer {end_no_think}

    Raises:
        UserError: a text is missing, or the openings differ by blanks at most.
    """

    name: str
    think: str  # opens a response that thinks
    no_think: str  # opens one that does not
    end_reasoning: str
    end_no_think: str = ""  # ends a no-think answer; empty where the end of the turn does
    lead: str = ""  # written after an opening, and not forced

    def __post_init__(self) -> None:
        for field in ("no_think", "end_reasoning"):
            if not getattr(self, field).strip():
                raise UserError(f"mode_format: {field} is blank. Give the text that the model writes there.")
        if self.think.split() == self.no_think.split():
            raise UserError(
                f"mode_format: think={self.think!r} and no_think={self.no_think!r} differ by blanks at most, so that "
                "no response shows its mode. Give each mode an opening of its own."
            )

    def opening(self, mode: Mode) -> str:
        """The text that opens a mode."""
        return self.think if mode is Mode.THINK else self.no_think

    def end(self, mode: Mode) -> str:
        """The mark, without blanks around it, that ends the reasoning or a no-think answer; may be empty."""
        return (self.end_reasoning if mode is Mode.THINK else self.end_no_think).strip()

    @cached_property
    def by_length(self) -> tuple[Mode, ...]:
        """The modes, that with the longer opening first: the other opening may be its beginning."""
        return tuple(sorted(MODES, key=lambda mode: -len("".join(self.opening(mode).split()))))

    @cached_property
    def marks(self) -> re.Pattern[str]:
        """Finds every mark, blanks around it apart."""
        found = [text.strip() for text in (self.think, self.end_reasoning, self.no_think, self.end_no_think)]
        found = [mark for mark in dict.fromkeys(found) if mark]
        simple = [mark for mark in found if not any(other in mark for other in found if other != mark)]
        return re.compile("|".join(map(_any_blanks, simple)))

    @cached_property
    def _openings(self) -> tuple[tuple[Mode, re.Pattern[str]], ...]:
        return tuple((mode, re.compile(rf"\s*{_any_blanks(self.opening(mode))}")) for mode in self.by_length)

    def opened(self, text: str) -> tuple[Mode, int] | None:
        """The mode that a response begins with, and where its opening ends; None where it begins with neither."""
        for mode, pattern in self._openings:
            if found := pattern.match(text):
                return mode, found.end()
        return None

    def opened_by(self, prompt: str) -> Mode | None:
        """The mode whose opening a prompt ends with, as it is written; None where the model has to decide."""
        openings = ((mode, self.opening(mode)) for mode in self.by_length)
        return next((mode for mode, opening in openings if opening and prompt.endswith(opening)), None)

    def declaration(self) -> str | dict[str, str]:
        """What `as_format` makes this format of: its name, or its texts."""
        return self.name if PRESETS.get(self.name) == self else asdict(self)


def _any_blanks(mark: str) -> str:
    """A regular expression for a mark with any blanks in the place of its own, and between two tags."""
    return r"\s*".join(map(re.escape, mark.replace("><", "> <").split()))


LHRM = ModeFormat(
    "lhrm", "<think>", "<no_think>", end_reasoning="\n</think>\n\n", end_no_think="\n</no_think>", lead="\n"
)
PRESETS = {
    preset.name: preset
    for preset in (
        LHRM,
        ModeFormat("qwen3", "<think>\n", "<think>\n\n</think>\n\n", end_reasoning="\n</think>\n\n"),
        ModeFormat("smollm3", "<think>\n", "<think>\n\n</think>\n", end_reasoning="\n</think>\n"),
        ModeFormat("deepseek-v3.1", "<think>", "</think>", end_reasoning="</think>"),
        ModeFormat("r1", "", "</think>\n\n", end_reasoning="\n</think>\n\n"),
    )
}


def as_format(value: Any) -> ModeFormat:
    """The format that a recipe's `mode_format` names, or gives by its texts.

    Raises:
        UserError: there is no such preset, a field of the texts is unknown or missing, or see `ModeFormat`.
    """
    if isinstance(value, ModeFormat):
        return value
    if isinstance(value, str):
        if value not in PRESETS:
            raise UserError(
                f"mode_format={value!r} is none of {', '.join(PRESETS)}. Name one of these, or give the texts of "
                "another: think, no_think, end_reasoning, and perhaps end_no_think and lead."
            )
        return PRESETS[value]
    texts = {"name": "custom", **value}
    known = [field.name for field in fields(ModeFormat)]
    if wrong := [name for name, text in texts.items() if name not in known or not isinstance(text, str)]:
        raise UserError(f"mode_format: {wrong[0]}={texts[wrong[0]]!r} is not one of {', '.join(known)} with a text.")
    if missing := {"think", "no_think", "end_reasoning"} - set(texts):
        raise UserError(
            f"mode_format lacks {' and '.join(sorted(missing))}. Give the text that the model writes there."
        )
    return ModeFormat(**texts)


# --- text ---------------------------------------------------------------------------------------------------


class Fault(StrEnum):
    """Faults in the format of a response."""

    NO_MODE = "no_mode"  # does not begin with a mode tag
    UNCLOSED = "unclosed"  # the mode's close tag never comes
    NESTED = "nested"  # a tag where none belongs
    THINK_IN_NO_THINK = "think_in_no_think"  # a reasoning trace inside no-think, in our tags or other marks
    TRAILING_TEXT = "trailing_text"  # text after </no_think>
    EMPTY_ANSWER = "empty_answer"  # closed, but nothing to score
    OVERLONG = "overlong"  # a no-think answer beyond the cap (`rewards.overlong`); the text alone does not show it


@dataclass(frozen=True, slots=True)
class Response:
    """A split response. `mode` is None if it does not begin with a mode tag; `faults` are in `Fault`'s order."""

    mode: Mode | None
    reasoning: str
    answer: str
    faults: tuple[Fault, ...]

    @property
    def well_formed(self) -> bool:
        return not self.faults


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion as TRL passes it: a string, or a conversation of one assistant message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def split_response(text: str, mode_format: ModeFormat = LHRM) -> Response:
    """Split a response into mode, reasoning and answer, and name every fault of its format.

    Total: never raises, and never loses an answer. Without a mode the answer is the whole text; in an unclosed no-think
    response it is the rest; in an unclosed think response all is reasoning and the answer is empty; text after
    the end of a no-think answer is not part of it. Reasoning and answer are stripped. A no-think answer with a
    reasoning trace in another model's marks (`<thinking>`, `<|begin_of_thought|>`, `[THINK]`, `◁think▷`, ...) has the
    fault of one in `<think>`; without a mark, reasoning cannot be told from explanation.
    """
    opened = mode_format.opened(text)
    if opened is None:
        return Response(None, "", text.strip(), (Fault.NO_MODE,))

    mode, start = opened
    tags = list(mode_format.marks.finditer(text, start))
    names = [tag.group() for tag in tags]
    mark = mode_format.end(mode)
    close = names.index(mark) if mark in names else len(names)
    closed = not mark or close < len(names)
    end, rest = tags[close].span() if close < len(names) else (len(text), len(text))
    inside, after = text[start:end].strip(), text[rest:].strip()
    tags_inside, tags_after = set(names[:close]), names[close + 1 :]

    reasoning, answer = (inside, after) if mode is Mode.THINK else ("", inside)
    trace = {mode_format.think.strip(), mode_format.end(Mode.THINK)}
    misplaced = tags_inside & trace if mode is Mode.NO_THINK else set()
    found = (
        (Fault.UNCLOSED, not closed),
        (Fault.NESTED, tags_inside - misplaced or tags_after),
        (Fault.THINK_IN_NO_THINK, mode is Mode.NO_THINK and (misplaced or trace_mark(inside))),
        (Fault.TRAILING_TEXT, mode is Mode.NO_THINK and after),
        (Fault.EMPTY_ANSWER, closed and not answer),
    )
    return Response(mode, reasoning, answer, tuple(fault for fault, present in found if present))


def trace_mark(text: str) -> str | None:
    """The first mark of a reasoning trace that is not one of our tags, as `<thinking>`; None where there is none."""
    found = _TRACE.search(text) if any(begin in text for begin in "<[◁") else None  # 20 times faster on prose
    return found.group() if found else None


def format_response(mode: Mode | str, answer: str, reasoning: str = "", mode_format: ModeFormat = LHRM) -> str:
    """Write a response in its mode's format; the inverse of `split_response` for text without tags.

    Raises:
        UserError: `mode` is unknown, a part contains a tag, `answer` is blank, or no-think is given `reasoning`, also
            inside `answer` (see `split_response`); or `reasoning` is blank where the format takes that for no-think.
    """
    mode = Mode(mode)
    answer, reasoning = answer.strip(), reasoning.strip()
    for name, part in (("answer", answer), ("reasoning", reasoning)):
        if tag := mode_format.marks.search(part):
            raise UserError(f"{name} contains the tag {tag.group()}: take it apart with split_response() first.")
    if not answer:
        raise UserError("answer is blank: a response needs an answer; drop the example.")
    begin = f"{mode_format.opening(mode)}{mode_format.lead}"
    if mode is Mode.THINK:
        text = f"{begin}{reasoning}{mode_format.end_reasoning}{answer}"
        if mode_format.opened(text) != mode_format.opened(begin):
            raise UserError(
                f"reasoning is blank: in the format {mode_format.name} such a response does not think. Use mode "
                f"{Mode.NO_THINK}."
            )
        return text
    if reasoning:
        raise UserError(f"reasoning was given for mode {mode}: leave it empty, or use mode {Mode.THINK}.")
    if mark := trace_mark(answer):
        raise UserError(f"answer contains {mark}, a reasoning trace, in mode {mode}: use mode {Mode.THINK}.")
    return f"{begin}{answer}{mode_format.end_no_think}"
