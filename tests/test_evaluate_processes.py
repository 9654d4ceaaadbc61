"""`hgpo-trl evaluate` in several processes: the result of one, however often and wherever it was interrupted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from settings import argv

from hgpo_trl.evaluation.parts import mixed_parts
from hgpo_trl.evaluation.processes import own_share
from hgpo_trl.scripts.evaluate import main

ROOT = Path(__file__).parents[1]
NUM_PROMPTS, PARTS = 11, 6
RESULTS = ("report.json", "samples.parquet", "examples.json")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def fields(model_dir: str, prompts: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run of six parts."""
    data = tmp_path_factory.mktemp("data") / "eval.parquet"
    prompts.to_parquet(data)
    return {
        "model": model_dir, "data": data, "num_prompts": NUM_PROMPTS, "samples_per_mode": 3, "batch_size": 7,
        "max_new_tokens": 12, "temperature": 1.0, "dtype": "float32",
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The results of one process without an interruption."""
    folder = tmp_path_factory.mktemp("alone")
    main(argv(fields | {"output_dir": folder}))
    return results(folder)


def results(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in RESULTS]


@pytest.mark.processes
def test_two_processes_give_the_result_of_one(fields: dict[str, Any], alone: list[bytes], tmp_path: Path) -> None:
    """As a user starts them; the first speaks for both."""
    words = argv(fields | {"output_dir": tmp_path / "two"})
    launcher = (
        "-m accelerate.commands.launch --config_file recipes/accelerate/cpu_ddp.yaml --main_process_port 0".split()
    )
    command = [sys.executable, *launcher, "-m", "hgpo_trl.scripts.evaluate", *words]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr[-3000:]
    assert results(tmp_path / "two") == alone
    assert run.stdout.count("hybrid accuracy") == 1
    bars = re.findall(r"sampling.*?(\d+)/(\d+)", run.stderr)
    total = str(NUM_PROMPTS * 2 * 3)
    assert bars[0] == ("0", total)
    assert bars[-1] == (total, total)
    assert bars.count(("0", total)) == 1, "one bar, for both"


@pytest.mark.processes
def test_interrupted_with_one_number_of_processes_and_resumed_with_another(
    fields: dict[str, Any], alone: list[bytes], tmp_path: Path
) -> None:
    """Two, of which one is killed; two, of which one has no space left; one, killed; two to the end."""
    deaths = "2xparts/:2,2xparts/:full,parts/:1,2x"
    words = argv(fields | {"output_dir": tmp_path / "eval"})
    command = [sys.executable, "-m", "tests.kill_evaluation", deaths, *words]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert results(tmp_path / "eval") == alone
    assert not (tmp_path / "eval" / "parts").exists()
    *starts, last = re.split(r"^killed at .*\n", run.stdout, flags=re.MULTILINE)
    files = [line.count("parts/0") for line in run.stdout.splitlines() if line.startswith("killed")]
    assert files == [4, 5, 5], "the first process drew its whole share, the second one part, then none"

    noticed = "0: hgpo-trl evaluate: error: another process of this evaluation has ended; what it has printed says why."
    assert [noticed in start for start in starts] == [True, True, False]
    assert re.search("^1: OSError: .*No space left on device", starts[1], re.MULTILINE), (
        "the fault, by the one at fault"
    )
    assert not re.search("^0: Traceback", run.stdout, re.MULTILINE)
    assert "0: 10 of 11 prompts have been sampled already" in last
    assert re.search("^0: .*hybrid accuracy", last, re.MULTILINE)
    assert not re.search("^1: ", last, re.MULTILINE)


@pytest.mark.processes
def test_memory_does_not_grow_with_the_texts() -> None:
    """The smaller evaluation fills a block already."""
    command = [
        sys.executable,
        "benchmarks/evaluation.py",
        "memory",
        "--samples_per_mode",
        "1",
        "--prompts",
        "1000",
        "3000",
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr[-3000:]
    small, large = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("{"))
    assert large["text MB"] - small["text MB"] > 25
    assert large["most MB"] - small["most MB"] < (large["text MB"] - small["text MB"]) / 2


def test_mixed_parts_share_all_lengths_and_keep_their_number(tmp_path: Path) -> None:
    lengths = [7, 1, 5, 3, 2, 6, 4]
    parts = mixed_parts(tmp_path, lengths, 3, seed=1)
    assert [[lengths[row] for row in part.prompts] for part in parts] == [[1, 4, 7], [2, 5], [3, 6]]
    assert {part.seed for part in parts} == {1}
    assert len(mixed_parts(tmp_path, lengths, 100, seed=1)) == len(lengths)
    tmp_path.joinpath(parts[1].path.name).touch()
    assert mixed_parts(tmp_path, lengths, 2, seed=1) == parts, "as the first start has divided them"


def test_a_share_of_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_share("accelerators", ["4", "5"]) == ["4"], "of a process that is alone"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_share("accelerators", ["4", "5", "6", "7"], 2) == ["6", "7"]
    message = r"on this machine need 4 accelerators, 2 each, but it has 3\. Start fewer \(accelerate launch --num_proc"
    with pytest.raises(ValueError, match=message):
        own_share("accelerators", ["4", "5", "6"], 2)
