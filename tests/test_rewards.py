"""`hgpo_trl.rewards`: what is scored, and reward functions by name."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hgpo_trl.modes import MODES, format_response
from hgpo_trl.rewards import accuracy_reward, load_reward


def score(response: str, reference: Any) -> float | None:
    (reward,) = accuracy_reward([response], [reference])
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
    assert accuracy_reward([[{"role": "assistant", "content": response}]], ["4"]) == [expected]


@pytest.mark.parametrize("reference", [None, "", "  "])
def test_a_row_without_reference_is_not_scored(reference: str | None) -> None:
    rewards = accuracy_reward(["<no_think> 4 </no_think>"] * 2, answer=[reference, "4"], level=[1, 2])
    assert rewards == [None, 1.0]


@pytest.mark.parametrize("reference", [4, 4.0, "4", "4.0"])
def test_references_may_be_numbers(reference: Any) -> None:
    assert score("<no_think> 4 </no_think>", reference) == 1.0
    assert score("<no_think> 5 </no_think>", reference) == 0.0


@settings(deadline=None, max_examples=100)
@example(answer="\x1f0\u00a0", reasoning="", mode=MODES[0])
@given(answer=st.text(min_size=1).filter(str.strip), reasoning=st.text(), mode=st.sampled_from(MODES))
def test_any_text_equals_itself(answer: str, reasoning: str, mode: str) -> None:
    assert score(format_response(mode, answer, reasoning if mode == "think" else ""), answer) == 1.0


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
        ("hgpo_trl.rewards.__name__", "has no function '__name__'"),
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
