"""Rewards of sampled responses, by the reward functions of the training."""

import asyncio
import inspect
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from hgpo_trl.evaluation.samples import PROMPT_ID
from hgpo_trl.modes import LHRM, ModeFormat
from hgpo_trl.rewards.functions import (
    answer_parts,
    check_finite,
    check_weights,
    checked,
    floor_faults,
    split_completions,
    weighted_sum,
)


def score_samples(
    samples: pd.DataFrame,
    dataset: Dataset,
    reward_funcs: Sequence[Callable],
    reward_weights: Sequence[float] | None = None,
    mode_format: ModeFormat = LHRM,
) -> pd.DataFrame:
    """Add the column `reward` to the samples: the weighted sum of the reward functions, NaN where none gives a score.

    Args:
        samples: of `sample_both_modes`.
        dataset: the rows with the prompts. Reward functions get their columns as in training, the response's parts as
            `response`, and its answer part as the completion.
        reward_weights: one per reward function, as in training; None is 1 each.
        mode_format: of the model that gave the samples.

    Raises:
        UserError: a reward function does not return one finite number or None per sample, or the weights do not fit
            (`check_weights`).
    """
    check_weights(reward_weights, len(reward_funcs))
    present, places = np.unique(samples[PROMPT_ID], return_inverse=True)
    rows, asked = places.tolist(), dataset.select(present)
    columns = {name: list(asked[name]) for name in dataset.column_names}  # a Column is decoded at every access
    columns = {name: [column[row] for row in rows] for name, column in columns.items()}
    prompts = columns.pop("prompt")
    completions = samples["completion"].tolist()
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    responses = split_completions(completions, mode_format)
    answers = answer_parts(completions, responses)
    functions = [checked(reward_func) for reward_func in reward_funcs]
    rewards = []
    for function in functions:
        scores = function(prompts=prompts, completions=answers, response=responses, **columns)
        rewards.append(asyncio.run(scores) if inspect.iscoroutine(scores) else scores)
    by_function = torch.tensor(rewards, dtype=torch.float64).T
    check_finite(by_function, [function.__name__ for function in functions])
    faulty = torch.tensor([not response.well_formed for response in responses])
    weights = torch.tensor(reward_weights or [1.0] * len(reward_funcs), dtype=torch.float64)
    floored = floor_faults(by_function, faulty, torch.tensor(rows), weights)
    return samples.assign(reward=weighted_sum(floored, weights).numpy())
