"""Limits of responses, and a budget of reasoning: against a loop, in rollouts, in the loss and in evaluation."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from settings import CONTINUOUS_BATCHING, ON_CPU, lottery
from transformers import PreTrainedTokenizerFast

from hgpo_trl import HGPOConfig, HGPOTrainer
from hgpo_trl.common.errors import UserError
from hgpo_trl.inference.limits import ThinkBudget
from hgpo_trl.modes import LHRM, format_response, mode_tokens

END, END_THINK, BLANK, THINK = 0, 1, 2, 3  # tokens of a made-up model; 4 to 9 are words


def drawn(prefix: list[int]) -> int:
    """The token that a made-up model puts behind a prefix."""
    return random.Random(str(prefix)).choice([END, END_THINK, 4, 5, 6, 7, 8, 9])


def score(prefix: list[int]) -> float:
    return -random.Random(str(prefix)).random()


def sample_to(prompts: list[list[int]], same: int, most: int) -> tuple[list[list[int]], list[list[float]]]:
    """What a backend does: up to `most` tokens behind each prompt, the end included."""
    ids: list[list[int]] = []
    for prompt in prompts:
        tokens: list[int] = []
        while len(tokens) < most and END not in tokens:
            tokens.append(drawn(prompt + tokens))
        ids.append(tokens)
    scores = [
        [score(prompt + tokens[:t]) for t in range(len(tokens))] for prompt, tokens in zip(prompts, ids, strict=True)
    ]
    return ids, scores


def by_loop(budget: ThinkBudget, prompt: list[int]) -> tuple[list[int], list[float | None]]:
    """One response, token by token, and where it was forced (None)."""
    tokens: list[int] = []
    scores: list[float | None] = []
    left = budget.tokens
    while left and END not in tokens:
        scores.append(score(prompt + tokens))
        tokens.append(drawn(prompt + tokens))
        left -= 1
    if END in tokens:
        return tokens, scores
    if END_THINK not in tokens:
        tokens += budget.closing
        scores += [None] * len(budget.closing)
    left = budget.max_new_tokens - budget.tokens - len(budget.closing)
    while left and tokens[-1] != END:
        scores.append(score(prompt + tokens))
        tokens.append(drawn(prompt + tokens))
        left -= 1
    return tokens, scores


budgets = st.builds(
    lambda tokens, closing, answer, opening: ThinkBudget(
        tokens, closing, END_THINK, tokens + len(closing) + answer, opening
    ),
    tokens=st.integers(1, 6),
    closing=st.sampled_from([(END_THINK,), (BLANK, END_THINK, BLANK)]),
    answer=st.integers(1, 5),
    opening=st.integers(1, 3),
)


@given(budget=budgets, words=st.lists(st.integers(4, 9), min_size=1, max_size=5))
def test_responses_are_those_of_a_loop(budget: ThinkBudget, words: list[int]) -> None:
    prompts = [[word, place, THINK] for place, word in enumerate(words)]
    expected = [by_loop(budget, prompt) for prompt in prompts]
    ids, scores = budget.sample(prompts, len(prompts), sample_to, {END})
    assert ids == [tokens for tokens, _ in expected]
    assert scores == [probs for _, probs in expected]
    without, none = budget.sample(prompts, 1, lambda *call: (sample_to(*call)[0], None), {END})
    assert (without, none) == (ids, None)

    responses = [[*[THINK] * budget.opening, *tokens] for tokens in ids]
    lengths = torch.tensor([len(response) for response in responses])
    padded = torch.full((len(responses), int(lengths.max()) + 2), END)
    for row, response in enumerate(responses):
        padded[row, : len(response)] = torch.tensor(response)
    forced = budget.forced(padded, lengths, torch.ones(len(responses), dtype=torch.bool))
    for row, (_, probs) in enumerate(expected):
        assert forced[row].nonzero()[:, 0].tolist() == [
            budget.opening + t for t, prob in enumerate(probs) if prob is None
        ]
    assert not budget.forced(padded, lengths, torch.zeros(len(responses), dtype=torch.bool)).any()


@given(budget=budgets)
def test_the_backend_is_always_asked_twice(budget: ThinkBudget) -> None:
    """Sharded models need all processes as long as one of them samples, whatever the responses are."""
    for prompts in ([[4, THINK]], [[4, THINK], [5, THINK]], [[9, 9, THINK]] * 3):
        calls = []

        def counted(*call: Any, calls: list = calls) -> Any:
            calls.append(call)
            return sample_to(*call)

        budget.sample(prompts, 1, counted, {END})
        assert len(calls) == 2


# --- in the trainer -----------------------------------------------------------------------------------------------

BUDGET, LENGTH = 4, 12


@pytest.fixture
def make(model_dir: str, tokenizer: PreTrainedTokenizerFast, prompts: Dataset, tmp_path: Path) -> Callable[..., Any]:
    def build(**fields: Any) -> HGPOTrainer:
        settings = ON_CPU | {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": LENGTH,
            "max_steps": 1,
            "learning_rate": 1e-2,
            "beta": 0.0,
            "think_budget": BUDGET,
        }
        return HGPOTrainer(
            model=model_dir,
            reward_funcs=lottery,
            args=HGPOConfig(**(settings | fields)),
            train_dataset=prompts,
            eval_dataset=prompts.select(range(4)),
            processing_class=tokenizer,
        )

    return build


def rollout(trainer: HGPOTrainer, prompts: Dataset) -> dict[str, Any]:
    trainer.model.train()
    return trainer._generate_and_score_completions([{**prompts[row // 4]} for row in range(8)])


def is_cut(ids: list[int], end: int, end_think: int) -> bool:
    """Whether a think response had neither closed its reasoning nor ended by the budget."""
    return end_think not in ids[1 : BUDGET + 1] and end not in ids[1 : BUDGET + 1]


@pytest.mark.parametrize("continuous_batching", [False, True])
def test_reasoning_is_closed_at_the_budget(make: Callable, prompts: Dataset, continuous_batching: bool) -> None:
    trainer = make(**(CONTINUOUS_BATCHING if continuous_batching else {}))
    output = rollout(trainer, prompts)
    tokens, eos = mode_tokens(trainer.processing_class), trainer.processing_class.eos_token_id
    closing = trainer.processing_class(LHRM.end_reasoning, add_special_tokens=False)["input_ids"]
    cut = 0
    for row in range(8):
        length = int(output["completion_mask"][row].sum())
        ids, own = output["completion_ids"][row, :length].tolist(), output["tool_mask"][row, :length].tolist()
        expected = [1] * length
        if row % 4 < 2 and is_cut(ids, eos, tokens.end_think):
            cut += 1
            assert ids[BUDGET + 1 : BUDGET + 1 + len(closing)] == closing
            assert length > BUDGET + 1 + len(closing), "the model answers"
            expected[BUDGET + 1 : BUDGET + 1 + len(closing)] = [0] * len(closing)
        assert own == expected
        assert length <= LENGTH
    assert cut  # an untrained model hardly ever closes a reasoning
    logged = trainer._metrics["train"]
    assert sum(logged["hgpo/closed_by_budget"]) == pytest.approx(cut / 2)
    assert sum(logged["hgpo/rollout_tokens"]) == output["completion_mask"].sum() - 8 - cut * len(closing)


def test_forced_tokens_are_out_of_the_loss(make: Callable, prompts: Dataset) -> None:
    trainer = make()
    output = rollout(trainer, prompts)
    assert (output["tool_mask"] == 0).any()
    output["advantages"] = torch.randn(output["completion_ids"].shape)
    trainer.current_gradient_accumulation_steps = 1

    def gradients() -> list[torch.Tensor]:
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, output).backward()
        return [p.grad.clone() for p in trainer.model.parameters()]

    before = gradients()
    output["advantages"] = output["advantages"].masked_fill(output["tool_mask"] == 0, 1e3)
    for first, second in zip(before, gradients(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("fields", [{}, {"lazy_thinking": True, "margin": 0.5}])
def test_training_and_evaluation(make: Callable, fields: dict[str, Any]) -> None:
    trainer = make(**fields)
    trainer.reward_funcs = [lambda completions, **columns: [float(row % 2) for row in range(len(completions))]]
    trainer.train()
    assert trainer.evaluate()["eval_hgpo/closed_by_budget"] > 0


def test_the_answer_is_read_after_a_forced_end(tokenizer: PreTrainedTokenizerFast) -> None:
    """The closing tokens are those that stand in a response of the format."""
    whole = format_response("think", "5", "a = 1")
    assert LHRM.end_reasoning.join(["<think>\na = 1", "5"]) == whole
    closing = tokenizer(LHRM.end_reasoning, add_special_tokens=False)["input_ids"]
    assert mode_tokens(tokenizer).end_think in closing


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"think_budget": 0}, "think_budget must be at least 1 token, or null for no budget; got 0"),
        (
            {"think_budget": 4, "mode_rule": "grpo"},
            "think_budget needs to know which responses think before they are sampled, but mode_rule=grpo",
        ),
        (
            {"max_completion_length": 9, "max_think_tokens": 10},
            "max_think_tokens must lie .* max_completion_length=9, or",
        ),
        (
            {"think_budget": 4, "max_think_tokens": 6},
            "think_budget=4 leaves no token for the answer within max_think_t",
        ),
        ({"max_no_think_tokens": 4, "mode_rule": "grpo"}, "max_no_think_tokens needs to know which responses think"),
        (
            {"max_no_think_tokens": 4, "use_vllm": True, "vllm_mode": "server"},
            "max_no_think_tokens needs processes .* set max_no_think_tokens=null",
        ),
        (
            {"think_budget": 4, "use_vllm": True, "vllm_mode": "server"},
            "think_budget needs processes .* set think_budget=null",
        ),
        (
            {"think_budget": 4, "per_device_train_batch_size": 2, "num_generations": 4, "steps_per_generation": 1},
            "whole groups|think_budget needs both modes in every process",
        ),
    ],
)
def test_settings_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HGPOConfig("unused", **ON_CPU, **fields)


def test_evaluations_have_both_modes_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HGPOConfig, "world_size", 2)
    fields = ON_CPU | {"max_no_think_tokens": 4, "num_generations_eval": 8, "per_device_eval_batch_size": 4}
    HGPOConfig("unused", **fields)
    message = (
        "max_no_think_tokens needs both modes .* num_generations_eval=8 rows .* per_device_eval_batch_size=4. Raise"
    )
    with pytest.raises(UserError, match=message):
        HGPOConfig("unused", **fields, eval_strategy="epoch", do_eval=True)


@pytest.mark.parametrize("continuous_batching", [False, True])
def test_each_mode_has_its_limit(make: Callable, prompts: Dataset, continuous_batching: bool) -> None:
    settings = CONTINUOUS_BATCHING if continuous_batching else {}
    trainer = make(think_budget=None, max_think_tokens=9, max_no_think_tokens=4, **settings)
    output = rollout(trainer, prompts)
    lengths = output["completion_mask"].sum(dim=1).view(2, 2, 2)
    assert lengths[:, 0].max() == 9
    assert lengths[:, 1].max() == 4
    assert "tool_mask" not in output
    found = trainer.evaluate()
    assert 4 < found["eval_hgpo/mean_tokens/think"] <= 9
    assert found["eval_hgpo/mean_tokens/no_think"] <= 4


@pytest.mark.parametrize("budget", [LENGTH - 2, LENGTH, 100])
def test_a_budget_without_room_for_an_answer(make: Callable, budget: int) -> None:
    with pytest.raises(UserError, match=f"think_budget={budget} leaves no token for the answer"):
        make(think_budget=budget)
