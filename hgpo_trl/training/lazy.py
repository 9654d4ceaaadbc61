"""Lazy thinking: no think samples of queries that no-think wins whatever they would bring."""

from itertools import compress
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hgpo_trl.common.errors import UserError
from hgpo_trl.rewards.functions import check_bounded
from hgpo_trl.training.advantages import decided_without_think
from hgpo_trl.training.rollout import think_rows


class LazyThinking:
    """The state of one rollout that is sampled and scored in two passes: first no-think, then think responses.

    Shapes: `B = Q * N` rows over all processes, `F` reward functions.

    Args:
        inputs: this process's rows of the data set.
        group_size: N.
        accelerator: names this process, and the number of them. All have the same number of rows.
    """

    def __init__(self, inputs: list[dict[str, Any]], group_size: int, accelerator: Accelerator) -> None:
        num_rows, device = len(inputs) * accelerator.num_processes, accelerator.device
        self.inputs = inputs
        self.group_size = group_size
        self.first = accelerator.process_index * len(inputs)  # this process's first row
        self.think = think_rows(num_rows, group_size, device)  # [B]
        self.decided = torch.ones(num_rows // group_size, dtype=torch.bool, device=device)  # [Q]; all, at first
        self._known: Tensor | None = None  # [B, F], rewards of the first pass

    def decide(self, rewards: Tensor, margin: float) -> list[int]:
        """Find the queries that the rewards of the first pass, `[Q, 2, N/2]`, decide.

        Returns:
            This process's think rows that are still to be sampled, counted from its first row.
        """
        self.decided = decided_without_think(rewards[:, 1], margin)
        return [row for row, asked in enumerate(self.asked_here) if asked]

    @property
    def asked(self) -> Tensor:
        """`[B]`, rows whose responses this pass scores."""
        if self._known is None:
            return ~self.think
        return self.think & ~self.decided.repeat_interleave(self.group_size)

    @property
    def asked_here(self) -> list[bool]:
        """The same of this process's rows."""
        return self.asked[self.first : self.first + len(self.inputs)].tolist()

    def merge(self, rewards: Tensor, weights: Tensor, names: list[str]) -> Tensor:
        """Put this pass's rewards and those of the pass before together: `[B, F]`, NaN where nothing is sampled.

        Raises:
            UserError: a reward, or a weighted sum of them, is not between 0 and 1.
        """
        known = rewards.new_tensor(torch.nan) if self._known is None else self._known
        self._known = torch.where(self.asked[:, None], rewards, known)
        check_bounded(self._known, weights, names)
        return self._known

    def fill_column(self, column: str, places: list[Any], values: list[Any]) -> None:
        """Put a reward function's values into the places of the rows that it was shown.

        Args:
            column: name of the column, for the message.
            places: the column so far, one place per row of this process or shorter; changed in place.
            values: one per row that the function was shown.

        Raises:
            UserError: another number of values.
        """
        asked = self.asked_here
        if len(values) != sum(asked):
            raise UserError(
                f"log_extra({column!r}) got {len(values)} values for {sum(asked)} completions: under lazy_thinking it "
                "takes one per completion, in one call."
            )
        places += [None] * (len(asked) - len(places))
        for place, value in zip(compress(range(len(asked)), asked), values, strict=True):
            places[place] = value
