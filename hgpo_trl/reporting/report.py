"""One readable report from evaluations, training logs and a margin sweep: Markdown, HTML, JSON and figures.

The text is built once, as a list of blocks (`Heading`, `Paragraph`, `Table`, ...), and rendered twice, so that
report.md and report.html cannot differ. Every number in it comes from the evaluations.
"""

import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from hgpo_trl.common.errors import UserError
from hgpo_trl.common.files import make_folder, nan_to_null, write_atomically
from hgpo_trl.modes import LHRM
from hgpo_trl.modes.hybrid_accuracy import STRATA
from hgpo_trl.reporting.documents import (
    NO_BREAK,
    Block,
    Bullets,
    Heading,
    Lead,
    Paragraph,
    Picture,
    Table,
    to_html,
    to_markdown,
)
from hgpo_trl.reporting.examples import Example, example_blocks, number
from hgpo_trl.reporting.figures import INK, NEITHER, NO_THINK, PERCENT_TICKS, STYLE, THINK, WIDTH, to_png

Array = NDArray[np.float64]
Evaluation = Mapping[str, Any]  # report.json of `hgpo-trl evaluate`
TrainingLog = Sequence[Mapping[str, Any]]  # `log_history` of a Trainer
Budgets = Mapping[str, Sequence[Evaluation]]  # name of an evaluation -> others of its model, by rising `think_budget`
Draw = Callable[[SubFigure, TrainingLog], None]

# ----------------------------------------------------------------------------------------------------
# Reading evaluations
# ----------------------------------------------------------------------------------------------------


def lookup(evaluation: Evaluation, path: str) -> Any:
    """`lookup(e, "accuracy.auto")` is `e["accuracy"]["auto"]`; KeyError where any part is missing."""
    value: Any = evaluation
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise KeyError(path)
        value = value[key]
    return value


def _value(evaluation: Evaluation, path: str) -> float:
    return number(_found(evaluation, path))


def _interval(evaluation: Evaluation, path: str) -> tuple[float, float]:
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


def _budget(evaluation: Evaluation) -> int | None:
    """Its `think_budget`; reports of earlier versions have none."""
    return evaluation.get("settings", {}).get("think_budget")


def _percent(value: float, decimals: int = 1) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.{decimals}f}{NO_BREAK}%"


def _tokens(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.{1 if value < 1000 else 0}f}"


def _rate(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.2f}"


def _with_interval(evaluation: Evaluation, path: str, form: Callable[[float], str]) -> str:
    """ "95.0 % [93.1, 96.9]", breaking only before the bracket; without it where the interval is null."""
    low, high = (form(bound).removesuffix(f"{NO_BREAK}%") for bound in _interval(evaluation, path))
    text = form(_value(evaluation, path))
    return text if "–" in (low, high) else f"{text} [{low},{NO_BREAK}{high}]"


# (row of the table, path in the evaluation, format). METRICS have intervals and are repeated for every level.
METRICS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Hybrid accuracy", "hybrid_accuracy", _percent),
    ("Hybrid accuracy, balanced", "balanced_hybrid_accuracy", _percent),
    ("Right choice where thinking gains", "hybrid_accuracy_where.thinking_gains", _percent),
    ("Right choice where it does not", "hybrid_accuracy_where.no_gain", _percent),
    ("Solved by neither mode", "unsolved", _percent),
    ("Thinking ratio", "thinking_ratio", _percent),
    ("Accuracy: own choice", "accuracy.auto", _percent),
    ("Accuracy: own choice, sampled", "accuracy.sampled", _percent),
    ("Accuracy: always thinking", "accuracy.think", _percent),
    ("Accuracy: never thinking", "accuracy.no_think", _percent),
    ("Accuracy: oracle", "accuracy.oracle", _percent),
    ("Tokens: own choice", "mean_tokens.auto", _tokens),
    ("Tokens: own choice, sampled", "mean_tokens.sampled", _tokens),
    ("Tokens: always thinking", "mean_tokens.think", _tokens),
    ("Tokens: never thinking", "mean_tokens.no_think", _tokens),
    ("Tokens: oracle", "mean_tokens.oracle", _tokens),
    ("Off-mode mass", "off_mode_mass", _percent),
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
    ("Format faults, thinking", "format_faults.think", _percent),
    ("Format faults, not thinking", "format_faults.no_think", _percent),
    ("Truncated, thinking", "truncated.think", _percent),
    ("Truncated, not thinking", "truncated.no_think", _percent),
)
GROUPS = {"level": "Results by difficulty level", "domain": "Results by domain"}  # each a table of its own
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


