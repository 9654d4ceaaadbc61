"""Length-sorted, trimmed micro-batches: the same rows, the same gradient, less padding."""

import itertools
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from settings import ON_CPU

from hgpo_trl.common.errors import UserError
from hgpo_trl.training.config import HGPOConfig
from hgpo_trl.training.idle_tokens import mask_idle
from hgpo_trl.training.losses import DIVISORS
from hgpo_trl.training.micro_batches import Batch, sort_and_trim, sorted_chunks, trim
from hgpo_trl.training.trainer import HGPOTrainer


def rollout(prompt_lengths: list[int], completion_lengths: list[int]) -> Batch:
    """A rollout dict as TRL makes it; token values name their row and place."""
    rows, p, t = len(prompt_lengths), max(prompt_lengths), max(completion_lengths)
    prompt_mask = torch.tensor([[0] * (p - n) + [1] * n for n in prompt_lengths])
    completion_mask = torch.tensor([[1] * n + [0] * (t - n) for n in completion_lengths])
    prompt_ids = (torch.arange(rows)[:, None] * 100 + torch.arange(p) + 1) * prompt_mask
    completion_ids = (torch.arange(rows)[:, None] * 100 + torch.arange(t) + 50) * completion_mask
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": completion_ids.float(),
        "importance_sampling_ratio": torch.arange(rows)[:, None].float(),
        "num_items_in_batch": completion_mask.sum(),
        "old_per_token_logps": None,
    }


def contents(batches: list[Batch]) -> list[tuple]:
    """Each row's real tokens, its advantages and ratio: what must survive regrouping."""
    rows = []
    for batch in batches:
        for i in range(len(batch["prompt_ids"])):
            real = batch["completion_mask"][i].bool()
            rows.append(
                (
                    batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist(),
                    batch["completion_ids"][i][real].tolist(),
                    batch["advantages"][i][real].tolist(),
                    batch["importance_sampling_ratio"][i].item(),
                )
            )
    return rows


def cut(batch: Batch, num_batches: int) -> list[Batch]:
    size = len(batch["prompt_ids"]) // num_batches
    return [
        {
            name: value[i * size : (i + 1) * size] if isinstance(value, torch.Tensor) and value.dim() else value
            for name, value in batch.items()
        }
        for i in range(num_batches)
    ]


@given(data=st.data())
def test_regrouping_keeps_every_row_within_its_optimizer_step(data: st.DataObject) -> None:
    num_batches = data.draw(st.integers(1, 6))
    rows = num_batches * data.draw(st.integers(1, 3))
    per_step = data.draw(st.integers(1, 8))
    lengths = st.lists(st.integers(1, 9), min_size=rows, max_size=rows)
    batches = cut(rollout(data.draw(lengths), data.draw(lengths)), num_batches)
    result = sort_and_trim(batches, per_step)
    assert [len(batch["prompt_ids"]) for batch in result] == [rows // num_batches] * num_batches
    for step in range(0, num_batches, per_step):
        if num_batches % per_step == 0 or per_step % num_batches == 0:
            assert sorted(contents(result[step : step + per_step])) == sorted(contents(batches[step : step + per_step]))
    assert sorted(contents(result)) == sorted(contents(batches))
    for batch in result:
        assert batch["prompt_mask"][:, 0].any(), "no column of padding on the left"
        assert batch["completion_mask"][:, -1].any(), "none on the right"
        assert batch["num_items_in_batch"] == batches[0]["num_items_in_batch"]


def test_like_lengths_meet() -> None:
    batches = cut(rollout([3] * 8, [9, 1, 9, 1, 9, 1, 9, 1]), 4)
    widths = sorted(batch["completion_ids"].shape[1] for batch in sort_and_trim(batches, 4))
    assert widths == [1, 1, 9, 9]
    assert [batch["completion_ids"].shape[1] for batch in sort_and_trim(batches, 4, sort=False)] == [9] * 4


@settings(max_examples=50)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=8, max_size=8), min_size=2, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_processes_with_one_order_wait_as_little_as_they_can(lengths: list[list[int]], seed: int) -> None:
    """In lock-step each micro-batch takes as long as the widest; no other order of each process's own is shorter."""

    def widths(completion_lengths: list[int]) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        order = partial(torch.randperm, generator=generator)
        batches = sort_and_trim(cut(rollout([3] * 8, completion_lengths), 4), 4, permutation=order)
        return [batch["completion_ids"].shape[1] for batch in batches]

    def waited(processes: Iterable[Iterable[int]]) -> int:
        return sum(map(max, zip(*processes, strict=True)))

    first, *others = map(widths, lengths)
    found = waited([first, *others])
    for orders in itertools.product(*(itertools.permutations(other) for other in others)):
        assert found <= waited([first, *orders])


