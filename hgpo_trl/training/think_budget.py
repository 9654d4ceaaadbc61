"""A budget of reasoning: think responses that reach it are closed by force, and answer within the tokens that are left.

A think response that runs out of tokens has no answer and scores 0, which teaches not to think. With a budget of k
tokens its reasoning is cut off there, the text that ends a reasoning is put behind it, and the model goes on from that
with its answer. The forced tokens are not the policy's, and are out of the loss.

Shapes: `b` rows, `T` tokens of the longest response, its opening first.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import ModeTokens
from hgpo_trl.modes.hybrid_accuracy import THINK

Sampled = tuple[list[list[int]], list[list[float]] | None]
Sample = Callable[[list[list[int]], int, int], Sampled]
"""Samples a response to each of some prompts: from the prompts, how many in a row are equal, and the most tokens of a
response; returns the tokens of each and, from vLLM, their log-probabilities."""


@dataclass(frozen=True)
class ThinkBudget:
    """Reasoning of `tokens` tokens at most, in responses of `max_new_tokens` tokens after the opening."""

    tokens: int  # k
    closing: tuple[int, ...]  # the tokens that close a reasoning by force
    end_think: int  # the mark among them, which also shows that a reasoning is closed
    max_new_tokens: int
    opening: int  # tokens that a think response is given before its reasoning

    @classmethod
    def of(
        cls, tokens: int | None, tokenizer: PreTrainedTokenizerBase, marks: ModeTokens, max_new_tokens: int
    ) -> "ThinkBudget | None":
        """The budget of a tokenizer and its marks; None: no budget.

        Raises:
            UserError: it leaves no token for the answer.
        """
        if tokens is None:
            return None
        budget = cls(
            tokens,
            tuple(tokenizer(marks.mode_format.end_reasoning, add_special_tokens=False)["input_ids"]),
            marks.end_think,
            max_new_tokens,
            marks.forced[THINK],
        )
        if budget.answer_tokens < 1:
            longest = max(marks.forced)
            raise UserError(
                f"think_budget={tokens} leaves no token for the answer: the longest opening, the reasoning and the "
                f"{len(budget.closing)} tokens that close it take {longest + tokens + len(budget.closing)} of "
                f"max_completion_length={longest + max_new_tokens}. Lower think_budget, or raise max_completion_length."
            )
        return budget

    @property
    def answer_tokens(self) -> int:
        """Tokens that are left once a reasoning has used up its budget and is closed."""
        return self.max_new_tokens - self.tokens - len(self.closing)

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
        goes_on = [row for row, drawn in enumerate(ids) if len(drawn) >= self.tokens and drawn[-1] not in ends]
        begun = [list(drawn) for drawn in ids]
        scores: list[list[Any]] = [[None] * len(drawn) for drawn in ids] if log_probs is None else list(log_probs)
        for row in goes_on:
            if self.end_think not in begun[row]:
                begun[row] += self.closing
                scores[row] = [*scores[row], *[None] * len(self.closing)]
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
