"""Draw the figures of a report; a figure whose input is missing is None."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from hgpo_trl.reporting.documents import Picture
from hgpo_trl.reporting.evaluations import Budgets, Evaluation, budget_of, interval_of, levels_of, value_of
from hgpo_trl.reporting.figures import INK, NEITHER, NO_THINK, PERCENT_TICKS, STYLE, THINK, WIDTH, to_png
from hgpo_trl.reporting.training_log import Array, TrainingLog, series_of

Draw = Callable[[SubFigure, TrainingLog], None]
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
    bounds = np.array([interval_of(entry, path) for entry in entries])  # [n, 2]
    axes.vlines(x, bounds[:, 0], bounds[:, 1], color=style["color"], linewidth=1.4, alpha=0.55)
    axes.plot(x, [value_of(entry, path) for entry in entries], markersize=6, **style)


def _thinking_ratio_by_level(evaluations: Mapping[str, Evaluation]) -> Figure | None:
    levels = levels_of(evaluations.values())
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
    x, y = value_of(evaluation, f"mean_tokens.{policy}"), value_of(evaluation, f"accuracy.{policy}")
    cross: dict[str, Any] = {"color": color, "linewidth": 1.2, "alpha": 0.45}
    axes.hlines(y, *interval_of(evaluation, f"mean_tokens.{policy}"), **cross)
    axes.vlines(x, *interval_of(evaluation, f"accuracy.{policy}"), **cross)
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
        [value_of(evaluation, f"{metric}.{mode}") for mode in ("no_think", "think")]
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
            [value_of(entry, f"{metric}.auto") for entry in curve] for metric in ("mean_tokens", "accuracy")
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
        x = np.array([float(budget_of(entry) or 0) for entry in entries])
        for policy, label, style in (("think", "always thinking", "-"), ("auto", "own choice", "--")):
            _draw_with_interval(
                axes, x, entries, f"accuracy.{policy}", label=f"{name}, {label}", linestyle=style, **look
            )
        unlimited = value_of(evaluations[name], "accuracy.think")
        axes.axhline(unlimited, color=look["color"], linewidth=1.2, linestyle=":", label=f"{name}, no budget")
    axes.set(xlabel="budget of reasoning (tokens)")
    axes.set_xlim(left=0)
    _accuracy_axis(axes, "accuracy")
    figure.legend(loc="outside right upper", labelspacing=0.9)
    return figure


def _curve(axes: Axes, log: TrainingLog, key: str, color: str, label: str, **style: Any) -> None:
    """Draw a logged value over the steps: as logged (faint), and its centred running mean over 4 % of the run."""
    steps, values = series_of(log, key)
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
        elif len(series_of(log, "loss")[0]):
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


def draw_pictures(
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
