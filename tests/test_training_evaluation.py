"""Evaluation inside training: its figures by hand, what it leaves out, and the best checkpoint that it chooses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from run_logs import log_of
from safetensors.torch import load_file
from settings import CONTINUOUS_BATCHING
from transformers import PreTrainedTokenizerFast

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes.decision import Decision
from hgpo_trl.modes.hybrid_accuracy import evaluation_metrics
from hgpo_trl.scripts import hgpo
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.metrics import BUDGET_METRIC, EVALUATION_METRICS
from hgpo_trl.training.trainer import HGPOTrainer
from hgpo_trl.training.validate import BEST_METRIC, check_evaluation

Make = Callable[..., HGPOTrainer]


@pytest.fixture
def make_trainer(model_dir: str, tokenizer: PreTrainedTokenizerFast, prompts: Dataset, tmp_path: Path) -> Make:
    def make(reward: Callable, eval_dataset: Any = None, **config: Any) -> HGPOTrainer:
        args = HGPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=8, per_device_eval_batch_size=8, num_generations=4,
            max_completion_length=8, max_steps=2, learning_rate=1e-2, bf16=False, use_cpu=True,
            gradient_checkpointing=False, save_strategy="no", logging_steps=1,
            **(
                {"beta": 0.0, "eval_strategy": "steps", "eval_steps": 1, "report_to": "none", "disable_tqdm": True}
                | config
            ),
        )  # fmt: skip
        eval_dataset = prompts.select(range(5)) if eval_dataset is None else eval_dataset
        return HGPOTrainer(model_dir, reward, args, prompts, eval_dataset, processing_class=tokenizer)

    return make


def constant(completions: list, **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def four(completions: list, **kwargs: Any) -> list[float]:
    """1 for the answer 4."""
    return [float(completion == "4") for completion in completions]


# --- the figures --------------------------------------------------------------------------------------------------

# Prompt: its four responses (their words are tokens), and what the model makes of its first token.
CASES: dict[str, tuple[list[str], tuple[float, float, int]]] = {
    # Thinking is better, and picked.
    "1": (["<think> 1 1 1 </think> 4"] * 2 + ["<no_think> 5 </no_think>"] * 2, (0.7, 0.2, 0)),
    # Both are right, so no think is better; thinking is picked.
    "2": (["<think> 1 </think> 4"] * 2 + ["<no_think> 4 </no_think>"] * 2, (0.6, 0.3, 0)),
    # No think is better; neither is picked.
    "3": (
        ["<think> 1 </think> 5"] * 2 + ["<no_think> 4 </no_think>", "<no_think> 5 5 </no_think>"],
        (0.1, 0.2, -1),
    ),
}
BY_HAND = {
    "hybrid_accuracy": 1 / 3,
    "hybrid_accuracy_where/thinking_gains": 1.0,  # the first prompt
    "hybrid_accuracy_where/no_gain": 0.0,
    "balanced_hybrid_accuracy": 1 / 2,
    "unsolved": 0.0,
    "thinking_ratio": (0.7 + 0.6 + 0.1) / 3,
    "off_mode_mass": (0.1 + 0.1 + 0.7) / 3,
    "accuracy/auto": (1 + 1 + 0) / 3,
    "accuracy/sampled": (0.7 + 0.9 + 0.2 * 0.5) / 3,
    "accuracy/think": (1 + 1 + 0) / 3,
    "accuracy/no_think": (0 + 1 + 0.5) / 3,
    "accuracy/oracle": (1 + 1 + 0.5) / 3,
    "mean_tokens/auto": (6 + 4 + 4) / 3,
    "mean_tokens/sampled": (0.8 * 6 + 0.2 * 3 + 0.7 * 4 + 0.3 * 3 + 0.8 * 4 + 0.2 * 3.5) / 3,
    "mean_tokens/think": (6 + 4 + 4) / 3,
    "mean_tokens/no_think": (3 + 3 + 3.5) / 3,
    "mean_tokens/oracle": (6 + 3 + 3.5) / 3,
}


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    """The responses and decisions of CASES."""

    def case(ids: list[int]) -> tuple[list[str], tuple[float, float, int]]:
        return CASES[tokenizer.decode(ids, skip_special_tokens=True).strip()]

    def generate(self: HGPOTrainer, prompt_ids: list[list[int]], *args: Any) -> tuple:
        return [tokenizer(case(ids)[0][row % 4])["input_ids"] for row, ids in enumerate(prompt_ids)], None

    def read_decision(self: HGPOTrainer, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> Decision:
        found = [case(ids[mask.bool()].tolist())[1] for ids, mask in zip(prompt_ids, prompt_mask, strict=True)][::4]
        think, no_think, picked = map(torch.tensor, zip(*found, strict=True))
        return Decision(think, no_think, 1 - think - no_think, torch.zeros(len(think)), picked)

    monkeypatch.setattr(HGPOTrainer, "_generate_single_turn", generate)
    monkeypatch.setattr(HGPOTrainer, "_read_decision", read_decision)


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, None),
        (3.1, None),  # never thinking takes 9.5 / 3
        (4.0, 0.5),  # never thinking
        (4.4, 2 / 3),  # the first prompt alone thinks: 13 / 3 tokens
    ],
)
def test_the_figures_by_hand(
    make_trainer: Make, caplog: pytest.LogCaptureFixture, budget: float | None, expected: float | None
) -> None:
    """Two batches, of two prompts and of one: every prompt has the same weight."""
    trainer = make_trainer(four, Dataset.from_dict({"prompt": list(CASES)}), eval_token_budget=budget)
    for _ in range(2):
        log = trainer.evaluate()
    for name, value in BY_HAND.items():
        assert log[f"eval_hgpo/{name}"] == pytest.approx(value, abs=1e-6), name
    assert ("eval_hgpo/accuracy_at_budget" in log) == (budget is not None)
    assert log.get("eval_hgpo/accuracy_at_budget") == pytest.approx(expected)
    logged = trainer.state.log_history[-1]
    assert {name: logged[name] for name in log if "hgpo/" in name} == {
        name: value for name, value in log.items() if "hgpo/" in name
    }
    warnings = [record.message for record in caplog.records if "eval_token_budget" in record.message]
    assert len(warnings) == (budget == 3.1), "once, however many evaluations"
    assert all("never thinking takes 3.2 tokens" in warning for warning in warnings)


@pytest.mark.usefixtures("by_hand")
def test_the_budget_is_not_to_blame_where_nothing_has_a_score(
    make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    def unscored(completions: list, **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    log = make_trainer(unscored, Dataset.from_dict({"prompt": ["1"]}), eval_token_budget=100.0).evaluate()
    assert log["eval_hgpo/accuracy_at_budget"] is None
    assert not [record for record in caplog.records if "eval_token_budget" in record.message]


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        ({"margin": 0.2}, 1 / 3),
        ({"margin": 1.5}, 0.0),  # so that no think is better for all
        ({"margin": 1.5, "eval_margin": 0.2}, 1 / 3),
        ({"margin": 0.2, "eval_margin": 1.5}, 0.0),
        ({"margin": -1.0}, 1 / 3),  # as 0
    ],
)
def test_close_means_are_those_of_the_training_margin(
    make_trainer: Make, margins: dict[str, float], expected: float
) -> None:
    log = make_trainer(four, Dataset.from_dict({"prompt": list(CASES)}), **margins).evaluate()
    assert log["eval_hgpo/hybrid_accuracy"] == pytest.approx(expected)


@pytest.mark.usefixtures("by_hand")
def test_several_data_sets_keep_their_figures_apart(make_trainer: Make) -> None:
    sets = {name: Dataset.from_dict({"prompt": [name]}) for name in ("1", "3")}
    trainer = make_trainer(four, sets, load_best_model_at_end=False, metric_for_best_model="3_hgpo/accuracy/no_think")
    log = trainer.evaluate()
    assert [log[f"eval_{name}_hgpo/accuracy/no_think"] for name in sets] == [0.0, 0.5]
    with pytest.raises(ValueError, match=r"none of the evaluation's metrics.* Did you mean eval_3_hgpo/accuracy"):
        make_trainer(four, sets, metric_for_best_model="hgpo/accuracy/no_think")


@pytest.mark.usefixtures("by_hand")
def test_a_figure_without_a_value_is_never_the_best(make_trainer: Make) -> None:
    trainer = make_trainer(
        four, Dataset.from_dict({"prompt": list(CASES)}), eval_token_budget=1.0,
        metric_for_best_model="hgpo/accuracy_at_budget",
    )  # fmt: skip
    assert not trainer._determine_best_metric(trainer.evaluate(), None)
    assert trainer._determine_best_metric({"eval_hgpo/accuracy_at_budget": 0.0}, None)
    assert not trainer._determine_best_metric(trainer.evaluate(), None)
    assert trainer.state.best_metric == 0.0


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_figures_without_a_value_can_be_shown_saved_and_reported(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    disable_tqdm: bool,
) -> None:  # fmt: skip
    """By Trainer's own functions, its printing of progress, and W&B."""
    import wandb

    def unscored(completions: list, **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_trainer(unscored, disable_tqdm=disable_tqdm, report_to="wandb", eval_token_budget=9.0)
    try:
        trainer.train()
        metrics = trainer.evaluate()
    finally:
        wandb.finish()
    missing = [name for name, value in metrics.items() if value is None]
    assert {"eval_hgpo/hybrid_accuracy", "eval_hgpo/accuracy/think", "eval_hgpo/accuracy_at_budget"} <= {*missing}
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    shown = capsys.readouterr().out
    assert re.search(r"^ *eval_hgpo/hybrid_accuracy += +null$", shown, re.MULTILINE)
    assert re.search(r"^ *eval_hgpo/mean_tokens/think += +[0-9.]+$", shown, re.MULTILINE)
    for name in ("eval_results.json", "all_results.json"):
        assert json.loads((tmp_path / name).read_text(encoding="utf-8")) == metrics
    assert "NaN" not in (tmp_path / "trainer_state.json").read_text(encoding="utf-8")


# --- what an evaluation leaves out ----------------------------------------------------------------------------------


def test_an_evaluation_makes_no_pass_for_a_loss(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[bool] = []
    score = HGPOTrainer._get_per_token_logps_and_entropies

    def count(self: HGPOTrainer, *args: Any, **kwargs: Any) -> Any:
        passes.append(self.model.training)
        return score(self, *args, **kwargs)

    monkeypatch.setattr(HGPOTrainer, "_get_per_token_logps_and_entropies", count)
    trainer = make_trainer(constant, beta=0.1)
    trainer.train()
    assert passes == [True] * 4, "the reference model and the loss, in two steps of training"
    evaluations = [entry for entry in trainer.state.log_history if "eval_hgpo/hybrid_accuracy" in entry]
    assert len(evaluations) == 2
    assert "eval_loss" not in evaluations[0]
    assert all("kl" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_an_evaluation_that_fails_leaves_training_as_it_was(make_trainer: Make) -> None:
    def fails(completions: list, **kwargs: Any) -> list[float]:
        raise RuntimeError("the judge is gone")

    trainer = make_trainer(fails, beta=0.1)
    with pytest.raises(RuntimeError, match="the judge is gone"):
        trainer.evaluate()
    assert trainer.beta == 0.1
    assert trainer.vllm_importance_sampling_correction == trainer.args.vllm_importance_sampling_correction


# --- the best checkpoint --------------------------------------------------------------------------------------------

REWARD = """
from pathlib import Path

def by_step(completions, trainer_state, **kwargs):
    training = len(completions) == 8
    if training and trainer_state.global_step == 3 and Path(__file__).with_name("fail").exists():
        raise RuntimeError("cut")
    return [1.0 if trainer_state.global_step == 2 else 0.25] * len(completions)
"""


@pytest.fixture
def run(model_dir: str, prompts: Dataset, tmp_path: Path) -> Callable[..., Path]:
    """Stage II's own main; of its four steps the evaluation after the second is the best."""
    (tmp_path / "reward.py").write_text(REWARD, encoding="utf-8")
    prompts.select(range(8)).to_parquet(tmp_path / "data.parquet")

    def run(name: str, **fields: Any) -> Path:
        base = {
            "model_name_or_path": model_dir, "train_data": tmp_path / "data.parquet",
            "eval_data": tmp_path / "data.parquet", "eval_prompts": 3, "output_dir": tmp_path / name,
            "reward_funcs": f"{tmp_path}/reward.py:by_step", "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2,
            "logging_steps": 1, "max_steps": 4, "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "beta": 0.0,
            "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1,
            "load_best_model_at_end": True, "metric_for_best_model": "eval_hgpo/accuracy/think",
        }  # fmt: skip
        hgpo.main([word for key, value in (base | fields).items() for word in (f"--{key}", str(value))])
        return tmp_path / name

    return run


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def state_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("well_formed")
def test_the_best_checkpoint_stays_and_becomes_the_model(run: Callable[..., Path], tmp_path: Path) -> None:
    """Also of a run that was cut after it, and of one that is started again when it has ended."""
    whole = run("whole")
    assert checkpoints(whole) == ["checkpoint-2", "checkpoint-4"], "the best and the last"
    assert weights(whole) == weights(whole / "checkpoint-2") != weights(whole / "checkpoint-4")
    state = state_of(whole)
    assert (state["best_metric"], state["best_global_step"]) == (1.0, 2)
    figures = [entry["eval_hgpo/accuracy/think"] for entry in log_of(whole) if "eval_hgpo/accuracy/think" in entry]
    assert figures == [0.25, 1.0, 0.25, 0.25]
    model = weights(whole)
    assert weights(run("whole")) == model

    (tmp_path / "fail").touch()
    with pytest.raises(RuntimeError, match="cut"):
        run("cut")
    assert checkpoints(tmp_path / "cut") == ["checkpoint-2", "checkpoint-3"]
    (tmp_path / "fail").unlink()
    cut = run("cut")
    assert weights(cut) == model
    assert weights(cut / "checkpoint-4") == weights(whole / "checkpoint-4")
    assert state_of(cut)["best_metric"] == 1.0


@pytest.mark.usefixtures("by_hand")
def test_fewer_tokens_are_better(make_trainer: Make) -> None:
    trainer = make_trainer(four, Dataset.from_dict({"prompt": ["1"]}), metric_for_best_model="hgpo/mean_tokens/auto")
    assert trainer._determine_best_metric(trainer.evaluate(), None)
    assert trainer._determine_best_metric({"eval_hgpo/mean_tokens/auto": 5.0}, None)
    assert not trainer._determine_best_metric({"eval_hgpo/mean_tokens/auto": 7.0}, None)
    assert trainer.state.best_metric == 5.0


@pytest.mark.usefixtures("well_formed")
def test_only_better_checkpoints_are_saved(run: Callable[..., Path]) -> None:
    folder = run("best", save_strategy="best", save_total_limit=2)
    assert checkpoints(folder) == ["checkpoint-1", "checkpoint-2"]
    assert weights(folder) == weights(folder / "checkpoint-2")
    assert all((folder / name / "complete.json").is_file() for name in checkpoints(folder))


@pytest.mark.usefixtures("well_formed")
def test_the_best_adapter_becomes_the_model(run: Callable[..., Path]) -> None:
    folder = run("lora", use_peft=True, lora_r=2, lora_target_modules=".*q_proj")
    found, best, last = (
        load_file(path / "adapter_model.safetensors")
        for path in (folder, folder / "checkpoint-2", folder / "checkpoint-4")
    )
    assert all(torch.equal(found[name], best[name]) for name in best | found)
    assert any(not torch.equal(best[name], last[name]) for name in best)


@pytest.mark.usefixtures("well_formed")
def test_best_within_a_token_budget(run: Callable[..., Path]) -> None:
    """Out of reach: nothing is the best, and the last weights are the model."""
    fields = {"metric_for_best_model": "eval_hgpo/accuracy_at_budget", "max_steps": 3}
    within = run("within", eval_token_budget=8.0, **fields)
    assert weights(within) == weights(within / "checkpoint-2") != weights(within / "checkpoint-3")
    beyond = run("beyond", eval_token_budget=1.0, **fields)
    assert checkpoints(beyond) == ["checkpoint-3"]
    assert weights(beyond) == weights(beyond / "checkpoint-3")


# --- bad input ------------------------------------------------------------------------------------------------------

EVALUATES: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 10}


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_budgets(tmp_path: Path, budget: float) -> None:
    with pytest.raises(ValueError, match=r"eval_token_budget must be a finite number of tokens above 0, or null"):
        HGPOConfig(str(tmp_path), use_cpu=True, bf16=False, eval_token_budget=budget)


@pytest.mark.parametrize("fields", [{"load_best_model_at_end": True}, {"save_strategy": "best"}])
def test_the_best_without_evaluations(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"eval_strategy is no\. Set eval_strategy and eval_data"):
        HGPOConfig(str(tmp_path), use_cpu=True, bf16=False, **fields)


def test_the_best_is_by_hybrid_accuracy_unless_said_otherwise(tmp_path: Path) -> None:
    args = HGPOConfig(str(tmp_path), use_cpu=True, bf16=False, load_best_model_at_end=True, **EVALUATES)
    assert (args.metric_for_best_model, args.greater_is_better) == (BEST_METRIC, True)
    check_evaluation(args, "eval_data")
    plain = HGPOConfig(str(tmp_path), use_cpu=True, bf16=False, **EVALUATES)
    assert plain.metric_for_best_model is None


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("eval_hybrid_accuracy", r"none of the evaluation's metrics.* Did you mean eval_hgpo/hybrid_accuracy\?"),
        ("loss", r"metric_for_best_model='loss' is none .* There are eval_hgpo/hybrid_accuracy, eval_hgpo/hybrid"),
        ("hgpo/accuracy_at_budget", r"\(accuracy_at_budget needs eval_token_budget\)"),
        ("eval_hgpo/accuracy", r"eval_hgpo/accuracy/auto, eval_hgpo/accuracy/sampled"),
    ],
)
def test_an_unknown_metric(tmp_path: Path, metric: str, message: str) -> None:
    args = HGPOConfig(str(tmp_path), use_cpu=True, bf16=False, metric_for_best_model=metric, **EVALUATES)
    with pytest.raises(ValueError, match=message):
        check_evaluation(args, "eval_data")


