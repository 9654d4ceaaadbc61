"""Steps that the training stages share: load a model, run a trainer, save the result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, GRPOConfig, ModelConfig, SFTConfig, get_peft_config

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import ModeTokens
from hgpo_trl.modes.chat_template import read_template
from hgpo_trl.reporting.model_card import write_model_card
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.training.checkpoints import SealCheckpoints, last_checkpoint
from hgpo_trl.training.checks import model_positions
from hgpo_trl.training.lora import train_tag_rows
from hgpo_trl.training.model_dir import tokenizer_of
from hgpo_trl.training.precision import check_same_precision, resolve_bf16

TrainingConfig = SFTConfig | GRPOConfig | DPOConfig


def parse_training(argv: Sequence[str], prog: str, *dataclasses: type) -> tuple[Any, ...]:
    """Parse the recipe of a stage that trains, whose `bf16` may be `auto`, into one instance per dataclass.

    Args:
        dataclasses: of the recipe's fields; the second is TRL's configuration of the training.

    Raises:
        UserError: processes of the run would differ in precision.
    """
    parsed = RecipeParser(dataclasses, prog=prog, automatic={"bf16": resolve_bf16}).parse_recipe(argv)
    check_same_precision(parsed[1])
    return parsed


def model_init_kwargs(training_args: TrainingConfig, model_args: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for a recipe's model fields. Master weights are float32 by default."""
    extra: Any = training_args.model_init_kwargs or {}  # a mapping by now: the parser has read it
    if training_args.distributed_state.distributed_type != DistributedType.NO:
        # TRL's default, "auto", would spread each process's copy over all GPUs, and ZeRO-3 refuses it.
        extra = {"device_map": None, **extra}
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
        "trust_remote_code": training_args.trust_remote_code,
        **extra,
    }


def lora_config(
    training_args: TrainingConfig,
    model_args: ModelConfig,
    tokens: ModeTokens,
    model: PreTrainedModel | None = None,
) -> Any:
    """The PEFT configuration of a recipe with `use_peft`, the tags' embedding rows included; None without.

    Args:
        model: the recipe's, if it is already loaded; otherwise its modules are built without weights.

    Raises:
        UserError: DeepSpeed ZeRO-3 would have to shard single rows; or see `train_tag_rows`.
    """
    config: Any = get_peft_config(model_args)
    if config is None:
        return None
    config.revision = model_args.model_revision  # the adapter says which base model it belongs to
    if is_deepspeed_zero3_enabled():
        if not model_args.lora_modules_to_save:
            raise UserError(
                "use_peft: the tags' embedding rows cannot be trained on their own under DeepSpeed ZeRO-3, because "
                "TRL's loss needs the output embedding as a parameter. Use ZeRO-2, or train the embeddings whole "
                "(lora_modules_to_save: [embed_tokens, lm_head])."
            )
        return config
    if model is None:
        source, trust = str(model_args.model_name_or_path), training_args.trust_remote_code
        model_config = AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust)
    train_tag_rows(config, tokens, model)
    return config


def load_tokenizer(training_args: TrainingConfig, model_args: ModelConfig, **kwargs: Any) -> Any:
    """The tokenizer of a recipe's model, with the chat template that the recipe names, if it does."""
    tokenizer = tokenizer_of(
        "model_name_or_path",
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        **kwargs,
    )
    if isinstance(training_args, SFTConfig) and training_args.chat_template_path is not None:
        tokenizer.chat_template = read_template(training_args.chat_template_path)
    return tokenizer


def say_format(training_args: TrainingConfig, line: str) -> None:
    """Print what `settle_format` has found, once for all processes."""
    if line and training_args.process_index == 0:
        print(line, flush=True)


def recipe_positions(training_args: TrainingConfig, model_args: ModelConfig) -> int | None:
    """Positions of a recipe's model, from its configuration alone; see `hgpo_trl.training.checks.model_positions`."""
    return model_positions(
        str(model_args.model_name_or_path),
        overrides=cast(dict[str, Any] | None, training_args.model_init_kwargs),
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )


def _write_own_card(trainer: Any) -> None:
    """Have our model card written wherever TRL would write its own: at checkpoints, and before a push to the hub."""

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        if trainer.is_world_process_zero():
            write_model_card(trainer.args.output_dir, hub_id=trainer.hub_model_id)

    trainer.create_model_card = create_model_card


def train_and_save(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, resuming from `checkpoint` if given, and keep the result (with a card) in `output_dir`."""
    _write_own_card(trainer)
    trainer.add_callback(SealCheckpoints(trainer.args))
    if checkpoint is not None:
        trainer.accelerator.print(f"Resuming from {checkpoint}")
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:  # raised again after a note on the last checkpoint
        last, _ = last_checkpoint(Path(str(trainer.args.output_dir)))
        remedy = f"The same command goes on from {last}." if last else "There is no complete checkpoint yet."
        trainer.accelerator.print(f"Training ended early, at step {trainer.state.global_step}. {remedy}")
        raise
    trainer.save_model()
    trainer.create_model_card()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
