"""Fields of a recipe that choose reward functions and a reward model, for training and evaluation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset

from hgpo_trl.common.errors import UserError
from hgpo_trl.rewards import accuracy_reward, has_answer
from hgpo_trl.rewards.model import RewardModel
from hgpo_trl.training.model_dir import check_model_path


@dataclass
class RewardArguments:
    """Reward functions, and a reward model for rows without an `answer`."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["hgpo_trl.rewards.accuracy_reward"],
        metadata={"help": "Functions (package.module.function or file.py:function), or reward models that TRL runs."},
    )
    reward_model: str | None = field(
        default=None,
        metadata={"help": "Scores the rows without an `answer`: path or hub id; the rule scores the others."},
    )
    reward_model_batch_size: int = field(
        default=8, metadata={"help": "Conversations per forward pass of the reward model; no score depends on it."}
    )
    reward_model_squash: bool = field(
        default=True, metadata={"help": "Squash its score s into (0, 1): sigmoid((s - center) / scale)."}
    )
    reward_model_center: float = field(default=0.0, metadata={"help": "Raw score that becomes 0.5."})
    reward_model_scale: float = field(default=1.0, metadata={"help": "Raw score's unit, above 0."})

    def __post_init__(self) -> None:
        if self.reward_model_batch_size < 1:
            raise UserError(f"reward_model_batch_size must be at least 1; got {self.reward_model_batch_size}.")
        if not math.isfinite(self.reward_model_center):
            raise UserError(f"reward_model_center must be a finite number; got {self.reward_model_center}.")
        if not 0.0 < self.reward_model_scale < math.inf:
            raise UserError(f"reward_model_scale must be a finite number above 0; got {self.reward_model_scale}.")

    def build_reward_model(self, device: torch.device, prompt: Any) -> RewardModel | None:
        """Build the reward model, if one is named; its weights are loaded with the first score.

        Args:
            prompt: one of the prompts, to check that the chat template accepts it.

        Raises:
            UserError: see `RewardModel`, or the path does not exist.
        """
        if self.reward_model is None:
            return None
        check_model_path("reward_model", self.reward_model)
        model = RewardModel(
            self.reward_model,
            device,
            batch_size=self.reward_model_batch_size,
            squash=self.reward_model_squash,
            center=self.reward_model_center,
            scale=self.reward_model_scale,
        )
        model.encode(prompt, "0")
        return model


def check_answers_are_there(name: str, dataset: Dataset, rewards: Sequence[Any], args: RewardArguments) -> None:
    """Raise UserError if rows have no `answer` and only the rule scores them."""
    if args.reward_model is not None or list(rewards) != [accuracy_reward]:
        return
    answers = dataset["answer"] if "answer" in dataset.column_names else [None] * len(dataset)
    missing = sum(not has_answer(answer) for answer in answers)
    if missing:
        raise UserError(
            f"{name}: {missing} of {len(dataset)} rows have no `answer`, without which accuracy_reward cannot score "
            "them. Name a reward_model that does (allenai/Llama-3.1-Tulu-3-8B-RM in the paper), name reward_funcs of "
            "your own, or remove these rows."
        )
