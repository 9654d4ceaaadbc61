"""Rewards: reward functions, the treatment of their rewards, and the reward model."""

from hgpo_trl.rewards.functions import accuracy_reward, has_answer, load_reward

__all__ = ["accuracy_reward", "has_answer", "load_reward"]
