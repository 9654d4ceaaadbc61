"""`lazy_thinking`: no think samples of queries that no-think has won already; all else as without it."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import well_formed_ids
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from settings import CONTINUOUS_BATCHING
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer

from hgpo_trl.modes import MODES, Fault, Mode, Response
from hgpo_trl.rewards.functions import check_bounded, checked
from hgpo_trl.training.advantages import (
    DECISION_WEIGHTINGS,
    ESTIMATORS,
    assign_rewards,
    compute_advantages,
    decided_without_think,
)
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.lazy import LazyThinking
from hgpo_trl.training.trainer import HGPOTrainer

# --- the mathematics ----------------------------------------------------------------------------------------------

UNIT = st.sampled_from([0.0, 0.25, 0.8, 1.0]) | st.floats(0.0, 1.0, width=32)


@st.composite
def unit_rewards(draw: st.DrawFn) -> torch.Tensor:
    """`[Q, 2, N/2]` between 0 and 1, high ones of no-think often."""
    queries, half = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    rewards = [
        [draw(st.lists(UNIT, min_size=half, max_size=half)), draw(st.lists(reward, min_size=half, max_size=half))]
        for reward in draw(st.lists(st.just(st.just(1.0)) | st.just(UNIT), min_size=queries, max_size=queries))
    ]
    return torch.tensor(rewards, dtype=torch.float64)


MARGIN = st.sampled_from([0.0, 0.2, 1.0, -0.1]) | st.floats(-0.5, 1.5)


@given(unit_rewards(), MARGIN)
def test_decided_is_what_no_think_samples_can_win(rewards: torch.Tensor, margin: float) -> None:
    """It is the mean plus the margin that decides, and no think samples reverse it."""
    decided = decided_without_think(rewards[:, 1], margin)
    means = [math.fsum(query) / len(query) for query in rewards[:, 1].tolist()]
    near = torch.tensor([abs(mean + margin - 1) < 2e-6 for mean in means])
    assert (decided | near).tolist() == [mean + margin >= 1 or close for mean, close in zip(means, near, strict=True)]
    r_inter, _ = assign_rewards(rewards, margin)
    assert r_inter[decided, 1].eq(1).all()
    assert r_inter[decided, 0].eq(0).all()


def test_ties_go_to_no_think() -> None:
    no_think = torch.tensor([[0.8, 0.8], [1.0, 0.5], [1.0, 1.0], [math.nan, 1.0], [math.nan, math.nan]])
    assert decided_without_think(no_think, 0.2).tolist() == [True, False, True, False, False]
    assert decided_without_think(no_think[:3], 0.0).tolist() == [False, False, True]


@given(
    unit_rewards(),
    MARGIN,
    st.sampled_from([*ESTIMATORS]),
    st.sampled_from(["all", "first"]),
    st.sampled_from([*DECISION_WEIGHTINGS]),
    st.data(),
)
def test_decision_tokens_get_what_the_whole_algorithm_gives_them(
    rewards: torch.Tensor, margin: float, estimator: str, ties: str, weighting: str, data: st.DataObject
) -> None:
    queries, _, half = rewards.shape
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 6), min_size=rewards.numel(), max_size=rewards.numel())))
    probs = torch.tensor(data.draw(st.lists(st.tuples(*[st.floats(0, 0.5)] * 2), min_size=queries, max_size=queries)))
    decided = decided_without_think(rewards[:, 1], margin)
    unsampled = torch.stack([decided, torch.zeros_like(decided)], dim=1).repeat_interleave(half, dim=1)  # [Q, N]
    seen = rewards.masked_fill(unsampled.view(rewards.shape), torch.nan)
    short = lengths.masked_fill(unsampled.flatten(), 1)
    options: dict[str, Any] = {
        "estimator": estimator,
        "margin": margin,
        "ties": ties,
        "decision_weighting": weighting,
        "mode_probs": probs,
    }

    def both(alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
        whole = compute_advantages(rewards, lengths, alpha=alpha, **options)
        return whole, compute_advantages(seen, short, alpha=alpha, decided=decided, **options)

    (whole, lazy), (whole_intra, lazy_intra) = both(0.7), both(0.0)
    inter, lazy_inter = (whole - whole_intra)[:, 0], (lazy - lazy_intra)[:, 0]
    torch.testing.assert_close(lazy_inter, inter, rtol=0, atol=1e-12)
    assert not lazy_intra[unsampled.flatten()].any(), "no intra-group signal"
    if estimator in ("grpo", "rloo"):  # the others whiten over the batch
        width = min(whole.shape[1], lazy.shape[1])
        torch.testing.assert_close(lazy[~unsampled.flatten(), :width], whole[~unsampled.flatten(), :width])


def test_a_query_without_valid_think_samples_is_not_decided_for_that() -> None:
    rewards = torch.tensor([[[math.nan, math.nan], [1.0, 0.0]]] * 2)
    r_inter, _ = assign_rewards(rewards, 0.2, decided=torch.tensor([False, True]))
    assert r_inter.tolist() == [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]]


def test_decided_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"decided must have the shape \[2\]; got \[1\]"):
        assign_rewards(torch.ones(2, 2, 2), 0.2, decided=torch.tensor([True]))


# --- rewards ------------------------------------------------------------------------------------------------------


def test_reward_functions_see_rows_with_a_response_only() -> None:
    calls: list[dict[str, Any]] = []

    def three(completions: list, **kwargs: Any) -> list[float]:
        return [0.0] * 3

    def record(completions: list, **kwargs: Any) -> list[float | None]:
        calls.append({"completions": completions} | kwargs)
        return [None, 0.5][: len(completions)]

    response = Response(Mode.THINK, "", "1", ())
    columns = {"completions": ["a", "b", "c"], "answer": ["1", "2", "3"], "trainer_state": object()}
    first, middle, last = checked(record)(**columns, response=[response, None, response])
    assert (math.isnan(first), middle, last) == (True, 0.0, 0.5)
    assert calls == [
        columns | {"completions": ["a", "c"], "answer": ["1", "3"], "response": [response, response]},
    ]
    assert checked(record)(**columns, response=[None] * 3) == [0.0] * 3
    assert len(calls) == 1
    with pytest.raises(ValueError, match="'three' returned 3 rewards for 2 completions"):
        checked(three)(**columns, response=[response, None, response])


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ([[1.0, math.nan], [math.nan, 0.0]], [1.0, 1.0], None),  # no response is scored by both
        ([[1.0, 1.0]], [0.3, 0.7], None),
        ([[0.0, 1.5]], [0.5, 0.5], r"needs rewards between 0 and 1, but 'b' gave 1\.5"),
        ([[math.nan, -0.1]], [0.5, 0.5], r"'b' gave -0\.1"),
        ([[1.0, math.nan], [0.0, 0.0]], [0.5, 1.0], r"a and b score the same response and .* add up to 1\.5"),
    ],
)
def test_rewards_are_bounded(rewards: list[list[float]], weights: list[float], message: str | None) -> None:
    arguments = (torch.tensor(rewards), torch.tensor(weights), ["a", "b"])
    if message is None:
        check_bounded(*arguments)
    else:
        with pytest.raises(ValueError, match=message):
            check_bounded(*arguments)


# --- rollouts -----------------------------------------------------------------------------------------------------


def by_level(completions: list, response: list[Response], level: list[int], **kwargs: Any) -> list[float]:
    """No-think solves the easy queries, think about half of the others."""
    return [
        float(level[row] <= 3) if part.mode is Mode.NO_THINK else float(sum(map(ord, part.answer)) % 2)
        for row, part in enumerate(response)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The prompts of every call for samples, forced token included; what is sampled is made well-formed."""
    calls: list[list[list[int]]] = []
    generate = GRPOTrainer._generate_single_turn

    def repaired(self: HGPOTrainer, prompt_ids: list[list[int]], *args: Any) -> Any:
        calls.append(prompt_ids)
        ids, log_probs = generate(self, prompt_ids, *args)
        fillers = self._tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)])
        rows = zip(prompt_ids, ids, strict=True)
        return [well_formed_ids([prompt[-1], *row], self.mode_tokens, fillers)[1:] for prompt, row in rows], log_probs

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", repaired)
    return calls


