"""HGPO on real prompts: problems with an answer for the rule, general queries without one for a reward model."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from settings import ON_CPU, argv
from tokenizers_zoo import qwen2
from transformers import LlamaConfig, LlamaForSequenceClassification, set_seed

from hgpo_trl.modes import ModeTokens, add_mode_tokens
from hgpo_trl.modes.chat_template import set_chat_template
from hgpo_trl.scripts import hgpo
from hgpo_trl.tasks.embedded import build_model
from hgpo_trl.training.trainer import HGPOTrainer

ROWS = 4  # of each kind; N = 4, so that a step of 16 rows has four queries
SMALL = ON_CPU | {
    "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 24, "max_steps": 2,
    "learning_rate": 1e-3, "logging_steps": 1, "seed": 0, "num_train_epochs": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> list[dict[str, Any]]:
    problems, queries = (
        json.loads((shared_data / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("math_train", "general_queries")
    )
    problems = sorted((row for row in problems if row["answer"]), key=lambda row: len(row["problem"]))[:ROWS]
    queries = sorted(queries, key=lambda row: len(row["instruction"] + row["input"]))[:ROWS]
    texts = [row["problem"] for row in problems]
    texts += [f"{row['instruction']}\n{row['input']}".strip() for row in queries]
    answers = [row["answer"] for row in problems] + [None] * ROWS
    return [
        {"prompt": [{"role": "user", "content": text}], "answer": answer}
        for text, answer in zip(texts, answers, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a tiny policy and a tiny reward model, each with a byte-level tokenizer, which can write anything."""
    root = tmp_path_factory.mktemp("real")
    Dataset.from_list(rows).to_parquet(root / "train.parquet")
    policy = qwen2()
    add_mode_tokens(policy)
    set_chat_template(policy)
    policy.save_pretrained(root / "policy")
    build_model(policy, hidden_size=16, num_heads=2, max_length=512).save_pretrained(root / "policy")
    scorer = qwen2()
    scorer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    scorer.save_pretrained(root / "scorer")
    set_seed(1)
    config = LlamaConfig(
        vocab_size=len(scorer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(root / "scorer")
    return root


def command(folder: Path, output: Path, **fields: Any) -> list[str]:
    paths = {
        "model_name_or_path": folder / "policy", "train_data": folder / "train.parquet", "output_dir": output,
    }  # fmt: skip
    return argv(SMALL | paths | fields)


def test_both_kinds_of_reward_train_one_policy(
    folder: Path, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In no-think a problem gets its reference answer; all other answers are sampled."""
    references = {row["prompt"][0]["content"]: row["answer"] for row in rows}
    generate, calculate = HGPOTrainer._generate_single_turn, HGPOTrainer._calculate_rewards
    rollouts: list[tuple[Any, list, list]] = []

    def in_format(self: HGPOTrainer, prompt_ids: list[list[int]], *args: Any) -> Any:
        ids, log_probs = generate(self, prompt_ids, *args)
        tokens: ModeTokens = self.mode_tokens
        text = self.processing_class.decode
        result = []
        for prompt, row in zip(prompt_ids, ids, strict=True):
            words = [token for token in row[1:] if 20 < token < 200] + [30, 31]
            known = next((answer for query, answer in references.items() if answer and query in text(prompt)), None)
            if row[0] == tokens.think:
                result.append([tokens.think, words[0], tokens.end_think, *words[1:]])
            else:
                words = self.processing_class(known)["input_ids"] if known else words
                result.append([tokens.no_think, *words, tokens.end_no_think])
        return result, log_probs

    def look(self: HGPOTrainer, inputs: list, *args: Any) -> Any:
        rewards = calculate(self, inputs, *args)
        rollouts.append((rewards, [row["answer"] for row in inputs], self._row_modes(len(inputs))))
        return rewards

    monkeypatch.setattr(HGPOTrainer, "_generate_single_turn", in_format)
    monkeypatch.setattr(HGPOTrainer, "_calculate_rewards", look)
    found = {}
    monkeypatch.setattr(hgpo, "train_and_save", lambda trainer, _: found.update(trainer=trainer, run=trainer.train()))
    hgpo.main(command(folder, tmp_path / "run", reward_model=folder / "scorer"))

    seen = {True: 0, False: 0}
    for rewards, answers, modes in rollouts:
        for (rule, score), answer, mode in zip(rewards.tolist(), answers, modes, strict=True):
            seen[answer is not None] += 1
            if answer is not None:
                assert score != score, "the rule is in charge"
                assert rule == 1.0 if mode == 1 else rule in (0.0, 1.0)
            else:
                assert rule != rule
                assert 0 < score < 1
    assert seen == {True: 16, False: 16}
    log = [entry for entry in found["trainer"].state.log_history if "loss" in entry]
    assert len(log) == 2
    for entry in log:
        assert all(value == value for key, value in entry.items() if key.startswith("hgpo/"))
        assert entry["grad_norm"] > 0
        assert entry["hgpo/format_faults/think"] == entry["hgpo/format_faults/no_think"] == 0.0
    assert {name for name in log[0] if name.endswith("/mean") and name.startswith("rewards/")} == {
        "rewards/accuracy_reward/mean", "rewards/reward_model/mean",
    }  # fmt: skip


def test_rows_without_an_answer_need_somebody_to_score_them(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_data: 4 of 8 rows have no `answer`.*Name a reward_model"):
        hgpo.main(command(folder, tmp_path / "run"))


def test_a_reward_model_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward_model='\./nowhere': there is no such folder"):
        hgpo.main(command(folder, tmp_path / "run", reward_model="./nowhere"))
