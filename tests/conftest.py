"""Tiers of the tests, and a tiny chain-sum model, untrained, with its prompts."""

import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, settings
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

from hgpo_trl.evaluation.samples import RECORD, SAMPLES, prompts_hash
from hgpo_trl.modes import ModeTokens, format_response
from hgpo_trl.tasks.embedded import build_model, build_tokenizer, draw, load_task, prompt_dataset
from hgpo_trl.training.trainer import HGPOTrainer

TASK = load_task("hgpo_trl.tasks.chain_sum")

# How long an example takes is a matter of the machine.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# ----------------------------------------------------------------------------- tiers (markers, see pyproject.toml)

TIERS = ("unit", "processes", "engine")
VERIFIER = "hgpo_trl.verification"
STARTED: list[str] = []  # commands that this process has started


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    """Note a start of Python or of a shell; what libraries ask a machine about itself is no concern of the tiers.

    The verifier's server, which the first check of a session starts, and workers of multiprocessing belong to a unit.
    """
    if event == "subprocess.Popen":
        program, command = arguments[:2]
        text = command if isinstance(command, str) else " ".join(map(str, command))
        if Path(os.fsdecode(program)).name.startswith(("python", "bash", "make")) and VERIFIER not in text:
            STARTED.append(text)


sys.addaudithook(_record)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test one tier: the one that it or its module names, or else unit. Skip engines without vLLM."""
    for item in items:
        named = {mark.name for mark in item.iter_markers() if mark.name in TIERS}
        if len(named) > 1:
            raise pytest.UsageError(f"{item.nodeid} has the tiers {', '.join(sorted(named))}; leave one marker")
        if not named:
            item.add_marker(pytest.mark.unit)
        if "engine" in named and find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed (the extra `vllm`)"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    STARTED.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a unit test that started a program, itself or by a fixture."""
    result = yield
    if item.get_closest_marker("unit") and STARTED:
        pytest.fail(f"mark this test processes or engine: it starts {STARTED[0]!r}", pytrace=False)
    return result


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(TASK)


@pytest.fixture(scope="session")
def model_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained model of 16 dimensions, saved with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    model: LlamaForCausalLM = build_model(tokenizer, hidden_size=16, num_heads=2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def prompts() -> Dataset:
    """32 prompts of the training part, with answer and level."""
    return prompt_dataset(draw(TASK, 32, held_out=False, fraction=0.2, seed=0))


def well_formed_ids(ids: list[int], tokens: ModeTokens, fillers: list[int]) -> list[int]:
    """A response in its mode's format, of the words that were sampled, as far as they are words."""
    words = [token for token in ids[1:] if token in fillers]
    words += fillers[: max(0, 2 - len(words))]
    if ids[0] == tokens.think:
        return [tokens.think, words[0], tokens.end_think, *words[1:]]
    return [tokens.no_think, *words, tokens.end_no_think]


@pytest.fixture
def well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled responses in their mode's format; an untrained model's are nearly all malformed, and so all worth 0."""
    generate = HGPOTrainer._generate_single_turn

    def repaired(self: HGPOTrainer, *args: Any) -> Any:
        ids, log_probs = generate(self, *args)
        tokens, tokenizer = self.mode_tokens, self.processing_class
        fillers = tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)])
        return [well_formed_ids(row, tokens, fillers) for row in ids], log_probs

    monkeypatch.setattr(HGPOTrainer, "_generate_single_turn", repaired)


@pytest.fixture(scope="session")
def reward_model_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random reward model with a tokenizer and chat template."""
    path = tmp_path_factory.mktemp("reward_model")
    set_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_labels=1, max_position_embeddings=128, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def hft_samples(prompts: Dataset, tmp_path: Path) -> dict[str, str]:
    """Fields of a baseline on samples as `hgpo-trl evaluate` leaves them.

    Thinking is always right, no-think for even prompts alone; the data set is `prompts`.
    """
    data, folder = tmp_path / "queries.parquet", tmp_path / "samples"
    folder.mkdir()
    prompts.to_parquet(data)
    rows = []
    for i, answer in enumerate(prompts["answer"]):
        right = format_response("think", answer, "a + 1 = 1")
        short = format_response("no_think", answer if i % 2 == 0 else "10")
        for sample in range(2):
            common = {"prompt_id": i, "sample": sample, "truncated": False, "faults": []}
            rows.append(common | {"mode": "think", "completion": right, "reward": 1.0})
            rows.append(common | {"mode": "no_think", "completion": short, "reward": float(i % 2 == 0)})
    pd.DataFrame(rows).to_parquet(folder / SAMPLES)
    (folder / "report.json").write_text(json.dumps({"dataset": str(data)}), encoding="utf-8")
    record = {"num_prompts": len(prompts), "prompts": prompts_hash(prompts["prompt"])}
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    return {"train_data": str(data), "samples": str(folder), "output_dir": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real problems and answers beside the checkout; the test is skipped where there are none."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no real data: ../shared/data is missing")
    return path
