"""Real processes: one and two of them, DDP, DeepSpeed ZeRO and FSDP2 take the same steps on the same rollouts.

What has to agree: rollouts and advantages exactly, loss and gradient norm up to fp32 rounding. What need not: with
`decision_weighting: saturating` the advantage of the decision token depends on probabilities that a forward pass of
another batch rounds differently; the KL, the entropy and the clip ratios that TRL logs are means over micro-batches,
which hold other rows; sampled completions follow each process's own random numbers.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
# DeepSpeed and FSDP on gloo where accelerate would look for GPUs
ON_CPU = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}

Result = dict[str, Any]


def launch(config: str | None, *words: str | Path) -> str:
    """Run a script in one process, or in two with one of the repository's accelerate configs; what it printed."""
    command = [sys.executable] if config is None else [*LAUNCH, "--config_file", f"recipes/accelerate/{config}.yaml"]
    environment = os.environ | ON_CPU
    done = subprocess.run(
        [*command, *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def data(prompts: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity") / "prompts.parquet"
    prompts.to_parquet(path)
    return path


@pytest.fixture(scope="module")
def parity(model_dir: str, data: Path) -> Callable[..., Result]:
    """Three steps of tests/parity_worker.py; each way of running it is run once."""
    results: dict[tuple, Result] = {}

    def run(config: str | None, rows: int, micro_batches: int, *fields: str) -> Result:
        key = (config, rows, micro_batches, *fields)
        if key not in results:
            output = data.with_name("-".join(map(str, key)) + ".json")
            launch(config, "tests/parity_worker.py", model_dir, data, output, str(rows), str(micro_batches), *fields)
            results[key] = json.loads(output.read_text(encoding="utf-8"))
        return results[key]

    return run


def fixed(result: Result) -> list[Result]:
    """The rows of the steps on fixed rollouts, in one order for all."""
    rows = [row for row in result["rows"] if row["step"] < 2]
    return sorted(rows, key=lambda row: json.dumps([row["step"], row["query"], row["completion"]]))


ENGINES = {
    "cpu_ddp": ("DistributedType.MULTI_CPU", ["cpu"]),
    "zero2": ("DistributedType.DEEPSPEED", []),
    "zero3": ("DistributedType.DEEPSPEED", []),
    "fsdp2": ("DistributedType.FSDP", ["fsdp"]),
}


@pytest.mark.parametrize(
    ("config", "one", "two"),
    [
        ("cpu_ddp", (8, 2), (8, 1)),
        ("cpu_ddp", (6, 4), (6, 2)),  # N = 4: every other group straddles the two processes
        ("zero2", (8, 2), (4, 2)),
        ("zero3", (6, 4), (6, 2)),
        ("fsdp2", (8, 2), (8, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
@pytest.mark.parametrize("weighting", ["uniform", "saturating"])
def test_two_processes_take_the_steps_of_one(
    config: str, one: tuple[int, int], two: tuple[int, int], weighting: str, parity: Callable[..., Result]
) -> None:
    engine, fields = ENGINES[config]
    if weighting == "saturating" and config != "zero3":
        pytest.skip("once, with the most different of the engines")
    alone, together = parity(None, *one, "cpu", weighting), parity(config, *two, weighting, *fields)
    assert (together["engine"], together["processes"]) == (engine, 2)
    assert len(alone["rows"]) == len(together["rows"])
    for row, other in zip(fixed(alone), fixed(together), strict=True):
        assert (row["query"], row["completion"]) == (other["query"], other["completion"])
        if weighting == "uniform":
            assert row["advantages"] == other["advantages"]
        else:
            assert row["advantages"] == pytest.approx(other["advantages"], abs=1e-5)
    for step in range(2):
        for name in ("loss", "grad_norm"):
            assert together["log"][step][name] == pytest.approx(alone["log"][step][name], rel=2e-5, abs=1e-6), name
    sampled = together["log"][2]
    assert all(value == value for value in sampled.values())  # none is NaN
    assert {row["completion"][0] for row in together["rows"] if row["step"] == 2} == {
        row["completion"][0] for row in fixed(alone)
    }
