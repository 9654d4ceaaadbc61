"""Read evaluations (report.json of `hgpo-trl evaluate`): which metrics a report shows, and how it writes numbers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes.hybrid_accuracy import STRATA
from hgpo_trl.reporting.documents import NO_BREAK

Evaluation = Mapping[str, Any]  # report.json of `hgpo-trl evaluate`
Budgets = Mapping[str, Sequence[Evaluation]]  # name of an evaluation -> others of its model, by rising `think_budget`


def number(value: Any) -> float:
    """A number of an evaluation; null, which stands for NaN, becomes NaN."""
    return math.nan if value is None else float(value)


def lookup(evaluation: Evaluation, path: str) -> Any:
    """`lookup(e, "accuracy.auto")` is `e["accuracy"]["auto"]`; KeyError where any part is missing."""
    value: Any = evaluation
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise KeyError(path)
        value = value[key]
    return value


def value_of(evaluation: Evaluation, path: str) -> float:
    """A metric; NaN where it is null, or where an evaluation of an earlier version lacks it."""
    return number(_found(evaluation, path))


def interval_of(evaluation: Evaluation, path: str) -> tuple[float, float]:
    """95 % interval of a metric; NaN on both sides where it is null."""
    low, high = _found(evaluation, f"intervals.{path}") or (None, None)
    return number(low), number(high)


def _found(evaluation: Evaluation, path: str) -> Any:
    """`lookup`; None for one of `ADDED` that an evaluation of an earlier version lacks."""
    try:
        return lookup(evaluation, path)
    except KeyError:
        if path.removeprefix("intervals.") in ADDED:
            return None
        raise


def budget_of(evaluation: Evaluation) -> int | None:
    """Its `think_budget`; reports of earlier versions have none."""
    return evaluation.get("settings", {}).get("think_budget")


def percent(value: float, decimals: int = 1) -> str:
    """ "95.0 %", or a dash for NaN."""
    return "–" if math.isnan(value) else f"{100 * value:.{decimals}f}{NO_BREAK}%"


def _tokens(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.{1 if value < 1000 else 0}f}"


def _rate(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.2f}"


def with_interval(evaluation: Evaluation, path: str, form: Callable[[float], str]) -> str:
    """ "95.0 % [93.1, 96.9]", breaking only before the bracket; without it where the interval is null."""
    low, high = (form(bound).removesuffix(f"{NO_BREAK}%") for bound in interval_of(evaluation, path))
    text = form(value_of(evaluation, path))
    return text if "–" in (low, high) else f"{text} [{low},{NO_BREAK}{high}]"


# (row of the table, path in the evaluation, format). METRICS have intervals and are repeated for every level.
METRICS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Hybrid accuracy", "hybrid_accuracy", percent),
    ("Hybrid accuracy, balanced", "balanced_hybrid_accuracy", percent),
    ("Right choice where thinking gains", "hybrid_accuracy_where.thinking_gains", percent),
    ("Right choice where it does not", "hybrid_accuracy_where.no_gain", percent),
    ("Solved by neither mode", "unsolved", percent),
    ("Thinking ratio", "thinking_ratio", percent),
    ("Accuracy: own choice", "accuracy.auto", percent),
    ("Accuracy: own choice, sampled", "accuracy.sampled", percent),
    ("Accuracy: always thinking", "accuracy.think", percent),
    ("Accuracy: never thinking", "accuracy.no_think", percent),
    ("Accuracy: oracle", "accuracy.oracle", percent),
    ("Tokens: own choice", "mean_tokens.auto", _tokens),
    ("Tokens: own choice, sampled", "mean_tokens.sampled", _tokens),
    ("Tokens: always thinking", "mean_tokens.think", _tokens),
    ("Tokens: never thinking", "mean_tokens.no_think", _tokens),
    ("Tokens: oracle", "mean_tokens.oracle", _tokens),
    ("Off-mode mass", "off_mode_mass", percent),
    ("Reflection words: answers without thinking", "reflection_words.no_think", _rate),
    ("Reflection words: answers after thinking", "reflection_words.think_answer", _rate),
    ("Reflection words: reasoning", "reflection_words.reasoning", _rate),
    ("Length of answers without thinking, relative", "answer_length_ratio", _rate),
)
# Reports of earlier versions lack these.
ADDED = (
    "balanced_hybrid_accuracy",
    "unsolved",
    *(name.replace("/", ".") for name in STRATA),
    *(f"reflection_words.{of}" for of in ("no_think", "think_answer", "reasoning")),
    "answer_length_ratio",
)
FAULTS = (
    ("Format faults, thinking", "format_faults.think", percent),
    ("Format faults, not thinking", "format_faults.no_think", percent),
    ("Truncated, thinking", "truncated.think", percent),
    ("Truncated, not thinking", "truncated.no_think", percent),
)
GROUPS = {"level": "Results by difficulty level", "domain": "Results by domain"}  # each a table of its own
SWEEPS = ("margin_sweep", "budget_sweep")  # names in a report beside those of its evaluations
THINK_BUDGET = "settings.think_budget"  # None where the reasoning may take as many tokens as the response
SETTINGS = {"dataset": "data set", "num_prompts": "number of prompts", "margin": "margin of hybrid accuracy"}
SAMPLING = {  # settings of the sampling; reports of earlier versions lack them
    "settings.split": "split",
    "settings.temperature": "temperature",
    "settings.top_p": "top-p",
    "settings.max_new_tokens": "most tokens of a response",
    "settings.max_think_tokens": "most tokens of a think response",
    "settings.max_no_think_tokens": "most tokens of a no-think response",
    THINK_BUDGET: "budget of reasoning",
}


def check_evaluation(name: str, evaluation: Evaluation) -> None:
    """UserError that names the evaluation and the first key that it lacks."""

    def require(part: Evaluation, paths: Iterable[str], prefix: str = "") -> None:
        for path in paths:
            try:
                lookup(part, path)
            except KeyError:
                raise UserError(
                    f"The evaluation {name!r} lacks {prefix + path!r}. Pass the whole report.json that "
                    "`hgpo-trl evaluate` writes; evaluate the model again if it comes from another version."
                ) from None

    metrics = [path for _, path, _ in METRICS if path not in ADDED]
    metrics += [f"intervals.{path}" for path in metrics]
    faults = [path for _, path, _ in FAULTS]
    require(evaluation, ["model", *SETTINGS, "samples_per_mode", *metrics, *faults, "by_level"])
    for group in GROUPS:
        for index, entry in enumerate(evaluation.get(f"by_{group}", [])):
            require(entry, [group, "num_prompts", *metrics], f"by_{group}[{index}].")


def labels_of(evaluations: Iterable[Evaluation], group: str) -> list[Any]:
    """Every level or domain that occurs: numbers in order, then text."""
    labels = {entry[group] for evaluation in evaluations for entry in evaluation.get(f"by_{group}", [])}
    return sorted(labels, key=lambda label: (isinstance(label, str), label))


def levels_of(evaluations: Iterable[Evaluation]) -> list[Any]:
    return labels_of(evaluations, "level")
