"""Models compared on the same prompts: differences against the first one, with paired bootstrap intervals and tests.

A hard prompt is hard for every model. Resampling prompts together with all models' metrics on them takes that out of
the comparison: the intervals are those of the differences, and narrower than the models' own intervals suggest.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import nan_to_null, write_atomically, write_json
from hgpo_trl.evaluation.metrics import prompt_table
from hgpo_trl.evaluation.samples import PROMPT_ID
from hgpo_trl.modes import LHRM, as_format
from hgpo_trl.modes.hybrid_accuracy import (
    BALANCED,
    STRATA,
    Array,
    PromptTable,
    column_means,
    percentile_interval,
    resampled_means,
    summarize,
)
from hgpo_trl.reporting.documents import (
    NO_BREAK,
    Block,
    Bullets,
    Heading,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)
from hgpo_trl.reporting.evaluations import METRICS, lookup
from hgpo_trl.reporting.figures import NEITHER, STYLE, WIDTH, to_png
from hgpo_trl.reporting.plots import MODEL_COLORS, MODEL_MARKERS
from hgpo_trl.reporting.tables import setting_notes

COMPARED = (
    "hybrid_accuracy",
    "balanced_hybrid_accuracy",
    *(name.replace("/", ".") for name in STRATA),
    "unsolved",
    "accuracy.auto",
    "accuracy.sampled",
    "accuracy.think",
    "accuracy.no_think",
    "thinking_ratio",
    "mean_tokens.auto",
)
LABELS = {path: label for label, path, _ in METRICS if path in COMPARED}
RESAMPLES = 10_000
_TOLERANCE = 1e-9  # sums of the same numbers in another order may differ in the last bits


class EvaluationOutput(NamedTuple):
    """The files that `hgpo-trl evaluate` writes into a folder."""

    report: Mapping[str, Any]  # report.json
    samples: pd.DataFrame  # samples.parquet
    prompts: str | None = None  # hash of the prompts, from samples.json; None: not known


class Difference(NamedTuple):
    """Difference of two models in one metric: the second's mean minus the first's."""

    difference: float
    interval: tuple[float, float]  # 95 %
    p_value: float  # two-sided, of no difference
    num_prompts: int  # on which both have a valid number


# --- statistics -----------------------------------------------------------------------------------------------


def paired_difference(
    first: Array,
    second: Array,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    counted: NDArray[np.bool_] | None = None,
) -> Difference:
    """Mean of `second` minus mean of `first`, both on the same prompts.

    Prompts are resampled with replacement, with both models' values on them. The interval is the 2.5 to the 97.5
    percentile of the resampled differences, and the p-value is the smallest level at which such an interval excludes 0:
    twice the share of the resampled differences on the far side of 0, 0 itself counted to both sides, and the observed
    data as one more resample, so that no p-value is 0.

    Args:
        first, second: `[K]`, NaN where a model has no valid number; or `[S, K]`, where the mean is that of S rows'
            means, each over its own numbers.
        resamples: of the prompts; those without a value are left out.
        seed: the same seed resamples the same prompts for every metric.
        counted: `[K]`, the prompts that count; None: those on which both models have a valid number.

    Returns:
        NaN for all where no prompt is left, or a row has no number on those that are.
    """
    models = np.atleast_2d(first), np.atleast_2d(second)
    missing = [np.isnan(rows).all(axis=0) for rows in models]
    prompts = np.flatnonzero(~(missing[0] | missing[1]) if counted is None else counted)
    count = len(prompts)
    table = {f"{m}/{row}": values[prompts] for m, rows in enumerate(models) for row, values in enumerate(rows)}

    def difference(means: Mapping[str, Any]) -> Any:
        one, other = (np.mean([means[f"{m}/{row}"] for row in range(len(models[m]))], axis=0) for m in (0, 1))
        return other - one

    value = float(difference(column_means(table)))
    if np.isnan(value):
        return Difference(np.nan, (np.nan, np.nan), np.nan, count)
    if count == 1:  # every resample is the same
        return Difference(value, (value, value), 1.0, 1)
    found = difference(resampled_means(table, resamples, seed))
    found = found[~np.isnan(found)]
    far = min((found <= _TOLERANCE).sum(), (found >= -_TOLERANCE).sum())
    p_value = min(1.0, 2 * (1 + int(far)) / (1 + len(found)))
    return Difference(value, percentile_interval(found), p_value, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: each adjusted value at most α holds the chance of any false rejection below α.

    NaN stays NaN and does not count as a test.
    """
    adjusted = [np.nan] * len(p_values)
    order = sorted((i for i in range(len(p_values)) if not np.isnan(p_values[i])), key=lambda i: p_values[i])
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def check_same_prompts(evaluations: Mapping[str, EvaluationOutput]) -> None:
    """Raise UserError, with the difference, unless all were evaluated on the same prompts with the same margin.

    An evaluation does not hold the prompts themselves. So this compares the data set, the number of prompts, their
    number at each level, their ids and, where both have it, their hash.
    """
    (first, reference), *others = evaluations.items()
    for name, evaluation in others:
        hashes = (reference.prompts, evaluation.prompts)
        for key, one, other in (
            *((key, reference.report[key], evaluation.report[key]) for key in ("dataset", "num_prompts", "margin")),
            ("prompts per level", _levels(reference.report), _levels(evaluation.report)),
            ("prompt ids", _prompt_ids(reference.samples), _prompt_ids(evaluation.samples)),
            *([] if None in hashes else [("hash of the prompts", *hashes)]),
        ):
            if one != other:
                raise UserError(
                    f"compare: {first!r} and {name!r} were not evaluated alike: {key} is {one!r} and {other!r}. Paired "
                    "differences need the same prompts and margin; run `hgpo-trl evaluate` for both with the same "
                    "data, split, num_prompts and margin."
                )


