"""The rules of `hgpo_trl.training.rules` that `benchmarks/rollout_tokens.py` compares, and how each is set up.

All rules are given the same preference between the modes, HGPO's: no think where R̄_no_think + δ >= R̄_think.
"""

from dataclasses import dataclass, field
from typing import Any

from hgpo_trl import HGPOTrainer
from hgpo_trl.training.rules.adaptthink import REFERENCE

__all__ = ["REFERENCE", "RULES", "Counting", "Rule"]


class Counting(HGPOTrainer):
    """HGPOTrainer that counts the tokens that the model draws in rollouts, end tokens included, forced ones not."""

    rollout_tokens = 0

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.rollout_tokens += int(self._rollout.sampled_lengths.sum())
        return output


@dataclass(frozen=True)
class Rule:
    """How a rule differs from the recipe, and what it is called in tables and figures."""

    label: str
    fields: dict[str, Any] = field(default_factory=dict)


# As large against a response token's 1/T here, at some 17 tokens, as 1/1000 is at some 2,000.
SCALED = {"control_weight": 0.1}
SEQUENCE_RATIO = {"importance_sampling_level": "sequence", "loss_type": "grpo"}  # of AdaptThink's authors

RULES = {
    "hgpo": Rule("HGPO"),
    "lazy": Rule("HGPO, lazy thinking", {"lazy_thinking": True}),
    "grpo": Rule("GRPO, bonus δ", {"mode_rule": "grpo"}),
    "grpo_plain": Rule("GRPO, accuracy alone", {"mode_rule": "grpo", "margin": 0.0, "eval_margin": 0.2}),
    "thinkless": Rule("Thinkless", {"mode_rule": "thinkless"}),
    "thinkless_scaled": Rule("Thinkless, α = 0.1", {"mode_rule": "thinkless", "mode_rule_kwargs": SCALED}),
    "adaptthink": Rule("AdaptThink", {"mode_rule": "adaptthink", "epsilon": 0.2, **SEQUENCE_RATIO}),
    "adaptthink_token": Rule("AdaptThink, ratio per token", {"mode_rule": "adaptthink", "epsilon": 0.2}),
    "stable_adaptive": Rule("Stable Adaptive Thinking", {"mode_rule": "stable_adaptive"}),
}
