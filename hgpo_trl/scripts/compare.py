"""Compare models that have been evaluated on the same prompts: paired differences with intervals and tests.

    hgpo-trl evaluate --compare hft=runs/eval/hft hgpo=runs/eval/hgpo --output_dir runs/compare

The names are free; every model is compared with the first. Writes comparison.json, comparison.md,
comparison.html and a picture. Nothing is sampled: the folders' report.json and samples.parquet are read.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.evaluation.comparison import RESAMPLES, EvaluationOutput, compare, write_comparison
from hgpo_trl.evaluation.samples import RECORD, SAMPLES
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.scripts.report import load_evaluation, named_folders


@dataclass
class CompareArguments:
    """Evaluations to compare."""

    compare: list[str] = field(
        metadata={"help": "NAME=FOLDER of `hgpo-trl evaluate`, two or more; the others are compared with the first."}
    )
    output_dir: str = field(metadata={"help": "Folder for comparison.json, .md, .html and the picture."})
    resamples: int = field(default=RESAMPLES, metadata={"help": "Resamples of the prompts in the bootstrap."})
    seed: int = field(default=0, metadata={"help": "Seed of the resampling."})

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise UserError(f"resamples must be at least 100, better 10000; got {self.resamples}.")
        if len(named_folders("compare", self.compare)) < 2:
            raise UserError(f"compare: two evaluations or more are compared, as NAME=FOLDER; got {self.compare}.")


def _load(folder: Path) -> EvaluationOutput:
    report, samples = load_evaluation("compare", folder), folder / SAMPLES
    if not samples.is_file():
        raise UserError(f"compare: there is no {samples}. Run `hgpo-trl evaluate --output_dir {folder}` again.")
    record = folder / RECORD
    prompts = json.loads(record.read_text(encoding="utf-8")).get("prompts") if record.is_file() else None
    return EvaluationOutput(report, pd.read_parquet(samples), prompts)


def main(argv: Sequence[str]) -> None:
    (args,) = RecipeParser(CompareArguments, prog="hgpo-trl evaluate").parse_recipe(argv)
    evaluations = {name: _load(folder) for name, folder in named_folders("compare", args.compare).items()}
    path = write_comparison(compare(evaluations, args.resamples, args.seed), args.output_dir)
    print(f"Comparison: {path} and {path.with_suffix('.html')}")


if __name__ == "__main__":
    run_stage(main, "evaluate", sys.argv[1:])
