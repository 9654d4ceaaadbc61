"""`hgpo_trl.modes.hybrid_accuracy` by hand, against a loop-by-loop reference, and its intervals in a simulation."""

import math
import tracemalloc
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hgpo_trl.modes import hybrid_accuracy
from hgpo_trl.modes.hybrid_accuracy import (
    PromptTable,
    accuracy_at_budget,
    better_mode,
    biased_choice,
    bootstrap_intervals,
    decision_bias_curve,
    evaluation_metrics,
    group_labels,
    per_prompt_table,
    summarize,
    summarize_by,
    sweep_biases,
)

pytestmark = pytest.mark.filterwarnings("error")  # NaN is an ordinary value here: numpy must not complain

NAN = math.nan
THINK, NO_THINK, NEITHER = 0, 1, -1
POLICIES = ("auto", "sampled", "think", "no_think", "oracle")


@dataclass(frozen=True)
class Prompt:
    """One scored prompt, in plain Python: `scores[mode][sample]`, `lengths[mode][sample]`."""

    scores: tuple[list[float], list[float]]
    lengths: tuple[list[int], list[int]]
    prob_think: float = 0.5
    prob_no_think: float = 0.5
    picked: int = THINK


def table_of(prompts: list[Prompt], margin: float = 0.0) -> PromptTable:
    """Call the code under test."""
    return per_prompt_table(
        np.array([prompt.scores for prompt in prompts], dtype=np.float64),
        np.array([prompt.lengths for prompt in prompts], dtype=np.float64),
        np.array([prompt.prob_think for prompt in prompts]),
        np.array([prompt.prob_no_think for prompt in prompts]),
        np.array([prompt.picked for prompt in prompts]),
        margin,
    )


def row_of(prompt: Prompt, margin: float = 0.0) -> dict[str, float]:
    return {name: float(column[0]) for name, column in table_of([prompt], margin).items()}


# --- The reference ------------------------------------------------------------


def mean(values: list[float]) -> float:
    """Over the values that are not NaN; NaN if there are none."""
    valid = [value for value in values if not math.isnan(value)]
    return math.fsum(valid) / len(valid) if valid else NAN


def reference_target(scores: list[float], lengths: list[float], margin: float) -> int | None:
    """m_gt (paper.md, section 4) from mode means; None where a mode has no valid sample."""
    if math.isnan(scores[THINK]) or math.isnan(scores[NO_THINK]):
        return None
    difference = abs(scores[THINK] - scores[NO_THINK])
    if difference < 1e-9 or difference < margin - 1e-9:  # equal, or closer than the margin
        return THINK if lengths[THINK] < lengths[NO_THINK] else NO_THINK
    return THINK if scores[THINK] > scores[NO_THINK] else NO_THINK


def reference_row(prompt: Prompt, margin: float) -> dict[str, float]:
    scores = [mean(list(samples)) for samples in prompt.scores]
    lengths = [mean([float(length) for length in samples]) for samples in prompt.lengths]
    target = reference_target(scores, lengths, margin)
    neither = min(max(1.0 - prompt.prob_think - prompt.prob_no_think, 0.0), 1.0)
    right = NAN if target is None else float(prompt.picked == target)
    gain = scores[THINK] - scores[NO_THINK]
    gains = gain >= max(margin - 1e-9, 1e-9)
    row = {
        "hybrid_accuracy": right,
        "hybrid_accuracy_where/thinking_gains": right if gains else NAN,
        "hybrid_accuracy_where/no_gain": NAN if gains else right,
        "unsolved": NAN if target is None else float(scores[THINK] < 0.5 and scores[NO_THINK] < 0.5),
        "thinking_ratio": prompt.prob_think,
        "off_mode_mass": neither,
    }
    wrong = NAN if all(math.isnan(score) for score in scores) else 0.0
    for name, by_mode, of_neither in (("accuracy", scores, wrong), ("mean_tokens", lengths, max(lengths))):
        row[f"{name}/auto"] = of_neither if prompt.picked == NEITHER else by_mode[prompt.picked]
        row[f"{name}/sampled"] = (
            prompt.prob_think * by_mode[THINK] + prompt.prob_no_think * by_mode[NO_THINK] + neither * of_neither
        )
        row[f"{name}/think"] = by_mode[THINK]
        row[f"{name}/no_think"] = by_mode[NO_THINK]
        row[f"{name}/oracle"] = NAN if target is None else by_mode[target]
    return row


@st.composite
def probabilities(draw: st.DrawFn) -> tuple[float, float]:
    think = draw(st.floats(0.0, 1.0))
    return think, draw(st.floats(0.0, 1.0)) * (1.0 - think)


@st.composite
def prompt_lists(draw: st.DrawFn, binary: bool = False) -> list[Prompt]:
    num_samples = draw(st.integers(1, 4))
    score = (
        st.sampled_from([0.0, 1.0])
        if binary
        else st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-2.0, 2.0, width=16))
    )
    scores = st.lists(score | st.just(NAN), min_size=num_samples, max_size=num_samples)
    lengths = st.lists(st.integers(1, 5), min_size=num_samples, max_size=num_samples)
    prompts = []
    for _ in range(draw(st.integers(1, 6))):
        prob_think, prob_no_think = draw(probabilities())
        prompts.append(
            Prompt(
                (draw(scores), draw(scores)),
                (draw(lengths), draw(lengths)),
                prob_think,
                prob_no_think,
                draw(st.sampled_from([THINK, NO_THINK, NEITHER])),
            )
        )
    return prompts


