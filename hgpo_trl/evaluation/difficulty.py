"""Difficulty filter for Stage II: keep the prompts from which HGPO can learn, by a model's pass rate in each mode.

A prompt whose samples all score the same teaches nothing: no response is better than the others of its mode (Eq. 9),
and the margin alone decides between the modes (Eq. 8).
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import nan_to_null
from hgpo_trl.common.seeds import derived_seed
from hgpo_trl.data.example import Drop
from hgpo_trl.evaluation.backends import check_backend, loaded_sampler
from hgpo_trl.evaluation.parts import Part, draw_missing, read_parts
from hgpo_trl.evaluation.samples import PROMPT_ID, sorted_by_mode
from hgpo_trl.evaluation.scores import score_samples
from hgpo_trl.inference.vllm_support import check_vllm_installed
from hgpo_trl.modes import MODES, format_of, mode_tokens
from hgpo_trl.modes.chat_template import settle_format
from hgpo_trl.modes.hybrid_accuracy import valid_mean
from hgpo_trl.rewards import accuracy_reward
from hgpo_trl.training.advantages import query_signal
from hgpo_trl.training.checks import check_dataset
from hgpo_trl.training.model_dir import check_model_path

BLOCK = 512  # prompts of a part: the most that a kill may cost
_COLUMNS = [PROMPT_ID, "mode", "sample", "reward", "num_tokens", "truncated"]


@dataclass
class DifficultyArguments:
    """Stage II prompts that teach the model something, by its own pass rates."""

    difficulty_model: str | None = field(
        default=None, metadata={"help": "HFT model that Stage II starts from: path or hub id; null: no such filter."}
    )
    difficulty_samples_per_mode: int = field(default=4, metadata={"help": "Responses per prompt and mode."})
    difficulty_max_new_tokens: int = field(
        default=16_384, metadata={"help": "Tokens per response, as max_completion_length of Stage II."}
    )
    difficulty_margin: float = field(default=0.2, metadata={"help": "δ, as margin of Stage II (paper: 0.2)."})
    difficulty_backend: str = field(
        default="transformers", metadata={"help": "What samples: transformers, or vllm (needs the extra vllm)."}
    )
    difficulty_batch_size: int = field(default=64, metadata={"help": "transformers: responses generated at a time."})
    difficulty_dtype: str = field(
        default="auto", metadata={"help": "Weights' type: auto (as saved), float32, bfloat16."}
    )

    def __post_init__(self) -> None:
        if self.difficulty_samples_per_mode < 2:
            raise UserError(
                "difficulty_samples_per_mode must be at least 2, or no mode can vary; "
                f"got {self.difficulty_samples_per_mode}."
            )
        if self.difficulty_max_new_tokens < 2:
            raise UserError(
                "difficulty_max_new_tokens must be at least 2, the decision token and one more; "
                f"got {self.difficulty_max_new_tokens}."
            )
        if not 0.0 <= self.difficulty_margin < math.inf:
            raise UserError(f"difficulty_margin must be a finite number of at least 0; got {self.difficulty_margin}.")
        if self.difficulty_batch_size < 1:
            raise UserError(f"difficulty_batch_size must be at least 1; got {self.difficulty_batch_size}.")
        check_backend("difficulty_backend", self.difficulty_backend)


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, whose chat template leaves the decision to it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    settle_format(tokenizer)
    return tokenizer


def check_model(args: DifficultyArguments) -> None:
    """Check the model for `measure`, before hours of other work. Without a `difficulty_model` nothing is checked.

    Raises:
        UserError: there is no such model, it is a LoRA adapter, or its tokenizer lacks the tags.
        MissingPackageError: vLLM is asked for and not installed.
    """
    if args.difficulty_model is None:
        return
    if args.difficulty_backend == "vllm":
        check_vllm_installed("difficulty_backend=vllm")
    check_model_path("difficulty_model", args.difficulty_model)
    try:
        mode_tokens(_tokenizer(args.difficulty_model))
    except ValueError as error:
        raise UserError(f"difficulty_model={args.difficulty_model!r}: {error}") from None


def informative(rewards: NDArray[np.float64], margin: float) -> NDArray[np.bool_]:
    """Which queries give HGPO a signal that comes from their rewards.

    That is one within a mode, where some response is better than another of its mode (Eq. 9), or one between the modes:
    thinking wins (its mean is higher by more than the margin), or not thinking has the higher mean. Where neither is
    so, the margin alone decides for no think (Eq. 8), whatever the responses were.

    Args:
        rewards: `[Q, 2, k]`, axis 1 in the order of `MODES`. NaN: no valid reward. Such a sample is out of every mean
            and maximum; without a valid sample in each mode there is nothing to compare between them.
        margin: δ.

    Returns:
        `[Q]`.

    Raises:
        UserError: `rewards` is not `[Q, 2, k]`, or `margin` is negative or not finite.
    """
    if rewards.ndim != 3 or rewards.shape[1] != len(MODES) or rewards.shape[2] == 0:
        raise ValueError(f"rewards must have the shape [Q, 2, k] with k of at least 1; got {list(rewards.shape)}.")
    if not 0.0 <= margin < math.inf:
        raise UserError(f"margin must be a finite number of at least 0; got {margin}.")
    if len(rewards) == 0:
        return np.zeros(0, dtype=bool)
    return query_signal(torch.from_numpy(rewards), margin).from_rewards.numpy()


def pass_rates(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean reward of each query in each mode, `[Q, 2]` from `[Q, 2, k]`; NaN where a mode has no valid sample."""
    return valid_mean(rewards, axis=2)


