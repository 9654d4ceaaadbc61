"""Checks of the model folders that recipes name: a whole model, with its tokenizer."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import looks_like_path
from hgpo_trl.training.checkpoints import last_checkpoint
from hgpo_trl.training.lora import ADAPTER_CONFIG, is_adapter
from hgpo_trl.training.run_dir import RUN_FILE


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
    """Check that a folder holds a whole model or a whole adapter; a hub id passes.

    Raises:
        UserError: it does not. The message names the unfinished stage, the remedy and the newest whole checkpoint.
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
    """Say which part of a model or an adapter a folder lacks; None if it is whole.

    Weights and tokenizer are checked only in folders that this library's stages write, because a stage can be killed
    while it saves them. Folders of other tools have many layouts.
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


def tokenizer_of(field: str, name: str | None, **kwargs: Any) -> Any:
    """Load the tokenizer of the model that a field names.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    check_model_path(field, name)
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}={name!r}: its tokenizer cannot be loaded: {error}") from error
