"""Write one readable report on evaluations and training logs: Markdown, HTML and figures.

    hgpo-trl report --config recipes/chain-sum/report.yaml

The names are free: `hft=runs/chain-sum/eval/hft` shows that evaluation as "hft". With `report_to: wandb` the report
goes to a Weights & Biases run as well.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.reporting.examples import EXAMPLES
from hgpo_trl.reporting.report import write_report
from hgpo_trl.reporting.training_log import load_training_log
from hgpo_trl.scripts.recipe import RecipeParser


@dataclass
class ReportArguments:
    """Contents of the report."""

    evaluations: list[str] = field(metadata={"help": "NAME=FOLDER of `hgpo-trl evaluate`, in the order to show them."})
    output_dir: str = field(metadata={"help": "Folder for report.md, report.html, report.json and the figures."})
    training_runs: list[str] = field(default_factory=list, metadata={"help": "NAME=FOLDER of training runs."})
    margin_sweep: list[str] = field(
        default_factory=list, metadata={"help": "DELTA=FOLDER: evaluations of models trained with that margin."}
    )
    budget_sweep: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=FOLDER: of the evaluation NAME's model, under a think_budget each: FOLDER/*."},
    )
    title: str = field(default="Hybrid reasoning report", metadata={"help": "Heading of the report."})
    report_to: str = field(default="none", metadata={"help": "wandb: log the report there too; none."})

    def __post_init__(self) -> None:
        if self.report_to not in ("none", "wandb"):
            raise UserError(f"report_to must be none or wandb; got {self.report_to!r}.")
        for name in ("evaluations", "training_runs", "budget_sweep"):
            named_folders(name, getattr(self, name))
        _sweep(self.margin_sweep)


def named_folders(name: str, entries: list[str]) -> dict[str, Path]:
    """["hft=runs/eval/hft"] -> {"hft": Path("runs/eval/hft")}"""
    pairs = {}
    for entry in entries:
        key, separator, folder = entry.partition("=")
        if not (key and separator and folder):
            raise UserError(f"{name}: {entry!r} is not NAME=FOLDER.")
        if key in pairs:
            raise UserError(f"{name}: the name {key!r} is given twice.")
        pairs[key] = Path(folder)
    return pairs


def _sweep(entries: list[str]) -> dict[float, Path]:
    """["0.2=runs/eval"] -> {0.2: Path("runs/eval")}"""
    try:
        return {float(margin): folder for margin, folder in named_folders("margin_sweep", entries).items()}
    except ValueError as error:
        raise UserError(f"margin_sweep: every entry must be DELTA=FOLDER with a number; {error}") from None


def load_evaluation(name: str, folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    if not path.is_file():
        raise UserError(f"{name}: there is no {path}. Run `hgpo-trl evaluate --output_dir {folder}` first.")
    return json.loads(path.read_text(encoding="utf-8"))


def _budgets(entries: list[str]) -> dict[str, list[dict[str, Any]]]:
    """All evaluations in a folder for each name."""
    found = {
        name: sorted(folder.glob("*/report.json")) for name, folder in named_folders("budget_sweep", entries).items()
    }
    for entry, paths in zip(entries, found.values(), strict=True):
        if not paths:
            raise UserError(
                f"budget_sweep: {entry!r} has no folder with a report.json. Run `hgpo-trl evaluate` with "
                "--think_budget K --output_dir FOLDER/K for each budget K first."
            )
    return {name: [load_evaluation("budget_sweep", path.parent) for path in paths] for name, paths in found.items()}


def _examples(folders: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Examples of the evaluations that have some; earlier versions have written none."""
    paths = {name: folder / EXAMPLES for name, folder in folders.items()}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def _log_to_wandb(args: ReportArguments, evaluations: dict[str, dict[str, Any]]) -> None:
    """Log one run of job type "report": all metrics of the evaluations as its summary, the pictures, the HTML page."""
    import wandb

    output_dir = Path(args.output_dir)
    project = os.environ.get("WANDB_PROJECT", "huggingface")  # the Trainer's default too
    run_name = os.environ.get("WANDB_NAME", args.title)
    with wandb.init(project=project, job_type="report", name=run_name, config=vars(args)) as run:
        for name, evaluation in evaluations.items():
            lists = ("by_level", "by_subject", "by_domain", "intervals", "decision_bias_curve")
            metrics = {key: value for key, value in evaluation.items() if key not in lists}
            run.summary.update({f"report/{name}": metrics})
            if levels := evaluation["by_level"]:
                columns = ["level", "num_prompts", "hybrid_accuracy", "balanced_hybrid_accuracy", "unsolved"]
                columns += ["thinking_ratio", "off_mode_mass"]
                rows: Any = [[level.get(column) for column in columns] for level in levels]
                run.log({f"report/{name}/by_level": wandb.Table(columns=[*columns], data=rows)})
        pictures = {f"report/{path.stem}": wandb.Image(str(path)) for path in sorted(output_dir.glob("*.png"))}
        run.log({**pictures, "report/html": wandb.Html(str(output_dir / "report.html"), inject=False)})


def main(argv: Sequence[str]) -> None:
    (args,) = RecipeParser(ReportArguments, prog="hgpo-trl report").parse_recipe(argv)
    folders = named_folders("evaluations", args.evaluations)
    evaluations = {name: load_evaluation("evaluations", folder) for name, folder in folders.items()}
    sweep = {margin: load_evaluation("margin_sweep", folder) for margin, folder in _sweep(args.margin_sweep).items()}
    logs = {
        name: load_training_log(folder) for name, folder in named_folders("training_runs", args.training_runs).items()
    }
    path = write_report(
        evaluations,
        args.output_dir,
        training_logs=logs,
        margin_sweep=sweep,
        budget_sweep=_budgets(args.budget_sweep),
        examples=_examples(folders),
        title=args.title,
    )
    if args.report_to == "wandb":
        _log_to_wandb(args, evaluations)
    print(f"Report: {path} and {path.with_suffix('.html')}")


if __name__ == "__main__":
    run_stage(main, "report", sys.argv[1:])