def _check(name: str, evaluation: Evaluation) -> None:
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


def _labels(evaluations: Iterable[Evaluation], group: str) -> list[Any]:
    """Every level or domain that occurs: numbers in order, then text."""
    labels = {entry[group] for evaluation in evaluations for entry in evaluation.get(f"by_{group}", [])}
    return sorted(labels, key=lambda label: (isinstance(label, str), label))


def _levels(evaluations: Iterable[Evaluation]) -> list[Any]:
    return _labels(evaluations, "level")


def load_training_log(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """`log_history` of a training run: one dict per logged step.

    Args:
        run_dir: a Trainer's `output_dir`. Its trainer_state.json is read, else that of its newest checkpoint.

    Raises:
        UserError: neither exists.
    """
    root = Path(run_dir)
    checkpoints = [path for path in root.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    newest_first = sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for folder in (root, *newest_first):
        state = folder / "trainer_state.json"
        if state.is_file():
            return json.loads(state.read_text(encoding="utf-8"))["log_history"]
    raise UserError(
        f"run_dir={str(run_dir)!r} has no trainer_state.json, nor has a checkpoint-* in it. Pass the "
        "output_dir of a training run that saved its state or a checkpoint (save_strategy other than 'no')."
    )


# ----------------------------------------------------------------------------------------------------
# Figures: each function returns None where its input is missing
# ----------------------------------------------------------------------------------------------------

MODEL_COLORS = ("#7B4FB5", "#12866A", "#C2255C", "#8A6A00", "#0B7FA3")
MODEL_MARKERS = ("o", "s", "^", "D", "v", "P")  # one more than colours: 30 distinct pairs


def _look(index: int) -> dict[str, str]:
    """Colour and marker of the index-th evaluation, the same in all figures."""
    return {
        "color": MODEL_COLORS[index % len(MODEL_COLORS)],
        "marker": MODEL_MARKERS[index % len(MODEL_MARKERS)],
    }


def _probability_axis(axes: Axes, label: str) -> None:
    """An axis from 0 to 100 %."""
    axes.set(ylim=(-0.03, 1.03), ylabel=label)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PERCENT_TICKS)


def _accuracy_axis(axes: Axes, label: str) -> None:
    """An axis around the data, wide enough that a difference of a few tenths of a point does not fill the figure."""
    low, high = axes.get_ylim()
    span = max(high - low, 0.1)
    high = min(high, 1) + span / 20
    low = min(low, high - span)
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(low, high)
    axes.set_yticks([tick for tick in ticks if tick < 1 + 1e-9])
    axes.yaxis.set_major_formatter(PERCENT_TICKS)
    axes.set(ylim=(low, high), ylabel=label)


def _draw_with_interval(axes: Axes, x: Array, entries: Sequence[Evaluation], path: str, **style: Any) -> None:
    """A line through the metric of `entries` at `x` (`[n]`), with its 95 % intervals as vertical bars."""
    bounds = np.array([_interval(entry, path) for entry in entries])  # [n, 2]
    axes.vlines(x, bounds[:, 0], bounds[:, 1], color=style["color"], linewidth=1.4, alpha=0.55)
    axes.plot(x, [_value(entry, path) for entry in entries], markersize=6, **style)


def _thinking_ratio_by_level(evaluations: Mapping[str, Evaluation]) -> Figure | None:
    levels = _levels(evaluations.values())
    if not levels:
        return None
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.add_subplot()
    drawn = {name: evaluation for name, evaluation in evaluations.items() if evaluation["by_level"]}
    # Side by side, so that no bar hides another.
    offsets = 0.07 * (np.arange(len(drawn)) - (len(drawn) - 1) / 2)
    for offset, (name, evaluation) in zip(offsets, drawn.items(), strict=True):
        entries = sorted(evaluation["by_level"], key=lambda entry: levels.index(entry["level"]))
        x = np.array([levels.index(entry["level"]) for entry in entries]) + offset
        _draw_with_interval(axes, x, entries, "thinking_ratio", label=name, **_look(list(evaluations).index(name)))
    axes.set(xlabel="difficulty level", xlim=(-0.4, len(levels) - 0.6))
    axes.set_xticks(range(len(levels)), [textwrap.fill(str(level), 14) for level in levels])
    axes.grid(visible=False, axis="x")
    _probability_axis(axes, "probability of thinking")
    figure.legend(loc="outside upper left", ncols=min(len(drawn), 5))
    return figure


def _accuracy_vs_tokens(evaluations: Mapping[str, Evaluation]) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, evaluation) in enumerate(evaluations.items()):
        _mark(axes, evaluation, "sampled", markersize=5.5, zorder=3, **_look(index))
        _mark(axes, evaluation, "auto", markersize=10, zorder=3, label=name, **_look(index))
    axes.plot([], [], color=NEITHER, linestyle="none", marker="o", markersize=5.5, label="the same, sampled")
    _mark_fixed_policies(axes, list(evaluations.values())[-1])
    _accuracy_over_tokens(figure, axes)
    return figure


