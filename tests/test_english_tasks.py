"""The English tasks: questions and traces are consistent, and the wordings that are kept apart stay apart."""

import importlib
import operator
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hgpo_trl.common.errors import UserError
from hgpo_trl.tasks.english import everyday, legs, letters, minutes, shopping, sums
from hgpo_trl.tasks.english.wording import NUM_OTHER, choose_pattern, counted, listed

TASKS = (sums, shopping, minutes, letters, legs)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
STEP = re.compile(r"(\d+)([-+*])(\d+)=(\d+)")

pytestmark = pytest.mark.unit

queries = st.builds(
    lambda task, seed, which, level: (
        task,
        task.sample(list(task.LEVELS)[level % len(task.LEVELS)], random.Random(seed), which),
    ),
    st.sampled_from(TASKS),
    st.integers(0, 10**6),
    st.sampled_from(["main", "other", "all"]),
    st.integers(0, 99),
)


@given(queries)
def test_every_step_of_a_trace_is_right_and_the_last_one_gives_the_answer(drawn):
    _, query = drawn
    steps = STEP.findall(query.reasoning)
    for left, sign, right, result in steps:
        assert OPERATIONS[sign](int(left), int(right)) == int(result)
    assert re.search(r"\d+$", query.reasoning)[0] == query.answer


@given(st.integers(0, 10**6), st.sampled_from(list(sums.LEVELS)), st.sampled_from(["main", "other"]))
def test_sums_ask_for_the_answer(seed, level, which):
    query = sums.sample(level, random.Random(seed), which)
    prompt = re.sub(r" on \d+ days", "", query.prompt)  # says how many numbers there are
    signed = re.findall(r"(take away |gives away |minus |- )?(\d+)( get off)?", prompt)
    assert len(signed) == level
    assert sum(-int(n) if before or after else int(n) for before, n, after in signed) == int(query.answer)


@given(st.integers(0, 10**6), st.sampled_from(list(letters.LEVELS)), st.sampled_from(["main", "other"]))
def test_letters_ask_for_the_answer(seed, level, which):
    query = letters.sample(level, random.Random(seed), which)
    text = re.search('"(.*)"', query.prompt)[1]
    letter = re.search(r"\bletter (\w)\b|are (\w)\?|often (\w) occurs", query.prompt)
    assert len(text.split()) == level
    letter = next(filter(None, letter.groups()))
    assert text.count(letter) == int(query.answer) > 0
    spelled = text.replace(" ", "")
    counts = [f"{spelled[i]}{spelled[: i + 1].count(letter)}" for i in range(len(spelled))]
    assert query.reasoning.split() == counts


@given(st.integers(0, 10**6), st.sampled_from(list(minutes.LEVELS)), st.sampled_from(["main", "other"]))
def test_minutes_ask_for_the_answer(seed, level, which):
    query = minutes.sample(level, random.Random(seed), which)
    spelled = re.findall(r"(\d+) (hour|minute)", query.prompt)
    assert sum(int(n) * (60 if unit == "hour" else 1) for n, unit in spelled) == int(query.answer)


@given(st.integers(0, 10**6), st.sampled_from(list(shopping.LEVELS)), st.sampled_from(["main", "other"]))
def test_shopping_asks_for_the_answer(seed, level, which):
    query = shopping.sample(level, random.Random(seed), which)
    prices = dict(re.findall(r"an? (\w+) costs (\d+) dollars", query.prompt.lower()))
    if prices:
        bought = re.findall(rf"(\d+) ({'|'.join(prices)})(?:s|es)\b", query.prompt)
        found = sum(int(count) * int(prices[noun]) for count, noun in bought)
    else:
        found = sum(int(n) * int(p) for n, p in re.findall(r"(\d+) \w+ at (\d+) dollars each", query.prompt))
    assert found == int(query.answer)


@given(st.integers(0, 10**6), st.sampled_from(list(legs.LEVELS)), st.sampled_from(["main", "other"]))
def test_legs_ask_for_the_answer(seed, level, which):
    query = legs.sample(level, random.Random(seed), which)
    of_kind = {
        2: "bird duck chicken owl",
        4: "dog cat horse cow lion pig goat rabbit",
        6: "ant bee beetle",
        8: "spider",
    }
    number = {animal: legs for legs, animals in of_kind.items() for animal in animals.split()}
    found = re.findall(r"(\d+) (\w+?)s\b", query.prompt)
    assert len(found) == level
    assert sum(int(count) * number[animal] for count, animal in found) == int(query.answer)


@pytest.mark.parametrize("task", [*TASKS, everyday], ids=lambda task: task.__name__.rpartition(".")[2])
def test_other_wordings_are_kept_apart(task):
    def shapes(which):
        rng = random.Random(0)
        drawn = [task.sample(level, rng, which) for level in task.LEVELS for _ in range(300)]
        assert all(("other wording" in query.domain) == (which == "other") for query in drawn)
        return {query.prompt for query in drawn}

    assert not shapes("main") & shapes("other")
    with pytest.raises(UserError, match="patterns must be one of main, other, all; got 'both'"):
        task.sample(next(iter(task.LEVELS)), random.Random(0), "both")


@given(st.integers(0, 10**6), st.integers(NUM_OTHER + 1, 12))
def test_all_patterns_are_the_main_and_the_other_ones(seed, size):
    pattern, is_other = choose_pattern(range(size), "all", random.Random(seed))
    assert is_other == (pattern >= size - NUM_OTHER)
    assert choose_pattern(range(size), "main", random.Random(seed))[0] < size - NUM_OTHER


def test_everyday_requests_have_an_answer_and_no_trace():
    rng = random.Random(0)
    for level in everyday.LEVELS:
        for query in (everyday.sample(level, rng) for _ in range(300)):
            assert query.answer
            assert not query.reasoning


def test_words_are_listed_and_counted():
    assert [listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    assert [counted(1, "cat"), counted(2, "cat"), counted(3, "toothbrush")] == ["1 cat", "2 cats", "3 toothbrushes"]


@pytest.mark.parametrize("name", ["sums", "shopping", "minutes", "letters", "legs", "everyday"])
def test_a_task_is_found_by_its_dotted_name(name):
    task = importlib.import_module(f"hgpo_trl.tasks.english.{name}")
    assert all(isinstance(weight, int) and weight > 0 for weight in task.LEVELS.values())
