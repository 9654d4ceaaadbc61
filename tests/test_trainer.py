"""HGPOTrainer on a tiny model: real generation, real steps."""

import asyncio
import re
import zlib
from collections.abc import Callable
from inspect import isfunction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from settings import CONTINUOUS_BATCHING
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen2Config
from trl import GRPOTrainer
from trl.rewards import accuracy_reward as trl_accuracy

from hgpo_trl.modes import MODES, Fault, mode_tokens, split_response
from hgpo_trl.rewards import accuracy_reward
from hgpo_trl.rewards.model import RewardModel
from hgpo_trl.training.advantages import BinaryRewards, compute_advantages
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.trainer import HGPOTrainer


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
    trainer = make_trainer(**(CONTINUOUS_BATCHING if continuous_batching else {}))
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
    # The backend that returns log-probabilities; only its call is replaced.
    trainer.use_vllm, trainer.vllm_generation = True, SimpleNamespace()
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
@pytest.mark.parametrize("weighting", ["winner", "saturating", "uniform"])
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
        decision_weighting=weighting,
        mode_probs=probs,
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


@pytest.mark.usefixtures("well_formed")
def test_an_estimator_of_a_users_own_trains(make_trainer: Callable) -> None:
    calls = []

    def nothing(batch: BinaryRewards) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(batch)
        return batch.per_token(torch.zeros_like(batch.r_intra)), torch.zeros_like(batch.r_inter)

    trainer = make_trainer(trainer={"estimator": nothing}, weight_decay=0.0)
    before = weights(trainer)
    trainer.train()
    assert [batch.r_inter.shape for batch in calls] == [(2, 2, 2)]
    assert unchanged(before, trainer) == list(before)


def test_the_docstring_names_every_override() -> None:
    """Its own, and those of the trainers that it inherits from, TRL's and Transformers' aside."""
    between = [trainer for trainer in HGPOTrainer.__mro__ if trainer.__module__.startswith("hgpo_trl.")]
    methods = {name for trainer in between for name, member in vars(trainer).items() if isfunction(member)}
    overrides = {name for name in methods if hasattr(GRPOTrainer, name)}
    text = str(HGPOTrainer.__doc__).split("Overridden are:")[1].split("Args:")[0]
    assert (
        set(re.findall(r"`(_?\w+)`", text)) - {trainer.__name__ for trainer in between} - {"lazy_thinking"} == overrides
    )


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
    assert (batch["advantages"][:, 0].view(2, 2, 2).sign() == torch.tensor([[[0, 0], [1, 1]]])).all()
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


# --- what the rewards see, and what becomes of them ---------------------------------------------------------------


def calculate(trainer: HGPOTrainer, texts: list[str], prompt: Any = None, **columns: list) -> torch.Tensor:
    """The rewards, `[B, F]`, of whole responses in groups of four, as sampling would hand them over."""
    trainer.model.train()
    chat = prompt is None
    prompt = [{"role": "user", "content": "a = 1 sum mod 10 ?"}] if chat else prompt
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    ids = [trainer.processing_class(text)["input_ids"] for text in texts]
    inputs = [{"prompt": prompt, **{key: column[row] for key, column in columns.items()}} for row in range(len(texts))]
    return trainer._calculate_rewards(inputs, [prompt] * len(texts), completions, ids)


def grid(rewards: torch.Tensor) -> list[list[float | None]]:
    return [[None if value != value else value for value in column] for column in rewards.T.tolist()]


GROUP = [
    r"<think> 1 </think> \boxed{4}",
    r"<think> \boxed{4} </think> 5",
    r"<no_think> \boxed{4} </no_think>",
    r"<no_think> \boxed{4}",
]


