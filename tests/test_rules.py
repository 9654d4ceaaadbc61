"""Rules for learning when to think: against a loop over responses, and in the trainer."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from settings import ON_CPU, TWO_QUERIES, lottery, rollout_of_two_queries

from hgpo_trl import HGPOConfig, HGPOTrainer
from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import Fault
from hgpo_trl.modes.decision import OFF_MODE, Decision
from hgpo_trl.modes.hybrid_accuracy import NO_THINK, THINK
from hgpo_trl.scripts.recipe import RecipeParser
from hgpo_trl.training.advantages import assign_rewards, compute_advantages
from hgpo_trl.training.metrics import group_metrics
from hgpo_trl.training.rollout import Rollout
from hgpo_trl.training.rules import RULES, Groups, Rule, build_rule, load_rule
from hgpo_trl.training.rules.adaptthink import REFERENCE, AdaptThink
from hgpo_trl.training.rules.grpo import GRPO
from hgpo_trl.training.rules.stable_adaptive import StableAdaptive
from hgpo_trl.training.rules.thinkless import Thinkless

MAX_TOKENS = 20
ARGS = SimpleNamespace(margin=0.2, max_completion_length=MAX_TOKENS)
SAMPLED = [name for name, rule in RULES.items() if rule.samples_modes]
FORCED = [name for name, rule in RULES.items() if not rule.samples_modes]


# --- against a loop -----------------------------------------------------------------------------------------------
# Every reference returns the advantage of token t of response i; its arguments are lists over a query's responses.


def norm(rewards: list[float], i: int) -> float:
    """GRPO's (r − mean) / (std + 1e-4) over the responses that have a reward."""
    valid = [r for r in rewards if not math.isnan(r)]
    mean = sum(valid) / len(valid)
    variance = sum((r - mean) ** 2 for r in valid) / max(1, len(valid) - 1)
    return (rewards[i] - mean) / (math.sqrt(variance) + 1e-4)


def reference_grpo(rewards: list[float], modes: list[int], lengths: list[int], column: float, i: int, t: int) -> float:
    return norm([r + 0.2 * (m == NO_THINK) for r, m in zip(rewards, modes, strict=True)], i)


def reference_thinkless(
    rewards: list[float], modes: list[int], lengths: list[int], column: float, i: int, t: int
) -> float:
    scores = [
        r * (1 - 0.4) - (1 - r) if m == THINK else r - (1 - r)  # between the values of right and wrong
        for r, m in zip(rewards, modes, strict=True)
    ]
    valid = [s for s in scores if not math.isnan(s)]
    weight = 0.25 if t == 0 else 1 / (lengths[i] - 1)
    return MAX_TOKENS * weight * (scores[i] - sum(valid) / len(valid))


def reference_adaptthink(
    rewards: list[float], modes: list[int], lengths: list[int], column: float, i: int, t: int
) -> float:
    return (0.2 if modes[i] == NO_THINK else 0.0) + rewards[i] - column


def reference_stable_adaptive(
    rewards: list[float], modes: list[int], lengths: list[int], column: float, i: int, t: int
) -> float:
    advantage = norm(rewards, i)
    if rewards[i] == 1 and modes[i] == NO_THINK:
        advantage += 0.2
    powers = [max(1, length - 1) ** -0.5 for length in lengths]
    weight = powers[i] / sum(powers) / MAX_TOKENS  # w_i with M = max_completion_length
    # the loss dr_grpo divides by N and max_completion_length
    return advantage * weight * len(lengths) * MAX_TOKENS * (3.0 if t == 0 else 1.0)


REFERENCES: dict[Any, Any] = {
    GRPO(ARGS): reference_grpo,
    Thinkless(ARGS, control_weight=0.25): reference_thinkless,
    AdaptThink(ARGS): reference_adaptthink,
    StableAdaptive(ARGS, length_exponent=0.5, control_weight=3.0): reference_stable_adaptive,
}


@st.composite
def groups(draw: st.DrawFn) -> Groups:
    """Two queries of four responses in any modes, with and without rewards."""

    def table(entries: Any) -> list[list[Any]]:
        return [draw(st.lists(entries, min_size=4, max_size=4)) for _ in range(2)]

    rewards = torch.tensor(table(st.sampled_from([0.0, 0.5, 1.0, math.nan])), dtype=torch.float64)
    column = draw(st.lists(st.floats(0, 1), min_size=2, max_size=2))
    return Groups(
        rewards=rewards,
        modes=torch.tensor(table(st.sampled_from([THINK, NO_THINK, OFF_MODE]))),
        lengths=torch.tensor(table(st.integers(1, 6))),
        mode_probs=torch.full((2, 2), 0.5),
        columns={REFERENCE: torch.tensor(column, dtype=torch.float64)[:, None].expand(2, 4)},
    )


