"""Samples of both modes by Transformers."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hgpo_trl.evaluation.samples import Generated, samples_table
from hgpo_trl.inference.decoding import Decoder, render
from hgpo_trl.inference.limits import Limits, ThinkBudget
from hgpo_trl.modes import MODES, Mode, mode_tokens


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
    limits = Limits(max_new_tokens, max_think_tokens, max_no_think_tokens, think_budget)
    rooms, budget = limits.rooms(tokens), limits.budget(tokenizer, tokens)
    at_once = prompts_at_a_time(batch_size, samples_per_mode) * samples_per_mode
    decoder = Decoder(model, tokenizer, tokens, temperature, top_p, at_once)
    ids = render(tokenizer, prompts)
    model.eval()
    torch.manual_seed(seed)
    decisions = decoder.read_decisions(ids)
    total = len(ids) * len(MODES) * samples_per_mode
    with tqdm(total=total, desc="sampling", unit="response") if progress is None else nullcontext(progress) as bar:
        responses = _generate(decoder, ids, rooms, budget, samples_per_mode, bar)
        return samples_table(tokenizer, decisions, responses, decoder.ends)


def _generate(
    decoder: Decoder,
    ids: list[list[int]],
    rooms: Sequence[int],
    budget: ThinkBudget | None,
    samples_per_mode: int,
    progress: tqdm,
) -> Iterator[Generated]:
    """Generate one mode after the other: no short response waits in a batch for a long one of the other mode."""
    prompts = [row for row in ids for _ in range(samples_per_mode)]
    for number, (mode, room) in enumerate(zip(MODES, rooms, strict=True)):
        begun = decoder.force(prompts, mode)
        rows = [[*prompt, *opening] for prompt, opening in zip(prompts, begun, strict=True)]
        drawn = len(decoder.tokens.openings[number])  # a token behind it is the model's own, of a mode that is OTHER
        for place, rest in decoder.complete(rows, room, progress, budget if mode is Mode.THINK else None):
            response = [*begun[place][drawn:], *rest]
            yield Generated(place // samples_per_mode, number, place % samples_per_mode, response)


def prompts_at_a_time(batch_size: int, samples_per_mode: int) -> int:
    """Number of prompts whose responses in one mode fill a batch; at least 1."""
    return max(1, batch_size // samples_per_mode)
