"""Sampling in both modes by a model that is named: loaded once into either backend, used for any number of prompts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from hgpo_trl.common.errors import UserError
from hgpo_trl.evaluation import vllm_backend as vllm_sampling
from hgpo_trl.evaluation.evaluate import render, sample_both_modes
from hgpo_trl.modes import check_embeddings, mode_tokens

BACKENDS = ("transformers", "vllm")

Sampler = Callable[..., pd.DataFrame]
"""`sampler(prompts, **settings)`: `hgpo_trl.evaluation.evaluate.sample_both_modes` without its first two arguments."""


def check_backend(field: str, backend: str) -> None:
    """UserError, with the field's name, unless there is such a backend."""
    if backend not in BACKENDS:
        raise UserError(f"{field} must be one of {', '.join(BACKENDS)}; got {backend!r}.")


def default_device() -> torch.device:
    """The accelerator that there is, or the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


@contextmanager
def loaded_sampler(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    backend: str,
    max_new_tokens: int,
    batch_size: int = 64,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
) -> Iterator[Sampler]:
    """A sampler with the model in the backend's memory, which is free again on leaving.

    Args:
        model: path or hub id.
        prompts: all that will be sampled, all plain text or all conversations: the longest decides how many positions
            vLLM provides.
        max_new_tokens: per response, the decision token included.
        batch_size: transformers: responses generated at a time.
        tensor_parallel_size, gpu_memory_utilization: vllm: GPUs that share the model, and its share of their memory.

    Raises:
        UserError: the model lacks rows for the tags, or, with vLLM, positions for the longest prompt and response.
    """
    tokens = mode_tokens(tokenizer)
    if backend == "transformers":
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=default_device())
        check_embeddings(loaded, tokens)

        def sample(prompts: Sequence[Any], **settings: Any) -> pd.DataFrame:
            return sample_both_modes(
                loaded, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, **settings
            )

        yield sample
        return

    with torch.device("meta"):  # its shape alone
        check_embeddings(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)), tokens)
    engine = vllm_sampling.running_engine(
        model,
        longest_prompt=max(map(len, render(tokenizer, prompts))),
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    with engine as llm:

        def sample_with_vllm(prompts: Sequence[Any], **settings: Any) -> pd.DataFrame:
            return vllm_sampling.sample_both_modes(llm, tokenizer, prompts, max_new_tokens=max_new_tokens, **settings)

        yield sample_with_vllm
