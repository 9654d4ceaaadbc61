"""Stage I, Hybrid Fine-Tuning (Eq. 4): supervised fine-tuning on responses of both modes, loss on the response only.

    hgpo-trl hft --config recipes/chain-sum/hft.yaml
    accelerate launch --config_file recipes/accelerate/gpu.yaml -m hgpo_trl.scripts.hft --config recipes/x/hft.yaml

Every row is checked before the model is loaded (`hgpo_trl.training.checks`). The model gets the four mode tags and a
chat template that knows the modes, if it has none; `hgpo_trl.training.hft.HFTTrainer` does the rest.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import ModelConfig, SFTConfig, get_quantization_config
from trl.trainer.utils import create_model_from_path

from hgpo_trl.common.data_files import load_data
from hgpo_trl.common.errors import run_stage
from hgpo_trl.inference.decoding import set_generation_config
from hgpo_trl.modes import LHRM, add_mode_tokens, as_format, check_embeddings, mode_tokens
from hgpo_trl.modes.chat_template import FORMATS, ensure_thinking_modes, settle_format
from hgpo_trl.scripts.stages import (
    load_tokenizer,
    lora_config,
    model_init_kwargs,
    parse_training,
    recipe_positions,
    say_format,
    train_and_save,
)
from hgpo_trl.training.checks import DROP_HELP, check_examples, dropped_rows_file
from hgpo_trl.training.hft import HFTTrainer, check_sampling
from hgpo_trl.training.lora import prepare_wrapped
from hgpo_trl.training.rows import Renderer, as_trained
from hgpo_trl.training.run_dir import claim_run_dir


@dataclass
class HFTArguments:
    """Data of Stage I."""

    train_data: str = field(metadata={"help": "Data set with `prompt` and `completion`: path or hub id."})
    train_split: str = field(default="train", metadata={"help": "Split of train_data."})
    eval_data: str | None = field(default=None, metadata={"help": "The same for the evaluation loss."})
    eval_split: str = field(default="train", metadata={"help": "Split of eval_data."})
    drop_faulty_rows: bool = field(default=False, metadata={"help": DROP_HELP})
    mode_format: dict | str | None = field(
        default=None, metadata={"help": f"Marks that the examples are written with: {FORMATS}; null: lhrm."}
    )


def check(
    name: str,
    dataset: Dataset,
    training_args: SFTConfig,
    model_args: ModelConfig,
    dropped: Path | None,
    mode_format: Any = None,
) -> Dataset:
    """Check how examples are drawn, and the examples for Stage I, with the tokenizer as it will be.

    `name` and `dropped` as in `check_examples`.
    """
    check_sampling(training_args)
    return check_examples(
        name,
        dataset,
        Renderer(as_trained(load_tokenizer(training_args, model_args), mode_format)),
        max_length=training_args.max_length,
        positions=recipe_positions(training_args, model_args),
        dropped=dropped,
        is_main_process=training_args.process_index == 0,
    )


def fine_tune(
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    training_args: SFTConfig,
    model_args: ModelConfig,
    checkpoint: str | None,
    mode_format: Any = None,
) -> None:
    """Give a model the mode tags and the chat template, if it has none, train it on responses, and save it.

    With a `mode_format` of its own it keeps its tokens and its chat template.
    """
    keeps_own = as_format(mode_format or LHRM) != LHRM
    tokenizer = load_tokenizer(training_args, model_args)
    training_args.chat_template_path = None  # TRL would put it in the place of the one with the modes
    if keeps_own:
        say_format(training_args, settle_format(tokenizer, mode_format))
    else:
        ensure_thinking_modes(tokenizer)
    model = create_model_from_path(
        str(model_args.model_name_or_path),  # there is one: load_tokenizer has looked
        quantization_config=get_quantization_config(model_args),
        **model_init_kwargs(training_args, model_args),
    )
    if not keeps_own:
        add_mode_tokens(tokenizer, model)
    tokens = mode_tokens(tokenizer)
    check_embeddings(model, tokens)
    set_generation_config(model, tokenizer)

    trainer = HFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora_config(training_args, model_args, tokens, model),
    )
    if model_args.use_peft:
        prepare_wrapped(trainer.model)
    train_and_save(trainer, checkpoint)


def main(argv: Sequence[str]) -> None:
    data_args, training_args, model_args = parse_training(argv, "hgpo-trl hft", HFTArguments, SFTConfig, ModelConfig)
    checkpoint = claim_run_dir("hft", training_args, data_args, model_args)

    def load(field: str, name: str, split: str) -> Dataset:
        dropped = dropped_rows_file(training_args.output_dir, field) if data_args.drop_faulty_rows else None
        return check(
            f"{field}={name!r}",
            load_data(field, name, split),
            training_args,
            model_args,
            dropped,
            data_args.mode_format,
        )

    train_dataset = load("train_data", data_args.train_data, data_args.train_split)
    eval_dataset = load("eval_data", data_args.eval_data, data_args.eval_split) if data_args.eval_data else None
    fine_tune(train_dataset, eval_dataset, training_args, model_args, checkpoint, data_args.mode_format)


if __name__ == "__main__":
    run_stage(main, "hft", sys.argv[1:])
