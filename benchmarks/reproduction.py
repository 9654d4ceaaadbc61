"""The page of `make reproduce`: the analogue of the paper's Table 1 and Figures 3 to 6, each next to the paper's claim.

    python benchmarks/reproduction.py --runs runs/reproduce --seeds 0 1 2 --margins 0.45 0.7 --output_dir runs/reproduce

Reads SEED/eval/MODEL/samples.parquet of every seed, and writes reproduction.md and its pictures. The intervals of
`pages.py` say how much the queries matter, and the column "seeds" how much everything else does.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from fixed_rollouts import machine
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages import (
    COLOURS,
    MARGIN,
    Evaluation,
    Runs,
    at,
    holds,
    panels,
    percent,
    picture,
    rises,
    seeds,
    with_interval,
    write_page,
)

from hgpo_trl.reporting.documents import Block, Bullets, Heading, Paragraph, Table
from hgpo_trl.reporting.figures import INK, PERCENT_TICKS
from hgpo_trl.reporting.training_log import load_training_log

HELD_OUT = {  # by prefix of the runs: domain and name of the task that Stage II does not see
    "like-": ("chain_difference", "chain differences"),
    "two-": ("shell_game", "shell game"),
}
ESTIMATORS = {"grpo": "HGPO, GRPO", "rloo": "HGPO, RLOO", "reinforce_plus_plus": "HGPO, REINFORCE++"}
TABLE = {
    "hft": "HFT",
    "rft": "HFT-RFT",
    "rft-margin": f"HFT-RFT, ties to no-think (δ = {MARGIN})",
    "dpo": "HFT-DPO",
    "dpo-margin": f"HFT-DPO, δ = {MARGIN}",
    **ESTIMATORS,
}
# Table 1 of the paper: hybrid accuracy (MATH500) and the mean of the nine benchmarks.
PAPER = {
    "hft": ("41.4 / 34.2", "42.5 / 56.4"),
    "rft": ("48.1 / 49.7", "38.3 / 56.6"),
    "dpo": ("45.8 / 37.1", "41.5 / 58.9"),
    "grpo": ("54.4 / 71.9", "45.3 / 63.1"),
}


# --- figures --------------------------------------------------------------------------------------------------


def _bars(figure: Figure, evaluations: dict[str, Evaluation], points: dict[str, list[float]]) -> None:
    """Hybrid accuracy with its interval, and the single seeds."""
    axes = figure.add_subplot()
    for y, (name, evaluation) in enumerate(evaluations.items()):
        low, high = evaluation["intervals"]["hybrid_accuracy"]
        axes.barh(y, evaluation["hybrid_accuracy"], color=COLOURS[4], alpha=0.35)
        axes.hlines(y, low, high, color=INK, linewidth=1.6)
        axes.plot(points[name], [y] * len(points[name]), "o", markersize=4, color=COLOURS[4])
    axes.set_yticks(range(len(evaluations)), list(evaluations))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel="hybrid accuracy: mean, its interval, single seeds")
    axes.xaxis.set_major_formatter(PERCENT_TICKS)


def _training(axes: Axes, runs: Runs, models: dict[str, str]) -> None:
    """π(think|q) over the steps of Stage II, every seed a thin line, their mean a thick one."""
    for colour, (name, model) in zip(COLOURS, models.items(), strict=False):
        curves = []
        for seed in runs.seeds:
            log = load_training_log(runs.folder / str(seed) / model)
            steps, values = np.array([(e["step"], e["hgpo/prob/think"]) for e in log if "hgpo/prob/think" in e]).T
            values = pd.Series(values).rolling(5, center=True, min_periods=1).mean().to_numpy()
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
            curves.append(values)
        axes.plot(steps, np.mean(curves, axis=0), color=colour, label=name)
    axes.set(xlabel="optimizer step", ylabel="probability of thinking", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(PERCENT_TICKS)
    axes.legend()


# --- the page -------------------------------------------------------------------------------------------------


def _table_1(runs: Runs) -> list[Block]:
    pooled = {model: runs.pooled(model) for model in TABLE}
    points = {TABLE[model]: runs.per_seed(model, "hybrid_accuracy") for model in TABLE}
    rows = [
        [
            name,
            with_interval(pooled[model], "hybrid_accuracy"),
            seeds(points[name]),
            with_interval(pooled[model], "accuracy", "auto"),
            with_interval(pooled[model], "accuracy", "sampled"),
            f"{at(pooled[model], 'mean_tokens', 'auto'):.1f}",
            percent(pooled[model]["thinking_ratio"]),
            percent(pooled[model]["off_mode_mass"]),
            *PAPER.get(model, ("–", "–")),
        ]
        for model, name in TABLE.items()
    ]
    best = pooled["grpo"]["intervals"]["hybrid_accuracy"]
    apart = {m: best[0] > pooled[m]["intervals"]["hybrid_accuracy"][1] for m in TABLE if m.startswith(("rft", "dpo"))}
    estimators = {ESTIMATORS[m]: pooled[m]["hybrid_accuracy"] for m in ESTIMATORS}
    spread = max(estimators.values()) - min(estimators.values())
    always, own = pooled["grpo"]["accuracy"]["think"], pooled["grpo"]["accuracy"]["auto"]
    saved = 1 - at(pooled["grpo"], "mean_tokens", "auto") / at(pooled["grpo"], "mean_tokens", "think")
    return [
        Heading("Table 1: HGPO against HFT, HFT-RFT and HFT-DPO"),
        Table(
            [
                "model",
                "hybrid accuracy",
                "seeds",
                "accuracy, own choice",
                "accuracy, sampled",
                "tokens, own choice",
                "P(think)",
                "neither",
                "paper: hybrid accuracy, 1.5B / 7B",
                "paper: mean of nine benchmarks",
            ],
            rows,
        ),
        picture(
            "table_1",
            "Hybrid accuracy",
            "All prompts of all seeds.",
            lambda figure: _bars(figure, {TABLE[m]: e for m, e in pooled.items()}, points),
        ),
        Bullets(
            [
                "The paper: HGPO's hybrid accuracy is far above that of HFT, RFT and DPO. Here, intervals that do not "
                "overlap: "
                + "; ".join(f"against {TABLE[m]} {holds(verdict)}" for m, verdict in apart.items())
                + f"; against HFT {holds(best[0] > pooled['hft']['intervals']['hybrid_accuracy'][1])}.",
                f"What it saves: {percent(saved)} of the tokens of always thinking, at {percent(own)} accuracy for "
                f"{percent(always)}.",
            ]
        ),
        Heading("Figure 3(a): the estimators"),
        Paragraph(
            "The paper: GRPO, RLOO and REINFORCE++ all work. Here: hybrid accuracy "
            + ", ".join(f"{name} {percent(value)}" for name, value in estimators.items())
            + f"; the spread is {spread:.3f}, so that all are within 0.05 of each other {holds(spread <= 0.05)}."
        ),
    ]


STARTS = {"": "the recipe's", "small-": "smaller", "short-": "short Stage I"}  # prefixes of the runs


def _rejection(runs: Runs) -> list[Block]:
    """HGPO against RFT with HGPO's own margin, from models that can do more and less."""
    names = {"hft": "HFT", "rft-margin": TABLE["rft-margin"], "grpo": "HGPO"}
    pooled = {prefix + model: runs.pooled(prefix + model) for prefix in STARTS for model in names}
    rows = [
        [
            start,
            name,
            with_interval(pooled[prefix + model], "hybrid_accuracy"),
            seeds(runs.per_seed(prefix + model, "hybrid_accuracy")),
            with_interval(pooled[prefix + model], "accuracy", "auto"),
            with_interval(pooled[prefix + model], "accuracy", "sampled"),
            *[percent(at(pooled[prefix + model], "accuracy", mode)) for mode in ("think", "no_think")],
            f"{at(pooled[prefix + model], 'mean_tokens', 'auto'):.1f}",
        ]
        for prefix, start in STARTS.items()
        for model, name in names.items()
    ]
    shown = {
        "hybrid_accuracy": "hybrid accuracy",
        "accuracy/auto": "accuracy of the own choice",
        "accuracy/sampled": "accuracy of the sampled choice",
    }
    verdicts = [
        f"{start}: " + ", ".join(f"{words} {holds(_above(pooled, prefix, column))}" for column, words in shown.items())
        for prefix, start in STARTS.items()
    ]
    return [
        Heading("HGPO against rejection fine-tuning with HGPO's own margin"),
        Paragraph(
            "RFT with ties to no-think is the baseline that comes closest in Table 1. Here the two start from three "
            "models: the recipe's, the smaller one of Figure 6, which fails at long sums even when it thinks, and the "
            "recipe's after a short Stage I, which answers less at once. That HGPO is above RFT, with intervals that "
            "do not overlap: " + "; ".join(verdicts) + "."
        ),
        Table(
            [
                "model",
                "trained by",
                "hybrid accuracy",
                "seeds",
                "accuracy, own choice",
                "accuracy, sampled",
                "always thinking",
                "never thinking",
                "tokens, own choice",
            ],
            rows,
            labels=2,
        ),
    ]


