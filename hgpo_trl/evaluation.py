"""Evaluate a hybrid model: sample every prompt in both modes, score the samples, report what its own choice is worth.

The mode that the model would pick is read from the logits at the end of the prompt, so no third set of samples is
needed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import BatchEncoding, GenerationConfig, PreTrainedTokenizerBase

from hgpo_trl.decision import Decision, read_decision
from hgpo_trl.hybrid_accuracy import per_prompt_table, summarize, summarize_by
from hgpo_trl.modes import MODES, mode_tokens, split_response

PROMPT_ID = "prompt_id"


def _render(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of each prompt up to the point where the model decides."""
    encoded: Any  # the tokenizer's return type depends on its arguments' values
    if isinstance(prompts[0], str):
        encoded = tokenizer(list(prompts))
    else:
        encoded = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    return encoded["input_ids"]


def _batches(ids: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of like prompt length, so that little is padding."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


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
) -> pd.DataFrame:
    """Sample `samples_per_mode` responses in each mode for every prompt, and read the model's own decision.

    Args:
        model: causal language model that can `generate`.
        prompts: all plain text or all conversations.
        max_new_tokens: per response, the decision token included.
        temperature, top_p: of the sampling (paper: 0.6 and 0.95). The decision's probabilities are those at
            temperature 1.
        batch_size: responses generated at a time.

    Returns:
        One row per response: `prompt_id`, `mode`, `sample`, `completion` (text, tags included), `num_tokens`,
        `truncated`, `faults`, and the prompt's `prob_think`, `prob_no_think`, `picked` (0 = think, 1 = no_think,
        -1 = neither).
    """
    tokens = mode_tokens(tokenizer)
    device = model.device
    eos = model.generation_config.eos_token_id
    eos_ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens - 1,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_p=top_p if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(eos_ids),
    )
    ids = _render(tokenizer, prompts)
    model.eval()
    torch.manual_seed(seed)

    def padded(rows: list[list[int]]) -> BatchEncoding:
        return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(device)

    decisions: dict[int, tuple[float, float, int]] = {}
    for rows in _batches(ids, batch_size):
        inputs = padded([ids[row] for row in rows])
        decision: Decision = read_decision(model, inputs["input_ids"], inputs["attention_mask"], tokens)
        for row, *values in zip(
            rows, decision.think.tolist(), decision.no_think.tolist(), decision.picked.tolist(), strict=True
        ):
            decisions[row] = tuple(values)

    records = []
    progress = tqdm(total=len(ids) * len(MODES) * samples_per_mode, desc="sampling", unit="response")
    for mode, forced in zip(MODES, tokens.decision, strict=True):
        for rows in _batches(ids, max(1, batch_size // samples_per_mode)):
            inputs = padded([[*ids[row], forced] for row in rows for _ in range(samples_per_mode)])
            with torch.inference_mode():
                sequences = model.generate(**inputs, generation_config=generation_config)
            for index, sequence in enumerate(sequences[:, inputs["input_ids"].shape[1] :].tolist()):
                row = rows[index // samples_per_mode]
                end = next((i for i, token in enumerate(sequence) if token in eos_ids), None)
                response = [forced, *(sequence if end is None else sequence[: end + 1])]
                text = str(tokenizer.decode(response, skip_special_tokens=True))
                prob_think, prob_no_think, picked = decisions[row]
                records.append(
                    {
                        PROMPT_ID: row,
                        "mode": mode.value,
                        "sample": index % samples_per_mode,
                        "completion": text,
                        "num_tokens": len(response),
                        "truncated": end is None,
                        "faults": [fault.value for fault in split_response(text).faults],
                        "prob_think": prob_think,
                        "prob_no_think": prob_no_think,
                        "picked": picked,
                    }
                )
            progress.update(len(rows) * samples_per_mode)
    progress.close()
    return pd.DataFrame.from_records(records).sort_values([PROMPT_ID, "mode", "sample"], ignore_index=True)


def score_samples(samples: pd.DataFrame, dataset: Dataset, reward_funcs: Sequence[Callable]) -> pd.DataFrame:
    """Add the column `reward` to the samples: the sum of the reward functions, NaN where none gives a score.

    Args:
        samples: of `sample_both_modes`.
        dataset: the rows that the prompts came from; their columns go to the reward functions as in training.

    Raises:
        ValueError: a reward function returns the wrong number of rewards.
    """
    rows = samples[PROMPT_ID].tolist()
    columns = {name: list(dataset[name]) for name in dataset.column_names}  # a Column is decoded at every look
    columns = {name: [column[row] for row in rows] for name, column in columns.items()}
    prompts = columns.pop("prompt")
    completions = samples["completion"].tolist()
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    totals = np.full((len(reward_funcs), len(samples)), np.nan)
    for index, reward_func in enumerate(reward_funcs):
        rewards = reward_func(prompts=prompts, completions=completions, **columns)
        if len(rewards) != len(samples):
            name = getattr(reward_func, "__name__", repr(reward_func))
            raise ValueError(
                f"The reward function {name!r} returned {len(rewards)} rewards for {len(samples)} completions."
            )
        totals[index] = [np.nan if reward is None else reward for reward in rewards]
    scored = ~np.isnan(totals).all(axis=0)
    return samples.assign(reward=np.where(scored, np.nansum(totals, axis=0), np.nan))


def report_on(samples: pd.DataFrame, margin: float = 0.0, levels: Sequence[Any] | None = None) -> dict[str, Any]:
    """The evaluation's figures from its scored samples alone.

    Args:
        samples: with `reward`; every prompt has the same number of samples in each mode.
        margin: of Eq. 13: mode means closer than this count as equal.
        levels: difficulty of each prompt, by `prompt_id`; None where the data set has none.

    Returns:
        What `report.json` holds: see docs/evaluation.md.
    """
    samples = samples.assign(mode=pd.Categorical(samples["mode"], [mode.value for mode in MODES], ordered=True))
    samples = samples.sort_values([PROMPT_ID, "mode", "sample"])
    prompts = samples.drop_duplicates(PROMPT_ID)
    shape = (len(prompts), len(MODES), -1)
    table = per_prompt_table(
        samples["reward"].to_numpy(dtype=np.float64).reshape(shape),
        samples["num_tokens"].to_numpy(dtype=np.float64).reshape(shape),
        prompts["prob_think"].to_numpy(),
        prompts["prob_no_think"].to_numpy(),
        prompts["picked"].to_numpy(),
        margin,
    )
    by_mode = samples.groupby("mode", observed=True)
    return {
        **summarize(table),
        "samples_per_mode": len(samples) // (len(prompts) * len(MODES)),
        "margin": margin,
        "format_faults": by_mode["faults"].agg(lambda faults: float((faults.str.len() > 0).mean())).to_dict(),
        "truncated": by_mode["truncated"].mean().to_dict(),
        "by_level": [] if levels is None else summarize_by(table, [levels[i] for i in prompts[PROMPT_ID]], "level"),
    }
