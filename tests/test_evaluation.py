"""Sampling in both modes, the decision, scoring, the report, and `hgpo-trl evaluate` from end to end."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from hgpo_trl.common.errors import UserError
from hgpo_trl.evaluation import transformers_backend
from hgpo_trl.evaluation.metrics import report_on
from hgpo_trl.evaluation.scores import score_samples
from hgpo_trl.evaluation.transformers_backend import sample_both_modes
from hgpo_trl.inference import vllm_support
from hgpo_trl.inference.generate import generate
from hgpo_trl.modes import MODES, Fault, ModeTokens, mode_tokens, split_response
from hgpo_trl.modes.decision import OFF_MODE, Decision, read_decision
from hgpo_trl.rewards.model import RewardModel
from hgpo_trl.scripts.evaluate import EvaluateArguments, main
from hgpo_trl.scripts.recipe import RecipeParser

NUM_PROMPTS, SAMPLES, MAX_NEW_TOKENS = 6, 3, 24
MODE_NAMES = [mode.value for mode in MODES]

Messages = list[dict[str, str]]


@pytest.fixture(scope="module")
def model(model_dir: str) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def tokens(tokenizer: PreTrainedTokenizerFast) -> ModeTokens:
    return mode_tokens(tokenizer)


@pytest.fixture(scope="module")
def few(prompts: Dataset) -> Dataset:
    return prompts.select(range(NUM_PROMPTS))


@pytest.fixture(scope="module")
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, few: Dataset) -> Callable[..., pd.DataFrame]:
    """Sample the untrained model."""

    def run(prompts: Any = few["prompt"], **changes: Any) -> pd.DataFrame:
        settings = {"samples_per_mode": SAMPLES, "max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.0, "top_p": 1.0}
        return sample_both_modes(model, tokenizer, prompts, **(settings | changes))

    return run


@pytest.fixture(scope="module")
def samples(sample: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    return sample()


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: Messages) -> list[int]:
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)


# --- The decision -------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_read_decision_is_a_full_forward_pass(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokens: ModeTokens,
    few: Dataset,
    temperature: float,
) -> None:
    ids = [prompt_ids(tokenizer, prompt) for prompt in few["prompt"]]
    assert len({len(row) for row in ids}) > 2  # so that most rows are padded
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    decision = read_decision(model, batch["input_ids"], batch["attention_mask"], tokens, temperature)
    for row, prompt in enumerate(ids):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1].double() / temperature
        weights = [math.exp(logit) for logit in logits.tolist()]
        probs = [weight / math.fsum(weights) for weight in weights]
        think, no_think = probs[tokens.think], probs[tokens.no_think]
        entropy = -math.fsum(p * math.log(p) for p in probs)
        expected = (think, no_think, 1 - think - no_think, entropy)
        assert [float(values[row]) for values in decision[:4]] == pytest.approx(expected, rel=1e-4)
        best = probs.index(max(probs))
        assert decision.picked[row] == {tokens.think: 0, tokens.no_think: 1}.get(best, OFF_MODE)
    assert torch.equal(decision.mode_probs, torch.stack([decision.think, decision.no_think], dim=1))


class Fixed(nn.Module):
    """A model whose first token depends on the prompt's last one alone."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits  # [V, V]

    def forward(self, input_ids: Tensor, logits_to_keep: int, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids[:, -logits_to_keep:]])


def test_read_decision_names_the_pick(tokens: ModeTokens) -> None:
    size = max(tokens.decision) + 10
    logits = torch.full((size, size), -math.inf)
    for last, first in enumerate((tokens.think, tokens.no_think, 0)):
        logits[last, first] = 0.0
    logits[3, list(tokens.decision)] = torch.tensor([math.log(0.3), math.log(0.7)])
    batch = torch.tensor([[0], [1], [2], [3]])
    decision: Decision = read_decision(Fixed(logits), batch, torch.ones_like(batch), tokens)
    assert decision.picked.tolist() == [0, 1, OFF_MODE, 1]
    assert decision.think.tolist() == pytest.approx([1, 0, 0, 0.3])
    assert decision.no_think.tolist() == pytest.approx([0, 1, 0, 0.7])
    assert decision.neither.tolist() == pytest.approx([0, 0, 1, 0], abs=1e-6)
    entropy = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    assert decision.entropy.tolist() == pytest.approx([0, 0, 0, entropy])


# --- Sampling -----------------------------------------------------------------


def test_every_prompt_is_sampled_in_both_modes(samples: pd.DataFrame) -> None:
    keys = list(samples[["prompt_id", "mode", "sample"]].itertuples(index=False, name=None))
    expected = {(row, mode, index) for row in range(NUM_PROMPTS) for mode in MODE_NAMES for index in range(SAMPLES)}
    assert set(keys) == expected
    assert len(keys) == len(expected)
    for mode, completion in zip(samples["mode"], samples["completion"], strict=True):
        assert completion.startswith(f"<{mode}>")
    assert samples.groupby("prompt_id")[["prob_think", "prob_no_think", "picked"]].nunique().eq(1).all(axis=None)


