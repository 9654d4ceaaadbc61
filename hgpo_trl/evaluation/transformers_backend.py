"""Samples of both modes by Transformers."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hgpo_trl.evaluation.samples import FirstToken, Generated, samples_table
from hgpo_trl.inference.generate import batches, complete, end_tokens, openings, padded, render, sampling_config
from hgpo_trl.inference.limits import Limits, ThinkBudget
from hgpo_trl.modes import MODES, Mode, ModeTokens, mode_tokens
from hgpo_trl.modes.decision import read_decision


def sample_both_modes(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    samples_per_mode: int,
    max_new_tokens: int,
    max_think_tokens: int | None = None,
    max_no_think_tokens: int | None = None,
    think_budget: int | None = None,
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
        max_new_tokens, max_think_tokens, max_no_think_tokens, think_budget: limits of a response's length
            (`hgpo_trl.inference.limits.Limits`).
        temperature, top_p: of the sampling (paper: 0.6 and 0.95). The decision's probabilities are those at
            temperature 1.
        batch_size: responses generated at a time.
        progress: a bar that counts responses; None: a new one.

    Returns:
        The table of `hgpo_trl.evaluation.samples`: one row per response.
    """
    tokens = mode_tokens(tokenizer)
    ends = end_tokens(tokenizer, model.generation_config.eos_token_id)
    limits = Limits(max_new_tokens, max_think_tokens, max_no_think_tokens, think_budget)
    configs = [sampling_config(tokenizer, ends, room, temperature, top_p) for room in limits.rooms(tokens)]
    budget = limits.budget(tokenizer, tokens)
    ids = render(tokenizer, prompts)
    model.eval()
    torch.manual_seed(seed)
    decisions = _read_decisions(model, tokenizer, ids, tokens, batch_size)
    total = len(ids) * len(MODES) * samples_per_mode
    with tqdm(total=total, desc="sampling", unit="response") if progress is None else nullcontext(progress) as bar:
        responses = _generate(model, tokenizer, ids, tokens, configs, budget, samples_per_mode, batch_size, bar)
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
    configs: Sequence[GenerationConfig],
    budget: ThinkBudget | None,
    samples_per_mode: int,
    batch_size: int,
    progress: tqdm,
) -> Iterator[Generated]:
    """Generate one mode after the other: no short response waits in a batch for a long one of the other mode."""
    rows_at_a_time = prompts_at_a_time(batch_size, samples_per_mode) * samples_per_mode
    for number, (mode, config) in enumerate(zip(MODES, configs, strict=True)):
        prompts = [row for row in ids for _ in range(samples_per_mode)]
        temperature = config.temperature if config.do_sample else 0.0
        begun = openings(model, tokenizer, prompts, tokens, mode, temperature, rows_at_a_time)
        rows = [[*prompt, *opening] for prompt, opening in zip(prompts, begun, strict=True)]
        drawn = len(tokens.openings[number])  # a token behind the opening is the model's own, of a mode that is OTHER
        closing = budget if mode is Mode.THINK else None
        for place, rest in complete(model, tokenizer, rows, config, rows_at_a_time, progress, closing):
            response = [*begun[place][drawn:], *rest]
            yield Generated(place // samples_per_mode, number, place % samples_per_mode, response)


def prompts_at_a_time(batch_size: int, samples_per_mode: int) -> int:
    """Number of prompts whose responses in one mode fill a batch; at least 1."""
    return max(1, batch_size // samples_per_mode)
