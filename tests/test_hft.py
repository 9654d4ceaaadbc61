"""Stage I on rows of unequal length: the gradient of one big batch, and P(think) as the share of think examples."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TASK
from datasets import Dataset, IterableDataset
from settings import ON_CPU, argv
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import mode_tokens
from hgpo_trl.modes.decision import read_decision
from hgpo_trl.scripts import hft
from hgpo_trl.tasks.embedded import Query, build_model, draw, hft_dataset, prompt_dataset
from hgpo_trl.training.hft import HFTTrainer, row_lengths

EXAMPLES = ["prompt", "completion"]


@pytest.fixture(scope="module")
def examples() -> Dataset:
    """Half think; a trace has 16 to 51 tokens, a no-think response 4."""
    return hft_dataset(draw(TASK, 512, held_out=False, fraction=0.2, seed=0), 0.5, seed=0).select_columns(EXAMPLES)


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., SFTTrainer]:
    """A trainer of a model of 16 dimensions."""

    def make(dataset: Any, cls: type[SFTTrainer] = HFTTrainer, dtype: str = "float32", **fields: Any) -> SFTTrainer:
        model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2).to(getattr(torch, dtype))
        settings = ON_CPU | {"output_dir": str(tmp_path), "max_length": 128, "max_steps": 1}
        return cls(model=model, args=SFTConfig(**settings | fields), train_dataset=dataset, processing_class=tokenizer)

    return make


def steps_of(trainer: SFTTrainer, epoch: int = 0) -> list[list[list[int]]]:
    """The lengths of an epoch's rows: `[optimizer step][micro-batch][row]`."""
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    batches = [batch["attention_mask"].sum(dim=1).tolist() for batch in loader]
    num = trainer.args.gradient_accumulation_steps
    return [batches[start : start + num] for start in range(0, len(batches), num)]


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sorted_micro_batches_have_the_gradient_of_one_batch(
    loss_type: str, examples: Dataset, make: Callable[..., SFTTrainer]
) -> None:
    """Rows of a mode are in micro-batches of their own; every token still weighs 1/T, over the T tokens of the step."""

    def weights(**fields: Any) -> dict[str, torch.Tensor]:
        fields |= {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        trainer = make(examples.select(range(32)), dtype="float64", loss_type=loss_type, **fields)
        trainer.train()
        return trainer.model.state_dict()

    whole = weights(per_device_train_batch_size=32)
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    parts = weights(train_sampling_strategy="batch_rebalance", **fields)
    before = make(examples.select(range(32)), dtype="float64").model.state_dict()
    for name, weight in whole.items():
        assert not torch.equal(weight, before[name])
        torch.testing.assert_close(parts[name] - before[name], weight - before[name], rtol=1e-5, atol=1e-8)


def test_rows_are_sorted_within_a_step_alone(examples: Dataset, make: Callable[..., SFTTrainer]) -> None:
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    trainer = make(examples.select(range(200)), train_sampling_strategy="batch_rebalance", **fields)
    steps = steps_of(trainer)
    rows = [[length for batch in step for length in batch] for step in steps]
    assert [len(step) for step in rows] == [32] * 6 + [8], "the last step has what is left"
    assert all(len(step) == 8 for step in steps), "as many micro-batches as in every other step"
    assert sorted(length for step in rows for length in step) == sorted(row_lengths(trainer.train_dataset)), (
        "every row once"
    )
    padded = sum(max(batch) * len(batch) for step in steps for batch in step)
    unsorted = steps_of(make(examples.select(range(200)), **fields))
    assert padded < 1.2 * sum(map(sum, rows))
    assert sum(max(batch) * len(batch) for step in unsorted for batch in step) > 1.4 * sum(map(sum, rows))
    for step in rows[:-1]:
        assert 6 <= sum(length > 30 for length in step) <= 26, "rows of both modes in every step"


def test_order_follows_seed_and_epoch(examples: Dataset, make: Callable[..., SFTTrainer]) -> None:
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}

    def order(epoch: int = 0, **seeds: int) -> list[list[list[int]]]:
        rows = examples.select(range(64))
        return steps_of(make(rows, train_sampling_strategy="batch_rebalance", **fields, **seeds), epoch)

    assert order(seed=1) == order(seed=1) == order(seed=2, data_seed=1)
    assert order(seed=1) != order(seed=2)
    assert order(seed=1) != order(1, seed=1)