# --- Eq. 13 by hand -----------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "lengths", "margin", "expected"),
    [
        pytest.param((0.9, 0.4), (50, 5), 0.0, THINK, id="higher mean wins, think"),
        pytest.param((0.4, 0.9), (5, 50), 0.0, NO_THINK, id="higher mean wins, no think, though longer"),
        pytest.param((0.5, 0.5), (50, 5), 0.0, NO_THINK, id="tie, no think shorter"),
        pytest.param((0.5, 0.5), (5, 50), 0.0, THINK, id="tie, think shorter"),
        pytest.param((0.5, 0.5), (7, 7), 0.0, NO_THINK, id="tie, equal lengths"),
        pytest.param((0.1 + 0.2, 0.3), (50, 5), 0.0, NO_THINK, id="tie but for the last bit"),
        pytest.param((0.6, 0.5), (50, 5), 0.2, NO_THINK, id="think better within the margin, no think shorter"),
        pytest.param((0.5, 0.6), (5, 50), 0.2, THINK, id="no think better within the margin, think shorter"),
        pytest.param((0.6, 0.5), (7, 7), 0.2, NO_THINK, id="within the margin, equal lengths"),
        pytest.param((0.75, 0.5), (50, 5), 0.25, THINK, id="exactly at the margin, think"),
        pytest.param((0.5, 0.75), (5, 50), 0.25, NO_THINK, id="exactly at the margin, no think"),
        pytest.param((0.8, 0.6), (50, 5), 0.2, THINK, id="at the margin but for the last bit"),
        pytest.param((0.9, 0.5), (50, 5), 0.2, THINK, id="beyond the margin"),
        pytest.param((0.5, 0.5), (50, 5), 0.2, NO_THINK, id="tie with a margin"),
        pytest.param((NAN, 0.5), (50, 5), 0.0, -1, id="no valid think sample"),
        pytest.param((0.5, NAN), (50, 5), 0.2, -1, id="no valid no-think sample"),
        pytest.param((NAN, NAN), (50, 5), 0.0, -1, id="no valid sample"),
    ],
)
def test_better_mode(scores: tuple, lengths: tuple, margin: float, expected: int) -> None:
    assert better_mode(np.array([scores]), np.array([lengths], dtype=float), margin).tolist() == [expected]


@given(
    scores=st.lists(
        st.integers(5, 60).map(float) | st.floats(-1e6, 1e6, allow_subnormal=False), min_size=2, max_size=16
    ),
    margin=st.sampled_from([0.0, 0.2]),
    data=st.data(),
)
def test_the_same_scores_in_another_order_are_a_tie(scores: list[float], margin: float, data: st.DataObject) -> None:
    """Whatever the scores' size: the shorter mode is the better one, be it the first or the second."""
    shuffled, lengths = data.draw(st.permutations(scores)), [4] * len(scores)
    shorter = [3] * len(scores)
    tied = [Prompt((scores, shuffled), (lengths, shorter)), Prompt((shuffled, scores), (shorter, lengths))]
    assert table_of(tied, margin)["hybrid_accuracy"].tolist() == [0.0, 1.0], "all pick to think"


def test_a_row_by_hand() -> None:
    prompt = Prompt(([1.0, 1.0, 0.0, NAN], [0.0, 1.0, 0.0, 0.0]), ([8, 10, 12, 10], [2, 2, 3, 1]), 0.5, 0.25, THINK)
    expected = {
        "hybrid_accuracy": 1.0,
        "hybrid_accuracy_where/thinking_gains": 1.0,
        "hybrid_accuracy_where/no_gain": NAN,
        "unsolved": 0.0,
        "thinking_ratio": 0.5,
        "off_mode_mass": 0.25,
        "accuracy/auto": 2 / 3,
        "accuracy/sampled": 0.5 * 2 / 3 + 0.25 * 0.25,
        "accuracy/think": 2 / 3,
        "accuracy/no_think": 0.25,
        "accuracy/oracle": 2 / 3,
        "mean_tokens/auto": 10.0,  # a sample without a score was still paid for
        "mean_tokens/sampled": 0.5 * 10 + 0.25 * 2 + 0.25 * 10,
        "mean_tokens/think": 10.0,
        "mean_tokens/no_think": 2.0,
        "mean_tokens/oracle": 10.0,
    }
    assert row_of(prompt) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("picked", "expected"), [(THINK, 1.0), (NO_THINK, 0.0), (NEITHER, 0.0)])
def test_the_pick_is_right_or_wrong(picked: int, expected: float) -> None:
    prompt = Prompt(([1.0, 1.0], [0.0, 0.0]), ([9, 9], [2, 2]), picked=picked)
    assert row_of(prompt)["hybrid_accuracy"] == expected


def test_picking_neither_scores_nothing_and_costs_the_longer_mode() -> None:
    row = row_of(Prompt(([1.0, 1.0], [1.0, 1.0]), ([3, 3], [8, 10]), 0.1, 0.2, NEITHER))
    assert row["accuracy/auto"] == 0.0
    assert row["mean_tokens/auto"] == 9.0
    assert row["accuracy/sampled"] == pytest.approx(0.3)
    assert row["mean_tokens/sampled"] == pytest.approx(0.1 * 3 + 0.2 * 9 + 0.7 * 9)