def _accuracy_over_tokens(figure: Figure, axes: Axes) -> None:
    """Axes and legend of a figure of accuracy over tokens."""
    axes.set(xlabel="tokens per response")
    axes.set_xlim(left=0)
    axes.margins(y=0.08)
    _accuracy_axis(axes, "accuracy")
    figure.legend(loc="outside right upper", labelspacing=0.9)


def _mark(axes: Axes, evaluation: Evaluation, policy: str, color: str, **style: Any) -> None:
    """A policy's accuracy at its tokens, with both intervals."""
    x, y = _value(evaluation, f"mean_tokens.{policy}"), _value(evaluation, f"accuracy.{policy}")
    cross: dict[str, Any] = {"color": color, "linewidth": 1.2, "alpha": 0.45}
    axes.hlines(y, *_interval(evaluation, f"mean_tokens.{policy}"), **cross)
    axes.vlines(x, *_interval(evaluation, f"accuracy.{policy}"), **cross)
    axes.plot(x, y, color=color, linestyle="none", **style)


def _mark_fixed_policies(axes: Axes, evaluation: Evaluation) -> None:
    """Mark always and never thinking and the oracle, and draw the line of random thinking between the first two."""
    for policy, label, color, marker, size in (
        ("think", "always thinking", THINK, "o", 13),
        ("no_think", "never thinking", NO_THINK, "o", 13),
        ("oracle", "oracle", INK, "*", 19),
    ):  # hollow and on top: what lies within stays visible
        shape = {"marker": marker, "markersize": size, "markerfacecolor": "none", "markeredgewidth": 1.8}
        _mark(axes, evaluation, policy, color, label=label, zorder=5, **shape)
    tokens, accuracy = (
        [_value(evaluation, f"{metric}.{mode}") for mode in ("no_think", "think")]
        for metric in ("mean_tokens", "accuracy")
    )
    style: dict[str, Any] = {"color": NEITHER, "linewidth": 1.2, "linestyle": "--"}
    axes.plot(tokens, accuracy, label="thinking at random", **style)


def _decision_bias(evaluations: Mapping[str, Evaluation]) -> Figure | None:
    drawn = {name: evaluation for name, evaluation in evaluations.items() if "decision_bias_curve" in evaluation}
    if not drawn:
        return None
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for name, evaluation in drawn.items():
        look: dict[str, Any] = {**_look(list(evaluations).index(name))}
        curve = evaluation["decision_bias_curve"]
        tokens, accuracy = (
            [_value(entry, f"{metric}.auto") for entry in curve] for metric in ("mean_tokens", "accuracy")
        )
        axes.plot(tokens, accuracy, color=look["color"], label=name, zorder=3)
        own = [index for index, entry in enumerate(curve) if entry["bias"] == 0]
        axes.plot([tokens[i] for i in own], [accuracy[i] for i in own], markersize=10, zorder=4, **look)
    axes.plot([], [], color=NEITHER, linestyle="none", marker="o", markersize=10, label="own choice (bias 0)")
    last = list(drawn.values())[-1]
    _mark_fixed_policies(axes, last)
    _accuracy_over_tokens(figure, axes)
    return figure


