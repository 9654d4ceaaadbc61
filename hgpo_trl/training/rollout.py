"""The scored rollout: one value from which advantages and metrics follow."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hgpo_trl.modes import MODES, Fault, Mode, ModeTokens, Response
from hgpo_trl.modes.decision import OFF_MODE
from hgpo_trl.modes.leakage import count_reflection_words
from hgpo_trl.rewards.functions import weighted_sum


@dataclass(frozen=True)
class Rollout:
    """The scored responses of a global batch.

    Shapes: `B = Q * N` responses to `Q` queries, query-major, the think half of every query first where modes are
    forced; `F` reward functions. Every process holds all of it.
    """

    rewards_per_func: Tensor  # [B, F], NaN where a function gives no reward; the lowest where the format is broken
    weights: Tensor  # [F], of the reward functions
    lengths: Tensor  # [B], tokens, the opening included
    truncated: Tensor  # [B], 1 where a response ran out of tokens
    faults: Tensor  # [B, len(Fault)], 1 where a response has the fault
    reflection_words: Tensor  # [B], of no-think answers; 0 for others
    group_size: int  # N
    decided: Tensor | None = None  # [Q], queries without think samples; None: `lazy_thinking` is off
    forced: tuple[int, int] = (1, 1)  # tokens that a response of each mode begins with and that are not sampled
    sampled_modes: Tensor | None = None  # [B], `response_modes`, where the policy samples them; None: they are forced
    closing_tokens: Tensor | None = None  # [B], forced tokens that close a reasoning at `think_budget`; None: no budget

    @property
    def response_rewards(self) -> Tensor:
        """`[B]`, the weighted sums r of Eq. 7."""
        return weighted_sum(self.rewards_per_func, self.weights)

    @property
    def rewards(self) -> Tensor:
        """`[Q, 2, n]`, the same by mode, see `by_mode`."""
        return self.by_mode(self.response_rewards)

    @property
    def modes(self) -> Tensor:
        """`[B]`, 0 = think, 1 = no_think, OFF_MODE."""
        if self.sampled_modes is not None:
            return self.sampled_modes
        return (~think_rows(len(self.lengths), self.group_size, self.lengths.device)).long()

    @property
    def sampled_lengths(self) -> Tensor:
        """`[B]`, tokens of each response that the policy has sampled, without those that were forced."""
        lengths = self.lengths
        if self.sampled_modes is None:
            lengths = lengths - lengths.new_tensor(self.forced)[self.modes]
        return lengths if self.closing_tokens is None else lengths - self.closing_tokens

    def by_mode(self, values: Tensor) -> Tensor:
        """`[Q, 2, n]` from `[B]`: n is N/2 where modes are forced, else N, with NaN in the other mode's places."""
        if self.sampled_modes is None:
            return values.view(-1, len(MODES), self.group_size // len(MODES))
        modes = torch.arange(len(MODES), device=values.device)[:, None]
        of_mode = self.sampled_modes.view(-1, 1, self.group_size) == modes
        return values.view(-1, 1, self.group_size).where(of_mode, torch.nan)

    @property
    def unsampled(self) -> Tensor:
        """`[B]`, boolean, see `unsampled_rows`."""
        return unsampled_rows(len(self.lengths), self.group_size, self.decided, self.lengths.device)


def row_modes(num_rows: int, group_size: int, first: int = 0) -> list[int]:
    """Modes (0 = think, 1 = no_think) of `num_rows` rows of a global batch, from row `first` on.

    A group can straddle two processes, so the place that counts is the one in the global batch, modulo N.
    """
    return [int(place % group_size >= group_size // 2) for place in range(first, first + num_rows)]


def response_modes(responses: list[Response]) -> Tensor:
    """`[b]`, the mode that each of one process's responses begins with: 0 = think, 1 = no_think, OFF_MODE."""
    return torch.tensor([OFF_MODE if response.mode is None else MODES.index(response.mode) for response in responses])


def think_rows(num_rows: int, group_size: int, device: torch.device) -> Tensor:
    """`[B]`, boolean: which rows of a global batch of `num_rows` rows think."""
    return torch.arange(num_rows, device=device) % group_size < group_size // 2


def unsampled_rows(num_rows: int, group_size: int, decided: Tensor | None, device: torch.device) -> Tensor:
    """`[B]`, boolean: think rows of decided queries (`[Q]`; None: no such), which are the decision token alone."""
    think = think_rows(num_rows, group_size, device)
    return torch.zeros_like(think) if decided is None else think & decided.repeat_interleave(group_size)


@dataclass(frozen=True)
class OwnTokens:
    """The tokens of each response that the policy chose, in a rollout: the decision, and all after the opening.

    Modes are taken to be forced. Where the policy samples them, openings are one token each, and nothing differs.

    A rule knows nothing of an opening's other tokens, which are forced. They get the decision's advantage: the action
    that it rewards is the whole opening, whose probability π(m|q) is the product over its tokens. Without it nothing
    would hold them, and the policy would cease to begin with the prefix that both openings share.
    """

    place: int  # of the decision
    rest: Tensor  # [B], forced tokens right after the decision

    @classmethod
    def of(cls, tokens: ModeTokens, num_rows: int, group_size: int, device: torch.device) -> "OwnTokens":
        """Those of a global batch of `num_rows` rows."""
        place = len(tokens.prefix)
        think, no_think = (max(0, len(opening) - place - 1) for opening in tokens.openings)
        return cls(place, torch.where(think_rows(num_rows, group_size, device), think, no_think))

    def lengths(self, lengths: Tensor) -> Tensor:
        """`[B]`, the number of these tokens, from the lengths of whole responses."""
        return lengths - self.place - self.rest

    def spread(self, values: Tensor) -> Tensor:
        """`[B, T]`, a value for every token, from `[B, T']`, one for each of these; an opening has the decision's."""
        longest = self.place + int(self.rest.max())
        if not longest:
            return values
        position = torch.arange(values.shape[1] + longest, device=values.device) - self.place
        source = (position - self.rest[:, None]).clamp(min=0)  # 0 for the whole opening
        beyond = source >= values.shape[1]
        return values.gather(1, source.clamp(max=values.shape[1] - 1)).masked_fill(beyond, 0.0)


def inspect_responses(responses: list[Response], completion_ids: list[list[int]], ends: Collection[int]) -> Tensor:
    """Measure one process's responses.

    Args:
        ends: tokens that end a response which has not run out of tokens.

    Returns:
        `[b, 3 + len(Fault)]`, integers: length in tokens, 1 where it is truncated, reflection words of a no-think
        answer, 1 for each fault it has.
    """
    rows = [
        (len(ids), ids[-1] not in ends, _leaked_words(response), *_fault_indicators(response.faults))
        for response, ids in zip(responses, completion_ids, strict=True)
    ]
    return torch.from_numpy(np.array(rows))  # faster than torch.tensor on nested tuples


def _leaked_words(response: Response) -> int:
    return count_reflection_words(response.answer) if response.mode is Mode.NO_THINK else 0


@cache
def _fault_indicators(faults: tuple[Fault, ...]) -> tuple[bool, ...]:
    """For every kind of fault, in the order of `Fault`, whether it is among `faults`."""
    return tuple(fault in faults for fault in Fault)
