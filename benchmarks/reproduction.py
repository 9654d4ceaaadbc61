"""The page of `make reproduce`: the analogue of the paper's Table 1 and Figures 3 to 6, each next to the paper's claim.

    python benchmarks/reproduction.py --runs runs/reproduce --seeds 0 1 2 --margins 0.45 0.7 --output_dir runs/reproduce

Reads SEED/eval/MODEL/samples.parquet of every seed, and writes reproduction.md and its pictures. A figure is the mean
over the prompts of all seeds; its 95 % interval resamples the queries, so it says how much the queries matter, and the
column "seeds" how much everything else does. Short queries are few, so that the held-out prompts hold some of them many
times: within each level whole queries of a seed are resampled, with all their copies.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from fixed_rollouts import machine
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hgpo_trl.common.files import write_atomically
from hgpo_trl.evaluation.metrics import prompt_table, report_on
from hgpo_trl.evaluation.samples import PROMPT_ID
from hgpo_trl.modes.hybrid_accuracy import PromptTable
from hgpo_trl.reporting.documents import Block, Bullets, Heading, Paragraph, Picture, Table, to_markdown
from hgpo_trl.reporting.figures import INK, PERCENT_TICKS, STYLE, WIDTH, to_png
from hgpo_trl.reporting.report import load_training_log

Evaluation = dict[str, Any]

COLOURS = ("#7B4FB5", "#12866A", "#C2255C", "#8A6A00", "#0B7FA3")
MARGIN = 0.2  # δ of the recipes
HELD_OUT = "shell_game"
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


class Runs:
    """The evaluations of all seeds."""

    def __init__(self, folder: Path, seeds: Sequence[int]) -> None:
        self.folder, self.seeds = folder, seeds

    def samples(self, model: str, seed: int) -> pd.DataFrame:
        """Scored samples with the columns `query`, `level` and `domain` of their prompts."""
        folder = self.folder / str(seed) / "eval" / model
        samples = pd.read_parquet(folder / "samples.parquet")
        dataset = json.loads((folder / "report.json").read_text(encoding="utf-8"))["dataset"]
        queries = pd.read_parquet(dataset, columns=["prompt", "level", "domain"])
        queries["query"] = queries.pop("prompt").map(lambda turns: turns[-1]["content"])
        return samples.join(queries, on=PROMPT_ID)

    def of_seed(self, model: str, seed: int, domain: str | None = None) -> Evaluation:
        return _evaluate([self.samples(model, seed)], domain)

    def pooled(self, model: str, domain: str | None = None) -> Evaluation:
        return _evaluate([self.samples(model, seed) for seed in self.seeds], domain)

    def per_seed(self, model: str, *path: str) -> list[float]:
        return [_at(self.of_seed(model, seed), *path) for seed in self.seeds]


def _evaluate(parts: Sequence[pd.DataFrame], domain: str | None) -> Evaluation:
    """`report_on` for the prompts of several seeds together, numbered on; of one domain alone if one is named.

    The intervals are those of `_intervals`, by the names of `prompt_table`.
    """
    pooled = pd.concat(parts, keys=range(len(parts)), names=["seed"]).reset_index("seed")
    if domain is not None:
        pooled = pooled[pooled["domain"] == domain]
    pooled[PROMPT_ID] = pooled.groupby(["seed", PROMPT_ID]).ngroup()
    prompts = pooled.drop_duplicates(PROMPT_ID).sort_values(PROMPT_ID)
    levels = prompts["level"].to_numpy()
    queries = prompts.groupby(["seed", "query"]).ngroup().to_numpy()
    table = prompt_table(pooled, MARGIN)
    evaluation = report_on(pooled, MARGIN, levels.tolist())
    evaluation["intervals"] = _intervals(table, levels, queries)
    for entry in evaluation["by_level"]:
        rows = levels == entry["level"]
        entry["intervals"] = _intervals({n: column[rows] for n, column in table.items()}, levels[rows], queries[rows])
    return evaluation


def _intervals(
    table: PromptTable, levels: NDArray[Any], queries: NDArray[np.int64], resamples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of every column's mean.

    Args:
        table: of `prompt_table`, one row per prompt.
        levels: of each prompt. How many queries a level has is not resampled: the data set has exact shares of levels.
        queries: number of the query that each prompt is a copy of. A query is drawn with all its copies.
    """
    rng = np.random.default_rng(seed)
    distinct, first, codes = np.unique(queries, return_index=True, return_inverse=True)
    counts = np.zeros((resamples, len(distinct)))
    for level in np.unique(levels):
        members = np.flatnonzero(levels[first] == level)
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    intervals = {}
    for name, column in table.items():
        valid = ~np.isnan(column)
        totals = counts @ np.bincount(codes, np.where(valid, column, 0.0))
        weights = counts @ np.bincount(codes, valid)
        means = totals[weights > 0] / weights[weights > 0]
        low, high = np.quantile(means, [0.025, 0.975]) if len(means) else (np.nan, np.nan)
        intervals[name] = (float(low), float(high))
    return intervals


