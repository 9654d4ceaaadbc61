"""The mathematics of HGPO: from one scalar reward per response to one advantage per token.

Pure functions on tensors, no model and no trainer. Symbols and equation numbers are those of arXiv 2505.14631.

Shapes: `Q` queries, `N` responses each (the first `N/2` think, the last `N/2` do not), `T` tokens of the longest
response. Rewards come as `[Q, 2, N/2]`; axis 1 is the mode, in the order of `hgpo_trl.modes.MODES`. A NaN reward means
"no valid reward": that sample is out of every mean and maximum, and its advantage is 0.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.imports import load_function

TIES = ("all", "first")
INTRA_SCOPES = ("mode", "all")

STD_EPSILON = 1e-4  # added to every standard deviation, as TRL does
TIE_TOLERANCE = 1e-6  # relative: rewards come in float32, whose rounding must not decide between equal means


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def check_coefficients(alpha: float, margin: float, discount: float) -> None:
    """Raise UserError unless α and δ are finite and γ lies in (0, 1]."""
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
        margin: δ, added to the mean of the no-think mode. Equality goes to no-think, which is cheaper. A difference of
            less than 1e-6 of the query's largest reward (or of δ) counts as equality.
        ties: "all" gives r_intra = 1 to every sample that reaches its mode's maximum, "first" to the first one only.
        decided: `[Q]`, queries that no-think has won without think samples (`decided_without_think`); None: none.

    Returns:
        `(r_inter, r_intra)`, both `[Q, 2, N/2]` with entries 0 or 1. Invalid samples get 0. Where a mode of a query has
        no valid sample there is nothing to compare, and r_inter is 0 for the whole query, unless it is decided.

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
    """Find modes without anything to choose between: all their valid samples are best, or none is valid.

    Args:
        rewards, r_intra: `[Q, 2, N/2]`, as `assign_rewards` takes and returns them.

    Returns:
        `[Q, 2]`, boolean.
    """
    return ((r_intra == 1) | rewards.isnan()).all(dim=2)


class QuerySignal(NamedTuple):
    """Where the rewards of a query give a signal; all `[Q]`, boolean."""

    within: Tensor  # some response is better than another one of its mode (Eq. 9)
    compared: Tensor  # one of the modes has won (Eq. 8), be it by the margin alone
    think_wins: Tensor  # R̄_think > R̄_no_think + δ
    no_think_higher: Tensor  # R̄_no_think > R̄_think, so that no-think would win without the margin too

    @property
    def from_rewards(self) -> Tensor:
        """Queries with a signal that comes from their rewards, not from the margin alone."""
        return self.within | self.think_wins | self.no_think_higher


def query_signal(rewards: Tensor, margin: float, ties: str = "all", decided: Tensor | None = None) -> QuerySignal:
    """Find the queries from which HGPO learns something.

    Args:
        rewards, margin, ties, decided: as `assign_rewards` takes them.

    Raises:
        ValueError: see `assign_rewards`.
    """
    r_inter, r_intra = assign_rewards(rewards, margin, ties, decided)
    won = (r_inter > 0).any(dim=2)  # [Q, 2]
    swapped, _ = assign_rewards(rewards.flip(1), 0.0)
    return QuerySignal(
        within=~tied_modes(rewards, r_intra).all(dim=1),
        compared=won.any(dim=1),
        think_wins=won[:, 0],
        no_think_higher=(swapped[:, 0] > 0).any(dim=1),
    )


def decided_without_think(no_think: Tensor, margin: float) -> Tensor:
    """Find queries that no-think wins whatever think samples would bring, as long as no reward exceeds 1 (Eq. 8).

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


DecisionWeighting = Callable[[Tensor, Tensor | None], Tensor]
"""Returns the factors of the inter-group advantages, `[Q, 2]`, from the mode that won each query (Eq. 8), `[Q, 2]` with
entries 0 or 1, and the old policy's π_old(m|q), `[Q, 2]`, which a rule may not need."""


def winner(won: Tensor, mode_probs: Tensor | None = None) -> Tensor:
    """2 for the mode that won, 0 for the other: the policy gradient is that of the winner's log-likelihood.

    The gradient of log π(m|q) on the logit of token v is 1[v = m] − π(v|q): it pulls the winner up and every other
    token down, and vanishes by itself once the winner has all the mass.
    """
    return 2 * won


def saturating(won: Tensor, mode_probs: Tensor | None = None) -> Tensor:
    """2(1 − π_old(m|q)) for the mode that won, 2·π_old(m|q) for the other: 1 at π_old = 1/2, 0 once it is decided."""
    if mode_probs is None:
        raise ValueError("decision_weighting=saturating needs mode_probs, the old policy's probability of each mode.")
    return 2 * (won - mode_probs).abs()


def uniform(won: Tensor, mode_probs: Tensor | None = None) -> Tensor:
    """1 for both modes, the paper as printed (Eq. 10).

    Both modes are always forced, so the push on the loser's decision token never ends, and once the decision is settled
    it moves mass to tokens that are neither mode.
    """
    return torch.ones_like(won)


