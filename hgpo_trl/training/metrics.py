"""Metrics of rollouts: one value per query from a `Rollout` and a `Decision`, and the metrics of an evaluation."""

import math

import numpy as np
import torch
from torch import Tensor

from hgpo_trl.modes import MODES, Fault
from hgpo_trl.modes.decision import Decision
from hgpo_trl.modes.hybrid_accuracy import BALANCED, NO_THINK, STRATA, evaluation_metrics
from hgpo_trl.training.advantages import query_signal
from hgpo_trl.training.rollout import Rollout

EVALUATION_METRICS = (
    "hybrid_accuracy",
    *STRATA,
    "unsolved",
    "thinking_ratio",
    "off_mode_mass",
    *(
        f"{name}/{of}"
        for name in ("accuracy", "mean_tokens")
        for of in ("auto", "sampled", "think", "no_think", "oracle")
    ),
    *BALANCED,
)  # names of `EvaluationMetrics.compute` without a token budget
BUDGET_METRIC = "accuracy_at_budget"  # the one that a token budget adds


def group_metrics(rollout: Rollout, decision: Decision, margin: float, ties: str) -> dict[str, Tensor]:
    """Metrics of a rollout, named as they are logged.

    Args:
        decision: `[Q]` per field, of the old policy.
        margin, ties: as `advantages.assign_rewards` takes them.

    Returns:
        `[Q]` each, NaN where a query has no value. docs/method.md explains them.
    """
    rewards, unsampled = rollout.rewards, rollout.unsampled
    queries = len(rewards)
    faults = rollout.faults.float().masked_fill(unsampled[:, None], torch.nan)  # [B, len(Fault)]
    shares = faults.view(queries, -1, len(Fault)).nanmean(dim=1).unbind(dim=1)
    metrics = {f"hgpo/faults/{kind}": share for kind, share in zip(Fault, shares, strict=True)}
    metrics["hgpo/rollout_tokens"] = rollout.sampled_lengths.view(queries, -1).sum(dim=1)
    if rollout.closing_tokens is not None:
        closed = (rollout.closing_tokens > 0).float().masked_fill(unsampled, torch.nan)
        metrics["hgpo/closed_by_budget"] = rollout.by_mode(closed)[:, 0].nanmean(dim=1)
    if rollout.decided is not None:
        metrics["hgpo/lazy_decided"] = rollout.decided

    lengths, truncated, faulty = (
        rollout.by_mode(x.float().masked_fill(unsampled, torch.nan))
        for x in (rollout.lengths, rollout.truncated, rollout.faults.any(dim=1))
    )
    means = torch.stack([rewards, lengths, truncated, faulty]).nanmean(dim=3)  # [4, Q, 2]
    by_mode = torch.cat([means, decision.mode_probs[None]])
    for mode, values in zip(MODES, by_mode.unbind(dim=2), strict=True):
        for name, value in zip(("reward", "length", "truncated", "format_faults", "prob"), values, strict=True):
            metrics[f"hgpo/{name}/{mode}"] = value
    words = rollout.by_mode(rollout.reflection_words.float())
    metrics["hgpo/leakage"] = words[:, NO_THINK].nanmean(dim=1)
    metrics["hgpo/off_mode_mass"] = decision.neither
    metrics["hgpo/decision_entropy"] = decision.entropy

    signal = query_signal(rewards, margin, ties, rollout.decided)
    metrics["hgpo/think_win_rate"] = signal.think_wins.float().masked_fill(~signal.compared, torch.nan)
    metrics["hgpo/no_intra_signal"] = ~signal.within
    metrics["hgpo/no_signal"] = ~signal.within & ~signal.compared
    return metrics


def sampled_completions(rollout: Rollout) -> dict[str, float]:
    """Compute TRL's `completions/*` of the sampled responses; TRL counts lone decision tokens as responses too."""
    sampled = ~rollout.unsampled
    lengths = rollout.lengths[sampled].float()
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.amin().item(),
        "completions/clipped_ratio": rollout.truncated[sampled].float().mean().item(),
    }


class EvaluationMetrics:
    """What one evaluation has sampled so far, and the metrics of the whole of it.

    Args:
        prompts: how many the data set has. Where the last batch does not fill all processes, prompts of the beginning
            are repeated; these do not count. inf for a stream, whose length is not known.
    """

    def __init__(self, prompts: float = math.inf) -> None:
        self.remaining = prompts
        self._batches: list[tuple[np.ndarray, ...]] = []

    def add(self, rollout: Rollout, decision: Decision) -> int:
        """Add a batch, and return how many of its queries count."""
        rewards = rollout.rewards
        queries = int(min(len(rewards), self.remaining))
        self.remaining -= queries
        columns = (rewards, rollout.lengths.view(rewards.shape), decision.think, decision.no_think)
        self._batches.append(
            (
                *(column[:queries].double().cpu().numpy() for column in columns),
                decision.picked[:queries].cpu().numpy(),
            )
        )
        return queries

    def compute(self, margin: float, token_budget: float | None) -> dict[str, float]:
        """`hybrid_accuracy.evaluation_metrics` over all queries, by `EVALUATION_METRICS`; NaN where one has no value.

        Args:
            margin: of Eq. 13.
            token_budget: tokens per response for `BUDGET_METRIC`; None leaves that out.
        """
        scores, lengths, think, no_think, picked = map(np.concatenate, zip(*self._batches, strict=True))
        return evaluation_metrics(scores, lengths, think, no_think, picked, margin, token_budget)

    def out_of_reach(self, metrics: dict[str, float]) -> bool:
        """Whether responses were scored, but no decision bias keeps to the token budget."""
        scored = any(not np.isnan(batch[0]).all() for batch in self._batches)
        return scored and math.isnan(metrics.get(BUDGET_METRIC, 0.0))