def _at(evaluation: Evaluation, *path: str) -> Any:
    value: Any = evaluation
    for key in path:
        value = value[key]
    return value


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _with_interval(evaluation: Evaluation, *path: str) -> str:
    low, high = evaluation["intervals"]["/".join(path)]
    return f"{_percent(_at(evaluation, *path))} [{100 * low:.1f}, {100 * high:.1f}]"


def _seeds(values: Sequence[float]) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in values)


def _holds(verdict: bool) -> str:
    return "holds" if verdict else "does not hold"


def _rises(values: Sequence[float]) -> bool:
    """Whether every value is above the one before."""
    return all(low < high for low, high in pairwise(values))


# --- figures --------------------------------------------------------------------------------------------------


def _by_level(axes: Axes, evaluations: dict[str, Evaluation], colours: Sequence[str] = COLOURS) -> None:
    """Thinking ratio over the level, with intervals."""
    for index, (name, evaluation) in enumerate(evaluations.items()):
        entries = evaluation["by_level"]
        low, high = np.array([entry["intervals"]["thinking_ratio"] for entry in entries]).T
        x = np.arange(len(entries)) + 0.05 * (index - (len(evaluations) - 1) / 2)
        axes.vlines(x, low, high, color=colours[index], alpha=0.5)
        axes.plot(x, [entry["thinking_ratio"] for entry in entries], marker="o", color=colours[index], label=name)
        axes.set_xticks(range(len(entries)), [str(entry["level"]) for entry in entries])
    axes.set(xlabel="level", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(PERCENT_TICKS)


def _picture(file: str, title: str, caption: str, draw: Callable[[Figure], None], height: float = 3.6) -> Picture:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        return Picture(f"images/{file}.png", to_png(figure), title, caption)


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


def _panels(figure: Figure, panels: dict[str, dict[str, Evaluation]]) -> None:
    """Thinking ratio by level, one panel per title."""
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, evaluations) in zip(row, panels.items(), strict=True):
        _by_level(axes, evaluations)
        axes.set_title(title, fontsize=10)
    row[0].set_ylabel("probability of thinking")
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)


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
            _with_interval(pooled[model], "hybrid_accuracy"),
            _seeds(points[name]),
            _with_interval(pooled[model], "accuracy", "auto"),
            _with_interval(pooled[model], "accuracy", "sampled"),
            f"{_at(pooled[model], 'mean_tokens', 'auto'):.1f}",
            _percent(pooled[model]["thinking_ratio"]),
            _percent(pooled[model]["off_mode_mass"]),
            *PAPER.get(model, ("–", "–")),
        ]
        for model, name in TABLE.items()
    ]
    best = pooled["grpo"]["intervals"]["hybrid_accuracy"]
    apart = {m: best[0] > pooled[m]["intervals"]["hybrid_accuracy"][1] for m in TABLE if m.startswith(("rft", "dpo"))}
    estimators = {ESTIMATORS[m]: pooled[m]["hybrid_accuracy"] for m in ESTIMATORS}
    spread = max(estimators.values()) - min(estimators.values())
    always, own = pooled["grpo"]["accuracy"]["think"], pooled["grpo"]["accuracy"]["auto"]
    saved = 1 - _at(pooled["grpo"], "mean_tokens", "auto") / _at(pooled["grpo"], "mean_tokens", "think")
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
        _picture(
            "table_1",
            "Hybrid accuracy",
            "All prompts of all seeds.",
            lambda figure: _bars(figure, {TABLE[m]: e for m, e in pooled.items()}, points),
        ),
        Bullets(
            [
                "The paper: HGPO's hybrid accuracy is far above that of HFT, RFT and DPO. Here, intervals that do not "
                "overlap: "
                + "; ".join(f"against {TABLE[m]} {_holds(verdict)}" for m, verdict in apart.items())
                + f"; against HFT {_holds(best[0] > pooled['hft']['intervals']['hybrid_accuracy'][1])}.",
                f"What it saves: {_percent(saved)} of the tokens of always thinking, at {_percent(own)} accuracy for "
                f"{_percent(always)}.",
            ]
        ),
        Heading("Figure 3(a): the estimators"),
        Paragraph(
            "The paper: GRPO, RLOO and REINFORCE++ all work. Here: hybrid accuracy "
            + ", ".join(f"{name} {_percent(value)}" for name, value in estimators.items())
            + f"; the spread is {spread:.3f}, so that all are within 0.05 of each other {_holds(spread <= 0.05)}."
        ),
    ]