def verdicts(rewards: NDArray[np.float64], margin: float) -> list[Drop | None]:
    """Give a verdict on each query, as a `Step` does: "uninformative", with its pass rates, unless it is `informative`.

    A query without any valid reward cannot be measured and is kept.
    """
    measured = ~np.isnan(rewards).all(axis=(1, 2))
    dropped = measured & ~informative(rewards, margin)
    return [
        Drop("uninformative", nan_to_null({"pass_rate_think": float(think), "pass_rate_no_think": float(no_think)}))
        if drop
        else None
        for drop, (think, no_think) in zip(dropped, pass_rates(rewards), strict=True)
    ]


def measure(prompts: Dataset, args: DifficultyArguments, work_dir: Path, seed: int = 0) -> NDArray[np.float64]:
    """Sample responses to every prompt that has a reference answer, and score them.

    Prompts are sampled as in Stage II (temperature 1, the whole vocabulary), in parts. A part's scores are written to
    `work_dir/pass_rates-00000.parquet` and so on; a part that exists, from the same model's path, settings, prompts and
    answers, is read instead of sampled.

    Args:
        prompts: `prompt` (conversations or text) and `answer`, None or blank where nothing definite is known.
        args: with a `difficulty_model`.

    Returns:
        `[Q, 2, k]`, axis 1 in the order of `MODES`; NaN throughout for a prompt without a reference answer.

    Raises:
        UserError: the model or its tokenizer lacks the tags, or vLLM positions for the longest prompt.
    """
    if args.difficulty_model is None:
        raise UserError("difficulty_model is null: name the model whose pass rates are to be measured.")
    per_mode = args.difficulty_samples_per_mode
    rewards = np.full((len(prompts), len(MODES), per_mode), np.nan)
    rows = [i for i, answer in enumerate(prompts["answer"]) if answer is not None and str(answer).strip()]
    if not rows:
        return rewards
    tokenizer = _tokenizer(args.difficulty_model)
    measurable = prompts.select(rows).select_columns(["prompt", "answer"])
    check_dataset("prompts", measurable, tokenizer)
    blocks = [range(start, min(start + BLOCK, len(rows))) for start in range(0, len(rows), BLOCK)]
    parts = []
    for number, block in enumerate(blocks):
        block_seed = derived_seed(seed, number)
        key = _key(args, block_seed, measurable[block.start : block.stop])
        parts.append(Part(work_dir / f"pass_rates-{number:05}.parquet", block, block_seed, key))
    sampler = loaded_sampler(
        args.difficulty_model,
        tokenizer,
        measurable["prompt"],
        backend=args.difficulty_backend,
        max_new_tokens=args.difficulty_max_new_tokens,
        batch_size=args.difficulty_batch_size,
        dtype=args.difficulty_dtype,
    )

    def scores(part: Part, samples: pd.DataFrame) -> pd.DataFrame:
        return score_samples(
            samples, measurable.select(part.prompts), [accuracy_reward], mode_format=format_of(tokenizer)
        )[_COLUMNS]

    draw_missing(
        parts, sampler, measurable["prompt"], samples_per_mode=per_mode, keep=scores, temperature=1.0, top_p=1.0
    )
    found = sorted_by_mode(read_parts(parts))["reward"].to_numpy(dtype=np.float64)
    rewards[rows] = found.reshape(len(rows), len(MODES), per_mode)
    return rewards


def _key(args: DifficultyArguments, seed: int, part: dict[str, Any]) -> str:
    """Hash of all that a block's scores depend on."""
    settings = (args.difficulty_model, args.difficulty_samples_per_mode, args.difficulty_max_new_tokens)
    content = json.dumps([*settings, args.difficulty_dtype, seed, part["prompt"], part["answer"]], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