@pytest.mark.parametrize(
    ("scores", "lengths", "margin", "better"),
    [
        pytest.param(([1, 0], [0, 1]), ([9, 9], [2, 4]), 0.0, NO_THINK, id="tie, no think shorter"),
        pytest.param(([1, 0], [0, 1]), ([1, 2], [2, 4]), 0.0, THINK, id="tie, think shorter"),
        pytest.param(([1, 1], [1, 1]), ([3, 5], [4, 4]), 0.0, NO_THINK, id="tie, equal mean lengths"),
        pytest.param(([1, 1], [0, 1]), ([9, 9], [2, 4]), 0.5, THINK, id="a gain of the margin counts"),
        pytest.param(([1, 1], [0, 1]), ([9, 9], [2, 4]), 0.6, NO_THINK, id="a gain below the margin does not"),
        pytest.param(([0, 0], [0, 1]), ([1, 1], [2, 4]), 0.6, THINK, id="nor a loss below it, think shorter"),
        pytest.param(([0, 0], [1, 1]), ([1, 1], [2, 4]), 0.6, NO_THINK, id="a loss beyond it"),
        pytest.param(([1, NAN], [0, 1]), ([9, 1], [2, 4]), 0.0, THINK, id="of valid scores alone"),
        pytest.param(([1, NAN], [1, 1]), ([3, 1], [2, 4]), 0.0, THINK, id="lengths of all samples, scored or not"),
    ],
)
@pytest.mark.parametrize("picked", [THINK, NO_THINK, NEITHER])
def test_every_pick_against_every_case(scores: tuple, lengths: tuple, margin: float, better: int, picked: int) -> None:
    row = row_of(Prompt(scores, lengths, picked=picked), margin)
    assert row["hybrid_accuracy"] == float(picked == better)
    assert row["accuracy/oracle"] == mean(list(scores[better]))
    assert row["mean_tokens/oracle"] == mean(list(lengths[better]))
    assert row["accuracy/auto"] == (0.0 if picked == NEITHER else mean(list(scores[picked])))


@pytest.mark.parametrize("picked", [THINK, NO_THINK, NEITHER])
def test_a_mode_without_valid_samples_leaves_the_prompt_out(picked: int) -> None:
    lost = Prompt(([NAN, NAN], [1.0, 0.0]), ([9, 9], [2, 2]), picked=picked)
    kept = Prompt(([1.0, 1.0], [0.0, 0.0]), ([9, 9], [2, 2]), picked=THINK)
    row = row_of(lost)
    for name in ("hybrid_accuracy", "accuracy/oracle", "accuracy/think", "mean_tokens/oracle"):
        assert math.isnan(row[name])
    assert row["accuracy/no_think"] == 0.5
    assert row["mean_tokens/think"] == 9.0
    summary = summarize(table_of([lost, kept]))
    assert summary["num_prompts"] == 2
    assert summary["hybrid_accuracy"] == 1.0
    assert summary["accuracy"]["oracle"] == 1.0


@pytest.mark.parametrize("picked", [THINK, NO_THINK, NEITHER])
def test_a_prompt_without_valid_samples_counts_for_no_policy(picked: int) -> None:
    row = row_of(Prompt(([NAN], [NAN]), ([9], [2]), picked=picked))
    assert all(math.isnan(row[f"accuracy/{policy}"]) for policy in POLICIES)


def test_nothing_valid_at_all() -> None:
    summary = summarize(table_of([Prompt(([NAN], [NAN]), ([9], [2]))] * 3, margin=0.1))
    assert math.isnan(summary["hybrid_accuracy"])
    assert all(math.isnan(bound) for bound in summary["intervals"]["hybrid_accuracy"])
    assert summary["thinking_ratio"] == 0.5


# --- Against the reference ----------------------------------------------------


@settings(max_examples=200)
@given(prompts=prompt_lists(), margin=st.sampled_from([0.0, 0.2, 0.25, 0.5]))
def test_matches_the_reference(prompts: list[Prompt], margin: float) -> None:
    table = table_of(prompts, margin)
    rows = [reference_row(prompt, margin) for prompt in prompts]
    assert list(table) == list(rows[0])
    for name, column in table.items():
        assert column.shape == (len(prompts),)
        assert column.tolist() == pytest.approx([row[name] for row in rows], nan_ok=True), name
    summary = summarize(table)
    assert summary["num_prompts"] == len(prompts)
    for name in table:
        head, _, tail = name.partition("/")
        value = summary[head][tail] if tail else summary[head]
        assert value == pytest.approx(mean([row[name] for row in rows]), nan_ok=True), name
    parts = [mean([row[f"hybrid_accuracy_where/{part}"] for row in rows]) for part in ("thinking_gains", "no_gain")]
    assert summary["balanced_hybrid_accuracy"] == pytest.approx(sum(parts) / 2, nan_ok=True)


@settings(max_examples=200)
@given(prompts=prompt_lists(binary=True))
def test_bounds(prompts: list[Prompt]) -> None:
    table = table_of(prompts)
    auto, oracle, sampled = (table[f"accuracy/{policy}"] for policy in ("auto", "oracle", "sampled"))
    defined = ~np.isnan(oracle)
    assert (oracle[defined] >= auto[defined]).all()
    best = np.fmax(table["accuracy/think"], table["accuracy/no_think"])
    assert (oracle[defined] == best[defined]).all()
    worst = np.fmin(table["accuracy/think"], table["accuracy/no_think"])
    on_mode = 1.0 - table["off_mode_mass"][defined]
    assert (sampled[defined] <= (on_mode * best[defined]) + 1e-9).all()
    assert (sampled[defined] >= (on_mode * worst[defined]) - 1e-9).all()
    tokens = [table[f"mean_tokens/{mode}"] for mode in ("think", "no_think")]
    for policy in ("auto", "sampled"):
        cost = table[f"mean_tokens/{policy}"]
        assert (cost >= np.minimum(*tokens) - 1e-9).all()
        assert (cost <= np.maximum(*tokens) + 1e-9).all()


