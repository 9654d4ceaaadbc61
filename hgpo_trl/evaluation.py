"""Evaluate a hybrid model: sample every prompt in both modes, score the samples, report what its own choice is worth.

The mode that the model would pick is read from the logits at the end of the prompt, so no third set of samples is
needed.
"""

import asyncio
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import BatchEncoding, GenerationConfig, PreTrainedTokenizerBase

from hgpo_trl.decision import read_decision
from hgpo_trl.hybrid_accuracy import per_prompt_table, summarize, summarize_by
from hgpo_trl.modes import MODES, Fault, ModeTokens, mode_tokens, split_response
from hgpo_trl.rewards import answer_parts, checked, floor_faults, split_completions

PROMPT_ID = "prompt_id"


FirstToken = tuple[float, float, int]  # π(think | q), π(no_think | q), and the greedy pick as in `Decision.picked`


class Generated(NamedTuple):
    """One response as a backend generates it."""

    prompt: int  # number of the prompt
    mode: int  # position in MODES
    sample: int
    tokens: list[int]  # what follows the forced decision token; anything after an end token is padding


def render(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
    """Token ids of each prompt, text or conversation, up to the point where the model decides."""
    encoded: Any  # the tokenizer's return type depends on its arguments' values
    if isinstance(prompts[0], str):
        encoded = tokenizer(list(prompts))
    else:
        encoded = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    return encoded["input_ids"]


def end_tokens(tokenizer: PreTrainedTokenizerBase, eos: int | list[int] | None) -> list[int]:
    """Ids that end a response: the tokenizer's end token and those of the model's generation config."""
    return sorted({*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None})


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
        end = next((i for i, token in enumerate(generated) if token in ends), None)
        response = [forced[mode], *(generated if end is None else generated[: end + 1])]
        text = str(tokenizer.decode(response, skip_special_tokens=True))
        prob_think, prob_no_think, picked = decisions[prompt]
        records.append(
            {
                PROMPT_ID: prompt,
                "mode": MODES[mode].value,
                "sample": sample,
                "completion": text,
                "num_tokens": len(response),
                "truncated": end is None,
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
) -> pd.DataFrame:
    """Sample `samples_per_mode` responses in each mode for every prompt, and read the model's own decision.

    Args:
        model: causal language model that can `generate`. `hgpo_trl.vllm_sampling` does the same with vLLM.
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
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
    generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens - 1,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_p=top_p if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        repetition_penalty=1.0,  # what is left unset here comes from the model's own generation config
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
    )
    ids = render(tokenizer, prompts)
    model.eval()
    torch.manual_seed(seed)
    decisions = _read_decisions(model, tokenizer, ids, tokens, batch_size)
    responses = _generate(model, tokenizer, ids, tokens, generation_config, samples_per_mode, batch_size)
    return samples_table(tokenizer, decisions, responses, ends)


def _batches(ids: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of like prompt length, so that little is padding."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _padded(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> BatchEncoding:
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)


def _read_decisions(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: list[list[int]], tokens: ModeTokens, batch_size: int
) -> list[FirstToken]:
    found: dict[int, FirstToken] = {}
    for rows in _batches(ids, batch_size):
        inputs = _padded(model, tokenizer, [ids[row] for row in rows])
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
) -> Iterator[Generated]:
    """The modes one after the other: no short response waits in a batch for a long one of the other mode."""
    progress = tqdm(total=len(ids) * len(MODES) * samples_per_mode, desc="sampling", unit="response")
    for mode, forced in enumerate(tokens.decision):
        for rows in _batches(ids, max(1, batch_size // samples_per_mode)):
            repeated = [[*ids[row], forced] for row in rows for _ in range(samples_per_mode)]
            inputs = _padded(model, tokenizer, repeated)
            with torch.inference_mode():
                sequences = model.generate(**inputs, generation_config=generation_config)
            for index, sequence in enumerate(sequences[:, inputs["input_ids"].shape[1] :].tolist()):
                yield Generated(rows[index // samples_per_mode], mode, index % samples_per_mode, sequence)
            progress.update(len(rows) * samples_per_mode)
    progress.close()


# --- scores and figures ---------------------------------------------------------------------------------------


def score_samples(samples: pd.DataFrame, dataset: Dataset, reward_funcs: Sequence[Callable]) -> pd.DataFrame:
    """Add the column `reward` to the samples: the sum of the reward functions, NaN where none gives a score.

    Args:
        samples: of `sample_both_modes`.
        dataset: the rows that the prompts came from; their columns go to the reward functions as in training, with the
            response's parts as one more, `response`, and its answer part as the completion.

    Raises:
        ValueError: a reward function returns something else than one number or None per sample.
    """
    rows = samples[PROMPT_ID].tolist()
    columns = {name: list(dataset[name]) for name in dataset.column_names}  # a Column is decoded at every look
    columns = {name: [column[row] for row in rows] for name, column in columns.items()}
    prompts = columns.pop("prompt")
    completions = samples["completion"].tolist()
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    responses = split_completions(completions)
    answers = answer_parts(completions, responses)
    rewards = []
    for reward_func in reward_funcs:
        scores = checked(reward_func)(prompts=prompts, completions=answers, response=responses, **columns)
        rewards.append(asyncio.run(scores) if inspect.iscoroutine(scores) else scores)
    faulty = torch.tensor([not response.well_formed for response in responses])
    totals = floor_faults(torch.tensor(rewards, dtype=torch.float64).T, faulty, torch.tensor(rows))
    unscored = totals.isnan().all(dim=1)
    return samples.assign(reward=totals.nansum(dim=1).where(~unscored, torch.nan).numpy())


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
        "faults": {
            str(mode): {kind.value: float(faults.map(lambda found, kind=kind: kind in found).mean()) for kind in Fault}
            for mode, faults in by_mode["faults"]
        },
        "truncated": by_mode["truncated"].mean().to_dict(),
        "by_level": [] if levels is None else summarize_by(table, [levels[i] for i in prompts[PROMPT_ID]], "level"),
    }