def _margins(runs: Runs, margins: Sequence[str]) -> list[Block]:
    models = {MARGIN: "grpo", **{float(margin): f"margin-{margin}" for margin in margins}}
    pooled = {margin: runs.pooled(model) for margin, model in sorted(models.items())}
    ratios = [evaluation["thinking_ratio"] for evaluation in pooled.values()]
    rows = [
        [
            f"{margin:g}",
            _with_interval(evaluation, "thinking_ratio"),
            _seeds(runs.per_seed(models[margin], "thinking_ratio")),
            _with_interval(evaluation, "accuracy", "auto"),
            f"{_at(evaluation, 'mean_tokens', 'auto'):.1f}",
        ]
        for margin, evaluation in pooled.items()
    ]
    names = {f"δ = {margin:g}": evaluation for margin, evaluation in pooled.items()}
    return [
        Heading("Figure 3(b): the margin δ"),
        Paragraph(f"The paper: a larger δ gives less thinking. Here this {_holds(_rises(ratios[::-1]))}."),
        Table(["δ", "P(think)", "seeds", "accuracy, own choice", "tokens, own choice"], rows),
        _picture("figure_3b", "Probability of thinking by level and margin", "All prompts of all seeds.",
                 lambda figure: _panels(figure, {"": names})),
    ]  # fmt: skip


def _difficulty(runs: Runs) -> list[Block]:
    hft, hgpo = runs.pooled("hft"), runs.pooled("grpo")
    ratios = [entry["thinking_ratio"] for entry in hgpo["by_level"]]
    before = [entry["thinking_ratio"] for entry in hft["by_level"]]
    return [
        Heading("Figure 4: thinking by difficulty"),
        Paragraph(
            "The paper: after HGPO the thinking ratio rises with the difficulty, before it is flat. Here it goes "
            f"from {_percent(ratios[0])} to {_percent(ratios[-1])} over the levels; at every step up it rises: "
            f"{_holds(_rises(ratios))}; before, it lies between {_percent(min(before))} and "
            f"{_percent(max(before))}."
        ),
        _picture("figure_4", "Probability of thinking by level", "All prompts of all seeds.",
                 lambda figure: _panels(figure, {"": {"HFT": hft, "HGPO": hgpo}})),
    ]  # fmt: skip


