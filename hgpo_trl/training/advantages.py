"""The mathematics of HGPO: from one scalar reward per response to one advantage per token.

Pure functions on tensors, no model and no trainer. Symbols and equation numbers are those of arXiv 2505.14631.

Shapes: `Q` queries, `N` responses each (the first `N/2` think, the last `N/2` do not), `T` tokens of the longest
response. Rewards come as `[Q, 2, N/2]`; axis 1 is the mode, in the order of `hgpo_trl.modes.MODES`. A NaN reward means
"no valid reward": that sample is out of every mean and maximum, and its advantage is 0.
"""

import math

import torch
from torch import Tensor

from hgpo_trl.common.errors import UserError

ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_as_printed")
TIES = ("all", "first")
INTRA_SCOPES = ("mode", "all")
DECISION_WEIGHTINGS = ("saturating", "uniform")

STD_EPSILON = 1e-4  # added to every standard deviation, as TRL does
TIE_TOLERANCE = 1e-6  # relative: rewards come in float32, whose rounding must not decide between equal means


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def check_coefficients(alpha: float, margin: float, discount: float) -> None:
    """Raise ValueError unless α and δ are finite and γ lies in (0, 1]."""
    for name, value in (("alpha", alpha), ("margin", margin)):
        if not math.isfinite(value):
            raise UserError(f"{name} must be a finite number; got {value}.")
    if not 0.0 < discount <= 1.0:
        raise UserError(f"discount must lie in (0, 1]; got {discount}.")


