"""HGPOTrainer on a tiny model: real generation, real steps."""

import asyncio
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen2Config

from hgpo_trl.advantages import compute_advantages
from hgpo_trl.config import HGPOConfig
from hgpo_trl.modes import MODES, mode_tokens, split_response
from hgpo_trl.trainer import HGPOTrainer


def lottery(completions: list, **kwargs: Any) -> list[float]:
    """A reward that varies within and between the modes and depends on the text alone."""
    return [float(zlib.crc32(completion[0]["content"].encode()) % 3) for completion in completions]


def constant(completions: list, **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.fixture
def make_trainer(
    model_dir: str, tokenizer: PreTrainedTokenizerFast, prompts: Dataset, tmp_path: Path
) -> Callable[..., HGPOTrainer]:
    def make(
        reward_funcs: Any = lottery, dataset: Any = prompts, trainer: dict | None = None, **config: Any
    ) -> HGPOTrainer:
        settings = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 8,
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
        return HGPOTrainer(
            model=model_dir,
            reward_funcs=reward_funcs,
            args=HGPOConfig(**(settings | config)),
            train_dataset=dataset,
            **({"processing_class": tokenizer} | (trainer or {})),
        )

    return make


def weights(trainer: HGPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def unchanged(before: dict[str, torch.Tensor], trainer: HGPOTrainer) -> list[str]:
    return [name for name, parameter in trainer.model.named_parameters() if torch.equal(before[name], parameter)]


def rollout(trainer: HGPOTrainer) -> dict[str, Any]:
    """One generation batch, as the training loop would get it."""
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def logged(trainer: HGPOTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("continuous_batching", [False, True])
def test_first_half_of_every_group_thinks(make_trainer: Callable, continuous_batching: bool) -> None:
    trainer = make_trainer(use_transformers_continuous_batching=continuous_batching)
    batch = rollout(trainer)
    tokens = mode_tokens(trainer.processing_class)
    assert batch["completion_ids"][:, 0].tolist() == [*[tokens.think] * 2, *[tokens.no_think] * 2] * 2
    assert batch["completion_ids"].shape[1] <= 8, "the decision token counts towards max_completion_length"
    assert batch["prompt_ids"][0].equal(batch["prompt_ids"][3]), "all N responses belong to one query"
    assert not batch["prompt_ids"].eq(tokens.think).any(), "the forced token has moved from the prompt to the response"


def test_a_group_may_straddle_two_processes(make_trainer: Callable) -> None:
    """N = 4, 6 rows per process: the second group begins on process 0 and ends on process 1."""
    trainer = make_trainer()

    class Accelerator:
        def __init__(self, process_index: int) -> None:
            self.process_index = process_index

    modes = []
    real, trainer.model = trainer.accelerator, trainer.model.train()
    for process in range(2):
        trainer.accelerator = Accelerator(process)
        modes += trainer._row_modes(6)
    trainer.accelerator = real
    assert modes == [0, 0, 1, 1] * 3


def test_rows_keep_their_order_when_the_modes_are_generated_apart(make_trainer: Callable) -> None:
    """Plain generation runs each mode as its own batch; greedy decoding shows that every row gets its own response."""
    trainer = make_trainer(generation_kwargs={"do_sample": False})
    batch = rollout(trainer)
    for row in range(8):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        response = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        alone = trainer.model.generate(
            torch.cat([prompt, response[:1]])[None], max_new_tokens=len(response) - 1, do_sample=False
        )
        assert alone[0, len(prompt) :].tolist() == response.tolist()


def test_forced_token_has_no_sampling_log_probability(make_trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """None becomes an importance ratio of 1 in TRL; a number would scale the sequence by π(mode | q)."""
    trainer = make_trainer()
    trainer.model.train()
    trainer.use_vllm = True  # the backend that returns log-probabilities; only its call is replaced
    seen: dict[str, Any] = {}

    def generate(self: Any, prompt_ids: list, images: Any, fields: dict, num_generations: int, *rest: Any) -> tuple:
        seen.update(prompt_ids=prompt_ids, num_generations=num_generations)
        return [[7, 8]] * len(prompt_ids), [[-0.5, -0.25]] * len(prompt_ids)

    monkeypatch.setattr("trl.GRPOTrainer._generate_single_turn", generate)
    completions, log_probs = trainer._generate_single_turn([[1], [1], [1], [1]], None, {}, 4)
    think, no_think = trainer.mode_tokens.decision
    assert seen["prompt_ids"] == [[1, think], [1, think], [1, no_think], [1, no_think]]
    assert seen["num_generations"] == 2, "vLLM's server takes every N/2-th prompt: think and no-think are two prompts"
    assert completions == [[think, 7, 8]] * 2 + [[no_think, 7, 8]] * 2
    assert log_probs == [[None, -0.5, -0.25]] * 4


# --- advantages -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("well_formed")
@pytest.mark.parametrize("weighting", ["saturating", "uniform"])
def test_advantages_are_those_of_the_pure_functions(make_trainer: Callable, weighting: str) -> None:
    trainer = make_trainer(decision_weighting=weighting, alpha=0.5, margin=0.1)
    batch = rollout(trainer)
    texts = trainer.processing_class.batch_decode(
        [ids[mask.bool()] for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)],
        skip_special_tokens=True,
    )
    answers = [split_response(text).answer for text in texts]
    rewards = torch.tensor(lottery([[{"content": answer}] for answer in answers])).view(2, 2, 2)
    assert rewards.unique().numel() > 1
    with torch.no_grad():
        logits = trainer.model(batch["prompt_ids"], attention_mask=batch["prompt_mask"]).logits[::4, -1]
    probs = logits.softmax(-1)[:, list(trainer.mode_tokens.decision)]
    expected = compute_advantages(
        rewards,
        batch["completion_mask"].sum(1),
        alpha=0.5,
        margin=0.1,
        mode_probs=probs if weighting == "saturating" else None,
    )
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-6, rtol=1e-5)
    assert batch["advantages"].shape == batch["completion_ids"].shape


@pytest.mark.usefixtures("well_formed")
def test_a_step_changes_every_parameter(make_trainer: Callable) -> None:
    trainer = make_trainer()
    before = weights(trainer)
    trainer.train()
    assert unchanged(before, trainer) == []


@pytest.mark.usefixtures("well_formed")
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_as_printed"])
@pytest.mark.parametrize("ties", ["all", "first"])
@pytest.mark.parametrize("intra_scope", ["mode", "all"])
def test_every_estimator_trains(make_trainer: Callable, estimator: str, ties: str, intra_scope: str) -> None:
    trainer = make_trainer(estimator=estimator, ties=ties, intra_scope=intra_scope)
    before = weights(trainer)
    trainer.train()
    assert unchanged(before, trainer) == []
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.usefixtures("well_formed")
@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "bnpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_type_trains(make_trainer: Callable, loss_type: str) -> None:
    sequence = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    trainer = make_trainer(loss_type=loss_type, beta=0.01, **sequence)
    before = weights(trainer)
    trainer.train()
    assert unchanged(before, trainer) == []


def test_without_signal_the_policy_stays(make_trainer: Callable) -> None:
    """Equal rewards everywhere and α = 0: nothing is left that could move it."""
    trainer = make_trainer(constant, alpha=0.0, weight_decay=0.0)
    before = weights(trainer)
    trainer.train()
    assert unchanged(before, trainer) == list(before)


def test_with_equal_modes_only_the_margin_moves_the_decision(make_trainer: Callable) -> None:
    trainer = make_trainer(constant, margin=0.2, max_steps=3)
    batch = rollout(trainer)
    assert batch["advantages"][:, 1:].abs().max() == 0
    assert (batch["advantages"][:, 0].view(2, 2, 2).sign() == torch.tensor([[[-1, -1], [1, 1]]])).all()
    trainer = make_trainer(constant, margin=0.2, max_steps=3)
    trainer.train()
    assert logged(trainer, "hgpo/prob/no_think")[-1] > logged(trainer, "hgpo/prob/no_think")[0]
    assert logged(trainer, "hgpo/think_win_rate") == [0.0] * 3


@pytest.mark.usefixtures("well_formed")
def test_invalid_rewards_carry_no_signal(make_trainer: Callable) -> None:
    def partly(completions: list, **kwargs: Any) -> list[float | None]:
        return [None if row % 4 == 0 else reward for row, reward in enumerate(lottery(completions))]

    batch = rollout(make_trainer(partly))
    assert batch["advantages"].isfinite().all()
    assert batch["advantages"][::4].abs().max() == 0


# --- everything else of GRPOTrainer --------------------------------------------------------------------------------


@pytest.mark.usefixtures("well_formed")
def test_weighted_and_async_rewards(make_trainer: Callable) -> None:
    async def later(completions: list, **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return lottery(completions)

    trainer = make_trainer([lottery, later], reward_weights=[1.0, -1.0])
    batch = rollout(trainer)
    assert batch["advantages"][:, 1:].abs().max() == 0, "the weighted sum of the two is 0 everywhere"


@pytest.mark.usefixtures("well_formed")
def test_reward_model(make_trainer: Callable, tokenizer: PreTrainedTokenizerFast) -> None:
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    reward_model = AutoModelForSequenceClassification.from_config(config)
    trainer = make_trainer(reward_model, trainer={"reward_processing_classes": tokenizer})
    before = weights(trainer)
    trainer.train()
    assert unchanged(before, trainer) == []


@pytest.mark.usefixtures("well_formed")
def test_several_updates_per_rollout(make_trainer: Callable) -> None:
    trainer = make_trainer(num_iterations=2, steps_per_generation=2, per_device_train_batch_size=4, max_steps=4)
    before = weights(trainer)
    trainer.train()
    assert unchanged(before, trainer) == []
    assert len(set(logged(trainer, "hgpo/reward/think"))) == 1, "one rollout served all four steps"


def test_stream(make_trainer: Callable, prompts: Dataset) -> None:
    trainer = make_trainer(dataset=prompts.to_iterable_dataset(), max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert unchanged(before, trainer) == []


def test_lora(make_trainer: Callable) -> None:
    trainer = make_trainer(trainer={"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])}, beta=0.01)
    before = weights(trainer)
    trainer.train()
    moved = set(before) - set(unchanged(before, trainer))
    assert moved
    assert all("lora" in name for name in moved)


def test_model_as_an_object_and_default_arguments(model_dir: str, prompts: Dataset, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    args = HGPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = HGPOTrainer(model, lottery, args, prompts)
    assert (args.num_generations, args.alpha, args.margin, args.beta, args.epsilon) == (4, 1.0, 0.2, 0.001, 0.5)
    assert (args.learning_rate, args.lr_scheduler_type, args.loss_type) == (1e-6, "constant", "dr_grpo")
    assert trainer.ref_model is not None


# --- what is logged -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("well_formed")
def test_completion_table_shows_modes_and_hgpo_advantages(make_trainer: Callable, tmp_path: Path) -> None:
    make_trainer(log_completions=True, max_steps=2).train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert table["mode"].tolist() == ["think", "think", "no_think", "no_think"] * 2
    assert {"advantage", "decision_advantage", "lottery"} <= set(table.columns)
    for _, group in table.groupby(table.index // 4):
        for _, mode in group.groupby("mode"):
            best = mode["lottery"] == mode["lottery"].max()
            if not best.all():
                assert (mode["advantage"] > 0).equals(best)


@pytest.mark.usefixtures("well_formed")
def test_metrics_of_both_modes(make_trainer: Callable, prompts: Dataset) -> None:
    trainer = make_trainer(
        trainer={"eval_dataset": prompts.select(range(5))}, eval_strategy="steps", eval_steps=1, num_generations_eval=4
    )
    trainer.train()
    train, evaluation = trainer.state.log_history[0], trainer.state.log_history[1]
    for mode in MODES:
        for name in ("reward", "length", "truncated", "format_faults", "prob"):
            assert f"hgpo/{name}/{mode}" in train
            assert f"eval_hgpo/{name}/{mode}" in evaluation
    total = train["hgpo/prob/think"] + train["hgpo/prob/no_think"] + train["hgpo/off_mode_mass"]
    assert total == pytest.approx(1.0, abs=1e-5)
    for name in ("hybrid_accuracy", "accuracy/auto", "accuracy/oracle", "mean_tokens/auto", "thinking_ratio"):
        assert evaluation[f"eval_hgpo/{name}"] is not None
    assert 0.0 <= evaluation["eval_hgpo/hybrid_accuracy"] <= 1.0
    means = [evaluation[f"eval_hgpo/reward/{mode}"] for mode in MODES]
    assert evaluation["eval_hgpo/accuracy/think"] == pytest.approx(means[0])
    assert evaluation["eval_hgpo/accuracy/oracle"] >= max(means) - 1e-6


def test_warns_once_when_the_policy_leaves_both_modes(make_trainer: Callable, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(max_steps=3).train()  # an untrained model puts nearly all mass elsewhere
    warnings = [record.message for record in caplog.records if "neither mode" in record.message]
    assert len(warnings) == 1
    assert "off_mode_warning=0.05" in warnings[0]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_generations": 5}, "num_generations must be even and at least 4"),
        ({"num_generations": 2}, "num_generations must be even and at least 4"),
        ({"num_generations_eval": 3}, "num_generations_eval must be even and at least 2"),
        ({"margin": float("nan")}, "margin must be a finite number"),
        ({"alpha": float("inf")}, "alpha must be a finite number"),
        ({"estimator": "ppo"}, "estimator must be one of grpo, rloo"),
        ({"ties": "last"}, "ties must be one of all, first"),
        ({"intra_scope": "group"}, "intra_scope must be one of mode, all"),
        ({"decision_weighting": "none"}, "decision_weighting must be one of saturating, uniform"),
        ({"discount": 0.0}, "discount must lie in"),
        ({"max_completion_length": 1}, "max_completion_length must be at least 2"),
        ({"off_mode_warning": 2.0}, "off_mode_warning must lie between 0 and 1"),
        ({"no_think_cap": 0.0}, "no_think_cap must be a finite number above 0, or null for no cap; got 0.0"),
        ({"no_think_cap": float("inf")}, "no_think_cap must be a finite number"),
        ({"no_think_cap": float("nan")}, "no_think_cap must be a finite number"),
        ({"no_think_max_tokens": -1}, "no_think_max_tokens must be a finite number above 0"),
        ({"eval_margin": -0.1}, "eval_margin must be a finite number of at least 0"),
        ({"chat_template_kwargs": {"thinking_mode": "think"}}, "chat_template_kwargs sets thinking_mode"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch' has no effect"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
        ({"per_device_train_batch_size": 6}, "divisible by num_generations"),
    ],
)
def test_bad_settings(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HGPOConfig(str(tmp_path), use_cpu=True, bf16=False, **config)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a model is loaded: these errors come before."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"question": ["a"]}, "train_dataset has no column `prompt`; its columns are"),
        ({"prompt": []}, "train_dataset is empty"),
        ({"prompt": ["1 + 1", "  "]}, "empty `prompt` in row 1"),
        ({"prompt": [[{"role": "user", "content": "1 + 1"}], []]}, "empty `prompt` in row 1"),
        ({"prompt": [[{"role": "user", "content": ""}]]}, "empty `prompt` in row 0"),
        ({"prompt": ["1 + 1"], "response": ["2"]}, "train_dataset has a column `response`"),
    ],
)
def test_bad_data(make_trainer: Callable, rows: dict[str, list], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(dataset=Dataset.from_dict(rows))


@pytest.mark.usefixtures("no_model")
def test_bad_tokenizers(
    make_trainer: Callable, tokenizer: PreTrainedTokenizerFast, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"no chat template.*set_chat_template"):
        make_trainer()
    monkeypatch.undo()
    special = type(tokenizer).from_pretrained(model_dir, extra_special_tokens=["<think>"])
    with pytest.raises(ValueError, match="<think> is a special token"):
        make_trainer(trainer={"processing_class": special})


@pytest.mark.usefixtures("no_model")
def test_fsdp2_with_a_random_reference_model_is_refused(
    make_trainer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hgpo_trl.trainer.is_fsdp_enabled", lambda: True)  # with cpu_ram_efficient_loading
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=r"beta=0\.1 needs a reference model, but with fsdp_cpu_ram_efficient_loading"):
        make_trainer(beta=0.1)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", ["tools", "environment_factory", "rollout_func"])
def test_refuses_what_it_cannot_do(make_trainer: Callable, name: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
        make_trainer(trainer={name: [constant] if name == "tools" else constant})


def test_images_are_refused(make_trainer: Callable) -> None:
    rows = Dataset.from_dict({"prompt": ["1 + 1"], "image": ["a.png"]})
    with pytest.raises(NotImplementedError, match="images"):
        make_trainer(dataset=rows)


def test_a_reward_function_that_returns_the_wrong_count(make_trainer: Callable) -> None:
    def short(completions: list, **kwargs: Any) -> list[float]:
        return [1.0]

    with pytest.raises(ValueError, match=r"'short' returned 1 rewards for 8 completions"):
        make_trainer(short).train()