@pytest.mark.usefixtures("well_formed")
@pytest.mark.parametrize("conversational", [True, False])
def test_every_reward_function_sees_the_answer_part(
    make_trainer: Callable, prompts: Dataset, conversational: bool
) -> None:
    calls: list[dict[str, Any]] = []

    def record(**kwargs: Any) -> list[float]:
        calls.append(kwargs)
        return [1.0] * len(kwargs["prompts"])

    async def record_later(**kwargs: Any) -> list[float]:
        return record(**kwargs)

    data = prompts if conversational else prompts.map(lambda row: {"prompt": row["prompt"][0]["content"]})
    trainer = make_trainer([record, record_later], dataset=data)
    batch = rollout(trainer)
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    parts = [split_response(text) for text in texts]
    assert all(part.well_formed for part in parts)
    assert len(calls) == 2
    for call in calls:
        assert call["response"] == parts
        assert call["completions"] == [
            [{"role": "assistant", "content": part.answer}] if conversational else part.answer for part in parts
        ]
        assert call["completion_ids"] == [
            ids[mask.bool()].tolist()
            for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
        ]
        assert set(call) >= {"answer", "level", "prompts", "trainer_state", "log_metric", "log_extra"}
    assert [part.mode for part in parts] == ["think", "think", "no_think", "no_think"] * 2
    assert [text[0]["content"] if conversational else text for text in trainer._logs["completion"]] == texts


def test_trls_own_rewards_work_as_they_are(make_trainer: Callable, prompts: Dataset) -> None:
    """Its accuracy takes the last mathematics of a text: in the whole response that may be the reasoning's."""
    trainer = make_trainer(trl_accuracy, dataset=prompts.map(lambda row: {"solution": f"${row['answer']}$"}))
    assert grid(calculate(trainer, GROUP, solution=["$4$"] * 4)) == [[1.0, 0.0, 1.0, 0.0]]
    trainer.train()
    assert logged(trainer, "rewards/accuracy_reward/mean") != []


