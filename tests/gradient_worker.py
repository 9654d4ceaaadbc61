"""One optimizer step per loss type on padded, trimmed and repacked micro-batches, for tests/test_distributed.py.

    accelerate launch ... tests/gradient_worker.py MODEL PROMPTS OUTPUT.pt [cpu | fsdp] LOSS_TYPE ...

Plain gradient descent with a learning rate of 1, so that the weights move by the gradient. All steps of a loss type are
taken on the same rollout.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from parity_worker import GROUP, FixedRollouts, reward
from settings import ON_CPU
from transformers import PreTrainedTokenizerFast
from workers import end, stand_in_for_gpus

from hgpo_trl import HGPOConfig

WAYS: dict[str, dict[str, Any]] = {
    "padded": {"trim_micro_batches": False},
    "trimmed": {},
    "by tokens": {"micro_batch_tokens": 40},
}


class Counted(FixedRollouts):
    computed: list[
        tuple[int, int, int]
    ]  # of each micro-batch: tokens, padding included; those of its longest row; rows

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        rows = inputs["prompt_mask"].sum(dim=1) + inputs["completion_mask"].sum(dim=1)
        self.computed.append((tokens, int(rows.amax()), len(rows)))
        return super().compute_loss(model, inputs, *args, **kwargs)


def step(model: str, prompts: str, output: str, loss_type: str, way: str, use_cpu: bool) -> dict[str, Any]:
    """The weights afterwards (on the main process), every process's micro-batches and what was logged."""
    args = HGPOConfig(
        output_dir=str(Path(output).with_suffix("")),
        loss_type=loss_type,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        num_generations=GROUP,
        max_completion_length=8,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        beta=0.04,
        ddp_backend="gloo",
        seed=0,
        logging_steps=1,
        **ON_CPU | {"use_cpu": use_cpu} | WAYS[way],
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    trainer = Counted(model, reward, args, Dataset.from_parquet(prompts), processing_class=tokenizer)
    trainer.seen, trainer.computed = [], []
    trainer.train()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "engine": str(trainer.accelerator.distributed_type),
        "computed": gather_object([trainer.computed]),
        "weights": {name: value.clone() for name, value in (weights or {}).items()},
        "log": trainer.state.log_history[0],
    }


def main() -> None:
    model, prompts, output, *words = sys.argv[1:]
    if "fsdp" in words:
        stand_in_for_gpus()
    result = {
        loss_type: {
            way: step(model, prompts, output, loss_type, way, use_cpu="cpu" in words)
            for way in WAYS
            if loss_type != "bnpo" or "tokens" not in "".join(WAYS[way])
        }
        for loss_type in words
        if loss_type not in ("cpu", "fsdp")
    }
    if torch.distributed.get_rank() == 0:
        torch.save(result, output)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
    end()