def _above(pooled: dict[str, Evaluation], prefix: str, column: str) -> bool:
    """Whether HGPO's interval lies above RFT's."""
    hgpo, rejection = (pooled[prefix + model]["intervals"][column] for model in ("grpo", "rft-margin"))
    return hgpo[0] > rejection[1]


def _margins(runs: Runs, margins: Sequence[str]) -> list[Block]:
    models = {MARGIN: "grpo", **{float(margin): f"margin-{margin}" for margin in margins}}
    pooled = {margin: runs.pooled(model) for margin, model in sorted(models.items())}
    ratios = [evaluation["thinking_ratio"] for evaluation in pooled.values()]
    rows = [
        [
            f"{margin:g}",
            with_interval(evaluation, "thinking_ratio"),
            seeds(runs.per_seed(models[margin], "thinking_ratio")),
            with_interval(evaluation, "accuracy", "auto"),
            f"{at(evaluation, 'mean_tokens', 'auto'):.1f}",
        ]
        for margin, evaluation in pooled.items()
    ]
    names = {f"δ = {margin:g}": evaluation for margin, evaluation in pooled.items()}
    return [
        Heading("Figure 3(b): the margin δ"),
        Paragraph(f"The paper: a larger δ gives less thinking. Here this {holds(rises(ratios[::-1]))}."),
        Table(["δ", "P(think)", "seeds", "accuracy, own choice", "tokens, own choice"], rows),
        picture("figure_3b", "Probability of thinking by level and margin", "All prompts of all seeds.",
                 lambda figure: panels(figure, {"": names})),
    ]  # fmt: skip


