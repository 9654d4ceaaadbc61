"""The rules that `benchmarks/rollout_tokens.py` compares with HGPO, against cases worked out by hand."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from settings import TWO_QUERIES, rollout_of_two_queries

from hgpo_trl import HGPOConfig
from hgpo_trl.rewards import accuracy_reward

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import rollout_tokens
from mode_rules import REFERENCE, RULES, Counting

# --- in the trainer -----------------------------------------------------------------------------------------------


def build(rule: str, model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path, **fields: Any) -> Any:
    config = HGPOConfig(**TWO_QUERIES | {"output_dir": str(tmp_path), **RULES[rule].fields, **fields})
    return Counting(
        model=model_dir,
        reward_funcs=[accuracy_reward],
        args=config,
        train_dataset=prompts,
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("rule", ["grpo", "thinkless"])
def test_free_rules_count_every_token(
    rule: str, model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = build(rule, model_dir, prompts, tokenizer, tmp_path)
    output = rollout_of_two_queries(trainer, prompts)
    assert trainer.rollout_tokens == int(output["completion_mask"].sum())


@pytest.mark.parametrize("rule", ["hgpo", "adaptthink"])
def test_forced_tokens_are_not_counted(
    rule: str, model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path
) -> None:
    prompts = prompts.add_column(REFERENCE, [0.5] * len(prompts))
    trainer = build(rule, model_dir, prompts, tokenizer, tmp_path)
    output = rollout_of_two_queries(trainer, prompts)
    assert trainer.rollout_tokens == int(output["completion_mask"].sum()) - 16
    assert trainer.rollout_tokens == sum(trainer._metrics["train"]["hgpo/rollout_tokens"])


def test_lazy_thinking_counts_what_it_samples(
    model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hgpo_trl.training.lazy.decided_without_think", lambda rewards, margin: torch.tensor([True, False])
    )
    trainer = build("lazy", model_dir, prompts, tokenizer, tmp_path)
    output = rollout_of_two_queries(trainer, prompts)
    lengths = output["completion_mask"].sum(dim=1)
    assert lengths[:4].tolist() == [1] * 4  # the think responses of the decided query: forced tokens, not counted
    assert trainer.rollout_tokens == int(lengths.sum()) - 16


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains(rule: str, model_dir: str, prompts: Dataset, tokenizer: Any, tmp_path: Path) -> None:
    prompts = prompts.add_column(REFERENCE, [0.5] * len(prompts))
    trainer = build(rule, model_dir, prompts, tokenizer, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.rollout_tokens > 0


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
