"""Stage I, Hybrid Fine-Tuning (Eq. 4): supervised fine-tuning on responses of both modes, loss on the response only.

    hgpo-trl hft --config recipes/chain-sum/hft.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml -m hgpo_trl.scripts.hft --config recipes/x/hft.yaml

The model gets the four mode tags and a chat template that knows the modes, if it has none; TRL's SFTTrainer does the
rest.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, get_quantization_config
from trl.trainer.utils import create_model_from_path

from hgpo_trl.chat_template import has_thinking_modes, read_template, set_chat_template
from hgpo_trl.data_files import load_data
from hgpo_trl.errors import run_stage
from hgpo_trl.generate import set_generation_config
from hgpo_trl.lora import prepare_wrapped
from hgpo_trl.modes import add_mode_tokens, mode_tokens
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.scripts.run_dir import claim_run_dir
from hgpo_trl.scripts.training import load_tokenizer, lora_config, model_init_kwargs, train_and_save


@dataclass
class HFTArguments:
    """Data of Stage I."""

    train_data: str = field(metadata={"help": "Data set with `prompt` and `completion`: path or hub id."})
    train_split: str = field(default="train", metadata={"help": "Split of train_data."})
    eval_data: str | None = field(default=None, metadata={"help": "The same for the evaluation loss."})
    eval_split: str = field(default="train", metadata={"help": "Split of eval_data."})


def _load(field: str, name: str, split: str) -> Dataset:
    dataset = load_data(field, name, split)
    if missing := {"prompt", "completion"}.difference(dataset.column_names):
        raise ValueError(
            f"{field}={name!r} lacks the column {' and '.join(sorted(missing))}; its columns are "
            f"{dataset.column_names}. Rename or add what is missing: the loss is on the completion only."
        )
    return dataset


def fine_tune(
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    training_args: SFTConfig,
    model_args: ModelConfig,
    checkpoint: str | None,
) -> None:
    """Give a model the mode tags and the chat template, if it has none, train it on responses, and save it."""
    tokenizer = load_tokenizer(training_args, model_args)
    if training_args.chat_template_path is not None:
        tokenizer.chat_template = read_template(training_args.chat_template_path)
        training_args.chat_template_path = None  # TRL would put it in the place of the one with the modes
    if not has_thinking_modes(tokenizer):
        set_chat_template(tokenizer)
    model = create_model_from_path(
        str(model_args.model_name_or_path),  # there is one: load_tokenizer has looked
        quantization_config=get_quantization_config(model_args),
        **model_init_kwargs(training_args, model_args),
    )
    add_mode_tokens(tokenizer, model)
    set_generation_config(model, tokenizer)

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora_config(training_args, model_args, mode_tokens(tokenizer), model),
    )
    if model_args.use_peft:
        prepare_wrapped(trainer.model)
    train_and_save(trainer, checkpoint)


def main(argv: Sequence[str]) -> None:
    data_args, training_args, model_args = RecipeParser(
        (HFTArguments, SFTConfig, ModelConfig), prog="hgpo-trl hft"
    ).parse_recipe(argv)
    checkpoint = claim_run_dir("hft", training_args, data_args, model_args)
    train_dataset = _load("train_data", data_args.train_data, data_args.train_split)
    eval_dataset = _load("eval_data", data_args.eval_data, data_args.eval_split) if data_args.eval_data else None
    fine_tune(train_dataset, eval_dataset, training_args, model_args, checkpoint)


if __name__ == "__main__":
    run_stage(main, "hft", sys.argv[1:])
