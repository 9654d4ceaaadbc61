"""Put evaluations into words: the headline, comparisons and tables of a report."""

import math
from collections.abc import Callable, Iterable, Mapping

from hgpo_trl.modes import LHRM
from hgpo_trl.modes.hybrid_accuracy import STRATA
from hgpo_trl.reporting.documents import NO_BREAK, Bullets, Table, to_markdown
from hgpo_trl.reporting.evaluations import (
    FAULTS,
    METRICS,
    SAMPLING,
    SETTINGS,
    Budgets,
    Evaluation,
    budget_of,
    check_evaluation,
    labels_of,
    levels_of,
    lookup,
    percent,
    value_of,
    with_interval,
)


def _join(clauses: Iterable[str], separator: str = ", ") -> str:
    return separator.join(clause for clause in clauses if clause)


def _difference(label: str, value: float, other: float, relative: bool = False) -> str:
    """ "accuracy +3.2 points" or, relative, "tokens −51 %"; empty where a number is missing."""
    if math.isnan(value - other) or (relative and other == 0):
        return ""
    change = 100 * (value / other - 1 if relative else value - other)
    decimals, unit = (0, "%") if relative else (1, "points")
    change = round(change, decimals) + 0.0  # + 0.0: no negative zero
    return f"{label} {change:+.{decimals}f}{NO_BREAK}{unit}".replace("-", "−")


def headline(name: str, evaluation: Evaluation) -> str:
    accuracy, tokens = value_of(evaluation, "accuracy.auto"), value_of(evaluation, "mean_tokens.auto")
    always, hybrid = value_of(evaluation, "mean_tokens.think"), value_of(evaluation, "hybrid_accuracy")
    share = tokens / always if always > 0 else math.nan
    answers = "" if math.isnan(accuracy) else f"answers {percent(accuracy)} correctly"
    cost = f"{'with' if answers else 'takes'} {percent(share, 0)} of the tokens of always thinking"
    picks = f"picks the better mode for {with_interval(evaluation, 'hybrid_accuracy', percent)} of the prompts"
    gains, others = (percent(value_of(evaluation, name.replace("/", "."))) for name in STRATA)
    if "–" not in (gains, others):
        picks += f" ({gains} of those where thinking gains, {others} of the others)"
    clauses = [
        _join([answers, "" if math.isnan(share) else cost], " "),
        "" if math.isnan(hybrid) else picks,
    ]
    return f"`{name}` {_join(clauses, ' and ') or 'has no valid samples'}."


