"""Limits of a response's length: for each mode, and for the reasoning of a think response.

A think response that runs out of tokens has no answer and scores 0, which teaches not to think. With a budget of k
tokens its reasoning is cut off there, the text that ends a reasoning is put behind it, and the model goes on from that
with its answer. The forced tokens are not the policy's, and are out of the loss.

Shapes: `b` rows, `T` tokens of the longest response, its opening first.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import MODES, ModeTokens
from hgpo_trl.modes.hybrid_accuracy import THINK

PER_MODE = ("max_think_tokens", "max_no_think_tokens")  # fields of `Limits`, in the order of `MODES`
LIMITS = ("think_budget", *PER_MODE)  # those that are none by default
MAX_THINK_HELP = "Tokens per think response; null: max_new_tokens."
MAX_NO_THINK_HELP = "Tokens per no-think response; null: max_new_tokens."
THINK_BUDGET_HELP = "Close the reasoning by force after so many tokens, and let the model answer; null: no budget."

Sampled = tuple[list[list[int]], list[list[float]] | None]
Sample = Callable[[list[list[int]], int, int], Sampled]
"""Samples a response to each of some prompts: from the prompts, how many in a row are equal, and the most tokens of a
response; returns the tokens of each and, from vLLM, their log-probabilities."""


@dataclass(frozen=True)
class Limits:
    """The most tokens of a response, opening and end token included, and of a reasoning. The opening counts as the
    longest of both modes' does.

    Raises:
        UserError: at construction: a limit is too small, or contradicts another.
    """

    max_new_tokens: int
    max_think_tokens: int | None = None  # of a think response; None: `max_new_tokens`
    max_no_think_tokens: int | None = None
    think_budget: int | None = None  # of a reasoning, after which it is closed by force; None: no budget
    total: str = "max_new_tokens"  # the name of that field, for messages

    def __post_init__(self) -> None:
        for name in PER_MODE:
            limit = getattr(self, name)
            if limit is not None and not 2 <= limit <= self.max_new_tokens:
                raise UserError(
                    f"{name} must lie between 2, the decision token and one more, and {self.total}="
                    f"{self.max_new_tokens}, or be null for no limit of the mode's own; got {limit}."
                )
        if self.think_budget is None:
            return
        if self.think_budget < 1:
            raise UserError(f"think_budget must be at least 1 token, or null for no budget; got {self.think_budget}.")
        name, limit = self._field(THINK), self.most(THINK)
        if self.think_budget + 3 > limit:  # at least a token of opening, closing and answer
            raise UserError(
                f"think_budget={self.think_budget} leaves no token for the answer within {name}={limit}. Lower "
                f"think_budget, or raise {name}."
            )

    def most(self, mode: int | None) -> int:
        """The most tokens of a response of a mode (its place in `MODES`); None: of neither."""
        limit = None if mode is None else getattr(self, PER_MODE[mode])
        return self.max_new_tokens if limit is None else limit

    def _field(self, mode: int) -> str:
        """The field that sets `most`."""
        return self.total if getattr(self, PER_MODE[mode]) is None else PER_MODE[mode]

    @property
    def of_both(self) -> int | None:
        """The limit of a response in either mode; None: they differ, and the modes have to be sampled apart."""
        think, no_think = map(self.most, range(len(MODES)))
        return think if think == no_think and self.think_budget is None else None

    def rooms(self, marks: ModeTokens) -> tuple[int, int]:
        """The most tokens behind the opening of a think and of a no-think response.

        Raises:
            UserError: one has none.
        """
        longest = max(marks.forced)
        for mode in range(len(MODES)):
            if self.most(mode) <= longest:
                raise UserError(
                    f"{self._field(mode)} must be at least {longest + 1}, the opening of a mode and one more; got "
                    f"{self.most(mode)}."
                )
        think, no_think = (self.most(mode) - longest for mode in range(len(MODES)))
        return think, no_think

    def budget(self, tokenizer: PreTrainedTokenizerBase, marks: ModeTokens) -> "ThinkBudget | None":
        """The budget of reasoning, with the tokens that close it; None: there is none.

        Raises:
            UserError: it leaves no token for the answer, or `rooms` has none.
        """
        if self.think_budget is None:
            return None
        closing = tokenizer(marks.mode_format.end_reasoning, add_special_tokens=False)["input_ids"]
        room = self.rooms(marks)[THINK]
        budget = ThinkBudget(self.think_budget, tuple(closing), marks.end_think, room, marks.forced[THINK])
        if budget.answer_tokens < 1:
            name, limit = self._field(THINK), self.most(THINK)
            raise UserError(
                f"think_budget={self.think_budget} leaves no token for the answer: the longest opening, the reasoning "
                f"and the {len(closing)} tokens that close it take {limit - budget.answer_tokens} of {name}={limit}. "
                f"Lower think_budget, or raise {name}."
            )
        return budget


@dataclass(frozen=True)
class ThinkBudget:
    """Reasoning of `tokens` tokens at most, in responses of `max_new_tokens` tokens after the opening."""

    tokens: int  # k
    closing: tuple[int, ...]  # the tokens that close a reasoning by force
    end_think: int  # the mark among them, which also shows that a reasoning is closed
    max_new_tokens: int
    opening: int  # tokens that a think response is given before its reasoning

    @property
    def answer_tokens(self) -> int:
        """Tokens that are left once a reasoning has used up its budget and is closed."""
        return self.max_new_tokens - self.tokens - len(self.closing)

    def after(self, begun: int) -> "ThinkBudget":
        """The same budget behind the first `begun` tokens of the opening, where the model writes the others."""
        return replace(self, tokens=self.tokens + self.opening - begun)

    def goes_on(self, drawn: Sequence[int], ends: Collection[int]) -> bool:
        """Whether a response, sampled up to the budget, goes on there: one of `ends` has not ended it."""
        return len(drawn) >= self.tokens and drawn[-1] not in ends

    def closed(self, drawn: Sequence[int]) -> list[int]:
        """A response that goes on, with its reasoning closed."""
        return [*drawn] if self.end_think in drawn else [*drawn, *self.closing]

    def sample(self, prompts: list[list[int]], same: int, sample: Sample, ends: Collection[int]) -> Sampled:
        """Sample responses to prompts that end in the decision to think.

        `sample` is called twice, also where no response goes on: sharded models need all processes as long as one of
        them samples.

        Args:
            same: how many prompts in a row are equal.
            ends: tokens that end a response.

        Returns:
            Tokens after the prompt, and their log-probabilities if `sample` returns any: None for forced tokens.
        """
        ids, log_probs = sample(prompts, same, self.tokens)
        goes_on = [row for row, drawn in enumerate(ids) if self.goes_on(drawn, ends)]
        begun = [list(drawn) for drawn in ids]
        scores: list[list[Any]] = [[None] * len(drawn) for drawn in ids] if log_probs is None else list(log_probs)
        for row in goes_on:
            begun[row] = self.closed(ids[row])
            scores[row] = [*scores[row], *[None] * (len(begun[row]) - len(ids[row]))]
        if not goes_on:
            sample(prompts[:1], 1, 1)  # for nothing
            return begun, None if log_probs is None else scores
        rest, rest_log_probs = sample([prompts[row] + begun[row] for row in goes_on], 1, self.answer_tokens)
        for place, row in enumerate(goes_on):
            begun[row] += rest[place]
            scores[row] = [*scores[row], *(rest_log_probs[place] if rest_log_probs else [])]
        return begun, None if log_probs is None else scores

    def forced(self, completion_ids: Tensor, lengths: Tensor, thinks: Tensor) -> Tensor:
        """Find the tokens that were forced: what follows a reasoning that was still open at the budget.

        Args:
            completion_ids: `[b, T]`.
            lengths: `[b]`.
            thinks: `[b]`, boolean: the response thinks.

        Returns:
            `[b, T]`, boolean.
        """
        first = self.opening + self.tokens  # behind the opening and the reasoning
        closed = (completion_ids[:, self.opening : first] == self.end_think).any(dim=1)
        cut = thinks & ~closed & (lengths > first)
        position = torch.arange(completion_ids.shape[1], device=completion_ids.device)
        return cut[:, None] & (position >= first) & (position < first + len(self.closing))
