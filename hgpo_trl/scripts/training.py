"""What the training stages share: how a model is loaded, and how a trainer is run and its result kept."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, GRPOConfig, ModelConfig, SFTConfig, get_peft_config

from hgpo_trl.chat_template import read_template
from hgpo_trl.checkpoints import SealCheckpoints, last_checkpoint
from hgpo_trl.checks import model_positions
from hgpo_trl.errors import UserError
from hgpo_trl.files import looks_like_path
from hgpo_trl.lora import ADAPTER_CONFIG, is_adapter, train_tag_rows
from hgpo_trl.model_card import write_model_card
from hgpo_trl.modes import ModeTokens
from hgpo_trl.scripts.run_dir import RUN_FILE

TrainingConfig = SFTConfig | GRPOConfig | DPOConfig


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


def check_model_path(field: str, name: str | None) -> None:
    """Check that a recipe's field names a model: a folder with a whole one, or a hub id.

    Raises:
        UserError: it is null, a folder that is not there, of a stage that has not finished, or with a LoRA adapter.
    """
    if name is None:
        raise UserError(f"{field} is missing: name a model, by path or hub id.")
    if not Path(name).is_dir() and looks_like_path(name):
        raise UserError(f"{field}={name!r}: there is no such folder. Train that model first, or fix the path.")
    check_finished(field, name)
    if is_adapter(name):
        base = json.loads((Path(name) / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise UserError(
            f"{field}={name!r} is a LoRA adapter of {base}; merge it first: "
            f"hgpo-trl merge --model {name} --output_dir {name.rstrip('/')}-merged"
        )


def check_finished(field: str, name: str) -> None:
    """UserError if a folder holds neither a whole model nor a whole adapter; a hub id passes.

    The message says which stage has not finished there, how to go on, and which checkpoint is whole.
    """
    folder = Path(name)
    if not folder.is_dir() or (found := _unfinished(folder)) is None:
        return
    checkpoint, _ = last_checkpoint(folder)
    record = folder / RUN_FILE
    if not record.is_file() and checkpoint is None:
        raise UserError(f"{field}={name!r} is not a model's folder: {found}. Name the output_dir of a training stage.")
    stage = json.loads(record.read_text(encoding="utf-8"))["stage"] if record.is_file() else "STAGE"
    command = f"hgpo-trl {'baselines ' if stage in ('rft', 'dpo') else ''}{stage}"
    further = (
        f"which goes on from {checkpoint}. For the model as it was there, name that checkpoint"
        if checkpoint
        else "which starts afresh, because there is no whole checkpoint"
    )
    raise UserError(
        f"{field}={name!r}: `{command}` has not finished there ({found}). Wait for it if it is still running. If it "
        f"was stopped, run the same command again, {further}."
    )


def _unfinished(folder: Path) -> str | None:
    """What a folder lacks of a whole model or adapter; None if it has all of it.

    In folders that our stages write, weights and tokenizer count, too: a stage can be killed while it saves them. Other
    tools' folders have many layouts.
    """
    config = next((name for name in ("config.json", ADAPTER_CONFIG) if (folder / name).is_file()), None)
    if config is None:
        return "there is no config.json in it"
    if not (folder / RUN_FILE).is_file():
        return None
    stem = "adapter_model" if config == ADAPTER_CONFIG else "model"
    weights = sorted(path for path in folder.glob(f"*{stem}*") if path.suffix in (".safetensors", ".bin"))
    if not weights:
        return "there are no weights in it"
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shards - {path.name for path in weights}):
            return f"{missing[0]} is missing"
    for path in (path for path in weights if path.suffix == ".safetensors"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return f"{path.name} is cut off"
    return None if (folder / "tokenizer_config.json").is_file() else "there is no tokenizer in it"


def lora_config(
    training_args: TrainingConfig,
    model_args: ModelConfig,
    tokens: ModeTokens,
    model: PreTrainedModel | None = None,
) -> Any:
    """The PEFT configuration of a recipe with `use_peft`, the tags' embedding rows included; None without.

    Args:
        model: the recipe's, if it is loaded already; else its modules are made up without weights.

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


def recipe_positions(training_args: TrainingConfig, model_args: ModelConfig) -> int | None:
    """Positions of a recipe's model, from its configuration alone; see `hgpo_trl.checks.model_positions`."""
    return model_positions(
        str(model_args.model_name_or_path),
        overrides=cast(dict[str, Any] | None, training_args.model_init_kwargs),
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )


def tokenizer_of(field: str, name: str | None, **kwargs: Any) -> Any:
    """The tokenizer of the model that a field names; UserError if there is no such model, or it has none."""
    check_model_path(field, name)
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}={name!r}: its tokenizer cannot be loaded: {error}") from error


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
    except BaseException:  # what went wrong is raised again; what is not lost is said
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