@settings(max_examples=50)
@given(prompts=prompt_lists(), margins=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)))
def test_a_larger_margin_never_makes_the_oracle_longer(prompts: list[Prompt], margins: tuple[float, float]) -> None:
    small, large = (table_of(prompts, margin)["mean_tokens/oracle"] for margin in sorted(margins))
    defined = ~np.isnan(small)
    assert (large[defined] <= small[defined]).all()


# --- What hybrid accuracy does not show ---------------------------------------

GAINS, NO_GAIN, BALANCED = (
    "hybrid_accuracy_where/thinking_gains",
    "hybrid_accuracy_where/no_gain",
    "balanced_hybrid_accuracy",
)


def always_wrong(picked: int, num_prompts: int = 30) -> list[Prompt]:
    return [Prompt(([0.0] * 4, [0.0] * 4), ([40] * 4, [3] * 4), picked=picked)] * num_prompts


def test_a_model_that_is_always_wrong_and_never_thinks_fools_hybrid_accuracy_alone() -> None:
    summary = summarize(table_of(always_wrong(NO_THINK)))
    assert summary["hybrid_accuracy"] == 1.0
    assert summary["unsolved"] == 1.0
    assert math.isnan(summary[BALANCED]), "there is no prompt where thinking gains"
    lucky = Prompt(([1.0, 0.0, 0.0, 0.0], [0.0] * 4), ([40] * 4, [3] * 4), picked=NO_THINK)
    summary = summarize(table_of([*always_wrong(NO_THINK), lucky], 0.2))
    assert summary["hybrid_accuracy"] == pytest.approx(30 / 31)
    assert (summary["unsolved"], summary[BALANCED]) == (1.0, 0.5), "one response in four is not to solve it"


@settings(max_examples=100)
@given(prompts=prompt_lists(), margin=st.sampled_from([0.0, 0.25]), picked=st.sampled_from([THINK, NO_THINK, NEITHER]))
def test_one_and_the_same_choice_is_worth_half_at_most(prompts: list[Prompt], margin: float, picked: int) -> None:
    """As long as thinking takes the more tokens; a choice that is always the oracle's is worth 1."""
    costly = [replace(prompt, lengths=([9] * len(prompt.scores[0]), [2] * len(prompt.scores[0]))) for prompt in prompts]
    found = summarize(table_of([replace(prompt, picked=picked) for prompt in costly], margin))[BALANCED]
    assert math.isnan(found) or found == (0.0 if picked == NEITHER else 0.5)
    targets = [reference_target([mean(list(s)) for s in prompt.scores], [9.0, 2.0], margin) for prompt in costly]
    oracle = [replace(p, picked=p.picked if t is None else t) for p, t in zip(costly, targets, strict=True)]
    best = summarize(table_of(oracle, margin))[BALANCED]
    assert best == 1.0 or (math.isnan(best) and math.isnan(found))


@settings(max_examples=100)
@given(prompts=prompt_lists(), margin=st.sampled_from([0.0, 0.25]), copies=st.integers(2, 4), data=st.data())
def test_balanced_does_not_depend_on_how_many_prompts_need_thinking(
    prompts: list[Prompt], margin: float, copies: int, data: st.DataObject
) -> None:
    part = data.draw(st.sampled_from([GAINS, NO_GAIN]))
    table = table_of(prompts, margin)
    repeated = [
        copy
        for p, right in zip(prompts, table[part], strict=True)
        for copy in [p] * (1 if math.isnan(right) else copies)
    ]
    before, after = (summarize(table_of(of, margin))[BALANCED] for of in (prompts, repeated))
    assert after == pytest.approx(before, nan_ok=True)


@settings(max_examples=100)
@given(prompts=prompt_lists(), margin=st.sampled_from([0.0, 0.25]))
def test_the_two_parts_make_up_the_whole(prompts: list[Prompt], margin: float) -> None:
    table = table_of(prompts, margin)
    both = np.stack([table[GAINS], table[NO_GAIN]])
    assert (np.isnan(both).sum(axis=0) >= 1).all(), "a prompt is in one part at most"
    whole = np.where(np.isnan(both).all(axis=0), np.nan, np.nan_to_num(both).sum(axis=0))
    assert np.array_equal(whole, table["hybrid_accuracy"], equal_nan=True)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        pytest.param(([0, 0], [0, 0]), 1.0, id="never right"),
        pytest.param(([1, 0, 0], [0, 0, 1]), 1.0, id="right once in three in both"),
        pytest.param(([0, 0], [1, 0]), 0.0, id="half of the responses of one mode"),
        pytest.param(([1, 1], [0, 0]), 0.0, id="one mode always"),
        pytest.param(([0.49, 0.49], [0.2, 0.3]), 1.0, id="graded, below"),
        pytest.param(([0.1, 0.9], [0.2, 0.3]), 0.0, id="graded, half on average"),
        pytest.param(([1 / 6, 1 / 3, 1 - 1e-12], [0.2, 0.3, 0.1]), 0.0, id="half but for the last bits"),
        pytest.param(([-3, -2], [-1, -1]), 1.0, id="negative"),
        pytest.param(([1, NAN], [NAN, NAN]), NAN, id="a mode without a valid score"),
        pytest.param(([0, NAN], [NAN, 1]), 0.0, id="of valid scores alone"),
    ],
)
def test_unsolved(scores: tuple[list[float], list[float]], expected: float) -> None:
    lengths = [9] * len(scores[0]), [2] * len(scores[0])
    for picked in (THINK, NO_THINK, NEITHER):
        assert row_of(Prompt(scores, lengths, picked=picked))["unsolved"] == pytest.approx(expected, nan_ok=True)