def test_responses_end_or_are_truncated(samples: pd.DataFrame) -> None:
    assert (samples["num_tokens"] <= MAX_NEW_TOKENS).all()
    assert (samples.loc[samples["truncated"], "num_tokens"] == MAX_NEW_TOKENS).all()
    assert set(samples["truncated"]) == {True, False}
    assert (samples["completion"].groupby([samples["prompt_id"], samples["mode"]]).nunique() > 1).any()


def test_limits_are_those_of_generate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, few: Dataset, sample: Callable[..., pd.DataFrame]
) -> None:
    limits: dict[str, Any] = {"max_think_tokens": 16, "max_no_think_tokens": 6, "think_budget": 5}
    found = sample(temperature=0, samples_per_mode=1, **limits).set_index(["mode", "prompt_id"])
    closed = 0
    for mode in MODE_NAMES:
        expected = generate(model, tokenizer, few["prompt"], mode=mode, temperature=0, max_new_tokens=24, **limits)
        part = found.loc[mode]
        assert part["completion"].tolist() == [generation.text for generation in expected]
        assert part["num_tokens"].tolist() == [generation.num_tokens for generation in expected]
        assert part["truncated"].tolist() == [generation.truncated for generation in expected]
        closed += sum(generation.reasoning_tokens == 5 for generation in expected)
    assert closed
    assert found.loc["think", "num_tokens"].max() == 16
    assert found.loc["no_think", "num_tokens"].max() == 6


