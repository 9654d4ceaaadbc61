"""The comparison of rules: its runs, on a small model, and its page, from runs that are made up."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from made_up import write_evaluation
from scipy.stats import ttest_1samp
from settings import TWO_QUERIES

from hgpo_trl import HGPOConfig
from hgpo_trl.common.errors import UserError
from hgpo_trl.reporting.documents import Bullets, Table, to_markdown
from hgpo_trl.rewards import accuracy_reward
from hgpo_trl.training.rules.adaptthink import REFERENCE

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import rule_comparison
import rule_run
from rule_comparison import Comparison, Findings
from rule_curves import area, metric_at, tokens_to
from rule_run import RULES, Budgeted, Curve

# --- in the trainer -----------------------------------------------------------------------------------------------


def build(rule: str, model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path, **fields: Any) -> Budgeted:
    rule_fields = {**RULES[rule].fields, **RULES[rule].weights["high"]}
    trainer = Budgeted(
        model=model_dir,
        reward_funcs=[accuracy_reward],
        args=HGPOConfig(**TWO_QUERIES | {"output_dir": str(tmp_path), **rule_fields, **fields}),
        train_dataset=prompts.add_column(REFERENCE, [0.5] * len(prompts)),
        processing_class=tokenizer,
    )
    trainer.budget = 10**6
    return trainer


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_and_counts_its_tokens(
    rule: str, model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = build(rule, model_dir, prompts, tokenizer, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 1
    logged = [entry["hgpo/rollout_tokens"] for entry in trainer.state.log_history if "hgpo/rollout_tokens" in entry]
    assert trainer.rollout_tokens == pytest.approx(2 * logged[0])  # the mean of two queries
    assert trainer.rollout_tokens > 0


def test_training_ends_with_the_tokens_and_the_learning_rate_follows_them(
    model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule_run, "EVERY", 300)
    trainer = build("hgpo", model_dir, prompts, tokenizer, tmp_path, max_steps=1000)
    trainer.budget = 800
    curve = Curve(trainer, lambda: {"rate": trainer.optimizer.param_groups[0]["lr"] if trainer.optimizer else 0.0})
    trainer.add_callback(curve)
    trainer.train()
    tokens = [int(point["tokens"]) for point in curve.points]
    assert tokens[0] == 0
    assert tokens[-2] < 800 <= tokens[-1] == trainer.rollout_tokens
    assert len({count // 300 for count in tokens[:-1]}) == len(tokens) - 1 >= 2  # at most one in 300 tokens
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.05)


def test_decay_by_hand() -> None:
    assert [rule_run.decay(spent) for spent in (0.0, 0.3, 0.65, 1.0, 1.2)] == pytest.approx([1, 1, 0.525, 0.05, 0.05])


def test_reference_rewards_are_the_means_of_thinking() -> None:
    samples = pd.DataFrame(
        {
            "prompt_id": [1, 1, 1, 0, 0],
            "mode": ["think", "think", "no_think", "think", "no_think"],
            "reward": [1.0, 0.5, 0.0, 0.25, 1.0],
        }
    )
    assert rule_run.reference_rewards(samples, 2) == [0.25, 0.75]
    assert math.isnan(rule_run.reference_rewards(samples, 3)[2])  # the trainer refuses it


# --- curves -------------------------------------------------------------------------------------------------------


def curve(*accuracies: float, every: int = 1000) -> list[dict[str, float]]:
    return [
        {
            "step": 10 * i,
            "tokens": every * i,
            "hybrid_accuracy": accuracy,
            "accuracy_sampled": accuracy,
            "thinking_ratio": 0.5,
        }
        for i, accuracy in enumerate(accuracies)
    ]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=5), st.floats(0, 1), st.integers(1, 60)
)
def test_area_is_the_mean_of_the_interpolated_metric(
    points: list[tuple[int, float]], first: float, tokens: int
) -> None:
    """Knots are whole numbers, so that the mid-points between those give the exact mean; stays after the last knot."""
    places, values = [0], [first]
    for gap, value in points:
        places.append(places[-1] + gap)
        values.append(value)

    def value_at(place: float) -> float:
        for low, high, left, right in zip(places, places[1:], values, values[1:], strict=False):
            if place <= high:
                return left + (right - left) * (place - low) / (high - low)
        return values[-1]

    made = [{"tokens": place, "hybrid_accuracy": value} for place, value in zip(places, values, strict=True)]
    assert area(made, tokens) == pytest.approx(sum(value_at(i + 0.5) for i in range(tokens)) / tokens)
    assert metric_at(made, tokens + 0.5) == pytest.approx(value_at(tokens + 0.5))


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ((0.3, 0.8, 1.0, 0.95), 1500),
        ((0.3, 0.95, 0.85, 0.9, 0.9), 3000),
        ((0.95, 0.95), 0),
        ((0.3, 0.8), math.nan),
        ((0.3, 0.95, 0.8, 0.95), math.nan),
        ((0.3, 0.95), math.nan),
    ],
)
def test_tokens_to_the_target_are_interpolated_and_confirmed(accuracies: tuple[float, ...], expected: float) -> None:
    assert tokens_to(curve(*accuracies)) == pytest.approx(expected, nan_ok=True)


def test_a_model_of_one_mode_decides_nothing(compare: Callable[..., Comparison], tmp_path: Path) -> None:
    comparison = compare({"grpo": [(0.3, 1.0, 1.0)] * 2}, {"grpo": (0.1, 0.9)})
    for seed, thinking_ratio in enumerate((0.05, 0.04)):
        path = tmp_path / str(seed) / "grpo" / "curve.json"
        path.write_text(path.read_text().replace('"thinking_ratio": 0.5', f'"thinking_ratio": {thinking_ratio}'))
    kept, lost = Comparison(tmp_path, [0, 1], comparison.rules).runs["grpo"]
    assert [point["hybrid_accuracy"] for point in kept["curve"]] == [0.3, 1.0, 1.0]
    assert [point["hybrid_accuracy"] for point in lost["curve"]] == [0.0, 0.0, 0.0]


def test_the_search_chooses_the_largest_area_within_the_tokens() -> None:
    late = {"curve": curve(0.3, 0.3, 1.0, 1.0), "tokens": 1500}  # higher at the end, and beyond the tokens
    early = {"curve": curve(0.3, 0.9, 0.9, 0.9), "tokens": 1500}
    assert rule_run.choose([late, early]) is early
    assert rule_run.choose([early, early | {"weight": "high"}]) is early


# --- the page -----------------------------------------------------------------------------------------------------


def test_interval_of_seeds_is_students() -> None:
    values = [0.91, 0.95, 0.84]
    expected = ttest_1samp(values, 0).confidence_interval()
    assert rule_comparison.seeds_interval(values) == pytest.approx((expected.low, expected.high))
    assert all(math.isnan(bound) for bound in rule_comparison.seeds_interval([0.9]))
    assert rule_comparison.mean_of_seeds([0.9]) == "0.900"


def test_a_target_that_most_seeds_miss_is_not_reached() -> None:
    assert rule_comparison.median_of_seeds([1.0, math.nan, math.nan], ".0f") == "– (1, –, –)"
    assert rule_comparison.median_of_seeds([1.0, math.nan, 3.0], ".0f") == "3 (1, –, 3)"


def test_the_fewest_tokens_of_each_seed() -> None:
    tokens = {"hgpo": [3.0, 2.0, math.nan], "grpo": [math.nan, 1.0, math.nan]}
    assert rule_comparison.fewest(tokens) == ["hgpo", "grpo", None]


@pytest.mark.parametrize(
    ("change", "adaptive"),
    [
        ({}, True),
        ({"accuracy_lost": 0.021}, False),
        ({"tokens_saved": 0.0}, False),
        ({"hardest": 0.1}, False),
        ({"settled": [False, True]}, False),
    ],
)
def test_adaptive_needs_all_of_it(change: dict[str, Any], adaptive: bool) -> None:
    found = {"accuracy_lost": 0.02, "tokens_saved": 0.3, "easiest": 0.1, "hardest": 0.9, "settled": [False, False]}
    assert Findings(**{**found, **change}).adaptive is adaptive


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., Comparison]:
    """A comparison of two seeds. Curves by rule and seed; no-think is right everywhere, and think costs 20 tokens."""

    def write(path: Path, rule: str, tokens: int, points: list[dict[str, float]]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        run = {"rule": rule, "seed": 0, "learning_rate": 1e-3, "weight": "low", "tokens": tokens, "curve": points}
        (path / "curve.json").write_text(json.dumps(run))

    def compare(curves: dict[str, list[tuple[float, ...]]], ratios: dict[str, tuple[float, ...]]) -> Comparison:
        write_evaluation(tmp_path, "hft", (0.6, 0.6), think_tokens=20)
        for rule, of_seeds in curves.items():
            write(tmp_path / "search" / rule / "1e-3-low", rule, 2000, curve(*of_seeds[0]))
            for seed, accuracies in enumerate(of_seeds):
                write(tmp_path / str(seed) / rule, rule, 4000, curve(*accuracies))
            write_evaluation(tmp_path, rule, ratios[rule], think_tokens=20)
        return Comparison(tmp_path, [0, 1], list(curves))

    return compare


def test_the_page(compare: Callable[..., Comparison]) -> None:
    comparison = compare(
        {
            "hgpo": [(0.3, 0.7, 0.9, 0.95), (0.3, 0.4, 0.5, 0.9, 0.95)],
            "lazy": [(0.3, 0.9, 0.95), (0.3, 0.9, 0.95)],
            "grpo": [(0.3, 0.4, 0.4), (0.3, 0.7, 0.9, 0.95)],
        },
        {"hgpo": (0.1, 0.9), "lazy": (0.1, 0.9), "grpo": (0.01, 0.02)},
    )
    blocks = rule_comparison.blocks_of(comparison)
    cells = [row for block in blocks if isinstance(block, Table) for row in block.rows]
    assert ["HGPO", "0.001, α = 1", "2 (2, 3)", "1.00 (1.00, 1.00)"] in [row[:4] for row in cells]
    assert ["HGPO, lazy thinking", "0.001, α = 1", "1 (1, 1)", "0.42 (0.50, 0.33)"] in [row[:4] for row in cells]
    assert ["GRPO, bonus δ", "0.001, δ = 0.1", "– (–, 2)", "– (–, 0.67)"] in [row[:4] for row in cells]
    # HGPO thinks on the harder half with 20 tokens for 5, and hybrid accuracy wants no think there
    assert next(row for row in cells if row[0] == "HGPO" and "thinks where" in row[1])[2:] == [
        "holds", "0.0", "37.5 %", "10.0 % to 90.0 %", "0 of 2",
    ]  # fmt: skip
    grpo = next(row for row in cells if row[0] == "GRPO, bonus δ" and "settles" in row[1])
    assert (grpo[2], grpo[-1]) == ("holds", "2 of 2")
    first, lazy = next(block for block in blocks if isinstance(block, Bullets)).items
    assert "on every seed: does not hold (seed 0 HGPO, seed 1 GRPO, bonus δ)" in first
    assert "holds (fewer by 50.0 %, 66.7 %; hybrid accuracy +0.0 points [+0.0, +0.0])" in lazy
    assert to_markdown(blocks).count("](images/") == 2


def test_the_difference_from_hgpo_is_of_the_same_queries(compare: Callable[..., Comparison]) -> None:
    """No think is better everywhere: who thinks on one of two levels has half of the hybrid accuracy."""
    comparison = compare({"hgpo": [(0.3, 0.9)] * 2, "grpo": [(0.3, 0.9)] * 2}, {"hgpo": (0.1, 0.9), "grpo": (0.1, 0.1)})
    gain, interval = comparison.difference("grpo")
    assert gain == pytest.approx(0.5)
    assert interval == pytest.approx((0.5, 0.5))  # within a level nothing varies


def test_runs_of_unequal_tokens_are_refused(compare: Callable[..., Comparison], tmp_path: Path) -> None:
    comparison = compare({"hgpo": [(0.3, 0.9)] * 2}, {"hgpo": (0.1, 0.9)})
    path = tmp_path / "1" / "hgpo" / "curve.json"
    path.write_text(path.read_text().replace("4000", "5000"))
    with pytest.raises(UserError, match="runs of 4000 and 5000 tokens"):
        Comparison(tmp_path, [0, 1], comparison.rules)


def test_a_search_without_runs_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no runs"):
        rule_run.read_runs(tmp_path)


def test_arguments_need_one_source_of_the_setting(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rule", "hgpo", "--seed", "0", "--runs", "x", "--tokens", "1", "--output_dir", "y"]
    assert rule_run.read_arguments([*words, "--best_of", "z"]).learning_rate is None
    for wrong in ([], ["--weight", "low"], ["--best_of", "z", "--weight", "low"]):
        with pytest.raises(SystemExit):
            rule_run.read_arguments([*words, *wrong])
    assert "either --best_of" in capsys.readouterr().err