def _accuracy_over_budgets(evaluations: Mapping[str, Evaluation], budgets: Budgets) -> Figure | None:
    if not budgets:
        return None
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, entries in budgets.items():
        look: dict[str, Any] = _look(list(evaluations).index(name))
        x = np.array([float(_budget(entry) or 0) for entry in entries])
        for policy, label, style in (("think", "always thinking", "-"), ("auto", "own choice", "--")):
            _draw_with_interval(
                axes, x, entries, f"accuracy.{policy}", label=f"{name}, {label}", linestyle=style, **look
            )
        unlimited = _value(evaluations[name], "accuracy.think")
        axes.axhline(unlimited, color=look["color"], linewidth=1.2, linestyle=":", label=f"{name}, no budget")
    axes.set(xlabel="budget of reasoning (tokens)")
    axes.set_xlim(left=0)
    _accuracy_axis(axes, "accuracy")
    figure.legend(loc="outside right upper", labelspacing=0.9)
    return figure


def _series(log: TrainingLog, key: str) -> tuple[Array, Array]:
    """Steps and values of the entries that have a number under `key` (both `[n]`)."""
    points = [(entry["step"], number(entry[key])) for entry in log if key in entry and "step" in entry]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps[~np.isnan(values)], values[~np.isnan(values)]


def _curve(axes: Axes, log: TrainingLog, key: str, color: str, label: str, **style: Any) -> None:
    """Draw a logged value over the steps: as logged (faint), and its centred running mean over 4 % of the run."""
    steps, values = _series(log, key)
    if not len(steps):
        return
    last, half = len(values) - 1, len(values) // 50
    reach = [min(half, i, last - i) for i in range(len(values))]  # narrower at the ends, so that they stay true
    smooth = [values[i - r : i + r + 1].mean() for i, r in enumerate(reach)]
    if half:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
    axes.plot(steps, smooth, color=color, label=label, **style)


COMPACT: dict[str, Any] = {"fontsize": 9.2, "handlelength": 1.1, "columnspacing": 1.0, "handletextpad": 0.5}