# --- Decision bias ------------------------------------------------------------


@st.composite
def consistent_prompts(draw: st.DrawFn) -> list[Prompt]:
    """Prompts whose pick is one that their probabilities allow."""
    prompts = []
    for prompt in draw(prompt_lists()):
        think, no_think = prompt.prob_think, prompt.prob_no_think
        pick = THINK if think >= no_think else NO_THINK
        possible = [pick] if 1 - think - no_think < max(think, no_think) else [pick, NEITHER]
        prompts.append(replace(prompt, picked=draw(st.sampled_from(possible))))
    return prompts


def arrays(prompts: list[Prompt]) -> tuple[tuple, tuple]:
    """Scores and lengths, and the choice, as the functions take them."""
    scored = np.array([p.scores for p in prompts], dtype=float), np.array([p.lengths for p in prompts], dtype=float)
    names = ("prob_think", "prob_no_think", "picked")
    return scored, tuple(np.array([getattr(prompt, name) for prompt in prompts]) for name in names)


biases = st.floats(-30, 30) | st.sampled_from([-math.inf, 0.0, math.inf])


@settings(max_examples=200)
@given(logits=st.tuples(*[st.floats(-10, 10)] * 3), bias=st.floats(-30, 30))
def test_the_bias_is_that_of_the_logits(logits: tuple[float, float, float], bias: float) -> None:
    """Against the softmax of the shifted logits, with a single token that is neither mode."""

    def softmax(values: list[float]) -> list[float]:
        weights = [math.exp(value) for value in values]
        return [weight / math.fsum(weights) for weight in weights]

    think, no_think, other = logits
    before = softmax([think, no_think, other])
    after = softmax([think + bias / 2, no_think - bias / 2, other])
    assume(len(set(before)) == 3)
    order = (THINK, NO_THINK, NEITHER)
    choice = [np.array([before[0]]), np.array([before[1]]), np.array([order[before.index(max(before))]])]
    found = biased_choice(*choice, bias)
    assert [float(found[0][0]), float(found[1][0])] == pytest.approx(after[:2], rel=1e-6, abs=1e-12)
    if order[before.index(max(before))] == NEITHER or bias == 0 or other < min(think, no_think) - 30:
        clear = sorted(after)[-1] - sorted(after)[-2] > 1e-9
        assert not clear or found[2][0] == order[after.index(max(after))]


@settings(max_examples=200)
@given(prompts=consistent_prompts(), pair=st.tuples(biases, biases), margin=st.sampled_from([0.0, 0.25]))
def test_a_larger_bias_never_thinks_less(prompts: list[Prompt], pair: tuple[float, float], margin: float) -> None:
    scored, choice = arrays(prompts)
    small, large = decision_bias_curve(*scored, *choice, sorted(pair), margin)
    for policy in ("auto", "sampled"):
        assert small["thinking_ratio"][policy] <= large["thinking_ratio"][policy] + 1e-12
    before, after = (biased_choice(*choice, bias) for bias in sorted(pair))
    rank = {NO_THINK: 0, NEITHER: 1, THINK: 2}
    assert all(rank[one] <= rank[other] for one, other in zip(before[2].tolist(), after[2].tolist(), strict=True))


@settings(max_examples=100)
@given(prompts=consistent_prompts(), margin=st.sampled_from([0.0, 0.25]))
def test_the_ends_are_never_and_always_thinking_and_0_is_the_models_own(prompts: list[Prompt], margin: float) -> None:
    scored, choice = arrays(prompts)
    summary = summarize(table_of(prompts, margin))
    never, own, always = decision_bias_curve(*scored, *choice, [-math.inf, 0.0, math.inf], margin)
    for metric in ("accuracy", "mean_tokens"):
        for policy in ("auto", "sampled"):
            assert own[metric][policy] == pytest.approx(summary[metric][policy], nan_ok=True)
        for entry, mode in ((never, "no_think"), (always, "think")):
            assert entry[metric]["auto"] == pytest.approx(summary[metric][mode], nan_ok=True)
            # of a mode that is never sampled, too, the expectation needs a valid sample
            scored_in_both = [
                p for p in prompts if metric == "mean_tokens" or not any(map(math.isnan, map(mean, p.scores)))
            ]
            expected = summarize(table_of(scored_in_both))[metric][mode] if scored_in_both else NAN
            assert entry[metric]["sampled"] == pytest.approx(expected, nan_ok=True)
    assert own["hybrid_accuracy"] == pytest.approx(summary["hybrid_accuracy"], nan_ok=True)
    assert own["thinking_ratio"]["sampled"] == pytest.approx(summary["thinking_ratio"])
    assert [entry["thinking_ratio"]["auto"] for entry in (never, always)] == [0.0, 1.0]


