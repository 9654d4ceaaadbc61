"""`hgpo_trl.rewards`: what is scored, when two answers are equal, real answers, reward functions by name."""

import asyncio
import itertools
import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hgpo_trl.common.errors import UserError
from hgpo_trl.modes import MODES, format_response
from hgpo_trl.rewards import functions as rewards_module
from hgpo_trl.rewards.functions import (
    accuracy_reward,
    answer_parts,
    check_finite,
    check_weights,
    checked,
    floor_faults,
    load_reward,
    overlong,
    split_completions,
    weighted_sum,
)


def score(response: Any, reference: Any) -> float | None:
    """As the trainer and the evaluation call it."""
    parts = split_completions([response])
    (reward,) = accuracy_reward(answer_parts([response], parts), [reference], response=parts)
    return reward


# --- What is scored -----------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        pytest.param("<think> it is 4 </think> 4", 1.0, id="think"),
        pytest.param("<no_think> 4 </no_think>", 1.0, id="no think"),
        pytest.param("<think></think> 4", 1.0, id="empty reasoning"),
        pytest.param("<think> it is 4 </think> 5", 0.0, id="right in the reasoning only"),
        pytest.param("<think> it is 5 </think> 4", 1.0, id="wrong in the reasoning only"),
        pytest.param("<no_think> 5 </no_think>", 0.0, id="wrong"),
        pytest.param("4", 0.0, id="no mode"),
        pytest.param("Well: <think> a </think> 4", 0.0, id="text before the tag"),
        pytest.param("<think> it is 4", 0.0, id="think unclosed"),
        pytest.param("<no_think> 4", 0.0, id="no think unclosed"),
        pytest.param("<think> a </no_think> 4", 0.0, id="closed by the other mode"),
        pytest.param("<think> a <think> b </think> 4", 0.0, id="nested"),
        pytest.param("<think> a </think> 4 </think>", 0.0, id="closed twice"),
        pytest.param("<no_think> <think> a </think> 4 </no_think>", 0.0, id="think in no think"),
        pytest.param("<no_think> 4 </no_think> so 4", 0.0, id="text after no think"),
        pytest.param("<think> it is 4 </think>", 0.0, id="empty answer"),
        pytest.param("", 0.0, id="nothing"),
    ],
)
def test_only_a_well_formed_answer_counts(response: str, expected: float) -> None:
    assert score(response, "4") == expected
    assert score([{"role": "assistant", "content": response}], "4") == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("4", 1.0),
        ("The answer is $4$.", 1.0),
        ("5", 0.0),
        ("", 0.0),
        ("<think> it is 4 </think> 4", 1.0),
        ("<think> it is 4 </think> 5", 0.0),
        ("<no_think> 4 </no_think>", 1.0),
        ("<no_think> 4 </no_think> so 4", 0.0),
        ("<think> it is 4", 0.0),
    ],
)
def test_called_on_its_own_it_takes_answers_and_whole_responses(completion: str, expected: float) -> None:
    assert accuracy_reward([completion], ["4"]) == [expected]
    assert accuracy_reward([[{"role": "assistant", "content": completion}]], ["4"]) == [expected]
    assert accuracy_reward([completion]) == [None]


def test_parts_that_were_split_already_are_not_split_again() -> None:
    """An answer may begin with a tag; its response is malformed then, and what the trainer says of it counts."""
    response = "<think> a </think> <no_think> 4 </no_think>"
    assert score(response, "4") == 0.0


