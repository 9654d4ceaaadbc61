"""The page of `make compare-rules`: the rules for learning when to think at equal rollout tokens.

    python benchmarks/rule_comparison.py --runs runs/compare-rules --seeds 0 1 2 --rules hgpo lazy adaptthink
                                         --output_dir runs/compare-rules

Reads search/RULE/*/curve.json, SEED/RULE/curve.json and SEED/eval/{hft,RULE}, and writes rules.md and its pictures. The
intervals of shares are those of `pages.py`, over the queries; those of areas are Student's, over the seeds.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fixed_rollouts import machine
from matplotlib.figure import Figure
from pages import (
    COLOURS,
    Runs,
    at,
    holds,
    intervals,
    panels,
    percent,
    picture,
    seeds,
    with_interval,
    write_page,
)
from rule_curves import SETTLED, TARGET, area, metric_at, settled, tokens_to
from rule_run import RULES, choose, read_run, read_runs
from scipy import stats

from hgpo_trl.common.errors import UserError
from hgpo_trl.reporting.documents import Block, Bullets, Heading, Paragraph, Table
from hgpo_trl.reporting.figures import INK, PERCENT_TICKS

Run = dict[str, Any]  # content of curve.json

HFT = "hft"
VARIANTS = ("hgpo", "lazy", "reinforce_plus_plus")  # of HGPO; the others are other people's rules
ACCURACY_LOST = 0.02  # at most, against always thinking


@dataclass(frozen=True)
class Findings:
    """What is read from a rule's evaluations to judge its paper's finding."""

    accuracy_lost: float  # against the HFT model that always thinks
    tokens_saved: float  # share of those of the HFT model that always thinks
    easiest: float  # P(think) at the easiest level
    hardest: float
    settled: Sequence[bool]  # by seed: the model takes one mode for all queries

    @property
    def adaptive(self) -> bool:
        """Saves tokens at the accuracy of always thinking, thinks more where it is harder, and keeps both modes."""
        return (
            self.accuracy_lost <= ACCURACY_LOST
            and self.tokens_saved > 0
            and self.hardest > self.easiest
            and not any(self.settled)
        )


PAPERS: dict[str, tuple[str, Callable[[Findings], bool]]] = {
    "hgpo": ("thinks where it gains, at the accuracy of always thinking", lambda f: f.adaptive),
    "adaptthink": ("shorter responses at no loss of accuracy, more thinking on harder queries", lambda f: f.adaptive),
    "thinkless": ("far less thinking at hardly any loss, without settling on one mode", lambda f: f.adaptive),
    "stable_adaptive": ("shorter responses at no loss of accuracy, without settling on one mode", lambda f: f.adaptive),
    "grpo": ("settles on one mode for all queries (Thinkless, on GRPO with a sampled mode)", lambda f: all(f.settled)),
}


# --- figures of seeds -----------------------------------------------------------------------------------------


def seeds_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; NaN for a single value."""
    if len(values) < 2:
        return (math.nan, math.nan)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def mean_of_seeds(values: Sequence[float]) -> str:
    """ "0.85 [0.80, 0.90] (0.84, 0.85, 0.86)": the mean, its interval, the single seeds."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    low, high = seeds_interval(values)
    return f"{statistics.fmean(values):.3f} [{low:.3f}, {high:.3f}] ({', '.join(f'{v:.3f}' for v in values)})"


def median_of_seeds(values: Sequence[float], form: str) -> str:
    """The median, and every seed's value in brackets; a dash is one that was not reached, which no number is above."""
    texts = ["–" if math.isnan(value) else f"{value:{form}}" for value in values]
    median = statistics.median(math.inf if math.isnan(value) else value for value in values)
    shown = "–" if math.isinf(median) else f"{median:{form}}"
    return f"{shown} ({', '.join(texts)})" if len(values) > 1 else shown


def fewest(tokens: Mapping[str, Sequence[float]]) -> list[str | None]:
    """By seed, the rule that needs the fewest tokens; None where none gets there."""
    found: list[str | None] = []
    for values in zip(*tokens.values(), strict=True):
        there = {rule: value for rule, value in zip(tokens, values, strict=True) if not math.isnan(value)}
        found.append(min(there, key=lambda rule: there[rule]) if there else None)
    return found


# --- the page -------------------------------------------------------------------------------------------------