@pytest.fixture
def make_trainer(
    model_dir: str, tokenizer: PreTrainedTokenizerFast, prompts: Dataset, tmp_path: Path
) -> Callable[..., HGPOTrainer]:
    def make(reward_funcs: Any = by_level, trainer: dict | None = None, **config: Any) -> HGPOTrainer:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path),
            "lazy_thinking": True,
            "per_device_train_batch_size": 24,
            "per_device_eval_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "max_steps": 1,
            "learning_rate": 1e-2,
            "beta": 0.0,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        args = HGPOConfig(**(settings | config))
        return HGPOTrainer(model_dir, reward_funcs, args, prompts, processing_class=tokenizer, **(trainer or {}))

    return make


def rollout(trainer: HGPOTrainer) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one generation batch and what becomes of them."""
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    return inputs, trainer._generate_and_score_completions(inputs)


def responses(batch: dict[str, Any]) -> list[list[int]]:
    rows = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


@pytest.mark.parametrize("continuous_batching", [False, True])
def test_no_think_token_is_drawn_of_decided_queries(
    make_trainer: Callable, drawn: list, continuous_batching: bool
) -> None:
    trainer = make_trainer(**(CONTINUOUS_BATCHING if continuous_batching else {}))
    inputs, batch = rollout(trainer)
    think, no_think = trainer.mode_tokens.decision
    easy = [row["level"] <= 3 for row in inputs]
    assert trainer._rollout.decided.tolist() == easy[::4]
    assert 0 < sum(easy[::4]) < 6
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    thinks = [row % 4 < 2 for row in range(24)]
    assert drawn == [
        [[*prompts[row], no_think] for row in range(24) if not thinks[row]],
        [[*prompts[row], think] for row in range(24) if thinks[row] and not easy[row]],
    ]
    for row, ids in enumerate(responses(batch)):
        assert ids[0] == (think if thinks[row] else no_think)
        assert (len(ids) == 1) == (thinks[row] and easy[row])


def test_undecided_queries_are_sampled_as_without_it(make_trainer: Callable, drawn: list) -> None:
    """Greedy, because the random numbers are others."""
    greedy = {"generation_kwargs": {"do_sample": False}, "decision_weighting": "uniform"}
    inputs, whole = rollout(make_trainer(lazy_thinking=False, **greedy))
    _, lazy = rollout(make_trainer(**greedy))
    assert len(drawn) == 4
    unsampled = [row % 4 < 2 and inputs[row]["level"] <= 3 for row in range(24)]
    for row, (full, short) in enumerate(zip(responses(whole), responses(lazy), strict=True)):
        assert short == (full[:1] if unsampled[row] else full)
        expected, advantages = whole["advantages"][row], lazy["advantages"][row]
        if unsampled[row]:  # greedy samples of a mode are alike: no intra-group advantage
            torch.testing.assert_close(advantages[0], expected[0])
            assert not advantages[1:].any()
        else:
            width = min(len(expected), len(advantages))
            torch.testing.assert_close(advantages[:width], expected[:width])


def test_with_nothing_decided_think_samples_are_drawn_of_all(make_trainer: Callable, drawn: list) -> None:
    _, batch = rollout(make_trainer(margin=-0.1))
    assert [len(prompts) for prompts in drawn] == [12, 12]
    assert min(map(len, responses(batch))) > 1


def test_with_all_decided_none_is_drawn(make_trainer: Callable, drawn: list) -> None:
    trainer = make_trainer(margin=1.0, max_steps=2)
    trainer.train()
    assert [len(prompts) for prompts in drawn] == [12, 12]
    for entry in trainer.state.log_history[:2]:
        assert entry["hgpo/lazy_decided"] == 1.0
        assert entry["hgpo/reward/think"] is None
        assert entry["hgpo/length/think"] is None
        assert entry["hgpo/think_win_rate"] == 0.0
        assert entry["hgpo/rollout_tokens"] == pytest.approx(2 * (entry["hgpo/length/no_think"] - 1))


@pytest.mark.usefixtures("drawn")
def test_every_response_is_scored_once(make_trainer: Callable, tmp_path: Path) -> None:
    """Also by functions that log columns, give no reward or are asynchronous; each value stays with its response."""
    seen: dict[str, list] = defaultdict(list)

    def answers(completions: list, response: list[Response], log_extra: Any, **kwargs: Any) -> list[float | None]:
        seen["answers"] += [part.answer for part in response]
        log_extra("said", [part.answer for part in response])
        return [None] * len(completions)

    async def later(completions: list, response: list[Response], log_metric: Any, **kwargs: Any) -> list[float]:
        seen["later"] += [part.answer for part in response]
        log_metric("calls", len(completions))
        return by_level(completions, response, **kwargs)

    trainer = make_trainer([answers, later], log_completions=True, decision_weighting="uniform")
    trainer.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    texts = [completion[0]["content"] for completion in table["completion"]]
    alone = [text == "<think>" for text in texts]
    assert 0 < sum(alone) < 12
    assert len(seen["answers"]) == 24 - sum(alone)
    assert seen["answers"] == seen["later"]
    assert sorted(seen["answers"]) == sorted(table["said"].dropna())
    for text, said, unsampled in zip(texts, table["said"], alone, strict=True):
        assert pd.isna(said) if unsampled else said in text
    assert table["later"].isna().tolist() == alone
    assert table["answers"].isna().all()
    assert (table["advantage"][alone] == 0).all()
    assert (table["decision_advantage"][alone] < 0).all()


def test_what_is_not_scored_is_not_decided(make_trainer: Callable, drawn: list) -> None:
    """One no-think response of a query without a reward is enough."""

    def partly(completions: list, response: list[Response], **kwargs: Any) -> list[float | None]:
        return [None if row == 0 and part.mode is Mode.NO_THINK else 1.0 for row, part in enumerate(response)]

    trainer = make_trainer(partly)
    _, batch = rollout(trainer)
    assert trainer._rollout.decided.tolist() == [False, *[True] * 5]
    assert [len(prompts) for prompts in drawn] == [12, 2]
    assert batch["advantages"].isfinite().all()
    assert batch["advantages"][2].abs().max() == 0


def test_malformed_no_think_responses_score_0(make_trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two of a query is malformed, or beyond the cap: half is not enough."""
    texts = ["4 </no_think>", "4 4 4 </no_think>", "4 </no_think>", "4 </no_think> 4", "4 </no_think>", "4 </no_think>"]

    def generate(self: HGPOTrainer, prompt_ids: list[list[int]], *args: Any) -> tuple:
        end = texts if prompt_ids[0][-1] == self.mode_tokens.no_think else ["4 </think> 4"]
        return [self._tokenizer(end[row % len(end)])["input_ids"] for row in range(len(prompt_ids))], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
    trainer = make_trainer(
        lambda completions, **kwargs: [1.0] * len(completions), per_device_train_batch_size=12, no_think_max_tokens=2
    )
    rollout(trainer)
    assert trainer._rollout.decided.tolist() == [False, False, True]
    assert trainer._rollout.rewards_per_func[:, 0].nan_to_num(-1).tolist() == [1, 1, 1, 0, 1, 1, 1, 0, -1, -1, 1, 1]
    metrics = trainer._metrics["train"]
    assert metrics["hgpo/format_faults/think"][:2] == [0.0, 0.0]
    assert math.isnan(metrics["hgpo/format_faults/think"][2])
    assert metrics[f"hgpo/faults/{Fault.OVERLONG}"] == [0.25, 0.0, 0.0]
    assert metrics["hgpo/lazy_decided"] == [0.0, 0.0, 1.0]


