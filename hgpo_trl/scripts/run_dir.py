"""A run's directory: what was run there, and whether this run may go on in it."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

RUN_FILE = "run.json"

# What a resumed run may change: where it runs and what it reports, not what it computes.
_FREE = {
    "dataloader_num_workers", "ddp_backend", "deepspeed", "disable_tqdm", "eval_steps", "eval_strategy", "hub_token",
    "log_completions", "logging_dir", "logging_first_step", "logging_steps", "num_completions_to_print", "push_to_hub",
    "report_to", "resume_from_checkpoint", "run_name", "save_steps", "save_strategy", "save_total_limit", "use_cpu",
}  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def describe_run(stage: str, *configs: Any) -> dict[str, Any]:
    """Everything that was configured, as JSON: {"stage": ..., field: value, ...}."""
    run: dict[str, Any] = {"stage": stage}
    for config in configs:
        fields = config.to_dict() if isinstance(config, TrainingArguments) else asdict(config)
        run |= fields
    return json.loads(json.dumps(run, default=str))


def claim_run_dir(stage: str, training_args: TrainingArguments, *configs: Any) -> str | None:
    """Take `output_dir` for this run, before anything is loaded, and note there what is run (`run.json`).

    Returns:
        The checkpoint to resume from: `resume_from_checkpoint` if it names one, else the last one of `output_dir` if
        this very run has left it; None to start afresh.

    Raises:
        ValueError: `output_dir` holds another run's checkpoints or model; the message lists what differs.
    """
    directory = Path(training_args.output_dir)
    run = describe_run(stage, *configs, training_args)
    last = get_last_checkpoint(str(directory)) if directory.is_dir() else None
    if last is not None or (directory / "config.json").exists():
        _check_same_run(directory, run)
    if training_args.process_index == 0:
        write_json(directory / RUN_FILE, run)
    requested = training_args.resume_from_checkpoint
    return requested if isinstance(requested, str) and requested not in ("True", "true") else last


def _check_same_run(directory: Path, run: dict[str, Any]) -> None:
    remedy = "Choose another output_dir, remove this one, or use the recipe it was made with to resume it."
    path = directory / RUN_FILE
    if not path.is_file():
        raise ValueError(f"output_dir={str(directory)!r} holds a model or checkpoints of an unknown run (no {RUN_FILE}). {remedy}")
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(
        key for key in before.keys() | run.keys() if key not in _FREE and before.get(key) != run.get(key)
    )
    if changed:
        listing = ", ".join(f"{key}: {before.get(key)!r} -> {run.get(key)!r}" for key in changed)
        raise ValueError(f"output_dir={str(directory)!r} holds another run's results. Changed: {listing}. {remedy}")