def test_what_is_counted(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokens: ModeTokens,
    few: Dataset,
    sample: Callable[..., pd.DataFrame],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The decision token and the end token count; what comes after the end is padding."""
    four, eos, pad = tokenizer.convert_tokens_to_ids("4"), tokenizer.eos_token_id, tokenizer.pad_token_id
    generated = [[four, tokens.end_no_think, eos, pad], [eos, pad, pad, pad], [four, four, four, four]]
    seen = []

    def generate(input_ids: Tensor, attention_mask: Tensor, generation_config: Any, **kwargs: Any) -> Tensor:
        assert generation_config.max_new_tokens == 4
        seen.extend(zip(input_ids.tolist(), attention_mask.tolist(), strict=True))
        return torch.cat([input_ids, torch.tensor(generated * (len(input_ids) // 3))], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    samples = sample(max_new_tokens=5, batch_size=6)
    for mode, tag in zip(MODE_NAMES, ("<think>", "<no_think>"), strict=True):
        part = samples[samples["mode"] == mode]
        assert part["completion"].tolist() == [f"{tag} 4 </no_think>", tag, f"{tag} 4 4 4 4"] * NUM_PROMPTS
        assert part["num_tokens"].tolist() == [4, 2, 5] * NUM_PROMPTS
        assert part["truncated"].tolist() == [False, False, True] * NUM_PROMPTS
    no_think = samples[samples["mode"] == "no_think"]
    assert no_think["faults"].tolist() == [[], ["unclosed"], ["unclosed"]] * NUM_PROMPTS

    unpadded = [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in seen]
    ids = [prompt_ids(tokenizer, prompt) for prompt in few["prompt"]]
    assert sorted(unpadded) == sorted([*row, tag] for row in ids for tag in tokens.decision for _ in range(SAMPLES))
    assert all(mask == sorted(mask) for _, mask in seen)  # padded on the left


def test_the_seed_decides(sample: Callable[..., pd.DataFrame], samples: pd.DataFrame) -> None:
    torch.rand(1)
    pd.testing.assert_frame_equal(sample(), samples)
    other = sample(seed=1)
    assert not other["completion"].equals(samples["completion"])
    pd.testing.assert_series_equal(other["prob_think"], samples["prob_think"])


def test_the_decision_depends_on_the_prompt_alone(sample: Callable[..., pd.DataFrame], samples: pd.DataFrame) -> None:
    other = sample(batch_size=2, samples_per_mode=SAMPLES, temperature=0.5, max_new_tokens=4)
    for name in ("prob_think", "prob_no_think"):
        assert other[name].tolist() == pytest.approx(samples[name].tolist(), rel=1e-4)
    assert other["picked"].equals(samples["picked"])


def test_plain_text_prompts_are_conversations_already_rendered(
    tokenizer: PreTrainedTokenizerFast, few: Dataset, sample: Callable[..., pd.DataFrame], samples: pd.DataFrame
) -> None:
    texts = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) for prompt in few["prompt"]
    ]
    pd.testing.assert_frame_equal(sample(texts), samples)


def test_temperature_zero_is_greedy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, few: Dataset, sample: Callable[..., pd.DataFrame]
) -> None:
    samples = sample(temperature=0, max_new_tokens=6)
    assert samples.groupby(["prompt_id", "mode"])["completion"].nunique().eq(1).all()
    for row, prompt in enumerate(few["prompt"]):
        for mode in MODE_NAMES:
            response = [tokenizer.convert_tokens_to_ids(f"<{mode}>")]
            while len(response) < 6 and response[-1] != tokenizer.eos_token_id:
                with torch.no_grad():
                    logits = model(torch.tensor([prompt_ids(tokenizer, prompt) + response])).logits[0, -1]
                response.append(int(logits.argmax()))
            part = samples[(samples["prompt_id"] == row) & (samples["mode"] == mode)]
            assert part["completion"].iloc[0] == tokenizer.decode(response, skip_special_tokens=True)
            assert part["num_tokens"].iloc[0] == len(response)


def test_a_model_without_an_end_token(
    model: LlamaForCausalLM, sample: Callable[..., pd.DataFrame], samples: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer's is enough."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    pd.testing.assert_frame_equal(sample(), samples)


def test_the_models_own_generation_config_does_not_change_the_distribution(
    model: LlamaForCausalLM, sample: Callable[..., pd.DataFrame], samples: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"repetition_penalty": 3.0, "top_k": 1, "temperature": 0.1, "top_p": 0.1}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    pd.testing.assert_frame_equal(sample(), samples)


# --- Scoring ------------------------------------------------------------------


ANSWERS = ["4", "about 12", ""]  # the last one is a fault


@pytest.fixture(scope="module")
def answered(samples: pd.DataFrame) -> pd.DataFrame:
    """The samples with responses that are well formed but for a third of them."""
    answers = [ANSWERS[row % 3] for row in range(len(samples))]
    texts = [
        f"<think> so </think> {answer}" if mode == "think" else f"<no_think> {answer} </no_think>"
        for mode, answer in zip(samples["mode"], answers, strict=True)
    ]
    return samples.assign(completion=texts)


def by_length(completions: list, **kwargs: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def long_ones(completions: list, level: list[int], **kwargs: Any) -> list[float | None]:
    return [1000.0 if n >= 3 else None for n in level]


def test_scores_of_answer_parts_are_summed(few: Dataset, answered: pd.DataFrame) -> None:
    levels = [few[row]["level"] for row in answered["prompt_id"]]
    assert {level >= 3 for level in levels} == {True, False}
    scored = score_samples(answered, few, [by_length, long_ones])
    lengths = [len(ANSWERS[row % 3]) for row in range(len(answered))]
    expected = [(n + 1000 * (level >= 3)) * (n > 0) for n, level in zip(lengths, levels, strict=True)]
    assert scored["reward"].tolist() == expected
    alone = score_samples(answered, few, [long_ones])["reward"]
    assert alone.isna().tolist() == [level < 3 for level in levels]
    assert alone[alone.notna()].tolist() == [1000.0 * (n > 0) for n, x in zip(lengths, alone, strict=True) if x == x]
    assert "reward" not in answered.columns


def test_a_broken_format_scores_lowest(few: Dataset, answered: pd.DataFrame) -> None:
    """Also where the function would give it more, nothing at all, or others less than 0."""
    empty = [row % 3 == 2 for row in range(len(answered))]

    def shorter_is_better(completions: list, **kwargs: Any) -> list[float]:
        return [9.0 - len(completion[0]["content"]) for completion in completions]

    def refuses_nothing(completions: list, **kwargs: Any) -> list[float | None]:
        return [-5.0 if completion[0]["content"] == "4" else 3.0 if completion[0]["content"] else None
                for completion in completions]  # fmt: skip

    scored = score_samples(answered, few, [shorter_is_better])["reward"]
    assert scored[empty].tolist() == [0.0] * sum(empty)
    assert scored.max() == 8.0
    scored = score_samples(answered, few, [refuses_nothing])["reward"]
    assert scored[empty].tolist() == [-5.0] * sum(empty)


def test_the_score_is_that_of_training(few: Dataset, answered: pd.DataFrame) -> None:
    """Weights and what is not scored, row by row."""
    weights = [0.5, -2.0]
    scored = score_samples(answered, few, [by_length, long_ones], weights)["reward"]
    for row, reward in enumerate(scored):
        length = len(ANSWERS[row % 3])
        bonus = 1000 if few[answered["prompt_id"][row]]["level"] >= 3 else 0
        assert reward == 0.5 * length - 2.0 * bonus
    only = score_samples(answered, few, [long_ones], [3.0])["reward"]
    assert only.isna().tolist() == [bool(few[prompt]["level"] < 3) for prompt in answered["prompt_id"]]
    assert set(only.dropna()) == {0.0, 3000.0}
    with pytest.raises(UserError, match="reward_weights has 1 entries for 2 reward functions"):
        score_samples(answered, few, [by_length, long_ones], [1.0])


def test_an_infinite_score_names_its_function(few: Dataset, answered: pd.DataFrame) -> None:
    def endless(completions: list, **kwargs: Any) -> list[float]:
        return [math.inf] * len(completions)

    with pytest.raises(UserError, match="The reward function 'endless' returned inf"):
        score_samples(answered, few, [by_length, endless])


async def later(completions: list, **kwargs: Any) -> list[float]:
    return [2.0] * len(completions)


def test_asynchronous_functions_score_too(few: Dataset, answered: pd.DataFrame) -> None:
    assert set(score_samples(answered, few, [later])["reward"]) == {0.0, 2.0}


def test_trls_own_rewards_score_the_answer(few: Dataset, answered: pd.DataFrame) -> None:
    from trl.rewards import accuracy_reward

    solved = few.map(lambda row: {"solution": "$4$"})
    texts = answered["completion"].str.replace(" 4", r" \boxed{4}", regex=False)
    right = texts.str.replace(r"\boxed{4}", "", regex=False) != texts
    swapped = texts.where(right, texts.str.replace("so", r"\boxed{4}", regex=False))  # right in the reasoning alone
    scored = score_samples(answered.assign(completion=swapped), solved, [accuracy_reward])["reward"]
    assert scored.fillna(0.0).tolist() == right.astype(float).tolist()


def test_reward_functions_get_what_they_get_in_training(few: Dataset, samples: pd.DataFrame) -> None:
    shuffled = samples.sample(frac=1, random_state=0)
    seen: dict[str, Any] = {}

    def spy(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0] * len(kwargs["completions"])

    score_samples(shuffled, few, [spy])
    assert set(seen) == {"prompts", "completions", "answer", "level", "domain", "response"}
    responses = [split_response(text) for text in shuffled["completion"]]
    assert seen["response"] == responses
    assert seen["prompts"] == [few[row]["prompt"] for row in shuffled["prompt_id"]]
    assert seen["answer"] == [few[row]["answer"] for row in shuffled["prompt_id"]]
    assert seen["completions"] == [[{"role": "assistant", "content": part.answer}] for part in responses]

    text_prompts = few.map(lambda row: {"prompt": row["prompt"][0]["content"]})
    score_samples(shuffled, text_prompts, [spy])
    assert seen["prompts"] == [few[row]["prompt"][0]["content"] for row in shuffled["prompt_id"]]
    assert seen["completions"] == [part.answer for part in responses]


def test_a_wrong_number_of_rewards_is_named(few: Dataset, samples: pd.DataFrame) -> None:
    def forgetful(completions: list, **kwargs: Any) -> list[float]:
        return [0.0] * (len(completions) - 1)

    count = len(samples)
    with pytest.raises(ValueError, match=rf"'forgetful' returned {count - 1} rewards for {count} completions"):
        score_samples(samples, few, [by_length, forgetful])


def test_scoring_decodes_no_row_once_per_sample() -> None:
    num_prompts, num_samples = 200, 32
    decoded = 0

    def count(batch: dict[str, list]) -> dict[str, list]:
        nonlocal decoded
        decoded += len(next(iter(batch.values())))
        return batch

    dataset = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": str(i)}], "answer": str(i), "level": i % 6}
            for i in range(num_prompts)
        ]
    )
    rows = [row for row in range(num_prompts) for _ in range(num_samples)]
    samples = pd.DataFrame({"prompt_id": rows, "completion": "<no_think> 4 </no_think>"})
    score_samples(samples, dataset.with_transform(count), [by_length])
    assert num_prompts <= decoded <= 10 * num_prompts < num_prompts * num_samples


# --- The report ---------------------------------------------------------------


def scored_samples() -> pd.DataFrame:
    """Two prompts, two samples in each mode, and a third prompt that has no reference answer."""
    prompts = [(0, 0.7, 0.2, 0), (1, 0.1, 0.9, 1), (2, 0.3, 0.3, -1)]
    responses = {
        (0, "think"): [(1.0, 10, False, []), (1.0, 14, False, [])],
        (0, "no_think"): [(0.0, 3, False, ["unclosed", "nested"]), (1.0, 5, False, [])],
        (1, "think"): [(1.0, 20, True, ["unclosed"]), (0.0, 20, True, ["unclosed"])],
        (1, "no_think"): [(1.0, 4, False, []), (0.0, 4, False, [])],
        (2, "think"): [(math.nan, 7, False, []), (math.nan, 9, False, [])],
        (2, "no_think"): [(math.nan, 2, False, []), (math.nan, 4, True, ["unclosed"])],
    }
    return pd.DataFrame.from_records(
        {
            "prompt_id": row,
            "mode": mode,
            "sample": index,
            "completion": "",
            "num_tokens": num_tokens,
            "truncated": truncated,
            "faults": faults,
            "prob_think": prob_think,
            "prob_no_think": prob_no_think,
            "picked": picked,
            "reward": reward,
        }
        for row, prob_think, prob_no_think, picked in prompts
        for mode in MODE_NAMES
        for index, (reward, num_tokens, truncated, faults) in enumerate(responses[row, mode])
    )


def test_report_by_hand() -> None:
    report = report_on(scored_samples(), levels=[3, 1, 3])
    assert report["num_prompts"] == 3
    assert report["samples_per_mode"] == 2
    assert report["margin"] == 0.0
    assert report["hybrid_accuracy"] == 1.0  # think is better at prompt 0; a tie at prompt 1; prompt 2 does not count
    assert report["thinking_ratio"] == pytest.approx((0.7 + 0.1 + 0.3) / 3)
    assert report["off_mode_mass"] == pytest.approx((0.1 + 0.0 + 0.4) / 3)
    assert report["accuracy"] == pytest.approx(
        {
            "auto": (1.0 + 0.5) / 2,
            "sampled": (0.7 * 1.0 + 0.2 * 0.5 + 0.1 * 0.5 + 0.9 * 0.5) / 2,
            "think": (1.0 + 0.5) / 2,
            "no_think": (0.5 + 0.5) / 2,
            "oracle": (1.0 + 0.5) / 2,
        }
    )
    assert report["mean_tokens"] == pytest.approx(
        {
            "auto": (12 + 4 + 8) / 3,
            "sampled": (0.7 * 12 + 0.2 * 4 + 0.1 * 12 + 0.1 * 20 + 0.9 * 4 + 0.3 * 8 + 0.3 * 3 + 0.4 * 8) / 3,
            "think": (12 + 20 + 8) / 3,
            "no_think": (4 + 4 + 3) / 3,
            "oracle": (12 + 4) / 2,
        }
    )
    assert report["format_faults"] == pytest.approx({"think": 2 / 6, "no_think": 2 / 6})
    assert report["truncated"] == pytest.approx({"think": 2 / 6, "no_think": 1 / 6})
    none = dict.fromkeys(Fault, 0.0)
    assert report["faults"]["think"] == pytest.approx(none | {"unclosed": 2 / 6})
    assert report["faults"]["no_think"] == pytest.approx(none | {"unclosed": 2 / 6, "nested": 1 / 6})
    easy, hard = report["by_level"]
    assert (easy["level"], easy["num_prompts"], easy["hybrid_accuracy"], easy["thinking_ratio"]) == (1, 1, 1.0, 0.1)
    assert (hard["level"], hard["num_prompts"], hard["hybrid_accuracy"], hard["accuracy"]["auto"]) == (3, 2, 1.0, 1.0)


def test_the_margin_counts() -> None:
    report = report_on(scored_samples(), margin=0.6)
    assert report["margin"] == 0.6
    assert report["hybrid_accuracy"] == 0.5  # thinking no longer gains enough at prompt 0
    assert report["mean_tokens"]["oracle"] == 4.0
    assert report["by_level"] == []


def test_a_decision_bias_changes_the_models_own_choice_and_nothing_else() -> None:
    own, biased = report_on(scored_samples()), report_on(scored_samples(), decision_bias=3.0)
    assert (own["decision_bias"], biased["decision_bias"]) == (0.0, 3.0)
    # log-odds of thinking: 1.25, −2.2 and 0; neither has 0.4 against 0.3 at the last prompt
    assert biased["mean_tokens"]["auto"] == (12 + 20 + 8) / 3
    assert biased["hybrid_accuracy"] == 0.5
    assert biased["thinking_ratio"] > own["thinking_ratio"]
    for key in ("truncated", "format_faults", "num_prompts", "by_level"):
        assert biased[key] == own[key]
    for policy in ("think", "no_think", "oracle"):
        assert biased["accuracy"][policy] == own["accuracy"][policy]


def test_a_sweep_adds_the_curve_to_the_report() -> None:
    samples = scored_samples()
    report = report_on(samples, margin=0.6, decision_bias="sweep")
    curve = report.pop("decision_bias_curve")
    assert repr(report) == repr(report_on(samples, margin=0.6))
    for entry in curve:
        alone = report_on(samples, margin=0.6, decision_bias=entry["bias"])
        for metric in ("accuracy", "mean_tokens"):
            for policy in ("auto", "sampled"):
                assert entry[metric][policy] == alone[metric][policy]
        assert entry["hybrid_accuracy"] == alone["hybrid_accuracy"]
        assert entry["thinking_ratio"]["sampled"] == alone["thinking_ratio"]
    assert [curve[end]["mean_tokens"]["auto"] for end in (0, -1)] == [
        report["mean_tokens"][mode] for mode in ("no_think", "think")
    ]


def test_levels_are_looked_up_by_prompt() -> None:
    samples = scored_samples().query("prompt_id != 1")
    assert [group["level"] for group in report_on(samples, levels=["a", "b", "c"])["by_level"]] == ["a", "c"]


def test_subjects_and_domains_are_groups_as_levels_are() -> None:
    report = report_on(scored_samples(), levels=[1, 2, 1], subjects=["b", "a", "b"], domains=[None, "x", None])
    assert [(group["subject"], group["num_prompts"]) for group in report["by_subject"]] == [("a", 1), ("b", 2)]
    assert [(group["domain"], group["num_prompts"]) for group in report["by_domain"]] == [("x", 1)]
    by_level = [{key: value for key, value in group.items() if key != "level"} for group in report["by_level"]]
    by_subject = [{key: value for key, value in group.items() if key != "subject"} for group in report["by_subject"]]
    assert repr(by_level) == repr(by_subject[::-1])
    plain = report_on(scored_samples())
    assert (plain["by_subject"], plain["by_domain"]) == ([], [])


def test_cost_of_1000_queries() -> None:
    report = report_on(scored_samples(), price_per_million_tokens=0.6)
    # 8 tokens per query of the model's own choice: 8,000 tokens at 0.6 per million
    assert report["mean_tokens"]["auto"] == 8.0
    assert report["cost"] == pytest.approx({name: n * 0.6e-3 for name, n in report["mean_tokens"].items()})
    assert report["cost"]["auto"] == pytest.approx(0.0048)
    assert "cost" not in report_on(scored_samples())
    assert set(report_on(scored_samples(), price_per_million_tokens=0)["cost"].values()) == {0.0}


def test_missing_samples_are_refused() -> None:
    """Also where the number of rows fits: one too few of one prompt, one too many of another."""
    samples = scored_samples()
    extra = samples.iloc[[0]].assign(sample=2)
    for wrong, found in (
        (pd.concat([samples.drop(index=11), extra]), "prompt 2 has 1 in mode no_think, prompt 0 has 3 in mode think"),
        (samples[samples["mode"] == "think"], "prompt 0 has 0 in mode no_think, prompt 0 has 2 in mode think"),
        (samples.iloc[:0], "there are none"),
    ):
        with pytest.raises(ValueError, match=f"every prompt needs as many samples .*; {found}. Keep all rows"):
            report_on(wrong)


def test_the_order_of_rows_does_not_matter() -> None:
    samples, levels = scored_samples(), ["hard", "easy", "hard"]
    expected = repr(report_on(samples, levels=levels))
    for seed in range(5):
        assert repr(report_on(samples.sample(frac=1, random_state=seed), levels=levels)) == expected


# --- The command --------------------------------------------------------------


def read_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def nan_as_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: nan_as_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_as_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


@pytest.fixture
def evaluate(model_dir: str, prompts: Dataset, tmp_path: Path) -> Callable[..., Path]:
    """Run the command; a field of None is left out."""
    prompts.to_parquet(tmp_path / "eval.parquet")

    def run(**changes: Any) -> Path:
        fields = {
            "model": model_dir,
            "data": tmp_path / "eval.parquet",
            "output_dir": tmp_path / "eval",
            "num_prompts": 8,
            "samples_per_mode": 2,
            "max_new_tokens": 8,
            "dtype": "float32",
        }
        fields |= changes
        main([word for key, value in fields.items() for word in (f"--{key}", str(value))])
        return Path(fields["output_dir"])

    return run


def test_evaluate_writes_a_report_that_its_samples_reproduce(
    evaluate: Callable[..., Path], model_dir: str, prompts: Dataset, capsys: pytest.CaptureFixture
) -> None:
    output_dir = evaluate(margin=0.2)
    report = read_json(output_dir / "report.json")
    samples = pd.read_parquet(output_dir / "samples.parquet")
    assert len(samples) == 8 * 2 * 2
    assert set(samples["reward"]) <= {0.0, 1.0}
    assert {"model": model_dir, "margin": 0.2, "num_prompts": 8, "samples_per_mode": 2}.items() <= report.items()
    assert [group["level"] for group in report["by_level"]] == sorted(set(prompts["level"][:8]))
    recomputed = report_on(samples, margin=0.2, levels=prompts["level"], domains=prompts["domain"])
    assert nan_as_none(recomputed) == {key: report[key] for key in report.keys() - {"model", "dataset", "settings"}}
    assert report["settings"] == {
        "split": "train",
        "num_prompts": 8,
        "samples_per_mode": 2,
        "temperature": 0.6,
        "top_p": 0.95,
        "max_new_tokens": 8,
        "max_think_tokens": None,
        "max_no_think_tokens": None,
        "think_budget": None,
        "seed": 0,
        "backend": "transformers",
    }
    assert f"thinking ratio {report['thinking_ratio']:.3f}" in capsys.readouterr().out


def test_evaluate_with_a_decision_bias(evaluate: Callable[..., Path], prompts: Dataset, tmp_path: Path) -> None:
    reports = {bias: read_json(evaluate(decision_bias=bias) / "report.json") for bias in ("sweep", "-2.5", "0")}
    samples = pd.read_parquet(tmp_path / "eval" / "samples.parquet")
    curve = reports["sweep"].pop("decision_bias_curve")
    assert reports["sweep"] == reports["0"]
    assert reports["-2.5"]["decision_bias"] == -2.5
    levels = prompts["level"]
    assert reports["-2.5"]["mean_tokens"] == report_on(samples, 0.0, levels, -2.5)["mean_tokens"]
    assert nan_as_none(report_on(samples, 0.0, levels, "sweep")["decision_bias_curve"]) == curve

    recipe = tmp_path / "recipe.yaml"
    for value, expected in (("sweep", "sweep"), ("1", 1.0), ("-0.5", -0.5)):
        recipe.write_text(f"decision_bias: {value}\nmodel: m\ndata: d\noutput_dir: o\n")
        (args,) = RecipeParser(EvaluateArguments, prog="evaluate").parse_recipe(["--config", str(recipe)])
        assert args.decision_bias == expected


@pytest.mark.processes
def test_the_example_looks_the_cheapest_bias_up(evaluate: Callable[..., Path]) -> None:
    example = Path(__file__).parents[1] / "examples" / "decision_bias_sweep.py"

    def look_up(folder: Path, accuracy: float) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(example), str(folder), "--accuracy", str(accuracy)]
        return subprocess.run(command, capture_output=True, text=True)

    folder = evaluate(decision_bias="sweep")
    curve = read_json(folder / "report.json")["decision_bias_curve"]
    cheapest = min(point["mean_tokens"]["auto"] for point in curve)
    assert look_up(folder, 0).stdout.splitlines()[-1].endswith(f" {cheapest:.1f}")
    assert "no bias reaches an accuracy of 1.5" in look_up(folder, 1.5).stderr
    assert "evaluate with --decision_bias sweep" in look_up(evaluate(), 0).stderr


def test_evaluate_again_gives_the_same_files(evaluate: Callable[..., Path], tmp_path: Path) -> None:
    names = ("report.json", "samples.parquet", "examples.json")
    first, second = ([(evaluate(output_dir=tmp_path / f"{n}") / name).read_bytes() for name in names] for n in "ab")
    assert first == second


def test_evaluate_with_own_reward_without_levels(
    evaluate: Callable[..., Path], prompts: Dataset, tmp_path: Path
) -> None:
    """A function that scores nothing: null in the report, not NaN, which is not JSON."""
    (tmp_path / "mine.py").write_text("def unscored(completions, **kwargs):\n    return [None] * len(completions)\n")
    prompts.remove_columns("level").to_parquet(tmp_path / "plain.parquet")
    output_dir = evaluate(data=tmp_path / "plain.parquet", reward_funcs=f"{tmp_path / 'mine.py'}:unscored")
    report = read_json(output_dir / "report.json")
    assert report["hybrid_accuracy"] is None
    assert set(report["accuracy"].values()) == {None}
    assert report["by_level"] == []
    assert pd.read_parquet(output_dir / "samples.parquet")["reward"].isna().all()


def test_evaluate_weighs_rewards_as_training_does(evaluate: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def one(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    words = ["--model", "m", "--data", "d", "--output_dir", str(tmp_path / "eval"), "--reward_weights", "2"]
    with pytest.raises(UserError, match="reward_weights has 1 entries for 2 reward functions"):
        main([*words, "--reward_funcs", *[f"{tmp_path}/mine.py:one"] * 2])
    assert not (tmp_path / "eval").exists()
    output_dir = evaluate(reward_funcs=f"{tmp_path}/mine.py:one", reward_weights=3)
    samples = pd.read_parquet(output_dir / "samples.parquet")
    assert samples["reward"].tolist() == [0.0 if len(faults) else 3.0 for faults in samples["faults"]]
    rescored = evaluate(reward_funcs=f"{tmp_path}/mine.py:one", reward_weights=5, rescore="true")
    assert set(pd.read_parquet(rescored / "samples.parquet")["reward"]) <= {0.0, 5.0}


def test_a_model_without_tags_is_refused(
    evaluate: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "User:": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    plain.chat_template = tokenizer.chat_template
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"model=.*is no hybrid model: The tag <think> is not a token.*add_mode_tokens.*hft"
    ):
        evaluate(model=tmp_path / "plain")


def test_missing_data_is_refused(evaluate: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data=.*missing\.parquet.*there is no such file"):
        evaluate(data=tmp_path / "missing.parquet")


def test_empty_data_is_refused(evaluate: Callable[..., Path], prompts: Dataset, tmp_path: Path) -> None:
    prompts.select([]).to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "empty.jsonl").touch()
    for name in ("empty.parquet", "empty.jsonl"):
        with pytest.raises(ValueError, match=rf"data=.*{name}' has no rows"):
            evaluate(data=tmp_path / name)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("margin", -0.1, "margin must be a finite number of at least 0; got -0.1"),
        ("margin", "inf", "margin must be a finite number of at least 0; got inf"),
        ("decision_bias", "inf", "decision_bias must be a finite number or sweep; got inf"),
        ("decision_bias", "all", "decision_bias must be a finite number or sweep; got 'all'"),
        ("price_per_million_tokens", -1, "price_per_million_tokens must be a finite number of at least 0; got -1.0"),
        ("price_per_million_tokens", "nan", "price_per_million_tokens must be a finite number of at least 0; got nan"),
        ("data_dir", "copies", "data_dir='copies' holds copies of benchmarks, but data="),
        ("samples_per_mode", 0, "samples_per_mode must be at least 1; got 0"),
        ("batch_size", 0, "batch_size must be at least 1; got 0"),
        ("max_new_tokens", 1, "max_new_tokens must be at least 2"),
        ("num_prompts", 0, "num_prompts must be at least 1; got 0"),
        ("temperature", -1, "temperature must be a finite number of at least 0, which is greedy; got -1.0"),
        ("temperature", "inf", "temperature must be a finite number of at least 0, which is greedy; got inf"),
        ("top_p", 0, "top_p must lie in"),
        ("backend", "sglang", "backend must be one of transformers, vllm; got 'sglang'"),
        ("tensor_parallel_size", 0, "tensor_parallel_size must be at least 1; got 0"),
        ("tensor_parallel_size", 2, "tensor_parallel_size=2 needs vLLM, but backend is transformers. Set backend to"),
        ("gpu_memory_utilization", 0, "gpu_memory_utilization must lie in (0, 1]; got 0"),
    ],
)
def test_impossible_settings_are_refused(
    evaluate: Callable[..., Path], field: str, value: Any, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        evaluate(**{field: value})
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_reward_model_scores_rows_without_an_answer(
    evaluate: Callable[..., Path], prompts: Dataset, reward_model_dir: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """The others are the rule's."""
    sample = transformers_backend.sample_both_modes

    def sample_well(*args: Any, **kwargs: Any) -> pd.DataFrame:
        samples = sample(*args, **kwargs)
        responses = {"think": "<think> 4 </think> ", "no_think": "<no_think> "}
        texts = [
            f"{responses[mode]}{'4' if index == 0 else '4 5'}{'' if mode == 'think' else ' </no_think>'}"
            for mode, index in zip(samples["mode"], samples["sample"], strict=True)
        ]
        return samples.assign(completion=texts)

    monkeypatch.setattr(transformers_backend, "sample_both_modes", sample_well)
    references = ["4" if row % 2 else None for row in range(len(prompts))]
    mixed = prompts.remove_columns("answer").add_column("answer", references)
    mixed.to_parquet(tmp_path / "mixed.parquet")
    with pytest.raises(ValueError, match=r"data: 4 of 8 rows have no `answer`.*Name a reward_model"):
        evaluate(data=tmp_path / "mixed.parquet")
    output_dir = evaluate(data=tmp_path / "mixed.parquet", reward_model=reward_model_dir)
    samples = pd.read_parquet(output_dir / "samples.parquet")
    scorer = RewardModel(reward_model_dir)
    for row in samples.itertuples():
        part = split_response(row.completion).answer
        if row.prompt_id % 2:
            assert row.reward == float(part == "4")
        else:
            expected = torch.sigmoid(scorer.scores([mixed[row.prompt_id]["prompt"]], [part])).item()
            assert row.reward == pytest.approx(expected, abs=1e-5)
    assert samples["reward"].nunique() > 4


def test_data_without_answers_is_refused(evaluate: Callable[..., Path], prompts: Dataset, tmp_path: Path) -> None:
    prompts.remove_columns("answer").to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match=r"data: 8 of 8 rows have no `answer`.*Name a reward_model"):
        evaluate(data=tmp_path / "bare.parquet")
    assert not (tmp_path / "eval").exists()


