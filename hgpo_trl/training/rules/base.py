"""What rules for learning when to think differ in: one small class each.

A rule says how the modes of a query's N responses come about, which old log-probability the decision token has, and how
the rewards of the group become one advantage per token. Everything else (rollouts, rewards, the clipped loss, metrics,
evaluation) is the trainer's, and the same for all.

Shapes: `Q` queries, `N` responses each, `T` tokens of the longest response, the decision token first. Other tokens of
an opening are forced; the trainer gives them the decision's advantage.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hgpo_trl.common.errors import UserError


@dataclass(frozen=True)
class Groups:
    """The scored responses of a batch, which a rule turns into advantages."""

    rewards: Tensor  # [Q, N], NaN where a response has none
    modes: Tensor  # [Q, N], THINK, NO_THINK or, where the policy samples them, OFF_MODE. Forced: the think half first
    lengths: Tensor  # [Q, N], tokens from the decision on, without others of the opening
    mode_probs: Tensor  # [Q, 2], the old policy's probability of each mode, π_old(m|q)
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # [Q, N] each: `Rule.columns` of the data set
    decided: Tensor | None = None  # [Q], queries without think samples; None: `lazy_thinking` is off

    @property
    def valid(self) -> Tensor:
        """`[Q, N]`, boolean: the response has a reward."""
        return ~self.rewards.isnan()

    def of_mode(self, mode: int) -> Tensor:
        """`[Q, N]`, 1 where a response is of the mode, else 0."""
        return (self.modes == mode).to(self.rewards.dtype)

    @property
    def answer_lengths(self) -> Tensor:
        """`[Q, N]`, tokens after the decision token, at least 1."""
        return (self.lengths - 1).clamp(min=1).to(self.rewards.dtype)

    def per_token(self, values: Tensor, decision: Tensor | float = 1.0) -> Tensor:
        """`[Q*N, T]` from `[Q, N]`: the value on every token of a response, 0 beyond it and without a reward.

        Args:
            decision: factor of the decision token's value; a number, or `[Q, N]`.
        """
        position = torch.arange(int(self.lengths.max()), device=values.device)
        spread = values.where(self.valid, 0.0)[:, :, None] * (position < self.lengths[:, :, None])
        spread[:, :, 0] *= decision
        return spread.flatten(0, 1)


class Rule(ABC):
    """A rule for learning when to think; subclass it for one of your own and name the class as `mode_rule`.

    Args:
        args: `HGPOConfig`. Keyword arguments of a subclass are its options, which `mode_rule_kwargs` sets.

    Raises:
        UserError: an option or a field of `args` is out of range for the rule.
    """

    samples_modes: ClassVar[bool] = False  # the policy draws the mode; else half of a group is forced into each
    decision_log_prob: ClassVar[float | None] = None  # old log-probability of the decision token; None: the policy's
    columns: ClassVar[tuple[str, ...]] = ()  # numbers that the rule reads from the rows of the training data
    loss_types: ClassVar[tuple[str, ...]] = ()  # that the advantages are made for; none: any

    def __init__(self, args: Any) -> None:
        self.margin: float = args.margin  # δ

    @abstractmethod
    def advantages(self, groups: Groups) -> Tensor:
        """Return one advantage per token, `[Q*N, T]`, query-major, 0 beyond the end of each response."""


def check_correctness(name: str, rewards: Tensor) -> None:
    """Check that rewards can be read as a share of correctness.

    Args:
        name: of the rule, for the message.
        rewards: `[Q, N]`, NaN where there is none.

    Raises:
        UserError: one is below 0 or above 1.
    """
    outside = (rewards < 0) | (rewards > 1)  # False for NaN
    if outside.any():
        raise UserError(
            f"mode_rule={name} reads rewards as correctness, between 0 and 1; a response got "
            f"{rewards[outside][0].item():.6g}. Rescale the reward functions, or choose another rule."
        )


def check_option(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise UserError unless a rule's option is a finite number from `low` to `high`."""
    if not low <= value <= high or value == float("inf"):
        bounds = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise UserError(f"mode_rule_kwargs: {name} must be a finite number, {bounds}; got {value}.")