@pytest.mark.parametrize("rule", REFERENCES, ids=lambda rule: type(rule).__name__)
@given(batch=groups())
def test_advantages_are_those_of_a_loop(rule: Rule, batch: Groups) -> None:
    found = rule.advantages(batch)
    assert found.shape == (8, int(batch.lengths.max()))
    for query in range(2):
        rewards, modes, lengths = (x[query].tolist() for x in (batch.rewards, batch.modes, batch.lengths))
        column = batch.columns[REFERENCE][query, 0].item()
        for i in range(4):
            for t in range(found.shape[1]):
                silent = t >= lengths[i] or math.isnan(rewards[i])
                expected = 0.0 if silent else REFERENCES[rule](rewards, modes, lengths, column, i, t)
                assert found[4 * query + i, t].item() == pytest.approx(expected, abs=1e-9), (query, i, t)


def test_hgpo_is_compute_advantages() -> None:
    rewards = torch.rand(3, 2, 2)
    lengths, probs = torch.randint(1, 6, (12,)), torch.tensor([[0.3, 0.6]] * 3)
    args = HGPOConfig("unused", **ON_CPU, alpha=2.0, margin=0.1, estimator="rloo", decision_weighting="saturating")
    modes = torch.tensor([[0, 0, 1, 1]] * 3)
    found = build_rule(args).advantages(Groups(rewards.view(3, 4), modes, lengths.view(3, 4), probs))
    expected = compute_advantages(
        rewards, lengths, alpha=2.0, margin=0.1, estimator="rloo", decision_weighting="saturating", mode_probs=probs
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", [GRPO(ARGS), Thinkless(ARGS)], ids=["grpo", "thinkless"])
@pytest.mark.parametrize("quick", [0.0, 0.7, 0.79, 0.81, 1.0])
def test_the_preference_between_the_modes_is_that_of_hgpo(rule: Rule, quick: float) -> None:
    """With thinking always right, no-think is preferred where its accuracy is at least 1 − δ."""
    rewards = torch.tensor([[1.0] * 100 + [1.0] * round(100 * quick) + [0.0] * round(100 * (1 - quick))])
    modes = torch.tensor([[THINK] * 100 + [NO_THINK] * 100])
    batch = Groups(rewards, modes, torch.full((1, 200), 2), torch.full((1, 2), 0.5))
    think, no_think = rule.advantages(batch)[:, 1].view(2, 100).mean(dim=1)
    r_inter, _ = assign_rewards(torch.tensor([[[1.0], [quick]]]), margin=0.2)
    assert bool(no_think >= think) == bool(r_inter[0, 1, 0])


def test_correct_thinking_is_never_punished_by_cpas() -> None:
    """Section 3.3: a correct long response has an advantage of at least 0, whatever the short ones get."""
    rewards, modes = torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.tensor([[THINK, NO_THINK, NO_THINK, THINK]])
    batch = Groups(rewards, modes, torch.tensor([[9, 2, 2, 9]]), torch.full((1, 2), 0.5))
    assert StableAdaptive(ARGS).advantages(batch)[0, :9].min() > 0
    assert GRPO(ARGS).advantages(batch)[0, 0] < GRPO(ARGS).advantages(batch)[1, 0]


@pytest.mark.parametrize("rule", [Thinkless(ARGS), StableAdaptive(ARGS)], ids=["thinkless", "stable_adaptive"])
@pytest.mark.parametrize("reward", [-0.5, 1.5])
def test_rules_of_correctness_refuse_other_rewards(rule: Rule, reward: float) -> None:
    batch = Groups(
        torch.tensor([[reward, math.nan]]), torch.tensor([[0, 1]]), torch.tensor([[2, 2]]), torch.full((1, 2), 0.5)
    )
    with pytest.raises(UserError, match=rf"between 0 and 1; a response got {reward}"):
        rule.advantages(batch)


# --- settings -----------------------------------------------------------------------------------------------------


def config(**fields: Any) -> HGPOConfig:
    return HGPOConfig("unused", **ON_CPU, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode_rule": "hgop"}, "mode_rule must be one of hgpo, adaptthink, .* got 'hgop'"),
        ({"mode_rule": "settings.lottery"}, "must be a subclass of hgpo_trl.training.rules.Rule"),
        ({"mode_rule": "grpo", "mode_rule_kwargs": {"gamma": 1}}, "mode_rule=grpo has no option gamma. It takes none"),
        (
            {"mode_rule": "thinkless", "mode_rule_kwargs": {"alpha": 1}},
            "no option alpha. It takes control_weight, gamma",
        ),
        ({"mode_rule": "thinkless", "mode_rule_kwargs": {"control_weight": -1}}, "control_weight must be .* got -1"),
        ({"mode_rule": "thinkless", "mode_rule_kwargs": {"gamma": 3}}, "gamma .* between 0.0 and 2.0; got 3"),
        ({"mode_rule": "thinkless", "margin": 1.5}, "gamma .* between 0.0 and 2.0; got 3"),
        (
            {"mode_rule": "stable_adaptive", "mode_rule_kwargs": {"length_exponent": 1.5}},
            "length_exponent .* got 1.5",
        ),
        (
            {"mode_rule": "stable_adaptive", "mode_rule_kwargs": {"control_weight": math.inf}},
            "control_weight must be a finite number",
        ),
        *(
            ({"mode_rule": rule, "loss_type": "grpo"}, f"mode_rule={rule} .* needs loss_type=dr_grpo; got grpo")
            for rule in ("thinkless", "stable_adaptive")
        ),
        *(({"mode_rule": rule, "lazy_thinking": True}, "Set lazy_thinking=false") for rule in RULES if rule != "hgpo"),
        *(({"mode_rule": rule, "estimator": "rloo"}, "estimator=rloo is of HGPO") for rule in RULES if rule != "hgpo"),
        *(
            ({"mode_rule": rule, field: 2}, f"{field} needs both modes of every query, which mode_rule={rule}")
            for rule in SAMPLED
            for field in ("no_think_cap", "no_think_max_tokens")
        ),
    ],
)
def test_settings_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**fields)


