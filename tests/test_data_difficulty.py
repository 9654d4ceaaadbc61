"""The difficulty filter: which rewards teach something, and measuring them with a model, interrupted or not."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hgpo_trl.data.example import Drop
from hgpo_trl.evaluation import difficulty, transformers_backend
from hgpo_trl.evaluation.difficulty import DifficultyArguments, check_model, informative, measure, pass_rates, verdicts
from hgpo_trl.training.advantages import assign_rewards

NAN = math.nan


# --- Which rewards teach something ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("think", "no_think", "margin", "expected"),
    [
        ([1, 1], [1, 1], 0.2, False),  # too easy: no think by the margin alone
        ([0, 0], [0, 0], 0.2, False),  # too hard
        ([1, 1], [0, 0], 0.2, True),  # thinking pays
        ([0, 0], [1, 1], 0.2, True),  # thinking hurts
        ([1, 0], [0, 0], 0.2, True),  # one response is better than another
        ([0, 0], [0, 1], 0.2, True),
        ([1, 0], [1, 0], 0.2, True),
        ([0.5, 0.5], [0.3, 0.3], 0.2, False),  # a gap of exactly the margin is none
        ([0.51, 0.51], [0.3, 0.3], 0.2, True),
        ([0.3, 0.3], [0.4, 0.4], 0.2, True),  # no think needs no margin to win
        ([1, 1], [0, 0], 1.0, False),
        ([0, 0], [1, 1], 1.0, True),
        ([NAN, NAN], [NAN, NAN], 0.2, False),
        ([NAN, NAN], [1, 1], 0.2, False),  # nothing to compare with
        ([NAN, NAN], [1, 0], 0.2, True),
        ([NAN, 1], [1, NAN], 0.2, False),
        ([NAN, 1], [0, NAN], 0.2, True),
    ],
)
def test_informative_by_hand(think: list[float], no_think: list[float], margin: float, expected: bool) -> None:
    assert informative(np.array([[think, no_think]], dtype=float), margin).tolist() == [expected]


def reference(query: NDArray[np.float64], margin: float) -> bool:
    """The definition, with lists."""
    modes = [[reward for reward in mode if not math.isnan(reward)] for mode in query.tolist()]
    if any(len(set(mode)) > 1 for mode in modes):
        return True
    if not all(modes):
        return False
    think, no_think = (math.fsum(mode) / len(mode) for mode in modes)
    return think - no_think > margin + 1e-6 or no_think - think > 1e-6


REWARDS = st.sampled_from([0.0, 0.25, 0.5, 1.0, -2.0, NAN])
SHAPES = st.tuples(st.integers(0, 6), st.just(2), st.integers(1, 4))
QUERIES = arrays(np.float64, SHAPES, elements=REWARDS)


@given(QUERIES, st.sampled_from([0.0, 0.2, 0.25, 1.0]))
def test_informative_is_its_definition(rewards: NDArray[np.float64], margin: float) -> None:
    assert informative(rewards, margin).tolist() == [reference(query, margin) for query in rewards]


@given(QUERIES.filter(lambda rewards: len(rewards) > 0), st.sampled_from([0.0, 0.2, 1.0]))
def test_what_is_uninformative_trains_nothing_but_the_margin(rewards: NDArray[np.float64], margin: float) -> None:
    """By the trainer's own functions: r_intra is the same for all of a mode, and no think wins, or nobody."""
    r_inter, r_intra = assign_rewards(torch.from_numpy(rewards), margin)
    for query in np.flatnonzero(~informative(rewards, margin)):
        assert not r_inter[query, 0].any()
        for mode in range(2):
            valid = ~np.isnan(rewards[query, mode])
            assert len(set(r_intra[query, mode][torch.from_numpy(valid)].tolist())) <= 1


@given(QUERIES)
def test_pass_rates(rewards: NDArray[np.float64]) -> None:
    for query, rates in zip(rewards, pass_rates(rewards), strict=True):
        for mode, rate in zip(query, rates, strict=True):
            valid = mode[~np.isnan(mode)]
            assert rate == pytest.approx(valid.mean() if len(valid) else NAN, nan_ok=True)


