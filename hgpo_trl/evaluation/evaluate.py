"""Evaluate a hybrid model: sample every prompt in both modes, score the samples, report what its own choice is worth.

The mode that the model would pick is read from the logits at the end of the prompt, so no third set of samples is
needed.
"""

import asyncio
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from numpy.typing import NDArray
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hgpo_trl.common.errors import UserError
from hgpo_trl.inference.generate import batches, complete, end_tokens, padded, render, sampling_config, until_end
from hgpo_trl.modes import MODES, Fault, ModeTokens, mode_tokens, split_response
from hgpo_trl.modes.decision import read_decision
from hgpo_trl.modes.hybrid_accuracy import (
    Table,
    biased_choice,
    decision_bias_curve,
    per_prompt_table,
    summarize,
    summarize_by,
    sweep_biases,
)
from hgpo_trl.rewards.functions import (
    answer_parts,
    check_finite,
    check_weights,
    checked,
    floor_faults,
    split_completions,
    weighted_sum,
)

PROMPT_ID = "prompt_id"


FirstToken = tuple[float, float, int]  # π(think | q), π(no_think | q), and the greedy pick as in `Decision.picked`


class Generated(NamedTuple):
    """One response as a backend generates it."""

    prompt: int  # number of the prompt
    mode: int  # position in MODES
    sample: int
    tokens: list[int]  # what follows the forced decision token; anything after an end token is padding


def samples_table(
    tokenizer: PreTrainedTokenizerBase,
    decisions: Sequence[FirstToken],
    responses: Iterable[Generated],
    ends: Sequence[int],
) -> pd.DataFrame:
    """What `sample_both_modes` returns, from what a backend has read and generated.

    Args:
        decisions: one per prompt.
        responses: in any order.
        ends: of `end_tokens`; a response without one is truncated.
    """
    forced = mode_tokens(tokenizer).decision
    records = []
    for prompt, mode, sample, generated in responses:
        generated, truncated = until_end(generated, ends)
        response = [forced[mode], *generated]
        text = str(tokenizer.decode(response, skip_special_tokens=True))
        prob_think, prob_no_think, picked = decisions[prompt]
        records.append(
            {
                PROMPT_ID: prompt,
                "mode": MODES[mode].value,
                "sample": sample,
                "completion": text,
                "num_tokens": len(response),
                "truncated": truncated,
                "faults": [fault.value for fault in split_response(text).faults],
                "prob_think": prob_think,
                "prob_no_think": prob_no_think,
                "picked": picked,
            }
        )
    return pd.DataFrame.from_records(records).sort_values([PROMPT_ID, "mode", "sample"], ignore_index=True)


# --- Transformers ---------------------------------------------------------------------------------------------


def sample_both_modes(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    samples_per_mode: int,
    max_new_tokens: int,
    temperature: float = 0.6,
    top_p: float = 0.95,
    batch_size: int = 64,
    seed: int = 0,
    progress: tqdm | None = None,
) -> pd.DataFrame:
    """Sample `samples_per_mode` responses in each mode for every prompt, and read the model's own decision.

    Args:
        model: causal language model that can `generate`. `hgpo_trl.evaluation.vllm_backend` does the same with vLLM.
        prompts: all plain text or all conversations.
        max_new_tokens: per response, the decision token included.
        temperature, top_p: of the sampling (paper: 0.6 and 0.95). The decision's probabilities are those at
            temperature 1.
        batch_size: responses generated at a time.
        progress: a bar that counts responses, where these are part of more; else they have one of their own.

    Returns:
        One row per response: `prompt_id`, `mode`, `sample`, `completion` (text, tags included), `num_tokens`,
        `truncated`, `faults`, and the prompt's `prob_think`, `prob_no_think`, `picked` (0 = think, 1 = no_think,
        -1 = neither).
    """
    tokens = mode_tokens(tokenizer)
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
    generation_config = sampling_config(tokenizer, ends, max_new_tokens - 1, temperature, top_p)
    ids = render(tokenizer, prompts)
    model.eval()
    torch.manual_seed(seed)
    decisions = _read_decisions(model, tokenizer, ids, tokens, batch_size)
    total = len(ids) * len(MODES) * samples_per_mode
    with tqdm(total=total, desc="sampling", unit="response") if progress is None else nullcontext(progress) as bar:
        responses = _generate(model, tokenizer, ids, tokens, generation_config, samples_per_mode, batch_size, bar)
        return samples_table(tokenizer, decisions, responses, ends)