def test_levels_of_mixed_types(evaluate: Callable[..., Path], prompts: Dataset, tmp_path: Path) -> None:
    """As JSON lines may hold them."""
    rows = [
        {"prompt": prompt, "answer": "4", "level": level, "domain": "maths"}
        for prompt, level in zip(prompts["prompt"], ["2", 2, 2.0, None, "hard", 1.5, "x 2", 10], strict=False)
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    report = read_json(evaluate(data=path) / "report.json")
    found = [(group["level"], group["num_prompts"]) for group in report["by_level"]]
    assert found == [(1.5, 1), (2, 3), (10, 1), ("hard", 1), ("x 2", 1)]
    assert [(group["domain"], group["num_prompts"]) for group in report["by_domain"]] == [("maths", 8)]
    path.write_text("".join(f"{json.dumps(row | {'level': [2]})}\n" for row in rows))
    with pytest.raises(ValueError, match=r"level: \[2\] is list; to group by it, the column must hold finite numbers"):
        evaluate(data=path, output_dir=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_reward_model_is_refused(evaluate: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"'some/reward-model' is a reward model"):
        evaluate(reward_funcs="some/reward-model")


def test_a_missing_vllm_is_named_before_anything_is_loaded(
    evaluate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm_support, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"backend=vllm needs vLLM, which is not installed.*without a GPU vLLM"):
        evaluate(backend="vllm", data=tmp_path / "missing.parquet")