def comparisons(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Compare the last evaluation with always and never thinking and with the others, and name thinking by level."""
    *others, (name, last) = evaluations.items()
    accuracy, tokens = value_of(last, "accuracy.auto"), value_of(last, "mean_tokens.auto")
    items = []
    for mode, label in (("think", "always thinking"), ("no_think", "never thinking")):
        changes = _join(
            [
                _difference("accuracy", accuracy, value_of(last, f"accuracy.{mode}")),
                _difference("tokens", tokens, value_of(last, f"mean_tokens.{mode}"), relative=True),
            ]
        )
        items.append(changes and f"`{name}` by its own choice, against the same model {label}: {changes}.")
    for other_name, other in others:
        changes = _join(
            [
                *(
                    _difference(label, value_of(last, path), value_of(other, path))
                    for label, path in (
                        ("hybrid accuracy", "hybrid_accuracy"),
                        ("balanced", "balanced_hybrid_accuracy"),
                    )
                ),
                _difference("accuracy", accuracy, value_of(other, "accuracy.auto")),
                _difference("tokens", tokens, value_of(other, "mean_tokens.auto"), relative=True),
            ]
        )
        items.append(changes and f"`{name}` against `{other_name}`, both by their own choice: {changes}.")
    unsolved = value_of(last, "unsolved")
    if not math.isnan(unsolved):
        items.append(f"{percent(unsolved)} of the prompts are solved by neither mode of `{name}`.")
    for other_name, evaluation in evaluations.items():
        entries = {entry["level"]: entry for entry in evaluation["by_level"]}
        if len(entries) > 1:
            ends = levels_of([evaluation])[0], levels_of([evaluation])[-1]
            ratios = [with_interval(entries[level], "thinking_ratio", percent) for level in ends]
            if "–" not in ratios:
                items.append(
                    f"`{other_name}` thinks with probability {ratios[0]} at level {ends[0]} and {ratios[1]} "
                    f"at level {ends[1]}."
                )
    return [item for item in items if item]


def setting_notes(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """A warning for each setting that all evaluations have and in which they differ."""
    notes = []
    for path, label in (SETTINGS | SAMPLING).items():
        try:
            found = {name: lookup(evaluation, path) for name, evaluation in evaluations.items()}
        except KeyError:
            continue
        if len(set(found.values())) > 1:
            values = ", ".join(f"`{name}` {'none' if value is None else value}" for name, value in found.items())
            notes.append(f"Note: the evaluations differ in the {label} ({values}). Compare their numbers with care.")
    return notes


def measurement(name: str, evaluation: Evaluation) -> str:
    bias, budget = evaluation.get("decision_bias", 0.0), budget_of(evaluation)
    return (
        f"`{name}`: model `{evaluation['model']}` on `{evaluation['dataset']}`, "
        f"{evaluation['num_prompts']:,} prompts, {evaluation['samples_per_mode']} responses in each mode, "
        f"margin {evaluation['margin']:g}{f', decision bias {bias:g}' if bias else ''}"
        f"{'' if budget is None else f', budget of reasoning {budget} tokens'}{_in_format(evaluation)}."
    )


def _in_format(evaluation: Evaluation) -> str:
    """The mode format, where it is not this library's own."""
    declared = evaluation.get("mode_format", LHRM.name)
    name = declared["name"] if isinstance(declared, dict) else declared
    return "" if name == LHRM.name else f", mode format `{name}`"


def model_table(evaluations: Mapping[str, Evaluation]) -> Table:
    rows = [[label, *(with_interval(e, path, form) for e in evaluations.values())] for label, path, form in METRICS]
    rows += [[label, *(form(value_of(e, path)) for e in evaluations.values())] for label, path, form in FAULTS]
    return Table(["", *evaluations], rows)


def results_markdown(evaluations: Mapping[str, Evaluation]) -> str:
    """Render the settings and the table of results as Markdown. UserError if an evaluation lacks a key."""
    for name, evaluation in evaluations.items():
        check_evaluation(name, evaluation)
    measured = Bullets([measurement(name, evaluation) for name, evaluation in evaluations.items()])
    return to_markdown([measured, model_table(evaluations)])


def _select(*paths: str) -> list[tuple[str, str, Callable[[float], str]]]:
    return [metric for path in paths for metric in METRICS if metric[1] == path]


def group_table(evaluations: Mapping[str, Evaluation], group: str) -> Table:
    """A row for each level or domain and model."""
    modes = ("auto", "think", "no_think")
    policies = [f"{metric}.{mode}" for metric in ("accuracy", "mean_tokens") for mode in modes]
    shown = _select("hybrid_accuracy", "balanced_hybrid_accuracy", "unsolved", "thinking_ratio", *policies)
    rows = []
    for label in labels_of(evaluations.values(), group):
        for name, evaluation in evaluations.items():
            for entry in evaluation.get(f"by_{group}", []):
                if entry[group] == label:
                    numbers = [with_interval(entry, path, form) for _, path, form in shown]
                    rows.append([str(label), name, str(entry["num_prompts"]), *numbers])
    return Table([group.capitalize(), "Model", "Prompts", *(label for label, _, _ in shown)], rows, labels=2)


def sweep_table(sweep: Mapping[float, Evaluation]) -> Table:
    shown = _select(
        "hybrid_accuracy", "balanced_hybrid_accuracy", "thinking_ratio", "accuracy.auto", "mean_tokens.auto"
    )
    rows = [[f"{d:g}", *(with_interval(e, path, form) for _, path, form in shown)] for d, e in sweep.items()]
    return Table(["Training margin δ", *(label for label, _, _ in shown)], rows)


def budget_table(evaluations: Mapping[str, Evaluation], budgets: Budgets) -> Table:
    """A row for each budget and model, and one without a budget."""
    shown = _select("accuracy.think", "accuracy.auto", "accuracy.no_think", "mean_tokens.think", "mean_tokens.auto")
    rows = []
    for name, entries in budgets.items():
        for entry in (*entries, evaluations[name]):
            numbers = [with_interval(entry, path, form) for _, path, form in shown]
            budget = "none" if budget_of(entry) is None else str(budget_of(entry))
            rows.append([name, budget, *numbers, percent(value_of(entry, "truncated.think"))])
    return Table(["Model", "Budget", *(label for label, _, _ in shown), "Truncated, thinking"], rows, labels=2)