def test_lengths_are_those_of_the_rows(examples: Dataset, make: Callable[..., SFTTrainer]) -> None:
    dataset = make(examples).train_dataset
    assert row_lengths(dataset) == [len(ids) for ids in dataset["input_ids"]]
    some = dataset.select([3, 400, 7])
    assert row_lengths(some) == [len(ids) for ids in some["input_ids"]]


@pytest.mark.parametrize("fields", [{}, {"packing": True}], ids=["rows", "packed"])
def test_other_ways_of_drawing_rows_are_trls(
    fields: dict[str, Any], examples: Dataset, make: Callable[..., SFTTrainer]
) -> None:
    """The same first losses as SFTTrainer's."""
    losses = []
    for cls in (SFTTrainer, HFTTrainer):
        trainer = make(examples.select(range(40)), cls, max_steps=2, logging_steps=1, **fields)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_streams_keep_their_order(examples: Dataset, make: Callable[..., SFTTrainer]) -> None:
    stream: IterableDataset = examples.select(range(16)).to_iterable_dataset()
    trainer = make(stream, train_sampling_strategy="batch_rebalance", per_device_train_batch_size=4)
    trainer.train()
    assert trainer.state.global_step == 1


def sums(num: int, seed: int) -> Iterator[Query]:
    """Queries of the easiest level: a think response has 16 tokens, a no-think response 4."""
    rng = random.Random(seed)
    return (TASK.sample(1, rng) for _ in range(num))


def thinks(rows: Dataset, cls: type[SFTTrainer], strategy: str, make: Callable[..., SFTTrainer]) -> float:
    """Mean P(think) after training on some rows."""
    fields = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_steps": 90, "seed": 0}
    fields |= {"learning_rate": 2e-2, "adam_beta2": 0.98, "lr_scheduler_type": "linear"}
    trainer = make(rows.select_columns(EXAMPLES), cls, train_sampling_strategy=strategy, **fields)
    trainer.train()
    tokenizer, queries = trainer.processing_class, list(prompt_dataset(sums(64, seed=1))["prompt"])
    kwargs = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    prompts = tokenizer.apply_chat_template(queries, **kwargs)
    trainer.model.eval()
    return read_decision(trainer.model, **prompts, tokens=mode_tokens(tokenizer)).think.mean().item()


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_model_thinks_as_often_as_its_examples(share: float, make: Callable[..., SFTTrainer]) -> None:
    rows = hft_dataset(sums(960, seed=0), share, seed=0)
    in_data = sum(mode == "think" for mode in rows["mode"]) / len(rows)
    assert thinks(rows, HFTTrainer, "batch_rebalance", make) == pytest.approx(in_data, abs=0.05)


def test_steps_of_like_length_tilt_the_decision(make: Callable[..., SFTTrainer]) -> None:
    """Why HFTTrainer refuses them: half of the examples think, and a quarter of the mass does."""
    rows = hft_dataset(sums(960, seed=0), 0.5, seed=0)
    assert thinks(rows, SFTTrainer, "group_by_length", make) < 0.35


def test_steps_of_one_mode_are_refused(
    examples: Dataset, make: Callable[..., SFTTrainer], model_dir: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"group_by_length.*Use batch_rebalance"):
        make(examples, train_sampling_strategy="group_by_length")
    examples.to_parquet(tmp_path / "hft.parquet")
    fields = {"model_name_or_path": model_dir, "train_data": tmp_path / "hft.parquet", "output_dir": tmp_path / "run"}
    with pytest.raises(UserError, match="group_by_length"):
        hft.main(argv(ON_CPU | fields | {"train_sampling_strategy": "group_by_length"}))