@pytest.mark.usefixtures("drawn")
def test_metrics_are_those_of_what_was_sampled(make_trainer: Callable) -> None:
    trainer = make_trainer()
    _, batch = rollout(trainer)
    metrics, ids = trainer._metrics["train"], responses(batch)
    sampled = [row for row in ids if len(row) > 1]
    ends = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
    assert len(sampled) < len(ids)
    assert metrics["completions/mean_length"] == [pytest.approx(sum(map(len, sampled)) / len(sampled))]
    assert metrics["completions/min_length"] == [min(map(len, sampled))]
    assert metrics["completions/max_length"] == [max(map(len, sampled))]
    assert metrics["completions/clipped_ratio"] == [
        pytest.approx(sum(row[-1] not in ends for row in sampled) / len(sampled))
    ]
    assert metrics["hgpo/rollout_tokens"] == [sum(len(row) - 1 for row in ids[i : i + 4]) for i in range(0, 24, 4)]
    for index, mode in enumerate(MODES):
        lengths = [[len(row) for row in ids[i + 2 * index :][:2] if len(row) > 1] for i in range(0, 24, 4)]
        expected = [sum(query) / len(query) if query else math.nan for query in lengths]
        assert metrics[f"hgpo/length/{mode}"] == pytest.approx(expected, nan_ok=True)
        truncated = [math.isnan(value) for value in metrics[f"hgpo/truncated/{mode}"]]
        assert truncated == [math.isnan(value) for value in expected]


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    "config",
    [
        {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 12},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 8, "beta": 0.01},
        {"loss_type": "grpo", "estimator": "reinforce_plus_plus"},
        {"trim_micro_batches": False, "estimator": "rloo", "ties": "first", "intra_scope": "all"},
    ],
    ids=lambda config: next(iter(config)),
)
def test_it_trains(make_trainer: Callable, config: dict[str, Any]) -> None:
    trainer = make_trainer(max_steps=3, **config)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert [name for name, now in trainer.model.named_parameters() if torch.equal(before[name], now)] == []
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    for entry in trainer.state.log_history:
        assert all(math.isfinite(value) for value in entry.values() if value is not None)
    shares = [entry["hgpo/lazy_decided"] for entry in trainer.state.log_history if "hgpo/lazy_decided" in entry]
    assert shares
    assert any(0 < share < 1 for share in shares)


