"""Stage II, Hybrid Group Policy Optimization (Algorithm 1), starting from an HFT model.

    hgpo-trl hgpo --config recipes/chain-sum/hgpo.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml -m hgpo_trl.scripts.hgpo --config recipes/x/hgpo.yaml

Arguments, rewards, tokenizer and data are checked before a model is loaded.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset
from trl import ModelConfig, get_quantization_config

from hgpo_trl.common.data_files import load_data
from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.modes import mode_tokens
from hgpo_trl.modes.chat_template import FORMAT_HELP, settle_format
from hgpo_trl.rewards import load_reward
from hgpo_trl.scripts.rewards import RewardArguments, check_answers_are_there
from hgpo_trl.scripts.stages import (
    load_tokenizer,
    lora_config,
    model_init_kwargs,
    parse_training,
    recipe_positions,
    say_format,
    train_and_save,
)
from hgpo_trl.training.checks import DROP_HELP, check_prompts, dropped_rows_file, rollout_positions
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.rows import Renderer
from hgpo_trl.training.run_dir import claim_run_dir
from hgpo_trl.training.trainer import HGPOTrainer
from hgpo_trl.training.validate import check_evaluation


@dataclass
class HGPOArguments:
    """Data of Stage II."""

    train_data: str = field(metadata={"help": "Data set with `prompt` and what the rewards need: path or hub id."})
    train_split: str = field(default="train", metadata={"help": "Split of train_data."})
    eval_data: str | None = field(default=None, metadata={"help": "The same for evaluation inside training."})
    eval_split: str = field(default="train", metadata={"help": "Split of eval_data."})
    eval_prompts: int | None = field(default=None, metadata={"help": "Use only the first so many rows of eval_data."})
    drop_faulty_rows: bool = field(default=False, metadata={"help": DROP_HELP})
    mode_format: dict | str | None = field(default=None, metadata={"help": FORMAT_HELP})

    def __post_init__(self) -> None:
        if self.eval_prompts is not None and self.eval_prompts < 1:
            raise UserError(f"eval_prompts must be at least 1, or null for all of eval_data; got {self.eval_prompts}.")


def main(argv: Sequence[str]) -> None:
    script_args, training_args, model_args, reward_args = parse_training(
        argv, "hgpo-trl hgpo", HGPOArguments, HGPOConfig, ModelConfig, RewardArguments
    )
    check_evaluation(training_args, script_args.eval_data)
    rewards = [load_reward(name) for name in reward_args.reward_funcs]
    checkpoint = claim_run_dir("hgpo", training_args, script_args, model_args, reward_args)

    tokenizer = load_tokenizer(training_args, model_args, truncation_side="left", padding_side="left")
    say_format(training_args, settle_format(tokenizer, script_args.mode_format))
    tokens = mode_tokens(tokenizer)
    renderer = Renderer(tokenizer, training_args.chat_template_kwargs)
    positions = recipe_positions(training_args, model_args)

    def check(field: str, name: str, dataset: Dataset) -> Dataset:
        return check_prompts(
            f"{field}={name!r}",
            dataset,
            renderer,
            positions=rollout_positions(training_args, positions),
            max_new_tokens=training_args.max_completion_length,
            dropped=dropped_rows_file(training_args.output_dir, field) if script_args.drop_faulty_rows else None,
            is_main_process=training_args.process_index == 0,
        )

    train_dataset = load_data("train_data", script_args.train_data, script_args.train_split)
    train_dataset = check("train_data", script_args.train_data, train_dataset)
    check_answers_are_there("train_data", train_dataset, rewards, reward_args)
    eval_dataset = None
    if script_args.eval_data:
        eval_dataset = load_data("eval_data", script_args.eval_data, script_args.eval_split)
        if script_args.eval_prompts is not None:
            eval_dataset = eval_dataset.select(range(min(script_args.eval_prompts, len(eval_dataset))))
        eval_dataset = check("eval_data", script_args.eval_data, eval_dataset)
        check_answers_are_there("eval_data", eval_dataset, rewards, reward_args)

    reward_model = reward_args.build_reward_model(training_args.device, train_dataset[0]["prompt"])
    if reward_model is not None:
        reward_model.scores([train_dataset[0]["prompt"]], ["0"])  # loads it before the policy, and shows that it runs
        rewards.append(reward_model)
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    trainer = HGPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=lora_config(training_args, model_args, tokens),
    )
    train_and_save(trainer, checkpoint)


if __name__ == "__main__":
    run_stage(main, "hgpo", sys.argv[1:])
