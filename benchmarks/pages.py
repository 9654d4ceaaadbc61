"""What the pages of results share: evaluations of several seeds together, with intervals, and how they are shown.

A figure is the mean over the prompts of all seeds; its 95 % interval resamples the queries, so it says how much the
queries matter. Short queries are few, so that the held-out prompts hold some of them many times: within each level
whole queries of a seed are resampled, with all their copies.
"""

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hgpo_trl.common.files import write_atomically
from hgpo_trl.evaluation.metrics import prompt_table, report_on
from hgpo_trl.evaluation.samples import PROMPT_ID
from hgpo_trl.modes.hybrid_accuracy import PromptTable
from hgpo_trl.reporting.documents import Block, Picture, to_markdown
from hgpo_trl.reporting.figures import PERCENT_TICKS, STYLE, WIDTH, to_png

Evaluation = dict[str, Any]

COLOURS = ("#7B4FB5", "#12866A", "#C2255C", "#8A6A00", "#0B7FA3", "#E07B00", "#555555", "#2066B0")
MARGIN = 0.2  # δ of the recipes
PANELS = 4  # in a row


class Prompts(NamedTuple):
    """The prompts of several seeds together, numbered on; `K` of them."""

    samples: pd.DataFrame
    table: PromptTable  # of `prompt_table`, [K] each
    levels: NDArray[Any]  # [K]
    queries: NDArray[np.int64]  # [K], number of the query that each prompt is a copy of


class Runs:
    """The evaluations SEED/eval/MODEL of all seeds in a folder."""

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

    def prompts(self, model: str, domain: str | None = None) -> Prompts:
        """The prompts of all seeds; of one domain alone if one is named."""
        return _together([self.samples(model, seed) for seed in self.seeds], domain)

    def of_seed(self, model: str, seed: int) -> Evaluation:
        return _evaluate(_together([self.samples(model, seed)], None))

    def pooled(self, model: str, domain: str | None = None) -> Evaluation:
        return _evaluate(self.prompts(model, domain))

    def per_seed(self, model: str, *path: str) -> list[float]:
        return [at(self.of_seed(model, seed), *path) for seed in self.seeds]


def _together(parts: Sequence[pd.DataFrame], domain: str | None) -> Prompts:
    pooled = pd.concat(parts, keys=range(len(parts)), names=["seed"]).reset_index("seed")
    if domain is not None:
        pooled = pooled[pooled["domain"] == domain]
    pooled[PROMPT_ID] = pooled.groupby(["seed", PROMPT_ID]).ngroup()
    prompts = pooled.drop_duplicates(PROMPT_ID).sort_values(PROMPT_ID)
    queries = prompts.groupby(["seed", "query"]).ngroup().to_numpy()
    return Prompts(pooled, prompt_table(pooled, MARGIN), prompts["level"].to_numpy(), queries)


def _evaluate(prompts: Prompts) -> Evaluation:
    """`report_on`, with the intervals of `intervals` by the names of `prompt_table`."""
    samples, table, levels, queries = prompts
    evaluation = report_on(samples, MARGIN, levels.tolist())
    evaluation["intervals"] = intervals(table, levels, queries)
    for entry in evaluation["by_level"]:
        rows = levels == entry["level"]
        entry["intervals"] = intervals({n: column[rows] for n, column in table.items()}, levels[rows], queries[rows])
    return evaluation


def intervals(
    table: PromptTable, levels: NDArray[Any], queries: NDArray[np.int64], resamples: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of every column's mean.

    Args:
        table: one row per prompt.
        levels: of each prompt. How many queries a level has is not resampled: the data set has exact shares of levels.
        queries: number of the query that each prompt is a copy of. A query is drawn with all its copies.
    """
    rng = np.random.default_rng(seed)
    distinct, first, codes = np.unique(queries, return_index=True, return_inverse=True)
    counts = np.zeros((resamples, len(distinct)))
    for level in np.unique(levels):
        members = np.flatnonzero(levels[first] == level)
        counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
    found = {}
    for name, column in table.items():
        valid = ~np.isnan(column)
        totals = counts @ np.bincount(codes, np.where(valid, column, 0.0))
        weights = counts @ np.bincount(codes, valid)
        means = totals[weights > 0] / weights[weights > 0]
        low, high = np.quantile(means, [0.025, 0.975]) if len(means) else (np.nan, np.nan)
        found[name] = (float(low), float(high))
    return found


# --- how they are shown ---------------------------------------------------------------------------------------


def at(evaluation: Evaluation, *path: str) -> Any:
    value: Any = evaluation
    for key in path:
        value = value[key]
    return value


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def with_interval(evaluation: Evaluation, *path: str) -> str:
    low, high = evaluation["intervals"]["/".join(path)]
    return f"{percent(at(evaluation, *path))} [{100 * low:.1f}, {100 * high:.1f}]"


def seeds(values: Sequence[float]) -> str:
    return " / ".join(f"{100 * value:.1f}" for value in values)


def holds(verdict: bool) -> str:
    return "holds" if verdict else "does not hold"


def rises(values: Sequence[float]) -> bool:
    """Whether every value is above the one before."""
    return all(low < high for low, high in pairwise(values))


def picture(file: str, title: str, caption: str, draw: Callable[[Figure], None], height: float = 3.6) -> Picture:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        return Picture(f"images/{file}.png", to_png(figure), title, caption)


def _by_level(axes: Axes, evaluations: dict[str, Evaluation]) -> None:
    """Thinking ratio over the level, with intervals."""
    for index, (name, evaluation) in enumerate(evaluations.items()):
        entries = evaluation["by_level"]
        low, high = np.array([entry["intervals"]["thinking_ratio"] for entry in entries]).T
        x = np.arange(len(entries)) + 0.05 * (index - (len(evaluations) - 1) / 2)
        axes.vlines(x, low, high, color=COLOURS[index], alpha=0.5)
        axes.plot(x, [entry["thinking_ratio"] for entry in entries], marker="o", color=COLOURS[index], label=name)
        axes.set_xticks(range(len(entries)), [str(entry["level"]) for entry in entries])
    axes.set(xlabel="level", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(PERCENT_TICKS)


def panels(figure: Figure, titled: dict[str, dict[str, Evaluation]]) -> None:
    """Thinking ratio by level, one panel per title."""
    columns = min(len(titled), PANELS)
    grid = figure.subplots(math.ceil(len(titled) / columns), columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(titled) :]:
        axes.set_axis_off()
    for axes, (title, evaluations) in zip(grid.flat, titled.items(), strict=False):
        _by_level(axes, evaluations)
        axes.set_title(fill(title, 100 // columns), fontsize=10)  # characters: 100 fill the picture's width
    for row in grid:
        row[0].set_ylabel("probability of thinking")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)


def write_page(path: Path, blocks: Sequence[Block]) -> None:
    """Write a page and, beside it, its pictures."""
    for block in blocks:
        if isinstance(block, Picture):
            write_atomically(path.parent / block.file, block.png)
    write_atomically(path, to_markdown(blocks).encode())
    print(f"Read {path}")
