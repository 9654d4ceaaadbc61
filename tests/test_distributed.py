"""Two real processes: groups that straddle them keep their prompts and modes together."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
from datasets import Dataset


def test_groups_straddle_two_processes(model_dir: str, prompts: Dataset, tmp_path: Path) -> None:
    """N = 4 and 6 rows per process and micro-batch: every other group begins on one process and ends on the next."""
    prompts.to_parquet(tmp_path / "prompts.parquet")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "hgpo_trl.scripts.hgpo", "--use_cpu", "true", "--ddp_backend", "gloo", "--bf16", "false"),
        *("--model_name_or_path", model_dir, "--train_data", str(tmp_path / "prompts.parquet")),
        *("--eval_data", str(tmp_path / "prompts.parquet"), "--eval_prompts", "5", "--eval_strategy", "steps"),
        *("--eval_steps", "2", "--per_device_eval_batch_size", "2", "--output_dir", str(tmp_path / "run")),
        *("--per_device_train_batch_size", "6", "--gradient_accumulation_steps", "2", "--num_generations", "4"),
        *("--max_completion_length", "8", "--max_steps", "2", "--logging_steps", "1", "--log_completions", "true"),
        *("--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--learning_rate", "1e-3"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "eval_hgpo/hybrid_accuracy" in result.stdout

    table = pd.read_parquet(tmp_path / "run" / "completions" / "completions_00001.parquet")
    assert len(table) == 24, "6 rows x 2 micro-batches x 2 processes"
    assert table["mode"].tolist() == ["think", "think", "no_think", "no_think"] * 6
    for mode, completion in zip(table["mode"], table["completion"], strict=True):
        assert completion[0]["content"].startswith(f"<{mode}>")
    for _, group in table.groupby(table.index // 4):
        assert len({prompt[0]["content"] for prompt in group["prompt"]}) == 1
