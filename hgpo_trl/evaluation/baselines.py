"""Training data of the two baselines of HGPO, HFT-RFT and HFT-DPO, from samples of both modes.

Both start from the HFT model and from the same scored samples (Eq. 14 to 16: N/2 in each mode for every query):
`hgpo-trl evaluate` on the queries of Stage II writes them to `samples.parquet`. Equation numbers are those of
arXiv 2505.14631, appendix A.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from datasets import Dataset
from numpy.typing import NDArray

from hgpo_trl.evaluation.samples import PROMPT_ID
from hgpo_trl.modes import Mode

COLUMNS = (PROMPT_ID, "mode", "sample", "completion", "truncated", "faults", "reward")  # needed of the samples


def fit_to_imitate(samples: pd.DataFrame, has_answer: Sequence[bool]) -> NDArray[np.bool_]:
    """Select the samples to train on: complete, in their mode's format and, where a rule scores them, not wrong.

    Args:
        samples: with `COLUMNS`.
        has_answer: of each query, by `prompt_id`: whether a rule scores it; then a reward of 0 is a wrong answer. The
            scores of a reward model have no such point.

    Returns:
        One entry per row.
    """
    whole = (samples["faults"].str.len() == 0) & ~samples["truncated"].astype(bool)
    by_rule = np.array(has_answer, dtype=bool)[samples[PROMPT_ID]]
    return (whole & samples["reward"].notna() & (~by_rule | (samples["reward"] > 0))).to_numpy()


def best_responses(
    samples: pd.DataFrame, has_answer: Sequence[bool], margin: float = 0.0, seed: int = 0
) -> pd.DataFrame:
    """HFT-RFT's data: the single best response to each query, over both modes (Eq. 20, 21).

    Args:
        samples, has_answer: see `fit_to_imitate`. A query without a fit response is left out.
        margin: δ, added to the reward of a no-think response, as in Eq. 8; 0 is the paper's baseline.
        seed: of the random choice between equals.

    Returns:
        `prompt_id` and `completion`.
    """
    fit = samples[fit_to_imitate(samples, has_answer)]
    worth = fit["reward"] + margin * (fit["mode"] == Mode.NO_THINK)
    best = _ranked(fit.assign(worth=worth), "worth", seed, highest=True)
    return best[[PROMPT_ID, "completion"]].reset_index(drop=True)


def preference_pairs(
    samples: pd.DataFrame, has_answer: Sequence[bool], margin: float = 0.0, seed: int = 0
) -> pd.DataFrame:
    """HFT-DPO's data: the best response of the mode with the higher mean over the worst of the other (Eq. 17 to 19).

    Args:
        samples, has_answer: see `fit_to_imitate`. A query is left out if its winner is not fit, or if one of its modes
            has no sample with a reward.
        margin: δ, added to the mean of no-think; a tie then goes to no-think, as in Eq. 8. 0 is the paper's baseline.
        seed: of the random choice between equals: within a mode and, without a margin, between the modes.

    Returns:
        `prompt_id`, `chosen`, `rejected`.
    """
    scored = samples.assign(fit=fit_to_imitate(samples, has_answer))[samples["reward"].notna()]
    means = scored.groupby([PROMPT_ID, "mode"])["reward"].mean().unstack("mode")
    means = means.reindex(columns=[Mode.THINK.value, Mode.NO_THINK.value]).dropna()
    gain = (means[Mode.THINK.value] - means[Mode.NO_THINK.value] - margin).round(_DECIMALS)
    tie_break = np.random.default_rng(seed).choice([-1.0, 1.0], size=len(gain)) if margin == 0 else -1.0
    think_wins = gain.where(gain != 0, tie_break) > 0
    winner = pd.Series(np.where(think_wins, Mode.THINK.value, Mode.NO_THINK.value), means.index)

    compared = scored[scored[PROMPT_ID].isin(winner.index)]
    won = (compared["mode"] == compared[PROMPT_ID].map(winner)).to_numpy()
    best = _ranked(compared[won & compared["fit"]], "reward", seed, highest=True)
    worst = _ranked(compared[~won], "reward", seed, highest=False)
    pairs = best[[PROMPT_ID, "completion"]].merge(worst[[PROMPT_ID, "completion"]], on=PROMPT_ID)
    return pairs.rename(columns={"completion_x": "chosen", "completion_y": "rejected"})


_DECIMALS = 9  # values that differ by rounding alone are equal


def _ranked(rows: pd.DataFrame, by: str, seed: int, *, highest: bool) -> pd.DataFrame:
    """Of each query the row with the highest or lowest value, a random one of equals; sorted by query."""
    shuffled = rows.sample(frac=1.0, random_state=seed).assign(**{by: lambda table: table[by].round(_DECIMALS)})
    return shuffled.sort_values([PROMPT_ID, by], ascending=[True, not highest], kind="stable").drop_duplicates(
        PROMPT_ID
    )


def as_dataset(rows: pd.DataFrame, queries: Dataset) -> Dataset:
    """Convert the rows of `best_responses` or `preference_pairs` to a data set for TRL's trainers.

    Args:
        queries: the data set that was sampled; its `prompt` is text or a conversation, and so is the result's.

    Returns:
        `prompt`, and `completion` or `chosen` and `rejected`.
    """
    chosen_queries = queries.select(rows[PROMPT_ID].tolist()).select_columns("prompt")
    conversational = len(rows) > 0 and not isinstance(chosen_queries[0]["prompt"], str)
    for name in rows.columns.drop(PROMPT_ID):
        texts = rows[name].tolist()
        responses = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
        chosen_queries = chosen_queries.add_column(name, responses)
    return chosen_queries
