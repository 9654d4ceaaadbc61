"""A row on its way from a source to a data set, and the verdict of a step on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hgpo_trl.modes import LHRM, Mode, ModeFormat, format_response


@dataclass(slots=True)
class Example:
    """A query with its response, or without one in a data set of prompts.

    Args:
        prompt: conversation up to the response; its last message is the user's.
        source: name of the source, as the recipe has it.
        domain: such as "maths", "code", "general".
        id: unique within the source, the same in every build.
        mode: of the response; None for a prompt alone.
        reasoning: the trace, without tags; empty where the mode is no-think.
        answer: the answer part of the response, without tags; empty for a prompt alone.
        reference: reference answer; None if nothing definite is known.
        level: difficulty, as text; None where the source has none.
        reasoning_gym: what the verifier of `hgpo_trl.rewards.reasoning_gym_reward` needs, as text; None: not of there.
        generated: from a template by a program, not written by a person or a model: another word is another question.
        num_tokens: of prompt and response; 0 until the token limit's step has counted them.
        mode_format: the marks that the response is written with.
    """

    prompt: list[dict[str, str]]
    source: str
    domain: str
    id: str
    mode: Mode | None = None
    reasoning: str = ""
    answer: str = ""
    reference: str | None = None
    level: str | None = None
    reasoning_gym: str | None = None
    generated: bool = False
    num_tokens: int = 0
    mode_format: ModeFormat = LHRM

    @property
    def query(self) -> str:
        """The text of the user's last message."""
        return self.prompt[-1]["content"]

    def completion(self) -> list[dict[str, str]]:
        """The assistant's message, in the marks of the format; no message for a prompt alone.

        Raises:
            UserError: the response cannot be written in the format (`format_response`).
        """
        if self.mode is None:
            return []
        content = format_response(self.mode, self.answer, self.reasoning, self.mode_format)
        return [{"role": "assistant", "content": content}]


@dataclass(frozen=True, slots=True)
class Drop:
    """Why an example is dropped: a reason to count, such as "too_long", and details of this example."""

    reason: str
    detail: dict[str, Any] = field(default_factory=dict)


Step = Callable[[Sequence[Example]], list[Drop | None]]
"""One verdict per example; None keeps it."""