def test_options_reach_the_rule_from_the_command_line() -> None:
    parser = RecipeParser((HGPOConfig,), prog="test")
    words = ["--output_dir", "unused", "--use_cpu", "true", "--bf16", "false"]
    (args, *_) = parser.parse_recipe([*words, "--mode_rule", "thinkless", "--mode_rule_kwargs", '{"gamma": 0.5}'])
    rule = build_rule(args)
    assert isinstance(rule, Thinkless)
    assert (rule.gamma, rule.control_weight) == (0.5, 1e-3)


# --- in the trainer -----------------------------------------------------------------------------------------------


class LastToken(Rule):
    """A rule of a user's own: the reward on the last token alone."""

    samples_modes = True

    def __init__(self, args: Any, scale: float = 1.0) -> None:
        super().__init__(args)
        self.scale = scale

    def advantages(self, groups: Groups) -> torch.Tensor:
        last = torch.arange(int(groups.lengths.max())) == groups.lengths.view(-1, 1) - 1
        return self.scale * groups.rewards.view(-1, 1) * last


class Shapeless(LastToken):
    def advantages(self, groups: Groups) -> torch.Tensor:
        return super().advantages(groups)[:, 0]


class Infinite(LastToken):
    def advantages(self, groups: Groups) -> torch.Tensor:
        return super().advantages(groups) + math.inf


class Overflowing(LastToken):
    def advantages(self, groups: Groups) -> torch.Tensor:
        return super().advantages(groups) + 1


@pytest.fixture
def data(prompts: Dataset) -> Dataset:
    return prompts.add_column(REFERENCE, [0.5] * len(prompts))


def correctness(completions: list, **kwargs: Any) -> list[float]:
    """Rewards that differ within every group, 0 or 1."""
    return [float(row % 3 == 0) for row in range(len(completions))]