class Comparison:
    """All runs that a page is about.

    Raises:
        UserError: runs differ in their tokens, which they have to share.
    """

    def __init__(self, folder: Path, seeds: Sequence[int], rules: Sequence[str]) -> None:
        self.evaluations, self.seeds, self.rules = Runs(folder, seeds), seeds, rules
        self.search = {rule: read_runs(folder / "search" / rule) for rule in rules}
        self.runs = {rule: [read_run(folder / str(seed) / rule) for seed in seeds] for rule in rules}
        self.search_tokens = _shared(folder, [run for runs in self.search.values() for run in runs])
        self.tokens = _shared(folder, [run for runs in self.runs.values() for run in runs])
        self.pooled = {model: self.evaluations.pooled(model) for model in (HFT, *rules)}
        self.of_seed = {model: [self.evaluations.of_seed(model, seed) for seed in seeds] for model in (HFT, *rules)}

    def per_seed(self, model: str, *path: str) -> list[float]:
        return [at(evaluation, *path) for evaluation in self.of_seed[model]]

    def of_curves(self, rule: str, figure: Callable[[Any], float]) -> list[float]:
        return [figure(run["curve"]) for run in self.runs[rule]]

    def difference(self, rule: str, reference: str = "hgpo") -> tuple[float, tuple[float, float]]:
        """Hybrid accuracy minus the reference's on the same queries, and its interval."""
        one, other = (self.evaluations.prompts(name) for name in (reference, rule))
        gain = other.table["hybrid_accuracy"] - one.table["hybrid_accuracy"]
        return float(np.nanmean(gain)), intervals({"gain": gain}, one.levels, one.queries)["gain"]

    def findings(self, rule: str) -> Findings:
        hft, evaluation = self.pooled[HFT], self.pooled[rule]
        return Findings(
            accuracy_lost=hft["accuracy"]["think"] - evaluation["accuracy"]["auto"],
            tokens_saved=1 - evaluation["mean_tokens"]["auto"] / hft["mean_tokens"]["think"],
            easiest=evaluation["by_level"][0]["thinking_ratio"],
            hardest=evaluation["by_level"][-1]["thinking_ratio"],
            settled=[settled(ratio) for ratio in self.per_seed(rule, "thinking_ratio")],
        )


def _shared(folder: Path, runs: Sequence[Run]) -> int:
    found = sorted({run["tokens"] for run in runs})
    if len(found) > 1:
        raise UserError(
            f"{folder} has runs of {' and '.join(map(str, found))} tokens, which cannot be compared. Remove those that "
            "are not wanted, or choose another R."
        )
    return int(found[0])


def _setting(run: Run) -> str:
    """ "1e-3, α = 2" """
    ((name, value),) = RULES[run["rule"]].weights[run["weight"]].items()
    if isinstance(value, dict):
        ((name, value),) = value.items()
    symbol = {"alpha": "α", "margin": "δ", "control_weight": "control weight"}[name]
    return f"{run['learning_rate']:g}, {symbol} = {value:g}"


def _search(comparison: Comparison) -> list[Block]:
    rows = []
    for rule, runs in comparison.search.items():
        chosen = choose(runs)
        for run in runs:
            value = f"{area(run['curve'], run['tokens']):.3f}"
            rows.append([RULES[rule].label, _setting(run), value, "chosen" if run is chosen else ""])
    return [
        Heading("The search"),
        Paragraph(
            "Each rule's learning rate and weight of the decision (δ where it has no other) are those with the largest "
            f"area under hybrid accuracy over {comparison.search_tokens:,} rollout tokens, on a seed of its own. Where "
            f"P(think) is below {SETTLED} or above {1 - SETTLED}, hybrid accuracy counts as 0."
        ),
        Table(["rule", "learning rate, weight", "area", ""], rows, labels=2),
    ]