def test_a_verifier_that_fails_is_no_verdict(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[tuple[list[str], list[str]]] = []

    def check(references: list[str], answers: list[str]) -> list[bool | None]:
        asked.append((references, answers))
        return [
            None if answer == "stuck" else answer == reference
            for reference, answer in zip(references, answers, strict=True)
        ]

    monkeypatch.setattr(rewards_module, "check_answers", check)
    logged: list[tuple[str, float]] = []
    rewards_module._warn_once.cache_clear()
    for _ in range(2):
        rewards = accuracy_reward(
            ["4", "stuck", "<think> a", "5", "4"], ["4", 4, "4", "4", None], log_metric=lambda *x: logged.append(x)
        )
        assert rewards == [1.0, None, 0.0, 0.0, None]
    assert asked == [(["4", "4", "4"], ["4", "stuck", "5"])] * 2, "one call for all; no malformed or unanswered row"
    assert logged == [("hgpo/verifier_failures", 1 / 3)] * 2
    assert [record.message for record in caplog.records if "verifier" in record.message] == [
        "The verifier was stuck or crashed and could not judge an answer. Such a response gets no reward and "
        "carries no signal; hgpo/verifier_failures is their share."
    ]


@pytest.mark.parametrize("reference", [None, "", "  "])
def test_a_row_without_reference_is_not_scored(reference: str | None) -> None:
    rewards = accuracy_reward(["<no_think> 4 </no_think>"] * 2, answer=[reference, "4"], level=[1, 2])
    assert rewards == [None, 1.0]


@pytest.mark.parametrize("reference", [4, 4.0, "4", "4.0"])
def test_references_may_be_numbers(reference: Any) -> None:
    assert score("<no_think> 4 </no_think>", reference) == 1.0
    assert score("<no_think> 5 </no_think>", reference) == 0.0


@settings(max_examples=100)
@example(answer="\x1f0\u00a0", reasoning="", mode=MODES[0])
@given(answer=st.text(min_size=1).filter(str.strip), reasoning=st.text(), mode=st.sampled_from(MODES))
def test_any_text_equals_itself(answer: str, reasoning: str, mode: str) -> None:
    assert score(format_response(mode, answer, reasoning if mode == "think" else ""), answer) == 1.0


# --- What becomes of the rewards ----------------------------------------------

scores = st.sampled_from([math.nan, -2.5, 0.0, 0.25, 7.0])


@settings(max_examples=200)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.tuples(scores, scores)), min_size=1, max_size=12),
)
def test_faults_get_the_lowest_reward(rows: list[tuple[int, bool, tuple[float, float]]]) -> None:
    query, faulty, given_rewards = (list(column) for column in zip(*rows, strict=True))
    rewards = torch.tensor(given_rewards, dtype=torch.float64)
    result = floor_faults(rewards, torch.tensor(faulty), torch.tensor(query))
    for row, column in itertools.product(range(len(rows)), range(2)):
        before, after = given_rewards[row][column], result[row, column].item()
        of_query = [given_rewards[other][column] for other in range(len(rows)) if query[other] == query[row]]
        well_formed = [other for other in range(len(rows)) if query[other] == query[row] and not faulty[other]]
        valid = [given_rewards[other][column] for other in well_formed]
        valid = [value for value in valid if not math.isnan(value)]
        if faulty[row] and not all(math.isnan(value) for value in of_query):
            assert after == min([0.0, *valid])
        else:
            assert after == before or (math.isnan(after) and math.isnan(before))


@settings(max_examples=100)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.tuples(scores, scores)), min_size=1, max_size=12),
    others=st.lists(st.tuples(st.integers(4, 6), st.booleans(), st.tuples(scores, scores)), max_size=12),
    data=st.data(),
)
def test_a_query_is_floored_the_same_in_any_batch(
    rows: list[tuple[int, bool, tuple[float, float]]],
    others: list[tuple[int, bool, tuple[float, float]]],
    data: st.DataObject,
) -> None:
    """Whatever other queries scored, and in whatever order the rows come."""
    order = data.draw(st.permutations(range(len(rows) + len(others))))
    together = [(rows + others)[place] for place in order]

    def floored(batch: list[tuple[int, bool, tuple[float, float]]]) -> torch.Tensor:
        query, faulty, given_rewards = (list(column) for column in zip(*batch, strict=True))
        return floor_faults(torch.tensor(given_rewards), torch.tensor(faulty), torch.tensor(query))

    torch.testing.assert_close(
        floored(together)[[order.index(row) for row in range(len(rows))]], floored(rows), rtol=0, atol=0, equal_nan=True
    )