def build(rule: str, model_dir: str, data: Dataset, tokenizer: Any, tmp_path: Path, **fields: Any) -> Any:
    settings = TWO_QUERIES | {"output_dir": str(tmp_path), "mode_rule": rule, **fields}
    return HGPOTrainer(
        model=model_dir,
        reward_funcs=correctness,
        args=HGPOConfig(**settings),
        train_dataset=data,
        eval_dataset=data.remove_columns(REFERENCE).select(range(2)),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_and_evaluates_in_both_modes(
    rule: str, model_dir: str, data: Dataset, tokenizer: Any, tmp_path: Path, well_formed: None
) -> None:
    trainer = build(rule, model_dir, data, tokenizer, tmp_path)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert (trainer._rollout.sampled_modes is not None) == RULES[rule].samples_modes
    metrics = trainer.evaluate()
    assert trainer._rollout.sampled_modes is None
    for mode in ("think", "no_think"):
        assert metrics[f"eval_hgpo/mean_tokens/{mode}"] >= 1


@pytest.mark.parametrize("rule", SAMPLED)
def test_the_policy_samples_the_mode(rule: str, model_dir: str, data: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    trainer = build(rule, model_dir, data, tokenizer, tmp_path)
    output = rollout_of_two_queries(trainer, data)
    first, tokens = output["completion_ids"][:, 0], trainer.mode_tokens
    expected = torch.full_like(first, OFF_MODE)
    expected[first == tokens.think], expected[first == tokens.no_think] = THINK, NO_THINK
    assert trainer._rollout.modes.tolist() == expected.tolist()
    assert (expected == OFF_MODE).any()  # an untrained model draws any token
    assert sum(trainer._metrics["train"]["hgpo/rollout_tokens"]) == output["completion_mask"].sum()
    names = {THINK: "think", NO_THINK: "no_think", OFF_MODE: "neither"}
    assert list(trainer._logs["extra"]["mode"]) == [names[mode] for mode in expected.tolist()]


@pytest.mark.parametrize("rule", FORCED)
def test_half_of_a_group_is_forced_into_each_mode(
    rule: str, model_dir: str, data: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = build(rule, model_dir, data, tokenizer, tmp_path)
    output = rollout_of_two_queries(trainer, data)
    tokens = trainer.mode_tokens
    half = [tokens.think] * 4 + [tokens.no_think] * 4
    assert output["completion_ids"][:, 0].tolist() == 2 * half
    assert sum(trainer._metrics["train"]["hgpo/rollout_tokens"]) == output["completion_mask"].sum() - 16
    assert ("old_per_token_logps" in output) == (RULES[rule].decision_log_prob is not None)


def loss_of(trainer: Any, output: dict[str, Any]) -> torch.Tensor:
    trainer.current_gradient_accumulation_steps = 1
    return trainer._compute_loss(trainer.model, output)


def log_probs_of(trainer: Any, output: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    width = output["completion_ids"].shape[1]
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
    return logits.log_softmax(dim=-1).gather(2, output["completion_ids"][:, :, None])[:, :, 0]


def objective_thinkless(ratio: torch.Tensor, rest: torch.Tensor, lengths: torch.Tensor, rewards: Any) -> torch.Tensor:
    """mean over responses of A·(α·ratio of the decision token + the mean ratio of the rest)."""
    advantage = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
    return (advantage * (1e-3 * ratio[:, 0] + rest.sum(dim=1) / (lengths - 1).clamp(min=1))).mean()


def objective_stable_adaptive(
    ratio: torch.Tensor, rest: torch.Tensor, lengths: torch.Tensor, rewards: Any
) -> torch.Tensor:
    """mean over queries of Σ w_i·A·(λ·ratio of the decision token + the sum of the rest)."""
    advantage = ((rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)).flatten()
    powers = ((lengths - 1).clamp(min=1).float() ** -0.4).view(2, 8)
    weights = (powers / powers.sum(dim=1, keepdim=True) / 12).flatten()  # M = max_completion_length
    return (weights * advantage * (10 * ratio[:, 0] + rest.sum(dim=1))).sum() / 2


@pytest.mark.parametrize(
    ("rule", "objective", "scores"),
    [
        # no response has a mode here, so every correct one is worth 1; a wrong one is worth -1 in Thinkless
        ("thinkless", objective_thinkless, lambda rewards: 2 * rewards - 1),
        ("stable_adaptive", objective_stable_adaptive, lambda rewards: rewards),
    ],
)
def test_the_gradient_is_that_of_the_objective(
    rule: str,
    objective: Any,
    scores: Any,
    model_dir: str,
    data: Dataset,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0] * 7 + [0.0]])
    monkeypatch.setattr(Rollout, "response_rewards", property(lambda self: rewards.flatten()))
    monkeypatch.setattr(Rollout, "modes", property(lambda self: torch.full((16,), OFF_MODE)))
    trainer = build(rule, model_dir, data, tokenizer, tmp_path)
    output = rollout_of_two_queries(trainer, data)
    loss_of(trainer, output).backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    log_probs, mask = log_probs_of(trainer, output), output["completion_mask"].float()
    ratio = (log_probs - log_probs.detach()).exp()
    (-objective(ratio, (ratio * mask)[:, 1:], mask.sum(dim=1), scores(rewards))).backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_adaptthink_loss_is_clipped_with_the_ratio_to_half(
    model_dir: str, data: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    """-mean of min(r·A, clip(r)·A), r the exp of the mean log-ratio to a policy that draws either mode with 0.5."""
    fields = {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.2}
    trainer = build("adaptthink", model_dir, data, tokenizer, tmp_path, **fields)
    output = rollout_of_two_queries(trainer, data)
    log_probs, mask = log_probs_of(trainer, output), output["completion_mask"].float()
    torch.testing.assert_close(output["old_per_token_logps"][:, 0], torch.full((16,), 0.5).log())
    torch.testing.assert_close(
        (output["old_per_token_logps"] * mask)[:, 1:], (log_probs * mask)[:, 1:].detach(), atol=1e-5, rtol=1e-4
    )
    log_ratio = (log_probs[:, 0] - math.log(0.5)) / mask.sum(dim=1)
    ratio, advantage = log_ratio.exp(), output["advantages"][:, 0]
    expected = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    torch.testing.assert_close(loss_of(trainer, output), expected, atol=1e-5, rtol=1e-4)
    no_think = output["completion_ids"][:, 0] == trainer.mode_tokens.no_think
    torch.testing.assert_close(advantage, trainer._rollout.response_rewards + 0.2 * no_think - 0.5)


def test_a_column_that_the_rule_needs(model_dir: str, data: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mode_rule=adaptthink needs the column reference_reward in train_data"):
        HGPOTrainer(
            model=model_dir,
            reward_funcs=lottery,
            args=HGPOConfig(str(tmp_path), **ON_CPU, mode_rule="adaptthink"),
            train_dataset=data.remove_columns(REFERENCE),
            processing_class=tokenizer,
        )
    broken = data.remove_columns(REFERENCE).add_column(REFERENCE, [math.nan] * len(data))
    trainer = build("adaptthink", model_dir, broken, tokenizer, tmp_path)
    with pytest.raises(UserError, match=r"not finite. Check .* numbers in reference_reward"):
        rollout_of_two_queries(trainer, broken)


def test_a_rule_of_ones_own(model_dir: str, data: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    name = f"{__file__}:LastToken"
    trainer = build(name, model_dir, data, tokenizer, tmp_path, mode_rule_kwargs={"scale": 3.0})
    output = rollout_of_two_queries(trainer, data)
    assert load_rule(name).__name__ == "LastToken"
    sums = output["advantages"].sum(dim=1)
    torch.testing.assert_close(sums, 3 * trainer._rollout.response_rewards)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("Shapeless", r"advantages must have the shape \[16, \d+\]; got \[16\]"),
        ("Infinite", "some advantages are not finite"),
        ("Overflowing", "beyond the end of a response must be 0"),
    ],
)
def test_faults_of_a_rule_of_ones_own(
    rule: str, message: str, model_dir: str, data: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = build(f"{__file__}:{rule}", model_dir, data, tokenizer, tmp_path)
    with pytest.raises(UserError, match=message):
        rollout_of_two_queries(trainer, data)


def test_fields_that_are_not_read_are_named(
    model_dir: str, data: Dataset, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build("grpo", model_dir, data, tokenizer, tmp_path, alpha=2.0)
    assert "mode_rule=grpo does not read alpha=2.0, which only HGPO does." in caplog.text
    caplog.clear()
    build("hgpo", model_dir, data, tokenizer, tmp_path, alpha=2.0)
    assert "does not read" not in caplog.text


# --- metrics of sampled modes -------------------------------------------------------------------------------------


def test_metrics_by_mode_of_sampled_modes() -> None:
    modes = torch.tensor([THINK, NO_THINK, NO_THINK, OFF_MODE, NO_THINK, NO_THINK, NO_THINK, NO_THINK])
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    lengths = torch.tensor([9, 3, 4, 2, 3, 3, 3, 3])
    none = torch.zeros(8)
    sampled = Rollout(
        rewards[:, None],
        torch.ones(1),
        lengths,
        none,
        torch.zeros(8, len(Fault), dtype=torch.long),
        none,
        4,
        sampled_modes=modes,
    )
    half = torch.full((2,), 0.5)
    metrics = group_metrics(sampled, Decision(half, half, 0 * half, half, torch.zeros(2, dtype=torch.long)), 0.2, "all")
    assert metrics["hgpo/rollout_tokens"].tolist() == [18, 12]
    torch.testing.assert_close(metrics["hgpo/reward/no_think"], torch.tensor([0.5, 0.75]))
    torch.testing.assert_close(metrics["hgpo/length/think"], torch.tensor([9.0, math.nan]), equal_nan=True)
    # R̄_think = 1 > 0.5 + δ in the first query; the second has nothing to compare
    torch.testing.assert_close(metrics["hgpo/think_win_rate"], torch.tensor([1.0, math.nan]), equal_nan=True)
