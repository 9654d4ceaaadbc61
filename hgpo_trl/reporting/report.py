"""One readable report from evaluations, training logs and a margin sweep: Markdown, HTML, JSON and figures.

The text is built once, as a list of blocks (`Heading`, `Paragraph`, `Table`, ...), and rendered twice, so that
report.md and report.html cannot differ. Every number in it comes from the evaluations.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import make_folder, nan_to_null, write_atomically
from hgpo_trl.reporting.documents import (
    Block,
    Bullets,
    Heading,
    Lead,
    Paragraph,
    Picture,
    to_html,
    to_markdown,
)
from hgpo_trl.reporting.evaluations import (
    GROUPS,
    SWEEPS,
    Budgets,
    Evaluation,
    budget_of,
    check_evaluation,
    labels_of,
)
from hgpo_trl.reporting.examples import Example, example_blocks
from hgpo_trl.reporting.plots import draw_pictures
from hgpo_trl.reporting.tables import (
    budget_table,
    comparisons,
    group_table,
    headline,
    measurement,
    model_table,
    setting_notes,
    sweep_table,
)
from hgpo_trl.reporting.training_log import TrainingLog

GLOSSARY = {
    "Thinking, not thinking": (
        "the model opens its response for reasoning, reasons and then answers, or opens it for an answer and "
        "answers at once. The openings are those of its format: `<think>` and `<no_think>` in this library's own. "
        "The opening is the model's choice."
    ),
    "Own choice": (
        "the mode of the most likely opening, for each prompt. “Sampled” is what to expect when the opening is "
        "drawn at random from the model's probabilities instead. An opening of neither mode scores 0."
    ),
    "Always, never thinking": "the same model with one mode forced on every prompt.",
    "Oracle": (
        "for each prompt the better mode: the one with the higher accuracy, or the one with the shorter "
        "responses where the accuracies are equal or differ by less than the margin. It is known only "
        "afterwards, from the very responses that it is scored on, so luck flatters it somewhat."
    ),
    "Hybrid accuracy": (
        "the share of prompts for which the model's own choice is the oracle's. Where neither mode ever succeeds the "
        "shorter one is the better one, so that a model without any skill that never thinks scores high. The next "
        "four rows show whether the figure can be trusted."
    ),
    "Hybrid accuracy, balanced": (
        "the mean of two shares: how often the choice is right on the prompts where thinking gains (its accuracy is "
        "higher, by the margin or more), and how often on all others. Never or always thinking scores 50 % on it, or "
        "less. A dash means that one of the two parts has no prompt."
    ),
    "Solved by neither mode": (
        "the share of prompts on which neither mode has a mean score of at least 1/2: with answers that are right or "
        "wrong, those that both modes get wrong more often than right."
    ),
    "Thinking ratio": "the mean probability that the model thinks.",
    "Off-mode mass": "the mean probability that a response begins in neither mode.",
    "Reflection words": (
        "words of somebody who is thinking, such as “wait”, “let me” or “step by step”, per response. More of them in "
        "answers without thinking than in answers after thinking mean that reasoning leaks into what should be an "
        "answer at once; those in the reasoning show how well the list fits the model."
    ),
    "Length of answers without thinking, relative": (
        "characters of the answer without thinking, divided by those of the answer after thinking to the same prompt. "
        "Well above 1 is the other sign of leaked reasoning."
    ),
    "Format faults": "the share of responses with broken, missing or misplaced tags.",
    "Truncated": "the share of responses that reached the length limit before their end.",
    "95 % interval, in brackets": (
        "how far the number might move with other prompts of the same kind (bootstrap over prompts)."
    ),
    "HFT, HGPO": (
        "the two training stages. Hybrid fine-tuning teaches both formats from examples; hybrid group "
        "policy optimization then teaches by reward which one to choose."
    ),
}


def _check_budgets(evaluations: Mapping[str, Evaluation], budgets: Budgets) -> None:
    """Raise UserError unless all are evaluations of a model that is shown, each under another budget."""
    for name, entries in budgets.items():
        if name not in evaluations:
            raise UserError(
                f"budget_sweep: {name!r} is none of the evaluations ({', '.join(evaluations)}). Name the one of the "
                "same model without a budget."
            )
        found = [budget_of(entry) for entry in entries]
        for budget, entry in zip(found, entries, strict=True):
            check_evaluation(f"budget_sweep {name}, budget {budget}", entry)
            if budget is None or found.count(budget) > 1:
                raise UserError(
                    f"budget_sweep: {name!r} has an evaluation {'without' if budget is None else 'too many with'} "
                    f"think_budget{'' if budget is None else f'={budget}'}. Give one evaluation for each budget."
                )
            if entry["model"] != evaluations[name]["model"]:
                raise UserError(
                    f"budget_sweep: {name!r} is the model {evaluations[name]['model']!r}, but its evaluation with "
                    f"think_budget={budget} is of {entry['model']!r}. Give evaluations of one model under one name."
                )


def _unlimited(evaluation: Evaluation) -> Evaluation:
    """The same, as if it had no `think_budget`."""
    return {**evaluation, "settings": {**evaluation["settings"], "think_budget": None}}


def _blocks(
    title: str,
    evaluations: Mapping[str, Evaluation],
    sweep: Mapping[float, Evaluation],
    budgets: Budgets,
    pictures: Sequence[Picture],
    examples: Mapping[str, Sequence[Example]],
) -> list[Block]:
    name, last = list(evaluations.items())[-1]
    everything = {**evaluations, **{f"δ = {margin:g}": evaluation for margin, evaluation in sweep.items()}}
    limited = {f"{name}, budget {budget_of(entry)}": entry for name, entries in budgets.items() for entry in entries}
    blocks: list[Block] = [
        Heading(title, level=1),
        Lead(headline(name, last)),
        *(Bullets(items) for items in [comparisons(evaluations)] if items),
        *(Paragraph(note) for note in setting_notes(everything)),
        *(Paragraph(note) for note in setting_notes({name: _unlimited(entry) for name, entry in limited.items()})),
        Heading("What was measured"),
        Paragraph(
            "With the opening of its response, each model chooses for each prompt whether it thinks or answers at "
            "once. To see whether it chooses well, every prompt was answered in both modes and every response was "
            "scored. The model's own choice is then compared with always thinking, with never thinking and with an "
            "oracle that knows the better mode of each prompt."
        ),
        Bullets([measurement(name, evaluation) for name, evaluation in (everything | limited).items()]),
        Heading("Results"),
        Paragraph(
            "Tokens are means per response. Brackets are 95 % intervals; a dash means that there is no valid number."
        ),
        model_table(evaluations),
    ]
    for group, heading in GROUPS.items():
        if len(labels_of(evaluations.values(), group)) > (group == "domain"):  # a single domain is the whole
            blocks += [Heading(heading), group_table(evaluations, group)]
    if sweep:
        blocks += [Heading("Results by training margin"), sweep_table(sweep)]
    if budgets:
        blocks += [Heading("Results by budget of reasoning"), budget_table(evaluations, budgets)]
    glossary = Bullets([f"{term}: {meaning}" for term, meaning in GLOSSARY.items()])
    return [*blocks, Heading("Figures"), *pictures, *example_blocks(examples), Heading("Glossary"), glossary]


def write_report(
    evaluations: Mapping[str, Evaluation],
    output_dir: str | os.PathLike[str],
    *,
    training_logs: Mapping[str, TrainingLog] | None = None,
    margin_sweep: Mapping[float, Evaluation] | None = None,
    budget_sweep: Mapping[str, Sequence[Evaluation]] | None = None,
    examples: Mapping[str, Sequence[Example]] | None = None,
    title: str = "Hybrid reasoning report",
) -> Path:
    """Write report.md, report.html (self-contained), report.json and the figures they show.

    Args:
        evaluations: name -> report.json of `hgpo-trl evaluate`, in the order to show them. The headline is
            about the last one. `None` or NaN stands for a number that does not exist.
        output_dir: created if missing. An evaluation's own folder would lose its report.json.
        training_logs: name -> `load_training_log(...)`; drawn by optimizer step.
        margin_sweep: training margin δ -> evaluation of the model trained with it.
        budget_sweep: name of one of `evaluations` -> evaluations of the same model, each under another `think_budget`.
        examples: name -> examples.json of `hgpo-trl evaluate`, in the order of `evaluations`; those of the last one
            are shown, with the choices of the others.
        title: heading of the report.

    Returns:
        Path of report.md. Identical input gives identical bytes in every file.

    Raises:
        UserError: `evaluations` is empty, one lacks a key, or one is named "margin_sweep" or "budget_sweep"; or an
            evaluation in `budget_sweep` is of another model or has no budget of its own.
    """
    if not evaluations:
        raise UserError("evaluations is empty. Name at least one report.json that `hgpo-trl evaluate` has written.")
    for name in SWEEPS:
        if name in evaluations:
            raise UserError(f"evaluations: the name {name!r} is taken by a key of report.json. Choose another one.")
    sweep = dict(sorted((margin_sweep or {}).items()))
    for name, evaluation in evaluations.items():
        check_evaluation(name, evaluation)
    for margin, evaluation in sweep.items():
        check_evaluation(f"margin_sweep[{margin:g}]", evaluation)
    _check_budgets(evaluations, budget_sweep or {})
    budgets = {name: sorted(entries, key=lambda e: budget_of(e) or 0) for name, entries in (budget_sweep or {}).items()}

    pictures = draw_pictures(evaluations, training_logs or {}, sweep, budgets)
    blocks = _blocks(title, evaluations, sweep, budgets, pictures, examples or {})
    data: dict[str, Any] = dict(evaluations)
    if sweep:
        data["margin_sweep"] = [{"train_margin": margin, **evaluation} for margin, evaluation in sweep.items()]

    if budgets:
        data["budget_sweep"] = budgets

    output = Path(output_dir)
    make_folder(output)
    for picture in pictures:
        write_atomically(output / picture.file, picture.png)
    text = json.dumps(nan_to_null(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomically(output / "report.json", f"{text}\n".encode())
    write_atomically(output / "report.html", to_html(title, blocks).encode())
    write_atomically(output / "report.md", to_markdown(blocks).encode())
    return output / "report.md"
