"""Decisions of a global batch: each query's prompt is computed once, by one of the processes that hold its rows."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from hgpo_trl.modes.decision import Decision


def read_group_decisions(
    read: Callable[[Tensor, Tensor], Decision],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    group_size: int,
    micro_batch_rows: int,
    completion_length: int,
    accelerator: Accelerator,
    max_tokens: int | None = None,
) -> Decision:
    """Read the first-token distribution for every query of the global batch.

    Each process computes every g-th of its rows, where g is the greatest stride that hits every group's first row. With
    whole groups per process that is each prompt once.

    Args:
        read: `modes.decision.read_decision` of a model, on `[b, P]` token ids and attention mask.
        prompt_ids, prompt_mask: `[B, P]`, this process's prompts, padded left.
        group_size: N.
        micro_batch_rows, completion_length: rows of a micro-batch, and its longest response. A pass has no more tokens
            than such a micro-batch.
        max_tokens: of a pass, padding included, in place of these (`micro_batch_tokens`).

    Returns:
        `[Q]` per field, on every process.
    """
    stride = math.gcd(len(prompt_ids), group_size)
    # All processes take the chunk of the widest prompts: ZeRO-3 and FSDP need the same number of passes on each.
    width = int(accelerator.gather(torch.tensor([prompt_ids.shape[1]], device=prompt_ids.device)).amax())
    tokens = micro_batch_rows * (width + completion_length) if max_tokens is None else max_tokens
    chunk = max(1, tokens // width)
    chunks = zip(prompt_ids[::stride].split(chunk), prompt_mask[::stride].split(chunk), strict=True)
    parts = [read(ids, mask) for ids, mask in chunks]
    local = Decision(*(torch.cat(field) for field in zip(*parts, strict=True)))
    return Decision(*(accelerator.gather(field)[:: group_size // stride] for field in local))
