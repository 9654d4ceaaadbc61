"""The decision: the policy's distribution over the two modes, from the logits at the end of the prompt.

A mode's probability is that of its whole opening. Where the openings are one token each, that is the first token's;
where they share a beginning, the decision stands behind it (`hgpo_trl.modes.ModeTokens`).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hgpo_trl.modes import OTHER, ModeTokens

OFF_MODE = -1  # `Decision.picked` where the greedy response begins with neither opening


class Decision(NamedTuple):
    """The distribution over the modes, one entry per prompt (all `[B]`)."""

    think: Tensor  # π(think | q)
    no_think: Tensor  # π(no_think | q)
    neither: Tensor  # mass on every other beginning
    entropy: Tensor  # of the distribution of the token at which the openings part, in nats
    picked: Tensor  # greedy choice: 0 = think, 1 = no_think (the order of MODES), OFF_MODE = neither

    @property
    def mode_probs(self) -> Tensor:
        """`[B, 2]`, in the order of MODES."""
        return torch.stack([self.think, self.no_think], dim=1)


@torch.no_grad()
def read_decision(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, tokens: ModeTokens, temperature: float = 1.0
) -> Decision:
    """One forward pass over left-padded prompts, or one per opening that goes on where they have parted.

    Only the logits of the openings' positions are computed.

    Args:
        model: causal language model.
        input_ids, attention_mask: `[B, P]`, prompts padded on the left.
        tokens: of the openings.
        temperature: the sampling temperature that defines the policy; the greedy choice does not depend on it.
    """

    def read(context: tuple[int, ...]) -> Tensor:
        """Log-probabilities of the token after each beginning of the context, `[B, len(context) + 1, V]`."""
        appended = input_ids.new_tensor(context).expand(len(input_ids), -1)
        logits = model(
            input_ids=torch.cat([input_ids, appended], dim=1),
            attention_mask=torch.cat([attention_mask, torch.ones_like(appended)], dim=1),
            use_cache=False,
            logits_to_keep=len(context) + 1,
        ).logits[:, -len(context) - 1 :]
        return torch.log_softmax(logits.float() / temperature, dim=-1)

    place = len(tokens.prefix)
    whole = {mode: read(opening[:-1]) for mode, opening in enumerate(tokens.openings) if len(opening) > place + 1}
    shared = next(iter(whole.values())) if whole else read(tokens.prefix)
    reached, greedy = _follow(shared, tokens.prefix, 0)
    log_probs = shared[:, place]
    probs, top = log_probs.exp(), log_probs.argmax(dim=-1)

    of_modes: list[Tensor] = []
    picked = torch.full_like(top, OFF_MODE)
    for mode, opening in enumerate(tokens.openings):
        token, other = tokens.decision[mode], tokens.decision[1 - mode]
        mass, chosen = (1 - probs[:, other], top != other) if token == OTHER else (probs[:, token], top == token)
        rest, goes_on = _follow(whole.get(mode, shared), opening, place + 1)
        of_modes.append(reached * mass * rest)
        picked[greedy & chosen & goes_on] = mode
    think, no_think = of_modes
    return Decision(
        think=think,
        no_think=no_think,
        neither=(1 - think - no_think).clamp(min=0),
        entropy=-(probs * log_probs).nan_to_num(0.0).sum(dim=-1),  # 0 · log 0 = 0
        picked=picked,
    )


def _follow(log_probs: Tensor, opening: tuple[int, ...], start: int) -> tuple[Tensor, Tensor]:
    """The probability of an opening's tokens from `start` on, and whether each is the most likely; both `[B]`."""
    total = log_probs.new_zeros(len(log_probs))
    greedy = torch.ones_like(total, dtype=torch.bool)
    for place, token in enumerate(opening[start:], start):
        total = total + log_probs[:, place, token]
        greedy &= log_probs[:, place].argmax(dim=-1) == token
    return total.exp(), greedy


def move_decision(
    logits: Tensor, tokens: ModeTokens, bias: Tensor | float, rows: Tensor | slice = slice(None)
) -> Tensor:
    """Move the log-odds of thinking, logit(think) − logit(no_think), in place.

    Half of the bias is added to the one and half subtracted from the other. Where one mode is every token but the
    other's (OTHER), the other's logit takes all of it.

    Args:
        logits: `[B, V]`, at the token where the openings part.
        bias: one number, or one per row.
        rows: those to change.
    """
    share = bias if OTHER in tokens.decision else bias / 2
    for token, change in zip(tokens.decision, (share, -share), strict=True):
        if token != OTHER:
            logits[rows, token] += change
    return logits


@torch.no_grad()
def draw_other(
    model: nn.Module, pad: int, prompts: list[list[int]], tokens: ModeTokens, temperature: float, batch_rows: int
) -> list[int]:
    """Draw the token that stands at the decision of the mode that has no token of its own there (OTHER).

    It is any token but the other mode's, drawn by the policy.

    Args:
        pad: a token to pad prompts with, on the left.
        temperature: of the sampling; 0 is greedy.
        batch_rows: prompts per forward pass.

    Returns:
        One token per prompt.
    """
    (excluded,) = (token for token in tokens.decision if token != OTHER)
    drawn: list[int] = []
    device = next(model.parameters()).device
    for start in range(0, len(prompts), batch_rows):
        rows = [[*prompt, *tokens.prefix] for prompt in prompts[start : start + batch_rows]]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        logits[:, excluded] = -torch.inf
        best = logits.argmax(dim=-1)
        drawn += (torch.softmax(logits / temperature, dim=-1).multinomial(1)[:, 0] if temperature else best).tolist()
    return drawn
