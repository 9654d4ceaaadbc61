"""The scored rollout: one value from which advantages and metrics follow."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hgpo_trl.modes import MODES, Fault, Mode, ModeTokens, Response
from hgpo_trl.modes.leakage import count_reflection_words
from hgpo_trl.rewards.functions import weighted_sum


@dataclass(frozen=True)
class Rollout:
    """The scored responses of a global batch.

    Shapes: `B = Q * N` responses to `Q` queries, query-major, the think half of every query first; `F` reward
    functions. Every process holds all of it.
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

    @property
    def rewards(self) -> Tensor:
        """`[Q, 2, N/2]`, the weighted sums r of Eq. 7."""
        return weighted_sum(self.rewards_per_func, self.weights).view(-1, len(MODES), self.group_size // len(MODES))

    @property
    def sampled_lengths(self) -> Tensor:
        """`[B]`, sampled tokens of each response."""
        think, no_think = self.forced
        thinks = think_rows(len(self.lengths), self.group_size, self.lengths.device)
        return self.lengths - torch.where(thinks, think, no_think)

    @property
    def unsampled(self) -> Tensor:
        """`[B]`, boolean, see `unsampled_rows`."""
        return unsampled_rows(len(self.lengths), self.group_size, self.decided, self.lengths.device)


def row_modes(num_rows: int, group_size: int, first: int = 0) -> list[int]:
    """Modes (0 = think, 1 = no_think) of `num_rows` rows of a global batch, from row `first` on.

    A group can straddle two processes, so the place that counts is the one in the global batch, modulo N.
    """
    return [int(place % group_size >= group_size // 2) for place in range(first, first + num_rows)]


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

    The rest of an opening is forced, and the same in every response of its mode. So Eq. 10 knows nothing of it: its
    advantage is 0, and only the KL term acts on it. (An advantage would cancel there, within each mode.)
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
        """`[B, T]`, a value for every token, from `[B, T']`, one for each of these tokens; 0 for the others."""
        longest = self.place + int(self.rest.max())
        if not longest:
            return values
        position = torch.arange(values.shape[1] + longest, device=values.device) - self.place
        rest = self.rest[:, None]
        source = torch.where(position > 0, position - rest, position)
        forced = (position < 0) | ((position > 0) & (position <= rest)) | (source >= values.shape[1])
        return values.gather(1, source.clamp(0, values.shape[1] - 1)).masked_fill(forced, 0.0)


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
