"""HGPO (arXiv 2505.14631): both modes are forced and compared within the group (Eq. 5 to 10)."""

from typing import Any, ClassVar

from torch import Tensor

from hgpo_trl.modes import MODES
from hgpo_trl.training.advantages import Estimator, compute_advantages
from hgpo_trl.training.rules.base import Groups, Rule


class HGPO(Rule):
    """Inter-group reward for the mode with the better mean, intra-group reward for the best samples of a mode.

    Args:
        args: `HGPOConfig`, with α, δ, estimator and the other fields of `compute_advantages`.
        estimator: of your own, in place of `args.estimator`.
    """

    settings: ClassVar[tuple[str, ...]] = ("alpha", "intra_scope", "ties", "discount", "decision_weighting")

    def __init__(self, args: Any, estimator: str | Estimator | None = None) -> None:
        super().__init__(args)
        self.estimator = estimator or args.estimator
        self.values = {name: getattr(args, name) for name in self.settings}

    def advantages(self, groups: Groups) -> Tensor:
        """`[Q*N, T]`, Eq. 10."""
        return compute_advantages(
            groups.rewards.unflatten(1, (len(MODES), -1)),
            groups.lengths.flatten(),
            estimator=self.estimator,
            margin=self.margin,
            mode_probs=groups.mode_probs,
            decided=groups.decided,
            **self.values,
        )
