"""Write a model's card from its run and its evaluation, and push the model with it to the hub if asked to.

    hgpo-trl card --model runs/chain-sum/hgpo --report runs/chain-sum/report
    hgpo-trl card --model runs/chain-sum/hgpo --report runs/chain-sum/report --push_to_hub me/chain-sum-hgpo

Pushing needs a login (`hf auth login`, or HF_TOKEN).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hgpo_trl.common.errors import run_stage
from hgpo_trl.reporting.model_card import write_model_card
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.training.model_dir import check_finished

NOT_PUSHED = [f"{PREFIX_CHECKPOINT_DIR}-*", ".*", "_*", "training_args.bin"]  # the last one is a pickle


@dataclass
class CardArguments:
    """Model and contents of its card."""

    model: str = field(metadata={"help": "Folder of the model: output_dir of a training stage."})
    report: str | None = field(
        default=None, metadata={"help": "Folder of `hgpo-trl report` or `hgpo-trl evaluate`, for its metrics."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub id to push the model to; null: nowhere."})


def main(argv: Sequence[str]) -> None:
    (args,) = RecipeParser(CardArguments, prog="hgpo-trl card").parse_recipe(argv)
    folder = Path(args.model)
    check_finished("model", args.model)
    path = write_model_card(folder, report=args.report, hub_id=args.push_to_hub)
    print(f"Model card: {path}")
    if args.push_to_hub:
        api = HfApi()
        api.create_repo(args.push_to_hub, exist_ok=True)
        pushed = api.upload_folder(
            repo_id=args.push_to_hub, folder_path=folder, commit_message="Upload model", ignore_patterns=NOT_PUSHED
        )
        print(f"Pushed: {pushed}")


if __name__ == "__main__":
    run_stage(main, "card", sys.argv[1:])
