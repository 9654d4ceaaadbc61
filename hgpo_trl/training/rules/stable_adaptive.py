"""Stable Adaptive Thinking (arXiv 2602.22556, section 3.3): shaped advantages, and weights by length.

The paper numbers no equations. It names neither the value of δ nor that of the constant M: here δ is `margin`, and M is
`max_completion_length`, with which β = 0 and λ = 1 is Dr. GRPO.
"""

from typing import Any

from torch import Tensor

from hgpo_trl.modes.hybrid_accuracy import NO_THINK
from hgpo_trl.training.advantages import standardize
from hgpo_trl.training.rules.base import Groups, Rule, check_correctness, check_option


class StableAdaptive(Rule):
    """Correctness-Preserving Advantage Shaping (CPAS) and Length-Aware Gradient Regulation (LAGR).

    CPAS: A_i = A_i^GRPO + δ for a correct no-think response (r_i = 1), A_i^GRPO otherwise, so that no correct think
    response is punished for its length. LAGR: J = Σ_i w_i [λ·L_{i,0} + Σ_{t>0} L_{i,t}], L the clipped surrogate and
    w_i = 1/M · |o_i|^(−β) / Σ_j |o_j|^(−β) over the query's responses, |o_i| the tokens after the decision token.

    L is linear in a positive factor of the advantage, so the weights are part of it.

    Args:
        args: `HGPOConfig`. `loss_type: dr_grpo` divides the sum over tokens by N and max_completion_length, which
            leaves |o_i|^(−β) / mean_j |o_j|^(−β) of w_i.
        length_exponent: β, between 0 (long responses count in full) and 1 (every response counts alike); 0.4 in the
            paper.
        control_weight: λ, of the decision token; 10 in the paper.
    """

    samples_modes = True
    loss_types = ("dr_grpo",)

    def __init__(self, args: Any, length_exponent: float = 0.4, control_weight: float = 10.0) -> None:
        super().__init__(args)
        self.length_exponent, self.control_weight = length_exponent, control_weight
        check_option("length_exponent", length_exponent, 0.0, 1.0)
        check_option("control_weight", control_weight, 0.0)

    def advantages(self, groups: Groups) -> Tensor:
        """`[Q*N, T]`."""
        check_correctness("stable_adaptive", groups.rewards)
        shaped = standardize(groups.rewards.nan_to_num(0.0), groups.valid, dim=(1,))
        shaped = shaped + self.margin * groups.of_mode(NO_THINK) * (groups.rewards == 1)
        weight = groups.answer_lengths**-self.length_exponent
        return groups.per_token(shaped * weight / weight.mean(dim=1, keepdim=True), decision=self.control_weight)
