"""The rules that `benchmarks/rollout_tokens.py` compares with HGPO, against cases worked out by hand."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from settings import ON_CPU

from hgpo_trl import HGPOConfig
from hgpo_trl.modes import Mode
from hgpo_trl.training.advantages import assign_rewards

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import mode_rules
import rollout_tokens
from mode_rules import REFERENCE, RULES, AdaptThink, Counting, CountingHGPO, Thinkless

THINK_RIGHT = "<think> 1 + 1 = 2 </think> 2"
THINK_WRONG = "<think> 1 + 1 = 3 </think> 3"
QUICK_RIGHT = "<no_think> 2 </no_think>"
QUICK_WRONG = "<no_think> 3 </no_think>"
NO_MODE = "2"
UNCLOSED = "<no_think> 2"
RESPONSES = [THINK_RIGHT, THINK_WRONG, QUICK_RIGHT, QUICK_WRONG, NO_MODE, UNCLOSED]


# --- rewards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("grpo", [1.0, 0.0, 1.2, 0.2, 0.0, 0.2]),
        ("grpo_plain", [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]),
        ("thinkless", [0.6, -1.0, 1.0, -1.0, -1.0, -1.0]),  # γ = 2δ
    ],
)
@pytest.mark.parametrize("conversational", [True, False])
def test_rewards_of_whole_responses(rule: str, expected: list[float], conversational: bool) -> None:
    completions: list[Any] = [[{"role": "assistant", "content": t}] for t in RESPONSES] if conversational else RESPONSES
    rewards = RULES[rule].reward_func(0.2)(completions=completions, answer=["2"] * len(RESPONSES), prompts=None)
    assert rewards == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["grpo", "thinkless"])
@pytest.mark.parametrize("quick", [0.0, 0.7, 0.79, 0.81, 1.0])
def test_the_preference_between_the_modes_is_that_of_hgpo(rule: str, quick: float) -> None:
    """With thinking always right, in expectation: no think where its accuracy is at least 1 − δ."""
    entry = RULES[rule]

    def mean(mode: Mode, accuracy: float) -> float:
        right, wrong = (entry.reward(correct, mode, entry.coefficient * 0.2) for correct in (1.0, 0.0))
        return accuracy * right + (1 - accuracy) * wrong

    r_inter, _ = assign_rewards(torch.tensor([[[1.0], [quick]]]), margin=0.2)
    assert (mean(Mode.NO_THINK, quick) >= mean(Mode.THINK, 1.0)) == bool(r_inter[0, 1, 0])


# --- advantages ---------------------------------------------------------------------------------------------------


def test_degrpo_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, -1.0, 0.6, 0.6])
    lengths = torch.tensor([3, 2, 1, 5])
    found = mode_rules.degrpo_advantages(rewards, lengths, group=2, control_weight=0.25)
    # query 1: mean 0, so 1 and -1; T = 2 and 1. Query 2: no spread, no signal.
    expected = torch.tensor([[0.25, 0.5, 0.5, 0, 0], [-0.25, -1, 0, 0, 0], [0.0] * 5, [0.0] * 5])
    torch.testing.assert_close(found, expected)


def test_adaptthink_advantages_by_hand() -> None:
    found = mode_rules.adaptthink_advantages(
        rewards=torch.tensor([1.0, 0.0, 1.0, 0.0]),
        no_think=torch.tensor([False, False, True, True]),
        reference=torch.tensor([0.75] * 4),
        margin=0.2,
    )
    torch.testing.assert_close(found, torch.tensor([0.25, -0.75, 0.45, -0.55]))


def test_forced_log_probs_changes_the_first_token_alone() -> None:
    old = torch.tensor([[-3.0, -0.1], [-0.2, -0.4]])
    found = mode_rules.forced_log_probs(old)
    torch.testing.assert_close(found, torch.tensor([[math.log(0.5), -0.1], [math.log(0.5), -0.4]]))
    assert old[0, 0] == -3.0


# --- in the trainer -----------------------------------------------------------------------------------------------


def build(rule: str, model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path, **fields: Any) -> Any:
    config = HGPOConfig(
        **ON_CPU
        | {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "num_generations": 8,
            "max_completion_length": 12,
            "beta": 0.0,
            "max_steps": 1,
            "learning_rate": 1e-3,
            **RULES[rule].fields,
            **fields,
        }
    )
    return RULES[rule].trainer(
        model=model_dir,
        reward_funcs=[RULES[rule].reward_func(config.margin)],
        args=config,
        train_dataset=prompts,
        processing_class=tokenizer,
    )


def rollout(trainer: Any, prompts: Dataset) -> dict[str, Any]:
    trainer.model.train()
    rows = [{**prompts[query]} for query in range(2) for _ in range(8)]
    return trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize("rule", ["grpo", "thinkless"])
def test_free_rules_count_every_token(
    rule: str, model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = build(rule, model_dir, prompts, tokenizer, tmp_path)
    output = rollout(trainer, prompts)
    assert trainer.rollout_tokens == int(output["completion_mask"].sum())


@pytest.mark.parametrize("rule", ["hgpo", "adaptthink"])
def test_forced_tokens_are_not_counted(
    rule: str, model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    prompts = prompts.add_column(REFERENCE, [0.5] * len(prompts))
    trainer = build(rule, model_dir, prompts, tokenizer, tmp_path)
    output = rollout(trainer, prompts)
    assert trainer.rollout_tokens == int(output["completion_mask"].sum()) - 16
    assert trainer.rollout_tokens == sum(trainer._metrics["train"]["hgpo/rollout_tokens"])


def test_lazy_thinking_counts_what_it_samples(
    model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hgpo_trl.training.lazy.decided_without_think", lambda rewards, margin: torch.tensor([True, False])
    )
    trainer = build("lazy", model_dir, prompts, tokenizer, tmp_path)
    output = rollout(trainer, prompts)
    lengths = output["completion_mask"].sum(dim=1)
    assert lengths[:4].tolist() == [1] * 4  # the think responses of the decided query: forced tokens, not counted
    assert trainer.rollout_tokens == int(lengths.sum()) - 16


def loss_of(trainer: Any, output: dict[str, Any]) -> torch.Tensor:
    trainer.current_gradient_accumulation_steps = 1
    return trainer._compute_loss(trainer.model, output)


def log_probs_of(trainer: Any, output: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    width = output["completion_ids"].shape[1]
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
    return logits.log_softmax(dim=-1).gather(2, output["completion_ids"][:, :, None])[:, :, 0]


def test_thinkless_loss_is_degrpo(model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    """The gradient is that of α·mean(A·ratio of the control token) + mean over responses of the rest's mean."""
    trainer = build("thinkless", model_dir, prompts, tokenizer, tmp_path)
    output = rollout(trainer, prompts)
    rewards = torch.linspace(-1, 1, 16)
    trainer.whole_rewards = rewards[:, None]
    lengths = output["completion_mask"].sum(dim=1)
    output["advantages"] = (
        mode_rules.degrpo_advantages(rewards, lengths, 8, Thinkless.control_weight) * trainer.max_completion_length
    )
    loss_of(trainer, output).backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    log_probs = log_probs_of(trainer, output)
    ratio = (log_probs - log_probs.detach()).exp()
    advantage = (rewards.view(2, 8) - rewards.view(2, 8).mean(dim=1, keepdim=True)).flatten()
    mask = output["completion_mask"].float()
    rest = (ratio * mask)[:, 1:].sum(dim=1) / (lengths - 1).clamp(min=1)
    (-(advantage * (1e-3 * ratio[:, 0] + rest)).mean()).backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_thinkless_trainer_takes_its_own_rewards(
    model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = torch.linspace(-1, 1, 16)[:, None]
    monkeypatch.setattr(Counting.__mro__[1], "_calculate_rewards", lambda self, *args: rewards)
    trainer = build("thinkless_scaled", model_dir, prompts, tokenizer, tmp_path)
    output = rollout(trainer, prompts)
    lengths = output["completion_mask"].sum(dim=1)
    torch.testing.assert_close(
        output["advantages"], 12 * mode_rules.degrpo_advantages(rewards[:, 0], lengths, 8, control_weight=0.1)
    )


def test_adaptthink_loss_is_clipped_with_the_ratio_to_half(
    model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    """-mean of min(r·A, clip(r)·A), r the exp of the mean log-ratio to a policy that draws either mode with 0.5."""
    prompts = prompts.add_column(REFERENCE, [0.5] * len(prompts))
    trainer = build("adaptthink", model_dir, prompts, tokenizer, tmp_path)
    output = rollout(trainer, prompts)
    log_probs, mask = log_probs_of(trainer, output), output["completion_mask"].float()
    torch.testing.assert_close(output["old_per_token_logps"][:, 0], torch.full((16,), 0.5).log())
    torch.testing.assert_close(
        (output["old_per_token_logps"] * mask)[:, 1:], (log_probs * mask)[:, 1:].detach(), atol=1e-5, rtol=1e-4
    )
    log_ratio = (log_probs[:, 0] - math.log(0.5)) / mask.sum(dim=1)
    ratio, advantage = log_ratio.exp(), output["advantages"]
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    torch.testing.assert_close(loss_of(trainer, output), expected, atol=1e-5, rtol=1e-4)
    no_think = output["completion_ids"][:, 0] == trainer.mode_tokens.no_think
    # an untrained model is never right: R = 0
    torch.testing.assert_close(advantage, 0.2 * no_think - 0.5)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains(rule: str, model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    if issubclass(RULES[rule].trainer, AdaptThink):
        prompts = prompts.add_column(REFERENCE, [0.5] * len(prompts))
    trainer = build(rule, model_dir, prompts, tokenizer, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.rollout_tokens > 0
    assert issubclass(RULES[rule].trainer, CountingHGPO | AdaptThink) == (
        "hgpo/rollout_tokens" in str(trainer.state.log_history)
    )


# --- results ------------------------------------------------------------------------------------------------------


def curve(*accuracies: float) -> list[dict[str, float]]:
    return [
        {"step": 10 * i, "tokens": 1000 * i, "seconds": 2 * i, "cpu_seconds": i, "hybrid_accuracy": accuracy}
        for i, accuracy in enumerate(accuracies)
    ]


def test_reached_is_interpolated_and_confirmed() -> None:
    assert rollout_tokens.reached(curve(0.3, 0.8, 1.0, 0.95)) == pytest.approx(
        {"step": 15, "tokens": 1500, "seconds": 3, "cpu_seconds": 1.5}
    )
    once = rollout_tokens.reached(curve(0.3, 0.95, 0.85, 0.9, 0.9))
    assert once is not None
    assert once["step"] == pytest.approx(30)


@pytest.mark.parametrize("accuracies", [(0.3, 0.8), (0.3, 0.95, 0.8, 0.95), (0.3, 0.95)])
def test_not_reached(accuracies: tuple[float, ...]) -> None:
    assert rollout_tokens.reached(curve(*accuracies)) is None


def test_reached_from_the_start() -> None:
    found = rollout_tokens.reached(curve(0.95, 0.95))
    assert found is not None
    assert found["tokens"] == 0


def result(rule: str, seed: int, *accuracies: float) -> dict[str, Any]:
    final = {
        **dict.fromkeys(("hybrid_accuracy", "accuracy_auto", "accuracy_sampled"), accuracies[-1]),
        **dict.fromkeys(("thinking_ratio", "off_mode_mass"), 0.25),
    }
    points = curve(*accuracies)
    return {
        "rule": rule, "seed": seed, "curve": points, "final": final, "tokens": points[-1]["tokens"],
        "reference_tokens": 0, "settings": {"max_steps": None},
    }  # fmt: skip


def test_table_and_figure(tmp_path: Path) -> None:
    results = [
        result("hgpo", 0, 0.3, 0.7, 0.9, 0.95),
        result("hgpo", 1, 0.3, 0.4, 0.5, 0.9, 0.95),
        result("hgpo", 2, 0.3, 0.9, 0.95),
        result("lazy", 0, 0.3, 0.9, 0.95),
        result("lazy", 1, 0.3, 0.4, 0.9, 0.95),
        result("lazy", 2, 0.3, 0.4),
    ]
    for r in results:
        folder = tmp_path / str(r["seed"])
        folder.mkdir(exist_ok=True)
        (folder / f"{r['rule']}.json").write_text(json.dumps(r))
    (tmp_path / "0" / "reference.json").write_text(json.dumps({"tokens": 1}))
    rollout_tokens.write_results(tmp_path)
    _, _, hgpo, lazy = (tmp_path / "table.md").read_text().splitlines()
    assert [text.strip() for text in hgpo.split("|")[1:4]] == ["HGPO", "2 (2, 3, 1)", "1.00 (1.00, 1.00, 1.00)"]
    assert [text.strip() for text in lazy.split("|")[1:4]] == [
        "HGPO, lazy thinking",
        "2 (1, 2, –)",
        "0.67 (0.50, 0.67, –)",
    ]
    assert (tmp_path / "rollout_tokens.png").read_bytes().startswith(b"\x89PNG")
    assert [entry["rule"] for entry in json.loads((tmp_path / "results.json").read_text())] == ["hgpo", "lazy"]


def test_a_target_that_most_seeds_miss_is_not_reached() -> None:
    assert rollout_tokens.cell([1.0, math.nan, math.nan], ".0f") == "– (1, –, –)"
