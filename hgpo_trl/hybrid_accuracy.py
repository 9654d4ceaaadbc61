"""Hybrid accuracy (Eq. 13 of arXiv 2505.14631) and what goes with it, as pure functions on scored samples.

Everything is first computed per prompt: a table of columns, one number per prompt. Every reported figure, overall, per
level or with an interval, is the mean of a column over some prompts; NaN entries do not count.

Shapes: `K` prompts, `n` samples in each mode; axis 1 is the mode in the order of `hgpo_trl.modes.MODES`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hgpo_trl.decision import OFF_MODE

Array = NDArray[np.float64]
Table = dict[str, Array]

THINK, NO_THINK = 0, 1  # positions on the mode axis
TIE_TOLERANCE = 1e-9  # means of the same rewards in another order may differ in the last bits


def _mean(x: Array, axis: int | None = None) -> Any:
    """Mean over the entries that are not NaN; NaN (without a warning) where there are none."""
    valid = ~np.isnan(x)
    count = valid.sum(axis=axis)
    total = np.where(valid, x, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def better_mode(mean_scores: Array, mean_lengths: Array, margin: float = 0.0) -> NDArray[np.int64]:
    """m_gt of Eq. 13: the mode with the higher mean score; the shorter one where the means are close.

    Args:
        mean_scores: `[K, 2]`, NaN where a mode has no valid sample.
        mean_lengths: `[K, 2]`, tokens.
        margin: means that are equal or differ by less than this count as equal. Equal lengths go to no-think.

    Returns:
        `[K]`: 0 = think, 1 = no_think, -1 = undefined, because a mode has no valid sample.
    """
    gain = mean_scores[:, THINK] - mean_scores[:, NO_THINK]
    close = (np.abs(gain) <= TIE_TOLERANCE) | (np.abs(gain) < margin - TIE_TOLERANCE)
    shorter = np.where(mean_lengths[:, THINK] < mean_lengths[:, NO_THINK], THINK, NO_THINK)
    better = np.where(close, shorter, np.where(gain > 0, THINK, NO_THINK))
    return np.where(np.isnan(gain), -1, better)


def per_prompt_table(
    scores: Array,
    lengths: Array,
    prob_think: Array,
    prob_no_think: Array,
    picked: NDArray[np.int64],
    margin: float = 0.0,
) -> Table:
    """One row per prompt of everything that is reported.

    Args:
        scores: `[K, 2, n]`, NaN where a sample has no valid score.
        lengths: `[K, 2, n]`, tokens of each response.
        prob_think, prob_no_think: `[K]`, the model's own probabilities of either mode as its first token.
        picked: `[K]`, m_p, the most likely first token: 0 = think, 1 = no_think, -1 = neither.
        margin: see `better_mode`.

    Returns:
        Columns, each `[K]`:
        `hybrid_accuracy`: 1 where m_p = m_gt, else 0 (picking neither is wrong); NaN where m_gt is undefined.
        `thinking_ratio`: π(think|q), the expected share of freely sampled responses that think.
        `off_mode_mass`: probability that the first token is neither mode.
        `accuracy/*` (score) and `mean_tokens/*` (tokens), where * is
        `auto` (the mode picked greedily), `sampled` (expectation over the model's own first token), `think` (always),
        `no_think` (never), `oracle` (m_gt). Picking neither scores 0 (NaN where the prompt has no valid sample at all)
        and costs the longer mode's tokens.
    """
    mean_scores, mean_lengths = _mean(scores, axis=2), _mean(lengths.astype(np.float64), axis=2)  # [K, 2]
    target = better_mode(mean_scores, mean_lengths, margin)
    rows = np.arange(len(target))
    off_mode = picked == OFF_MODE
    neither = np.clip(1.0 - prob_think - prob_no_think, 0.0, 1.0)
    table = {
        "hybrid_accuracy": np.where(target < 0, np.nan, (picked == target).astype(np.float64)),
        "thinking_ratio": prob_think.astype(np.float64),
        "off_mode_mass": neither.astype(np.float64),
    }
    wrong = np.where(np.isnan(mean_scores).all(axis=1), np.nan, 0.0)
    for name, by_mode, fallback in (
        ("accuracy", mean_scores, wrong),
        ("mean_tokens", mean_lengths, mean_lengths.max(axis=1)),
    ):
        think, no_think = by_mode[:, THINK], by_mode[:, NO_THINK]
        table |= {
            f"{name}/auto": np.where(off_mode, fallback, by_mode[rows, np.maximum(picked, 0)]),
            f"{name}/sampled": prob_think * think + prob_no_think * no_think + neither * fallback,
            f"{name}/think": think,
            f"{name}/no_think": no_think,
            f"{name}/oracle": np.where(target < 0, np.nan, by_mode[rows, np.maximum(target, 0)]),
        }
    return table


def bootstrap_intervals(table: Table, resamples: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of every column's mean, resampling prompts with replacement (the same ones for all)."""
    num_prompts = len(next(iter(table.values())))
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=resamples)  # [R, K]
    values = np.stack(list(table.values()), axis=1)  # [K, C]
    valid = ~np.isnan(values)
    totals, weights = counts @ np.where(valid, values, 0.0), counts @ valid.astype(np.float64)
    means = np.where(weights > 0, totals / np.maximum(weights, 1), np.nan)
    intervals = {}
    for name, column in zip(table, means.T, strict=True):
        column = column[~np.isnan(column)]
        low, high = np.quantile(column, [0.025, 0.975]) if len(column) else (np.nan, np.nan)
        intervals[name] = (float(low), float(high))
    return intervals


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"accuracy/auto": x} -> {"accuracy": {"auto": x}}"""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        head, _, tail = key.partition("/")
        if tail:
            nested.setdefault(head, {})[tail] = value
        else:
            nested[head] = value
    return nested


def summarize(table: Table, seed: int = 0) -> dict[str, Any]:
    """Mean and 95 % interval of every column, nested as in report.json: means at the top, `intervals` beside them."""
    means = {name: float(_mean(column)) for name, column in table.items()}
    return {
        "num_prompts": len(next(iter(table.values()))),
        **_nest(means),
        "intervals": _nest(bootstrap_intervals(table, seed=seed)),
    }


def summarize_by(table: Table, labels: Sequence[Any], name: str, seed: int = 0) -> list[dict[str, Any]]:
    """`summarize` for each distinct label but None, numbers before text: [{name: label, ...}, ...]."""
    distinct = sorted(set(labels) - {None}, key=lambda label: (isinstance(label, str), label))
    groups = []
    for label in distinct:
        rows = np.array([other == label for other in labels])
        groups.append({name: label, **summarize({key: column[rows] for key, column in table.items()}, seed=seed)})
    return groups
