"""Train on fixed rollouts in one or several processes and write what came of it, for tests/test_distributed.py.

    accelerate launch ... tests/parity_worker.py MODEL PROMPTS OUTPUT.json ROWS_PER_PROCESS MICRO_BATCHES

An evaluation and two optimizer steps on completions that depend on the query, the place in its group and the step
alone, so that every way of dividing the work has the same rollouts, and a step on completions that are really sampled.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from settings import ON_CPU
from transformers import PreTrainedTokenizerFast
from workers import end, stand_in_for_gpus

from hgpo_trl import HGPOConfig, HGPOTrainer
from hgpo_trl.training.advantages import DECISION_WEIGHTINGS

GROUP, FIXED_STEPS = 4, 2


def reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Varies within and between the modes."""
    return [float(sum(ids) % 3) for ids in completion_ids]


class FixedRollouts(HGPOTrainer):
    """Completions made up from the query's tokens and the row's place in its group; all else is the real thing."""

    seen: list[dict[str, Any]]

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any) -> Any:
        if self.state.global_step >= FIXED_STEPS:
            return super()._generate_single_turn(prompt_ids, *args)
        first = self.accelerator.process_index * len(prompt_ids)
        completions = []
        for row, (ids, mode) in enumerate(zip(prompt_ids, self._row_modes(len(prompt_ids)), strict=True)):
            rng = random.Random(f"{ids}/{(first + row) % GROUP}/{self.state.global_step}")
            words = [rng.randint(10, 30) for _ in range(rng.randint(2, 6) if mode == 0 else rng.randint(1, 5))]
            tags = self.mode_tokens
            think = [tags.think, words[0], tags.end_think, *words[1:]]
            completions.append(think if mode == 0 else [tags.no_think, *words, tags.end_no_think])
        return completions, None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
        for prompt, prompt_mask, completion, mask, advantages in zip(*(output[key] for key in keys), strict=True):
            row = {"query": prompt[prompt_mask.bool()].tolist(), "completion": completion[mask.bool()].tolist()}
            self.seen.append(row | {"step": self.state.global_step, "advantages": advantages[mask.bool()].tolist()})
        return output


def main() -> None:
    model, prompts, output, rows, micro_batches, *fields = sys.argv[1:]
    if "fsdp" in fields:
        stand_in_for_gpus()
    weighting = next(name for name in DECISION_WEIGHTINGS if name in fields)
    args = HGPOConfig(
        output_dir=str(Path(output).with_suffix("")),
        per_device_train_batch_size=int(rows),
        gradient_accumulation_steps=int(micro_batches),
        num_generations=GROUP,
        max_completion_length=8,
        max_steps=FIXED_STEPS + 1,
        learning_rate=1e-2,
        beta=0.04,
        eval_strategy="steps",
        eval_on_start=True,
        eval_steps=100,
        per_device_eval_batch_size=6 if "WORLD_SIZE" in os.environ else 8,
        eval_token_budget=6.0,
        no_think_cap=1.0,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        decision_weighting=weighting,
        logging_steps=1,
        seed=0,
        **ON_CPU | {"use_cpu": "cpu" in fields, "gradient_checkpointing": "checkpointing" in fields},
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    data = Dataset.from_parquet(prompts)
    trainer = FixedRollouts(model, reward, args, data, data.select(range(7)), processing_class=tokenizer)
    trainer.seen = []
    trainer.train()
    seen = gather_object(trainer.seen)
    if trainer.accelerator.is_main_process:
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        evaluation = next(entry for entry in trainer.state.log_history if "eval_hgpo/hybrid_accuracy" in entry)
        evaluation = {name: value for name, value in evaluation.items() if "hgpo/" in name}
        engine = str(trainer.accelerator.distributed_type)
        result = {"engine": engine, "processes": trainer.accelerator.num_processes, "rows": seen, "log": log}
        result["evaluation"] = evaluation
        Path(output).write_text(json.dumps(result), encoding="utf-8")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
    end()