def test_a_malformed_response_gets_the_lowest_reward(make_trainer: Callable) -> None:
    def long(completions: list, **kwargs: Any) -> list[float | None]:
        return [len(completion[0]["content"]) - 20.0 or None for completion in completions]

    def elsewhere(completions: list, **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    trainer = make_trainer([constant, long, elsewhere])
    texts = [f"<think> 1 </think> {'4' * 20}", "<think> 1", "<no_think> 4 </no_think>", "<no_think> 4 </no_think> 4"]
    assert grid(calculate(trainer, texts)) == [[1.0, 0.0, 1.0, 0.0], [None, -19.0, -19.0, -19.0], [None] * 4]
    assert grid(calculate(make_trainer(constant), ["4"] * 4)) == [[0.0] * 4]


@pytest.mark.usefixtures("well_formed")
def test_a_verifier_that_fails_stops_nothing(make_trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 0 of every batch has no verdict: no advantage, and the rest goes on."""

    def check(references: list[str], answers: list[str]) -> list[bool | None]:
        return [None, *(zlib.crc32(f"{row}".encode()) % 2 == 0 for row in range(1, len(answers)))]

    monkeypatch.setattr("hgpo_trl.rewards.functions.check_answers", check)
    batch = rollout(make_trainer(accuracy_reward))
    assert batch["advantages"][0].abs().max() == 0
    assert batch["advantages"].isfinite().all()
    assert batch["advantages"][1:].abs().max() > 0
    trainer = make_trainer(accuracy_reward, max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert unchanged(before, trainer) == []
    assert logged(trainer, "hgpo/verifier_failures") == [1 / 8] * 2


@pytest.mark.usefixtures("well_formed")
def test_the_rule_and_a_reward_model_share_the_rows(
    make_trainer: Callable, prompts: Dataset, reward_model_dir: str
) -> None:
    """A query with an answer is the rule's, any other the reward model's; one batch has both."""
    reward_model = RewardModel(reward_model_dir)
    trainer = make_trainer([accuracy_reward, reward_model])
    rewards = calculate(trainer, GROUP * 2, answer=["4"] * 4 + [None] * 4)
    rule, scores = grid(rewards)
    assert rule == [1.0, 0.0, 1.0, 0.0, *[None] * 4]
    answers = [r"\boxed{4}", "5", r"\boxed{4}"]
    expected = torch.sigmoid(reward_model.scores([[{"role": "user", "content": "a = 1 sum mod 10 ?"}]] * 3, answers))
    assert scores[:4] == [None] * 4
    assert scores[4:] == pytest.approx([*expected.tolist(), 0.0], abs=1e-6)

    mixed = prompts.remove_columns("answer").add_column("answer", ["4" if row % 2 else None for row in range(32)])
    trainer = make_trainer([accuracy_reward, reward_model], dataset=mixed, max_steps=4)
    before = weights(trainer)
    trainer.train()
    assert unchanged(before, trainer) == []
    assert len(logged(trainer, "rewards/reward_model/mean")) == 4
    assert any(0 < mean < 1 for mean in logged(trainer, "rewards/reward_model/mean"))


@pytest.mark.parametrize(
    ("caps", "overlong"),
    [
        ({}, []),
        ({"no_think_cap": 1.0}, [3]),  # the longest well-formed think answer of the first query has 3 tokens
        ({"no_think_cap": 0.5}, [2, 3]),
        ({"no_think_cap": 0.5, "no_think_max_tokens": 5}, [2, 3, 7]),
        ({"no_think_max_tokens": 3}, [3, 7]),
    ],
)
def test_the_cap_on_no_think_answers(make_trainer: Callable, caps: dict[str, float], overlong: list[int]) -> None:
    """Tokens are words here. The second query has no well-formed think response, so only a fixed cap can hold."""
    seen: list[tuple] = []

    def record(completions: list, response: list, **kwargs: Any) -> list[float]:
        seen.extend(part.faults for part in response)
        return [1.0] * len(completions)

    trainer = make_trainer(record, **caps)
    texts = [
        "<think> 1 1 1 1 1 1 </think> 4", "<think> 1 </think>\n\n4 4 4", "<no_think>\n4 4 4\n</no_think>",
        "<no_think> 4 4 4 4 </no_think>",
        "<think> 1 1 1 1 1 1", "<think> 4 </think> 4 <think>", "<no_think> 4 </no_think>",
        "<no_think> 4 4 4 4 4 4 </no_think>",
    ]  # fmt: skip
    rewards = calculate(trainer, texts)
    faulty = [4, 5, *overlong]
    assert grid(rewards) == [[float(row not in faulty) for row in range(8)]]
    assert [row for row, faults in enumerate(seen) if Fault.OVERLONG in faults] == overlong
    assert trainer._rollout.faults[:, list(Fault).index(Fault.OVERLONG)].nonzero().flatten().tolist() == overlong


def test_faults_are_counted_by_kind(make_trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["<think> 4", "<think> 4 </think> 4", "<no_think> 4 <think> 4 </no_think>", "<no_think> 4 </no_think> 4"]

    def generate(self: HGPOTrainer, prompt_ids: list, *args: Any) -> tuple:
        return [self.processing_class(texts[row % 4])["input_ids"] for row in range(len(prompt_ids))], None

    monkeypatch.setattr(HGPOTrainer, "_generate_single_turn", generate)
    trainer = make_trainer(constant, no_think_max_tokens=2)
    trainer.train()
    log = trainer.state.log_history[0]
    counts = {key.removeprefix("hgpo/faults/"): value for key, value in log.items() if key.startswith("hgpo/faults/")}
    assert counts == dict.fromkeys(Fault, 0.0) | dict.fromkeys(
        ["unclosed", "think_in_no_think", "trailing_text", "overlong"], 0.25
    )
    assert (log["hgpo/format_faults/think"], log["hgpo/format_faults/no_think"]) == (0.5, 1.0)


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
        ({"estimator": "math.ppo"}, "estimator: 'math.ppo': math has no function 'ppo'"),
        ({"ties": "last"}, "ties must be one of all, first"),
        ({"intra_scope": "group"}, "intra_scope must be one of mode, all"),
        ({"decision_weighting": "none"}, "decision_weighting must be one of winner, saturating, uniform"),
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
        ({"prompt": ["1 + 1", "  "]}, "empty_prompt: 1 row, .* The first is row 1"),
        ({"prompt": [[{"role": "user", "content": "1 + 1"}], []]}, "empty_prompt: 1 row, .* The first is row 1"),
        ({"prompt": [[{"role": "user", "content": ""}]]}, "empty_prompt: 1 row, .* The first is row 0"),
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
    monkeypatch.setattr("hgpo_trl.training.validate.is_fsdp_enabled", lambda: True)  # with cpu_ram_efficient_loading
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
