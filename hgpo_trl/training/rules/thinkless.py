"""Thinkless (arXiv 2505.13379): DeGRPO, which weighs the decision token apart from the rest of the response."""

from typing import Any

from torch import Tensor

from hgpo_trl.modes.hybrid_accuracy import THINK
from hgpo_trl.training.rules.base import Groups, Rule, check_correctness, check_option


class Thinkless(Rule):
    """Decoupled GRPO: J = mean over responses of α·L_{i,0} + 1/T_i Σ_{t>0} L_{i,t}, L the clipped surrogate.

    T_i is the number of tokens after the decision token (the authors' code divides by those of a micro-batch). L is
    linear in a positive factor of the advantage, so the weights are part of it. A_i = r'_i − mean(r'), without division
    by the standard deviation, and r' is 1 for a correct no-think response, 1 − γ for a correct think response, −1 for
    a wrong one. Rewards r between 0 and 1 are interpolated: r' = r·(2 − γ·1[think]) − 1.

    With p the accuracy of a mode, no-think is preferred where 2·p_no_think − 1 >= (2 − γ)·p_think − 1. At p_think = 1
    that is p_no_think >= 1 − γ/2, the preference of HGPO for γ = 2δ.

    Args:
        args: `HGPOConfig`. `loss_type: dr_grpo` is a sum over tokens divided by the rows and by
            max_completion_length; the latter is undone here.
        control_weight: α; 1/1000 in the paper, made for responses of thousands of tokens.
        gamma: γ, between 0 and 2; 0.5 in the authors' script. None: 2δ.
    """

    samples_modes = True
    loss_types = ("dr_grpo",)

    def __init__(self, args: Any, control_weight: float = 1e-3, gamma: float | None = None) -> None:
        super().__init__(args)
        self.control_weight = control_weight
        self.gamma = 2 * self.margin if gamma is None else gamma
        self.max_tokens: int = args.max_completion_length
        check_option("control_weight", control_weight, 0.0)
        check_option("gamma (2 x margin if not given)", self.gamma, 0.0, 2.0)

    def advantages(self, groups: Groups) -> Tensor:
        """`[Q*N, T]`."""
        check_correctness("thinkless", groups.rewards)
        rewards = groups.rewards * (2 - self.gamma * groups.of_mode(THINK)) - 1
        advantages = rewards - rewards.nanmean(dim=1, keepdim=True)
        weight = self.max_tokens / groups.answer_lengths
        return groups.per_token(advantages * weight, decision=self.control_weight * groups.answer_lengths)