@pytest.mark.parametrize("metric", ["hgpo/hybrid_accuracy", "eval_hgpo/accuracy/sampled", "hgpo/accuracy_at_budget"])
def test_a_known_metric(tmp_path: Path, metric: str) -> None:
    args = HGPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, metric_for_best_model=metric, eval_token_budget=9.0, **EVALUATES
    )
    check_evaluation(args, "eval_data")


def test_the_names_of_the_metrics_are_those_that_are_computed() -> None:
    one, half = np.ones((1, 2, 1)), np.full(1, 0.5)
    samples = (one, one, half, half, np.zeros(1, dtype=np.int64))
    assert tuple(evaluation_metrics(*samples)) == EVALUATION_METRICS
    assert tuple(evaluation_metrics(*samples, token_budget=1.0)) == (*EVALUATION_METRICS, BUDGET_METRIC)


@pytest.mark.parametrize("figure", [*EVALUATION_METRICS, BUDGET_METRIC])
@pytest.mark.parametrize("metric", ["hgpo/{}", "eval_hgpo/{}", "eval_name_hgpo/{}"])
def test_the_better_end_follows_from_the_figure(tmp_path: Path, figure: str, metric: str) -> None:
    """More accuracy, fewer tokens, less on neither mode, fewer unsolved; of the thinking ratio the user must say."""

    def greater_is_better(**fields: Any) -> bool | None:
        name = metric.format(figure)
        args = HGPOConfig(str(tmp_path), use_cpu=True, bf16=False, metric_for_best_model=name, **EVALUATES, **fields)
        return args.greater_is_better

    right = not figure.startswith(("mean_tokens", "off_mode_mass", "unsolved"))
    if figure == "thinking_ratio":
        with pytest.raises(UserError, match=r"thinking_ratio' has no better end by itself\. Set greater_is_better"):
            greater_is_better()
        assert [greater_is_better(greater_is_better=given) for given in (True, False)] == [True, False]
        return
    assert greater_is_better() is right
    assert greater_is_better(greater_is_better=right) is right
    better = "higher" if right else "lower"
    with pytest.raises(
        UserError, match=rf"greater_is_better={not right} would keep the worst .* is better when {better}"
    ):
        greater_is_better(greater_is_better=not right)


def test_evaluations_without_data_end_the_run_before_anything_is_loaded(tmp_path: Path) -> None:
    words = ["--train_data", "none.parquet", "--output_dir", str(tmp_path), "--model_name_or_path", "none"]
    words += ["--eval_strategy", "steps", "--eval_steps", "5", "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(ValueError, match=r"eval_strategy=steps needs prompts to evaluate on\. Set eval_data"):
        hgpo.main(words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [0, -1])
def test_no_prompts_to_evaluate_on(rows: int) -> None:
    with pytest.raises(ValueError, match=f"eval_prompts must be at least 1, or null for all of eval_data; got {rows}"):
        hgpo.HGPOArguments(train_data="d.parquet", eval_data="e.parquet", eval_prompts=rows)


def test_evaluation_with_continuous_batching(make_trainer: Make) -> None:
    """Transformers leaves the model in training mode; the evaluation goes on as one."""
    trainer = make_trainer(constant, num_generations_eval=8, **CONTINUOUS_BATCHING)
    trainer.model.eval()
    metrics = trainer.evaluate()
    assert metrics["eval_hgpo/accuracy/no_think"] is not None
    assert trainer._buffered_inputs is None, "no prompt of the evaluation waits for a training step"
    assert not trainer._metrics["train"]