def _difficulty(runs: Runs) -> list[Block]:
    hft, hgpo = runs.pooled("hft"), runs.pooled("grpo")
    ratios = [entry["thinking_ratio"] for entry in hgpo["by_level"]]
    before = [entry["thinking_ratio"] for entry in hft["by_level"]]
    return [
        Heading("Figure 4: thinking by difficulty"),
        Paragraph(
            "The paper: after HGPO the thinking ratio rises with the difficulty, before it is flat. Here it goes "
            f"from {percent(ratios[0])} to {percent(ratios[-1])} over the levels; at every step up it rises: "
            f"{holds(rises(ratios))}; before, it lies between {percent(min(before))} and "
            f"{percent(max(before))}."
        ),
        picture("figure_4", "Probability of thinking by level", "All prompts of all seeds.",
                 lambda figure: panels(figure, {"": {"HFT": hft, "HGPO": hgpo}})),
    ]  # fmt: skip


def _domains(runs: Runs, held_out: Mapping[str, tuple[str, str]]) -> list[Block]:
    """Chain sums, which both stages see, and by prefix of the runs a task that Stage I alone sees beside them."""

    def both(prefix: str, domain: str) -> dict[str, Evaluation]:
        return {"HFT": runs.pooled(f"{prefix}hft", domain), "HGPO": runs.pooled(f"{prefix}grpo", domain)}

    shown: dict[str, dict[str, Evaluation]] = {}
    verdicts = []
    for prefix, (domain, name) in held_out.items():
        shown[f"chain sums, beside {name}"] = both(prefix, "chain_sum")
        shown[f"{name}: not in Stage II"] = unseen = both(prefix, domain)
        ratios = [entry["thinking_ratio"] for entry in unseen["HGPO"]["by_level"]]
        before, after = (unseen[model]["hybrid_accuracy"] for model in unseen)
        verdicts.append(
            f"in {name} the thinking ratio goes from {percent(ratios[0])} at the easiest to {percent(ratios[-1])} at "
            f"the hardest level: more thinking at the hardest {holds(ratios[-1] > ratios[0])}, a rise at every step "
            f"{holds(rises(ratios))}, a higher hybrid accuracy than HFT's {holds(after > before)}"
        )
    rows = [
        [
            title,
            name,
            with_interval(evaluation, "hybrid_accuracy"),
            with_interval(evaluation, "accuracy", "auto"),
            percent(at(evaluation, "accuracy", "no_think")),
            *[percent(evaluation["by_level"][i]["thinking_ratio"]) for i in (0, -1)],
        ]
        for title, evaluations in shown.items()
        for name, evaluation in evaluations.items()
    ]
    return [
        Heading("Figure 5: a domain that Stage II has not seen"),
        Paragraph(
            "The paper: trained on maths and general queries, the model thinks more on harder problems of code, too. "
            "Here Stage I sees chain sums and another task, Stage II chain sums alone: " + "; ".join(verdicts) + "."
        ),
        Table(
            [
                "domain",
                "model",
                "hybrid accuracy",
                "accuracy, own choice",
                "never thinking",
                "P(think), easiest",
                "P(think), hardest",
            ],
            rows,
            labels=2,
        ),
        picture(
            "figure_5",
            "Probability of thinking by level and domain",
            "All prompts of all seeds.",
            lambda figure: panels(figure, shown),
        ),
    ]


