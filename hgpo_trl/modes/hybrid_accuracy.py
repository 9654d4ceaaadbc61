"""Hybrid accuracy (Eq. 13 of arXiv 2505.14631) and the other metrics of an evaluation, as pure functions of samples.

A table with one number per prompt in each column is computed first. Every reported metric, overall, per level or with
an interval, is the mean of a column over some prompts, or the mean of several such means (`BALANCED`); NaN entries do
not count.

Shapes: `K` prompts, `n` samples in each mode; axis 1 is the mode in the order of `hgpo_trl.modes.MODES`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes.decision import OFF_MODE

Array = NDArray[np.float64]
PromptTable = dict[str, Array]
Label = int | float | str

BLOCK = 1_000_000  # entries of a block of resamples: 8 MB, and as much again for each copy that numpy makes
THINK, NO_THINK = 0, 1  # positions on the mode axis
TIE_TOLERANCE = 1e-9  # of means, relative where they exceed 1: rounding of the same scores in another order
SOLVED = 0.5  # mean score from which a mode solves a prompt: scored 0 or 1, half of its responses are right
STRATA = ("hybrid_accuracy_where/thinking_gains", "hybrid_accuracy_where/no_gain")
BALANCED = {"balanced_hybrid_accuracy": STRATA}  # metrics that are the mean of the means of several columns


def valid_mean(x: Array, axis: int | None = None) -> Any:
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
    gain, close = _gain(mean_scores, margin)
    shorter = np.where(mean_lengths[:, THINK] < mean_lengths[:, NO_THINK], THINK, NO_THINK)
    better = np.where(close, shorter, np.where(gain > 0, THINK, NO_THINK))
    return np.where(np.isnan(gain), -1, better)


def _gain(mean_scores: Array, margin: float) -> tuple[Array, NDArray[np.bool_]]:
    """What thinking gains in mean score, and whether the means count as equal, both `[K]`."""
    gain = mean_scores[:, THINK] - mean_scores[:, NO_THINK]
    tolerance = TIE_TOLERANCE * np.maximum(1.0, np.abs(mean_scores).max(axis=1))
    return gain, (np.abs(gain) <= tolerance) | (np.abs(gain) < margin - tolerance)


def per_prompt_table(
    scores: Array,
    lengths: Array,
    prob_think: Array,
    prob_no_think: Array,
    picked: NDArray[np.int64],
    margin: float = 0.0,
) -> PromptTable:
    """Compute all metrics of each prompt.

    Args:
        scores: `[K, 2, n]`, NaN where a sample has no valid score.
        lengths: `[K, 2, n]`, tokens of each response.
        prob_think, prob_no_think: `[K]`, the model's own probabilities of either mode as its first token.
        picked: `[K]`, m_p, the most likely first token: 0 = think, 1 = no_think, -1 = neither.
        margin: see `better_mode`.

    Returns:
        Columns, each `[K]`:
        `hybrid_accuracy`: 1 where m_p = m_gt, else 0 (picking neither is wrong); NaN where m_gt is undefined.
        `hybrid_accuracy_where/*` (`STRATA`): the same on one part of these prompts, NaN elsewhere: where thinking has
        the higher mean score, by the margin or more (`thinking_gains`, m_gt = think), and all others (`no_gain`).
        `unsolved`: 1 where neither mode's mean score reaches `SOLVED`, else 0; NaN where m_gt is undefined.
        `thinking_ratio`: π(think|q), the expected share of freely sampled responses that think.
        `off_mode_mass`: probability that a response begins in neither mode.
        `accuracy/*` (score) and `mean_tokens/*` (tokens), where * is
        `auto` (the mode picked greedily), `sampled` (expectation over the model's own first token), `think` (always),
        `no_think` (never), `oracle` (m_gt). Picking neither scores 0 (NaN where the prompt has no valid sample at all)
        and costs the longer mode's tokens.
    """
    mean_scores, mean_lengths = valid_mean(scores, axis=2), valid_mean(lengths.astype(np.float64), axis=2)  # [K, 2]
    target = better_mode(mean_scores, mean_lengths, margin)
    gain, close = _gain(mean_scores, margin)
    thinking_gains = ~close & (gain > 0)
    right = np.where(target < 0, np.nan, (picked == target).astype(np.float64))
    unsolved = (mean_scores.max(axis=1) < SOLVED - TIE_TOLERANCE).astype(np.float64)
    by_gain = np.where(thinking_gains, right, np.nan), np.where(thinking_gains, np.nan, right)
    rows = np.arange(len(target))
    off_mode = picked == OFF_MODE
    neither = np.clip(1.0 - prob_think - prob_no_think, 0.0, 1.0)
    table = {
        "hybrid_accuracy": right,
        **dict(zip(STRATA, by_gain, strict=True)),
        "unsolved": np.where(target < 0, np.nan, unsolved),
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


def biased_choice(
    prob_think: Array, prob_no_think: Array, picked: NDArray[np.int64], bias: float
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Apply a decision bias to the choice: move the log-odds log π(think) − log π(no_think) by `bias`.

    As in `hgpo_trl.generate.DecisionBias`, one log-probability gains half of it, the other loses half, and all
    probabilities are scaled to add up to 1. So −inf is never thinking, inf always thinking, and 0 changes nothing.

    Args:
        prob_think, prob_no_think, picked: `[K]`, as `per_prompt_table` takes them.

    Returns:
        The same three, with the bias. A pick changes where another outcome has become the more likely one. The
        probability of a pick that is neither mode is not known; it is taken to be all of the mass on neither.
    """
    if bias == 0:
        return prob_think, prob_no_think, picked
    if np.isinf(bias):
        think = np.full(len(picked), float(bias > 0))
        return think, 1.0 - think, np.full(len(picked), THINK if bias > 0 else NO_THINK)
    logs = _log_probs(prob_think, prob_no_think) + np.array([[bias / 2], [-bias / 2], [0.0]])
    logs -= logs.max(axis=0)
    think, no_think, _ = np.exp(logs) / np.exp(logs).sum(axis=0)
    neither = len(logs) - 1
    logs[neither, picked != OFF_MODE] = -np.inf  # each token that is neither was less likely than the modes
    own, best, rows = np.where(picked == OFF_MODE, neither, picked), logs.argmax(axis=0), np.arange(len(picked))
    chosen = np.where(logs[best, rows] > logs[own, rows], best, own)
    return think, no_think, np.where(chosen == neither, OFF_MODE, chosen)


def _log_probs(prob_think: Array, prob_no_think: Array) -> Array:
    """`[3, K]`: of think, no think and neither; −inf where one is impossible."""
    neither = np.clip(1.0 - prob_think - prob_no_think, 0.0, 1.0)
    with np.errstate(divide="ignore"):
        return np.log(np.stack([prob_think, prob_no_think, neither]))


def sweep_biases(
    prob_think: Array, prob_no_think: Array, picked: NDArray[np.int64], limit: int = 60
) -> NDArray[np.float64]:
    """Biases at which `biased_choice` makes different picks, from never to always thinking; 0 is one of them.

    At each threshold the pick of some prompt changes; between two thresholds one bias stands for all. Of more than
    `limit` biases, that many are taken, evenly spaced in their order.

    Returns:
        Finite biases in rising order.
    """
    think, no_think, neither = _log_probs(prob_think, prob_no_think)
    off_mode = picked == OFF_MODE
    with np.errstate(invalid="ignore"):  # a mode that is impossible has no threshold
        thresholds = np.concatenate(
            [(no_think - think)[~off_mode], 2 * (neither - think)[off_mode], 2 * (no_think - neither)[off_mode]]
        )
    thresholds = np.unique(thresholds[np.isfinite(thresholds)])
    if not len(thresholds):
        return np.zeros(1)
    between = (thresholds[:-1] + thresholds[1:]) / 2
    biases = np.concatenate([[thresholds[0] - 1], between, [thresholds[-1] + 1]])
    chosen = np.linspace(0, len(biases) - 1, min(limit, len(biases))).round().astype(int)
    return np.unique(np.append(biases[chosen], 0.0))


def decision_bias_curve(
    scores: Array,
    lengths: Array,
    prob_think: Array,
    prob_no_think: Array,
    picked: NDArray[np.int64],
    biases: Sequence[float] | Array,
    margin: float = 0.0,
) -> list[dict[str, Any]]:
    """Evaluate the model's choice under each decision bias, all from the same samples.

    Args:
        scores, lengths, prob_think, prob_no_think, picked, margin: as `per_prompt_table` takes them.
        biases: see `biased_choice`; −inf and inf are allowed.

    Returns:
        One entry per bias: `bias`, hybrid accuracy (overall, in the `STRATA` and balanced), and `thinking_ratio`,
        `accuracy` and `mean_tokens` of the greedy choice (`auto`) and of the sampled one (`sampled`).
    """
    curve = []
    for bias in map(float, biases):
        choice = biased_choice(prob_think, prob_no_think, picked, bias)
        table = per_prompt_table(scores, lengths, *choice, margin)
        shown = [f"{metric}/{policy}" for metric in ("accuracy", "mean_tokens") for policy in ("auto", "sampled")]
        columns = {
            **{name: table[name] for name in ("hybrid_accuracy", *STRATA)},
            "thinking_ratio/auto": (choice[2] == THINK).astype(np.float64),
            "thinking_ratio/sampled": table["thinking_ratio"],
            **{name: table[name] for name in shown},
        }
        curve.append({"bias": bias, **_nest(column_means(columns))})
    return curve


def accuracy_at_budget(
    scores: Array,
    lengths: Array,
    prob_think: Array,
    prob_no_think: Array,
    picked: NDArray[np.int64],
    token_budget: float,
    limit: int = 1000,
) -> float:
    """Best accuracy of the model's greedy choice under any decision bias whose mean tokens keep to a budget.

    Args:
        scores, lengths, prob_think, prob_no_think, picked: as `per_prompt_table` takes them.
        token_budget: most mean tokens per response.
        limit: of biases (`sweep_biases`).

    Returns:
        NaN where no bias keeps to the budget, and where nothing has a score.
    """
    own = prob_think, prob_no_think, picked
    curve = decision_bias_curve(scores, lengths, *own, sweep_biases(*own, limit))
    within = [point["accuracy"]["auto"] for point in curve if point["mean_tokens"]["auto"] <= token_budget]
    return max((accuracy for accuracy in within if not np.isnan(accuracy)), default=np.nan)


def evaluation_metrics(
    scores: Array,
    lengths: Array,
    prob_think: Array,
    prob_no_think: Array,
    picked: NDArray[np.int64],
    margin: float = 0.0,
    token_budget: float | None = None,
) -> dict[str, float]:
    """Metrics of an evaluation inside training: `column_means` of `per_prompt_table`.

    With a token budget also `accuracy_at_budget`.
    """
    table = per_prompt_table(scores, lengths, prob_think, prob_no_think, picked, margin)
    found = column_means(table)
    if token_budget is not None:
        found["accuracy_at_budget"] = accuracy_at_budget(
            scores, lengths, prob_think, prob_no_think, picked, token_budget
        )
    return found


GREATER_IS_BETTER = {  # of `evaluation_metrics`, by the part of the name before the slash; None: neither end is better
    "hybrid_accuracy": True,
    "hybrid_accuracy_where": True,
    "balanced_hybrid_accuracy": True,
    "unsolved": False,
    "accuracy": True,
    "accuracy_at_budget": True,
    "mean_tokens": False,
    "off_mode_mass": False,
    "thinking_ratio": None,
}


def column_means(table: PromptTable) -> dict[str, float]:
    """Mean of every column over the prompts, and the means of these that are in `BALANCED`; NaN where one has no value.

    A balanced metric needs all its columns to have a value; it is left out where the table lacks one of them.
    """
    means = _with_balanced({name: valid_mean(column) for name, column in table.items()})
    return {name: float(mean) for name, mean in means.items()}


def _with_balanced(means: dict[str, Any]) -> dict[str, Any]:
    """Add the metrics of `BALANCED` to the columns' means, of all prompts or of each resample."""
    balanced = {
        name: sum(means[of] for of in columns) / len(columns)
        for name, columns in BALANCED.items()
        if means.keys() >= {*columns}
    }
    return means | balanced


def resampled_means(table: PromptTable, resamples: int = 2000, seed: int = 0) -> dict[str, Array]:
    """`column_means` of prompts resampled with replacement, the same prompts for all columns.

    Resamples are drawn in blocks, so that memory grows with the number of prompts alone.

    Returns:
        `[resamples]` each; NaN for a resample without a value.
    """
    num_prompts = len(next(iter(table.values())))
    rng = np.random.default_rng(seed)
    values = np.stack(list(table.values()), axis=1)  # [K, C]
    valid = ~np.isnan(values)
    scores, weights = np.where(valid, values, 0.0), valid.astype(np.float64)
    share = np.full(num_prompts, 1 / num_prompts)
    block = max(1, BLOCK // num_prompts)
    parts = []
    for start in range(0, resamples, block):
        counts = rng.multinomial(num_prompts, share, size=min(block, resamples - start))  # [R, K]
        total, weight = counts @ scores, counts @ weights
        parts.append(np.where(weight > 0, total / np.maximum(weight, 1), np.nan))
    return _with_balanced(dict(zip(table, np.concatenate(parts).T, strict=True)))


def percentile_interval(means: Array) -> tuple[float, float]:
    """95 % percentile interval of resampled means, of those that have a value; NaN where none has."""
    means = means[~np.isnan(means)]
    low, high = np.quantile(means, [0.025, 0.975]) if len(means) else (np.nan, np.nan)
    return float(low), float(high)


def bootstrap_intervals(table: PromptTable, resamples: int = 2000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of `column_means` by `resampled_means`."""
    return {name: percentile_interval(means) for name, means in resampled_means(table, resamples, seed).items()}


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


def summarize(table: PromptTable, seed: int = 0) -> dict[str, Any]:
    """`column_means` and their 95 % intervals, nested as in report.json: means at the top, `intervals` beside them."""
    return {
        "num_prompts": len(next(iter(table.values()))),
        **_nest(column_means(table)),
        "intervals": _nest(bootstrap_intervals(table, seed=seed)),
    }


def group_labels(name: str, values: Iterable[Any]) -> list[Label | None]:
    """Convert a column, perhaps of mixed types, to the labels by which prompts are grouped.

    Text of a whole number becomes that number and a whole float an int, so that "2", 2 and 2.0 are one group. Other
    text is stripped. None, NaN and blank text give no label.

    Args:
        name: of the column, for the message.

    Raises:
        UserError: a value is neither a finite number nor text; names the column and the value.
    """
    return [_label(name, value) for value in values]


def _label(name: str, value: Any) -> Label | None:
    match value:
        case None:
            return None
        case str():
            text = value.strip()
            return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else text or None
        case Integral() if not isinstance(value, bool):
            return int(value)
        case Real() if not isinstance(value, bool):
            number = float(value)
            if math.isnan(number):
                return None
            if math.isfinite(number):
                return int(number) if number.is_integer() else number
    raise UserError(
        f"{name}: {value!r} is {type(value).__name__}; to group by it, the column must hold finite numbers or text. "
        "Rename or remove the column, or make numbers or text of its values."
    )


def summarize_by(table: PromptTable, labels: Sequence[Any], name: str, seed: int = 0) -> list[dict[str, Any]]:
    """`summarize` for each distinct label of `group_labels`, numbers before text: [{name: label, ...}, ...]."""
    labels = group_labels(name, labels)
    distinct = sorted(set(labels) - {None}, key=lambda label: (isinstance(label, str), label))
    groups = []
    for label in distinct:
        rows = np.array([other == label for other in labels])
        groups.append({name: label, **summarize({key: column[rows] for key, column in table.items()}, seed=seed)})
    return groups