@settings(max_examples=200)
@given(prompts=consistent_prompts(), data=st.data())
def test_the_sweep_leaves_no_choice_out(prompts: list[Prompt], data: st.DataObject) -> None:
    """Whatever the bias, its picks are those of one in the sweep, if it lies at no threshold."""
    _, choice = arrays(prompts)
    sweep = sweep_biases(*choice, limit=1000)
    assert np.isfinite(sweep).all()
    assert (np.diff(sweep) > 0).all()
    assert 0.0 in sweep
    picks = [biased_choice(*choice, float(bias))[2].tolist() for bias in sweep]
    bias = data.draw(st.floats(-40, 40))
    near = [biased_choice(*choice, bias + step)[2].tolist() for step in (-1e-6, 0.0, 1e-6)]
    if near[0] == near[1] == near[2] and min(abs(bias - b) for b in _thresholds(prompts)) > 1e-6:
        assert near[1] in picks


def _thresholds(prompts: list[Prompt]) -> list[float]:
    found = [math.inf]
    for prompt in prompts:
        think, no_think = prompt.prob_think, prompt.prob_no_think
        neither = 1 - think - no_think
        pairs = [(no_think, think, 1)] if prompt.picked != NEITHER else [(neither, think, 2), (no_think, neither, 2)]
        found += [n * math.log(a / b) for a, b, n in pairs if a > 0 and b > 0]
    return found


def test_a_long_sweep_is_thinned_out_evenly() -> None:
    log_odds = np.linspace(-3, 5, 500)
    think = 1 / (1 + np.exp(-log_odds))
    choice = think, 1 - think, np.where(think > 0.5, THINK, NO_THINK)
    sweep = sweep_biases(*choice, limit=20)
    assert len(sweep) in (20, 21)  # 0 is added where it is not one of them
    shares = [float((biased_choice(*choice, float(bias))[2] == THINK).mean()) for bias in sweep]
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert max(np.diff(shares)) < 0.06


def test_a_curve_by_hand() -> None:
    prompts = [
        Prompt(([1.0, 1.0], [0.0, 0.0]), ([10, 10], [2, 2]), 0.2, 0.8, NO_THINK),  # thinks from ln 4 on
        Prompt(([1.0, 1.0], [1.0, 1.0]), ([20, 20], [4, 4]), 0.5, 0.25, THINK),  # … from −ln 2 on
    ]
    scored, choice = arrays(prompts)
    never, own, always = decision_bias_curve(*scored, *choice, [-1.0, 0.0, 2.0])
    assert (never["accuracy"]["auto"], never["mean_tokens"]["auto"], never["thinking_ratio"]["auto"]) == (0.5, 3.0, 0.0)
    assert (own["accuracy"]["auto"], own["mean_tokens"]["auto"], own["thinking_ratio"]["auto"]) == (0.5, 11.0, 0.5)
    assert (always["accuracy"]["auto"], always["mean_tokens"]["auto"]) == (1.0, 15.0)
    assert [entry["hybrid_accuracy"] for entry in (never, own, always)] == [0.5, 0.0, 0.5]
    parts = [
        (entry["hybrid_accuracy_where"]["thinking_gains"], entry["hybrid_accuracy_where"]["no_gain"])
        for entry in (never, own, always)
    ]
    assert parts == [(0.0, 1.0), (0.0, 0.0), (1.0, 0.0)]
    assert [entry["balanced_hybrid_accuracy"] for entry in (never, own, always)] == [0.5, 0.0, 0.5]
    weights = 0.5 * math.e, 0.25 / math.e, 0.25
    think = 0.2 * math.e, 0.8 / math.e
    expected = (think[0] / sum(think) + weights[0] / sum(weights)) / 2
    assert always["thinking_ratio"]["sampled"] == pytest.approx(expected)
    assert sweep_biases(*choice) == pytest.approx([-math.log(2) - 1, 0.0, math.log(2) / 2, math.log(4) + 1])


# --- Accuracy at a token budget -----------------------------------------------


@pytest.mark.parametrize(("budget", "expected"), [(2.9, NAN), (3.0, 0.5), (14.9, 0.5), (15.0, 1.0), (1e9, 1.0)])
def test_accuracy_at_a_budget_by_hand(budget: float, expected: float) -> None:
    """Never thinking takes 3 tokens, the second prompt alone 11, always thinking 15; only that is right twice."""
    prompts = [
        Prompt(([1.0, 1.0], [0.0, 0.0]), ([10, 10], [2, 2]), 0.2, 0.8, NO_THINK),
        Prompt(([1.0, 1.0], [1.0, 1.0]), ([20, 20], [4, 4]), 0.5, 0.25, THINK),
    ]
    scored, choice = arrays(prompts)
    assert accuracy_at_budget(*scored, *choice, budget) == pytest.approx(expected, nan_ok=True)
    found = evaluation_metrics(*scored, *choice, margin=0.1, token_budget=budget)
    table = table_of(prompts, 0.1)
    assert list(found) == [*table, BALANCED, "accuracy_at_budget"]
    means = {name: np.nanmean(column) for name, column in table.items()}
    assert found == pytest.approx(means | {BALANCED: 0.0, "accuracy_at_budget": expected}, nan_ok=True)
    assert list(evaluation_metrics(*scored, *choice)) == [*table, BALANCED]


def test_thinking_where_it_helps_little_is_not_always_worth_its_tokens() -> None:
    """More tokens are not always better: the best within the budget is not the last within it."""
    prompts = [
        Prompt(([1.0], [0.0]), ([10], [2]), 0.6, 0.4, THINK),
        Prompt(([0.0], [1.0]), ([10], [2]), 0.5, 0.5, NO_THINK),
    ]
    scored, choice = arrays(prompts)
    assert [accuracy_at_budget(*scored, *choice, budget) for budget in (2, 6, 10)] == [0.5, 1.0, 1.0]


