"""Rules for learning when to think, besides HGPO's, in the same trainer: what `benchmarks/rollout_tokens.py` compares.

    grpo         stock GRPO, which samples the mode freely; δ is paid as a reward
    thinkless    DeGRPO of Thinkless (arXiv 2505.13379), which samples the mode freely, too
    adaptthink   AdaptThink (arXiv 2505.13417), which forces half of the samples into each mode, as HGPO does

Every rule is a pure function from rewards to what TRL's loss takes (advantages, old log-probabilities); the trainers
below put it in its place. Shapes: `B` responses, `N` per query, query-major; `T` tokens of the longest response, the
decision token first. One process.

All rules are given the same preference between the modes, HGPO's: no think where R̄_no_think + δ >= R̄_think.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from hgpo_trl import HGPOTrainer
from hgpo_trl.modes import Mode
from hgpo_trl.rewards.functions import accuracy_reward, split_completions
from hgpo_trl.training.rollout import think_rows

REFERENCE = "reference_reward"  # column: R̄_ref of AdaptThink


# --- rewards of whole responses -----------------------------------------------------------------------------------


def bonus_reward(correct: float, mode: Mode | None, margin: float) -> float:
    """r + δ for a no-think response, right or wrong; r for any other.

    The mean over no-think responses is R̄_no_think + δ: in expectation the preference of Eq. 8 of HGPO.
    """
    return correct + margin * (mode is Mode.NO_THINK)


def thinkless_reward(correct: float, mode: Mode | None, gamma: float) -> float:
    """Thinkless: 1 for a correct no-think response (its `<short>`), 1 − γ for a correct think response, else −1.

    With p the accuracy of a mode, no think is preferred where 2·p_no_think − 1 >= (2 − γ)·p_think − 1. At p_think = 1
    that is p_no_think >= 1 − γ/2, HGPO's rule for γ = 2δ. The authors' script (VainF/Thinkless) has γ = 0.5.
    """
    if not correct:
        return -1.0
    return 1.0 - gamma * (mode is Mode.THINK)


def whole_response_reward(completions: list, answer: list, rule: Any, **columns: Any) -> list[float]:
    """A reward function of TRL: `rule(correct, mode)` of every response. A malformed one is not correct."""
    responses = split_completions(completions)
    rewards = accuracy_reward(completions, answer, response=responses)
    return [rule(reward or 0.0, response.mode) for reward, response in zip(rewards, responses, strict=True)]


# --- advantages ---------------------------------------------------------------------------------------------------


def degrpo_advantages(rewards: Tensor, lengths: Tensor, group: int, control_weight: float) -> Tensor:
    """Advantages with which a sum over tokens is the objective of Thinkless, DeGRPO.

    That is the mean over responses of α·L_{i,0} + 1/T_i Σ_{t>0} L_{i,t}, L the clipped surrogate and T_i the tokens
    after the control token; the authors' code divides by the response tokens of a micro-batch instead of each
    response's own. L is linear in a positive factor of the advantage, so the weights can be part of it. The advantage
    is r − mean(r) over the query, not divided by its standard deviation (their `std_normalizer=False`).

    Args:
        rewards: `[B]`.
        lengths: `[B]`, tokens of each response.
        group: N.
        control_weight: α; 1/1000 in the paper.

    Returns:
        `[B, T]`, 0 beyond each length.
    """
    grouped = rewards.view(-1, group)
    advantages = (grouped - grouped.mean(dim=1, keepdim=True)).view(-1, 1)
    position = torch.arange(int(lengths.max()), device=lengths.device)
    weights = 1 / (lengths - 1).clamp(min=1)[:, None] * (position < lengths[:, None])
    weights[:, 0] = control_weight
    return advantages * weights


def adaptthink_advantages(rewards: Tensor, no_think: Tensor, reference: Tensor, margin: float) -> Tensor:
    """A(x, y) = 1[no think]·δ + R(x, y) − R̄_ref(x) of AdaptThink (with its Eq. 7), not normalised.

    Args:
        rewards: `[B]`, R.
        no_think: `[B]`, whether a response was forced not to think.
        reference: `[B]`, the mean reward of the reference model's own think responses to the query (Eq. 5).
        margin: δ.

    Returns:
        `[B]`.
    """
    return rewards + margin * no_think - reference


def forced_log_probs(log_probs: Tensor) -> Tensor:
    """Old log-probabilities `[B, T]` under the sampling policy of AdaptThink (Eq. 8): log 0.5 for the forced token."""
    forced = log_probs.clone()
    forced[:, 0] = math.log(0.5)
    return forced


# --- trainers -----------------------------------------------------------------------------------------------------


class Counting(GRPOTrainer):
    """GRPO that counts what it generates.

    As a base after `HGPOTrainer` it stands between that and `GRPOTrainer`, and so counts what is sampled after a forced
    token. So the count is of the same thing under every rule: tokens that the model drew, end tokens included.
    """

    rollout_tokens = 0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        completion_ids, log_probs = super()._generate_single_turn(*args, **kwargs)
        if self.model.training:
            self.rollout_tokens += sum(map(len, completion_ids))
        return completion_ids, log_probs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self.whole_rewards = super()._calculate_rewards(*args, **kwargs)
        return self.whole_rewards


class CountingHGPO(HGPOTrainer, Counting):
    """HGPO as it is."""


class Thinkless(Counting):
    """GRPO with DeGRPO's loss, on top of `loss_type: dr_grpo`, whose division by B·max_completion_length is undone."""

    control_weight = 1e-3  # α

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        lengths = output["completion_mask"].sum(dim=1)
        rewards = self.whole_rewards.sum(dim=1)
        advantages = degrpo_advantages(rewards, lengths, self.num_generations, self.control_weight)
        output["advantages"] = advantages * self.max_completion_length
        return output