def _panel(axes: Axes) -> None:
    """Put the legend in a line above the data; the title of the value axis names the metric."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.margins(x=0.02)
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=3, borderaxespad=0.2, **COMPACT)


def _hgpo_panels(figure: SubFigure, log: TrainingLog) -> None:
    (reward, length), (first_token, share) = figure.subplots(2, 2)
    for mode, label, color in (("think", "think", THINK), ("no_think", "no think", NO_THINK)):
        _curve(reward, log, f"hgpo/reward/{mode}", color, label)
        _curve(length, log, f"hgpo/length/{mode}", color, label)
        _curve(first_token, log, f"hgpo/prob/{mode}", color, label)
    _curve(first_token, log, "hgpo/off_mode_mass", NEITHER, "neither")
    _curve(share, log, "hgpo/think_win_rate", THINK, "thinking wins")
    _curve(share, log, "hgpo/no_signal", NEITHER, "no signal")
    _curve(share, log, "eval_hgpo/hybrid_accuracy", INK, "better mode picked", marker="o", markersize=4)
    _curve(share, log, "eval_hgpo/balanced_hybrid_accuracy", NO_THINK, "… balanced", marker="o", markersize=4)
    reward.set_ylabel("mean reward")
    length.set_ylim(bottom=0)
    length.set_ylabel("tokens per response")
    _probability_axis(first_token, "probability as first token")
    _probability_axis(share, "share of queries")
    for axes in (reward, length, first_token, share):
        _panel(axes)


def _loss_panel(figure: SubFigure, log: TrainingLog) -> None:
    axes = figure.subplots()
    _curve(axes, log, "loss", INK, "loss")
    axes.set_ylabel("loss (nats per token)")
    _panel(axes)


def _training_curves(training_logs: Mapping[str, TrainingLog]) -> Figure | None:
    panels: dict[str, tuple[Draw, float]] = {}  # name -> drawing, height in inches
    for name, log in training_logs.items():
        if any(key.startswith("hgpo/") for entry in log for key in entry):
            panels[name] = (_hgpo_panels, 5.6)
        elif len(_series(log, "loss")[0]):
            panels[name] = (_loss_panel, 2.7)
    if not panels:
        return None
    heights = [height for _, height in panels.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (name, (draw, _)) in zip(parts, panels.items(), strict=True):
        part.suptitle(name, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
        draw(part, training_logs[name])
    return figure


def _margin_sweep(sweep: Mapping[float, Evaluation]) -> Figure | None:
    if not sweep:
        return None
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    thinking, accuracy, tokens = figure.subplots(1, 3)
    for axes, path in (
        (thinking, "thinking_ratio"),
        (accuracy, "accuracy.auto"),
        (tokens, "mean_tokens.auto"),
    ):
        _draw_with_interval(axes, np.array(list(sweep)), list(sweep.values()), path, color=INK, marker="o")
        axes.set_xlabel("training margin δ")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.margins(x=0.08)
    _probability_axis(thinking, "probability of thinking")
    _accuracy_axis(accuracy, "accuracy of its own choice")
    tokens.set_ylim(bottom=0)
    tokens.set_ylabel("tokens per response")
    return figure


# ----------------------------------------------------------------------------------------------------
# Text and tables
# ----------------------------------------------------------------------------------------------------

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


def _headline(name: str, evaluation: Evaluation) -> str:
    accuracy, tokens = _value(evaluation, "accuracy.auto"), _value(evaluation, "mean_tokens.auto")
    always, hybrid = _value(evaluation, "mean_tokens.think"), _value(evaluation, "hybrid_accuracy")
    share = tokens / always if always > 0 else math.nan
    answers = "" if math.isnan(accuracy) else f"answers {_percent(accuracy)} correctly"
    cost = f"{'with' if answers else 'takes'} {_percent(share, 0)} of the tokens of always thinking"
    picks = f"picks the better mode for {_with_interval(evaluation, 'hybrid_accuracy', _percent)} of the prompts"
    gains, others = (_percent(_value(evaluation, name.replace("/", "."))) for name in STRATA)
    if "–" not in (gains, others):
        picks += f" ({gains} of those where thinking gains, {others} of the others)"
    clauses = [
        _join([answers, "" if math.isnan(share) else cost], " "),
        "" if math.isnan(hybrid) else picks,
    ]
    return f"`{name}` {_join(clauses, ' and ') or 'has no valid samples'}."


def _comparisons(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Compare the last evaluation with always and never thinking and with the others, and name thinking by level."""
    *others, (name, last) = evaluations.items()
    accuracy, tokens = _value(last, "accuracy.auto"), _value(last, "mean_tokens.auto")
    items = []
    for mode, label in (("think", "always thinking"), ("no_think", "never thinking")):
        changes = _join(
            [
                _difference("accuracy", accuracy, _value(last, f"accuracy.{mode}")),
                _difference("tokens", tokens, _value(last, f"mean_tokens.{mode}"), relative=True),
            ]
        )
        items.append(changes and f"`{name}` by its own choice, against the same model {label}: {changes}.")
    for other_name, other in others:
        changes = _join(
            [
                *(
                    _difference(label, _value(last, path), _value(other, path))
                    for label, path in (
                        ("hybrid accuracy", "hybrid_accuracy"),
                        ("balanced", "balanced_hybrid_accuracy"),
                    )
                ),
                _difference("accuracy", accuracy, _value(other, "accuracy.auto")),
                _difference("tokens", tokens, _value(other, "mean_tokens.auto"), relative=True),
            ]
        )
        items.append(changes and f"`{name}` against `{other_name}`, both by their own choice: {changes}.")
    unsolved = _value(last, "unsolved")
    if not math.isnan(unsolved):
        items.append(f"{_percent(unsolved)} of the prompts are solved by neither mode of `{name}`.")
    for other_name, evaluation in evaluations.items():
        entries = {entry["level"]: entry for entry in evaluation["by_level"]}
        if len(entries) > 1:
            ends = _levels([evaluation])[0], _levels([evaluation])[-1]
            ratios = [_with_interval(entries[level], "thinking_ratio", _percent) for level in ends]
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


def _measured(name: str, evaluation: Evaluation) -> str:
    bias, budget = evaluation.get("decision_bias", 0.0), _budget(evaluation)
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


def _model_table(evaluations: Mapping[str, Evaluation]) -> Table:
    rows = [[label, *(_with_interval(e, path, form) for e in evaluations.values())] for label, path, form in METRICS]
    rows += [[label, *(form(_value(e, path)) for e in evaluations.values())] for label, path, form in FAULTS]
    return Table(["", *evaluations], rows)


def results_markdown(evaluations: Mapping[str, Evaluation]) -> str:
    """Render the settings and the table of results as Markdown. UserError if an evaluation lacks a key."""
    for name, evaluation in evaluations.items():
        _check(name, evaluation)
    measured = Bullets([_measured(name, evaluation) for name, evaluation in evaluations.items()])
    return to_markdown([measured, _model_table(evaluations)])