@settings(max_examples=200)
@given(prompts=consistent_prompts(), budget=st.floats(0.5, 60), data=st.data())
def test_no_bias_within_the_budget_does_better(prompts: list[Prompt], budget: float, data: st.DataObject) -> None:
    scored, choice = arrays(prompts)
    found = accuracy_at_budget(*scored, *choice, budget)
    bias = data.draw(st.floats(-40, 40))
    assume(min(abs(bias - threshold) for threshold in _thresholds(prompts)) > 1e-6)
    (point,) = decision_bias_curve(*scored, *choice, [bias])
    if point["mean_tokens"]["auto"] <= budget and not math.isnan(point["accuracy"]["auto"]):
        assert found >= point["accuracy"]["auto"]
    if not math.isnan(found):
        points = decision_bias_curve(*scored, *choice, sweep_biases(*choice, limit=1000))
        assert any(p["accuracy"]["auto"] == found and p["mean_tokens"]["auto"] <= budget for p in points)


# --- Intervals ----------------------------------------------------------------


def example_table(num_prompts: int = 60, seed: int = 0) -> PromptTable:
    rng = np.random.default_rng(seed)
    column = rng.random(num_prompts)
    column[::7] = NAN
    return {"hybrid_accuracy": column, "accuracy/auto": rng.integers(0, 2, num_prompts).astype(float)}


def test_intervals_depend_on_the_seed_alone() -> None:
    table = example_table()
    first = bootstrap_intervals(table, seed=3)
    assert first == bootstrap_intervals(table, seed=3)
    assert first != bootstrap_intervals(table, seed=4)
    assert summarize(table, seed=3)["intervals"]["accuracy"]["auto"] == first["accuracy/auto"]


def test_intervals_contain_the_mean() -> None:
    table = example_table()
    for name, (low, high) in bootstrap_intervals(table).items():
        assert low < np.nanmean(table[name]) < high


def test_interval_of_one_prompt_is_a_point() -> None:
    assert bootstrap_intervals({"x": np.array([0.25])}) == {"x": (0.25, 0.25)}


def test_intervals_take_memory_for_the_prompts_alone() -> None:
    """However many resamples: never the whole table of counts."""
    prompts, resamples = 20_000, 400
    columns = {str(name): np.random.default_rng(name).random(prompts) for name in range(3)}
    tracemalloc.start()
    bootstrap_intervals(columns, resamples)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * prompts * resamples / 2


@pytest.mark.parametrize("block", [1, 70, 1234])
def test_blocks_are_the_resamples_of_one_draw(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    column = np.where(np.arange(30) % 7 == 0, np.nan, np.arange(30.0))
    whole = bootstrap_intervals({"x": column}, resamples=101)
    counts = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=101)
    means = [np.average(column[~np.isnan(column)], weights=count[~np.isnan(column)]) for count in counts]
    assert whole["x"] == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    monkeypatch.setattr(hybrid_accuracy, "BLOCK", block)
    assert bootstrap_intervals({"x": column}, resamples=101)["x"] == pytest.approx(whole["x"], rel=1e-12)