def test_evaluation_samples_both_modes(make_trainer: Callable, prompts: Dataset, drawn: list) -> None:
    trainer = make_trainer(margin=1.0, trainer={"eval_dataset": prompts.select(range(4))})
    rollout(trainer)
    drawn.clear()
    log = trainer.evaluate()
    assert [len(prompts) for prompts in drawn] == [4, 4] * 2
    assert "eval_hgpo/lazy_decided" not in log
    assert log["eval_hgpo/rollout_tokens"] > 0
    assert log["eval_hgpo/length/think"] > 1


class Undecided(LazyThinking):
    """One process's part of a rollout whose undecided think rows are known."""

    def __init__(self, rows: list[int], *decided: bool) -> None:
        self.rows, self.decided = rows, torch.tensor(decided)


@pytest.fixture
def known_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HGPOTrainer, "_undecided", lambda self, lazy, ids: lazy.rows)


@pytest.mark.usefixtures("known_decisions")
def test_a_process_without_undecided_queries_takes_part(make_trainer: Callable, drawn: list) -> None:
    """The other process has some: one of its own rows is sampled for nothing, lest a sharded model wait for it."""
    trainer = make_trainer()
    trainer.model.train()
    trainer._lazy = Undecided([], False, False, True, True)
    ids, _ = trainer._generate_single_turn([[5, 6]] * 8, None, {}, 4)
    assert [len(prompts) for prompts in drawn] == [4, 1]
    assert [len(row) == 1 for row in ids] == [True, True, False, False] * 2