def _domains(runs: Runs) -> list[Block]:
    domains = {"chain_sum": "chain sums: in both stages", HELD_OUT: "shell game: not in Stage II"}
    panels = {
        title: {"HFT": runs.pooled("two-hft", domain), "HGPO": runs.pooled("two-grpo", domain)}
        for domain, title in domains.items()
    }
    rows = [
        [
            title,
            name,
            _with_interval(evaluation, "hybrid_accuracy"),
            _with_interval(evaluation, "accuracy", "auto"),
            *[_percent(evaluation["by_level"][i]["thinking_ratio"]) for i in (0, -1)],
        ]
        for title, evaluations in panels.items()
        for name, evaluation in evaluations.items()
    ]
    held_out = [entry["thinking_ratio"] for entry in panels[domains[HELD_OUT]]["HGPO"]["by_level"]]
    return [
        Heading("Figure 5: a domain that Stage II has not seen"),
        Paragraph(
            "The paper: trained on maths and general queries, the model thinks more on harder problems of code, too. "
            "Here Stage I sees chain sums and the shell game, Stage II chain sums alone; in the shell game the "
            "thinking ratio "
            f"goes from {_percent(held_out[0])} at the easiest to {_percent(held_out[-1])} at the hardest level: more "
            f"thinking at the hardest {_holds(held_out[-1] > held_out[0])}, a rise at every step "
            f"{_holds(_rises(held_out))}."
        ),
        Table(
            ["domain", "model", "hybrid accuracy", "accuracy, own choice", "P(think), easiest", "P(think), hardest"],
            rows, labels=2,
        ),
        _picture("figure_5", "Probability of thinking by level and domain", "All prompts of all seeds.",
                 lambda figure: _panels(figure, panels)),
    ]  # fmt: skip


def _sizes(runs: Runs) -> list[Block]:
    names = {"smaller": ("small-hft", "small-grpo"), "larger": ("hft", "grpo")}
    pooled = {name: (runs.pooled(hft), runs.pooled(hgpo)) for name, (hft, hgpo) in names.items()}
    rows = [
        [
            f"{name}, {_parameters(runs, hgpo):,} parameters",
            _with_interval(after, "thinking_ratio"),
            _seeds(runs.per_seed(hgpo, "thinking_ratio")),
            _with_interval(after, "hybrid_accuracy"),
            _percent(_at(after, "accuracy", "auto")),
            _percent(_at(before, "accuracy", "no_think")),
            _percent(_at(before, "accuracy", "think")),
        ]
        for (name, (_, hgpo)), (before, after) in zip(names.items(), pooled.values(), strict=True)
    ]
    more = pooled["smaller"][1]["thinking_ratio"] > pooled["larger"][1]["thinking_ratio"]
    return [
        Heading("Figure 6: two model sizes"),
        Paragraph(f"The paper: in Stage II the smaller model learns to think more, the larger one less. Here the "
                  f"smaller one thinks more in the end: {_holds(more)}."),
        Table(
            ["model", "P(think)", "seeds", "hybrid accuracy", "accuracy, own choice", "HFT, never thinking",
             "HFT, always thinking"],
            rows,
        ),
        _picture("figure_6", "Probability of thinking during Stage II", "Training queries; thin lines are seeds.",
                 lambda figure: _training(figure.add_subplot(), runs, {n: m for n, (_, m) in names.items()})),
    ]  # fmt: skip


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
        *_margins(runs, args.margins),
        *_difficulty(runs),
        *_domains(runs),
        *_sizes(runs),
    ]
    for block in blocks:
        if isinstance(block, Picture):
            write_atomically(args.output_dir / block.file, block.png)
    write_atomically(args.output_dir / "reproduction.md", to_markdown(blocks).encode())
    print(f"Read {args.output_dir / 'reproduction.md'}")


if __name__ == "__main__":
    main()
