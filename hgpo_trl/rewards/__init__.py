"""Rewards: reward functions, the treatment of their rewards, and the reward model."""

from hgpo_trl.rewards.functions import accuracy_reward, has_answer, load_reward
from hgpo_trl.rewards.reasoning_gym import reasoning_gym_reward

__all__ = ["accuracy_reward", "has_answer", "load_reward", "reasoning_gym_reward"]