@pytest.mark.usefixtures("known_decisions")
def test_vllm_log_probabilities_of_both_calls(make_trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    trainer.model.train()
    trainer.use_vllm, trainer.vllm_generation = True, SimpleNamespace()  # only its call is replaced
    trainer._lazy = Undecided([4, 5], True, False)
    monkeypatch.setattr(
        GRPOTrainer,
        "_generate_single_turn",
        lambda self, prompts, *rest: ([[7, row] for row in range(len(prompts))], [[-0.5, -0.1]] * len(prompts)),
    )
    think, no_think = trainer.mode_tokens.decision
    ids, log_probs = trainer._generate_single_turn([[1]] * 8, None, {}, 4)
    assert ids == [
        [think], [think], [no_think, 7, 0], [no_think, 7, 1],
        [think, 7, 0], [think, 7, 1], [no_think, 7, 2], [no_think, 7, 3],
    ]  # fmt: skip
    assert log_probs == [[None]] * 2 + [[None, -0.5, -0.1]] * 6


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"no_think_cap": 2.0}, r"lazy_thinking does not go with no_think_cap=2\.0"),
        ({"mask_truncated_completions": True}, "lazy_thinking does not go with mask_truncated_completions=True"),
        ({"reward_weights": [0.5, 2.0]}, r"reward_weights is \[0\.5, 2\.0\]"),
        ({"reward_weights": [-0.5]}, r"reward_weights is \[-0\.5\]"),
        ({"use_vllm": True, "vllm_mode": "server"}, "not with server and 1"),
        ({"use_vllm": True, "vllm_mode": "colocate", "vllm_tensor_parallel_size": 2}, "not with colocate and 2"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    HGPOConfig(str(tmp_path), use_cpu=True, bf16=False, **config)
    with pytest.raises(ValueError, match=message):
        HGPOConfig(str(tmp_path), use_cpu=True, bf16=False, lazy_thinking=True, **config)


def test_rows_of_one_mode_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HGPOConfig, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"num_generations=4 rows .*=2 x steps_per_generation=1 = 2"):
        HGPOConfig(str(tmp_path), use_cpu=True, bf16=False, lazy_thinking=True, per_device_train_batch_size=2)


@pytest.mark.parametrize("reward_func", ["some/model", nn.Linear(1, 1)], ids=["name", "module"])
def test_reward_models_that_trl_runs(make_trainer: Callable, reward_func: Any) -> None:
    with pytest.raises(ValueError, match=r"the scores of (some/model|Linear) have no bounds"):
        make_trainer(reward_func)


@pytest.mark.usefixtures("drawn")
def test_rewards_out_of_bounds_end_the_run(make_trainer: Callable) -> None:
    def double(completions: list, **kwargs: Any) -> list[float]:
        return [2.0] * len(completions)

    with pytest.raises(ValueError, match=r"needs rewards between 0 and 1, but 'double' gave 2\. Rescale"):
        make_trainer(double).train()


@pytest.mark.usefixtures("drawn")
def test_a_column_of_another_length(make_trainer: Callable) -> None:
    def wordy(completions: list, log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("word", ["a"])
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=r"log_extra\('word'\) got 1 values for 12 completions"):
        make_trainer(wordy).train()
