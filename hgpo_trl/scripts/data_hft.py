"""Build Stage I's data set: hybrid SFT examples in TRL's conversational prompt/completion format.

    hgpo-trl data hft --config recipes/qwen2.5-math-1.5b/data_hft.yaml

Writes `data/*.parquet` (prompt, completion, mode, source, domain, id), a dataset card, `manifest.json` and
`removed.parquet` into `output_dir`. The same command resumes an interrupted build.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.data.classifier import ReasoningQueryClassifier, no_reasoning_queries
from hgpo_trl.data.example import Step
from hgpo_trl.data.filters import verified_answers
from hgpo_trl.modes import LHRM, Mode, as_format
from hgpo_trl.modes.chat_template import FORMATS
from hgpo_trl.scripts.building import BuilderArguments, run
from hgpo_trl.scripts.recipe import RecipeParser


@dataclass
class HFTDataArguments(BuilderArguments):
    """Fields of Stage I: responses and their modes."""

    remove_reasoning_queries: bool = field(
        default=True, metadata={"help": "Drop no-think examples whose query needs reasoning (paper, section 2)."}
    )
    reasoning_threshold: float | None = field(
        default=None, metadata={"help": "Probability from which a query needs reasoning; null: the classifier's own."}
    )
    reasoning_classifier: str | None = field(
        default=None, metadata={"help": "File of `hgpo-trl data classifier`; null: the one that is installed."}
    )
    verify_answers: bool = field(
        default=True, metadata={"help": "Drop maths responses whose answer is not the reference."}
    )
    dedup_across_modes: bool = field(
        default=False, metadata={"help": "Let a query stay in one mode only, not once in each."}
    )
    mode_shares: dict[str, float] | None = field(
        default=None, metadata={"help": "think, no_think -> share (paper: 0.60, 0.40); they sum to 1."}
    )
    mode_format: dict | str | None = field(
        default=None, metadata={"help": f"Marks to write responses with: {FORMATS}; null: lhrm."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        as_format(self.mode_format or LHRM)  # or a message that says what is wrong
        if unknown := [mode for mode in self.mode_shares or () if mode not in list(Mode)]:
            raise UserError(f"mode_shares names {unknown[0]!r}; the modes are {', '.join(Mode)}.")
        if self.reasoning_threshold is not None and not 0.0 < self.reasoning_threshold < 1.0:
            raise UserError(f"reasoning_threshold must lie between 0 and 1; got {self.reasoning_threshold}.")

    def shares(self) -> dict[str, dict[str, float]]:
        return {"mode": self.mode_shares or {}, **super().shares()}


def main(argv: Sequence[str]) -> None:
    (args,) = RecipeParser(HFTDataArguments, prog="hgpo-trl data hft").parse_recipe(argv)
    mode_format = as_format(args.mode_format or LHRM)
    steps: list[tuple[str, Step]] = []
    if args.remove_reasoning_queries:
        classifier = ReasoningQueryClassifier.load(args.reasoning_classifier)
        steps.append(("reasoning_queries", no_reasoning_queries(classifier, args.reasoning_threshold)))
    if args.verify_answers:
        steps.append(("verification", verified_answers()))
    run("hft", args, steps, across_modes=args.dedup_across_modes, mode_format=mode_format)


if __name__ == "__main__":
    run_stage(main, "data hft", sys.argv[1:])
