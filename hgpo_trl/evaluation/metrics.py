"""The metrics of an evaluation, from its scored samples alone.

The mode that the model would pick is read from the logits at the end of the prompt, so samples of both modes tell the
worth of its own choice, of either mode and of an oracle's choice.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hgpo_trl.common.errors import UserError
from hgpo_trl.evaluation.leakage import leakage_table
from hgpo_trl.evaluation.samples import PROMPT_ID, sorted_by_mode
from hgpo_trl.modes import LHRM, MODES, Fault, ModeFormat
from hgpo_trl.modes.hybrid_accuracy import (
    PromptTable,
    biased_choice,
    decision_bias_curve,
    per_prompt_table,
    summarize,
    summarize_by,
    sweep_biases,
)

GROUPS = ("level", "subject", "domain")  # columns of a data set by which prompts are grouped
SWEEP = "sweep"  # in place of a decision bias: every bias that makes a difference


class SampleArrays(NamedTuple):
    """Arguments of `per_prompt_table`: `[K, 2, n]` twice, and `[K]` three times, in the order of `prompt_id`."""

    scores: NDArray[np.float64]
    lengths: NDArray[np.float64]
    prob_think: NDArray[np.float64]
    prob_no_think: NDArray[np.float64]
    picked: NDArray[np.int64]


def by_prompt(samples: pd.DataFrame) -> tuple[pd.DataFrame, SampleArrays]:
    """The samples in order, and as arrays.

    Raises:
        UserError: there are none, or prompts differ in their number of samples in a mode.
    """
    samples = sorted_by_mode(samples)
    prompts = samples.drop_duplicates(PROMPT_ID)
    counts = samples.groupby([PROMPT_ID, "mode"], observed=False).size()
    if counts.nunique() != 1:
        places: list[Any] = [counts.idxmin(), counts.idxmax()] if len(counts) else []
        found = ", ".join(f"prompt {prompt} has {counts[prompt, mode]} in mode {mode}" for prompt, mode in places)
        raise UserError(
            f"samples: every prompt needs as many samples as the others in each mode; {found or 'there are none'}. "
            "Keep all rows of samples.parquet: a sample without a score has the reward NaN."
        )
    shape = (len(prompts), len(MODES), -1)
    scores, lengths = (samples[name].to_numpy(dtype=np.float64).reshape(shape) for name in ("reward", "num_tokens"))
    own = (prompts[name].to_numpy() for name in ("prob_think", "prob_no_think", "picked"))
    return samples, SampleArrays(scores, lengths, *own)


def _biased_table(arrays: SampleArrays, margin: float, decision_bias: float) -> PromptTable:
    choice = biased_choice(arrays.prob_think, arrays.prob_no_think, arrays.picked, decision_bias)
    return per_prompt_table(arrays.scores, arrays.lengths, *choice, margin)


def prompt_table(
    samples: pd.DataFrame, margin: float = 0.0, decision_bias: float = 0.0, mode_format: ModeFormat = LHRM
) -> PromptTable:
    """The metrics of each prompt; those of `report_on` are their means.

    Args:
        samples: with `reward`; every prompt has the same number of samples in each mode, in any order.
        margin, decision_bias, mode_format: as in `report_on`.

    Returns:
        Columns as of `hgpo_trl.modes.hybrid_accuracy.per_prompt_table` and `leakage_table`, each `[K]`, in the order of
        `prompt_id`.
    """
    samples, arrays = by_prompt(samples)
    return _biased_table(arrays, margin, decision_bias) | leakage_table(samples, mode_format)


def report_on(
    samples: pd.DataFrame,
    margin: float = 0.0,
    levels: Sequence[Any] | None = None,
    decision_bias: float | str = 0.0,
    *,
    subjects: Sequence[Any] | None = None,
    domains: Sequence[Any] | None = None,
    price_per_million_tokens: float | None = None,
    mode_format: ModeFormat = LHRM,
    leakage: PromptTable | None = None,
) -> dict[str, Any]:
    """Compute the evaluation's metrics from its scored samples alone.

    Args:
        samples: with `reward`; every prompt has the same number of samples in each mode.
        margin: of Eq. 13: mode means closer than this count as equal.
        levels, subjects, domains: difficulty, subject and domain of each prompt, by `prompt_id`; None where the data
            set has none.
        decision_bias: added to the log-odds of thinking before the model's own choice is read; or SWEEP, which leaves
            the choice as it is and adds its metrics under every bias.
        price_per_million_tokens: of generated tokens, in any currency; adds the cost of 1,000 queries.
        mode_format: of the model that gave the samples.
        leakage: `leakage_table` of the samples, which then need no `completion`.

    Returns:
        The content of `report.json`: see docs/evaluation.md.

    Raises:
        UserError: a level, subject or domain is neither a number nor text, or samples are missing.
    """
    samples, arrays = by_prompt(samples)
    curve = {}
    if decision_bias == SWEEP:
        decision_bias = 0.0
        curve = {"decision_bias_curve": decision_bias_curve(*arrays, sweep_biases(*arrays[2:]), margin)}
    leakage = leakage_table(samples, mode_format) if leakage is None else leakage
    table = _biased_table(arrays, margin, float(decision_bias)) | leakage
    by_mode = samples.groupby("mode", observed=True)
    summary = summarize(table)
    cost = {}
    if price_per_million_tokens is not None:
        per_1000_queries = price_per_million_tokens / 1000
        cost = {"cost": {name: tokens * per_1000_queries for name, tokens in summary["mean_tokens"].items()}}
    ids = samples[PROMPT_ID].unique().tolist()
    groups = {
        f"by_{name}": [] if labels is None else summarize_by(table, [labels[row] for row in ids], name)
        for name, labels in zip(GROUPS, (levels, subjects, domains), strict=True)
    }
    return {
        **summary,
        "samples_per_mode": arrays.scores.shape[2],
        "margin": margin,
        "decision_bias": float(decision_bias),
        **curve,
        "format_faults": by_mode["faults"].agg(lambda faults: float((faults.str.len() > 0).mean())).to_dict(),
        "faults": {
            str(mode): {kind.value: float(faults.map(lambda found, kind=kind: kind in found).mean()) for kind in Fault}
            for mode, faults in by_mode["faults"]
        },
        "truncated": by_mode["truncated"].mean().to_dict(),
        **cost,
        **groups,
    }
