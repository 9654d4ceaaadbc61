"""Read the log of a training run."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hgpo_trl.common.errors import UserError
from hgpo_trl.reporting.evaluations import number

Array = NDArray[np.float64]
TrainingLog = Sequence[Mapping[str, Any]]  # `log_history` of a Trainer


def load_training_log(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """`log_history` of a training run: one dict per logged step.

    Args:
        run_dir: a Trainer's `output_dir`. Its trainer_state.json is read, else that of its newest checkpoint.

    Raises:
        UserError: neither exists.
    """
    root = Path(run_dir)
    checkpoints = [path for path in root.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    newest_first = sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for folder in (root, *newest_first):
        state = folder / "trainer_state.json"
        if state.is_file():
            return json.loads(state.read_text(encoding="utf-8"))["log_history"]
    raise UserError(
        f"run_dir={str(run_dir)!r} has no trainer_state.json, nor has a checkpoint-* in it. Pass the "
        "output_dir of a training run that saved its state or a checkpoint (save_strategy other than 'no')."
    )


def series_of(log: TrainingLog, key: str) -> tuple[Array, Array]:
    """Steps and values of the entries that have a number under `key` (both `[n]`)."""
    points = [(entry["step"], number(entry[key])) for entry in log if key in entry and "step" in entry]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps[~np.isnan(values)], values[~np.isnan(values)]