def assign_rewards(
    rewards: Tensor, margin: float, ties: str = "all", decided: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Turn raw rewards into the two binary rewards of HGPO (Eq. 8 and 9).

    Args:
        rewards: `[Q, 2, N/2]`, raw rewards r (Eq. 7), NaN where there is none.
        margin: δ, what the no-think mode is given on top of its mean. Equality goes to no-think, which is cheaper. A
            difference of less than 1e-6 of the query's largest reward (or of δ) counts as equality.
        ties: "all" gives r_intra = 1 to every sample that reaches its mode's maximum, "first" to the first one only.
        decided: `[Q]`, queries that no-think has won without think samples (`decided_without_think`); None: none.

    Returns:
        `(r_inter, r_intra)`, both `[Q, 2, N/2]` with entries 0 or 1. Invalid samples get 0; so does r_inter of a whole
        query one of whose modes has no valid sample, because there is nothing to compare, unless it is decided.

    Raises:
        ValueError: `rewards` is not `[Q, 2, n]`, `decided` is not `[Q]`, `margin` is not finite, or `ties` is unknown.
    """
    check_choice("ties", ties, TIES)
    check_coefficients(0.0, margin, 1.0)
    if rewards.dim() != 3 or rewards.shape[1] != 2 or rewards.numel() == 0:
        raise ValueError(f"rewards must have the shape [Q, 2, N/2] and at least one entry; got {list(rewards.shape)}.")

    valid = ~rewards.isnan()
    mean_think, mean_no_think = rewards.double().nanmean(dim=2).unbind(dim=1)  # R̄, NaN: a mode has no valid sample
    comparable = ~(mean_think.isnan() | mean_no_think.isnan())
    if decided is not None:
        if decided.shape != comparable.shape:
            raise ValueError(f"decided must have the shape {list(comparable.shape)}; got {list(decided.shape)}.")
        comparable |= decided
    scale = rewards.nan_to_num(nan=0.0).abs().amax(dim=(1, 2)).double().clamp(min=abs(margin))
    think_wins = mean_think - mean_no_think - margin > TIE_TOLERANCE * scale
    wins = torch.stack([think_wins, ~think_wins], dim=1) & comparable[:, None]
    r_inter = wins[:, :, None] & valid

    best = rewards.masked_fill(~valid, -math.inf).amax(dim=2, keepdim=True)
    r_intra = valid & (rewards == best)
    if ties == "first":
        r_intra &= r_intra.cumsum(dim=2) == 1
    return r_inter.to(rewards.dtype), r_intra.to(rewards.dtype)


def tied_modes(rewards: Tensor, r_intra: Tensor) -> Tensor:
    """Modes without anything to choose between: all their valid samples are best, or none is valid.

    Args:
        rewards, r_intra: `[Q, 2, N/2]`, as `assign_rewards` takes and returns them.

    Returns:
        `[Q, 2]`, boolean.
    """
    return ((r_intra == 1) | rewards.isnan()).all(dim=2)


def decided_without_think(no_think: Tensor, margin: float) -> Tensor:
    """Queries that no-think wins whatever think samples would bring, as long as no reward exceeds 1 (Eq. 8).

    Args:
        no_think: `[Q, N/2]`, rewards of the no-think samples. A query with a NaN among them is left undecided.
        margin: δ.

    Returns:
        `[Q]`, boolean: R̄_no_think + δ >= 1.
    """
    best_think = torch.ones_like(no_think)
    r_inter, _ = assign_rewards(torch.stack([best_think, no_think], dim=1), margin)
    return r_inter[:, 1].all(dim=1)


def _masked_moments(x: Tensor, mask: Tensor, dim: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and unbiased standard deviation of `x` where `mask`, over `dim`, which is kept."""
    count = mask.sum(dim=dim, keepdim=True).to(x.dtype)
    mean = (x * mask).sum(dim=dim, keepdim=True) / count.clamp(min=1)
    variance = ((x - mean) ** 2 * mask).sum(dim=dim, keepdim=True) / (count - 1).clamp(min=1)
    return count, mean, variance.sqrt()


def standardize(x: Tensor, mask: Tensor, dim: tuple[int, ...]) -> Tensor:
    """GRPO's norm, (x − mean) / (std + 1e-4), over the entries of `dim` where `mask`; 0 elsewhere."""
    _, mean, std = _masked_moments(x, mask, dim)
    return (x - mean) / (std + STD_EPSILON) * mask


def leave_one_out(x: Tensor, mask: Tensor, dim: tuple[int, ...]) -> Tensor:
    """RLOO's norm (Eq. 23), x_i minus the mean of the others, over the entries of `dim` where `mask`; 0 elsewhere."""
    count, mean, _ = _masked_moments(x, mask, dim)
    return (x - mean) * count / (count - 1).clamp(min=1) * mask


def decision_weights(r_inter: Tensor, mode_probs: Tensor) -> Tensor:
    """Saturating weights of the inter-group advantage: how far the old policy is from the mode that won.

    Both modes are always forced, so as printed (Eq. 10) the push on the decision token never ends, and once the
    decision is settled it moves mass to tokens that are neither mode. Here the winner's rows are scaled by
    2(1 − π_old(m|q)) and the loser's by 2·π_old(m|q): 1 at π_old = 1/2, 0 once the winner has all the mass.

    Args:
        r_inter: `[Q, 2, N/2]` of `assign_rewards`.
        mode_probs: `[Q, 2]`, π_old(think|q) and π_old(no_think|q).

    Returns:
        `[Q, 2, 1]`.
    """
    won = r_inter.amax(dim=2)  # [Q, 2]
    return (2 * torch.where(won > 0, 1 - mode_probs, mode_probs))[:, :, None]


def compute_advantages(
    rewards: Tensor,
    completion_lengths: Tensor,
    *,
    estimator: str = "grpo",
    alpha: float = 1.0,
    margin: float = 0.2,
    intra_scope: str = "mode",
    ties: str = "all",
    discount: float = 0.99,
    mode_probs: Tensor | None = None,
    decided: Tensor | None = None,
) -> Tensor:
    """Per-token advantages A_i^t = norm(r_intra)_i + 1[t = 0] · α · norm(r_inter)_i (Eq. 10).

    Position 0 is the decision token, the only one of Φ = {<think>, <no_think>} that decides anything.

    Args:
        rewards: `[Q, 2, N/2]`, raw rewards, NaN where there is none.
        completion_lengths: `[Q*N]`, tokens of each response, the decision token included; query-major, think half
            first.
        estimator: "grpo" (standardised), "rloo" (Eq. 23), "reinforce_plus_plus" (Eq. 22 with the reward on the last
            token, whitened over the response tokens of all modes of the batch that are not tied, see `tied_modes`), or
            "reinforce_plus_plus_as_printed" (Eq. 22 to the letter).
        alpha: α, weight of the inter-group advantage.
        margin: δ of Eq. 8.
        intra_scope: norm(r_intra) over the mode's own N/2 samples ("mode") or over all N ("all").
        ties: see `assign_rewards`.
        discount: γ of Eq. 22; unused by the other estimators.
        mode_probs: `[Q, 2]`, the old policy's probability of each mode: turns on `decision_weights`. None is the paper.
        decided: `[Q]`, queries without think samples that no-think has won (`decided_without_think`). The think rows
            of these have a NaN reward, hence no intra-group signal, but the inter-group advantage of rows that lost.

    Returns:
        `[Q*N, T]`, rows as in `completion_lengths`, 0 beyond each length. float64 for float64 rewards, else float32.

    Raises:
        ValueError: an argument is out of its range or shape; the message names it.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("intra_scope", intra_scope, INTRA_SCOPES)
    check_coefficients(alpha, margin, discount)
    if rewards.dtype != torch.float64:
        rewards = rewards.float()
    r_inter, r_intra = assign_rewards(rewards, margin, ties, decided)
    if completion_lengths.shape != (rewards.numel(),):
        raise ValueError(
            f"completion_lengths must have one entry per reward, [{rewards.numel()}]; "
            f"got {list(completion_lengths.shape)}."
        )
    if completion_lengths.min() < 1:
        raise ValueError(f"completion_lengths must be at least 1; got {int(completion_lengths.min())}.")
    if mode_probs is not None:
        if mode_probs.shape != rewards.shape[:2]:
            raise ValueError(f"mode_probs must have the shape {list(rewards.shape[:2])}; got {list(mode_probs.shape)}.")
        if not ((mode_probs >= 0) & (mode_probs <= 1 + TIE_TOLERANCE)).all():  # NaN fails too
            raise ValueError(f"mode_probs must lie between 0 and 1; got {mode_probs.tolist()}.")

    valid = ~rewards.isnan()
    compared = valid if decided is None else valid | decided[:, None, None]
    position = torch.arange(int(completion_lengths.max()), device=rewards.device)
    to_last = completion_lengths[:, None] - 1 - position  # [Q*N, T], tokens still to come after this one
    in_response = to_last >= 0

    if estimator in ("grpo", "rloo"):
        norm = standardize if estimator == "grpo" else leave_one_out
        intra = norm(r_intra, valid, dim=(2,) if intra_scope == "mode" else (1, 2))
        inter = norm(r_inter, compared, dim=(1, 2))
        advantages = intra.reshape(-1, 1) * in_response
    else:
        inter = r_inter
        if estimator == "reinforce_plus_plus":
            # A tied mode's return is 1 for every sample. Whitened with the others it would be praise for nothing.
            chosen = valid & ~tied_modes(rewards, r_intra)[:, :, None]
            mask = in_response & chosen.reshape(-1, 1)
            returns = r_intra.reshape(-1, 1) * discount ** to_last.clamp(min=0).to(rewards.dtype) * mask
            advantages = standardize(returns, mask, dim=(0, 1))
        else:
            # Σ_{s=t}^{|o|-1} γ^(s-t) for every number of tokens still to come: no closed form needed for γ = 1
            sums = (discount ** position.to(rewards.dtype)).cumsum(dim=0)
            advantages = r_intra.reshape(-1, 1) * sums[to_last.clamp(min=0)] * in_response

    if mode_probs is not None:
        inter = inter * decision_weights(r_inter, mode_probs.to(inter.dtype))
    advantages[:, 0] += alpha * inter.reshape(-1)
    return advantages