def test_verdicts() -> None:
    rewards = np.array([[[1, 1], [1, 1]], [[1, 1], [0, 0]], [[NAN, NAN], [NAN, NAN]], [[NAN, NAN], [0, 0]]])
    too_easy = Drop("uninformative", {"pass_rate_think": 1.0, "pass_rate_no_think": 1.0})
    half = Drop("uninformative", {"pass_rate_think": None, "pass_rate_no_think": 0.0})
    assert verdicts(rewards, 0.2) == [too_easy, None, None, half]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[Q, 2, k\].*\[4, 3, 2\]"):
        informative(np.zeros((4, 3, 2)), 0.2)
    with pytest.raises(ValueError, match="margin must be a finite number of at least 0"):
        informative(np.zeros((4, 2, 2)), -0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("difficulty_samples_per_mode", 1), ("difficulty_max_new_tokens", 1), ("difficulty_margin", -1.0),
        ("difficulty_margin", math.inf), ("difficulty_batch_size", 0), ("difficulty_backend", "sglang"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*{value}"):
        DifficultyArguments(**{field: value})


# --- Measuring them -------------------------------------------------------------------------------------------

# What follows what, in a model that knows nothing else: without thinking it answers 3, thinking 1 or 2.
NEXT = {
    "<no_think>": ["3"], "3": ["</no_think>"], "</no_think>": ["<eos>"],
    "<think>": ["</think>"], "</think>": ["1", "2"], "1": ["<eos>"], "2": ["<eos>"],
}  # fmt: skip
PLANTED = [
    # reference answer, pass rate thinking, pass rate not thinking, is it informative
    ("3", 0.0, 1.0, True),
    ("7", 0.0, 0.0, False),
    ("1", 0.5, 0.0, True),
    (None, NAN, NAN, False),
    (" ", NAN, NAN, False),
]


@pytest.fixture(scope="module")
def markov_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama that looks at the last token alone: its one layer adds nothing, its output embedding is `NEXT`."""
    size = len(tokenizer) + len(tokenizer) % 2
    config = LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, followers in NEXT.items():
            for follower in followers:
                last, first = tokenizer.convert_tokens_to_ids([token, follower])
                model.lm_head.weight[first, last] = 100 / math.sqrt(size)  # RMSNorm makes a one of length 1 sqrt(size)
    path = tmp_path_factory.mktemp("markov")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def planted(prompts: Dataset, rows: int) -> Dataset:
    """Prompts of the embedded task with answers that make them as hard as `PLANTED` says."""
    answers = [PLANTED[row % len(PLANTED)][0] for row in range(rows)]
    return prompts.select(range(rows)).select_columns(["prompt"]).add_column("answer", answers)


def arguments(model: str, **changes: Any) -> DifficultyArguments:
    fields = {"samples_per_mode": 8, "max_new_tokens": 6, "dtype": "float32"} | changes
    return DifficultyArguments(difficulty_model=model, **{f"difficulty_{key}": value for key, value in fields.items()})


def test_planted_difficulty_is_found(markov_dir: str, prompts: Dataset, tmp_path: Path) -> None:
    rows = 30
    args = arguments(markov_dir, samples_per_mode=16)
    check_model(args)
    rewards = measure(planted(prompts, rows), args, tmp_path)
    assert rewards.shape == (rows, 2, 16)
    rates, kept = pass_rates(rewards), informative(rewards, args.difficulty_margin)
    for row in range(rows):
        _, think, no_think, expected = PLANTED[row % len(PLANTED)]
        assert rates[row, 1] == pytest.approx(no_think, nan_ok=True)
        if think == 0.5:
            assert 0.0 < rates[row, 0] < 1.0  # 2 in 65,536 would fail; the seed is fixed
        else:
            assert rates[row, 0] == pytest.approx(think, nan_ok=True)
        assert kept[row] == expected
    halves = rates[2::5, 0]
    assert halves.mean() == pytest.approx(0.5, abs=0.15)
    assert len(set(halves)) > 1, "blocks and prompts share no random numbers"


def test_nothing_to_measure(prompts: Dataset, tmp_path: Path) -> None:
    """Without a reference answer no model is loaded: this one does not exist."""
    rewards = measure(
        prompts.select_columns(["prompt"]).add_column("answer", [None] * 32), arguments("nobody"), tmp_path
    )
    assert np.isnan(rewards).all()
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_needed(prompts: Dataset, tmp_path: Path) -> None:
    check_model(DifficultyArguments())
    with pytest.raises(ValueError, match="difficulty_model is null"):
        measure(prompts, DifficultyArguments(), tmp_path)
    with pytest.raises(ValueError, match="difficulty_model='/nowhere/hft': there is no such folder"):
        check_model(arguments("/nowhere/hft"))


def test_a_tokenizer_without_the_tags_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, "<unk>")))
    bare.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"difficulty_model=.*The tag <think> is not a token"):
        check_model(arguments(str(tmp_path)))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small blocks; how many prompts were sampled, block by block."""
    calls: list[int] = []
    sample = transformers_backend.sample_both_modes

    def count(model: Any, tokenizer: Any, prompts: list, **settings: Any) -> pd.DataFrame:
        calls.append(len(prompts))
        return sample(model, tokenizer, prompts, **settings)

    monkeypatch.setattr(difficulty, "BLOCK", 4)
    monkeypatch.setattr(transformers_backend, "sample_both_modes", count)
    return calls


def test_blocks_are_read_not_sampled_again(
    model_dir: str, prompts: Dataset, tmp_path: Path, sampled: list[int]
) -> None:
    few = prompts.select(range(10))
    args = arguments(model_dir, samples_per_mode=2)
    first = measure(few, args, tmp_path)
    assert sampled == [4, 4, 2]
    np.testing.assert_array_equal(measure(few, args, tmp_path), first)
    assert sampled == [4, 4, 2]

    changed = few.map(lambda row, index: {"answer": "9" if index == 5 else row["answer"]}, with_indices=True)
    measure(changed, args, tmp_path)
    assert sampled == [4, 4, 2, 4], "another answer: its block alone"
    measure(few, arguments(model_dir, samples_per_mode=3), tmp_path)
    assert sampled[4:] == [4, 4, 2], "another setting: all"
    measure(few, arguments(model_dir, samples_per_mode=3, margin=0.5, batch_size=1), tmp_path)
    assert len(sampled) == 7, "neither margin nor batch size is in the samples"


def test_no_block_has_the_seed_of_another_runs_block(
    model_dir: str, prompts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def sample(model: Any, tokenizer: Any, prompts: list, **settings: Any) -> pd.DataFrame:
        seeds.append(settings["seed"])
        modes = ("no_think", "think")
        rows = [(row, mode, place) for row in range(len(prompts)) for mode in modes for place in range(2)]
        columns = pd.DataFrame(rows, columns=["prompt_id", "mode", "sample"])
        return columns.assign(completion="", num_tokens=1, truncated=False)

    monkeypatch.setattr(difficulty, "BLOCK", 4)
    monkeypatch.setattr(transformers_backend, "sample_both_modes", sample)
    for seed in range(3):
        measure(prompts, arguments(model_dir, samples_per_mode=2), tmp_path / str(seed), seed)
    assert len(set(seeds)) == len(seeds) == 24


KILLED = """
    import signal, sys
    from pathlib import Path
    from datasets import Dataset
    from hgpo_trl.evaluation import difficulty, parts

    model, folder = sys.argv[1:]
    write = parts.write_samples

    def write_and_wait(path, *rest):
        write(path, *rest)
        if path.name.endswith("00001.parquet"):
            signal.pause()

    difficulty.BLOCK, parts.write_samples = 4, write_and_wait
    args = difficulty.DifficultyArguments(
        model, difficulty_samples_per_mode=8, difficulty_max_new_tokens=6, difficulty_dtype="float32"
    )
    difficulty.measure(Dataset.from_parquet(f"{folder}/prompts.parquet"), args, Path(folder) / "killed")
"""


@pytest.mark.processes
def test_a_killed_run_goes_on(markov_dir: str, prompts: Dataset, tmp_path: Path, sampled: list[int]) -> None:
    data = planted(prompts, 20)  # 12 of them with an answer: three blocks
    data.to_parquet(tmp_path / "prompts.parquet")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), markov_dir, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    second = tmp_path / "killed" / "pass_rates-00001.parquet"
    try:
        while not second.exists():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(list((tmp_path / "killed").iterdir())) == 2

    args = arguments(markov_dir)
    resumed = measure(data, args, tmp_path / "killed")
    assert sampled == [4], "the third block alone"
    np.testing.assert_array_equal(resumed, measure(data, args, tmp_path / "whole"))
    assert len({row.tobytes() for row in resumed[2::5, 0]}) > 1
