"""A run that was cut anywhere ends as if it had not been: same weights, same log."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from run_logs import log_of
from settings import ON_CPU, argv

from hgpo_trl.modes import Mode, format_response
from hgpo_trl.scripts import hft, hgpo
from hgpo_trl.training.checkpoints import SEAL

Fields = dict[str, Any]

COMMON: Fields = ON_CPU | {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "seed": 3,
}
STAGES: dict[str, Fields] = {
    "hgpo": {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6, "beta": 0.01},
    "hft": {"per_device_train_batch_size": 4, "max_length": 64},
}


def same_end(folder: Path, other: Path) -> None:
    assert log_of(folder) == log_of(other)
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def train_data(prompts: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Eight rows for either stage, so that a few steps are several epochs."""
    folder = tmp_path_factory.mktemp("resume")
    rows = prompts.select(range(8))
    rows.to_parquet(folder / "hgpo.parquet")
    rows.map(
        lambda row: {"completion": [{"role": "assistant", "content": format_response(Mode.NO_THINK, row["answer"])}]}
    ).select_columns(["prompt", "completion"]).to_parquet(folder / "hft.parquet")
    return {stage: str(folder / f"{stage}.parquet") for stage in STAGES}


@pytest.fixture
def run(model_dir: str, train_data: dict[str, str]) -> Callable[..., Path]:
    """A stage's own main, in this process."""

    def run(stage: str, folder: Path, **fields: Any) -> Path:
        main = {"hft": hft.main, "hgpo": hgpo.main}[stage]
        base = {"model_name_or_path": model_dir, "train_data": train_data[stage], "output_dir": folder}
        main(argv(base | COMMON | STAGES[stage] | fields))
        return folder

    return run


@pytest.mark.parametrize(
    ("stage", "fields", "steps"),
    [
        ("hft", {"max_steps": 5}, [1, 2, 3]),  # two steps an epoch
        (
            "hft",
            {"max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
            | {"train_sampling_strategy": "batch_rebalance"},
            [1, 3],
        ),
        ("hgpo", {"max_steps": 9}, [1, 4, 6]),  # four steps an epoch: within, at and after a boundary
        ("hgpo", {"max_steps": 6, "num_iterations": 2, "steps_per_generation": 2}, [1, 2, 3]),  # amid a rollout
        (
            "hgpo",
            {"max_steps": 6, "num_iterations": 2, "steps_per_generation": 2, "lazy_thinking": True, "margin": 1.0},
            [1, 3],
        ),
        ("hgpo", {"max_steps": 7, "logging_steps": 3, "save_steps": 2}, [2, 4]),  # amid a mean of several steps
    ],
    ids=["hft", "hft by length", "hgpo", "amid a rollout", "amid a lazy rollout", "amid a mean"],
)
def test_resumed_run_equals_the_uninterrupted_one(
    stage: str, fields: Fields, steps: list[int], run: Callable[..., Path], tmp_path: Path
) -> None:
    whole = run(stage, tmp_path / "whole", **fields)
    assert len({json.dumps(entry) for entry in log_of(whole)}) == len(log_of(whole)) >= 4, "every step is another"
    for step in steps:
        checkpoint = whole / f"checkpoint-{step}"
        same_end(run(stage, tmp_path / str(step), resume_from_checkpoint=checkpoint, **fields), whole)


def test_epochs_differ_in_their_order(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run("hgpo", tmp_path, max_steps=8, log_completions=True)
    orders = []
    for epoch in range(2):
        tables = [
            folder / "completions" / f"completions_{step:05d}.parquet" for step in range(4 * epoch + 1, 4 * epoch + 5)
        ]
        orders.append([row[0]["content"] for table in tables for row in Dataset.from_parquet(str(table))["prompt"]])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_older_checkpoints_go_only_when_the_new_one_is_whole(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hgpo_trl.training.checkpoints.seal", dies)
        with pytest.raises(KeyboardInterrupt):
            run("hgpo", tmp_path, max_steps=1, save_total_limit=1)
    assert not (tmp_path / "checkpoint-1" / SEAL).exists()
    run("hgpo", tmp_path, max_steps=1, save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / SEAL).exists()


def test_a_run_that_fails_says_what_is_left(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reward.py").write_text(
        "calls = 0\n\n\ndef fails(completions, **kwargs):\n    global calls\n    calls += 1\n"
        "    if calls > 2:\n        raise ValueError('the judge is gone')\n    return [0.5] * len(completions)\n",
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="the judge is gone"):
        run("hgpo", tmp_path / "run", max_steps=4, reward_funcs=f"{tmp_path}/reward.py:fails")
    said = capsys.readouterr().out
    assert "Training ended early, at step 2. The same command goes on from" in said
    assert "checkpoint-2." in said


KILLER = Path(__file__).with_name("kill_and_resume.py")


@pytest.mark.processes
@pytest.mark.parametrize("stage", ["hgpo", "hft"])
def test_killed_ten_times_nothing_is_lost(
    stage: str, model_dir: str, train_data: dict[str, str], run: Callable[..., Path], tmp_path: Path
) -> None:
    """Ten SIGKILLs: in random steps, and at random changes to the files of the checkpoints."""
    fields = {"max_steps": 70, "save_total_limit": 2}
    whole = run(stage, tmp_path / "whole", **fields)
    base = {"model_name_or_path": model_dir, "train_data": train_data[stage], "output_dir": tmp_path / "killed"}
    words = argv(base | COMMON | STAGES[stage] | fields)
    result = subprocess.run([sys.executable, KILLER, stage, "10", *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert len(re.findall(r"^kill \d+: ", result.stdout, re.MULTILINE)) == 10
    same_end(tmp_path / "killed", whole)