def _read_decisions(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], tokens: ModeTokens, batch_size: int
) -> list[FirstToken]:
    found: dict[int, FirstToken] = {}
    for rows in batches(ids, batch_size):
        inputs = padded(model, tokenizer, [ids[row] for row in rows])
        decision = read_decision(model, inputs["input_ids"], inputs["attention_mask"], tokens)
        values = zip(decision.think.tolist(), decision.no_think.tolist(), decision.picked.tolist(), strict=True)
        found |= dict(zip(rows, values, strict=True))
    return [found[row] for row in range(len(ids))]


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    tokens: ModeTokens,
    generation_config: GenerationConfig,
    samples_per_mode: int,
    batch_size: int,
    progress: tqdm,
) -> Iterator[Generated]:
    """The modes one after the other: no short response waits in a batch for a long one of the other mode."""
    rows_at_a_time = prompts_at_a_time(batch_size, samples_per_mode) * samples_per_mode
    for mode, forced in enumerate(tokens.decision):
        rows = [[*row, forced] for row in ids for _ in range(samples_per_mode)]
        for place, rest in complete(model, tokenizer, rows, generation_config, rows_at_a_time, progress):
            yield Generated(place // samples_per_mode, mode, place % samples_per_mode, rest)


def prompts_at_a_time(batch_size: int, samples_per_mode: int) -> int:
    """Prompts whose responses in one mode make a batch: whole ones, and one at least."""
    return max(1, batch_size // samples_per_mode)


# --- scores and figures ---------------------------------------------------------------------------------------


def score_samples(
    samples: pd.DataFrame,
    dataset: Dataset,
    reward_funcs: Sequence[Callable],
    reward_weights: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Add the column `reward` to the samples: the weighted sum of the reward functions, NaN where none gives a score.

    Args:
        samples: of `sample_both_modes`.
        dataset: the rows that the prompts came from; their columns go to the reward functions as in training, with the
            response's parts as one more, `response`, and its answer part as the completion.
        reward_weights: one per reward function, as in training; None is 1 each.

    Raises:
        UserError: a reward function returns something else than one finite number or None per sample, or the weights
            do not fit (`check_weights`).
    """
    check_weights(reward_weights, len(reward_funcs))
    rows = samples[PROMPT_ID].tolist()
    columns = {name: list(dataset[name]) for name in dataset.column_names}  # a Column is decoded at every look
    columns = {name: [column[row] for row in rows] for name, column in columns.items()}
    prompts = columns.pop("prompt")
    completions = samples["completion"].tolist()
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    responses = split_completions(completions)
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


GROUPS = ("level", "subject", "domain")  # columns of a data set by which figures are given, too
SWEEP = "sweep"  # in place of a decision bias: as many as make a difference


class _Arrays(NamedTuple):
    """What `per_prompt_table` takes: `[K, 2, n]` twice, and `[K]` three times, in the order of `prompt_id`."""

    scores: NDArray[np.float64]
    lengths: NDArray[np.float64]
    prob_think: NDArray[np.float64]
    prob_no_think: NDArray[np.float64]
    picked: NDArray[np.int64]


def _by_prompt(samples: pd.DataFrame) -> tuple[pd.DataFrame, _Arrays]:
    """The samples in order, and as arrays.

    Raises:
        UserError: there are none, or not as many of every prompt in each mode.
    """
    samples = samples.assign(mode=pd.Categorical(samples["mode"], [mode.value for mode in MODES], ordered=True))
    samples = samples.sort_values([PROMPT_ID, "mode", "sample"])
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
    return samples, _Arrays(scores, lengths, *own)


def _biased_table(arrays: _Arrays, margin: float, decision_bias: float) -> Table:
    choice = biased_choice(arrays.prob_think, arrays.prob_no_think, arrays.picked, decision_bias)
    return per_prompt_table(arrays.scores, arrays.lengths, *choice, margin)


def prompt_table(samples: pd.DataFrame, margin: float = 0.0, decision_bias: float = 0.0) -> Table:
    """The figures of each prompt, of which those of `report_on` are the means.

    Args:
        samples: with `reward`; every prompt has the same number of samples in each mode, in any order.
        margin, decision_bias: as in `report_on`.

    Returns:
        Columns as of `hgpo_trl.modes.hybrid_accuracy.per_prompt_table`, each `[K]`, in the order of `prompt_id`.
    """
    return _biased_table(_by_prompt(samples)[1], margin, decision_bias)


def report_on(
    samples: pd.DataFrame,
    margin: float = 0.0,
    levels: Sequence[Any] | None = None,
    decision_bias: float | str = 0.0,
    *,
    subjects: Sequence[Any] | None = None,
    domains: Sequence[Any] | None = None,
    price_per_million_tokens: float | None = None,
) -> dict[str, Any]:
    """The evaluation's figures from its scored samples alone.

    Args:
        samples: with `reward`; every prompt has the same number of samples in each mode.
        margin: of Eq. 13: mode means closer than this count as equal.
        levels, subjects, domains: difficulty, subject and domain of each prompt, by `prompt_id`; None where the data
            set has none.
        decision_bias: added to the log-odds of thinking before the model's own choice is looked at; or SWEEP, which
            leaves the choice as it is and adds what it would be worth under every bias.
        price_per_million_tokens: of generated tokens, in any currency; adds what 1,000 queries cost.

    Returns:
        What `report.json` holds: see docs/evaluation.md.

    Raises:
        UserError: a level, subject or domain is neither a number nor text, or samples are missing.
    """
    samples, arrays = _by_prompt(samples)
    curve = {}
    if decision_bias == SWEEP:
        decision_bias = 0.0
        curve = {"decision_bias_curve": decision_bias_curve(*arrays, sweep_biases(*arrays[2:]), margin)}
    table = _biased_table(arrays, margin, float(decision_bias))
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
