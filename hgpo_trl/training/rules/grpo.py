"""GRPO (arXiv 2402.03300) with a bonus for not thinking: the mode is a token like any other."""

from torch import Tensor

from hgpo_trl.modes.hybrid_accuracy import NO_THINK
from hgpo_trl.training.advantages import standardize
from hgpo_trl.training.rules.base import Groups, Rule


class GRPO(Rule):
    """A_i = (r'_i − mean(r')) / (std(r') + 1e-4) over the query's N responses, with r' = r + δ·1[no think].

    The expectation of r' prefers no-think where R̄_no_think + δ >= R̄_think, as Eq. 8 of HGPO does. With δ = 0
    (`margin: 0`) it is plain GRPO on accuracy, which has no reason to stop thinking.
    """

    samples_modes = True

    def advantages(self, groups: Groups) -> Tensor:
        """`[Q*N, T]`, the same for all tokens of a response."""
        rewards = (groups.rewards + self.margin * groups.of_mode(NO_THINK)).nan_to_num(0.0)
        return groups.per_token(standardize(rewards, groups.valid, dim=(1,)))
