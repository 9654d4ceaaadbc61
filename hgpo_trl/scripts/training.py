"""What both training stages share: how a model is loaded, and how a trainer is run and its result kept."""

from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from transformers import AutoTokenizer, Trainer
from trl import GRPOConfig, ModelConfig, SFTConfig

from hgpo_trl.checkpoints import SealCheckpoints, last_checkpoint
from hgpo_trl.files import looks_like_path


def model_init_kwargs(training_args: SFTConfig | GRPOConfig, model_args: ModelConfig) -> dict[str, Any]:
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
    """ValueError if a recipe's field names no model, or a folder that is not there."""
    if name is None:
        raise ValueError(f"{field} is missing: name a model, by path or hub id.")
    if not Path(name).is_dir() and looks_like_path(name):
        raise ValueError(f"{field}={name!r}: there is no such folder. Train that model first, or fix the path.")


def load_tokenizer(training_args: SFTConfig | GRPOConfig, model_args: ModelConfig, **kwargs: Any) -> Any:
    """The tokenizer of a recipe's model."""
    check_model_path("model_name_or_path", model_args.model_name_or_path)
    return AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
        **kwargs,
    )


def train_and_save(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, resuming from `checkpoint` if given, and keep model, tokenizer, metrics and state in `output_dir`."""
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
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.accelerator.print(f"Model saved to {trainer.args.output_dir}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