def _select(*paths: str) -> list[tuple[str, str, Callable[[float], str]]]:
    return [metric for path in paths for metric in METRICS if metric[1] == path]


def _group_table(evaluations: Mapping[str, Evaluation], group: str) -> Table:
    """A row for each level or domain and model."""
    modes = ("auto", "think", "no_think")
    policies = [f"{metric}.{mode}" for metric in ("accuracy", "mean_tokens") for mode in modes]
    shown = _select("hybrid_accuracy", "balanced_hybrid_accuracy", "unsolved", "thinking_ratio", *policies)
    rows = []
    for label in _labels(evaluations.values(), group):
        for name, evaluation in evaluations.items():
            for entry in evaluation.get(f"by_{group}", []):
                if entry[group] == label:
                    numbers = [_with_interval(entry, path, form) for _, path, form in shown]
                    rows.append([str(label), name, str(entry["num_prompts"]), *numbers])
    return Table([group.capitalize(), "Model", "Prompts", *(label for label, _, _ in shown)], rows, labels=2)


def _sweep_table(sweep: Mapping[float, Evaluation]) -> Table:
    shown = _select(
        "hybrid_accuracy", "balanced_hybrid_accuracy", "thinking_ratio", "accuracy.auto", "mean_tokens.auto"
    )
    rows = [[f"{d:g}", *(_with_interval(e, path, form) for _, path, form in shown)] for d, e in sweep.items()]
    return Table(["Training margin δ", *(label for label, _, _ in shown)], rows)


def _budget_table(evaluations: Mapping[str, Evaluation], budgets: Budgets) -> Table:
    """A row for each budget and model, and one without a budget."""
    shown = _select("accuracy.think", "accuracy.auto", "accuracy.no_think", "mean_tokens.think", "mean_tokens.auto")
    rows = []
    for name, entries in budgets.items():
        for entry in (*entries, evaluations[name]):
            numbers = [_with_interval(entry, path, form) for _, path, form in shown]
            budget = "none" if _budget(entry) is None else str(_budget(entry))
            rows.append([name, budget, *numbers, _percent(_value(entry, "truncated.think"))])
    return Table(["Model", "Budget", *(label for label, _, _ in shown), "Truncated, thinking"], rows, labels=2)


def _check_budgets(evaluations: Mapping[str, Evaluation], budgets: Budgets) -> None:
    """Raise UserError unless all are evaluations of a model that is shown, each under another budget."""
    for name, entries in budgets.items():
        if name not in evaluations:
            raise UserError(
                f"budget_sweep: {name!r} is none of the evaluations ({', '.join(evaluations)}). Name the one of the "
                "same model without a budget."
            )
        found = [_budget(entry) for entry in entries]
        for budget, entry in zip(found, entries, strict=True):
            _check(f"budget_sweep {name}, budget {budget}", entry)
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


CAPTIONS = {
    "thinking_ratio_by_level": (
        "Thinking by difficulty",
        (
            "The mean probability that the model thinks, for the prompts of each level; bars "
            "are 95 % intervals. How to read it: a flat line is a model that chooses regardless of "
            "difficulty; a line that rises with difficulty is a model that saves its thinking for hard "
            "prompts. The HGPO paper reports a flat line after HFT and a rising one after HGPO."
        ),
    ),
    "accuracy_vs_tokens": (
        "Accuracy against cost",
        (
            "Large filled markers: each model by its own choice; small ones: the same with a sampled first "
            "token. Hollow markers and the dashed line are about the last model only: made to think always, "
            "or never; the oracle; and thinking at random, with the same probability on every prompt. "
            "Crosses are 95 % intervals. How to read it: up is better, left is cheaper. The last model's "
            "choice is worth something if it lies above the dashed line."
        ),
    ),
    "decision_bias": (
        "Accuracy against cost under a decision bias",
        (
            "Each line is one model whose log-odds of thinking are moved by a bias, from never to always thinking; the "
            "filled marker is its own choice, without a bias. All of it is computed from the same responses. Hollow "
            "markers and the dashed line are about the last model only, as above. How to read it: a line that bends "
            "towards the upper left belongs to a model that knows which prompts need thinking, and every point "
            "on it can be had by setting `decision_bias`; a line near the dashed one is no better than thinking at "
            "random."
        ),
    ),
    "accuracy_over_budgets": (
        "Accuracy under a budget of reasoning",
        (
            "The accuracy of each model when its reasoning is closed by force after so many tokens and it answers from "
            "what it has: thinking on every prompt, and by its own choice. Dotted: always thinking without a budget. "
            "Bars are 95 % intervals. How to read it: the shortest budget at which a solid line is close to the dotted "
            "one is what the model's reasoning needs; the own choice holds out longer if the model answers the prompts "
            "that it knows without thinking."
        ),
    ),
    "training_curves": (
        "Training",
        (
            "Strong lines are running means over 4 % of the run, faint ones the values as logged. For an "
            "HGPO run, in which every query is answered in both modes: the reward and the length of each "
            "mode's responses; the probability of each mode as first token (“neither”, every other token, "
            "should stay near 0); and the share of queries where thinking won on mean reward, after the "
            "margin, and of those that gave no signal at all. “Better mode picked”, where it was logged, is "
            "hybrid accuracy on the evaluation prompts, “balanced” its balanced form. For any other run: its loss."
        ),
    ),
    "margin_sweep": (
        "Thinking against the margin",
        (
            "One model per training margin δ, the bonus that not thinking gets when HGPO compares the two "
            "modes. Bars are 95 % intervals. How to read it: the left and the right panel show whether a "
            "larger margin gives less thinking and shorter responses, the middle one at what accuracy."
        ),
    ),
}