class ThinklessScaled(Thinkless):
    """α as large against a response token's 1/T here, at some 17 tokens, as 1/1000 is at some 2,000."""

    control_weight = 0.1


class AdaptThink(HGPOTrainer, Counting):
    """HGPO's sampling with AdaptThink's advantage and importance ratio.

    The ratio of the authors' code is exp of the response's mean log-ratio, one for the whole response, which is TRL's
    `importance_sampling_level: sequence`; with `loss_type: grpo` every response counts once, as there.
    """

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        rewards = self._rollout.rewards.flatten()
        reference = rewards.new_tensor([row[REFERENCE] for row in inputs])
        no_think = ~think_rows(len(inputs), self._rollout.group_size, rewards.device)
        output["advantages"] = adaptthink_advantages(rewards, no_think, reference, self.args.margin)
        with torch.no_grad():
            log_probs, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].shape[1],
                self.args.per_device_train_batch_size,
            )
        output["old_per_token_logps"] = forced_log_probs(log_probs)
        return output


# --- by name ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A trainer, how it differs from the recipe, and what it is called in tables and figures."""

    label: str
    trainer: type[GRPOTrainer]
    fields: dict[str, Any] = field(default_factory=dict)
    reward: Any = None  # (correct, mode, coefficient) -> float, of whole responses; None: the answer's accuracy
    coefficient: float = 0.0  # of the reward, in units of δ

    def reward_func(self, margin: float) -> Any:
        """The reward function for TRL."""
        if self.reward is None:
            return accuracy_reward
        scored = partial(whole_response_reward, rule=lambda c, m: self.reward(c, m, self.coefficient * margin))
        scored.__name__ = self.reward.__name__  # type: ignore[attr-defined]
        return scored


SEQUENCE_RATIO = {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.2}

RULES = {
    "hgpo": Rule("HGPO", CountingHGPO),
    "lazy": Rule("HGPO, lazy thinking", CountingHGPO, {"lazy_thinking": True}),
    "grpo": Rule("GRPO, bonus δ", Counting, reward=bonus_reward, coefficient=1.0),
    "grpo_plain": Rule("GRPO, accuracy alone", Counting, reward=bonus_reward, coefficient=0.0),
    "thinkless": Rule("Thinkless", Thinkless, reward=thinkless_reward, coefficient=2.0),
    "thinkless_scaled": Rule("Thinkless, α = 0.1", ThinklessScaled, reward=thinkless_reward, coefficient=2.0),
    "adaptthink": Rule("AdaptThink", AdaptThink, SEQUENCE_RATIO),
    "adaptthink_token": Rule("AdaptThink, ratio per token", AdaptThink, {"epsilon": 0.2}),
}
