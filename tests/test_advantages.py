"""`hgpo_trl.training.advantages` against a loop-by-loop reference written from the paper's equations alone."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hgpo_trl.common.errors import UserError
from hgpo_trl.training.advantages import (
    DECISION_WEIGHTINGS,
    BinaryRewards,
    assign_rewards,
    compute_advantages,
    load_estimator,
)

ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_as_printed")
GROUP_ESTIMATORS = ("grpo", "rloo")
NAN = math.nan
EPS = 1e-4
TOLERANCE = 1e-6

Rewards = list[list[list[float]]]
"""rewards[query][mode][sample]; mode 0 = think, 1 = no think."""
Rows = list[list[float]]
"""rows[query-major sample][token]."""


@dataclass(frozen=True)
class Case:
    """One call of `compute_advantages`, in plain Python."""

    rewards: Rewards
    lengths: list[int]
    estimator: str = "grpo"
    alpha: float = 1.0
    margin: float = 0.2
    intra_scope: str = "mode"
    ties: str = "all"
    discount: float = 0.99
    decision_weighting: str = "uniform"
    mode_probs: list[list[float]] | None = None

    def run(self) -> Rows:
        """Call the code under test in double precision."""
        return self.tensor(torch.float64).tolist()

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """Call the code under test with rewards of `dtype`."""
        probs = None if self.mode_probs is None else torch.tensor(self.mode_probs, dtype=torch.float64)
        return compute_advantages(
            torch.tensor(self.rewards, dtype=dtype),
            torch.tensor(self.lengths),
            estimator=self.estimator,
            alpha=self.alpha,
            margin=self.margin,
            intra_scope=self.intra_scope,
            ties=self.ties,
            discount=self.discount,
            decision_weighting=self.decision_weighting,
            mode_probs=probs,
        )


# --- The reference ------------------------------------------------------------


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def valid(values: list[float]) -> list[float]:
    """The values that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def reference_rewards(rewards: Rewards, margin: float, ties: str) -> tuple[Rewards, Rewards]:
    """r_inter (Eq. 8) and r_intra (Eq. 9)."""
    r_inter, r_intra = [], []
    for think, no_think in rewards:
        winner = None
        if valid(think) and valid(no_think):
            winner = 0 if mean(valid(think)) > mean(valid(no_think)) + margin else 1
        inter_of_query, intra_of_query = [], []
        for mode, samples in enumerate((think, no_think)):
            inter_of_mode, intra_of_mode = [], []
            taken = False
            for reward in samples:
                if math.isnan(reward):
                    inter_of_mode.append(0.0)
                    intra_of_mode.append(0.0)
                    continue
                inter_of_mode.append(1.0 if mode == winner else 0.0)
                best = reward == max(valid(samples)) and not (ties == "first" and taken)
                taken = taken or best
                intra_of_mode.append(1.0 if best else 0.0)
            inter_of_query.append(inter_of_mode)
            intra_of_query.append(intra_of_mode)
        r_inter.append(inter_of_query)
        r_intra.append(intra_of_query)
    return r_inter, r_intra


def whiten(values: list[float]) -> list[float]:
    """(x - mean) / (std + 1e-4) with the unbiased std; a lone value becomes 0."""
    if len(values) < 2:
        return [0.0] * len(values)
    centre = mean(values)
    std = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))
    return [(value - centre) / (std + EPS) for value in values]


def leave_one_out(values: list[float]) -> list[float]:
    """RLOO, Eq. 23: x_i minus the mean of the others; a lone value becomes 0."""
    result = []
    for i, value in enumerate(values):
        others = values[:i] + values[i + 1 :]
        result.append(value - mean(others) if others else 0.0)
    return result


def reference_advantages(case: Case) -> Rows:
    """The per-token advantages of Eq. 10, row by row."""
    r_inter, r_intra = reference_rewards(case.rewards, case.margin, case.ties)
    half = len(case.rewards[0][0])
    grouped = case.estimator in GROUP_ESTIMATORS
    normalise = whiten if case.estimator == "grpo" else leave_one_out

    def row_of(query: int, mode: int, sample: int) -> int:
        return (query * 2 + mode) * half + sample

    out = [[0.0] * max(case.lengths) for _ in case.lengths]
    tokens_of_batch: list[tuple[int, int, float]] = []
    for q, query in enumerate(case.rewards):
        members = [(m, s) for m in (0, 1) for s in range(half) if not math.isnan(query[m][s])]

        if grouped:
            scopes = [members]
            if case.intra_scope == "mode":
                scopes = [[ms for ms in members if ms[0] == mode] for mode in (0, 1)]
            for scope in scopes:
                for (m, s), value in zip(scope, normalise([r_intra[q][m][s] for m, s in scope]), strict=True):
                    row = row_of(q, m, s)
                    for t in range(case.lengths[row]):
                        out[row][t] += value
        else:
            for m, s in members:
                row = row_of(q, m, s)
                length, reward = case.lengths[row], r_intra[q][m][s]
                tied = all(r_intra[q][m][other] == 1 for mode, other in members if mode == m)
                if tied and case.estimator == "reinforce_plus_plus":
                    continue
                for t in range(length):
                    if case.estimator == "reinforce_plus_plus":
                        value = case.discount ** (length - 1 - t) * reward
                    else:
                        value = sum(case.discount ** (later - t) * reward for later in range(t, length))
                    tokens_of_batch.append((row, t, value))

        inter = [r_inter[q][m][s] for m, s in members]
        for (m, s), value in zip(members, normalise(inter) if grouped else inter, strict=True):
            if case.decision_weighting == "winner":
                value *= 2 if r_inter[q][m][s] == 1 else 0
            elif case.decision_weighting == "saturating":
                assert case.mode_probs is not None
                pi = case.mode_probs[q][m]
                value *= 2 * (1 - pi) if r_inter[q][m][s] == 1 else 2 * pi
            out[row_of(q, m, s)][0] += case.alpha * value

    values = [value for _, _, value in tokens_of_batch]
    if case.estimator == "reinforce_plus_plus":
        values = whiten(values)
    for (row, t, _), value in zip(tokens_of_batch, values, strict=True):
        out[row][t] += value
    return out


