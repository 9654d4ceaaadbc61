"""Find the reasoning trace in a response, by the marks that sources write it in."""

from dataclasses import dataclass

from hgpo_trl.data.rows import Fault, Parts
from hgpo_trl.modes import Mode


@dataclass(frozen=True, slots=True)
class Convention:
    """Marks of a trace in responses: `open` trace `close` answer, the answer perhaps within marks of its own."""

    open: str
    close: str
    answer_open: str = ""
    answer_close: str = ""


CONVENTIONS = (
    Convention("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>"),
    Convention("<think>", "</think>"),
)


def has_trace(text: str) -> bool:
    """Whether any mark of a trace occurs in a response."""
    return any(mark in text for convention in CONVENTIONS for mark in (convention.open, convention.close))


def unopened(text: str) -> Convention | None:
    """The convention of a response that ends a trace without opening it, because the prompt did."""
    ended = (convention for convention in CONVENTIONS if convention.close in text)
    return next((convention for convention in ended if convention.open not in text), None)


def split_trace(text: str) -> tuple[str, str]:
    """Reasoning and answer of a response that marks its trace in one of `CONVENTIONS`, stripped.

    The response must begin with the trace, and each mark must occur exactly once and in order.
    """
    for convention in CONVENTIONS:
        marks = {mark: text.count(mark) for mark in (convention.open, convention.close)}
        if not any(marks.values()):
            continue
        before, opened, rest = text.partition(convention.open)
        reasoning, closed, answer = rest.partition(convention.close)
        if set(marks.values()) != {1} or before.strip() or not (opened and closed):
            raise Fault("unbalanced_tags", counts=marks)
        return reasoning.strip(), _unwrap(answer, convention)
    raise Fault("unknown_format", begins=text[:80])


def _unwrap(answer: str, convention: Convention) -> str:
    """The answer without the marks around it, if it has those of the convention."""
    marks = [mark for mark in (convention.answer_open, convention.answer_close) if mark]
    counts = {mark: answer.count(mark) for mark in marks}
    if not any(counts.values()):
        return answer.strip()
    before, _, inside = answer.partition(convention.answer_open)
    inside, _, after = inside.partition(convention.answer_close)
    if set(counts.values()) != {1} or before.strip() or after.strip():
        raise Fault("unbalanced_tags", counts=counts)
    return inside.strip()


def thought(text: str) -> Parts:
    """A response with a trace; one whose trace is empty, as Qwen3 answers at once, is a no-think example."""
    reasoning, answer = split_trace(text)
    return {"mode": Mode.THINK if reasoning else Mode.NO_THINK, "reasoning": reasoning, "answer": answer}
