"""Figures of a run's curve: held-out metrics over the tokens that the model has sampled in rollouts.

A curve is a list of points with "step", "tokens" (rising, the first at 0) and metrics. Between two points a metric is
interpolated linearly; after the last one it stays.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

Curve = Sequence[Mapping[str, float]]

TARGET = 0.9
SETTLED = 0.05  # P(think) over all prompts this close to 0 or 1 is one mode


def metric_at(curve: Curve, tokens: float, metric: str = "hybrid_accuracy") -> float:
    """The metric at so many tokens."""
    return float(np.interp(tokens, [p["tokens"] for p in curve], [p[metric] for p in curve]))


def area(curve: Curve, tokens: float, metric: str = "hybrid_accuracy") -> float:
    """Area under the metric from 0 to `tokens`, divided by `tokens`: its mean over the training."""
    places = np.array([*(p["tokens"] for p in curve if p["tokens"] < tokens), tokens], dtype=np.float64)
    return float(np.trapezoid([metric_at(curve, place, metric) for place in places], places) / tokens)


def settled(thinking_ratio: float) -> bool:
    """Whether the model takes one mode for all prompts."""
    return not SETTLED <= thinking_ratio <= 1 - SETTLED


def deciding(curve: Curve) -> list[dict[str, float]]:
    """The curve with a hybrid accuracy of 0 where the model has settled on one mode.

    Such a model does not decide, and yet reaches 1 once it has lost the other mode: then its only mode is the better
    one for every prompt.
    """
    return [{**p, "hybrid_accuracy": 0.0 if settled(p["thinking_ratio"]) else p["hybrid_accuracy"]} for p in curve]


def tokens_to(curve: Curve, target: float = TARGET, metric: str = "hybrid_accuracy") -> float:
    """Tokens at which the metric first reaches the target and keeps it in the next evaluation; NaN if it does not.

    Interpolated from the evaluation before, which was below the target.
    """
    for index, (point, following) in enumerate(itertools.pairwise(curve)):
        if min(point[metric], following[metric]) < target:
            continue
        before = curve[max(index - 1, 0)]
        gain = point[metric] - before[metric]
        share = (target - before[metric]) / gain if gain > 0 else 1.0  # no gain: the very first evaluation
        return before["tokens"] + share * (point["tokens"] - before["tokens"])
    return float("nan")
