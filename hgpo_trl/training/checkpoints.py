"""Seals on finished checkpoints, so that no run resumes from a torn one.

Trainer writes a checkpoint file by file, from every process, and removes older ones before the others have finished. A
run that is killed meanwhile leaves a folder that looks like a checkpoint. Here process 0 seals each checkpoint once all
processes have written their files: it lists every file with its size. A checkpoint without a seal, or with files that
differ from it, is torn, and runs do not resume from it.

Process 0 alone writes the weights, so all processes need the same folder. Where their folders differ, `agreed_step`
finds the newest checkpoint that all of them have, or raises an error.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import write_json

SEAL = "complete.json"


class SealCheckpoints(TrainerCallback):
    """Seals every checkpoint, removes older ones only then, and logs before each so that no metric is cut in two.

    Metrics are means over the steps since the last log, and a checkpoint does not hold values gathered since then. With
    a log at every checkpoint, a resumed run logs the same metrics as an uninterrupted one.

    Args:
        args: of the trainer that gets this callback. `save_total_limit` is moved from it to the callback.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self._limit, args.save_total_limit = args.save_total_limit, None

    def _before_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        # The evaluation that decides whether it is the best comes later.
        may_be_best = args.save_strategy == SaveStrategy.BEST and control.should_evaluate
        if control.should_save or may_be_best:
            control.should_log = True
            if state.is_world_process_zero:  # a run that resumed from further back writes into the same folder again
                (_folder(args, state) / SEAL).unlink(missing_ok=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._before_save(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before_save(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            seal(_folder(args, state))
            rotate_checkpoints(
                str(args.output_dir),
                save_total_limit=self._limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file below a checkpoint, without the seal."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint whole as it is now."""
    write_json(checkpoint / SEAL, {"files": _sizes(checkpoint)})


def fault(checkpoint: Path) -> str | None:
    """Say why a checkpoint is useless for resuming; None if it is whole."""
    if not (checkpoint / SEAL).is_file():
        return f"it has no {SEAL}: the run ended while it was written"
    sealed: dict[str, int] = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
    found = _sizes(checkpoint)
    if missing := sorted(sealed.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if changed := sorted(name for name, size in sealed.items() if found[name] != size):
        return f"{changed[0]} has {found[changed[0]]:,} bytes instead of {sealed[changed[0]]:,}"
    return None if TRAINER_STATE_NAME in sealed else f"{TRAINER_STATE_NAME} is missing"


def checkpoint_faults(directory: Path) -> dict[int, str | None]:
    """List the checkpoints in a run's folder, newest first: {step: `fault` of the checkpoint}."""
    folders = {
        int(step): path
        for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and (step := path.name.rpartition("-")[2]).isdecimal()
    }
    return {step: fault(path) for step, path in sorted(folders.items(), reverse=True)}


def last_checkpoint(directory: Path) -> tuple[str | None, dict[str, str]]:
    """Find the newest whole checkpoint of a run, and the torn ones after it.

    Returns:
        Path of the checkpoint, or None if there is none; {path: fault} of newer checkpoints that have to be skipped.
    """
    torn: dict[str, str] = {}
    for step, what in checkpoint_faults(directory).items():
        path = str(directory / f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if what is None:
            return path, torn
        torn[path] = what
    return None, torn


def agreed_step(found: Sequence[Mapping[int, str | None]]) -> int | None:
    """Find the step of the newest checkpoint that is whole for all processes; each may have a folder of its own.

    Args:
        found: of every process, `checkpoint_faults` of its folder.

    Returns:
        None where no process has a whole checkpoint.

    Raises:
        UserError: some process has a whole checkpoint, but none is whole for all.
    """
    whole = [{step for step, what in of.items() if what is None} for of in found]
    common = set.intersection(*whole)
    if common:
        return max(common)
    if not any(whole):
        return None
    newest = max(set.union(*whole))
    having = next(process for process, steps in enumerate(whole) if newest in steps)
    lacking = [process for process, steps in enumerate(whole) if newest not in steps]
    name, what = f"{PREFIX_CHECKPOINT_DIR}-{newest}", found[lacking[0]].get(newest) or "it is not there"
    raise UserError(
        f"output_dir: no checkpoint is whole for all processes. {name} is for process {having}, and is not for process "
        f"{', '.join(map(str, lacking))} ({what}). Let output_dir be a folder that all nodes share. Where each has its "
        f"own, copy {name} of process {having} into the others' output_dir, over the {name} that may be there. To "
        "start afresh, remove the checkpoints on all nodes."
    )
