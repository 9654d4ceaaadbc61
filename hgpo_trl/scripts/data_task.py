"""Build the data sets and the untrained model of embedded tasks.

    hgpo-trl data task --config recipes/chain-sum/data.yaml

Writes `hft.parquet`, `hgpo.parquet` and `eval.parquet` (held-out queries) and the folder `base` (tokenizer and randomly
initialised model) into `output_dir`. Several tasks take turns; the column `domain` names a row's task. The same recipe
gives the same bytes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.common.files import make_folder
from hgpo_trl.modes import LHRM, as_format
from hgpo_trl.modes.chat_template import FORMATS
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.tasks.embedded import (
    build_model,
    build_tokenizer,
    draw_equally,
    hft_dataset,
    load_tasks,
    prompt_dataset,
)


@dataclass
class DataArguments:
    """Data sets and model to build."""

    output_dir: str = field(metadata={"help": "Folder to write to."})
    tasks: list[str] = field(
        default_factory=lambda: ["hgpo_trl.tasks.chain_sum"],
        metadata={"help": "Modules, or paths to .py files, of the tasks; each has an equal share of the rows."},
    )
    hgpo_tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Those of `tasks` that Stage II trains on; default: all."},
    )
    num_hft: int = field(default=40_000, metadata={"help": "Stage I examples."})
    think_share: float = field(default=0.6, metadata={"help": "Share of Stage I examples that think (paper: 0.60)."})
    num_hgpo: int = field(default=4_000, metadata={"help": "Stage II prompts."})
    num_eval: int = field(default=300, metadata={"help": "Held-out prompts for evaluation."})
    held_out_fraction: float = field(
        default=0.2, metadata={"help": "Share of the distinct queries kept for evaluation."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of queries and initial weights."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the model; its feed-forward is 4 times that."})
    num_layers: int = field(default=2, metadata={"help": "Layers of the model."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads of the model."})
    mode_format: dict | str | None = field(
        default=None, metadata={"help": f"Marks of the modes: {FORMATS}; null: lhrm."}
    )

    def __post_init__(self) -> None:
        as_format(self.mode_format or LHRM)  # or a message that says what is wrong
        if self.hgpo_tasks is not None:
            if not self.hgpo_tasks:
                raise UserError("hgpo_tasks is empty; name at least one of tasks, or leave it out for all of them.")
            if foreign := [name for name in self.hgpo_tasks if name not in self.tasks]:
                raise UserError(f"hgpo_tasks: {foreign[0]!r} is none of tasks={self.tasks}.")
            if len(set(self.hgpo_tasks)) < len(self.hgpo_tasks):
                raise UserError(f"hgpo_tasks={self.hgpo_tasks} names a task twice; each has an equal share anyway.")
        for name in ("num_hft", "num_hgpo", "num_eval"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("think_share", "held_out_fraction"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise UserError(f"{name} must lie between 0 and 1; got {getattr(self, name)}.")
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size={self.hidden_size} must be divisible by num_heads={self.num_heads}.")


def main(argv: Sequence[str]) -> None:
    (args,) = RecipeParser(DataArguments, prog="hgpo-trl data").parse_recipe(argv)
    tasks = load_tasks(args.tasks)
    chosen = args.hgpo_tasks or args.tasks
    hgpo_tasks = [task for name, task in zip(args.tasks, tasks, strict=True) if name in chosen]
    output_dir = Path(args.output_dir)
    make_folder(output_dir)

    mode_format = as_format(args.mode_format or LHRM)
    draw = partial(draw_equally, fraction=args.held_out_fraction)
    parts = {
        "hft": hft_dataset(
            draw(tasks, args.num_hft, held_out=False, seed=args.seed), args.think_share, args.seed, mode_format
        ),
        "hgpo": prompt_dataset(draw(hgpo_tasks, args.num_hgpo, held_out=False, seed=args.seed + 1)),
        "eval": prompt_dataset(draw(tasks, args.num_eval, held_out=True, seed=args.seed)),
    }
    for name, dataset in parts.items():
        dataset.to_parquet(output_dir / f"{name}.parquet")
        print(f"{output_dir / name}.parquet: {len(dataset):,} rows")

    tokenizer = build_tokenizer(*tasks, mode_format=mode_format)
    model = build_model(
        tokenizer,
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        num_heads=args.num_heads,
        seed=args.seed,
    )
    tokenizer.save_pretrained(output_dir / "base")
    model.save_pretrained(output_dir / "base")
    print(f"{output_dir / 'base'}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    run_stage(main, "data task", sys.argv[1:])
