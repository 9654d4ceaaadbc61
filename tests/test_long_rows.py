"""TRL's log-probabilities in chunks are those of HGPO and HFT: memory does not grow with the logits of a row."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LENGTHS, CHUNK = (256, 1024), 256


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """MiB of a step by trainer, at each length."""
    out = tmp_path_factory.mktemp("long-rows")
    command = ["benchmarks/long_rows.py", "--lengths", *map(str, LENGTHS), "--chunk", str(CHUNK)]
    done = subprocess.run(
        [sys.executable, *command, "--output_dir", str(out)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize("trainer", ["HGPO", "HFT"])
def test_memory_does_not_grow_with_the_logits(trainer: str, peaks: list[dict[str, float]]) -> None:
    """A loss on whole logits needs them five times; what the allocator keeps varies by less than one time."""
    short, long = peaks
    assert long[trainer] - short[trainer] < 2 * (long["logits"] - short["logits"])