def _levels(report: Mapping[str, Any]) -> list[tuple[Any, int]]:
    return [(entry["level"], entry["num_prompts"]) for entry in report["by_level"]]


def _prompt_ids(samples: pd.DataFrame) -> str:
    """The ids of the prompts, short enough for a message."""
    ids = np.unique(samples[PROMPT_ID])
    return f"{len(ids)} from {ids[0]} to {ids[-1]}" if len(ids) else "none"


def compare(evaluations: Mapping[str, EvaluationOutput], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Compute every model's metrics, and the difference of each later model from the first.

    Args:
        evaluations: name -> evaluation, at least two, on the same prompts.

    Returns:
        The content of `comparison.json`: see docs/evaluation.md.

    Raises:
        UserError: fewer than two evaluations, they do not fit together, or samples are not scored.
    """
    if len(evaluations) < 2:
        raise UserError(f"compare: {len(evaluations)} evaluation is given; name at least two, as NAME=FOLDER.")
    for name, evaluation in evaluations.items():
        if "reward" not in evaluation.samples:
            raise UserError(
                f"compare: the samples of {name!r} have no column 'reward', they were not scored to the end. "
                "Run that `hgpo-trl evaluate` again."
            )
    check_same_prompts(evaluations)
    tables = {
        name: prompt_table(
            evaluation.samples,
            evaluation.report["margin"],
            evaluation.report.get("decision_bias", 0.0),
            as_format(evaluation.report.get("mode_format", LHRM)),
        )
        for name, evaluation in evaluations.items()
    }
    (reference, first), *others = tables.items()
    found = {
        name: {path: _difference(first, table, path, resamples, seed) for path in COMPARED} for name, table in others
    }
    adjusted = {
        path: dict(zip(found, holm([of[path].p_value for of in found.values()]), strict=True)) for path in COMPARED
    }
    any_report = evaluations[reference].report
    return {
        "reference": reference,
        "dataset": any_report["dataset"],
        "num_prompts": any_report["num_prompts"],
        "margin": any_report["margin"],
        "resamples": resamples,
        "seed": seed,
        "models": {name: _metrics(evaluations[name].report, table) for name, table in tables.items()},
        "differences": {
            name: {path: {**difference._asdict(), "p_holm": adjusted[path][name]} for path, difference in of.items()}
            for name, of in found.items()
        },
    }


def _difference(first: PromptTable, second: PromptTable, path: str, resamples: int, seed: int) -> Difference:
    """`paired_difference` in a metric.

    Where thinking gains is for each model to say: it answers for its own strata, of the prompts that count for both.
    """
    name = _column(path)
    columns = BALANCED.get(name, (name,))
    counted = None
    if {*columns} & {*STRATA}:
        counted = ~np.isnan(first["hybrid_accuracy"] + second["hybrid_accuracy"])
    one, other = (np.stack([table[column] for column in columns]) for table in (first, second))
    return paired_difference(one, other, resamples, seed, counted=counted)


def _column(path: str) -> str:
    return path.replace(".", "/")


def _metrics(report: Mapping[str, Any], table: PromptTable) -> dict[str, Any]:
    """A model's own metrics, as in its report.json, and the settings that identify it."""
    settings = {key: report[key] for key in ("model", "samples_per_mode", "decision_bias", "settings") if key in report}
    columns = {name: column for name, column in table.items() if name.replace("/", ".") in COMPARED}
    return {**settings, **summarize(columns)}


# --- the report --------------------------------------------------------------------------------------------


def _is_share(path: str) -> bool:
    return not path.startswith("mean_tokens")


def _number(path: str, value: float, sign: str = "") -> str:
    """ "3.2" for a share of 0.032, which stands in a column of percent; tokens as they are."""
    if np.isnan(value):
        return "–"
    value = round(100 * value if _is_share(path) else value, 1) + 0.0  # + 0.0: no negative zero
    return f"{value:{sign},.1f}".replace("-", "−")


def _bracketed(path: str, value: float, interval: Sequence[float], sign: str = "") -> str:
    low, high = (_number(path, bound, sign) for bound in interval)
    return f"{_number(path, value, sign)} [{low},{NO_BREAK}{high}]"


def _p(value: float) -> str:
    return "–" if np.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _label(path: str) -> str:
    return f"{LABELS[path]}{', %' if _is_share(path) else ''}"


def _models_table(comparison: Mapping[str, Any]) -> Table:
    models = comparison["models"]
    rows = [
        [_label(path), *(_bracketed(path, lookup(of, path), lookup(of["intervals"], path)) for of in models.values())]
        for path in COMPARED
    ]
    return Table(["", *models], rows)


def _differences_table(comparison: Mapping[str, Any]) -> Table:
    rows = []
    for path in COMPARED:
        for name, of in comparison["differences"].items():
            found = of[path]
            shown = _bracketed(path, found["difference"], found["interval"], "+")
            rows.append([_label(path), name, shown, _p(found["p_value"]), _p(found["p_holm"])])
    return Table(["", "Model", "Difference", "p", "p, Holm"], rows, labels=2)


def _picture(comparison: Mapping[str, Any]) -> bytes:
    """Differences with their intervals: shares in points, and tokens on an axis of their own."""
    differences = comparison["differences"]
    panels = [[path for path in COMPARED if _is_share(path)], [path for path in COMPARED if not _is_share(path)]]
    rows = 0.24 * len(differences) + 0.22
    with matplotlib.rc_context(STYLE):
        height = rows * len(COMPARED) + 1.7
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(len(panels), height_ratios=[len(panel) + 0.3 for panel in panels])
        for panel, paths, unit in zip(axes, panels, ("percentage points", "tokens per response"), strict=True):
            for index, (name, of) in enumerate(differences.items()):
                _draw(panel, paths, name, of, index, len(differences))
            panel.axvline(0, color=NEITHER, linewidth=1.2, zorder=1)
            panel.set_yticks(range(len(paths)), [LABELS[path] for path in paths])
            panel.set_ylim(len(paths) - 0.5, -0.5)
            panel.grid(visible=False, axis="y")
            panel.tick_params(axis="y", length=0)
            panel.set_xlabel(f"difference from {comparison['reference']}, {unit}")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(differences), 5))
        return to_png(figure)


