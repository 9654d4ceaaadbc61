"""Train the classifier that keeps reasoning queries out of the no-think part.

    hgpo-trl data classifier --config recipes/data/data_classifier.yaml

Writes the classifier to `output` and, beside it as JSON, its precision and recall on held-out rows.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hgpo_trl.common.data_files import load_data
from hgpo_trl.common.errors import UserError, run_stage
from hgpo_trl.common.files import write_json
from hgpo_trl.data.classifier import ReasoningQueryClassifier, precision_and_recall, seed_kinds, train
from hgpo_trl.scripts.recipe import RecipeParser

_THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(1, 10))


@dataclass
class DataClassifierArguments:
    """Training and test data. A source is FILE=COLUMN, or FILE=COLUMN+COLUMN for a text in several columns."""

    output: str = field(metadata={"help": "File to write, *.safetensors."})
    reasoning: list[str] = field(metadata={"help": "Sources of reasoning queries, FILE=COLUMN."})
    other: list[str] = field(metadata={"help": "Sources of general queries, FILE=COLUMN."})
    test_reasoning: list[str] = field(
        default_factory=list, metadata={"help": "Further reasoning queries to measure on, FILE=COLUMN."}
    )
    test_other: list[str] = field(
        default_factory=list, metadata={"help": "Further general queries to measure on, FILE=COLUMN."}
    )
    held_out: float = field(default=0.2, metadata={"help": "Share of the rows of each source to measure on."})
    threshold: float = field(default=0.5, metadata={"help": "Probability from which on a query is for reasoning."})
    seed: int = field(default=0, metadata={"help": "Seed of what is held out."})

    def __post_init__(self) -> None:
        for name in ("held_out", "threshold"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise UserError(f"{name} must lie between 0 and 1; got {getattr(self, name)}.")
        for name in ("reasoning", "other", "test_reasoning", "test_other"):
            for source in getattr(self, name):
                path, separator, columns = source.rpartition("=")
                if not (path and separator and all(columns.split("+"))):
                    raise UserError(f"{name}: {source!r} is not FILE=COLUMN.")
        if not (self.reasoning and self.other):
            raise UserError("reasoning and other must each name at least one source.")
        if not self.output.endswith(".safetensors"):
            raise UserError(f"output must end in .safetensors; got {self.output!r}.")


def main(argv: Sequence[str]) -> None:
    (args,) = RecipeParser(DataClassifierArguments, prog="hgpo-trl data classifier").parse_recipe(argv)
    rng = random.Random(args.seed)
    reasoning, held_reasoning = _split("reasoning", args.reasoning, args.held_out, rng)
    other, held_other = _split("other", args.other, args.held_out, rng)
    tests_reasoning = {f"{name} (held out)": texts for name, texts in held_reasoning.items()}
    tests_reasoning |= _read("test_reasoning", args.test_reasoning)
    tests_other = {f"{name} (held out)": texts for name, texts in held_other.items()}
    tests_other |= _read("test_other", args.test_other)

    classifier = train(reasoning, other, args.threshold, args.seed)
    report = measure(classifier, tests_reasoning, tests_other)
    classifier.metadata["measured"] = report["sets"]
    output = Path(args.output)
    classifier.save(output)
    write_json(output.with_suffix(".json"), classifier.metadata | {"threshold": args.threshold} | report)
    _print(classifier, report)
    print(f"{output}: {output.stat().st_size:,} bytes")


def _read(field_name: str, sources: Sequence[str]) -> dict[str, list[str]]:
    """Texts by the name of their file; blank ones are left out.

    Raises:
        UserError: there is no such file or column, two files have the same name, or there is no text.
    """
    texts: dict[str, list[str]] = {}
    for source in sources:
        path, _, columns = source.rpartition("=")
        data, names, name = load_data(field_name, path), columns.split("+"), Path(path).stem
        if missing := [column for column in names if column not in data.column_names]:
            raise UserError(
                f"{field_name}: {path} has no column {missing[0]!r}; it has {', '.join(data.column_names)}."
            )
        if name in texts:
            raise UserError(f"{field_name}: two files are named {name}.")
        rows = zip(*(data[column] for column in names), strict=True)
        texts[name] = [text for row in rows if (text := "\n".join(str(part or "") for part in row).strip())]
        if not texts[name]:
            raise UserError(f"{field_name}: {source} holds no text.")
    return texts


def _split(
    field_name: str, sources: Sequence[str], share: float, rng: random.Random
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Split texts into training and test texts; no text is in both."""
    kept: dict[str, list[str]] = {}
    held: dict[str, list[str]] = {}
    for name, texts in _read(field_name, sources).items():
        distinct = sorted(set(texts))
        rng.shuffle(distinct)
        count = max(round(share * len(distinct)), 1)
        held[name], kept[name] = distinct[:count], distinct[count:]
        if not kept[name]:
            raise UserError(f"{field_name}: {name} has too few texts to hold some out.")
    return kept, held


def measure(
    classifier: ReasoningQueryClassifier, reasoning: dict[str, list[str]], other: dict[str, list[str]]
) -> dict[str, Any]:
    """Measure the share of each set that is classified as reasoning queries, and precision and recall over all sets.

    General queries with a seed term are reported separately and count as reasoning queries, as in training.
    """
    sets: dict[str, dict[str, float]] = {}
    probabilities: dict[bool, list[np.ndarray]] = {True: [], False: []}
    parts = [(name, texts, True) for name, texts in reasoning.items()]
    for name, texts in other.items():
        parts.append((f"{name}, with a seed term", [text for text in texts if seed_kinds(text)], True))
        parts.append((f"{name}, without", [text for text in texts if not seed_kinds(text)], False))
    for name, texts, positive in parts:
        if texts:
            found = classifier.probability(texts)
            probabilities[positive].append(found)
            sets[name] = {
                "rows": len(texts),
                "reasoning": positive,
                "found": round(float((found >= classifier.threshold).mean()), 4),
            }
    positives, negatives = (np.concatenate([np.zeros(0), *probabilities[kind]]) for kind in (True, False))
    return {"sets": sets, "by_threshold": precision_and_recall(positives, negatives, _THRESHOLDS)}


def _print(classifier: ReasoningQueryClassifier, report: dict[str, Any]) -> None:
    rows = ", ".join(f"{count:,} {kind}" for kind, count in classifier.metadata["rows"].items())
    print(f"trained on {rows}\n\ntaken for reasoning queries at {classifier.threshold}:")
    for name, entry in report["sets"].items():
        wanted = "recall" if entry["reasoning"] else "false alarms"
        print(f"  {entry['found']:7.1%}  {wanted:<13} {entry['rows']:>6,} rows  {name}")
    print("\nthreshold  precision  recall")
    for row in report["by_threshold"]:
        precision = "     –" if row["precision"] is None else f"{row['precision']:6.1%}"
        print(f"{row['threshold']:9.1f}  {precision:>9}  {row['recall']:6.1%}")


if __name__ == "__main__":
    run_stage(main, "data classifier", sys.argv[1:])