def test_one_process_shuffles_by_the_global_random_numbers() -> None:
    """So that a seed's run stays the same run."""
    batches = cut(rollout([3] * 8, [1, 2, 3, 4, 5, 6, 7, 8]), 4)
    torch.manual_seed(5)
    found = [batch["completion_ids"].shape[1] for batch in sort_and_trim(batches, 4)]
    torch.manual_seed(5)
    assert found == [[2, 4, 6, 8][place] for place in torch.randperm(4)]


def test_trim_keeps_multiples_and_one_token() -> None:
    batch = rollout([2, 5], [3, 7])
    batch["completion_mask"].zero_()  # all responses truncated and masked
    assert trim(batch)["completion_ids"].shape[1] == 1
    batch = trim(
        {name: v[:1] if torch.is_tensor(v) and v.dim() else v for name, v in rollout([2, 9], [3, 9]).items()}, 4
    )
    assert (batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]) == (4, 4)


def test_sorted_chunks_cover_all_real_tokens() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    seen = torch.zeros_like(mask)
    for rows, first, last in sorted_chunks(mask, 2):
        assert not mask[rows][:, :first].any()
        assert not mask[rows][:, last:].any()
        seen[rows] += 1
    assert (seen == 1).all()


@given(data=st.data())
def test_idle_tokens_are_those_behind_the_last_advantage(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    batch = rollout([1] * len(lengths), lengths)
    shape = batch["completion_mask"].shape
    values = st.lists(st.sampled_from([0.0, 0.0, -1.0, 2.0]), min_size=shape.numel(), max_size=shape.numel())
    batch["advantages"] = torch.tensor(data.draw(values)).view(shape)
    batch["tool_mask"] = torch.tensor(data.draw(values)).view(shape).ne(-1.0).long()
    divided = data.draw(st.booleans())
    found = mask_idle(batch, divided_by_length=divided)
    for row, length in enumerate(lengths):
        told = [
            column for column in range(length) if batch["advantages"][row, column] and batch["tool_mask"][row, column]
        ]
        kept = told[-1] + 1 if told else 0
        assert found["completion_mask"][row].tolist() == [1] * kept + [0] * (shape[1] - kept)
        counted = batch["tool_mask"][row, :length].sum().item()
        left = batch["tool_mask"][row, :kept].sum().item()
        share = left / max(counted, 1) if divided else 1.0
        torch.testing.assert_close(found["advantages"][row, :kept], batch["advantages"][row, :kept] * share)


def test_a_response_has_one_advantage_under_other_rules() -> None:
    batch = rollout([1, 1], [3, 2])
    batch["advantages"] = torch.tensor([0.0, 2.0])
    found = mask_idle(batch, divided_by_length=True)
    assert found["completion_mask"].tolist() == [[0, 0, 0], [1, 1, 0]]
    assert found["advantages"][1].tolist() == [2.0] * 3


# --- in the trainer -------------------------------------------------------------------------------------------------


def by_content(completions: list, **kwargs: Any) -> list[float]:
    return [float(zlib.crc32(completion[0]["content"].encode()) % 3) for completion in completions]


@pytest.fixture
def gradient(
    model_dir: str, prompts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, torch.Tensor]]:
    """The accumulated gradient of one optimizer step on one rollout, trimmed or as stock TRL computes it."""

    def measure(
        trim_micro_batches: bool, reward: Callable[..., list[float]] = by_content, **config: Any
    ) -> dict[str, torch.Tensor]:
        settings = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "num_generations": 8,
            "max_completion_length": 12,
            "max_steps": 1,
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
            "weight_decay": 0.0,
            "beta": 0.1,
        }
        args = HGPOConfig(**(ON_CPU | settings | config), trim_micro_batches=trim_micro_batches)
        trainer = HGPOTrainer(model_dir, reward, args, prompts)
        generate = GENERATE

        def short_and_long(self: HGPOTrainer, prompt_ids: list, *rest: Any) -> tuple[list[list[int]], None]:
            """Fixed completions of very different lengths, the same for both runs."""
            completions, _ = generate(self, prompt_ids, *rest)
            mixed = [ids[: 1 + (7 * row) % 12] for row, ids in enumerate(completions)]
            return mixed, None

        monkeypatch.setattr(HGPOTrainer, "_generate_single_turn", short_and_long)
        gradients: dict[str, torch.Tensor] = {}

        def keep(*_: Any, **__: Any) -> None:
            held = ([part] if isinstance(part, dict) else part for part in trainer._buffered_inputs)
            computed = sum(batch["completion_mask"].sum().item() for batch in itertools.chain(*held))
            gradients["tokens"] = torch.tensor(float(computed))
            gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(keep)
        trainer.train()
        return gradients

    return measure