def _draw(axes: Axes, paths: Sequence[str], name: str, of: Mapping[str, Any], index: int, count: int) -> None:
    """Draw one model's differences, a row for each metric; the models of a row one below the other."""
    scale = np.array([100.0 if _is_share(path) else 1.0 for path in paths])
    y = np.arange(len(paths)) + 0.6 * ((index + 0.5) / count - 0.5)
    values = np.array([of[path]["difference"] for path in paths], dtype=np.float64) * scale
    low, high = np.array([of[path]["interval"] for path in paths], dtype=np.float64).T * scale
    color, marker = MODEL_COLORS[(index + 1) % len(MODEL_COLORS)], MODEL_MARKERS[(index + 1) % len(MODEL_MARKERS)]
    axes.hlines(y, low, high, color=color, linewidth=2, alpha=0.6, zorder=2)
    axes.plot(values, y, color=color, marker=marker, markersize=5, linestyle="none", label=name, zorder=3)


def _blocks(comparison: Mapping[str, Any], picture: bytes) -> list[Block]:
    reference, models = comparison["reference"], comparison["models"]
    tests = len(comparison["differences"])
    measured = [
        f"`{name}`: model `{of['model']}`, {of['samples_per_mode']} responses in each mode"
        + (f", decision bias {of['decision_bias']:g}." if of.get("decision_bias") else ".")
        for name, of in models.items()
    ]
    corrected = (
        f" over the {tests} models compared with it" if tests > 1 else ", which changes nothing for a single model"
    )
    return [
        Heading("Comparison of models", level=1),
        Paragraph(
            f"On `{comparison['dataset']}`, {comparison['num_prompts']:,} prompts, margin {comparison['margin']:g}. "
            "Shares are in percent, tokens are means per response, brackets are 95 % intervals; a dash means that "
            "there is no valid number."
        ),
        Bullets(measured),
        *(Paragraph(note) for note in setting_notes(models)),
        Heading("Side by side"),
        _models_table(comparison),
        Heading(f"Differences from {reference}"),
        Paragraph(
            f"In percentage points or tokens; above 0 is more than `{reference}`. Intervals and p-values are of a "
            f"paired bootstrap over prompts ({comparison['resamples']:,} resamples): each takes all models' metrics on "
            "the same prompts. They say how far the differences depend on which prompts were drawn, not on training "
            f"seeds. The last column is corrected by Holm's method{corrected}, for each metric by itself."
        ),
        _differences_table(comparison),
        Picture(
            "differences.png",
            picture,
            f"Differences from {reference}",
            "Markers are differences of means, bars their 95 % intervals by paired bootstrap over prompts. How to read "
            "it: a bar that does not touch the grey line is a difference that these prompts can tell from none.",
        ),
    ]


def write_comparison(comparison: Mapping[str, Any], output_dir: str | os.PathLike[str]) -> Path:
    """Write comparison.json, comparison.md, comparison.html (self-contained) and differences.png.

    Args:
        comparison: of `compare`.
        output_dir: created if missing.

    Returns:
        Path of comparison.md. Identical input gives identical bytes in every file.
    """
    output = Path(output_dir)
    picture = _picture(comparison)
    blocks = _blocks(comparison, picture)
    write_atomically(output / "differences.png", picture)
    write_json(output / "comparison.json", nan_to_null(comparison))
    write_atomically(output / "comparison.html", to_html("Comparison of models", blocks).encode())
    write_atomically(output / "comparison.md", to_markdown(blocks).encode())
    return output / "comparison.md"
