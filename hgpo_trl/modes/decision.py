"""The decision: the policy's distribution over its first token, from the logits at the end of the prompt."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hgpo_trl.modes import ModeTokens

OFF_MODE = -1  # `Decision.picked` where the most likely first token is neither mode


class Decision(NamedTuple):
    """The first token's distribution, one entry per prompt (all `[B]`)."""

    think: Tensor  # π(think | q)
    no_think: Tensor  # π(no_think | q)
    neither: Tensor  # mass on every other token
    entropy: Tensor  # of the whole first-token distribution, in nats
    picked: Tensor  # greedy choice: 0 = think, 1 = no_think (the order of MODES), OFF_MODE = neither

    @property
    def mode_probs(self) -> Tensor:
        """`[B, 2]`, in the order of MODES."""
        return torch.stack([self.think, self.no_think], dim=1)


@torch.no_grad()
def read_decision(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, tokens: ModeTokens, temperature: float = 1.0
) -> Decision:
    """One forward pass over left-padded prompts; only the logits of the last position are computed.

    Args:
        model: causal language model.
        input_ids, attention_mask: `[B, P]`, prompts padded on the left.
        tokens: ids of the mode tags.
        temperature: the sampling temperature that defines the policy; the greedy choice does not depend on it.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1).logits[:, -1]
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    probs = log_probs.exp()
    think, no_think = probs[:, list(tokens.decision)].unbind(dim=1)
    top = log_probs.argmax(dim=-1)
    picked = torch.full_like(top, OFF_MODE)
    for mode_index, token_id in enumerate(tokens.decision):
        picked[top == token_id] = mode_index
    return Decision(
        think=think,
        no_think=no_think,
        neither=(1 - think - no_think).clamp(min=0),
        entropy=-(probs * log_probs).nan_to_num(0.0).sum(dim=-1),  # 0 · log 0 = 0
        picked=picked,
    )
