"""Tokens without a gradient: they are left out of the training's forward and backward passes.

Where all samples of a mode earn the same, none of them has an intra-group advantage (Eq. 9), and a response of the mode
that lost has none at all. With no KL term the loss of a token is its advantage times a function of its own
probability: behind the last token with an advantage, a response adds nothing to the loss or its gradient.
"""

from typing import Any

import torch
from torch import Tensor


def mask_idle(batch: dict[str, Any], *, divided_by_length: bool) -> dict[str, Any]:
    """Mask what follows each response's last token with an advantage. The loss and its gradient stay the same.

    Args:
        batch: TRL's rollout dict, `[B, T]` along the completion; `advantages` `[B, T]` or `[B]`.
        divided_by_length: the loss divides a row's sum by its number of tokens. The advantages make up for the tokens
            that are gone: the loss is linear in them as long as their sign stays.
    """
    mask, advantages = batch["completion_mask"], batch["advantages"]
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(mask.shape)
    counted = mask * batch["tool_mask"] if "tool_mask" in batch else mask
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    kept = ((advantages != 0) & (counted != 0)).mul(places).amax(dim=1, keepdim=True)  # [B, 1], tokens up to the last
    within = (places <= kept).to(mask.dtype)
    if divided_by_length:
        advantages = advantages * _share(counted * within, counted)
    return {**batch, "completion_mask": mask * within, "advantages": advantages}


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """How many of a row's tokens are in a part of them, `[B, 1]` in [0, 1]."""
    return part.sum(dim=1, keepdim=True) / whole.sum(dim=1, keepdim=True).clamp(min=1)
