"""A run's directory: the record of the run, and the check that a later run may go on in it."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hgpo_trl.common.differences import differences
from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import write_json
from hgpo_trl.common.fingerprints import data_fingerprint, model_fingerprint
from hgpo_trl.training.checkpoints import SEAL, agreed_step, checkpoint_faults, fault

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
RESPONSES = "responses.jsonl"  # of `hgpo-trl export`

# Settings that a resumed run may change: they say where it runs, saves and reports, not what it learns from.
_MAY_CHANGE_PREFIXES = ("ddp_", "eval_", "hub_", "log_", "logging_", "save_", "trackio_", "vllm_server_")
_MAY_CHANGE = {
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "deepspeed", "disable_tqdm", "do_eval", "local_rank", "num_completions_to_print", "num_generations_eval",
    "off_mode_warning", "output_dir", "per_device_eval_batch_size", "project", "push_to_hub", "report_to",
    "resume_from_checkpoint", "reward_model_batch_size", "run_name", "use_cpu", "vllm_gpu_memory_utilization",
}  # fmt: skip


def describe_run(stage: str, *configs: Any) -> dict[str, Any]:
    """Describe a run as JSON: {"stage": ..., field: value, ...}, and the number of processes.

    Values that JSON does not have, such as infinite numbers, are written as text.
    """
    run: dict[str, Any] = {"stage": stage}
    for config in configs:
        if isinstance(config, TrainingArguments):
            run |= config.to_dict() | {"num_processes": config.world_size}
        else:
            run |= asdict(config)
    return json.loads(json.dumps(run, default=str), parse_constant=str)


def claim_run_dir(stage: str, training_args: TrainingArguments, *configs: Any) -> str | None:
    """Claim `output_dir` for this run before anything is loaded, and record the run there (`run.json`).

    Every process checks its own folder, which may differ between nodes; then all agree on one step.

    Returns:
        The checkpoint to resume from: `resume_from_checkpoint` if it names one, else the newest one in `output_dir`
        that is whole for every process; None to start afresh. A warning names torn checkpoints that are skipped.

    Raises:
        UserError: `output_dir` holds another run's checkpoints or model (the message lists what differs),
            `resume_from_checkpoint` names no folder or a torn checkpoint, the checkpoint has no optimizer, or none is
            whole for all processes. Every process raises it.
    """
    directory = Path(str(training_args.output_dir))  # TrainingArguments has filled in a default
    run = describe_run(stage, *configs, training_args)
    requested = training_args.resume_from_checkpoint
    if requested in ("True", "true", True):
        requested = None  # the default
    found = checkpoint_faults(directory)
    problem = None
    try:
        if requested is not None:
            _check_requested(Path(requested))
        if training_args.process_index == 0:  # it writes the record and the results
            run["input_files"] = _input_files(run)
            _check_results(directory, run)
            newest = next((_checkpoint(directory, step) for step, what in found.items() if what is None), None)
            _check_has_optimizer(requested or newest)
    except UserError as error:
        problem = str(error)
    everyone: list[tuple[str | None, dict[int, str | None]]] = gather_object([(problem, found)])
    for process, (of_process, _) in enumerate(everyone):
        if of_process is not None:
            where = "" if len(everyone) == 1 or problem == of_process else f"On process {process}: "
            raise UserError(where + of_process)
    step = None if requested else agreed_step([of_process for _, of_process in everyone])
    if training_args.process_index == 0:
        write_json(directory / RUN_FILE, run)
        for skipped in [] if requested else [other for other in found if step is None or other > step]:
            what = found[skipped] or "it is not whole for all processes"
            logger.warning(f"{_checkpoint(directory, skipped)} is torn and skipped: {what}.")
    return requested if requested or step is None else _checkpoint(directory, step)


def _input_files(run: dict[str, Any]) -> dict[str, str | None]:
    """Fingerprints of the local inputs of a run by their fields: a folder's name stays when its files are made anew."""
    model = run.get("model_name_or_path")
    found = {field: data_fingerprint(run[field]) for field in ("train_data", "samples") if field in run}
    return found | {"model_name_or_path": model_fingerprint(model) if model and Path(model).is_dir() else None}


def _checkpoint(directory: Path, step: int) -> str:
    return str(directory / f"{PREFIX_CHECKPOINT_DIR}-{step}")


def _check_requested(checkpoint: Path) -> None:
    """Raise UserError unless a run can resume from a checkpoint that the user has named."""
    remedy = "Leave it out to resume from the last complete checkpoint of output_dir, or name another checkpoint-STEP."
    if not checkpoint.is_dir():
        raise UserError(f"resume_from_checkpoint={str(checkpoint)!r} is not a folder. {remedy}")
    foreign = not (checkpoint / SEAL).exists() and (checkpoint / TRAINER_STATE_NAME).is_file()
    if not foreign and (found := fault(checkpoint)):  # checkpoints of other tools have a state and no seal
        raise UserError(f"resume_from_checkpoint={str(checkpoint)!r} is torn: {found}. {remedy}")


def _check_has_optimizer(checkpoint: str | None) -> None:
    """Raise UserError if a run would go on from a model alone, with a new optimizer and the first learning rates."""
    if checkpoint is not None and not any((Path(checkpoint) / name).exists() for name in (SCHEDULER_NAME, "latest")):
        raise UserError(
            f"{checkpoint} holds the model without its optimizer (save_only_model: true), so no run can go on from it. "
            "Remove the checkpoints to start afresh, with save_only_model: false if the run may be interrupted; or "
            "name the checkpoint as model_name_or_path of another run."
        )


def claim_results(directory: Path, run: dict[str, Any]) -> None:
    """Claim a folder for a stage of one process that has no checkpoints.

    Args:
        run: `describe_run`, or the part of it that decides the results.

    Raises:
        UserError: the folder holds another run's results.
    """
    _check_results(directory, run)
    write_json(directory / RUN_FILE, run)


def _check_results(directory: Path, run: dict[str, Any]) -> None:
    """Raise UserError if a folder holds checkpoints, a model or responses of another run."""
    results = (f"{PREFIX_CHECKPOINT_DIR}-*", "config.json", "adapter_config.json", RESPONSES)
    if any(any(directory.glob(pattern)) for pattern in results):
        check_same_run(directory / RUN_FILE, run)


def is_free(key: str) -> bool:
    """Whether a resumed run may change a setting."""
    return key in _MAY_CHANGE or key.startswith(_MAY_CHANGE_PREFIXES)


def check_same_run(record: Path, run: dict[str, Any]) -> None:
    """Check that the results in a folder are those of this run.

    Args:
        record: file of that folder that describes the run that left them.

    Raises:
        UserError: there is no such file, or the runs differ; the message lists the fields that do.
    """
    directory = str(record.parent)
    remedy = "Choose another output_dir, remove this one, or use the recipe it was made with to resume it."
    if not record.is_file():
        raise UserError(f"output_dir={directory!r} holds results of an unknown run (no {record.name}). {remedy}")
    before = json.loads(record.read_text(encoding="utf-8"))
    then, now = ({key: value for key, value in settings.items() if not is_free(key)} for settings in (before, run))
    if changed := differences(then, now):
        raise UserError(f"output_dir={directory!r} holds another run's results. Changed: {changed}. {remedy}")