# --- Strategies ---------------------------------------------------------------


def eighths(low: int, high: int) -> st.SearchStrategy[float]:
    """Multiples of 1/8: sums of a few, and means of 1, 2 or 4 of them, are exact in floating point."""
    return st.integers(low, high).map(lambda k: k / 8)


def reward_values(kind: str) -> st.SearchStrategy[float]:
    """Few values with many ties, a grid of eighths, or the continuum."""
    return {
        "ties": st.sampled_from([0.0, 0.5, 1.0]),
        "grid": eighths(-16, 16),
        "continuous": st.floats(-4, 4, allow_subnormal=False),
    }[kind]


def gap_is_decided(case: Case) -> bool:
    """False where rounding alone could choose the winning mode."""
    for think, no_think in case.rewards:
        modes = (valid(think), valid(no_think))
        if not all(modes):
            continue
        gap = mean(modes[0]) - mean(modes[1]) - case.margin
        on_grid = all((8 * value).is_integer() for value in (*modes[0], *modes[1], case.margin))
        exact = on_grid and all(len(mode) in (1, 2, 4) for mode in modes)
        scale = max(1.0, *map(abs, (*modes[0], *modes[1])))
        if abs(gap) < 2e-6 * scale and not exact:
            return False
    return True


@st.composite
def cases(draw: st.DrawFn, estimator: str | None = None, exact: bool = False, weighting: str | None = None) -> Case:
    """A call; `exact`: rewards and margin are multiples of 1/8; `weighting`: of the decision, any if None."""
    queries = draw(st.integers(1, 4))
    half = draw(st.sampled_from([2, 3, 4]))
    kind = draw(st.sampled_from(["ties", "grid"] if exact else ["ties", "grid", "continuous"]))
    reward = reward_values(kind)
    if draw(st.booleans()):
        reward = st.one_of(reward, reward, st.just(NAN))
    samples = st.lists(reward, min_size=half, max_size=half)
    margins = eighths(-2, 8) if exact else st.one_of(eighths(-2, 8), st.sampled_from([0.2, 0.05]))
    weighting = weighting or draw(st.sampled_from([*DECISION_WEIGHTINGS]))
    mode_probs = None
    if weighting == "saturating":
        mode_probs = []
        for _ in range(queries):
            think, share = draw(st.floats(0, 1)), draw(st.floats(0, 1))
            mode_probs.append([think, (1 - think) * share])
    rows = queries * 2 * half
    case = Case(
        rewards=draw(st.lists(st.tuples(samples, samples).map(list), min_size=queries, max_size=queries)),
        lengths=draw(st.lists(st.integers(1, 7), min_size=rows, max_size=rows)),
        estimator=estimator or draw(st.sampled_from(ESTIMATORS)),
        alpha=draw(st.floats(0, 3)),
        margin=draw(margins),
        intra_scope=draw(st.sampled_from(["mode", "all"])),
        ties=draw(st.sampled_from(["all", "first"])),
        discount=draw(st.one_of(st.just(0.99), st.just(1.0), st.floats(0.05, 1))),
        decision_weighting=weighting,
        mode_probs=mode_probs,
    )
    assume(gap_is_decided(case))
    return case