@pytest.mark.parametrize("block", [1, 70, 1234, hybrid_accuracy.BLOCK])
def test_the_balanced_interval_resamples_prompts_of_both_parts(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition, resample by resample: all prompts are drawn together, then each part has its mean."""
    rng = np.random.default_rng(5)
    right, gains = rng.integers(0, 2, 30).astype(float), rng.random(30) < 0.2
    table = {GAINS: np.where(gains, right, NAN), NO_GAIN: np.where(gains, NAN, right)}
    balanced = []
    for count in np.random.default_rng(7).multinomial(30, np.full(30, 1 / 30), size=200):
        drawn = np.repeat(np.arange(30), count)
        if gains[drawn].any() and not gains[drawn].all():
            balanced.append((right[drawn][gains[drawn]].mean() + right[drawn][~gains[drawn]].mean()) / 2)
    assert 150 < len(balanced) <= 200
    monkeypatch.setattr(hybrid_accuracy, "BLOCK", block)
    found = bootstrap_intervals(table, resamples=200, seed=7)
    assert list(found) == [GAINS, NO_GAIN, BALANCED]
    assert found[BALANCED] == pytest.approx(tuple(np.quantile(balanced, [0.025, 0.975])))


def test_the_balanced_interval_covers() -> None:
    """Thinking gains on one prompt in four; the choice is right on 60 % of these and on 90 % of the others."""
    rng = np.random.default_rng(0)
    hits, simulations = 0, 300
    for seed in range(simulations):
        gains = rng.random(200) < 0.25
        right = (rng.random(200) < np.where(gains, 0.6, 0.9)).astype(float)
        table = {GAINS: np.where(gains, right, NAN), NO_GAIN: np.where(gains, NAN, right)}
        low, high = bootstrap_intervals(table, 400, seed)[BALANCED]
        hits += low <= 0.75 <= high
    assert 0.91 <= hits / simulations <= 0.98


def test_without_its_parts_there_is_no_balanced_metric() -> None:
    for table in ({GAINS: np.ones(3)}, {"x": np.ones(3)}):
        assert BALANCED not in summarize(table)
    empty = {GAINS: np.full(3, NAN), NO_GAIN: np.ones(3)}
    summary = summarize(empty)
    assert math.isnan(summary[BALANCED])
    assert all(math.isnan(bound) for bound in summary["intervals"][BALANCED])


def test_columns_are_resampled_together() -> None:
    column = np.random.default_rng(0).random(50)
    intervals = bootstrap_intervals({"x": column, "y": 2 * column})
    assert np.array(intervals["y"]) == pytest.approx(2 * np.array(intervals["x"]))


@pytest.mark.parametrize("noise", ["of prompts alone", "within prompts"])
def test_intervals_cover(noise: str) -> None:
    """The 95 % interval from 150 prompts holds what is estimated in about 95 of 100 evaluations.

    A prompt is solved at once with probability p, uniform in [0, 1], and with thinking with (1 + p) / 2; the model
    thinks where p < 1/2. Scores are these probabilities themselves, or binary samples of them.
    """
    rng = np.random.default_rng(0)
    num_prompts, num_samples, simulations = 150, 4, 300
    truth = {"accuracy/think": 0.75, "accuracy/no_think": 0.5, "accuracy/auto": (0.625 + 0.75) / 2}
    truth |= {"thinking_ratio": 0.3, "mean_tokens/auto": (20 + 4) / 2}
    hits = dict.fromkeys(truth, 0)
    for seed in range(simulations):
        p = rng.random(num_prompts)
        solved = np.stack([(1 + p) / 2, p], axis=1)[:, :, None]
        scores = np.repeat(solved, num_samples, axis=2)
        if noise == "within prompts":
            scores = (rng.random(scores.shape) < scores).astype(float)
        lengths = np.broadcast_to(np.array([20.0, 4.0])[None, :, None], scores.shape)
        prob_think = rng.choice([0.1, 0.5], size=num_prompts)
        table = per_prompt_table(scores, lengths, prob_think, 1 - prob_think, np.where(p < 0.5, THINK, NO_THINK))
        intervals = bootstrap_intervals({name: table[name] for name in truth}, 400, seed)
        for name, (low, high) in intervals.items():
            hits[name] += low <= truth[name] <= high
    for name, count in hits.items():
        assert 0.91 <= count / simulations <= 0.98, name


def test_intervals_of_a_bernoulli_cover() -> None:
    rng = np.random.default_rng(0)
    true_mean, hits, simulations = 0.7, 0, 300
    for seed in range(simulations):
        low, high = bootstrap_intervals({"x": (rng.random(150) < true_mean).astype(float)}, 400, seed)["x"]
        hits += low <= true_mean <= high
    assert 0.91 <= hits / simulations <= 0.98


# --- Groups -------------------------------------------------------------------


def test_summarize_by_sorts_numbers_before_text() -> None:
    labels: list[Any] = ["hard", 10, 2, "easy", 2, None]
    table = {"hybrid_accuracy": np.array([0.0, 1.0, 1.0, 1.0, 0.0, 1.0]), "accuracy/auto": np.arange(6.0)}
    groups = summarize_by(table, labels, "level")
    assert [group["level"] for group in groups] == [2, 10, "easy", "hard"]  # without a label, in no group
    assert [group["num_prompts"] for group in groups] == [2, 1, 1, 1]
    assert [group["hybrid_accuracy"] for group in groups] == [0.5, 1.0, 1.0, 0.0]
    assert [group["accuracy"]["auto"] for group in groups] == [3.0, 1.0, 3.0, 0.0]
    assert all(set(group["intervals"]) == {"hybrid_accuracy", "accuracy"} for group in groups)


@settings(max_examples=30)
@given(prompts=prompt_lists(), data=st.data())
def test_a_group_is_summarized_as_if_alone(prompts: list[Prompt], data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.sampled_from([1, 2, "x"]), min_size=len(prompts), max_size=len(prompts)))
    for group in summarize_by(table_of(prompts), labels, "level", seed=1):
        label = group.pop("level")
        alone = summarize(table_of([p for p, other in zip(prompts, labels, strict=True) if other == label]), seed=1)
        assert repr(group) == repr(alone)  # NaN is not equal to itself


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["2", 2, 2.0, " 2 ", "+2", np.int64(2), np.float32(2)], [2] * 7),
        ([-1, "-1", "007", "0", 0.0], [-1, -1, 7, 0, 0]),
        ([1.5, "1.5", "2.0", "Level 2", " hard ", "²"], [1.5, "1.5", "2.0", "Level 2", "hard", "²"]),
        ([None, NAN, "", "  "], [None] * 4),
        ([2**60 + 1], [2**60 + 1]),
    ],
)
def test_labels_of_mixed_types(values: list, expected: list) -> None:
    found = group_labels("level", values)
    assert found == expected
    assert [type(label) for label in found] == [type(label) for label in expected]


@pytest.mark.parametrize("value", [True, np.True_, [2], {"a": 2}, (2,), b"2", math.inf, 2j])
def test_labels_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        summarize_by({"x": np.zeros(2)}, [1, value], "subject")
    assert str(caught.value).startswith(f"subject: {value!r} is {type(value).__name__};")


def test_labels_of_mixed_types_are_one_group() -> None:
    groups = summarize_by({"x": np.arange(6.0)}, ["2", "b", 2, 10.0, 2.0, "a"], "level")
    assert [(group["level"], group["num_prompts"], group["x"]) for group in groups] == [
        (2, 3, 2.0),
        (10, 1, 3.0),
        ("a", 1, 5.0),
        ("b", 1, 1.0),
    ]
