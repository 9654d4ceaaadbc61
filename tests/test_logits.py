"""Both stages compute log-probabilities as TRL does: in tiles, never the logits of a whole micro-batch at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from settings import ON_CPU, lottery
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, SFTConfig

from hgpo_trl.tasks.embedded import build_model
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.hft import HFTTrainer
from hgpo_trl.training.trainer import HGPOTrainer

TOKENS, WORDS = 8192, 49_152


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, gradients included, in elements."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(made) if torch.is_tensor(leaf))])
        return made


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    built = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2, max_length=TOKENS)
    built.resize_token_embeddings(WORDS)
    return built


def largest_of(trainer: Any, model: PreTrainedModel, batch: dict[str, Any]) -> int:
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    with Largest() as largest:
        trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(TOKENS)).backward()
    assert model.get_output_embeddings().weight.grad.any()
    return largest.numel


def test_no_tensor_is_as_large_as_the_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Dataset, tmp_path: Path
) -> None:
    """Of one row of 8,192 tokens over 49,152 words; and Stage II makes none that TRL's own trainer does not make."""
    ids = torch.arange(TOKENS)[None] % len(tokenizer)
    ones = torch.ones_like(ids)
    rollout = {
        "prompt_ids": ids[:, :8],
        "prompt_mask": ones[:, :8],
        "completion_ids": ids[:, 8:],
        "completion_mask": ones[:, 8:],
        "num_items_in_batch": torch.tensor(TOKENS - 8),
    }
    settings = ON_CPU | {
        "output_dir": str(tmp_path),
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "beta": 0.0,
    }
    stock = GRPOTrainer(model, lottery, GRPOConfig(**settings), prompts, processing_class=tokenizer)
    expected = largest_of(stock, model, rollout | {"advantages": torch.ones(1)})
    assert expected <= TOKENS * WORDS / 4
    ours = HGPOTrainer(model, lottery, HGPOConfig(**settings), prompts, processing_class=tokenizer)
    assert largest_of(ours, model, rollout | {"advantages": torch.ones(1, TOKENS - 8)}) == expected


def test_stage_one_makes_no_tensor_as_large_as_the_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = Dataset.from_dict({"prompt": ["a = 1"], "completion": ["<no_think> 1 </no_think>"]})
    args = SFTConfig(**ON_CPU, output_dir=str(tmp_path))
    trainer = HFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    ids = torch.arange(TOKENS)[None] % len(tokenizer)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert largest_of(trainer, model, batch) <= TOKENS * WORDS / 4
