"""`hgpo-trl demo`: run the whole method on an embedded task, in the current folder.

Data, Stage I, Stage II, the evaluation of both models and the report, each in a process of its own, on the CPU or on
one GPU. What they write is in `runs/RECIPE`.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.common.recipe_files import find_recipe, package_recipes, recipe_names

# One process per core pays for a model of a hundred thousand parameters; OpenMP threads only wait for each other.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "0"}


def commands(recipe: str) -> Iterator[tuple[str, list[str]]]:
    """Heading and words after `hgpo-trl` of every command of the demo, in order.

    Args:
        recipe: folder of recipes, such as `chain-sum`.

    Raises:
        UserError: a stage has no recipe there.
    """
    run = Path("runs") / recipe
    config = {stage: _config(recipe, stage) for stage in ("data", "hft", "hgpo", "evaluate", "report")}
    yield "data", ["data", *config["data"]]
    yield "train-hft", ["hft", *config["hft"]]
    yield "train-hgpo", ["hgpo", *config["hgpo"]]
    for model in ("hft", "hgpo"):
        folders = ["--model", str(run / model), "--output_dir", str(run / "eval" / model)]
        yield "evaluate", ["evaluate", *config["evaluate"], *folders]
    yield "report", ["report", *config["report"]]


def _config(recipe: str, stage: str) -> list[str]:
    path = find_recipe(f"{recipe}/{stage}")
    if path is None:
        whole = sorted(name.removesuffix("/data") for name in recipe_names(package_recipes()) if name.endswith("/data"))
        raise UserError(f"--recipe {recipe}: there is no recipe {recipe}/{stage}. Name one of {', '.join(whole)}.")
    return ["--config", str(path)]


def main(argv: Sequence[str]) -> None:
    """Run the demo's commands; the first one that fails ends it, with its status."""
    parser = argparse.ArgumentParser("hgpo-trl demo", allow_abbrev=False, description=__doc__)
    parser.add_argument("--recipe", default="chain-sum", help="folder of recipes of an embedded task")
    recipe = parser.parse_args(argv).recipe
    shown = None
    for heading, words in list(commands(recipe)):
        if heading != shown:
            print(f"\n=== {heading} ===", flush=True)
            shown = heading
        done = subprocess.run([sys.executable, "-m", "hgpo_trl.cli", *words], env=_ENVIRONMENT | os.environ)
        if done.returncode:
            sys.exit(done.returncode)
    print(f"\nRead runs/{recipe}/report/report.html")


if __name__ == "__main__":
    run_stage(main, "demo", sys.argv[1:])
