"""Reflection words in texts, and what an evaluation makes of them."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hgpo_trl.evaluation.leakage import leakage_table
from hgpo_trl.modes import Mode, format_response, split_response
from hgpo_trl.modes.leakage import REFLECTION_WORDS, count_reflection_words
from hgpo_trl.training.rollout import inspect_responses


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("The answer is 12.", 0),
        ("Wait, let me check that again: 3 + 4 = 7. Hmm... 7.", 4),
        ("Alternatively, let's see. Let’s verify; LET US THINK step by step.", 5),
        ("On second thought, hold on. I double-checked it and will re-check, then retry.", 5),
        ("wait wait\nwait", 3),
        ("Hmmmm", 1),
        # in other words, or in ordinary prose
        ("The waiter awaits the hummus; verified outlets let metal retry-free.", 1),
        ("However, first add the eggs. Therefore, check the oven now, but not again. Let me", 1),
        ("let men and let's eat", 0),
    ],
)
def test_words_by_hand(text: str, count: int) -> None:
    assert count_reflection_words(text) == count


@given(
    words=st.lists(st.sampled_from(["wait", "Let me", "hmm", "the", "12", "=", "step-by-step", "waiting"]), max_size=30)
)
def test_every_word_counts_once_wherever_it_stands(words: list[str]) -> None:
    reflects = {"wait", "Let me", "hmm", "step-by-step"}
    for separator in (" ", "\n", ", "):
        assert count_reflection_words(separator.join(words)) == sum(word in reflects for word in words)


@pytest.mark.parametrize("language", REFLECTION_WORDS)
def test_no_word_is_counted_twice(language: str) -> None:
    assert len(set(REFLECTION_WORDS[language])) == len(REFLECTION_WORDS[language])
    assert count_reflection_words("plain text of no one who reflects", language) == 0


def test_time_is_linear_in_the_text() -> None:
    """No pattern can be made to backtrack: a text that almost matches everywhere, once and 20 times as long."""
    text = "hmmmmmmmmmm_ let let us step by double chec check it check this " * 2000
    assert count_reflection_words(text) == 0
    assert count_reflection_words(text * 5) == 0


def table_of(*responses: tuple[int, Mode, str]) -> dict[str, list[float]]:
    samples = pd.DataFrame(responses, columns=["prompt_id", "mode", "completion"])
    return {name: column.tolist() for name, column in leakage_table(samples.sample(frac=1, random_state=1)).items()}


def test_a_table_by_hand() -> None:
    long = f"wait {'x' * 15}"  # 20 characters
    found = table_of(
        (7, Mode.THINK, format_response("think", "12345", "let me see, hmm")),
        (7, Mode.THINK, format_response("think", "wait 123456789.", "none")),  # 15 characters
        (7, Mode.NO_THINK, format_response("no_think", long)),
        (7, Mode.NO_THINK, "<no_think> wait, wait"),  # unclosed, 10 characters
        (2, Mode.THINK, "<think> wait, no end"),  # without an answer
        (2, Mode.THINK, "<think> no end"),
        (2, Mode.NO_THINK, format_response("no_think", "1234")),
        (2, Mode.NO_THINK, format_response("no_think", "5678")),
    )
    assert found == {
        "reflection_words/no_think": [0.0, 1.5],
        "reflection_words/think_answer": pytest.approx([math.nan, 0.5], nan_ok=True),
        "reflection_words/reasoning": [0.5, 1.0],
        "answer_length/no_think": [4.0, 15.0],
        "answer_length/think_answer": pytest.approx([math.nan, 10.0], nan_ok=True),
        "answer_length_ratio": pytest.approx([math.nan, 1.5], nan_ok=True),
    }


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(Mode), st.sampled_from(["4", "wait 4", ""])), min_size=1))
def test_the_table_is_that_of_a_loop(rows: list[tuple[int, Mode, str]]) -> None:
    form = {Mode.THINK: "<think> hmm </think> {}", Mode.NO_THINK: "<no_think> {} </no_think>"}
    completions = [(prompt, mode, form[mode].format(text)) for prompt, mode, text in rows]
    found = table_of(*completions)
    for place, prompt in enumerate(sorted({prompt for prompt, *_ in rows})):
        parts = [split_response(text) for of, mode, text in completions if of == prompt and mode is Mode.THINK]
        answers = [part.answer for part in parts if part.answer]
        no_think = [
            split_response(text).answer for of, mode, text in completions if of == prompt and mode is Mode.NO_THINK
        ]
        for name, texts in (("think_answer", answers), ("no_think", no_think)):
            words = np.mean([text.count("wait") for text in texts]) if texts else math.nan
            assert found[f"reflection_words/{name}"][place] == pytest.approx(words, nan_ok=True)
        reasoning = 1.0 if parts else math.nan
        assert found["reflection_words/reasoning"][place] == pytest.approx(reasoning, nan_ok=True)


def test_training_counts_the_words_of_no_think_answers_alone() -> None:
    texts = [
        format_response("think", "let me 4", "hmm, wait"),
        format_response("no_think", "wait, let me see: 4"),
        "hmm, no mode",
        "<no_think> hmm",
    ]
    found = inspect_responses([split_response(text) for text in texts], [[1]] * 4, {1})
    assert found[:, 2].tolist() == [0, 2, 0, 1]
