"""The balanced partition of rows: complete, within the limit, as few micro-batches as possible, and of like size."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgpo_trl.training.partition import balanced_partition


def tokens(rows: list[int], prompts: list[int], completions: list[int], multiple: int = 1) -> int:
    """With padding: as wide as the longest prompt and the longest completion, each a multiple."""
    widths = (max(1, *(lengths[row] for row in rows), 1) for lengths in (prompts, completions))
    return len(rows) * sum(multiple * -(-width // multiple) for width in widths)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """Prompt and completion lengths, and processes that they can be divided among."""
    processes = draw(st.integers(1, 5))
    rows = processes * draw(st.integers(1, 8))
    prompts = draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows))
    completions = draw(st.lists(st.integers(0, 60), min_size=rows, max_size=rows))
    return prompts, completions, processes


@given(step=steps(), max_tokens=st.integers(1, 600), multiple=st.sampled_from([None, 4]))
def test_every_row_once_in_as_many_micro_batches_on_all_processes(
    step: tuple[list[int], list[int], int], max_tokens: int, multiple: int | None
) -> None:
    prompts, completions, processes = step
    plan = balanced_partition(prompts, completions, processes, max_tokens, multiple)
    assert {len(together) for together in plan} == {processes}
    parts = [rows for together in plan for rows in together]
    assert all(parts), "a process without rows would have nothing to compute where the others gather weights"
    assert sorted(itertools.chain(*parts)) == list(range(len(prompts)))
    assert all(tokens(rows, prompts, completions, multiple or 1) <= max_tokens for rows in parts if len(rows) > 1)


@given(step=steps(), max_tokens=st.integers(1, 600))
def test_lock_step_costs_no_more_than_one_micro_batch(step: tuple[list[int], list[int], int], max_tokens: int) -> None:
    """And each process computes about as many tokens as the others in a whole step."""
    prompts, completions, processes = step
    plan = balanced_partition(prompts, completions, processes, max_tokens)
    computed = np.array([[tokens(rows, prompts, completions) for rows in together] for together in plan])
    largest = computed.max(axis=1)
    assert (np.diff(largest) <= 0).all(), "the largest come first"
    assert largest.sum() <= computed.sum() / processes + largest[0]
    of_processes = computed.sum(axis=0)
    assert of_processes.max() - of_processes.min() <= largest[0]


@given(completions=st.lists(st.integers(1, 1000), min_size=1, max_size=60), max_tokens=st.integers(1, 5000))
def test_padding_grows_with_the_limit_and_not_with_the_rows(completions: list[int], max_tokens: int) -> None:
    """Of equal prompts: at most 1 + ln(longest / shortest) micro-batches' worth, whatever the number of rows.

    A block's padding is at most its rows times the difference of its width to the next block's, and its rows are at
    most the limit over its width: a lower sum of the integral of 1 / width.
    """
    widths = [completion + 1 for completion in completions]
    plan = balanced_partition([1] * len(completions), completions, 1, max_tokens)
    computed = sum(tokens(rows, [1] * len(completions), completions) for [rows] in plan)
    assert computed <= sum(widths) + max_tokens * (1 + math.log(max(widths) / min(widths)))


def set_partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    if not rows:
        yield []
        return
    first, *rest = rows
    for parts in set_partitions(rest):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


@settings(max_examples=50)
@given(completions=st.lists(st.integers(1, 20), min_size=1, max_size=6), max_tokens=st.integers(1, 80))
def test_no_other_partition_has_fewer_micro_batches(completions: list[int], max_tokens: int) -> None:
    prompts = [2] * len(completions)
    fewest = min(
        len(parts)
        for parts in set_partitions(list(range(len(completions))))
        if all(tokens(part, prompts, completions) <= max_tokens or len(part) == 1 for part in parts)
    )
    assert len(balanced_partition(prompts, completions, 1, max_tokens)) == fewest


@pytest.mark.parametrize(("rows", "max_tokens", "most"), [(256, 16_000, 1.05), (2048, 16_000, 1.01)])
def test_log_normal_lengths_on_eight_processes(rows: int, max_tokens: int, most: float) -> None:
    """Half the responses ten times as long as the others, as in benchmarks/micro_batches.py: tokens and real tokens."""
    rng = np.random.default_rng(0)
    means = np.where(np.arange(rows) % 4 < 2, 4000, 400)
    completions = np.minimum(rng.lognormal(np.log(means) - 0.18, 0.6), 16_000).round().astype(int).tolist()
    prompts = [100] * rows
    plan = balanced_partition(prompts, completions, 8, max_tokens)
    computed = sum(tokens(part, prompts, completions) for together in plan for part in together)
    assert computed <= most * (sum(completions) + sum(prompts))
