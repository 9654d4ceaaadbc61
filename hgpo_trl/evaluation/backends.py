"""A model loaded into Transformers or vLLM, to sample any number of prompts in both modes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from hgpo_trl.common.errors import UserError
from hgpo_trl.evaluation import transformers_backend, vllm_backend
from hgpo_trl.evaluation.processes import own_share
from hgpo_trl.evaluation.samples import Sampler
from hgpo_trl.inference.decoding import prompt_lengths
from hgpo_trl.modes import check_embeddings, mode_tokens

BACKENDS = ("transformers", "vllm")


def check_backend(field: str, backend: str) -> None:
    """UserError, with the field's name, unless there is such a backend."""
    if backend not in BACKENDS:
        raise UserError(f"{field} must be one of {', '.join(BACKENDS)}; got {backend!r}.")


def default_device() -> torch.device:
    """This process's accelerator, if there are any, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, *own_share("accelerators", range(torch.accelerator.device_count())))


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
    """Load a model into a backend, and free its memory on leaving.

    Args:
        model: path or hub id.
        prompts: all that will be sampled, all plain text or all conversations; vLLM provides positions for the longest.
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

        # A batch is drawn from one stream of random numbers, whatever the numbers of its prompts.
        def sample(prompts: Sequence[Any], *, numbers: Sequence[int], **settings: Any) -> pd.DataFrame:
            return transformers_backend.sample_both_modes(
                loaded, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, **settings
            )

        yield sample
        return

    with torch.device("meta"):  # its shape alone
        check_embeddings(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)), tokens)
    engine = vllm_backend.running_engine(
        model,
        longest_prompt=max(prompt_lengths(tokenizer, prompts)),
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    with engine as llm:

        def sample_with_vllm(prompts: Sequence[Any], **settings: Any) -> pd.DataFrame:
            return vllm_backend.sample_both_modes(llm, tokenizer, prompts, max_new_tokens=max_new_tokens, **settings)

        yield sample_with_vllm
