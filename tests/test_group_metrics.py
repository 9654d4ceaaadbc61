"""Metrics of a rollout: pure functions, against plain Python."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hgpo_trl.modes import MODES, Fault
from hgpo_trl.modes.decision import Decision
from hgpo_trl.modes.hybrid_accuracy import evaluation_metrics
from hgpo_trl.training.advantages import query_signal
from hgpo_trl.training.metrics import EvaluationMetrics, group_metrics, sampled_completions
from hgpo_trl.training.rollout import Rollout, row_modes, think_rows, unsampled_rows

NAN = math.nan


@st.composite
def rollouts(draw: st.DrawFn, lazy: bool | None = None) -> tuple[Rollout, Decision]:
    """Up to four queries of four or six responses."""
    queries, group = draw(st.integers(1, 4)), draw(st.sampled_from([4, 6]))
    rows = queries * group

    def integers(low: int, high: int, size: int = rows) -> torch.Tensor:
        return torch.tensor(draw(st.lists(st.integers(low, high), min_size=size, max_size=size)))

    lazy = draw(st.booleans()) if lazy is None else lazy
    decided = integers(0, 1, queries).bool() if lazy else None
    unsampled = unsampled_rows(rows, group, decided, torch.device("cpu"))
    rewards = integers(-1, 2).float()
    rewards[(rewards < 0) | unsampled] = NAN
    faults = torch.zeros(rows, len(Fault), dtype=torch.long)
    faults[torch.arange(rows), integers(0, len(Fault) - 1)] = integers(0, 1) * ~unsampled
    lengths = integers(2, 9).masked_fill(unsampled, 1)
    truncated = integers(0, 1) * ~unsampled
    words = integers(0, 3)
    rollout = Rollout(rewards[:, None], torch.ones(1), lengths, truncated, faults, words, group, decided)
    think = integers(0, 5, queries) / 10
    no_think = integers(0, 5, queries) / 10
    decision = Decision(think, no_think, 1 - think - no_think, think + 1, integers(-1, 1, queries))
    return rollout, decision


def mean(values: list[float]) -> float:
    valid = [value for value in values if not math.isnan(value)]
    return sum(valid) / len(valid) if valid else NAN


@given(rollouts(), st.sampled_from([0.0, 0.2, 0.5]))
def test_every_metric_of_every_query(case: tuple[Rollout, Decision], margin: float) -> None:
    rollout, decision = case
    found = {name: column.float().tolist() for name, column in group_metrics(*case, margin, "all").items()}
    half = rollout.group_size // 2
    rewards, lengths = rollout.rewards_per_func[:, 0].tolist(), rollout.lengths.tolist()
    for query in range(len(decision.think)):
        first = query * rollout.group_size
        rows = [range(first, first + half), range(first + half, first + 2 * half)]
        is_decided = rollout.decided is not None and bool(rollout.decided[query])
        sampled = [*rows[1]] if is_decided else [*rows[0], *rows[1]]
        expected: dict[str, float] = {
            f"hgpo/faults/{kind}": mean([float(rollout.faults[row, place]) for row in sampled])
            for place, kind in enumerate(Fault)
        }
        expected["hgpo/rollout_tokens"] = sum(lengths[row] - 1 for row in (*rows[0], *rows[1]))
        if rollout.decided is not None:
            expected["hgpo/lazy_decided"] = float(is_decided)
        means = []
        for place, mode in enumerate(MODES):
            here = [row for row in rows[place] if row in sampled]
            means.append(mean([rewards[row] for row in here]))
            expected[f"hgpo/reward/{mode}"] = means[-1]
            expected[f"hgpo/length/{mode}"] = mean([lengths[row] for row in here])
            expected[f"hgpo/truncated/{mode}"] = mean([float(rollout.truncated[row]) for row in here])
            expected[f"hgpo/format_faults/{mode}"] = mean([float(rollout.faults[row].any()) for row in here])
            expected[f"hgpo/prob/{mode}"] = decision[place][query].item()
        expected["hgpo/leakage"] = mean([rollout.reflection_words[row].item() for row in rows[1]])
        expected["hgpo/off_mode_mass"] = decision.neither[query].item()
        expected["hgpo/decision_entropy"] = decision.entropy[query].item()
        # A win of no-think needs a valid no-think sample, also where the query is decided.
        scored = [not math.isnan(value) for value in means]
        compared = scored[1] if is_decided else all(scored)
        think_wins = all(scored) and means[0] - means[1] - margin > 2e-6
        expected["hgpo/think_win_rate"] = float(think_wins) if compared else NAN
        within = any(len({rewards[row] for row in rows[m] if not math.isnan(rewards[row])}) > 1 for m in range(2))
        expected["hgpo/no_intra_signal"] = float(not within)
        expected["hgpo/no_signal"] = float(not within and not compared)
        assert {name: column[query] for name, column in found.items()} == pytest.approx(expected, nan_ok=True)


@given(rollouts(lazy=True))
def test_completions_that_were_sampled(case: tuple[Rollout, Decision]) -> None:
    rollout, _ = case
    rows = [row for row, unsampled in enumerate(rollout.unsampled.tolist()) if not unsampled]
    lengths = [rollout.lengths[row].item() for row in rows]
    assert sampled_completions(rollout) == {
        "completions/mean_length": pytest.approx(sum(lengths) / len(lengths)),
        "completions/min_length": min(lengths),
        "completions/clipped_ratio": pytest.approx(mean([float(rollout.truncated[row]) for row in rows])),
    }


@given(st.lists(rollouts(lazy=False), min_size=1, max_size=3), st.integers(0, 3), st.booleans())
def test_prompts_that_fill_the_last_batch_do_not_count(
    batches: list[tuple[Rollout, Decision]], surplus: int, stream: bool
) -> None:
    group = batches[0][0].group_size
    batches = [batch for batch in batches if batch[0].group_size == group]
    sizes = [len(decision.think) for _, decision in batches]
    surplus = 0 if stream else min(surplus, sizes[-1] - 1)
    evaluation = EvaluationMetrics(math.inf if stream else sum(sizes) - surplus)
    assert [evaluation.add(*batch) for batch in batches] == [*sizes[:-1], sizes[-1] - surplus]

    def joined(columns: list[torch.Tensor]) -> Any:
        whole = torch.cat(columns).numpy()
        return whole[: len(whole) - surplus]

    expected = evaluation_metrics(
        joined([rollout.rewards.double() for rollout, _ in batches]),
        joined([rollout.lengths.view(rollout.rewards.shape).double() for rollout, _ in batches]),
        joined([decision.think.double() for _, decision in batches]),
        joined([decision.no_think.double() for _, decision in batches]),
        joined([decision.picked for _, decision in batches]),
        0.1,
        token_budget=1.0,
    )
    found = evaluation.compute(0.1, token_budget=1.0)
    np.testing.assert_equal(found, expected)
    scored = not np.isnan(joined([rollout.rewards for rollout, _ in batches])).all()
    assert evaluation.out_of_reach(found) == (scored and math.isnan(expected["accuracy_at_budget"]))
    assert not evaluation.out_of_reach(evaluation.compute(0.1, None))


def test_a_signal_from_the_margin_alone() -> None:
    """Equal modes: no-think wins by the margin, which no reward has brought about."""
    signal = query_signal(torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]]), 0.2)
    assert signal.compared.tolist() == [True, True]
    assert signal.from_rewards.tolist() == [False, True]
    assert not signal.within.any()
    assert not signal.think_wins.any()


@given(st.integers(1, 4), st.sampled_from([2, 4, 6]), st.integers(1, 4))
def test_the_first_half_of_every_group_thinks_on_any_process(queries: int, group: int, processes: int) -> None:
    """A group may begin on one process and end on another one."""
    num_rows = queries * group * processes
    modes = [
        mode for process in range(processes) for mode in row_modes(queries * group, group, process * queries * group)
    ]
    assert modes == [0 if place % group < group / 2 else 1 for place in range(num_rows)]
    assert think_rows(num_rows, group, torch.device("cpu")).tolist() == [mode == 0 for mode in modes]
