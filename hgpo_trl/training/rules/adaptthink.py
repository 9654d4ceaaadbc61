"""AdaptThink (arXiv 2505.13417): both modes are forced and compared with the reference model's thinking."""

import math

from torch import Tensor

from hgpo_trl.modes.hybrid_accuracy import NO_THINK
from hgpo_trl.training.rules.base import Groups, Rule

REFERENCE = "reference_reward"


class AdaptThink(Rule):
    """A(x, y) = 1[no think]·δ + R(x, y) − R̄_ref(x), not normalised (Eq. 7).

    R̄_ref(x) is the mean reward of the reference model's own think responses to the query (Eq. 5), the column
    `reference_reward` of the training data. Responses are drawn from a policy that takes either mode with probability
    0.5 (Eq. 8), so the old log-probability of the decision token is log 0.5, and the ratio goes against that.

    The authors' code has one ratio per response, exp of its mean log-ratio, clipped at 0.2, and every response counts
    once: `importance_sampling_level: sequence`, `epsilon: 0.2`, `loss_type: grpo`.
    """

    decision_log_prob = math.log(0.5)
    columns = (REFERENCE,)

    def advantages(self, groups: Groups) -> Tensor:
        """`[Q*N, T]`, the same for all tokens of a response."""
        return groups.per_token(groups.rewards + self.margin * groups.of_mode(NO_THINK) - groups.columns[REFERENCE])