def _accuracy(comparison: Comparison) -> list[Block]:
    rows = []
    for model, evaluation in comparison.pooled.items():
        gap = "–"
        if "hgpo" in comparison.rules and model not in (HFT, "hgpo"):
            value, (low, high) = comparison.difference(model)
            gap = f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        rows.append(
            [
                "HFT" if model == HFT else RULES[model].label,
                with_interval(evaluation, "hybrid_accuracy"),
                seeds(comparison.per_seed(model, "hybrid_accuracy")),
                gap,
                with_interval(evaluation, "accuracy", "auto"),
                with_interval(evaluation, "accuracy", "sampled"),
                percent(evaluation["accuracy"]["think"]),
                f"{evaluation['mean_tokens']['auto']:.1f}",
                percent(evaluation["thinking_ratio"]),
                seeds(comparison.per_seed(model, "thinking_ratio")),
                percent(evaluation["off_mode_mass"]),
            ]
        )
    by_level = {
        RULES[rule].label: {"HFT": comparison.pooled[HFT], "rule": comparison.pooled[rule]} for rule in comparison.rules
    }
    return [
        Heading(f"After {comparison.tokens:,} rollout tokens"),
        Table(
            ["rule", "hybrid accuracy", "seeds", "difference from HGPO, points", "accuracy, own choice",
             "accuracy, sampled choice", "accuracy, always thinking", "tokens, own choice", "P(think)", "seeds",
             "neither"],
            rows,
        ),
        picture(
            "rules_by_level",
            "Probability of thinking by level and rule",
            "All prompts of all seeds.",
            lambda figure: panels(figure, by_level),
            height=2.8 * math.ceil(len(comparison.rules) / 4) + 0.5,
        ),
    ]  # fmt: skip


def _cost(comparison: Comparison) -> list[Block]:
    tokens = {rule: comparison.of_curves(rule, tokens_to) for rule in comparison.rules}
    rows = []
    for rule in comparison.rules:
        of_hgpo = [mine / other for mine, other in zip(tokens[rule], tokens.get("hgpo", [math.nan] * 99), strict=False)]
        rows.append(
            [
                RULES[rule].label,
                _setting(comparison.runs[rule][0]),
                median_of_seeds([value / 1000 for value in tokens[rule]], ".0f"),
                median_of_seeds(of_hgpo, ".2f"),
                mean_of_seeds(comparison.of_curves(rule, lambda curve: area(curve, comparison.tokens))),
                mean_of_seeds(
                    comparison.of_curves(rule, lambda curve: area(curve, comparison.tokens, "accuracy_sampled"))
                ),
                mean_of_seeds(comparison.of_curves(rule, lambda curve: metric_at(curve, comparison.tokens / 4))),
                mean_of_seeds(comparison.of_curves(rule, lambda curve: metric_at(curve, comparison.tokens / 2))),
            ]
        )
    return [
        Heading("On the way"),
        Paragraph(
            f"Tokens to {TARGET} are those at which hybrid accuracy reaches {TARGET} in two evaluations in a row: the "
            "median, and every seed in brackets; a dash means not reached. The other columns have the mean, its 95 % "
            "interval over the seeds by Student's t, and every seed. On these curves hybrid accuracy is 0 where the "
            f"model has settled on one mode (P(think) below {SETTLED} or above {1 - SETTLED}): it decides nothing, and "
            "yet reaches 100 % once it has lost the other mode."
        ),
        Table(
            ["rule", "learning rate, weight", f"tokens to {TARGET}, thousands", "of HGPO's",
             "area under hybrid accuracy", "area under accuracy, sampled choice",
             "hybrid accuracy at a quarter of the tokens", "at half of the tokens"],
            rows, labels=2,
        ),
        picture(
            "rules_over_tokens",
            "Held-out metrics over rollout tokens",
            "Thin lines are seeds, thick ones their mean.",
            lambda figure: _over_tokens(figure, comparison),
            height=4.4,
        ),
    ]  # fmt: skip


def _over_tokens(figure: Figure, comparison: Comparison) -> None:
    metrics = {"hybrid_accuracy": "hybrid accuracy", "accuracy_sampled": "accuracy, sampled choice"}
    grid = np.linspace(0, comparison.tokens, 200)
    row = figure.subplots(1, len(metrics), sharex=True)
    for axes, (metric, title) in zip(row, metrics.items(), strict=True):
        for colour, (rule, runs) in zip(COLOURS, comparison.runs.items(), strict=False):
            lines = [[metric_at(run["curve"], place, metric) for place in grid] for run in runs]
            for line in lines:
                axes.plot(grid / 1000, line, color=colour, alpha=0.35, linewidth=0.7)
            axes.plot(grid / 1000, np.mean(lines, axis=0), color=colour, label=RULES[rule].label)
        axes.set(xlabel="tokens sampled in rollouts, thousands", ylabel=title, ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(PERCENT_TICKS)
    row[0].axhline(TARGET, color=INK, linewidth=0.8, linestyle=":")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)


