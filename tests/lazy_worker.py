"""Train with lazy_thinking in two processes and write what was sampled, for tests/test_distributed.py.

    accelerate launch ... tests/lazy_worker.py MODEL PROMPTS OUTPUT.json [cpu] [fsdp]

Six rows per process and N = 4: the second of three groups begins in one process and ends in the other.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from conftest import well_formed_ids
from datasets import Dataset
from settings import ON_CPU
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer
from workers import end, stand_in_for_gpus

from hgpo_trl import HGPOConfig, HGPOTrainer

GROUP, STEPS = 4, 5
generate = GRPOTrainer._generate_single_turn


def reward(completion_ids: list[list[int]], prompts: list, trainer_state: Any, **kwargs: Any) -> list[float]:
    """Every other query, others at every step, is solved without thinking; else it depends on the response."""
    return [
        float(sum(ids) % 2 or random.Random(f"{prompt}/{trainer_state.global_step}").random() < 0.5)
        for ids, prompt in zip(completion_ids, prompts, strict=True)
    ]


class Recorded(HGPOTrainer):
    seen: list[dict[str, Any]]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
        for row, (prompt, prompt_mask, completion, mask, advantages) in enumerate(
            zip(*(output[key] for key in keys), strict=True)
        ):
            place = self.accelerator.process_index * len(inputs) + row
            reward = self._rollout.rewards_per_func[place].tolist()
            texts = {"query": prompt[prompt_mask.bool()].tolist(), "completion": completion[mask.bool()].tolist()}
            texts |= {"advantages": advantages[mask.bool()].tolist(), "reward": reward}
            self.seen.append(texts | {"step": self.state.global_step, "place": place})
        return output


def repaired(self: HGPOTrainer, prompt_ids: list[list[int]], *args: Any) -> Any:
    """Really sampled, then made well-formed."""
    ids, log_probs = generate(self, prompt_ids, *args)
    fillers = self._tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)])
    rows = [
        well_formed_ids([prompt[-1], *row], self.mode_tokens, fillers)
        for prompt, row in zip(prompt_ids, ids, strict=True)
    ]
    return [row[1:] for row in rows], log_probs


def main() -> None:
    model, prompts, output, *fields = sys.argv[1:]
    if "fsdp" in fields:
        stand_in_for_gpus()
    GRPOTrainer._generate_single_turn = repaired
    args = HGPOConfig(
        output_dir=str(Path(output).with_suffix("")),
        lazy_thinking=True,
        decision_weighting="uniform",
        per_device_train_batch_size=6,
        num_generations=GROUP,
        max_completion_length=8,
        max_steps=STEPS,
        learning_rate=1e-2,
        beta=0.0,
        ddp_backend="gloo",
        logging_steps=1,
        seed=0,
        **ON_CPU | {"use_cpu": "cpu" in fields},
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    trainer = Recorded(model, reward, args, Dataset.from_parquet(prompts), processing_class=tokenizer)
    trainer.seen = []
    trainer.train()
    seen = gather_object(trainer.seen)
    if trainer.accelerator.is_main_process:
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        Path(output).write_text(json.dumps({"rows": seen, "log": log}), encoding="utf-8")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
    end()