DECISION_WEIGHTINGS: dict[str, DecisionWeighting] = {rule.__name__: rule for rule in (winner, saturating, uniform)}


@dataclass(frozen=True)
class BinaryRewards:
    """What an estimator turns into advantages: the binary rewards of a batch and the shape of its responses."""

    r_inter: Tensor  # [Q, 2, N/2], 0 or 1 (Eq. 8)
    r_intra: Tensor  # [Q, 2, N/2], 0 or 1 (Eq. 9)
    valid: Tensor  # [Q, 2, N/2], boolean: the response has a reward
    compared: Tensor  # [Q, 2, N/2], boolean: r_inter holds for the row: valid, or of a decided query
    tied: Tensor  # [Q, 2], boolean, see `tied_modes`
    lengths: Tensor  # [Q*N], tokens
    intra_scope: str = "mode"  # norm(r_intra) over the mode's own N/2 samples ("mode") or over all N ("all")
    discount: float = 0.99  # γ of Eq. 22

    @property
    def intra_dims(self) -> tuple[int, ...]:
        """Axes of `[Q, 2, N/2]` that norm(r_intra) runs over."""
        return (2,) if self.intra_scope == "mode" else (1, 2)

    @property
    def to_last(self) -> Tensor:
        """`[Q*N, T]`, tokens still to come after each one; negative beyond the response."""
        position = torch.arange(int(self.lengths.max()), device=self.lengths.device)
        return self.lengths[:, None] - 1 - position

    def per_token(self, per_response: Tensor) -> Tensor:
        """`[Q*N, T]` from `[Q, 2, N/2]`: every token of a response gets its value; 0 beyond the response."""
        return per_response.reshape(-1, 1) * (self.to_last >= 0)


Estimator = Callable[[BinaryRewards], tuple[Tensor, Tensor]]
"""Returns the intra-group advantages per token, `[Q*N, T]` with 0 beyond each response, and the inter-group advantages
of the decision tokens before α and the decision weights, `[Q, 2, N/2]`."""


def grpo(batch: BinaryRewards) -> tuple[Tensor, Tensor]:
    """Eq. 10: norm(r) = (r − mean) / (std + 1e-4), the same for every token of a response."""
    intra = standardize(batch.r_intra, batch.valid, batch.intra_dims)
    return batch.per_token(intra), standardize(batch.r_inter, batch.compared, dim=(1, 2))


def rloo(batch: BinaryRewards) -> tuple[Tensor, Tensor]:
    """Eq. 23: norm(r)_i = r_i minus the mean of the others, the same for every token of a response."""
    intra = leave_one_out(batch.r_intra, batch.valid, batch.intra_dims)
    return batch.per_token(intra), leave_one_out(batch.r_inter, batch.compared, dim=(1, 2))


def reinforce_plus_plus(batch: BinaryRewards) -> tuple[Tensor, Tensor]:
    """Eq. 22 with the reward on the last token: γ^(tokens to come) · r_intra, whitened over all response tokens.

    Modes that are tied are left out: every return there is that of a best sample, which whitening together with other
    modes would turn into praise for nothing.
    """
    chosen = batch.valid & ~batch.tied[:, :, None]
    mask = (batch.to_last >= 0) & chosen.reshape(-1, 1)
    discounts = batch.discount ** batch.to_last.clamp(min=0).to(batch.r_intra.dtype)
    returns = batch.r_intra.reshape(-1, 1) * discounts * mask
    return standardize(returns, mask, dim=(0, 1)), batch.r_inter


def reinforce_plus_plus_as_printed(batch: BinaryRewards) -> tuple[Tensor, Tensor]:
    """Eq. 22 to the letter: Σ_{s=t}^{|o|-1} γ^(s-t) · r_intra, neither centred nor scaled."""
    to_last = batch.to_last
    steps = torch.arange(to_last.shape[1], device=to_last.device).to(batch.r_intra.dtype)
    sums = (batch.discount**steps).cumsum(dim=0)  # of any number of tokens to come; γ = 1 needs no form of its own
    return batch.r_intra.reshape(-1, 1) * sums[to_last.clamp(min=0)] * (to_last >= 0), batch.r_inter


ESTIMATORS: dict[str, Estimator] = {
    estimator.__name__: estimator for estimator in (grpo, rloo, reinforce_plus_plus, reinforce_plus_plus_as_printed)
}