def _sizes(runs: Runs) -> list[Block]:
    names = {"smaller": "small-", "larger": "", "larger, short Stage I": "short-"}
    pooled = {name: (runs.pooled(f"{prefix}hft"), runs.pooled(f"{prefix}grpo")) for name, prefix in names.items()}
    rows = [
        [
            f"{name}, {_parameters(runs, f'{prefix}grpo'):,} parameters",
            with_interval(after, "thinking_ratio"),
            seeds(runs.per_seed(f"{prefix}grpo", "thinking_ratio")),
            with_interval(after, "hybrid_accuracy"),
            percent(at(after, "accuracy", "auto")),
            percent(at(before, "accuracy", "no_think")),
            percent(at(before, "accuracy", "think")),
        ]
        for (name, prefix), (before, after) in zip(names.items(), pooled.values(), strict=True)
    ]
    smaller, larger, short = (after["thinking_ratio"] for _, after in pooled.values())
    return [
        Heading("Figure 6: weaker models"),
        Paragraph(
            "The paper: in Stage II the smaller model learns to think more, the larger one less, because a weaker one "
            f"needs its reasoning more often. Here the smaller one thinks more in the end: {holds(smaller > larger)}; "
            "the larger one thinks more after a short Stage I, which leaves it weaker at answering at once: "
            f"{holds(short > larger)}."
        ),
        Table(
            [
                "model",
                "P(think)",
                "seeds",
                "hybrid accuracy",
                "accuracy, own choice",
                "HFT, never thinking",
                "HFT, always thinking",
            ],
            rows,
        ),
        picture(
            "figure_6",
            "Probability of thinking during Stage II",
            "Training queries; thin lines are seeds.",
            lambda figure: _training(
                figure.add_subplot(), runs, {name: f"{prefix}grpo" for name, prefix in names.items()}
            ),
        ),
    ]


def _parameters(runs: Runs, model: str) -> int:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(runs.folder / str(runs.seeds[0]) / model).num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--margins", nargs="+", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    runs = Runs(args.runs, args.seeds)
    blocks: list[Block] = [
        Heading("The paper's findings on the embedded tasks", 1),
        Paragraph(
            f"`make reproduce` on {machine()} Seeds "
            f"{', '.join(map(str, args.seeds))} (data, initial weights, sampling); every evaluation samples 16 "
            "responses per mode and prompt at temperature 0.6, top-p 0.95; margin of hybrid accuracy 0.2. In brackets "
            "95 % intervals over the queries of all seeds, the copies of a query taken together; beside them the "
            "single seeds, in per cent."
        ),
        *_table_1(runs),
        *_rejection(runs),
        *_margins(runs, args.margins),
        *_difficulty(runs),
        *_domains(runs, HELD_OUT),
        *_sizes(runs),
    ]
    write_page(args.output_dir / "reproduction.md", blocks)


if __name__ == "__main__":
    main()