@settings(max_examples=100)
@given(
    rows=st.lists(st.tuples(scores, scores), min_size=1, max_size=5),
    weights=st.tuples(*[st.sampled_from([0.0, 0.5, 2.0])] * 2),
)
def test_the_weighted_sum_is_of_what_scores_a_response(
    rows: list[tuple[float, float]], weights: tuple[float, float]
) -> None:
    totals = weighted_sum(torch.tensor(rows, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))
    for row, total in zip(rows, totals.tolist(), strict=True):
        parts = [weight * reward for weight, reward in zip(weights, row, strict=True) if not math.isnan(reward)]
        assert total == pytest.approx(sum(parts) if parts else math.nan, nan_ok=True)


@settings(max_examples=100)
@given(
    rows=st.lists(st.tuples(st.booleans(), st.tuples(scores, scores)), min_size=1, max_size=6),
    weights=st.tuples(*[st.sampled_from([-2.0, -0.5, 0.0, 1.0])] * 2),
)
def test_no_weight_makes_a_broken_format_the_better_choice(
    rows: list[tuple[bool, tuple[float, float]]], weights: tuple[float, float]
) -> None:
    faulty, rewards = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    floored = floor_faults(rewards, faulty, torch.zeros(len(rows), dtype=torch.long), torch.tensor(weights))
    weighted = floored * torch.tensor(weights)
    for column in weighted.T:
        well_formed = column[~faulty & ~column.isnan()]
        if len(well_formed) and faulty.any():
            assert column[faulty].max() <= well_formed.min()


@pytest.mark.parametrize("weights", [[1.0, math.nan], [math.inf]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"reward_weights must be finite numbers; got \["):
        check_weights(weights)
    check_weights(None, 3)
    check_weights([0.0, -2.0], 2)
    with pytest.raises(UserError, match=r"reward_weights has 2 entries for 3 reward functions\. Give one for each"):
        check_weights([0.0, 2.0], 3)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e39])
def test_an_infinite_reward_names_its_function(value: float) -> None:
    rewards = torch.tensor([[1.0, math.nan], [0.0, value]])
    with pytest.raises(UserError, match=r"'second' returned -?inf, of which no mean can be taken"):
        check_finite(rewards, ["first", "second"])
    check_finite(rewards[:1], ["first", "second"])


lengths = st.integers(0, 9)


@settings(max_examples=200)
@given(
    groups=st.lists(st.lists(st.tuples(lengths, st.booleans()), min_size=4, max_size=4), min_size=1, max_size=4),
    cap=st.none() | st.sampled_from([0.5, 1.0, 1.5]),
    max_tokens=st.none() | st.integers(1, 9),
)
def test_no_think_is_capped_by_its_own_query(
    groups: list[list[tuple[int, bool]]], cap: float | None, max_tokens: int | None
) -> None:
    data = torch.tensor(groups).view(-1, 2, 2, 2)
    beyond = overlong(data[..., 0], data[..., 1].bool(), cap, max_tokens)
    for group, found in zip(groups, beyond.view(-1, 4).tolist(), strict=True):
        thoughts = [tokens for tokens, well_formed in group[:2] if well_formed]
        limits = [cap * max(thoughts)] if cap is not None and thoughts else []
        limits += [max_tokens] if max_tokens is not None else []
        assert found == [False, False, *(any(tokens > limit for limit in limits) for tokens, _ in group[2:])]


def returns(value: Any) -> Callable[..., Any]:
    def mine(**kwargs: Any) -> Any:
        return value

    return mine


async def asynchronous(completions: list, **kwargs: Any) -> list[int | None]:
    return [1, None]


class Scorer:
    def __call__(self, completions: list, factor: float, **kwargs: Any) -> list[float]:
        return [factor] * len(completions)


