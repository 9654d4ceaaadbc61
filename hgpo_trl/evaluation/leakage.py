"""Signs of leakage (`hgpo_trl.modes.leakage`) in the samples of an evaluation."""

import numpy as np
import pandas as pd

from hgpo_trl.evaluation.samples import PROMPT_ID
from hgpo_trl.modes import LHRM, Mode, ModeFormat, split_response
from hgpo_trl.modes.hybrid_accuracy import PromptTable
from hgpo_trl.modes.leakage import count_reflection_words


def leakage_table(samples: pd.DataFrame, mode_format: ModeFormat = LHRM) -> PromptTable:
    """Signs of leakage by prompt.

    Args:
        samples: with `mode` and `completion`.
        mode_format: of the model that gave them.

    Returns:
        Columns, each `[K]` in the order of `prompt_id`, means over a prompt's responses:
        `reflection_words/*`: reflection words in no-think answers (`no_think`), in the answer parts of think responses
        (`think_answer`: what an answer without leakage has) and in their reasoning (`reasoning`: whether the list
        recognises how this model thinks).
        `answer_length/*`: characters of no-think answers and of the answer parts of think responses.
        `answer_length_ratio`: the first of these lengths over the second, the measure of the cap of arXiv 2601.04805.
        A think response without an answer part counts only in `reasoning`. NaN where a prompt has none that counts.
    """
    responses = [split_response(text, mode_format) for text in samples["completion"]]
    thinks = (samples["mode"] == Mode.THINK).to_numpy()
    answers, reasoning = [r.answer for r in responses], [r.reasoning for r in responses]
    words = np.array([count_reflection_words(text) for text in answers], dtype=np.float64)
    lengths = np.array([len(text) for text in answers], dtype=np.float64)
    answered = thinks & (lengths > 0)
    columns = {
        "reflection_words/no_think": np.where(thinks, np.nan, words),
        "reflection_words/think_answer": np.where(answered, words, np.nan),
        "reflection_words/reasoning": np.where(
            thinks, np.array([count_reflection_words(text) for text in reasoning]), np.nan
        ),
        "answer_length/no_think": np.where(thinks, np.nan, lengths),
        "answer_length/think_answer": np.where(answered, lengths, np.nan),
    }
    means = pd.DataFrame(columns, index=samples[PROMPT_ID].to_numpy()).groupby(level=0).mean()
    table = {name: means[name].to_numpy(dtype=np.float64) for name in columns}
    return table | {"answer_length_ratio": table["answer_length/no_think"] / table["answer_length/think_answer"]}
