"""How commands end on a user's error, and what is none: the same however they were started."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from refusals import refused
from torch import distributed

from hgpo_trl.common.errors import MissingPackageError, ServerError, UnsupportedError, UserError, run_stage

ROOT = Path(__file__).parents[1]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]
ENTRIES = {
    "hgpo-trl": [sys.executable, "-m", "hgpo_trl.cli", "report"],
    "python -m": [sys.executable, "-m", "hgpo_trl.scripts.report"],
    "accelerate launch": [*ACCELERATE, "-m", "hgpo_trl.scripts.report"],
}


@pytest.mark.parametrize("kind", [UserError, MissingPackageError, ServerError, UnsupportedError])
def test_a_users_error_is_one_message(kind: type[UserError]) -> None:
    def main(argv: Sequence[str]) -> None:
        raise kind("samples='x': there is no such folder. Fix the path.")

    with refused(r"samples='x': there is no such folder\. Fix the path\.\n"):
        run_stage(main, "baselines", ["dpo", "--samples", "x"])


def test_kinds_of_users_errors_are_what_python_calls_them() -> None:
    assert issubclass(MissingPackageError, ImportError)
    assert issubclass(ServerError, ConnectionError)
    assert issubclass(UnsupportedError, NotImplementedError)


def test_a_fault_inside_the_package_keeps_its_traceback() -> None:
    """Also a ValueError that is raised by a line of ours."""

    def main(argv: Sequence[str]) -> None:
        list(zip([1], [], strict=True))

    with pytest.raises(ValueError, match="shorter than argument 1"):
        run_stage(main, "hft", [])


@pytest.mark.processes
@pytest.mark.parametrize(
    ("entry", "more", "words"),
    [
        *((entry, "--title=x", "evaluations: there is no nowhere/report.json") for entry in ENTRIES),
        ("python -m", "--titel=x", "unknown argument '--titel=x'; did you mean '--title'?"),
    ],
)
def test_every_entry_ends_alike(entry: str, more: str, words: str, tmp_path: Path) -> None:
    """The command line is read, or the stage has begun."""
    command = [*ENTRIES[entry], "--evaluations", "a=nowhere", "--output_dir", str(tmp_path), more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    own, _, launcher = done.stderr.partition("Traceback")
    (message,) = (line for line in own.splitlines() if line.startswith("hgpo-trl report: error: "))
    assert words in message
    if entry == "accelerate launch":  # says itself that the process which it started has failed
        assert "CalledProcessError" in launcher
        assert done.returncode == 1
    else:
        assert (launcher, done.returncode) == ("", 2)


@pytest.mark.processes
@pytest.mark.parametrize("ranks", ["01", "1"], ids=["all processes", "one of them"])
def test_of_several_processes_one_says_it_and_all_end(ranks: str) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command = [*launch, "tests/refusing_worker.py", f"--ranks={ranks}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("hgpo-trl hgpo: error: margin=x is no number. Give one.") == 1
    assert 'raise UserError("margin' not in done.stderr, "a traceback"


def test_a_stage_leaves_its_process_group() -> None:
    def main(argv: Sequence[str]) -> None:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)

    run_stage(main, "hft", [])
    assert not distributed.is_initialized()


@pytest.mark.processes
def test_a_recipes_env_is_refused_as_a_users_error(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("env: {PYTHONHASHSEED: 0}", encoding="utf-8")
    for entry in (["-m", "hgpo_trl.cli", "report"], ["-m", "hgpo_trl.scripts.report"], ["-mhgpo_trl.scripts.report"]):
        command = [sys.executable, *entry, "--config", str(recipe)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert done.stderr.startswith("hgpo-trl report: error: ")