def assert_close(actual: Rows, expected: Rows, tolerance: float = TOLERANCE) -> None:
    """Same shape, and equal up to `tolerance` everywhere."""
    assert [len(row) for row in actual] == [len(row) for row in expected]
    for i, (row, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert row == pytest.approx(wanted, rel=0, abs=tolerance), f"row {i}"


def rows_of(case: Case) -> list[tuple[int, int, float]]:
    """(query, mode, reward) of every row, in row order."""
    return [(q, m, r) for q, query in enumerate(case.rewards) for m, mode in enumerate(query) for r in mode]


def first_column_gain(case: Case, alpha: float = 1.0) -> list[float]:
    """What alpha adds to the decision token of every row."""
    with_inter, without = replace(case, alpha=alpha).run(), replace(case, alpha=0.0).run()
    return [a[0] - b[0] for a, b in zip(with_inter, without, strict=True)]


# --- 1. The code and the reference agree --------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_compute_advantages_matches_reference(estimator: str, data: st.DataObject) -> None:
    """Every option, over random shapes, ties, NaNs and lengths."""
    case = data.draw(cases(estimator))
    assert_close(case.run(), reference_advantages(case))


@settings(max_examples=200, deadline=None)
@given(case=cases(weighting="uniform"))
def test_assign_rewards_matches_reference(case: Case) -> None:
    """r_inter and r_intra are the reference's zeros and ones."""
    rewards = torch.tensor(case.rewards, dtype=torch.float64)
    before = rewards.clone()
    r_inter, r_intra = assign_rewards(rewards, case.margin, case.ties)
    expected_inter, expected_intra = reference_rewards(case.rewards, case.margin, case.ties)
    assert r_inter.tolist() == expected_inter
    assert r_intra.tolist() == expected_intra
    assert torch.equal(rewards.nan_to_num(nan=-99.0), before.nan_to_num(nan=-99.0))


@settings(max_examples=50, deadline=None)
@given(case=cases(exact=True), discount=st.sampled_from([0.99, 0.5]))
def test_single_precision_matches_reference(case: Case, discount: float) -> None:
    """float32 rewards give float32 advantages, right up to single precision."""
    case = replace(case, discount=discount)
    actual = case.tensor(torch.float32)
    assert actual.dtype == torch.float32
    assert_close(actual.tolist(), reference_advantages(case), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_low_precision_rewards_are_computed_in_float32(dtype: torch.dtype, estimator: str) -> None:
    """Half-precision rewards lose nothing after the rewards themselves."""
    # R_think = (1 + 1 + 0) / 3 = 2/3, R_no_think = (1 + 0 + 0) / 3 = 1/3: the gap beats 0.333 in float32,
    # and does not in bfloat16, where 0.333 and 1/3 are the same number.
    case = Case([[[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]], [3, 1, 2, 1, 2, 3], estimator=estimator, margin=0.333)
    actual = case.tensor(dtype)
    assert actual.dtype == torch.float32
    assert_close(actual.tolist(), reference_advantages(case), 1e-5)


# --- 2. Properties ------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(estimator=st.sampled_from(GROUP_ESTIMATORS), data=st.data())
def test_inter_group_advantages_sum_to_zero_per_query(estimator: str, data: st.DataObject) -> None:
    """What alpha adds is a redistribution within the query."""
    case = data.draw(cases(estimator, weighting="uniform"))
    sums = [0.0] * len(case.rewards)
    for (q, _, _), gain in zip(rows_of(case), first_column_gain(case), strict=True):
        sums[q] += gain
    assert sums == pytest.approx([0.0] * len(sums), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_alpha_touches_the_decision_token_only(case: Case) -> None:
    """alpha = 0 and alpha = 1 differ in column 0 alone."""
    with_inter, without = replace(case, alpha=1.0).run(), replace(case, alpha=0.0).run()
    assert [row[1:] for row in with_inter] == [row[1:] for row in without]


@settings(max_examples=100, deadline=None)
@given(case=cases(weighting="uniform"))
def test_alpha_is_linear(case: Case) -> None:
    """Doubling alpha doubles what it adds."""
    once, twice = first_column_gain(case, 1.0), first_column_gain(case, 2.0)
    assert twice == pytest.approx([2 * gain for gain in once], abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_permuting_samples_within_a_mode_permutes_the_rows(data: st.DataObject) -> None:
    """With ties="all" the order of a mode's samples carries nothing."""
    case = replace(data.draw(cases(exact=True)), ties="all")
    half = len(case.rewards[0][0])
    orders = [[data.draw(st.permutations(range(half))) for _ in (0, 1)] for _ in case.rewards]
    rewards = [
        [[mode[i] for i in order] for mode, order in zip(query, by_mode, strict=True)]
        for query, by_mode in zip(case.rewards, orders, strict=True)
    ]
    source = [(2 * q + m) * half + i for q, by_mode in enumerate(orders) for m in (0, 1) for i in by_mode[m]]
    permuted = replace(case, rewards=rewards, lengths=[case.lengths[row] for row in source])
    original = case.run()
    assert_close(permuted.run(), [original[row] for row in source], 1e-9)


@settings(max_examples=100, deadline=None)
@given(case=cases(exact=True), shift=eighths(-40, 40))
def test_adding_a_constant_to_all_rewards_changes_nothing(case: Case, shift: float) -> None:
    """Only differences of rewards count."""
    moved = replace(case, rewards=[[[r + shift for r in mode] for mode in query] for query in case.rewards])
    assert moved.run() == case.run()


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_shape_zero_padding_and_invalid_rows(case: Case) -> None:
    """T is the longest completion; zero beyond each length and in a NaN sample's row; finite throughout."""
    actual = case.run()
    assert len(actual) == len(case.lengths)
    for row, length, (_, _, reward) in zip(actual, case.lengths, rows_of(case), strict=True):
        assert len(row) == max(case.lengths)
        assert all(math.isfinite(value) for value in row)
        assert not any(row[length:])
        if math.isnan(reward):
            assert not any(row)


@settings(max_examples=100, deadline=None)
@given(case=cases(weighting="uniform"))
def test_saturating_at_one_half_is_the_printed_rule(case: Case) -> None:
    """An undecided policy has the factor 2 * 1/2 = 1 in every row."""
    halves = replace(case, decision_weighting="saturating", mode_probs=[[0.5, 0.5] for _ in case.rewards])
    assert_close(halves.run(), case.run(), 1e-12)


@settings(max_examples=100, deadline=None)
@given(case=cases(weighting="uniform"), winner_prob=st.floats(0, 1), loser_prob=st.floats(0, 1))
def test_saturating_stops_at_a_decided_policy(case: Case, winner_prob: float, loser_prob: float) -> None:
    """Zero for the winner's rows at pi = 1 and the loser's at pi = 0; doubled at the other ends."""
    r_inter, _ = reference_rewards(case.rewards, case.margin, case.ties)
    winner = [next((m for m in (0, 1) if any(query[m])), None) for query in r_inter]

    def gains(of_winner: float, of_loser: float) -> list[float]:
        probs = [[of_winner if m == best else of_loser for m in (0, 1)] for best in winner]
        return first_column_gain(replace(case, decision_weighting="saturating", mode_probs=probs))

    printed = first_column_gain(case)
    settled_winner, settled_loser, undone = gains(1.0, loser_prob), gains(winner_prob, 0.0), gains(0.0, 1.0)
    for i, (q, mode, _) in enumerate(rows_of(case)):
        if mode == winner[q]:
            assert settled_winner[i] == pytest.approx(0, abs=1e-12)
        else:
            assert settled_loser[i] == pytest.approx(0, abs=1e-12)
        assert undone[i] == pytest.approx(2 * printed[i], abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(case=cases(weighting="uniform"))
def test_winner_pays_the_winning_rows_alone(case: Case) -> None:
    """Twice the printed advantage on the rows of the mode that won, none on the other mode's."""
    r_inter, _ = reference_rewards(case.rewards, case.margin, case.ties)
    printed, gains = first_column_gain(case), first_column_gain(replace(case, decision_weighting="winner"))
    for (q, mode, _), gain, of_printed in zip(rows_of(case), gains, printed, strict=True):
        if any(r_inter[q][mode]):
            assert gain == pytest.approx(2 * of_printed, abs=1e-9)
            assert gain >= 0
        else:
            assert gain == 0


def decision_step(embeddings: Tensor, hidden: Tensor, weighting: str) -> tuple[Tensor, Tensor]:
    """Expected policy gradient of the decision token where think (token 0) wins over no-think (token 1).

    Args:
        embeddings: `[V, d]`; the logits are embeddings · hidden, as in a language model.
        hidden: `[d]`.

    Returns:
        The gradient on `hidden`, and π `[V]`.
    """
    hidden = hidden.clone().requires_grad_()
    log_probs = torch.log_softmax(embeddings @ hidden, dim=0)
    probs = log_probs.detach().exp()
    rewards = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    advantages = compute_advantages(
        rewards, torch.ones(4, dtype=torch.long), decision_weighting=weighting, mode_probs=probs[None, :2]
    )
    (gradient,) = torch.autograd.grad((advantages[:, 0] * log_probs[[0, 0, 1, 1]]).sum(), hidden)
    return gradient, probs


@settings(max_examples=100, deadline=None)
@given(logits=st.lists(st.floats(-8, 8), min_size=3, max_size=12))
def test_updates_of_the_logits(logits: list[float]) -> None:
    """As docs/method.md states them: "winner" pushes nothing up but the winner, and vanishes at π(winner) = 1."""
    hidden, identity = torch.tensor(logits, dtype=torch.float64), torch.eye(len(logits), dtype=torch.float64)
    gradient, probs = decision_step(identity, hidden, "winner")
    won = torch.zeros_like(probs)
    won[0] = 1
    scale = 4 * INTER  # two rows, weight 2
    torch.testing.assert_close(gradient, scale * (won - probs), rtol=0, atol=1e-6)
    others = {name: decision_step(identity, hidden, name)[0][2:] for name in DECISION_WEIGHTINGS}
    neither = probs[2:].sum()
    expected = {"winner": -probs[2:], "saturating": -probs[2:] * neither, "uniform": torch.zeros_like(probs[2:])}
    for name, update in others.items():
        torch.testing.assert_close(update, scale * expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("weighting", ["winner", "saturating"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_policy_comes_to_rest_at_the_share_of_wins(weighting: str, share: float) -> None:
    """Where think wins that share of a query's comparisons, the mean update is 0 at π(think) = share."""
    hidden, identity = torch.tensor([share, 1 - share, 1e-12], dtype=torch.float64).log(), torch.eye(3).double()
    think_wins, _ = decision_step(identity, hidden, weighting)
    no_think_wins, _ = decision_step(identity[[1, 0, 2]], hidden, weighting)
    mean_update = share * think_wins + (1 - share) * no_think_wins
    assert mean_update.abs().max() < 1e-9
    assert think_wins.abs().max() > 0.1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(3, 12), width=st.integers(1, 6))
def test_winner_never_moves_mass_away_from_the_winner(seed: int, tokens: int, width: int) -> None:
    """However the tokens share their weights: 1 − π(winner), which bounds the mass on neither, falls at every step."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    hidden = torch.randn(width, dtype=torch.float64, generator=generator)
    step = 0.1 / embeddings.square().sum(dim=1).max()  # of the order of the inverse curvature
    before = 0.0
    for _ in range(40):
        gradient, probs = decision_step(embeddings, hidden, "winner")
        assert probs[0] >= before - 1e-12
        before = probs[0]
        hidden += step * gradient


def test_the_printed_rule_moves_the_mass_to_neither_mode() -> None:
    """All of it, where a third token lies in the direction from loser to winner."""
    embeddings = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [3.0, 0.0]], dtype=torch.float64)
    neither = {}
    for weighting in ("uniform", "winner"):
        hidden = torch.tensor([0.0, 4.0], dtype=torch.float64)  # both modes at 0.495
        neither[weighting] = []
        for _ in range(400):
            gradient, probs = decision_step(embeddings, hidden, weighting)
            neither[weighting].append(probs[2].item())
            hidden += 0.2 * gradient
    assert neither["uniform"][0] == neither["winner"][0] < 0.01
    assert neither["uniform"][-1] > 0.99
    assert max(neither["winner"]) < 0.1
    assert neither["winner"][-1] < 0.01


@settings(max_examples=100, deadline=None)
@given(
    estimator=st.sampled_from(GROUP_ESTIMATORS),
    scope=st.sampled_from(["mode", "all"]),
    half=st.sampled_from([2, 4]),
    levels=st.lists(eighths(-16, 16), min_size=1, max_size=4),
    margin=eighths(0, 8),
    data=st.data(),
)
def test_equal_rewards_leave_only_the_margins_push(
    estimator: str, scope: str, half: int, levels: list[float], margin: float, data: st.DataObject
) -> None:
    """No variance, no intra-group signal; the margin (and the tie at margin 0) pushes to no think."""
    rows = len(levels) * 2 * half
    case = Case(
        rewards=[[[level] * half, [level] * half] for level in levels],
        lengths=data.draw(st.lists(st.integers(1, 7), min_size=rows, max_size=rows)),
        estimator=estimator,
        intra_scope=scope,
        margin=margin,
    )
    # r_inter is 0 for N/2 samples and 1 for N/2: mean 1/2, unbiased variance (N/4) / (N-1);
    # leave-one-out 1 - (N/2 - 1) / (N - 1) = (N/2) / (N - 1).
    n = 2 * half
    push = 0.5 / (math.sqrt(n / 4 / (n - 1)) + EPS) if estimator == "grpo" else half / (n - 1)
    for row, (_, mode, _) in zip(case.run(), rows_of(case), strict=True):
        assert row[0] == pytest.approx(push if mode == 1 else -push, abs=1e-9)
        assert not any(row[1:])


# --- 3. Cases computed by hand ------------------------------------------------

# One query, N = 4, margin 0.2: think (1, 1), no think (0, 1).
# Eq. 8: R_think = 1 > R_no_think + margin = 0.5 + 0.2 = 0.7, think wins: r_inter = (1, 1 | 0, 0).
# Eq. 9: r_intra = (1, 1 | 0, 1), or (1, 0 | 0, 1) where only the first of the tied counts.
BY_HAND = Case(rewards=[[[1.0, 1.0], [0.0, 1.0]]], lengths=[2, 1, 1, 3])

# norm(r_inter) over N = 4: mean 1/2, std sqrt(4 * 1/4 / 3) = 0.57735027; 0.5 / 0.57745027 = 0.86587542.
INTER = 0.86587542
# A pair (0, 1): mean 1/2, std sqrt(2 * 1/4 / 1) = 0.70710678; 0.5 / 0.70720678 = 0.70700680.
PAIR = 0.70700680


def test_by_hand_rewards() -> None:
    """Eq. 8 and 9."""
    rewards = torch.tensor(BY_HAND.rewards)
    r_inter, r_intra = assign_rewards(rewards, 0.2)
    assert r_inter.tolist() == [[[1, 1], [0, 0]]]
    assert r_intra.tolist() == [[[1, 1], [0, 1]]]
    r_inter, r_intra = assign_rewards(rewards, 0.2, ties="first")
    assert r_inter.tolist() == [[[1, 1], [0, 0]]]
    assert r_intra.tolist() == [[[1, 0], [0, 1]]]


def test_by_hand_defaults() -> None:
    """grpo, alpha 1, margin 0.2, scope mode, all ties: intra (0, 0 | -PAIR, +PAIR)."""
    actual = compute_advantages(torch.tensor(BY_HAND.rewards).double(), torch.tensor(BY_HAND.lengths))
    expected = [[INTER, 0, 0], [INTER, 0, 0], [-INTER - PAIR, 0, 0], [-INTER + PAIR, PAIR, PAIR]]
    assert_close(actual.tolist(), expected, 1e-7)


def test_by_hand_grpo_over_all_samples() -> None:
    """Scope "all", alpha 2."""
    # r_intra (1, 1, 0, 1): mean 3/4, std sqrt((3/16 + 9/16) / 3) = 0.5; 0.25 / 0.5001 = 0.49990002,
    # -0.75 / 0.5001 = -1.49970006.
    up, down = 0.49990002, -1.49970006
    expected = [
        [2 * INTER + up, up, 0],
        [2 * INTER + up, 0, 0],
        [-2 * INTER + down, 0, 0],
        [-2 * INTER + up, up, up],
    ]
    assert_close(replace(BY_HAND, intra_scope="all", alpha=2.0).run(), expected, 1e-7)


def test_by_hand_grpo_first_tie() -> None:
    """ties="first": r_intra (1, 0 | 0, 1), a pair in each mode."""
    expected = [
        [INTER + PAIR, PAIR, 0],
        [INTER - PAIR, 0, 0],
        [-INTER - PAIR, 0, 0],
        [-INTER + PAIR, PAIR, PAIR],
    ]
    assert_close(replace(BY_HAND, ties="first").run(), expected, 1e-7)


def test_by_hand_rloo() -> None:
    """Eq. 23."""
    # r_inter: 1 - (1 + 0 + 0) / 3 = 2/3 for think, 0 - (1 + 1 + 0) / 3 = -2/3 for no think.
    # r_intra within the mode: think 1 - 1 = 0, no think 0 - 1 = -1 and 1 - 0 = 1.
    expected = [[2 / 3, 0, 0], [2 / 3, 0, 0], [-2 / 3 - 1, 0, 0], [-2 / 3 + 1, 1, 1]]
    assert_close(replace(BY_HAND, estimator="rloo").run(), expected, 1e-12)
    # r_intra over all: 1 - (1 + 0 + 1) / 3 = 1/3 three times, 0 - 3/3 = -1.
    expected = [[1, 1 / 3, 0], [1, 0, 0], [-5 / 3, 0, 0], [-1 / 3, 1 / 3, 1 / 3]]
    assert_close(replace(BY_HAND, estimator="rloo", intra_scope="all").run(), expected, 1e-12)


def test_by_hand_reinforce_plus_plus() -> None:
    """The reward on the last token, discounted backwards, whitened; then alpha * r_inter at t = 0."""
    # Think ties, so only no think is whitened. discount 1/2: (0), (0.25, 0.5, 1). Four tokens: sum 1.75, mean 0.4375,
    # sum of squares 1.3125, variance (1.3125 - 1.75^2 / 4) / 3 = 0.18229167, std 0.42695628; over 0.42705628:
    # 1 -> 1.31715660, 0.5 -> 0.14635073, 0.25 -> -0.43905220, 0 -> -1.02445513.
    one, half, quarter, zero = 1.31715660, 0.14635073, -0.43905220, -1.02445513
    case = replace(BY_HAND, estimator="reinforce_plus_plus", discount=0.5, alpha=3.0)
    expected = [[3, 0, 0], [3, 0, 0], [zero, 0, 0], [quarter, half, one]]
    assert_close(case.run(), expected, 1e-7)


def test_by_hand_reinforce_plus_plus_as_printed() -> None:
    """Eq. 22 as printed: the sum over all later tokens, not whitened."""
    # discount 1/2: (1 + 0.5, 1), (1), (0), (1 + 0.5 + 0.25, 1 + 0.5, 1), and alpha = 1 for think at t = 0.
    case = replace(BY_HAND, estimator="reinforce_plus_plus_as_printed", discount=0.5)
    assert_close(case.run(), [[2.5, 1, 0], [2, 0, 0], [0, 0, 0], [1.75, 1.5, 1]], 1e-12)


def test_by_hand_whitening_spans_the_batch() -> None:
    """Two queries are whitened together; a NaN sample's tokens and a tied mode's stay out of it."""
    # Query 1: think (1, NaN), no think (0, 1): think wins (1 > 0.7); r_intra (1, - | 0, 1), think's lone 1 is a tie.
    # Query 2: think (0, 0), no think (1, 0): no think wins; r_intra (1, 1 | 1, 0), think is a tie.
    # All of length 1, so four tokens (0, 1, 1, 0): mean 1/2, variance 4 * 1/4 / 3 = 1/3, std 0.57735027;
    # 0.5 / 0.57745027 = 0.86587542.
    rewards = [[[1.0, NAN], [0.0, 1.0]], [[0.0, 0.0], [1.0, 0.0]]]
    case = Case(rewards, [1] * 8, estimator="reinforce_plus_plus")
    expected: Rows = [[1], [0], [-INTER], [INTER], [0], [0], [1 + INTER], [1 - INTER]]
    assert_close(case.run(), expected, 1e-7)


@settings(max_examples=200, deadline=None)
@given(
    estimator=st.sampled_from(["grpo", "rloo", "reinforce_plus_plus"]),
    case=cases(weighting="uniform"),
    queries=st.data(),
)
def test_a_mode_whose_samples_tie_gets_no_signal_but_the_decisions(
    estimator: str, case: Case, queries: st.DataObject
) -> None:
    """All wrong or all right: what is left is α·norm(r_inter) on the decision token, whatever else is in the batch."""
    half = len(case.rewards[0][0])
    tied = [[[level] * half] * 2 for level in queries.draw(st.lists(eighths(-8, 8), min_size=1, max_size=3))]
    lengths = queries.draw(st.lists(st.integers(1, 7), min_size=2 * half * len(tied), max_size=2 * half * len(tied)))
    together = replace(
        case, rewards=case.rewards + tied, lengths=case.lengths + lengths, estimator=estimator, ties="all",
        intra_scope="mode",
    )  # fmt: skip
    assume(gap_is_decided(together))
    of_tied = replace(together, alpha=0.0).run()[len(case.lengths) :]
    assert not any(value for row in of_tied for value in row)
    gains = first_column_gain(together)
    of_others = [row[: max(case.lengths)] for row in together.run()[: len(case.lengths)]]
    alone = replace(together, rewards=case.rewards, lengths=case.lengths)
    assert_close(of_others, alone.run(), 1e-9)
    assert any(gains[len(case.lengths) :]), "the margin's push to no think"


def test_by_hand_saturating() -> None:
    """The winner's rows by 2 * (1 - pi), the loser's by 2 * pi; the intra-group part stays."""
    # pi = (0.6, 0.3): think (wins) by 2 * 0.4 = 0.8, no think (loses) by 2 * 0.3 = 0.6.
    case = replace(BY_HAND, decision_weighting="saturating", mode_probs=[[0.6, 0.3]])
    won, lost = 0.8 * INTER, -0.6 * INTER
    assert_close(case.run(), [[won, 0, 0], [won, 0, 0], [lost - PAIR, 0, 0], [lost + PAIR, PAIR, PAIR]], 1e-7)
    case = replace(case, estimator="reinforce_plus_plus_as_printed", discount=0.5)
    assert_close(case.run(), [[2.3, 1, 0], [1.8, 0, 0], [0, 0, 0], [1.75, 1.5, 1]], 1e-12)


def test_by_hand_winner() -> None:
    """The winner's rows by 2, the loser's by 0; the intra-group part stays."""
    case = replace(BY_HAND, decision_weighting="winner")
    won = 2 * INTER
    assert_close(case.run(), [[won, 0, 0], [won, 0, 0], [-PAIR, 0, 0], [PAIR, PAIR, PAIR]], 1e-7)
    case = replace(case, estimator="reinforce_plus_plus_as_printed", discount=0.5)
    assert_close(case.run(), [[3.5, 1, 0], [3, 0, 0], [0, 0, 0], [1.75, 1.5, 1]], 1e-12)


def test_by_hand_tie_at_the_margin() -> None:
    """R_think = R_no_think + margin exactly: no think wins."""
    # R_think = (1 + 0.5) / 2 = 0.75, R_no_think = 0.5: a tie at 0.25, think just below it.
    rewards = torch.tensor([[[1.0, 0.5], [0.5, 0.5]]])
    assert assign_rewards(rewards, 0.25)[0].tolist() == [[[0, 0], [1, 1]]]
    assert assign_rewards(rewards, 0.249)[0].tolist() == [[[1, 1], [0, 0]]]
    assert assign_rewards(rewards, 0.251)[0].tolist() == [[[0, 0], [1, 1]]]
    # intra: think (1, 0), no think a tie; inter: no think by INTER.
    actual = compute_advantages(rewards.double(), torch.tensor([2, 1, 2, 1]), margin=0.25)
    assert_close(actual.tolist(), [[PAIR - INTER, PAIR], [-PAIR - INTER, 0], [INTER, 0], [INTER, 0]], 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solved", range(5))
def test_tie_at_the_papers_margin_with_binary_rewards(solved: int, dtype: torch.dtype) -> None:
    """N = 10, rewards 0 and 1: one more think answer right is a gap of 1/5, the paper's margin: no think."""
    think = [1.0] * (solved + 1) + [0.0] * (4 - solved)
    no_think = [1.0] * solved + [0.0] * (5 - solved)
    r_inter, _ = assign_rewards(torch.tensor([[think, no_think]], dtype=dtype), 0.2)
    assert r_inter.tolist() == [[[0] * 5, [1] * 5]]


scores = st.one_of(
    st.integers(5, 60).map(float),
    st.floats(-1e6, 1e6, allow_subnormal=False),
    st.floats(-1e-6, 1e-6, allow_subnormal=False),
    st.sampled_from([0.1, 0.2, 0.3, 0.6, 0.7, 0.9]),
)


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    samples=st.lists(scores, min_size=2, max_size=16),
    margin=st.sampled_from([0.0, 0.2]),
    data=st.data(),
)
def test_the_same_scores_in_another_order_never_win(
    dtype: torch.dtype, samples: list[float], margin: float, data: st.DataObject
) -> None:
    """Whatever the scores' size, rounding in a sum is no difference of means."""
    shuffled = data.draw(st.permutations(samples))
    r_inter, _ = assign_rewards(torch.tensor([[samples, shuffled]], dtype=dtype), margin)
    assert r_inter[0].tolist() == [[0.0] * len(samples), [1.0] * len(samples)]


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    tenths=st.lists(st.integers(0, 600), min_size=2, max_size=8),
    margin=st.integers(0, 30),
)
def test_a_gap_of_exactly_the_margin_is_a_tie(dtype: torch.dtype, tenths: list[int], margin: int) -> None:
    """In decimals, which binary floating point rounds: no think; one tenth more of one sample, think."""
    no_think = [tenth / 10 for tenth in tenths]
    think = [(tenth + margin) / 10 for tenth in tenths]
    better = [*think[:-1], think[-1] + 0.1]
    rewards = torch.tensor([[think, no_think], [better, no_think]], dtype=dtype)
    r_inter, _ = assign_rewards(rewards, margin / 10)
    assert r_inter[:, 0, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
@pytest.mark.parametrize("empty", [0, 1])
def test_by_hand_a_mode_without_valid_samples(estimator: str, empty: int) -> None:
    """No inter-group signal for that query, whatever alpha; the other mode keeps its intra-group one."""
    # The other mode has r_intra (0, 1): -PAIR and +PAIR under grpo, -1 and +1 under rloo.
    filled = [0.0, 1.0]
    query = [[NAN, NAN], filled] if empty == 0 else [filled, [NAN, NAN]]
    case = Case([query], [2] * 4, estimator=estimator, alpha=5.0)
    r_inter, r_intra = assign_rewards(torch.tensor(case.rewards), 0.2)
    assert r_inter.tolist() == [[[0, 0], [0, 0]]]
    assert r_intra.tolist() == ([[[0, 0], [0, 1]]] if empty == 0 else [[[0, 1], [0, 0]]])
    value = PAIR if estimator == "grpo" else 1.0
    rows = [[-value, -value], [value, value]]
    nothing = [[0.0, 0.0], [0.0, 0.0]]
    expected = nothing + rows if empty == 0 else rows + nothing
    assert_close(case.run(), expected, 1e-7)
    assert_close(replace(case, intra_scope="all").run(), expected, 1e-7)
    for weighting in DECISION_WEIGHTINGS:
        weighted = replace(case, decision_weighting=weighting, mode_probs=[[0.9, 0.1]])
        assert_close(weighted.run(), expected, 1e-7)


def test_by_hand_one_invalid_sample() -> None:
    """think (1, 0), no think (NaN, 1): a lone valid sample has no intra-group advantage, the NaN row none."""
    # R_think = 0.5, R_no_think = 1: no think wins; r_inter over the three valid ones (0, 0, 1): mean 1/3,
    # std sqrt((1/9 + 1/9 + 4/9) / 2) = 0.57735027; (-1/3) / 0.57745027 = -0.57725028 and
    # (2/3) / 0.57745027 = 1.15450056.
    low, high = -0.57725028, 1.15450056
    case = Case([[[1.0, 0.0], [NAN, 1.0]]], [1, 1, 3, 2])
    expected: Rows = [[low + PAIR, 0, 0], [low - PAIR, 0, 0], [0, 0, 0], [high, 0, 0]]
    assert_close(case.run(), expected, 1e-7)
    # rloo: r_inter 0 - (0 + 1) / 2 = -1/2, 1 - 0 = 1; r_intra 1 - 0, 0 - 1, and 0 for the lone one.
    expected = [[0.5, 0, 0], [-1.5, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert_close(replace(case, estimator="rloo").run(), expected, 1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_valid_gives_zeros(estimator: str) -> None:
    """A batch without a single valid reward moves nothing."""
    case = Case([[[NAN, NAN], [NAN, NAN]]], [3, 1, 2, 1], estimator=estimator)
    assert case.run() == [[0.0] * 3] * 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_lone_valid_token(estimator: str) -> None:
    """One valid sample of one token: 0, but for the printed rule, which neither centres nor scales."""
    case = Case([[[1.0, NAN], [NAN, NAN]]], [1, 2, 1, 1], estimator=estimator)
    value = 1.0 if estimator == "reinforce_plus_plus_as_printed" else 0.0
    assert case.run() == [[value, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


# --- 4. Errors ----------------------------------------------------------------


def expect_error(field: str, value: str, **changes: Any) -> None:
    """A sound call with `changes` raises a ValueError that names `field` and shows `value`."""
    arguments: dict[str, Any] = {
        "rewards": torch.zeros(2, 2, 2),
        "completion_lengths": torch.ones(8, dtype=torch.long),
    }
    arguments.update(changes)
    with pytest.raises(ValueError, match=field) as caught:
        compute_advantages(arguments.pop("rewards"), arguments.pop("completion_lengths"), **arguments)
    assert value in str(caught.value)


@pytest.mark.parametrize("field", ["estimator", "intra_scope", "ties", "decision_weighting"])
def test_unknown_choice(field: str) -> None:
    """The choices are closed."""
    expect_error(field, "nonsense", **{field: "nonsense"})


@pytest.mark.parametrize("field", ["alpha", "margin"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weight(field: str, value: float) -> None:
    """alpha and margin are finite."""
    expect_error(field, str(value), **{field: value})


@pytest.mark.parametrize("value", [0.0, -0.5, 1.001, math.nan, math.inf])
@pytest.mark.parametrize("estimator", ["reinforce_plus_plus", "reinforce_plus_plus_as_printed"])
def test_discount_out_of_range(value: float, estimator: str) -> None:
    """discount lies in (0, 1]."""
    expect_error("discount", str(value), discount=value, estimator=estimator)


@pytest.mark.parametrize("shape", [(8,), (4, 2), (2, 3, 2), (2, 2, 2, 1)])
def test_rewards_of_another_shape(shape: tuple[int, ...]) -> None:
    """rewards is [Q, 2, N/2]."""
    expect_error("rewards", ", ".join(map(str, shape)), rewards=torch.zeros(shape))


@pytest.mark.parametrize("size", [7, 9, 2])
def test_completion_lengths_of_another_size(size: int) -> None:
    """One length per row."""
    expect_error("completion_lengths", str(size), completion_lengths=torch.ones(size, dtype=torch.long))


@pytest.mark.parametrize("value", [0, -3])
def test_completion_without_tokens(value: int) -> None:
    """Every completion has a decision token."""
    lengths = torch.tensor([1, 2, 3, value, 1, 1, 1, 1])
    expect_error("completion_lengths", str(value), completion_lengths=lengths)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 3), (1, 2)])
def test_mode_probs_of_another_shape(shape: tuple[int, ...]) -> None:
    """mode_probs is [Q, 2]."""
    expect_error("mode_probs", str(shape[-1]), mode_probs=torch.full(shape, 0.5))


def test_assign_rewards_unknown_ties() -> None:
    """The same check without compute_advantages."""
    with pytest.raises(ValueError, match=r"ties.*nonsense"):
        assign_rewards(torch.zeros(2, 2, 2), 0.2, ties="nonsense")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_assign_rewards_non_finite_margin(value: float) -> None:
    """The same check without compute_advantages."""
    with pytest.raises(ValueError, match=rf"margin.*{value}"):
        assign_rewards(torch.zeros(2, 2, 2), value)


@pytest.mark.parametrize("shape", [(4, 2), (2, 3, 2)])
def test_assign_rewards_of_another_shape(shape: tuple[int, ...]) -> None:
    """The same check without compute_advantages."""
    with pytest.raises(ValueError, match="rewards") as caught:
        assign_rewards(torch.zeros(shape), 0.2)
    assert ", ".join(map(str, shape)) in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_mode_probs_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match="mode_probs must lie between 0 and 1"):
        compute_advantages(
            torch.ones(1, 2, 2), torch.ones(4, dtype=torch.long), mode_probs=torch.tensor([[0.5, value]])
        )


def test_saturating_without_mode_probs() -> None:
    expect_error("mode_probs", "saturating", decision_weighting="saturating")


def test_infinite_rewards_are_compared_like_any_other() -> None:
    _, r_intra = assign_rewards(torch.tensor([[[math.inf, 1.0], [-math.inf, -math.inf]]]), 0.2)
    assert r_intra.tolist() == [[[1.0, 0.0], [1.0, 1.0]]]


# --- 5. Estimators of a user's own --------------------------------------------


def centred(batch: BinaryRewards) -> tuple[torch.Tensor, torch.Tensor]:
    """Dr. GRPO's advantage: centred, not scaled."""
    intra = (batch.r_intra - batch.r_intra.mean(dim=2, keepdim=True)) * batch.valid
    return batch.per_token(intra), batch.r_inter - batch.r_inter.mean(dim=(1, 2), keepdim=True)


def test_an_estimator_of_a_users_own() -> None:
    actual = compute_advantages(
        torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([2, 3, 1, 2]), estimator=centred, alpha=2.0
    )
    assert actual.tolist() == [[1.5, 0.5, 0.0], [0.5, -0.5, -0.5], [-1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]


@pytest.mark.parametrize("form", ["file", "module"])
def test_an_estimator_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    code = "from hgpo_trl.training.advantages import grpo\n\ndef mine(batch):\n    return grpo(batch)\n"
    (tmp_path / "my_estimators.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    name = f"{tmp_path}/my_estimators.py:mine" if form == "file" else "my_estimators.mine"
    assert load_estimator(name).__name__ == "mine"
    actual = compute_advantages(torch.tensor(BY_HAND.rewards), torch.tensor(BY_HAND.lengths), estimator=name)
    assert torch.equal(actual, compute_advantages(torch.tensor(BY_HAND.rewards), torch.tensor(BY_HAND.lengths)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "estimator must be one of grpo, rloo, .* or your own as package.module.function"),
        ("no.such.module", "There is no module 'no.such'"),
        ("math.nonsense", "estimator: 'math.nonsense': math has no function 'nonsense'"),
        ("none.py:mine", "There is no file none.py"),
        ("none.py", "names a file but no function in it: write none.py:function"),
    ],
)
def test_an_estimator_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_estimator(name)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda batch: (batch.r_intra, batch.r_inter), r"intra-group advantages must have the shape \[4, 3\]"),
        (lambda batch: (batch.per_token(batch.r_intra), batch.r_inter[0]), r"inter-group .* shape \[1, 2, 2\]"),
        (
            lambda batch: (batch.per_token(batch.r_intra) / 0, batch.r_inter),
            "some intra-group advantages are not",
        ),
        (lambda batch: (torch.ones(4, 3), batch.r_inter), "beyond the end of a response must be 0"),
    ],
)
def test_an_estimator_that_returns_something_else(broken: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute_advantages(torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([2, 3, 1, 2]), estimator=broken)