def load_estimator(name: str) -> Estimator:
    """Find an estimator by its name in `ESTIMATORS`, "package.module.function" or "path/to/file.py:function".

    Raises:
        UserError: there is no such estimator, module, file or function.
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    if "." not in name:
        raise UserError(
            f"estimator must be one of {', '.join(ESTIMATORS)}, or your own as package.module.function or "
            f"path/to/file.py:function; got {name!r}."
        )
    return load_function("estimator", name)


def compute_advantages(
    rewards: Tensor,
    completion_lengths: Tensor,
    *,
    estimator: str | Estimator = "grpo",
    alpha: float = 1.0,
    margin: float = 0.2,
    intra_scope: str = "mode",
    ties: str = "all",
    discount: float = 0.99,
    decision_weighting: str = "uniform",
    mode_probs: Tensor | None = None,
    decided: Tensor | None = None,
) -> Tensor:
    """Per-token advantages A_i^t = norm(r_intra)_i + 1[t = 0] · α · norm(r_inter)_i (Eq. 10).

    Position 0 is the decision token, the only one of Φ = {<think>, <no_think>} that decides anything.

    Args:
        rewards: `[Q, 2, N/2]`, raw rewards, NaN where there is none.
        completion_lengths: `[Q*N]`, tokens of each response, the decision token included; query-major, think half
            first.
        estimator: gives the two terms of the sum; one of `ESTIMATORS` by its name, or a callable (`Estimator`).
        alpha: α, weight of the inter-group advantage.
        margin: δ of Eq. 8.
        intra_scope, discount: see `BinaryRewards`.
        ties: see `assign_rewards`.
        decision_weighting: factors of the inter-group advantages, one of `DECISION_WEIGHTINGS`; "uniform" is the paper.
        mode_probs: `[Q, 2]`, the old policy's probability of each mode, π_old(m|q); only "saturating" uses them.
        decided: `[Q]`, queries without think samples that no-think has won (`decided_without_think`). Their think rows
            have a NaN reward, hence no intra-group signal, but the inter-group advantage of rows that lost.

    Returns:
        `[Q*N, T]`, rows as in `completion_lengths`, 0 beyond each length. float64 for float64 rewards, else float32.

    Raises:
        UserError, ValueError: an argument is out of its range or shape, or the estimator returns other shapes or values
            that are not finite; the message names it.
    """
    check_choice("intra_scope", intra_scope, INTRA_SCOPES)
    check_choice("decision_weighting", decision_weighting, DECISION_WEIGHTINGS)
    check_coefficients(alpha, margin, discount)
    estimate = load_estimator(estimator) if isinstance(estimator, str) else estimator
    if rewards.dtype != torch.float64:
        rewards = rewards.float()
    r_inter, r_intra = assign_rewards(rewards, margin, ties, decided)
    _check_lengths(completion_lengths, rewards.numel())
    if mode_probs is not None:
        _check_mode_probs(mode_probs, rewards.shape[:2])
        mode_probs = mode_probs.to(rewards.dtype)

    valid = ~rewards.isnan()
    batch = BinaryRewards(
        r_inter=r_inter,
        r_intra=r_intra,
        valid=valid,
        compared=valid if decided is None else valid | decided[:, None, None],
        tied=tied_modes(rewards, r_intra),
        lengths=completion_lengths,
        intra_scope=intra_scope,
        discount=discount,
    )
    advantages, inter = estimate(batch)
    if estimate not in ESTIMATORS.values():
        _check_estimates(advantages, inter, batch)
        advantages = advantages.to(rewards.dtype, copy=True)  # the user's own tensor stays as it is
    weights = DECISION_WEIGHTINGS[decision_weighting](r_inter.amax(dim=2), mode_probs)
    advantages[:, 0] += alpha * (weights[:, :, None] * inter).reshape(-1)
    return advantages


def _check_lengths(lengths: Tensor, num_rows: int) -> None:
    if lengths.shape != (num_rows,):
        raise ValueError(f"completion_lengths must have one entry per reward, [{num_rows}]; got {list(lengths.shape)}.")
    if lengths.min() < 1:
        raise ValueError(f"completion_lengths must be at least 1; got {int(lengths.min())}.")


def _check_mode_probs(mode_probs: Tensor, shape: torch.Size) -> None:
    if mode_probs.shape != shape:
        raise ValueError(f"mode_probs must have the shape {list(shape)}; got {list(mode_probs.shape)}.")
    if not ((mode_probs >= 0) & (mode_probs <= 1 + TIE_TOLERANCE)).all():  # NaN fails too
        raise ValueError(f"mode_probs must lie between 0 and 1; got {mode_probs.tolist()}.")


def _check_estimates(intra: Tensor, inter: Tensor, batch: BinaryRewards) -> None:
    """Check the advantages of a user's own estimator."""
    for name, found, shape in (
        ("intra-group", intra, batch.to_last.shape),
        ("inter-group", inter, batch.r_inter.shape),
    ):
        if found.shape != shape:
            raise UserError(
                f"estimator: the {name} advantages must have the shape {list(shape)}; it returned {list(found.shape)}."
            )
        if not found.isfinite().all():
            raise UserError(f"estimator: some {name} advantages are not finite. Mask rows without a reward (`valid`).")
    if intra.masked_fill(batch.to_last >= 0, 0.0).any():
        raise UserError(
            "estimator: intra-group advantages beyond the end of a response must be 0. Use `BinaryRewards.per_token`."
        )