def test_checked_functions_return_numbers() -> None:
    assert checked(returns([1, True, torch.tensor(0.5), -2.0]))(completions=["a"] * 4) == [1.0, 1.0, 0.5, -2.0]
    assert checked(returns(torch.tensor([1.0, 2.0])))(completions=["a"] * 2) == [1.0, 2.0]
    assert math.isnan(checked(returns([None]))(completions=["a"])[0])
    one, none = asyncio.run(checked(asynchronous)(completions=["a", "b"]))
    assert (one, math.isnan(none)) == (1.0, True)
    assert checked(Scorer())(completions=["a"], factor=2.0) == [2.0]
    assert checked("a/model") == "a/model"
    names = [checked(function).__name__ for function in (accuracy_reward, partial(accuracy_reward), Scorer())]
    assert names == ["accuracy_reward", "accuracy_reward", "Scorer"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], r"'mine' returned 1 rewards for 2 completions: it must return one number, or None, per completion"),
        (
            ["good", 1.0],
            r"'mine' returned \['good', 1\.0\] \(must be real number, not str\): it must return one number",
        ),
        ([[1.0], [2.0]], r"'mine' returned .*must be real number, not list"),
        ({"a": 1.0, "b": 2.0}, r"'mine' returned .*must be real number, not str"),
        (1.0, r"'mine' returned 1\.0 \('float' object is not iterable\)"),
        (None, r"'mine' returned None"),
        ("x" * 1000, r"'mine' returned 'x{79}\.\.\. \(must"),
    ],
)
def test_what_is_no_list_of_rewards_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(returns(value))(completions=["a", "b"])


def test_an_error_in_a_function_names_it() -> None:
    def broken(**kwargs: Any) -> list[float]:
        return kwargs["nothing"]

    with pytest.raises(KeyError, match="nothing") as caught:
        checked(broken)(completions=["a"])
    assert caught.value.__notes__ == ["Raised by the reward function 'broken'."]


def test_outside_the_main_thread() -> None:
    rewards: list[float | None] = []

    def work() -> None:
        responses = ["<think> a </think> \\boxed{\\frac{2}{4}}", "<no_think> \\frac{1}{3} </no_think>"]
        rewards.extend(accuracy_reward(responses, ["\\frac{1}{2}"] * 2))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert rewards == [1.0, 0.0]


# --- Reward functions by name -------------------------------------------------


@pytest.fixture
def reward_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text("ONE = 1.0\n\ndef one(completions, **kwargs):\n    return [ONE] * len(completions)\n")
    return path


def test_load_reward_by_module() -> None:
    assert load_reward("hgpo_trl.rewards.accuracy_reward") is accuracy_reward


def test_load_reward_by_file(reward_file: Path) -> None:
    one = load_reward(f"{reward_file}:one")
    assert isinstance(one, Callable)
    assert one(completions=["a", "b"]) == [1.0, 1.0]
    assert one.__name__ == "one"


def test_load_reward_by_file_in_the_working_directory(reward_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reward_file.parent)
    assert callable(load_reward("my_rewards.py:one"))


def test_load_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reward-model").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("allenai/Llama-3.1-Tulu-3-8B-RM", str(tmp_path / "reward-model"), "reward-model"):
        assert load_reward(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hgpo_trl.rewards.nothing", "hgpo_trl.rewards has no function 'nothing'"),
        ("hgpo_trl.rewards._TIMEOUT_S", "has no function '_TIMEOUT_S'"),
        ("hgpo_trl.nowhere.accuracy_reward", "There is no module 'hgpo_trl.nowhere'"),
        ("nowhere.accuracy_reward", "There is no module 'nowhere'"),
        ("accuracy", "neither a function .* nor a reward model's id or path"),
        ("missing.py:one", "There is no file missing.py"),
        ("{file}:two", "has no function 'two'"),
        ("{file}:ONE", "has no function 'ONE'"),
        ("{file}", "names a file but no function"),
        ("my_rewards.py", "names a file but no function"),
    ],
)
def test_load_reward_errors(reward_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(reward_file.parent)
    with pytest.raises(ValueError, match=message):
        load_reward(name.format(file=reward_file))
