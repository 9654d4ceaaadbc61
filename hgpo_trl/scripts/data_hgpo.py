"""Build Stage II's data set: prompts, with a reference answer where there is one.

    hgpo-trl data hgpo --config recipes/qwen2.5-math-1.5b/data_hgpo.yaml

Writes `data/*.parquet` (prompt, answer, domain, level, source, id; with a `difficulty_model` also pass_rate_think and
pass_rate_no_think), a dataset card, `manifest.json` and `removed.parquet` into `output_dir`. The same command resumes
an interrupted build.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from hgpo_trl.common.errors import run_stage
from hgpo_trl.data.example import Drop
from hgpo_trl.evaluation.difficulty import DifficultyArguments, check_model, measure, pass_rates, verdicts
from hgpo_trl.scripts.building import BuilderArguments, run
from hgpo_trl.scripts.recipe import RecipeParser


@dataclass
class HGPODataArguments(DifficultyArguments, BuilderArguments):
    """Fields of Stage II: difficulty."""

    def __post_init__(self) -> None:
        if self.tokenizer is None:  # prompts that the difficulty model's template refuses are dropped, as any others
            self.tokenizer = self.difficulty_model
        BuilderArguments.__post_init__(self)
        DifficultyArguments.__post_init__(self)


def main(argv: Sequence[str]) -> None:
    (args,) = RecipeParser(HGPODataArguments, prog="hgpo-trl data hgpo").parse_recipe(argv)
    check_model(args)

    def by_difficulty(prompts: Dataset, work: Path) -> tuple[list[Drop | None], dict[str, NDArray[np.float64]]]:
        rewards = measure(prompts, args, work, args.seed)
        think, no_think = pass_rates(rewards).T
        return verdicts(rewards, args.difficulty_margin), {"pass_rate_think": think, "pass_rate_no_think": no_think}

    run("hgpo", args, finish=by_difficulty if args.difficulty_model else None)


if __name__ == "__main__":
    run_stage(main, "data hgpo", sys.argv[1:])