def _pictures(
    evaluations: Mapping[str, Evaluation],
    training_logs: Mapping[str, TrainingLog],
    sweep: Mapping[float, Evaluation],
    budgets: Budgets,
) -> list[Picture]:
    with matplotlib.rc_context(STYLE):
        figures = {
            "thinking_ratio_by_level": _thinking_ratio_by_level(evaluations),
            "accuracy_vs_tokens": _accuracy_vs_tokens(evaluations),
            "decision_bias": _decision_bias(evaluations),
            "accuracy_over_budgets": _accuracy_over_budgets(evaluations, budgets),
            "training_curves": _training_curves(training_logs),
            "margin_sweep": _margin_sweep(sweep),
        }
        return [Picture(f"{name}.png", to_png(figure), *CAPTIONS[name]) for name, figure in figures.items() if figure]


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
    limited = {f"{name}, budget {_budget(entry)}": entry for name, entries in budgets.items() for entry in entries}
    blocks: list[Block] = [
        Heading(title, level=1),
        Lead(_headline(name, last)),
        *(Bullets(items) for items in [_comparisons(evaluations)] if items),
        *(Paragraph(note) for note in setting_notes(everything)),
        *(Paragraph(note) for note in setting_notes({name: _unlimited(entry) for name, entry in limited.items()})),
        Heading("What was measured"),
        Paragraph(
            "With the opening of its response, each model chooses for each prompt whether it thinks or answers at "
            "once. To see whether it chooses well, every prompt was answered in both modes and every response was "
            "scored. The model's own choice is then compared with always thinking, with never thinking and with an "
            "oracle that knows the better mode of each prompt."
        ),
        Bullets([_measured(name, evaluation) for name, evaluation in (everything | limited).items()]),
        Heading("Results"),
        Paragraph(
            "Tokens are means per response. Brackets are 95 % intervals; a dash means that there is no valid number."
        ),
        _model_table(evaluations),
    ]
    for group, heading in GROUPS.items():
        if len(_labels(evaluations.values(), group)) > (group == "domain"):  # a single domain is the whole
            blocks += [Heading(heading), _group_table(evaluations, group)]
    if sweep:
        blocks += [Heading("Results by training margin"), _sweep_table(sweep)]
    if budgets:
        blocks += [Heading("Results by budget of reasoning"), _budget_table(evaluations, budgets)]
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
    for name in ("margin_sweep", "budget_sweep"):
        if name in evaluations:
            raise UserError(f"evaluations: the name {name!r} is taken by a key of report.json. Choose another one.")
    sweep = dict(sorted((margin_sweep or {}).items()))
    for name, evaluation in evaluations.items():
        _check(name, evaluation)
    for margin, evaluation in sweep.items():
        _check(f"margin_sweep[{margin:g}]", evaluation)
    _check_budgets(evaluations, budget_sweep or {})
    budgets = {name: sorted(entries, key=lambda e: _budget(e) or 0) for name, entries in (budget_sweep or {}).items()}

    pictures = _pictures(evaluations, training_logs or {}, sweep, budgets)
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