GENERATE = HGPOTrainer._generate_single_turn


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "bnpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_gradient_is_that_of_the_padded_batch(gradient: Callable, loss_type: str) -> None:
    stock, trimmed = gradient(False, loss_type=loss_type), gradient(True, loss_type=loss_type)
    assert stock.keys() == trimmed.keys()
    assert any(value.abs().max() > 0 for value in stock.values())
    for name, value in stock.items():
        torch.testing.assert_close(trimmed[name], value, rtol=1e-4, atol=1e-7 + 1e-5 * value.abs().max().item())


@pytest.mark.parametrize(
    ("max_tokens", "config"),
    [
        *((60, {"loss_type": loss_type}) for loss_type in DIVISORS),
        (1000, {"loss_type": "dr_grpo"}),  # all rows in one micro-batch, in place of four
        (60, {"loss_type": "grpo", "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}),
        (60, {"loss_type": "dapo", "gradient_accumulation_steps": 2, "steps_per_generation": 4}),
        (60, {"loss_type": "grpo", "beta": 0.0}),  # without the tokens that have no gradient
        (60, {"loss_type": "dr_grpo", "mask_truncated_completions": True, "pad_to_multiple_of": 8}),
    ],
)
def test_gradient_by_tokens_is_that_of_the_padded_batch(
    gradient: Callable, max_tokens: int, config: dict[str, Any]
) -> None:
    stock, by_tokens = gradient(False, **config), gradient(True, micro_batch_tokens=max_tokens, **config)
    assert by_tokens.pop("tokens") <= stock.pop("tokens")
    assert any(value.abs().max() > 0 for value in stock.values())
    for name, value in stock.items():
        torch.testing.assert_close(by_tokens[name], value, rtol=1e-4, atol=1e-7 + 1e-5 * value.abs().max().item())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1 token, or null"),
        ({"loss_type": "bnpo"}, "loss_type=bnpo depends on which rows share one. Set loss_type to grpo or dr_grpo"),
        ({"entropy_coef": 0.01}, "entropy_coef=0.01 depends on .* Set entropy_coef to 0.0, or micro_batch_tokens to"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 depends on"),
        ({"trim_micro_batches": False}, "Set trim_micro_batches to true"),
    ],
)
def test_by_tokens_refuses_what_depends_on_the_micro_batch(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        HGPOConfig(str(tmp_path), **(ON_CPU | {"micro_batch_tokens": 100} | config))


@pytest.mark.parametrize(
    "config",
    [
        {"mask_truncated_completions": True},
        {"pad_to_multiple_of": 8},
        {"top_entropy_quantile": 0.5},
        {"entropy_coef": 0.01},
        {"num_iterations": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
    ],
)
def test_gradient_under_other_settings(gradient: Callable, config: dict[str, Any]) -> None:
    stock, trimmed = gradient(False, **config), gradient(True, **config)
    for name, value in stock.items():
        torch.testing.assert_close(trimmed[name], value, rtol=1e-4, atol=1e-7 + 1e-5 * value.abs().max().item())


def for_some_prompts(prompts: list, completions: list, **kwargs: Any) -> list[float]:
    """As by_content, but one for all responses to half of the prompts."""
    alike = [zlib.crc32(prompt[0]["content"].encode()) % 2 for prompt in prompts]
    return [1.0 if same else reward for same, reward in zip(alike, by_content(completions), strict=True)]


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "bnpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_tokens_without_a_gradient_are_not_computed(gradient: Callable, loss_type: str) -> None:
    config = {"loss_type": loss_type, "beta": 0.0, "reward": for_some_prompts}
    stock, trimmed = gradient(False, **config), gradient(True, **config)
    computed, of_all = trimmed.pop("tokens"), stock.pop("tokens")
    assert computed == of_all if loss_type in ("bnpo", "vespo") else computed < 0.8 * of_all
    for name, value in stock.items():
        torch.testing.assert_close(trimmed[name], value, rtol=1e-4, atol=1e-7 + 1e-5 * value.abs().max().item())


@pytest.mark.parametrize(
    "config", [{"importance_sampling_level": "sequence"}, {"off_policy_mask_threshold": 0.5}, {"entropy_coef": 0.01}]
)
def test_tokens_that_others_depend_on_are_computed(gradient: Callable, config: dict[str, Any]) -> None:
    config = {**config, "loss_type": "dapo", "beta": 0.0, "reward": for_some_prompts}
    stock, trimmed = gradient(False, **config), gradient(True, **config)
    assert stock["tokens"] == trimmed["tokens"]
    for name, value in stock.items():
        torch.testing.assert_close(trimmed[name], value, rtol=1e-4, atol=1e-7 + 1e-5 * value.abs().max().item())