def _verdicts(comparison: Comparison) -> list[Block]:
    rows = []
    for rule in comparison.rules:
        if rule not in PAPERS:
            continue
        found, (finding, verdict) = comparison.findings(rule), PAPERS[rule]
        rows.append(
            [
                RULES[rule].label,
                finding,
                holds(verdict(found)),
                f"{100 * found.accuracy_lost:.1f}",
                percent(found.tokens_saved),
                f"{percent(found.easiest)} to {percent(found.hardest)}",
                f"{sum(found.settled)} of {len(found.settled)}",
            ]
        )
    return [
        Heading("What the papers find"),
        Table(
            ["rule", "the paper", "here", "accuracy lost, points", "tokens saved", "P(think), easiest to hardest",
             "seeds settled on one mode"],
            rows, labels=3,
        ),
        Paragraph(
            "Accuracy lost and tokens saved are of the model's own choice against the HFT model that always thinks. A "
            f"seed has settled on one mode if P(think) over all prompts is below {SETTLED} or above {1 - SETTLED}. "
            f"The finding of a rule that keeps both modes holds if it loses at most {100 * ACCURACY_LOST:g} points of "
            "accuracy, saves tokens, thinks more at the hardest level than at the easiest, and no seed has settled."
        ),
        Bullets(_claims(comparison)),
    ]  # fmt: skip


def _claims(comparison: Comparison) -> list[str]:
    """What is said of HGPO, and whether these runs show it; of the rules that are compared."""
    tokens = {rule: comparison.of_curves(rule, tokens_to) for rule in comparison.rules}
    claims = []
    if "hgpo" in tokens:
        others = {rule: values for rule, values in tokens.items() if rule == "hgpo" or rule not in VARIANTS}
        first = fewest(others)
        by_seed = ", ".join(
            f"seed {seed} {RULES[rule].label if rule else 'none'}"
            for seed, rule in zip(comparison.seeds, first, strict=True)
        )
        verdict = holds(all(rule == "hgpo" for rule in first))
        claims.append(
            f"Of all papers' rules, HGPO needs the fewest tokens to {TARGET} on every seed: {verdict} ({by_seed})."
        )
    if {"hgpo", "lazy"} <= tokens.keys():
        saved = [1 - lazy / full for lazy, full in zip(tokens["lazy"], tokens["hgpo"], strict=True)]
        value, (low, high) = comparison.difference("lazy")
        verdict = holds(all(share >= 0.4 for share in saved) and high >= 0)
        claims.append(
            f"Lazy thinking needs at least 40 % fewer on every seed and ends no lower: {verdict} (fewer by "
            f"{', '.join('–' if math.isnan(share) else percent(share) for share in saved)}; hybrid accuracy "
            f"{100 * value:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}])."
        )
    if {"hgpo", "reinforce_plus_plus"} <= tokens.keys():
        value, (low, high) = comparison.difference("reinforce_plus_plus")
        claims.append(
            f"HGPO with REINFORCE++ ends within 3 points of that with GRPO: {holds(abs(value) <= 0.03)} "
            f"({100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}])."
        )
    return claims


def blocks_of(comparison: Comparison) -> list[Block]:
    return [
        Heading("Rules for learning when to think, at equal rollout tokens", 1),
        Paragraph(
            f"`make compare-rules` on {machine()} Every rule starts from the same HFT model of the chain-sum recipes "
            f"and trains until the model has sampled {comparison.tokens:,} tokens in rollouts. Seeds "
            f"{', '.join(map(str, comparison.seeds))} (data, initial weights, sampling). In brackets 95 % intervals "
            "over the queries of all seeds, the copies of a query taken together; beside them the single seeds, in per "
            "cent. Margin of hybrid accuracy 0.2."
        ),
        *_accuracy(comparison),
        *_cost(comparison),
        *_verdicts(comparison),
        *_search(comparison),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--rules", nargs="+", choices=RULES, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    write_page(args.output_dir / "rules.md", blocks_of(Comparison(args.runs, args.seeds, args.rules)))


if __name__ == "__main__":
    main()
