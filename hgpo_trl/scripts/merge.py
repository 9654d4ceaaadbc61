"""Merge a LoRA adapter into its base model, so that it serves, evaluates and trains on like any other model.

hgpo-trl merge --model runs/x/hft-lora --output_dir runs/x/hft
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import AutoConfig, PretrainedConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.inference.decoding import set_generation_config
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.training.lora import ADAPTER_CONFIG, is_adapter, load_merged
from hgpo_trl.training.model_dir import check_finished, check_model_path
from hgpo_trl.training.run_dir import RUN_FILE, claim_results, describe_run

_HOW_TO_LOAD = ("attn_implementation", "dtype", "torch_dtype")  # in a config, too, but not of the model itself
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class MergeArguments:
    """Adapter to merge."""

    model: str = field(metadata={"help": "Folder of an adapter: output_dir of a stage with use_peft, or a checkpoint."})
    output_dir: str = field(metadata={"help": "Folder for the merged model and its tokenizer."})
    base_model: str | None = field(
        default=None, metadata={"help": "Base model, path or hub id; null: the one that the adapter names."}
    )
    dtype: str = field(default="float32", metadata={"help": "Type of the merged weights: float32, bfloat16, float16."})

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}.")


def _base_config(base: str | None, revision: str | None, adapter: str) -> PretrainedConfig:
    """Load the base model's config, without its weights. Raises UserError if there is no base model."""
    remedy = f"Say with base_model where the base model of the adapter {adapter!r} is."
    if base is None:
        raise UserError(f"The adapter names no base model. {remedy}")
    if is_adapter(base):
        check_model_path("base_model", base)
    try:
        return AutoConfig.from_pretrained(base, revision=revision)
    except OSError as error:
        raise UserError(f"The base model {base!r} is not there. {remedy}") from error


def _config_changes(adapter: Path, config: PretrainedConfig) -> dict[str, Any]:
    """What the `model_init_kwargs` of an adapter's training have changed in the base model's config.

    The adapter itself does not say. Like `from_pretrained`, it takes an argument that the config has for a change.
    """
    folder = adapter.parent if adapter.name.startswith(PREFIX_CHECKPOINT_DIR) else adapter
    if not (folder / RUN_FILE).is_file():  # trained by other code than a stage's
        return {}
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    given: dict[str, Any] = run.get("model_init_kwargs") or {}
    return {name: value for name, value in given.items() if hasattr(config, name) and name not in _HOW_TO_LOAD}


def main(argv: Sequence[str]) -> None:
    (args,) = RecipeParser(MergeArguments, prog="hgpo-trl merge").parse_recipe(argv)
    check_finished("model", args.model)
    if not is_adapter(args.model):
        raise UserError(
            f"model={args.model!r} is not the folder of a LoRA adapter: there is no {ADAPTER_CONFIG} in it. Name the "
            "output_dir, or a checkpoint, of a stage that ran with use_peft; a model that was trained whole needs no "
            "merging."
        )
    output_dir = Path(args.output_dir)
    if output_dir.resolve() == Path(args.model).resolve():
        raise UserError(f"output_dir={args.output_dir!r} is the adapter's own folder. Choose another one.")
    config = PeftConfig.from_pretrained(args.model)
    base = args.base_model or config.base_model_name_or_path
    changes = _config_changes(Path(args.model), _base_config(base, config.revision, args.model))
    claim_results(output_dir, describe_run("merge", args))

    model, tokenizer = load_merged(args.model, base, config.revision, **changes)
    set_generation_config(model, tokenizer)  # as the stage gives it to a model that it trains whole
    model.to(getattr(torch, args.dtype)).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    print(f"{args.model} merged into {base} -> {output_dir}")


if __name__ == "__main__":
    run_stage(main, "merge", sys.argv[1:])
