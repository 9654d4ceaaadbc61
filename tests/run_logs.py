"""What a training run has logged, to compare it with another's."""

import json
from pathlib import Path
from typing import Any


def log_of(folder: Path) -> list[dict[str, Any]]:
    """All but the last summary, what a clock says, and what SFTTrainer counts over one process's life (num_tokens)."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [entry for entry in history if "train_runtime" not in entry]
    return [{k: v for k, v in entry.items() if k not in ("step_time", "num_tokens")} for entry in steps]
